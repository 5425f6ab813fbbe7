"""What a demonstration file does not say is measured: when `obs` was taken, how images lie, units.

When: row t of `obs` shows the world before action t (openvla's regenerated files) or after it
(LIBERO's own writer). Measured from `states` (the simulator before action t: time, then the arm's
seven joints), which must agree with `obs/joint_states` of one of the two; else from the gripper:
fingers that begin to move in the row of a new command were seen after it, in the next row before.

How: in raw frames (LIBERO's, OpenGL's) pixels that change wander to the right as the hand moves
along +y and *down* as it rises or draws back; upright ones are turned by half. The correlations of
the place of change with the hand's, over the file's first demonstrations, tell the four ways apart.
Too little motion: as the layout has it (raw), which is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import h5py
import numpy as np

from worldenv.data.libero_layout import Sizes, contents, read_array, subgroup
from worldenv.runtime.errors import UserError

CONVENTIONS = ("before", "after")
# How images lie in a file: the steps along rows and columns that make them upright.
IMAGES = {"raw": (-1, -1), "upright": (1, 1), "flipped": (1, -1), "mirrored": (-1, 1)}
LOOK_AT = 8  # demonstrations of a file
_REACH = 0.05  # m that an action of 1 moves the hand at most (OSC_POSE)
_CHANGED = 12.0  # grey levels
_STILL, _STIRRED = 0.2, 3.0  # mm of finger travel in 50 ms; ratio that tells motion from rest


@dataclass(frozen=True)
class Conventions:
    """How a file's demonstrations are to be read, and from what that is known.

    observations: "before", "after" or None (does not show); images: a key of IMAGES.
    """

    observations: str | None
    images: str
    observations_by: str
    images_by: str

    def __str__(self) -> str:
        when = self.observations or "of unknown moment"
        return (
            f"obs {when} each action ({self.observations_by}), images {self.images} "
            f"({self.images_by})"
        )


OURS = Conventions("before", "raw", "stated in the file", "our layout")


def measure(
    demos: Sequence[tuple[str, h5py.Group]], observations: str | None, images: str | None
) -> Conventions:
    """The conventions of foreign demonstrations (where they are, group) of one file; what is given
    is not measured.
    """
    known = observations is not None and images is not None
    seen = [] if known else [_moving(demo, where) for where, demo in demos[:LOOK_AT]]
    return judge(seen, observations, images, "raw", "as in LIBERO's layout")


def judge(
    seen: Sequence[Moving], observations: str | None, images: str | None, usual: str, why: str
) -> Conventions:
    """The conventions of what was `seen`; what is given is not measured. usual: how images lie
    where too little moves to measure it, and `why`.
    """
    when, when_by = (observations, "as given") if observations else _when(seen)
    how, how_by = (images, "as given") if images else _how(seen) or (
        usual, f"{why}: too little motion to measure"
    )  # fmt: skip
    return Conventions(when, how, when_by, how_by)


@dataclass(frozen=True)
class Moving:
    """The numbers of one demonstration that move, and its pictures.

    actions [T, 7], hand [F, 3] in m, fingers [F, 2] in m, frames: gives the main camera's
    [F, H, W, 3]; states [T, S] and joints [F, 7] where there are any.
    """

    actions: np.ndarray
    hand: np.ndarray
    fingers: np.ndarray
    frames: Callable[[], np.ndarray]
    states: np.ndarray | None = None
    joints: np.ndarray | None = None

    def change(self) -> tuple[np.ndarray, np.ndarray]:
        """(hand [N, 3], centre of changing pixels [N, 2] in 0..1: row, column) of moving frames."""
        frames = self.frames().astype(np.float32).mean(-1)
        change = np.abs(np.diff(frames, axis=0))
        change[change < _CHANGED] = 0
        share = (change > 0).mean((1, 2))
        # A robot moves a part of the picture; where most of it changes, something else did.
        moving = (share > 0) & (share < 0.5)
        change, side = change[moving], frames.shape[1]
        total = change.sum((1, 2))
        place = (np.arange(side) + 0.5) / side
        centre = [(change.sum(axis) @ place) / total for axis in (2, 1)]
        return ((self.hand[1:] + self.hand[:-1]) / 2)[moving], np.stack(centre, 1)


def _moving(demo: h5py.Group, where: str) -> Moving:
    sizes: Sizes = {}
    actions = read_array(demo, "actions", where, sizes)
    has_states = "states" in contents(demo, where)
    states = read_array(demo, "states", where, sizes) if has_states else None
    obs, where = subgroup(demo, "obs", where), f"{where}/obs"
    names = contents(obs, where)

    def read(name: str) -> np.ndarray:
        return read_array(obs, name, where, sizes, f"obs/{name}")

    fingers = read("gripper_states")
    joints = read("joint_states") if "joint_states" in names else None
    whole = "ee_states" in names and "ee_pos" not in names
    hand = read("ee_states" if whole else "ee_pos")[:, :3]
    return Moving(actions, hand, fingers, partial(read, "agentview_rgb"), states, joints)


def _when(seen: Sequence[Moving]) -> tuple[str | None, str]:
    for ask, name in ((_by_states, "measured by states"), (_by_fingers, "measured by gripper")):
        votes = {vote for demo in seen if (vote := ask(demo)) is not None}
        if len(votes) == 1:
            return votes.pop(), name
    return None, "nothing shows it"


def _by_states(demo: Moving) -> str | None:
    states, joints = demo.states, demo.joints
    if states is None or joints is None or states.shape[1] < 8 or len(joints) != len(states) > 1:
        return None
    arm = states[1:, 1:8]
    same = np.abs(joints[1:] - arm).mean()
    ahead = np.abs(joints[:-1] - arm).mean()
    # A robot at rest satisfies both; one must explain the motion clearly better.
    if same < ahead / 3:
        return "before"
    return "after" if ahead < same / 3 else None


def _by_fingers(demo: Moving) -> str | None:
    """Where the command changes while the fingers rest: do they stir in that row or the next?"""
    if len(demo.fingers) != len(demo.actions):
        return None
    command = np.sign(demo.actions[:, 6])
    opening = np.diff(1000 * (demo.fingers[:, 0] - demo.fingers[:, 1]))  # mm, row t to t + 1
    votes = set()
    for t in np.flatnonzero(np.diff(command)) + 1:
        if t < 2 or t + 1 >= len(command) or abs(opening[t - 2]) > _STILL:
            continue
        here, after = -command[t] * opening[[t - 1, t]]
        if here > _STILL:
            votes.add("after")
        elif after > max(_STILL, _STIRRED * abs(here)):
            votes.add("before")
    return votes.pop() if len(votes) == 1 else None


def _how(seen: Sequence[Moving]) -> tuple[str, str] | None:
    if seen and all(len(demo.hand) > 1 for demo in seen):
        pairs = [demo.change() for demo in seen]
        hand, centre = (np.concatenate(part) for part in zip(*pairs, strict=True))
        across = _correlation(hand[:, 1], centre[:, 1])
        down = _correlation(hand[:, 2] - hand[:, 0], centre[:, 0])
        if min(abs(across), abs(down)) > 0.5:
            signs = (-int(np.sign(down)), -int(np.sign(across)))
            return next(k for k, v in IMAGES.items() if v == signs), "measured by motion"
    return None


def _correlation(travel: np.ndarray, centre: np.ndarray) -> float:
    """Of the hand's travel (m) with the place of change; 0 for too little of either."""
    if len(travel) < 20 or np.ptp(travel) < 0.03 or np.ptp(centre) < 0.01:
        return 0.0
    return float(np.corrcoef(travel, centre)[0, 1])


def check_units(actions: np.ndarray, hand: np.ndarray, place: str) -> None:
    """UserError for foreign actions [T, 7] in other units than OSC_POSE's; hand [F, 3] in m."""
    mend = "Convert them to OSC_POSE deltas in -1..1 (1 is 5 cm) and -1 open / +1 close."
    low, high = float(actions.min()), float(actions.max())
    if low < -1.0001 or high > 1.0001:
        raise UserError(f"{place}: expected values within -1..1, got {low:g}..{high:g}. {mend}")
    gripper = actions[:, 6]
    if gripper.min() >= 0 and gripper.min() < 0.5:
        raise UserError(
            f"{place}: gripper: expected commands of -1 (open) and +1 (close), got "
            f"{gripper.min():g}..{gripper.max():g}, as if 0 and 1 were meant. {mend}"
        )
    travelled = float(np.linalg.norm(np.ptp(hand, axis=0)))
    possible = _REACH * float(np.linalg.norm(actions[:, :3], axis=1).sum())
    if travelled > 2 * possible + 0.03:
        raise UserError(
            f"{place}: expected deltas that can move the hand as far as it went ({travelled:.2f} "
            f"m), got {possible:.3f} m at most, as if they were metres or another unit. {mend}"
        )
