"""Made-up episodes of a block that a hand carries, or misses."""

from dataclasses import replace

import torch

from worldenv.data.windows import FrameSequence
from worldenv.envs.libero.robot import embodiment

ROBOT = embodiment(64)
SIZE, CHUNK = 64, 8
CARRY, PLACED = 4, 8  # the chunk in which the gripper closes, and the frame at which it succeeds


def where(frame: int, held: bool) -> tuple[int, int]:
    """(column, row) of the block at a frame: it rests, then goes with the hand by four a chunk."""
    moved = 4 * max(0, min(frame, PLACED) - CARRY - 1) if held else 0
    return 20 + moved, 40


def picture(frame: int, held: bool) -> torch.Tensor:
    """[V, H, W, 3]: a table with a block of ten pixels, and a hand that moves whatever it holds."""
    image = torch.full((2, SIZE, SIZE, 3), 150, dtype=torch.uint8)
    hand = 12 + 4 * max(0, frame - CARRY - 1)
    image[:, 4:10, hand : hand + 6] = 30
    column, row = where(frame, held)
    image[:, row - 5 : row + 5, column - 5 : column + 5] = torch.tensor([200, 40, 40]).byte()
    return image


def episode(held: bool, frames: int = 12, number: int = 0) -> FrameSequence:
    """Closes the gripper in chunk CARRY and then moves 4 cm a chunk; succeeds at frame PLACED if it
    holds the block."""
    proprio = torch.zeros(frames, 8)
    proprio[:, 0] = 0.04 * (torch.arange(frames) - CARRY - 1).clamp_min(0)
    proprio[:, 6], proprio[:, 7] = 0.04, -0.04
    actions = torch.zeros(frames - 1, CHUNK, 7)
    actions[..., -1] = -1.0
    actions[CARRY, 3:, -1] = 1.0
    actions[CARRY + 1 :, :, -1] = 1.0
    return FrameSequence(
        images=torch.stack([picture(f, held) for f in range(frames)]),
        proprio=proprio,
        actions=actions,
        success=(torch.arange(frames) >= PLACED) & held,
        steps=torch.arange(frames) * CHUNK,
        episode=number,
        task=8,
        instruction="carry the block",
    )


def frozen(s: FrameSequence) -> FrameSequence:
    """A world in which nothing moves."""
    return replace(
        s, images=s.images[:1].expand_as(s.images), proprio=s.proprio[:1].expand_as(s.proprio)
    )
