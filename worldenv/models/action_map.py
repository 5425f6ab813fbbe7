"""The action map of World-Env (section 3.3): the next pose of the hand, drawn where cameras see it.

On black: a filled disc at the hand, its colour the opening of the gripper, and three short lines
along the axes of the hand's frame (red, green, blue). A denoiser is told in the very tokens where
the hand will be what modulation must tell all tokens alike. Ray maps (EnerVerse-AC, arXiv
2505.09723) say how the cameras move, in six channels: where a pixel's ray begins, and whereto.

The pose is the one the simulator predicts, in training as in generation, so the denoiser learns how
far to trust it. Liberty: a camera in the hand is taken to be where the last frame was seen from.
From its own next place it sees the hand in the same spot for ever; from there the drawing shows how
the hand will move across the picture on the channels beside it. Likewise rays are of the next
frame's cameras, in the frames of the last one's.
"""

import torch
from torch import Tensor, nn

from worldenv.data.embodiment import Embodiment
from worldenv.data.rig import Rig, hand_pose
from worldenv.runtime.errors import UserError

# Of an image's side: radius of the disc, length and width of the lines.
RADIUS, LENGTH, WIDTH = 1 / 24, 1 / 8, 1 / 48
NEAR = 0.01  # m before a camera from where on things are drawn
CLOSED, OPEN = (1.0, 0.5, 0.0), (0.0, 0.5, 1.0)
AXES = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


class ActionMap(nn.Module):
    """Maps for images of a robot's V cameras that are cut into grid x grid tokens each."""

    def __init__(self, embodiment: Embodiment, grid: int, rays: bool = False) -> None:
        """UserError where no cameras are known, or the proprio holds no pose of the hand."""
        super().__init__()
        kinds = ("position", "rotation", "gripper")
        self.places = tuple(embodiment.entries(kind) for kind in kinds)
        self.wide, size = embodiment.gripper_open, embodiment.image_size
        cameras, numbers = embodiment.cameras, [len(places) for places in self.places]
        if not cameras or numbers[:2] != [3, 3] or not numbers[2]:
            raise UserError(
                "simulator.action_map: expected cameras whose place is known, the same in all "
                "tasks, and a proprio of position (3 numbers), axis-angle (3) and fingers; got "
                f"{len(cameras)} cameras and {', '.join(map(str, numbers))} numbers of "
                f"{embodiment.name}. Choose tasks whose scenes are seen from one place "
                "(--env.tasks), or leave the map out (--simulator.no-action-map)."
            )
        self.size, self.grid, self.rays = size, grid, rays
        self.rig = Rig(cameras)
        self.channels = 9 if rays else 3
        self.columns = self.channels * (size // grid) ** 2
        colours = torch.tensor([CLOSED, OPEN, *AXES])
        self.register_buffer("colours", colours, persistent=False)  # [5, 3]
        centre = torch.arange(size) + 0.5
        rows, columns = torch.meshgrid(centre, centre, indexing="ij")
        self.register_buffer("pixels", torch.stack([columns, rows], -1), persistent=False)

    @torch.no_grad()
    def forward(self, after: Tensor, before: Tensor) -> Tensor:
        """Columns `[..., S, K]` for tokens, from the proprio `[..., P]` of the next frame and of
        the last; black is 0, so that only what is drawn speaks.
        """
        maps = (self.draw(after, before) + 1) / 2
        if self.rays:
            maps = torch.cat([maps, self.draw_rays(after, before)], -1)
        lead, g, p = maps.shape[:-4], self.grid, self.size // self.grid
        x = maps.reshape(-1, g, p, g, p, self.channels).transpose(2, 3)
        return x.reshape(*lead, -1, self.columns)

    @torch.no_grad()
    def draw(self, after: Tensor, before: Tensor) -> Tensor:
        """The next pose, from proprio `[..., P]`: `[..., V, H, W, 3]` in [-1, 1]; before: where the
        cameras in the hand are taken to be.
        """
        pose, seen_from = self._pose(after), self._pose(before)
        hand = pose[..., None, :3, 3]  # [..., 1, 3]
        centre, depth = self.rig.project(hand, seen_from, self.size)  # [..., V, 2], [..., V]
        # Lines look equally long in every camera: as many metres as span LENGTH at this depth.
        metres = (2 * LENGTH * depth / self.rig.focal)[..., None, :, None]  # [..., 1, V, 1]
        axes = pose[..., :3, :3].transpose(-1, -2)[..., :, None, :]  # [..., 3, 1, 3]
        ends, _ = self.rig.project(
            hand[..., None, :, :] + metres * axes, seen_from[..., None, :, :], self.size
        )  # [..., 3, V, 2]
        shown = (depth > NEAR)[..., None, None].to(centre.dtype)
        opening = _taken(after, self.places[2]).abs().sum(-1) / self.wide
        disc = torch.lerp(self.colours[0], self.colours[1], opening.clamp(0, 1)[..., None])
        off = self.pixels - centre[..., None, None, :]  # [..., V, H, W, 2]
        covered = _covered(off.norm(dim=-1), RADIUS * self.size) * shown
        image = covered[..., None] * disc[..., None, None, None, :]
        for colour, end in zip(self.colours[2:], ends.unbind(-3), strict=True):
            line = (end - centre)[..., None, None, :]
            along = (off * line).sum(-1) / line.square().sum(-1).clamp_min(1e-6)
            away = (off - along.clamp(0, 1)[..., None] * line).norm(dim=-1)
            covered = _covered(away, WIDTH * self.size / 2) * shown
            image = torch.lerp(image, colour, covered[..., None])
        return 2 * image - 1

    @torch.no_grad()
    def draw_rays(self, after: Tensor, before: Tensor) -> Tensor:
        """Origins (m) and directions of the next frame's rays, in the frames of the last one's
        cameras: `[..., V, H, W, 6]`.
        """
        now, then = self.rig.poses(self._pose(after)), self.rig.poses(self._pose(before))
        back = then[..., :3, :3].transpose(-1, -2)
        origin = back @ (now - then)[..., :3, 3:]  # [..., V, 3, 1]
        turn = (back @ now[..., :3, :3]).transpose(-1, -2)[..., None, :, :]
        directions = self.rig.rays(self.size) @ turn  # [..., V, H, W, 3]
        origins = origin[..., None, None, :, 0].expand_as(directions)
        return torch.cat([origins, directions], -1)

    def _pose(self, proprio: Tensor) -> Tensor:
        return hand_pose(*(_taken(proprio, places) for places in self.places[:2]))


def _taken(proprio: Tensor, places: tuple[int, ...]) -> Tensor:
    """Entries of `[..., P]`; indexing by a list would copy it to the device."""
    return torch.stack([proprio[..., i] for i in places], -1)


def _covered(distance: Tensor, radius: float) -> Tensor:
    """Share of a pixel within `radius` of something: an edge as wide as a pixel."""
    return (radius - distance + 0.5).clamp(0, 1)
