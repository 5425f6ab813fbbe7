"""What a data set does not say of itself: found by names, by values and by how the robot moves.

Published sets of one benchmark disagree in the names of cameras and state, in the sign of the
gripper, in how images lie and in what their frame rate means. What is found is said in one line
(`Reading`), and every part of it can be given instead (`DataConfig`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from scipy.spatial.transform import Rotation

from worldenv.data.conventions import LOOK_AT, Conventions, Moving, judge
from worldenv.data.embodiment import Embodiment
from worldenv.data.episode import area_resize, continuous_axis_angle
from worldenv.data.lerobot.frames import Cameras
from worldenv.data.lerobot.layout import DataSet
from worldenv.data.lerobot.rows import Rows
from worldenv.data.lerobot.tables import vectors
from worldenv.runtime.errors import UserError
from worldenv.sources import DataConfig

_WRIST = re.compile(r"wrist|hand|gripper|image2$|image_2$", re.I)
_SMALL = 64  # pixels, enough to see where a picture changes
_MOVED = 1e-3  # m of finger travel
_TURNED = 0.02  # rad, in all of what is looked at
_SAID = Conventions("before", "upright", "as LeRobot defines it", "as written")
ROTATIONS = ("axis-angle", "euler", "quaternion-xyzw", "quaternion-wxyz")


@dataclass(frozen=True)
class Reading:
    """How a data set is read. closes: the sign of a command that closes its gripper; unit: whether
    commands are 0 and 1; by: how each was found.
    """

    cameras: tuple[str, ...]
    state: str
    action: str
    closes: int
    unit: bool
    rotation: str
    conventions: Conventions
    rate: str
    by: dict[str, str]

    def __str__(self) -> str:
        values = "01" if self.unit else ("-1", "+1")
        opened, closed = values if self.closes > 0 else reversed(values)
        parts = [
            f"cameras {', '.join(self.cameras)} ({self.by['cameras']})",
            f"{self.state} turned as {self.rotation} ({self.by['rotation']})",
            f"gripper {opened} open, {closed} closed ({self.by['gripper']})",
            self.rate,
            str(self.conventions),
        ]
        return "; ".join(parts)

    def actions(self, raw: np.ndarray, robot: Embodiment) -> np.ndarray:
        """Commands [T, A] in the robot's sign, in -1..1."""
        out = raw.copy()
        for k in robot.actions("grip"):
            command = 2 * raw[:, k] - 1 if self.unit else raw[:, k]
            out[:, k] = command * (self.closes * robot.gripper_closes)
        return out

    def proprio(self, raw: np.ndarray, robot: Embodiment) -> np.ndarray:
        """States [F, P] with the robot's axis-angle."""
        places = robot.entries("rotation")
        if len(places) != 3:
            return raw
        first, wide = places[0], 4 if self.rotation.startswith("quaternion") else 3
        turn = raw[:, first : first + wide]
        if self.rotation != "axis-angle":
            turn = turned(turn, self.rotation).as_rotvec()
        around = continuous_axis_angle(turn)
        return np.concatenate([raw[:, :first], around, raw[:, first + wide :]], 1)


def turned(values: np.ndarray, kind: str) -> Rotation:
    """Rotations [F] of numbers [F, 3 or 4] of this kind; euler: roll, pitch, yaw about fixed axes
    in rad.
    """
    if kind == "axis-angle":
        return Rotation.from_rotvec(values)
    if kind == "euler":
        return Rotation.from_euler("xyz", values)
    return Rotation.from_quat(values[:, [1, 2, 3, 0]] if kind.endswith("wxyz") else values)


def keys(
    dataset: DataSet, robot: Embodiment, part: DataConfig, episodes: np.ndarray
) -> tuple[tuple[str, ...], str, str, str, str]:
    """(cameras, state, action, how the cameras were found, what the rate means) of a data set, by
    its metadata alone.

    Raises:
        UserError: a key is ambiguous, not there or of another robot, or a file of these episodes is
            not there; names keys and the flag.
    """
    where, flag = f"{dataset.folder}/meta/info.json: features", "--data.cameras KEY ..."
    views, named = match_cameras(dataset.cameras, robot, part.cameras, where, flag)
    state = _key(dataset, part.state, ("observation.state", "state"), "state")
    action = _key(dataset, part.action, ("action", "actions"), "action")
    _check_dims(dataset, state, action, robot)
    rate = _rate(dataset, robot, part)
    dataset.check_files(episodes, views)
    return views, state, action, named, rate


