"""What the simulator ends with: its tokens become a clean frame."""

import torch
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
