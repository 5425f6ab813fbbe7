"""Spatiotemporal attention: tokens of F frames attend within their frame and to earlier frames.

Used to train the denoiser and to prefill context. Mask between frames f (query) and g (key),
`window` = W and `sinks` = K:   g <= f  and  (f - g < W  or  g < K);   so W counts the query's own
frame. `causal=False` is full attention. All tokens of one frame see the same frames, which is why
masks are built on [F, F] and expanded.

Backends: `triton` (CUDA, forward and backward, skips masked blocks), `sdpa` (torch's own kernels;
the choice on a CPU), `flash_attn` and `xformers` (full attention only), `reference` (plain torch,
float32 softmax).
Source: block-causal diffusion forcing as in Self-Forcing (arXiv 2506.08009), sinks as in arXiv
2309.17453.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from worldenv.ops import backend as backends
from worldenv.ops.checks import check_floating, check_same, shape_of

if backends.NO_TRITON is None:
    from worldenv.ops import triton_ops

_OP = "spatiotemporal_attention"


def frame_mask(frames: int, window: int | None, sinks: int, causal: bool) -> Tensor:
    """Which frame may see which: bool [F, F] on the CPU, rows are queries."""
    query = torch.arange(frames).unsqueeze(1)
    key = torch.arange(frames).unsqueeze(0)
    if not causal:
        return torch.ones(frames, frames, dtype=torch.bool)
    allowed = key <= query
    if window is not None:
        allowed &= (query - key < window) | (key < sinks)
    return allowed


def _additive_mask(
    frames: int,
    tokens: int,
    window: int | None,
    sinks: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    allowed = frame_mask(frames, window, sinks, True)
    mask = torch.zeros(frames, frames, dtype=dtype).masked_fill_(~allowed, float("-inf"))
    mask = mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    return mask.to(device)


_cached_mask = lru_cache(maxsize=32)(_additive_mask)


def spatiotemporal_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    sinks: int = 0,
    causal: bool = True,
) -> Tensor:
    """Plain torch, softmax in float32 (float64 stays float64). Shapes as
    `spatiotemporal_attention`."""
    _, frames, tokens, heads, dim = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    qt, kt, vt = (x.flatten(1, 2).transpose(1, 2).to(wide) for x in (q, k, v))  # [B, H, F*S, D]
    groups = heads // k.shape[3]
    kt, vt = kt.repeat_interleave(groups, 1), vt.repeat_interleave(groups, 1)
    scores = qt @ kt.transpose(-1, -2) * dim**-0.5
    allowed = frame_mask(frames, window, sinks, causal).to(q.device)
    allowed = allowed.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    probability = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return (probability @ vt).transpose(1, 2).reshape(q.shape).to(q.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: int, causal: bool) -> Tensor:
    frames, tokens, heads = q.shape[1], q.shape[2], q.shape[3]
    mask, shape = None, q.shape
    if (
        causal and window == 1 and sinks == 0
    ):  # each frame alone: more rows, no mask, F times less work
        q, k, v = (x.flatten(0, 1).unsqueeze(1) for x in (q, k, v))
        frames = 1
    if causal and frames > 1:
        build = _additive_mask if torch.compiler.is_compiling() else _cached_mask
        mask = build(frames, tokens, window, sinks, q.dtype, q.device)
    qt, kt, vt = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(qt, kt, vt, attn_mask=mask, enable_gqa=heads != k.shape[3])
    return out.transpose(1, 2).reshape(shape)


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: int) -> None:
    check_floating(_OP, q=q, k=k, v=v)
    check_same(_OP, q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 5:
            raise ValueError(f"{_OP}: {name} must be [B,F,S,H,D], got shape {shape_of(x)}")
    same = (0, 1, 2, 4)
    if k.shape != v.shape or any(q.shape[i] != k.shape[i] for i in same):
        raise ValueError(
            f"{_OP}: k and v must be [B,F,S,H,D] like q, with as many heads or a divisor of them; "
            f"got q {shape_of(q)}, k {shape_of(k)}, v {shape_of(v)}"
        )
    if k.shape[3] == 0 or q.shape[3] % k.shape[3]:
        raise ValueError(
            f"{_OP}: heads of q must be a multiple of the heads of k, "
            f"got {q.shape[3]} and {k.shape[3]}"
        )
    if window is not None and window < 1:
        raise ValueError(
            f"{_OP}: window must be None or >= 1 (it counts the own frame), got {window}"
        )
    if sinks < 0:
        raise ValueError(f"{_OP}: sinks must be >= 0, got {sinks}")


def spatiotemporal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    sinks: int = 0,
    causal: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Attention over the tokens of F frames, block-causal over frames by default.

    Args:
        q: [B, F, S, H, D] float; D of 32, 64 or 128 runs on every backend.
        k, v: [B, F, S, Hk, D], Hk a divisor of H (grouped heads), same dtype and device as q.
        window: frames a query sees backwards, its own included; None for all.
        sinks: first frames that stay visible beyond the window.
        causal: False for full attention (window and sinks must then be left at their defaults).
        backend: auto | triton | sdpa | flash_attn | xformers | reference.

    Returns:
        [B, F, S, H, D] in the dtype of q. Differentiable. Empty inputs give an empty result; NaN or
        inf in a frame reaches exactly the outputs that see that frame (with a mask, backends may
        spread it further).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device; the message names
            it.
        BackendUnavailable: a forced backend cannot run.
    """
    _check(q, k, v, window, sinks)
    if not causal and (window is not None or sinks):
        raise ValueError(
            f"{_OP}: window and sinks need causal=True, got window={window}, sinks={sinks}"
        )
    if q.numel() == 0:
        return torch.empty_like(q) + 0 * (k.sum() + v.sum())
    only_full = (
        None if not causal else "it has no block-causal mask (pass causal=False, or use triton)"
    )
    name = backends.choose(
        _OP,
        backend,
        {
            "triton": backends.no_triton(q, most=256),
            "sdpa": None,
            "flash_attn": backends.NO_FLASH_ATTN or only_full or _no_half_cuda(q),
            "xformers": backends.NO_XFORMERS or only_full or _no_half_cuda(q),
            "reference": None,
        },
    )
    if name == "triton":
        return triton_ops.attention_fwd(q, k, v, window, sinks, causal)[0]
    if name == "sdpa":
        return _sdpa(q, k, v, window, sinks, causal)
    if name == "reference":
        return spatiotemporal_attention_reference(
            q, k, v, window=window, sinks=sinks, causal=causal
        )
    return _library(name, q, k, v)


def _no_half_cuda(q: Tensor) -> str | None:
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bf16 or f16 CUDA tensors, got {q.dtype} on {q.device}"
    return None


def _library(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention by flash-attn or xformers, where installed. Imported late: both load CUDA
    libraries."""
    qt, kt, vt = (x.flatten(1, 2) for x in (q, k, v))
    if name == "flash_attn":
        from flash_attn import flash_attn_func

        return flash_attn_func(qt, kt, vt).view(q.shape)
    from xformers.ops import memory_efficient_attention

    groups = q.shape[3] // k.shape[3]
    kt, vt = kt.repeat_interleave(groups, 2), vt.repeat_interleave(groups, 2)
    return memory_efficient_attention(qt, kt, vt).view(q.shape)
