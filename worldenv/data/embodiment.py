"""The robot and its cameras, said once: what every model of a run sees and commands.

A benchmark describes its robot (`envs/libero/robot.py`); models are built from the description,
checkpoints carry it, and where two artifacts meet they are compared. Nothing below `envs/` knows
more of a robot than stands here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from worldenv.data.camera import Camera
from worldenv.data.episode import Episode
from worldenv.fields import Items, Range
from worldenv.runtime.errors import UserError

Size = Annotated[int, Range(1, 4096)]


@dataclass(frozen=True)
class Entry:
    """One number of the proprio."""

    name: str
    """As people call it: x, angle_y, left_finger."""
    kind: Literal["position", "rotation", "gripper", "joint"]
    """Of the hand in m, of its axis-angle in rad, of a finger in m, of a joint in rad."""
    noise: Annotated[float, Range(0)] = 0.0
    """Deviation of what imitation adds to it, in its own unit."""


@dataclass(frozen=True)
class Embodiment:
    """A robot with its cameras, and the rhythm it is commanded at. V, P, A, C: as in shapes."""

    name: str
    """Of the robot and its controller."""
    views: Annotated[tuple[str, ...], Items()]
    """Names of the cameras, in the order of the images."""
    proprio: Annotated[tuple[Entry, ...], Items()]
    """What each number of the proprio is."""
    action: Annotated[tuple[Literal["translate", "turn", "grip"], ...], Items(distinct=False)]
    """What each number of an action does; all in [-1, 1]."""
    image_size: Size
    """Side of the square images models see, in pixels."""
    render_size: Size
    """Side of the images the cameras take, averaged down to image_size."""
    rotation: Literal[0, 90, 180, 270]
    """Degrees by which what the renderer gives is turned before anyone sees it."""
    chunk: Size
    """C, actions executed open loop per decision."""
    control_hz: Annotated[float, Range(0, above=True)]
    """Actions a second."""
    gripper_closes: Literal[-1, 1]
    """The sign of a command that closes the gripper; the other opens it."""
    gripper_open: Annotated[float, Range(0)]
    """Distance of the fingers in m above which nothing is held: a grasp may be to come."""
    normalisation: Literal["mean-std", "q99"] = "mean-std"
    """How proprio and actions are scaled for the models; the numbers lie in their weights."""
    cameras: Annotated[tuple[Camera, ...], Items(0)] = ()
    """Where the views are seen from, in their order; empty where that is not known."""

    def rules(self) -> Iterator[tuple[bool, str, str]]:
        """What its fields require of each other."""
        enough = f"at least image_size {self.image_size}"
        yield self.render_size >= self.image_size, "render_size", enough
        names = tuple(camera.name for camera in self.cameras)
        yield names in ((), self.views), "cameras", f"none, or {', '.join(self.views)}"

    @property
    def V(self) -> int:
        """Camera views."""
        return len(self.views)

    @property
    def P(self) -> int:
        """Numbers of proprio."""
        return len(self.proprio)

    @property
    def A(self) -> int:
        """Numbers of an action."""
        return len(self.action)

    def actions(self, kind: str) -> tuple[int, ...]:
        """Places in an action of what does `kind`: translate, turn or grip."""
        return tuple(i for i, k in enumerate(self.action) if k == kind)

    def entries(self, kind: str) -> tuple[int, ...]:
        """Places in the proprio of what is of `kind`."""
        return tuple(i for i, entry in enumerate(self.proprio) if entry.kind == kind)

    def opening(self, proprio: list[float]) -> float:
        """Distance of the fingers in m, of one proprio `[P]`."""
        return sum(abs(proprio[i]) for i in self.entries("gripper"))


def differences(one: Embodiment, other: Embodiment, drawn: bool = False) -> dict[str, tuple]:
    """Fields in which two differ, with both values: what is made for one does not fit the other.

    How large the cameras' own images are does not matter to a model, nor where they stand unless
    it draws what they see.
    """
    apart = {"render_size"} if drawn else {"render_size", "cameras"}
    names = [name for name in one.__dataclass_fields__ if name not in apart]
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def check_fits(episode: Episode, embodiment: Embodiment, where: str) -> None:
    """UserError naming `where` unless an episode is of this robot: views, proprio and actions."""
    for name, array, axis, asked in (
        ("views", episode.images, 1, embodiment.views),
        ("numbers of proprio", episode.proprio, 1, [e.name for e in embodiment.proprio]),
        ("numbers of an action", episode.actions, 1, embodiment.action),
    ):
        if array.shape[axis] != len(asked):
            raise UserError(
                f"{where}: {name}: expected {len(asked)} ({', '.join(asked)}) of "
                f"{embodiment.name}, got {array.shape[axis]}. These are episodes of another robot."
            )
