"""The action map of World-Env (section 3.3): the next pose of the hand, drawn where cameras see it.

On black: a filled disc at the hand, its colour the opening of the gripper, and three short lines
along the axes of the hand's frame (red, green, blue). So a denoiser of tokens is told in the place
where the hand will appear what modulation alone must say to all tokens alike. Ray maps (EnerVerse-AC,
arXiv 2505.09723) tell how the cameras move, six channels a pixel: where each ray begins (m) and its
direction.

The pose is the one the simulator predicts, in training as in generation: its errors, and at first
its ignorance, are what the denoiser will be shown. Liberty: a camera in the hand is taken where the
last frame was seen from. From its own place it sees the hand for ever in the same spot; from there,
the drawing shows how the hand moves, on the picture that is on the channels beside it. Likewise rays
are those of the next frame's cameras in the frames of the last one's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from worldenv.data.camera import Camera, Rig, hand_pose
from worldenv.runtime.errors import UserError

# Of an image's side: radius of the disc, length and width of the lines.
RADIUS, LENGTH, WIDTH = 1 / 24, 1 / 8, 1 / 48
NEAR = 0.01  # m before a camera from where on things are drawn
CLOSED, OPEN = (1.0, 0.5, 0.0), (0.0, 0.5, 1.0)
AXES = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


@dataclass(frozen=True)
class Hand:
    """Places in the proprio of what is drawn: position (m), axis-angle (rad), fingers (m)."""

    position: tuple[int, ...]
    rotation: tuple[int, ...]
    fingers: tuple[int, ...]
    wide: float
    """Distance of the fingers in m that is drawn as open."""


class ActionMap(nn.Module):
    """Maps of V cameras for images of `size` pixels, cut into grid x grid tokens each."""

    def __init__(
        self, cameras: Sequence[Camera], hand: Hand, size: int, grid: int, rays: bool = False
    ) -> None:
        """UserError where no cameras are known, or the proprio holds no whole pose."""
        super().__init__()
        if not cameras or (len(hand.position), len(hand.rotation)) != (3, 3) or not hand.fingers:
            raise UserError(
                "simulator.action_map: expected cameras whose place is known and a proprio with "
                "position (3), axis-angle (3) and fingers, got "
                f"{len(cameras)} cameras and {len(hand.position)}, {len(hand.rotation)} and "
                f"{len(hand.fingers)} numbers. Describe the cameras in the benchmark's embodiment, "
                "or leave the action map out (--simulator.no-action-map)."
            )
        self.hand, self.size, self.grid, self.rays = hand, size, grid, rays
        self.rig = Rig(cameras)
        self.channels = 9 if rays else 3
        self.columns = self.channels * (size // grid) ** 2
        colours = torch.tensor([CLOSED, OPEN, *AXES])
        self.register_buffer("colours", colours, persistent=False)  # [5, 3]
        centre = torch.arange(size) + 0.5
        rows, columns = torch.meshgrid(centre, centre, indexing="ij")
        self.register_buffer("pixels", torch.stack([columns, rows], -1), persistent=False)
        self.register_buffer("through", self.rig.rays(size), persistent=False)  # [V, H, W, 3]

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
        opening = after[..., self.hand.fingers].abs().sum(-1) / self.hand.wide
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
        directions = self.through @ turn  # [..., V, H, W, 3]
        origins = origin[..., None, None, :, 0].expand_as(directions)
        return torch.cat([origins, directions], -1)

    def _pose(self, proprio: Tensor) -> Tensor:
        return hand_pose(proprio[..., self.hand.position], proprio[..., self.hand.rotation])


def _covered(distance: Tensor, radius: float) -> Tensor:
    """Share of a pixel within `radius` of something: an edge as wide as a pixel."""
    return (radius - distance + 0.5).clamp(0, 1)
