"""What cameras see: points in metres to pixels, and pixels to rays, in torch.

Apart from `camera`, which the benchmark's processes read without loading torch.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from worldenv.data.camera import Camera


def project(camera: Camera, points: Tensor, hand: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Points `[..., 3]` in the world (m) as pixels (column, row) `[..., 2]` of an image of
    `size` x `size`, and their depths `[...]` (m); hand `[..., 4, 4]`, see `hand_pose`.

    Where the depth is not positive, the point is not before the camera and the pixel is void.
    """
    rig = Rig((camera,)).to(points.device, points.dtype)
    pixels, depth = rig.project(points[..., None, :], hand, size)
    return pixels[..., 0, :], depth[..., 0]


class Rig(nn.Module):
    """V cameras as tensors, so that nothing is copied to a device when they are used."""

    def __init__(self, cameras: Sequence[Camera]) -> None:
        super().__init__()

        def keep(name: str, values: list) -> None:
            self.register_buffer(name, torch.tensor(values), persistent=False)

        keep("pose", [[c.pose[i : i + 4] for i in range(0, 16, 4)] for c in cameras])  # [V, 4, 4]
        keep("in_hand", [c.mount == "hand" for c in cameras])  # [V]
        # Focal lengths in half images, and the way of columns and rows: [V, 2]
        focal = [1 / math.tan(math.radians(c.fov) / 2) for c in cameras]
        keep("focal", focal)
        keep("way", [[1.0 - 2 * c.mirrored, 2.0 * c.upside_down - 1] for c in cameras])

    def poses(self, hand: Tensor) -> Tensor:
        """Where the cameras stand `[..., V, 4, 4]` when the hand is at `[..., 4, 4]`."""
        moved = hand[..., None, :, :] @ self.pose
        return torch.where(self.in_hand[:, None, None], moved, self.pose)

    def project(self, points: Tensor, hand: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Points `[..., V or 1, 3]` as each camera sees them: pixels `[..., V, 2]` and depths
        `[..., V]`. See `project`.
        """
        pose = self.poses(hand)
        seen = ((points - pose[..., :3, 3])[..., None, :] @ pose[..., :3, :3])[..., 0, :]
        depth = -seen[..., 2]
        before = torch.where(depth > 0, depth, 1.0)[..., None]
        place = self.focal[:, None] * self.way * seen[..., :2] / before
        return (1 + place) * (size / 2), depth

    def rays(self, size: int) -> Tensor:
        """Directions `[V, size, size, 3]`, of length 1, from each camera through its pixels; in its
        own frame.
        """
        centre = (torch.arange(size, device=self.focal.device) + 0.5) * (2 / size) - 1
        rows, columns = torch.meshgrid(centre, centre, indexing="ij")
        way = self.way[:, None, None]
        across = torch.stack([columns, rows], -1) * way / self.focal[:, None, None, None]
        rays = torch.cat([across, -torch.ones_like(across[..., :1])], -1)
        return nn.functional.normalize(rays, dim=-1)


def hand_pose(position: Tensor, rotation: Tensor) -> Tensor:
    """Pose `[..., 4, 4]` from a position `[..., 3]` (m) and an axis-angle `[..., 3]` (rad)."""
    angle = rotation.norm(dim=-1)[..., None, None]
    x, y, z = rotation.unbind(-1)
    o = torch.zeros_like(x)
    cross = torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).unflatten(-1, (3, 3))
    # Rodrigues' formula, by functions that are smooth at 0: sinc(x) = sin(pi x) / (pi x)
    once, twice = torch.sinc(angle / math.pi), 0.5 * torch.sinc(angle / (2 * math.pi)).square()
    turn = torch.eye(3, device=x.device, dtype=x.dtype) + once * cross + twice * (cross @ cross)
    pose = torch.cat([turn, position[..., None]], -1)
    last = pose.new_zeros(*pose.shape[:-2], 1, 4)
    last[..., 3] = 1
    return torch.cat([pose, last], -2)
