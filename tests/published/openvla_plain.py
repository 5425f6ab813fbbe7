"""The published computation transcribed once more, in float64, from a folder's tensors by name.

Loops and formulas only: no module of ours, no class of transformers, one row at a time.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def norm(x: Tensor, tensors: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    x = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def linear(x: Tensor, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    y = x @ tensors[f"{name}.weight"].T
    return y + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else y


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def tower(image: Tensor, tensors: Mapping[str, Tensor], start: str, last: int) -> Tensor:
    """Image `[3, H, W]` to patches `[S, E]` after block `last`; sixteen heads."""
    t = {n.removeprefix(start): v for n, v in tensors.items() if n.startswith(start)}
    patches = image.unfold(1, 14, 14).unfold(2, 14, 14).permute(1, 2, 0, 3, 4).flatten(2)
    x = patches.flatten(0, 1) @ t["patch_embed.proj.weight"].flatten(1).T
    x = x + t["patch_embed.proj.bias"] + t["pos_embed"][0]
    before = 0
    if "cls_token" in t:
        x = torch.cat([t["cls_token"][0], t["reg_token"][0], x])
        before = 5
    for i in range(last + 1):
        b = f"blocks.{i}."
        q, k, v = linear(norm(x, t, f"{b}norm1", 1e-6), t, f"{b}attn.qkv").chunk(3, -1)
        heads = []
        for a, c, d in zip(q.chunk(16, -1), k.chunk(16, -1), v.chunk(16, -1), strict=True):
            heads.append((a @ c.T / math.sqrt(a.shape[-1])).softmax(-1) @ d)
        y = linear(torch.cat(heads, -1), t, f"{b}attn.proj")
        x = x + y * t.get(f"{b}ls1.scale_factor", 1.0)
        y = linear(gelu(linear(norm(x, t, f"{b}norm2", 1e-6), t, f"{b}mlp.fc1")), t, f"{b}mlp.fc2")
        x = x + y * t.get(f"{b}ls2.scale_factor", 1.0)
    return x[before:]


def seen(images: list[Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    """Images `[V, 3, H, W]` for DINOv2 and for SigLIP to tokens `[V * S, E]`."""
    out = []
    for first, second in zip(*images, strict=True):
        a = tower(first, tensors, "vision_backbone.featurizer.", 22)
        b = tower(second, tensors, "vision_backbone.fused_featurizer.", 25)
        x = gelu(linear(torch.cat([a, b], -1), tensors, "projector.fc1"))
        out.append(
            linear(gelu(linear(x, tensors, "projector.fc2")), tensors, "projector.fc3"),
        )
    return torch.cat(out)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x: Tensor) -> Tensor:
    """Rotary positions 0, 1, ... of a head `[S, D]`, halves together, base 10000."""
    half = x.shape[-1] // 2
    rate = 10_000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    angle = torch.arange(len(x), dtype=x.dtype)[:, None] * rate
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def llama(x: Tensor, tensors: Mapping[str, Tensor], heads: int, causal: bool = False) -> Tensor:
    """Embeddings `[S, E]` to final hidden states."""
    t = {n.removeprefix("language_model.model."): v for n, v in tensors.items()}
    later = torch.ones(len(x), len(x)).triu(1).bool()
    i = 0
    while f"layers.{i}.input_layernorm.weight" in t:
        b = f"layers.{i}."
        y = rms(x, t[f"{b}input_layernorm.weight"])
        q, k, v = (linear(y, t, f"{b}self_attn.{n}_proj").chunk(heads, -1) for n in "qkv")
        said = []
        for a, c, d in zip(q, k, v, strict=True):
            score = turned(a) @ turned(c).T / math.sqrt(a.shape[-1])
            score = score.masked_fill(later, -math.inf) if causal else score
            said.append(score.softmax(-1) @ d)
        x = x + linear(torch.cat(said, -1), t, f"{b}self_attn.o_proj")
        y = rms(x, t[f"{b}post_attention_layernorm.weight"])
        gate = linear(y, t, f"{b}mlp.gate_proj")
        y = gate * gate.sigmoid() * linear(y, t, f"{b}mlp.up_proj")
        x = x + linear(y, t, f"{b}mlp.down_proj")
        i += 1
    return rms(x, t["norm.weight"])


def action_head(x: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    """Hidden states of the steps `[C, A * E]` to actions `[C, A]`."""
    x = F.relu(linear(norm(x, t, "model.layer_norm1", 1e-5), t, "model.fc1"))
    for i in range(2):
        b = f"model.mlp_resnet_blocks.{i}.ffn."
        x = x + F.relu(linear(norm(x, t, f"{b}0", 1e-5), t, f"{b}1"))
    return linear(norm(x, t, "model.layer_norm2", 1e-5), t, "model.fc2")


def proprio_token(q: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    """Normalised proprio `[P]` to a token `[1, E]`."""
    return linear(gelu(linear(q, t, "fc1")), t, "fc2")[None]
