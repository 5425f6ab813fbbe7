"""Building blocks shared by the models: Wan-shaped block, rotary positions, encoders.

`Block` is a Wan transformer block (self-attention with RMS-normalised queries and keys and 3D
rotary positions, cross-attention to text, MLP, modulation by a shared time projection plus a
learned table). One thing is added: a zero-initialised linear map from the frame's action embedding
to the block's modulation, the per-frame action conditioning. `DenoiserBlock` holds the weights as
the small denoiser's checkpoints name them, `models.wan.WanBlock` as Wan's do. The text branch is
optional: the small denoiser goes without, for the dynamics do not depend on the instruction.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

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

    Views are stacked along the rows, so a token's row is `view * grid + row`. grid: tokens per side
    of a view, or its rows and columns. exact: angles in float64, as Wan has them.
    """

    def __init__(
        self, head_dim: int, views: int, grid: int | tuple[int, int], exact: bool = False
    ) -> None:
        super().__init__()
        rows, columns = (grid, grid) if isinstance(grid, int) else grid
        side, kind = 2 * (head_dim // 6), torch.float64 if exact else torch.float32
        self.frame_dim = head_dim - 2 * side
        row = torch.arange(views * rows).repeat_interleave(columns).to(kind)
        col = torch.arange(columns).repeat(views * rows).to(kind)
        space = torch.cat([torch.outer(x, _freq(side, kind)) for x in (row, col)], -1)
        self.register_buffer("space", space, persistent=False)  # [S, side]
        self.register_buffer("frame_freq", _freq(self.frame_dim, kind), persistent=False)

    def forward(self, frame: Tensor) -> Tensor:
        """Frame positions `[...]` to unit complex numbers `[..., S, D/2]`, complex64."""
        time = (frame[..., None].to(self.frame_freq.dtype) * self.frame_freq)[..., None, :]
        space = self.space.expand(*frame.shape, -1, -1)
        angle = torch.cat([time.expand(*space.shape[:-1], -1), space], -1)
        return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def _freq(dim: int, kind: torch.dtype) -> Tensor:
    return 1.0 / 10_000.0 ** (torch.arange(0, dim, 2).to(kind) / dim)


class Words(NamedTuple):
    """What one block's queries find in a text: computed once, for as many frames as are to come."""

    keys: Tensor  # [B or 1, H, N, D]
    values: Tensor  # [B or 1, H, N, D]
    bias: Tensor | None  # [N], added to the scores


class Attention(nn.Module):
    """Weights of an attention as Wan names them; queries and keys normalised over all heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q, self.norm_k = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)


class CrossAttention(Attention):
    """Tokens look words up: Wan's `attn2`. No gate, no positions."""

    def words(self, context: Tensor, last: int = 1) -> Words:
        """Keys and values of embedded words `[B, N, E]`. last: how many equal words the last one
        stands for, such as padding, which Wan attends to unmasked; exactly."""
        keys, values = self.norm_k(self.to_k(context)), self.to_v(context)
        bias = None
        if last > 1:
            bias = keys.new_zeros(context.shape[1])
            bias[-1] = math.log(last)
        return Words(self._split(keys), self._split(values), bias)

    def forward(self, x: Tensor, words: Words) -> Tensor:
        """x `[B, F, S, E]`, normalised, to what is to be added to it."""
        keys, values, bias = words
        q = self._split(self.norm_q(self.to_q(x)).flatten(1, 2))
        mask = None if bias is None else bias.to(q.dtype).expand(q.shape[2], -1)
        keys, values = (y.expand(len(q), -1, -1, -1) for y in (keys, values))
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return self.to_out[0](y.transpose(1, 2).flatten(2).view_as(x))

    def constant(self, word: Tensor) -> Tensor:
        """`[E]` added to every token where all words are the same one `[E]`, whatever it asks."""
        return self.to_out[0](self.to_v(word))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class ConstantText(nn.Module):
    """In the place of a `CrossAttention`: all that is left of it when the text is always empty."""

    def __init__(self, constant: Tensor) -> None:
        super().__init__()
        self.constant = nn.Parameter(constant)  # [E]


class Block(nn.Module):
    """One block over tokens `[B, F, S, E]`; how tokens attend is passed in as a function.

    A subclass holds the weights: `action`, and what the methods below `forward` read. attn2:
    `CrossAttention` beside its affine norm `norm2`, a `ConstantText`, or None.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.register_module("attn2", None)

    def forward(
        self,
        x: Tensor,  # [B, F, S, E]
        time: Tensor,  # [B, F, 6, E] shared projection of the noise level
        action: Tensor | None,  # [B, F, E] embedded; None where nothing is commanded
        rotary: Tensor,  # [B, F, S, D/2] complex
        attend: Attend,  # (q, k, v) [B, F, S, H, D] -> [B, F, S, H, D]
        words: Words | None = None,  # of attn2, where it is a CrossAttention
    ) -> Tensor:
        modulation = self._table() + time
        if action is not None:
            modulation = modulation + self.action(action).unflatten(-1, (6, -1))
        shift, scale, gate, shift2, scale2, gate2 = modulation.unsqueeze(3).unbind(2)
        q, k, v = self._qkv(modulated_norm(x, shift, scale))
        q, k = (norm_rotary(y, w, rotary) for y, w in zip((q, k), self._qk_norms(), strict=True))
        attended = attend(q, k, v.unflatten(-1, (self.heads, -1))).flatten(-2)
        x = torch.addcmul(x, gate.to(x.dtype), self._attention_out(attended))
        x = self._read(x, words)
        return torch.addcmul(x, gate2.to(x.dtype), self._mlp(modulated_norm(x, shift2, scale2)))

    def _read(self, x: Tensor, words: Words | None) -> Tensor:
        """x with what the text says to it."""
        if isinstance(self.attn2, ConstantText):
            return x + self.attn2.constant.to(x.dtype)
        if words is None:
            return x
        weight, bias = self.norm2.weight.float(), self.norm2.bias.float()
        normed = F.layer_norm(x.float(), x.shape[-1:], weight, bias, 1e-6)
        return x + self.attn2(normed.to(x.dtype), words)

    def _table(self) -> Tensor:
        """Learned part of the modulation, `[6, E]`."""
        raise NotImplementedError

    def _qkv(self, x: Tensor) -> Sequence[Tensor]:
        raise NotImplementedError

    def _qk_norms(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _attention_out(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _mlp(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class DenoiserBlock(Block):
    """The small denoiser's. text: with cross-attention."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, text: bool = False) -> None:
        super().__init__(heads)
        # Shift, scale, gate of attention and of the MLP. Open gates train far faster from scratch
        # than Wan's small random ones.
        self.table = nn.Parameter(torch.tensor([0.0, 0, 1, 0, 0, 1])[:, None].repeat(1, width))
        self.action = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q, self.norm_k = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.out = nn.Linear(width, width)
        hidden = int(width * mlp_ratio)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        if text:
            self.norm2, self.attn2 = nn.LayerNorm(width, eps=1e-6), CrossAttention(width, heads)
        nn.init.zeros_(self.action.weight)
        nn.init.zeros_(self.action.bias)

    def _table(self) -> Tensor:
        return self.table

    def _qkv(self, x: Tensor) -> Sequence[Tensor]:
        return self.qkv(x).chunk(3, -1)

    def _qk_norms(self) -> tuple[Tensor, Tensor]:
        return self.norm_q.weight, self.norm_k.weight

    def _attention_out(self, x: Tensor) -> Tensor:
        return self.out(x)

    def _mlp(self, x: Tensor) -> Tensor:
        return self.down(gelu(self.up(x)))


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