def detect(dataset: DataSet, robot: Embodiment, part: DataConfig, episodes: np.ndarray) -> Reading:
    """How the episodes in places `episodes` are to be read as this robot's. UserError as of
    `keys`.
    """
    cameras, state, action, named, rate = keys(dataset, robot, part, episodes)
    by = {"cameras": named}
    rows = Rows(dataset, [state, action, *cameras])
    looked = {int(k): rows.of(int(k)) for k in episodes[:LOOK_AT]}
    raw = [
        tuple(vectors(table, key, dataset.data_file(k)) for key in (action, state))
        for k, table in looked.items()
    ]
    rotation, by["rotation"] = _rotation(raw, robot, part)
    reading = Reading(cameras, state, action, 1, False, rotation, _SAID, rate, by)
    states = [reading.proprio(values, robot) for _, values in raw]
    closes, unit, by["gripper"] = _gripper([a for a, _ in raw], states, robot, part)
    reading = replace(reading, closes=closes, unit=unit)
    with Cameras(dataset, cameras[:1]) as eyes:

        def frames(k: int) -> np.ndarray:
            return area_resize(eyes.frames(k, looked[k])[:, 0], _SMALL, str(dataset.folder))

        seen = [
            Moving(
                reading.actions(actions, robot),
                proprio[:, robot.entries("position")[:3]],
                proprio[:, robot.entries("gripper")],
                partial(frames, k),
            )
            for k, (actions, _), proprio in zip(looked, raw, states, strict=True)
        ]
        return replace(reading, conventions=_conventions(seen if is_libero(robot) else [], part))


def ours(dataset: DataSet, robot: Embodiment, part: DataConfig, episodes: np.ndarray) -> Reading:
    """How what our writer wrote is read: nothing is to be found out."""
    cameras, state, action, named, rate = keys(dataset, robot, part, episodes)
    by = {"cameras": named, "rotation": "as written", "gripper": "as written"}
    closes = robot.gripper_closes
    return Reading(cameras, state, action, closes, False, "axis-angle", _SAID, rate, by)


def is_libero(robot: Embodiment) -> bool:
    """Whether what `conventions` knows of LIBERO's camera and fingers holds."""
    return robot.name.startswith("libero")


def _conventions(seen: list[Moving], part: DataConfig) -> Conventions:
    given = {"observations": part.observations, "images": part.images}
    when, how = (None if v == "detect" else v for v in given.values())
    found = judge(seen, when, how, "upright", "as in LeRobot's sets")
    if found.observations is not None:
        return found
    return replace(found, observations="before", observations_by=_SAID.observations_by)


def match_cameras(
    have: Sequence[str], robot: Embodiment, given: Sequence[str], where: str, flag: str
) -> tuple[tuple[str, ...], str]:
    """Which of the keys `have` are the robot's views, in their order, and how that was found.

    given: what was said of it, empty for nothing. UserError where they cannot be told apart: it
    begins with `where` and ends with the `flag` that says it.
    """
    wanted = len(robot.views)
    flag = f"{flag} ({wanted} of them: {', '.join(robot.views)})"
    if given:
        absent = [key for key in given if key not in have]
        if absent or len(given) != wanted:
            raise UserError(
                f"{where}: expected the cameras {', '.join(given)}, got {', '.join(have)}. "
                f"Name those to read: {flag}."
            )
        return tuple(given), "as given"
    last = {key.rsplit(".", 1)[-1]: key for key in have}
    if all(view in last for view in robot.views):
        return tuple(last[view] for view in robot.views), "by the robot's names"
    hands = [key for key in have if _WRIST.search(key)]
    others = [key for key in have if key not in hands]
    found = (*others, *hands)
    if len(others) != 1 or len(found) != wanted or wanted > 2:
        raise UserError(
            f"{where}: expected {wanted} camera(s) that can be told apart by their names, got "
            f"{', '.join(have) or 'none'}. Name them in the robot's order: {flag}."
        )
    return found, "by name"


def _key(dataset: DataSet, given: str | None, usual: tuple[str, ...], what: str) -> str:
    found = [key for key in ((given,) if given else usual) if key in dataset.features]
    if not found:
        vectors = [k for k, f in dataset.features.items() if f.dtype.startswith("float")]
        raise UserError(
            f"{dataset.folder}/meta/info.json: features: expected {given or ' or '.join(usual)}, "
            f"got {', '.join(vectors)[:300] or 'no column of numbers'}. Name the {what}: "
            f"--data.{what} KEY."
        )
    return found[0]


