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
    """How wide the gripper will be open after a chunk: a distribution over the logarithm of it.

    Whether fingers close on an object is seldom certain, and a frame between both is neither. So
    the opening is drawn, and the frame follows it.
    """

    BINS = 96
    WIDEST = 160.0  # mm

    def __init__(self, views: int, size: int, known: int, hidden: int = 128) -> None:
        """size: of the images in pixels; known: numbers that come with them."""
        super().__init__()
        layers: list[nn.Module] = []
        for inside, outside in ((3 * views, 24), (24, 48), (48, 64)):
            layers += [nn.Conv2d(inside, outside, 3 if layers else 5, 2, 1 if layers else 2)]
            layers += [nn.GELU()]
        layers += [nn.Flatten(), nn.Linear(64 * (size // 8) ** 2, hidden), nn.GELU()]
        self.see = nn.Sequential(*layers, nn.Dropout(0.3))
        self.say = nn.Sequential(
            nn.Linear(hidden + known, hidden), nn.GELU(), nn.Dropout(0.2),
            nn.Linear(hidden, self.BINS),
        )  # fmt: skip
        top = float(torch.tensor(1 + self.WIDEST).log())
        self.register_buffer("scale", torch.tensor((self.BINS - 1) / top))

    def forward(self, views: Tensor, known: Tensor) -> Tensor:
        """Views `[V, N, 3, H, W]` in [-1, 1] and what is known `[N, K]` to logits `[N, BINS]`."""
        seen = self.see(views.transpose(0, 1).flatten(1, 2))
        return self.say(torch.cat([seen, known], -1)).float()

    def loss(self, logits: Tensor, opening: Tensor) -> Tensor:
        """Cross entropy with true openings `[N]` in m."""
        return F.cross_entropy(logits, self.bins(opening))

    def bins(self, opening: Tensor) -> Tensor:
        """Of openings in m."""
        place = torch.log1p(1000 * opening.clamp_min(0)) * self.scale
        return place.round().long().clamp_max(self.BINS - 1)

    def smooth(self, opening: Tensor) -> Tensor:
        """Openings in m as `[..., BINS]` numbers, near ones alike; zeros where NaN."""
        place = torch.log1p(1000 * opening.clamp_min(0)) * self.scale
        at = torch.arange(self.BINS, device=opening.device)
        return torch.exp(-((at - place[..., None]) / 3).square() / 2).nan_to_num(0.0)

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Openings `[N]` in m, drawn by uniform numbers."""
        below = logits.softmax(-1).cumsum(-1) < uniform[:, None]
        return torch.expm1(below.sum(-1).clamp_max(self.BINS - 1) / self.scale) / 1000
