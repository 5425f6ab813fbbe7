"""Wan's video transformer under its published names, over the ops of this project.

`WanTransformer` is `WanTransformer3DModel` of diffusers (2.1 T2V, 2.2 TI2V): with full attention
it equals it (`video`), with a cache and a window it generates frame by frame (`models.wan_world`),
with action embedders it is WoVR's (`models.wovr`). It predicts the velocity noise - frame of
normalised latents; a clean frame is one at noise level 0, as in TI2V.

Precision: blocks, patch embedding, text and time projection may be bfloat16; modulation tables,
time embedding, norms and output head stay float32, as in diffusers (which has the head in bf16).
Text: an empty one is 512 equal words, which leave one vector a layer of each cross-attention; n
words are n keys and one that stands for 512 - n paddings. Both are exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldenv.models.layers import (
    Attend,
    Attention,
    Block,
    ConstantText,
    CrossAttention,
    Rotary3D,
    Words,
    sinusoidal,
)
from worldenv.ops import gelu, modulated_norm, spatiotemporal_attention
from worldenv.runtime.errors import UserError

TEXT_LENGTH = 512  # words, padding included, that Wan was trained with


@dataclass(frozen=True)
class WanSizes:
    """All that decides which tensors a Wan transformer has."""

    heads: int
    head_dim: int
    layers: int
    ffn: int
    channels: int  # z, of latents; a token is 2 x 2 of them
    text_dim: int  # 0: no text embedder
    freq_dim: int = 256
    actions: int = 0  # A of WoVR's action embedders; 0: none

    @property
    def width(self) -> int:
        """E."""
        return self.heads * self.head_dim


class TwoLayers(nn.Module):
    """Linear, activation, linear, as diffusers names them."""

    def __init__(self, inner: int, outer: int, tanh: bool) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(inner, outer), nn.Linear(outer, outer)
        self.tanh = tanh

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear_1(x.to(self.linear_1.weight.dtype))
        return self.linear_2(gelu(y) if self.tanh else F.silu(y))


class ConditionEmbedder(nn.Module):
    """Noise levels and texts to what blocks take."""

    def __init__(self, sizes: WanSizes) -> None:
        super().__init__()
        e = sizes.width
        self.freq_dim = sizes.freq_dim
        self.time_embedder = TwoLayers(sizes.freq_dim, e, tanh=False)
        self.time_proj = nn.Linear(e, 6 * e)
        if sizes.text_dim:
            self.text_embedder = TwoLayers(sizes.text_dim, e, tanh=True)

    def forward(self, time: Tensor, more: Tensor | None) -> tuple[Tensor, Tensor]:
        """Times in [0, 1000] `[B, F]` to their embedding `[B, F, E]`, to which `more` of that
        shape is added, and the blocks' modulation `[B, F, 6, E]`; float32."""
        embedded = self.time_embedder(sinusoidal(time, self.freq_dim))
        if more is not None:
            embedded = embedded + more.to(embedded.dtype)
        modulation = self.time_proj(F.silu(embedded).to(self.time_proj.weight.dtype))
        return embedded, modulation.float().unflatten(-1, (6, -1))


