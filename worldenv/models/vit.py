"""The vision transformers of OpenVLA, under the names that timm gives their weights.

DINOv2 ViT-L/14 (class token, four registers, layer scale) and SigLIP so400m/14, as in timm 0.9:
pre-norm blocks, exact GELU, positions for patches only. OpenVLA reads the output of the last block
but one, so the last block, the final norm and the pooling are not built (`unused` names them).
Layer scales are called `scale_factor`, as OpenVLA saves them.
"""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class VitKind:
    """What a timm name says of a transformer; its widths are those of its weights."""

    patch: int
    depth: int
    heads: int
    registers: int = 0
    layer_scale: bool = False


KINDS = {
    "vit_large_patch14_reg4_dinov2.lvd142m": VitKind(14, 24, 16, registers=4, layer_scale=True),
    "vit_so400m_patch14_siglip_224": VitKind(14, 27, 16),
}


def unused(kind: VitKind) -> re.Pattern:
    """Matches the published tensors of a transformer that its features do not depend on."""
    return re.compile(rf"(blocks\.{kind.depth - 1}|norm|attn_pool)\..+")


class Vit(nn.Module):
    """Images `[N, 3, H, W]`, normalised, to patch features `[N, S, E]`."""

    def __init__(self, kind: VitKind, image_size: int, width: int, hidden: int) -> None:
        super().__init__()
        self.kind = kind
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, kind.patch, kind.patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // kind.patch) ** 2, width))
        if kind.registers:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            self.reg_token = nn.Parameter(torch.zeros(1, kind.registers, width))
        self.blocks = nn.ModuleList(Block(kind, width, hidden) for _ in range(kind.depth - 1))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2) + self.pos_embed
        prefix = 0
        if self.kind.registers:
            before = torch.cat([self.cls_token, self.reg_token], 1)
            prefix = before.shape[1]
            x = torch.cat([before.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return x[:, prefix:]


class Block(nn.Module):
    """One block over tokens `[N, S, E]`."""

    def __init__(self, kind: VitKind, width: int, hidden: int) -> None:
        super().__init__()
        self.heads = kind.heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.ls1 = LayerScale(width) if kind.layer_scale else nn.Identity()
        self.ls2 = LayerScale(width) if kind.layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        y = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)))
        x = x + self.ls1(self.attn.proj(y.transpose(1, 2).flatten(-2)))
        return x + self.ls2(self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x)))))


class LayerScale(nn.Module):
    """A learned factor for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_factor
