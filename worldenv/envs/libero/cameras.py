"""LIBERO's two cameras: where they stand, measured in the compiled models of every kind of scene.

The camera before the table (agentview) stands elsewhere in each kind of problem, except that the
plain table's and the kitchen's are one; the field of view is the same everywhere, and so is the
camera at the hand. The episodes' images are what robosuite renders turned by half; robosuite's
begin with the bottom row, so what is upright then is also mirrored.
"""

from collections.abc import Iterable

from worldenv.data.camera import Camera
from worldenv.data.libero_tasks import SUITES

_HIGH = (0.6380177212, 0.3048497188, 0.3048498380, 0.6380177212)
_LOW = (0.6182166364, 0.3432307225, 0.3432314079, 0.6182176496)
_TABLE = (0.6586131746834771, 0.0, 1.6103500240372423), _HIGH
# Position (m) and orientation (w, x, y, z) of agentview in the world, by kind of problem.
AGENTVIEW = {
    "table": _TABLE,
    "kitchen": _TABLE,
    "floor": ((0.8965773716836134, 5.216182733499864e-07, 0.65), _LOW),
    "living room": ((0.6065773716836134, 0.0, 0.96), _LOW),
    "study": ((0.4586131746834771, 0.0, 1.6103500240372423), _HIGH),
}
_KIND = {"libero_spatial": "table", "libero_goal": "table", "libero_object": "floor"}
_LOOKS_ALONG_THE_FINGERS = (
    0.0, 1.0, 0.0, 0.05,
    1.0, 0.0, 0.0, 0.0,
    0.0, 0.0, -1.0, -0.097,
    0.0, 0.0, 0.0, 1.0,
)  # fmt: skip


def kind_of(suite: str, task: int) -> str:
    """A key of AGENTVIEW: the kind of problem a task of one of the four suites is."""
    if suite in _KIND:
        return _KIND[suite]
    scene = SUITES[suite][task].partition("_SCENE")[0]
    return scene.lower().replace("_", " ")


def of_tasks(suite: str, tasks: Iterable[int]) -> tuple[Camera, ...]:
    """The cameras of tasks, in the order of the images' views; none where the tasks' scenes are not
    all seen from the same place.
    """
    places = {AGENTVIEW[kind_of(suite, task)] for task in tasks}
    if len(places) != 1:
        return ()
    (place,) = places
    return (
        Camera("agentview", 45.0, "world", _matrix(*place), mirrored=True),
        Camera("robot0_eye_in_hand", 75.0, "hand", _LOOKS_ALONG_THE_FINGERS, mirrored=True),
    )


def _matrix(position: tuple[float, ...], quaternion: tuple[float, ...]) -> tuple[float, ...]:
    """A pose, row by row, of a position and an orientation (w, x, y, z) of length 1. By
    hand: scipy would scale what LIBERO's files say to that length, and change its last digits."""
    w, x, y, z = quaternion
    turn = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    rows = [(*row, at) for row, at in zip(turn, position, strict=True)]
    return tuple(number for row in (*rows, (0.0, 0.0, 0.0, 1.0)) for number in row)
