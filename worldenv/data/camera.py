"""Where a robot's cameras stand; what they see of points in metres is in `rig`.

A camera is a pinhole with square pixels, fixed in the world or in the hand. Its own frame is the
graphics convention (MuJoCo, OpenGL): x to the right, y up, it looks along -z. Pixels are (column,
row) with the first row on top; the first pixel's centre is (0.5, 0.5), so a place scales with the
image. The hand's frame is the proprio's: its origin the position, its axes the rotation.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from worldenv.fields import Items, Range

Number = Annotated[float, Range()]


@dataclass(frozen=True)
class Camera:
    """One camera, and how its images lie in the episodes."""

    name: str
    """As the benchmark calls it."""
    fov: Annotated[float, Range(0, 179, above=True)]
    """Vertical field of view in degrees."""
    mount: Literal["world", "hand"]
    """What it is fixed to."""
    pose: Annotated[tuple[Number, ...], Items(16, distinct=False)]
    """From the camera's frame to its mount's: a 4 x 4 matrix, row by row, in m."""
    mirrored: bool = False
    """Whether the columns of its images run from the right to the left of what it sees."""
    upside_down: bool = False
    """Whether the rows run from the bottom to the top."""

    def rules(self) -> Iterator[tuple[bool, str, str]]:
        """What its fields require."""
        turn = np.reshape(self.pose[:16], (-1, 4))[:3, :3]
        rigid = len(self.pose) == 16 and self.pose[12:] == (0.0, 0.0, 0.0, 1.0)
        rigid = rigid and np.allclose(turn @ turn.T, np.eye(3), atol=1e-5)
        yield bool(rigid and np.linalg.det(turn) > 0), "pose", "a rotation and a position"