class FeedForward(nn.Module):
    """`net.0.proj`, tanh GELU, `net.2`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(width, hidden)
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(hidden, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](gelu(self.net[0].proj(x)))


class WanBlock(Block):
    """A block under its published names."""

    def __init__(self, sizes: WanSizes) -> None:
        super().__init__(sizes.heads)
        e = sizes.width
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, e) / e**0.5)
        self.attn1 = Attention(e, sizes.heads)
        self.norm2, self.attn2 = nn.LayerNorm(e, eps=1e-6), CrossAttention(e, sizes.heads)
        self.ffn = FeedForward(e, sizes.ffn)

    def _table(self) -> Tensor:
        return self.scale_shift_table

    def _qkv(self, x: Tensor) -> Sequence[Tensor]:
        return self.attn1.to_q(x), self.attn1.to_k(x), self.attn1.to_v(x)

    def _qk_norms(self) -> tuple[Tensor, Tensor]:
        return self.attn1.norm_q.weight, self.attn1.norm_k.weight

    def _attention_out(self, x: Tensor) -> Tensor:
        return self.attn1.to_out[0](x)

    def _mlp(self, x: Tensor) -> Tensor:
        return self.ffn(x)


class WanTransformer(nn.Module):
    """Tokens `[B, F, S, Z]` to velocities; Z = 4 z numbers: 2 x 2 latents as (z, row, column).

    With `sizes.actions`, WoVR's: `action_mlp1` makes words of actions, `action_mlp2` adds four of
    them to each frame's time.
    """

    def __init__(self, sizes: WanSizes) -> None:
        super().__init__()
        e, a, self.sizes = sizes.width, sizes.actions, sizes
        self.patch_embedding = nn.Conv3d(sizes.channels, e, (1, 2, 2), (1, 2, 2))
        self.condition_embedder = ConditionEmbedder(sizes)
        self.blocks = nn.ModuleList(WanBlock(sizes) for _ in range(sizes.layers))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, e) / e**0.5)
        self.proj_out = nn.Linear(e, 4 * sizes.channels)
        if a:
            self.action_mlp1 = nn.Sequential(nn.Linear(a, e), nn.GELU(), nn.Linear(e, e))
            self.action_mlp2 = nn.Sequential(
                nn.Linear(4 * a, 4 * e), nn.SiLU(), nn.Linear(4 * e, e)
            )

    @property
    def dtype(self) -> torch.dtype:
        """What the blocks compute in."""
        return self.blocks[0].attn1.to_q.weight.dtype

    def forward(
        self,
        x: Tensor,  # [B, F, S, Z]
        time: Tensor,  # [B, F] in [0, 1000], of each frame
        rotary: Tensor,  # [B, F, S, D/2] complex
        attends: Sequence[Attend],
        words: Sequence[Words] | None = None,  # per layer
        action: Tensor | None = None,  # [B, F, E'] of the blocks' `action`
        added: Tensor | None = None,  # [B, F, S, E] to the embedded patches
        more: Tensor | None = None,  # [B, F, E] to the embedded time
    ) -> tuple[Tensor, Tensor]:
        """Velocity `[B, F, S, Z]` and the last block's tokens `[B, F, S, E]`, both float32."""
        patch = self.patch_embedding
        x = F.linear(x.to(self.dtype), patch.weight.flatten(1), patch.bias)
        if added is not None:
            x = x + added.to(x.dtype)
        embedded, modulation = self.condition_embedder(time, more)
        words = words or [None] * len(self.blocks)
        for block, attend, of_block in zip(self.blocks, attends, words, strict=True):
            x = block(x, modulation, action, rotary, attend, of_block)
        x = x.float()
        shift, scale = (self.scale_shift_table + embedded.unsqueeze(-2)).unsqueeze(3).unbind(2)
        y = self.proj_out(modulated_norm(x, shift, scale))  # (row, column, z)
        return y.unflatten(-1, (4, -1)).transpose(-1, -2).flatten(-2), x

    def forget_text(self, constants: Sequence[Tensor]) -> None:
        """Leave all out that reads texts; `constants` `[E]` per layer: what an empty one says."""
        del self.condition_embedder.text_embedder
        for block, constant in zip(self.blocks, constants, strict=True):
            del block.norm2
            block.attn2 = ConstantText(constant)

    def read(self, text: Tensor) -> list[Words]:
        """Per layer, what a text `[B, n, 4096]` (embedded by Wan's text encoder) says."""
        rows = text.shape[1]
        if rows > TEXT_LENGTH:
            raise UserError(f"a text of Wan has at most {TEXT_LENGTH} words, got {rows}")
        context = self.condition_embedder.text_embedder(F.pad(text, (0, 0, 0, 1)))
        if rows == TEXT_LENGTH:
            return self.look_up(context[:, :-1])
        return self.look_up(context, TEXT_LENGTH - rows)

    def look_up(self, context: Tensor, last: int = 1) -> list[Words]:
        """Per layer, keys and values of embedded words `[B, N, E]`; see `CrossAttention.words`."""
        context = context.to(self.dtype)
        return [block.attn2.words(context, last) for block in self.blocks]

    def video(self, z: Tensor, time: Tensor, text: Tensor | None = None) -> Tensor:
        """Velocity of a clip whose frames all see each other, as in diffusers.

        z: [B, z, F, h, w] latents; time: [B] or [B, F] in [0, 1000]; text: [B, n, 4096], without
        its padding, None for an empty one (where it is constant). Returns the shape of z.
        """
        frames, height, width = z.shape[2:]
        if text is None and not isinstance(self.blocks[0].attn2, ConstantText):
            text = z.new_zeros(1, 0, self.sizes.text_dim)
        where = torch.arange(frames, device=z.device)[None]
        rotary = Rotary3D(self.sizes.head_dim, 1, (height // 2, width // 2), exact=True)
        velocity, _ = self(
            to_tokens(z),
            time.view(len(z), -1).expand(-1, frames),
            rotary.to(z.device)(where),
            [full_attention] * len(self.blocks),
            None if text is None else self.read(text),
        )
        return from_tokens(velocity, height, width)


def to_tokens(z: Tensor) -> Tensor:
    """Latents `[B, z, F, h, w]` to tokens `[B, F, S, 4 z]`, each 2 x 2 as (z, row, column)."""
    return F.pixel_unshuffle(z.transpose(1, 2), 2).flatten(-2).transpose(-1, -2)


def from_tokens(x: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `to_tokens`, for latents of height x width."""
    x = x.transpose(-1, -2).unflatten(-1, (height // 2, width // 2))
    return F.pixel_shuffle(x, 2).transpose(1, 2)


def full_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All frames see all frames: `[B, F, S, H, D]`."""
    return spatiotemporal_attention(q, k, v, causal=False)