def _check_dims(dataset: DataSet, state: str, action: str, robot: Embodiment) -> None:
    spare = (0, 1) if len(robot.entries("rotation")) == 3 else (0,)  # a quaternion
    for key, names, more in (
        (action, robot.action, (0,)),
        (state, [entry.name for entry in robot.proprio], spare),
    ):
        shape = dataset.features[key].shape
        if len(shape) != 1 or shape[0] - len(names) not in more:
            raise UserError(
                f"{dataset.folder}/meta/info.json: features.{key}: expected {len(names)} numbers "
                f"({', '.join(names)}) of {robot.name}, got {list(shape)}. This is data of another "
                f"robot or another key: name the right one (--data.{_flag(key, action)} KEY), or "
                "other data."
            )


def _flag(key: str, action: str) -> str:
    return "action" if key == action else "state"


def _rotation(
    raw: list[tuple[np.ndarray, np.ndarray]], robot: Embodiment, part: DataConfig
) -> tuple[str, str]:
    """Of the hand, as the state has it. Told apart by which turns as the actions ask: the turn from
    row to row, up to one factor.
    """
    places, wide = robot.entries("rotation"), raw[0][1].shape[1] - robot.P + 3
    fits = [kind for kind in ROTATIONS if kind.startswith("quaternion") == (wide == 4)]
    if part.rotation != "detect":
        if len(places) == 3 and part.rotation not in fits:
            raise UserError(
                f"--data.rotation {part.rotation}: expected {' or '.join(fits)} of a state of "
                f"{raw[0][1].shape[1]} numbers, got {part.rotation}. Leave it out to detect it."
            )
        return part.rotation, "as given"
    if len(places) != 3:
        return "axis-angle", "as the robot has it"
    errors, turns = {}, robot.actions("turn")
    for kind in fits:
        left = asked = 0.0
        for actions, state in raw:
            values = state[:, places[0] : places[0] + wide]
            if wide == 4 and np.abs(np.linalg.norm(values, axis=1) - 1).max() > 0.05:
                raise UserError(
                    f"state: expected quaternions of length 1 in numbers {places[0]} to "
                    f"{places[0] + 3}, got others. Name another column (--data.state KEY)."
                )
            turn = turned(values, kind)
            steps = (turn[1:] * turn[:-1].inv()).as_rotvec()
            want = actions[:-1, turns]
            scale = (steps * want).sum() / max(float((want**2).sum()), 1e-12)
            left += float(((steps - scale * want) ** 2).sum())
            asked += float(np.abs(steps).sum())
        errors[kind] = left if asked > _TURNED else np.inf
    best = min(errors, key=errors.__getitem__)
    if best != fits[0] and errors[best] < errors[fits[0]] / 2:
        return best, "measured by turns"
    agree = errors[fits[0]] < min(errors[kind] for kind in fits[1:]) / 2
    return fits[0], "measured by turns" if agree else "as in LIBERO's sets: turns do not tell"


def _gripper(
    actions: list[np.ndarray], states: list[np.ndarray], robot: Embodiment, part: DataConfig
) -> tuple[int, bool, str]:
    """(sign that closes, whether commands are 0 and 1, how that was found)."""
    grips, fingers = robot.actions("grip"), robot.entries("gripper")
    if not grips:
        return robot.gripper_closes, False, "there is none"
    commands = [a[:, grips[0]] for a in actions]
    low = min(float(c.min()) for c in commands)
    unit = low >= 0
    if part.gripper != "detect":
        return (1 if part.gripper == "one-closes" else -1), unit, "as given"
    followed = 0.0
    for command, state in zip(commands, states, strict=True):
        opening = np.abs(state[:, fingers]).sum(1)
        for t in np.flatnonzero(np.diff(command)) + 1:
            end = min(t + 5, len(opening) - 1)
            moved = float(opening[end] - opening[t]) if end > t else 0.0
            followed += moved * float(np.sign(command[t] - command[t - 1]))
    if abs(followed) > _MOVED:
        return (-1 if followed > 0 else 1), unit, "measured by fingers"
    why = "0 and 1: as published sets have it" if unit else "below 0: as LIBERO has it"
    return (-1 if unit else 1), unit, why


def _rate(dataset: DataSet, robot: Embodiment, part: DataConfig) -> str:
    """What the frame rate means, said."""
    fps, hz = dataset.fps, robot.control_hz
    if abs(fps - hz) < 1e-6:
        return f"{fps:g} frames a second, the robot's"
    usual = part.rate == "detect" and is_libero(robot) and fps == 10
    if part.rate != "steps" and not usual:
        raise UserError(
            f"{dataset.folder}/meta/info.json: fps: expected {hz:g}, at which {robot.name} is "
            f"commanded, got {fps:g}. Resample the data, or say that each row is one command of "
            "the robot whatever its label says: --data.rate steps."
        )
    how = "as LIBERO's sets have it" if usual else "as given"
    return f"labelled {fps:g} frames a second, taken for commands at {hz:g} Hz ({how})"
