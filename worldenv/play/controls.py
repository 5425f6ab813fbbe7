"""Which key moves what: laid out from the embodiment, so that the page knows no robot.

Translations lie as the first fixed camera sees them: of three, the one that goes across its picture
takes the keys for right and left, of the others the one that goes along its sight those for away
and near, the last those for up and down. Without such a camera they follow their order. Keys are
named by place (KeyboardEvent.code), whatever is printed on them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from worldenv.data.camera import Camera
from worldenv.data.embodiment import Embodiment

# (up or plus, down or minus), and the stick of a gamepad that has the standard layout.
_MOVES = (
    (("KeyD", "KeyA"), 0),
    (("KeyW", "KeyS"), 1),
    (("KeyR", "KeyF"), 3),
    (("KeyY", "KeyH"), None),
    (("KeyX", "KeyZ"), None),
    (("KeyV", "KeyC"), None),
)
_TURNS = (
    (("KeyL", "KeyJ"), 2),
    (("KeyI", "KeyK"), None),
    (("KeyO", "KeyU"), None),
    (("BracketRight", "BracketLeft"), None),
    (("Period", "Comma"), None),
    (("Equal", "Minus"), None),
)
_GRIPS = ((("Space",), None), (("KeyG",), None))
_SEEN = (("right", "left"), ("away", "near"), ("up", "down"))


@dataclass(frozen=True)
class Control:
    """Keys for one number of an action."""

    index: int
    """Its place in the action."""
    kind: str
    """translate, turn or grip."""
    name: str
    """As the embodiment calls what it moves."""
    keys: tuple[str, ...]
    """Two that are held, for the first and the second of `words`; one that switches a grip; none
    where there are more numbers than keys."""
    words: tuple[str, str]
    """What the keys do."""
    sign: float
    """Of the number under the first of `words`."""
    stick: int | None
    """Axis of a gamepad."""


def controls(robot: Embodiment) -> list[Control]:
    """One for each number of an action, in their order."""
    found = []
    moves = robot.actions("translate")
    fixed = next((c for c in robot.cameras if c.mount == "world"), None)
    seen = _as_seen(fixed) if fixed is not None and len(moves) == 3 else None
    for kind, keys, entries in (
        ("translate", _MOVES, "position"),
        ("turn", _TURNS, "rotation"),
        ("grip", _GRIPS, None),
    ):
        places = robot.actions(kind)
        names = [robot.proprio[i].name for i in robot.entries(entries)] if entries else []
        if len(names) != len(places):
            names = [f"{kind} {n + 1}" if len(places) > 1 else kind for n in range(len(places))]
        for n, place in enumerate(places):
            slot, sign, words = n, 1.0, (f"{names[n]} +", f"{names[n]} −")
            if kind == "grip":
                sign, words = float(robot.gripper_closes), ("close", "open")
            elif kind == "translate" and seen:
                slot, sign = seen[n]
                words = _SEEN[slot]
            codes, stick = keys[slot] if slot < len(keys) else ((), None)
            found.append(Control(place, kind, names[n], codes, words, sign, stick))
    return sorted(found, key=lambda c: c.index)


def _as_seen(camera: Camera) -> list[tuple[int, float]]:
    """For x, y and z of the world: its pair of `_SEEN`, and the sign that goes with the first."""
    turn = np.array(camera.pose).reshape(4, 4)[:3, :3]
    # Rows: the world's axes by the camera's, which point right, up and away in its pictures.
    way = turn * np.array([1 - 2 * camera.mirrored, 1 - 2 * camera.upside_down, -1])
    across = int(np.abs(way[:, 0]).argmax())
    rest = [i for i in range(3) if i != across]
    along = max(rest, key=lambda i: abs(way[i, 2]))
    (upward,) = (i for i in rest if i != along)
    axes = {across: 0, along: 1, upward: 2}
    return [_signed(way[i, _COLUMN[axes[i]]], axes[i]) for i in range(3)]


_COLUMN = (0, 2, 1)  # of the camera's axes: right, away, up


def _signed(part: float, slot: int) -> tuple[int, float]:
    return slot, 1.0 if part >= 0 else -1.0


def reaches(robot: Embodiment, actions: Sequence[np.ndarray]) -> list[float]:
    """How far each number of an action goes at most when a key is held: as far as 99 of 100 of
    those recorded `[T, A]` of its kind. Beyond that a learned world has seen nothing."""
    size = np.quantile(np.abs(np.concatenate(list(actions))), 0.99, axis=0)
    most = {kind: float(size[list(robot.actions(kind))].max()) for kind in set(robot.action)}
    return [1.0 if k == "grip" else min(max(most[k], 0.02), 1.0) for k in robot.action]
