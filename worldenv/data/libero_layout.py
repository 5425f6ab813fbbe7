"""LIBERO's HDF5 layout, declared once: each array's name, shape, kind and range; `read_array`
checks it.

Letters in shapes are bound by the first array that has them: T actions, F frames, H image side,
S state, A action dims, P proprio dims, V views.
Whatever a file holds, reading it either gives arrays of these shapes or raises a UserError
that names file, demonstration and array.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import h5py
import numpy as np

from worldenv.runtime.errors import UserError

CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")
LONGEST = 100_000  # actions of one demonstration; more is a damaged header
LARGEST = 4096  # pixels


@dataclass(frozen=True)
class Array:
    """What one array must be; low and high bound its values, `mend` says what they mean."""

    shape: tuple[str | int, ...]
    kind: Literal["number", "flag", "step", "image"]
    low: float = -np.inf
    high: float = np.inf
    mend: str = "Record the demonstration again, or leave it out."


_KINDS = {  # kind: dtypes taken, and their name in messages
    "number": ("fiu", "real numbers"),
    "flag": ("fiub", "zeros and ones"),
    "step": ("iu", "whole numbers"),
    "image": ("u", "uint8"),
}
_IMAGE = Array(
    ("F", "H", "H", 3), "image", 0, 255, "Store square 8-bit RGB images with values in 0..255."
)
_POSITION = "Positions are in metres in the world's frame, as robosuite gives them."
_ROTATION = "Rotations are axis-angle in rad (robosuite's quat2axisangle), not quaternions."

LAYOUT: dict[str, Array] = {
    "actions": Array(
        ("T", 7),
        "number",
        mend="Actions are six OSC_POSE deltas within -1..1 and a gripper command, -1 open, +1 "
        "close. Convert them, and leave out what cannot be converted.",
    ),
    "dones": Array(("T",), "flag", 0, 1, "One flag for each action, 1 where the task is solved."),
    "rewards": Array(("T",), "number", mend="One reward for each action, above 0 where solved."),
    "states": Array(("T", "S"), "number", mend="One MuJoCo state before each action."),
    "frame_steps": Array(("all F",), "step", 0, LONGEST, "The step of each frame."),
    "obs/agentview_rgb": _IMAGE,
    "obs/eye_in_hand_rgb": _IMAGE,
    "obs/ee_pos": Array(("F", 3), "number", -3, 3, _POSITION),
    "obs/ee_ori": Array(("F", 3), "number", -6.4, 6.4, _ROTATION),
    "obs/ee_states": Array(("F", 6), "number", -6.4, 6.4, f"{_POSITION} {_ROTATION}"),
    "obs/gripper_states": Array(
        ("F", 2), "number", -0.1, 0.1, "Both fingers' joint positions in metres."
    ),
    "obs/joint_states": Array(("F", 7), "number", -7, 7, "The arm's seven joint angles in rad."),
    # Of other benchmarks' episodes, whatever their robot; images are upright.
    "other/actions": Array(("T", "A"), "number"),
    "other/images": Array(("F", "V", "H", "H", 3), "image", 0, 255, _IMAGE.mend),
    "other/proprio": Array(("F", "P"), "number"),
}

Sizes = dict[str, tuple[int, str]]  # letter: its size and the array that first had it


@contextmanager
def readable(where: str) -> Iterator[None]:
    """HDF5's own complaints about damaged content become a UserError naming `where`."""
    try:
        yield
    except (
        OSError,
        KeyError,
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        MemoryError,
        OverflowError,
    ) as error:
        raise UserError(
            f"{where}: expected content that HDF5 can read, got {type(error).__name__}: {error}. "
            "The file is damaged or foreign: copy, convert or record it again."
        ) from error


def contents(group: h5py.Group, where: str) -> list[str]:
    """Names of what a group holds, sorted."""
    with readable(where):
        # h5py gives names that are not UTF-8 as bytes.
        return sorted(name if isinstance(name, str) else repr(name) for name in group)


def member(group: h5py.Group, name: str, where: str) -> h5py.Group | h5py.Dataset | None:
    """What `name` is in a group, None where there is nothing or a link to nothing."""
    with readable(f"{where}/{name}"):
        return group.get(name)


def subgroup(group: h5py.Group, name: str, where: str) -> h5py.Group:
    """The group `name`; UserError if it is absent or an array."""
    found = member(group, name, where)
    if not isinstance(found, h5py.Group):
        got = "a dataset" if found is not None else f"only {contents(group, where)[:12]}"
        raise UserError(
            f"{where}: expected a group `{name}`, got {got}. The file does not follow LIBERO's "
            "layout (data/demo_i/{actions, dones, obs}): convert it, or create observations from "
            "states with LIBERO's create_dataset.py."
        )
    return found


