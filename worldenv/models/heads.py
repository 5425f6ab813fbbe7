"""What the simulator ends with: tokens to a clean frame, and the gripper's opening before it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def zeroed(layer: nn.Linear) -> nn.Linear:
    """The layer with its weights and bias set to zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class FrameHead(nn.Module):
    """Tokens to a clean frame: every block mixes the last frame with the real one the imagination
    began with, keeps a share of that and adds to it.

    A token's E numbers cannot erase its Z old ones, so a plain residual leaves ghosts behind
    whatever moved; gates per block can, and a small network per block redraws it. What stands still
    is taken from the real frame, so that no error accumulates there.
    """

    def __init__(self, width: int, channels: int, block: int, hidden: int = 24) -> None:
        super().__init__()
        self.block = block
        self.spread = nn.Linear(width, channels // block * hidden)
        self.redraw = nn.Sequential(
            nn.Linear(hidden + 2 * block, 96), nn.SiLU(), zeroed(nn.Linear(96, 2 + block))
        )
        nn.init.constant_(self.redraw[-1].bias[:1], 4.0)  # begins by keeping 98 % of everything

    def forward(self, x: Tensor, last: Tensor, reference: Tensor) -> Tensor:
        """x `[..., S, E]`, the last frame and the reference `[..., S, Z]` to the next frame."""
        # [..., S, N, block]
        old, real = (y.unflatten(-1, (-1, self.block)) for y in (last, reference))
        tokens = self.spread(x).unflatten(-1, (old.shape[-2], -1))
        drawn = self.redraw(torch.cat([tokens, old, real], -1)).float()
        keep, recall, new = drawn.tensor_split([1, 2], -1)
        return (keep.sigmoid() * old.lerp(real, recall.sigmoid()) + new).flatten(-2)


class OpeningHead(nn.Module):
    """How wide the gripper will be open: a distribution over its logarithm, from the last frame and
    the actions.

    Whether a grasp holds is seldom certain from 64 pixels, and a frame in between is neither: an
    expected frame lets the next actions decide, and they assume success. So the opening is drawn,
    and the frame follows it.
    """

    BINS, WIDEST = 128, 5.8  # of log_opening; the last is 16 cm

    def __init__(self, tokens: int, channels: int, inputs: int) -> None:
        super().__init__()
        self.look = nn.Linear(channels, 16)
        self.net = nn.Sequential(
            nn.Linear(16 * tokens + inputs, 256), nn.SiLU(), nn.Linear(256, self.BINS)
        )

    def forward(self, last: Tensor, inputs: Tensor) -> Tensor:
        """The last frame `[..., S, Z]` and `chunk_inputs` to logits `[..., BINS]`."""
        return self.net(torch.cat([self.look(last).flatten(-2), inputs], -1)).float()

    def loss(self, logits: Tensor, opening: Tensor) -> Tensor:
        """Cross entropy with true log openings `[...]`."""
        bins = (opening * (self.BINS - 1) / self.WIDEST).round().clamp(0, self.BINS - 1).long()
        return F.cross_entropy(logits.flatten(0, -2), bins.flatten())

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Log openings `[...]` drawn by uniform numbers `[...]`."""
        below = logits.softmax(-1).cumsum(-1) < uniform[..., None]
        return below.sum(-1).clamp_max(self.BINS - 1) * (self.WIDEST / (self.BINS - 1))
