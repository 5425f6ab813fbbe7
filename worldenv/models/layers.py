"""Building blocks shared by the models: Wan-shaped block, rotary positions, encoders.

`DenoiserBlock` has the structure of a Wan transformer block (self-attention with RMS-normalised
queries and keys and 3D rotary positions, MLP, modulation by a shared
time projection plus a learned table). One thing is added: a zero-initialised linear map from the
frame's action embedding to the block's modulation, the per-frame action conditioning. Wan's
cross-attention to text is left out: the dynamics do not depend on the instruction.
"""

import math
import zlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldenv.ops import gelu, modulated_norm, norm_rotary

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def sinusoidal(x: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal features `[..., dim]` of scalars x, cosines first (Wan's timestep embedding)."""
    half = dim // 2
    freq = torch.exp(-math.log(max_period) * torch.arange(half, device=x.device) / half)
    angle = x[..., None].float() * freq
    return torch.cat([angle.cos(), angle.sin()], -1)


class Rotary3D(nn.Module):
    """Rotary angles for (frame, row, column), head dim split as in Wan.

    Views are stacked along the rows, so a token's row is `view * grid + row`.
    """

    def __init__(self, head_dim: int, views: int, grid: int) -> None:
        super().__init__()
        side = 2 * (head_dim // 6)
        self.frame_dim = head_dim - 2 * side
        row = torch.arange(views * grid).repeat_interleave(grid).float()
        col = torch.arange(grid).repeat(views * grid).float()
        space = torch.cat([torch.outer(row, _freq(side)), torch.outer(col, _freq(side))], -1)
        self.register_buffer("space", space, persistent=False)  # [S, side]
        self.register_buffer("frame_freq", _freq(self.frame_dim), persistent=False)

    def forward(self, frame: Tensor) -> Tensor:
        """Frame positions `[...]` to unit complex numbers `[..., S, D/2]`."""
        time = (frame[..., None].float() * self.frame_freq)[..., None, :]
        space = self.space.expand(*frame.shape, -1, -1)
        angle = torch.cat([time.expand(*space.shape[:-1], -1), space], -1)
        return torch.polar(torch.ones_like(angle), angle)


def _freq(dim: int) -> Tensor:
    return 1.0 / 10_000.0 ** (torch.arange(0, dim, 2).float() / dim)


class DenoiserBlock(nn.Module):
    """One block over tokens `[B, F, S, E]`; how tokens attend is passed in as a function."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads = heads
        # Shift, scale, gate of attention and of the MLP. Open gates train far faster from scratch
        # than Wan's small random ones.
        self.table = nn.Parameter(torch.tensor([0.0, 0, 1, 0, 0, 1])[:, None].repeat(1, width))
        self.action = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q, self.norm_k = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.out = nn.Linear(width, width)
        hidden = int(width * mlp_ratio)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.action.weight)
        nn.init.zeros_(self.action.bias)

    def forward(
        self,
        x: Tensor,  # [B, F, S, E]
        time: Tensor,  # [B, F, 6, E] shared projection of the noise level
        action: Tensor,  # [B, F, E]
        rotary: Tensor,  # [B, F, S, D/2] complex
        attend: Attend,  # (q, k, v) [B, F, S, H, D] -> [B, F, S, H, D]
    ) -> Tensor:
        modulation = self.table + time + self.action(action).unflatten(-1, (6, -1))
        shift, scale, gate, shift2, scale2, gate2 = modulation.unsqueeze(3).unbind(2)
        q, k, v = self.qkv(modulated_norm(x, shift, scale)).chunk(3, -1)
        q = norm_rotary(q, self.norm_q.weight, rotary)
        k = norm_rotary(k, self.norm_k.weight, rotary)
        attended = attend(q, k, v.unflatten(-1, (self.heads, -1))).flatten(-2)
        x = torch.addcmul(x, gate, self.out(attended))
        return torch.addcmul(x, gate2, self.down(gelu(self.up(modulated_norm(x, shift2, scale2)))))


class TransformerBlock(nn.Module):
    """Pre-norm bidirectional block over a short sequence `[B, N, E]` (the policy's trunk)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"))
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        y = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)))
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        return x + self.down(self.mlp(self.norm2(x)))


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


class ConvEncoder(nn.Module):
    """One camera's image `[B, 3, H, W]` in [-1, 1] to one token `[B, out]`.

    Keeps the spatial layout until the last linear map: where things are is what a policy needs.
    """

    def __init__(self, image_size: int, channels: int, out: int) -> None:
        super().__init__()
        c = channels
        grid = image_size // 8
        self.net = nn.Sequential(
            nn.Conv2d(3, c, 4, 2, 1),
            nn.SiLU(),
            nn.Conv2d(c, 2 * c, 4, 2, 1),
            _Residual(2 * c),
            nn.Conv2d(2 * c, 3 * c, 4, 2, 1),
            _Residual(3 * c),
            nn.SiLU(),
            nn.Conv2d(3 * c, 32, 1),
            nn.Flatten(),
            nn.Linear(32 * grid * grid, out),
            nn.LayerNorm(out),
        ).to(memory_format=torch.channels_last)  # a third faster to train on a CPU

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.contiguous(memory_format=torch.channels_last))


class WordEncoder(nn.Module):
    """Instruction to one token: the mean of hashed word embeddings. Needs no vocabulary file."""

    def __init__(self, out: int, buckets: int = 1024) -> None:
        super().__init__()
        self.buckets = buckets
        self.embed = nn.EmbeddingBag(buckets, out, mode="mean")

    def forward(self, instructions: Sequence[str]) -> Tensor:
        """A batch of B sentences to `[B, out]`; equal sentences are embedded once."""
        unique = sorted(set(instructions))
        ids, offsets = [], []
        for sentence in unique:
            offsets.append(len(ids))
            ids += [zlib.crc32(w.encode()) % self.buckets for w in sentence.lower().split()] or [0]
        device = self.embed.weight.device
        table = self.embed(torch.tensor(ids, device=device), torch.tensor(offsets, device=device))
        row = {sentence: i for i, sentence in enumerate(unique)}
        return table[torch.tensor([row[s] for s in instructions], device=device)]


def views_to_channels(images: Tensor) -> Tensor:
    """Images `[B, V, H, W, 3]` uint8 to float `[V, B, 3, H, W]` in [-1, 1]."""
    return images.permute(1, 0, 4, 2, 3).float().div(127.5).sub(1.0)