def read_array(
    group: h5py.Group,
    name: str,
    where: str,
    sizes: Sizes,
    declared: str | None = None,
    ranged: bool = True,
) -> np.ndarray:
    """The array `name` of a group, checked against LAYOUT[declared] (default: `name` itself).

    sizes: the letters bound so far, extended by this array's. ranged: whether numbers must lie in
    the declared range (Panda's); files of ours may be of another robot.
    """
    expected, place = LAYOUT[declared or name], f"{where}/{name}"
    shape = array_shape(group, name, where, declared)
    _check_shape(place, name, shape, expected, sizes)
    with readable(place):
        values = group[name][()]
    _check_values(place, values, expected, ranged)
    return values


def array_place(
    group: h5py.Group, name: str, where: str, sizes: Sizes, declared: str
) -> tuple[tuple[int, ...], int]:
    """The shape of an array, checked as `read_array` does, and where its bytes lie in the file."""
    shape, place = array_shape(group, name, where, declared), f"{where}/{name}"
    _check_shape(place, name, shape, LAYOUT[declared], sizes)
    with readable(place):
        offset = group[name].id.get_offset()
    if offset is None:
        raise UserError(
            f"{place}: expected pictures in one uncompressed piece, as worldenv writes them, got "
            "chunks. Hold frames in memory (--data.memory GIB), or record the episodes again."
        )
    return shape, offset


def array_shape(
    group: h5py.Group, name: str, where: str, declared: str | None = None
) -> tuple[int, ...]:
    """The shape of an array, sure to be one of as many axes and of the kind that is declared."""
    expected, place = LAYOUT[declared or name], f"{where}/{name}"
    found = member(group, name, where)
    if not isinstance(found, h5py.Dataset):
        got = "a group" if found is not None else f"only {contents(group, where)[:12]}"
        raise UserError(
            f"{where}: expected a dataset `{name}`, got {got}. "
            "The file does not follow LIBERO's layout: convert it, or point to another file."
        )
    with readable(place):
        dtype, shape = found.dtype, found.shape
    kinds, words = _KINDS[expected.kind]
    if dtype.kind not in kinds or (expected.kind == "image" and dtype != np.uint8):
        raise UserError(f"{place}: expected {words}, got {dtype}. {expected.mend}")
    if shape is None or len(shape) != len(expected.shape):
        raise _wrong_shape(place, shape, expected, {})
    return shape


def _check_shape(
    place: str, name: str, shape: tuple[int, ...], expected: Array, sizes: Sizes
) -> None:
    bound = dict(sizes)
    for size, letter in zip(shape, expected.shape, strict=True):
        most = LARGEST if letter == "H" else LONGEST
        known = letter if isinstance(letter, int) else bound.setdefault(letter, (size, name))[0]
        if size != known or not 1 <= size <= most:
            raise _wrong_shape(place, shape, expected, sizes)
    sizes.update(bound)


def _wrong_shape(
    place: str, shape: tuple[int, ...] | None, expected: Array, sizes: Sizes
) -> UserError:
    letters = ", ".join(str(s) for s in expected.shape)
    known = [f"{k} = {n} as in {of}" for k, (n, of) in sizes.items() if k in expected.shape]
    here = f" with {', '.join(known)}" if known else ""
    got = "nothing" if shape is None else list(shape)
    return UserError(f"{place}: expected shape [{letters}]{here}, got {got}. {expected.mend}")


def _check_values(place: str, values: np.ndarray, expected: Array, ranged: bool) -> None:
    if expected.kind == "image":
        return
    finite = np.isfinite(values)
    if not finite.all():
        row = int(np.argwhere(~finite)[0][0])
        raise UserError(
            f"{place}: expected finite numbers, got {int((~finite).sum())} NaN or infinite "
            f"value(s), the first in row {row}. Remove the demonstration or record it again."
        )
    low, high = values.min(), values.max()
    if expected.kind == "flag" and not np.isin(values, (0, 1)).all():
        raise UserError(f"{place}: expected zeros and ones, got {low}..{high}. {expected.mend}")
    bound = ranged or expected.kind != "number"
    if bound and (low < expected.low or high > expected.high):
        raise UserError(
            f"{place}: expected values within {expected.low:g}..{expected.high:g}, got "
            f"{low:g}..{high:g}. {expected.mend}"
        )


def read_text(owner: h5py.Group, name: str, where: str) -> str | None:
    """The text attribute `name` of a group, None where there is none."""
    with readable(f"{where}: attribute `{name}`"):
        value = owner.attrs.get(name)
        if isinstance(value, bytes):
            value = value.decode()
    if value is not None and not isinstance(value, str):
        raise UserError(
            f"{where}: attribute `{name}`: expected text, got {type(value).__name__} {value!r}. "
            "Write it as text, or delete the attribute."
        )
    return value
