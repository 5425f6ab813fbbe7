"""Spatiotemporal attention: tokens of F frames attend within their frame and to earlier frames.

Used to train the denoiser and to prefill context. Mask between frames f (query) and g (key),
`window` = W and `sinks` = K:   g <= f  and  (f - g < W  or  g < K);   so W counts the query's own
frame. `causal=False` is full attention. All tokens of one frame see the same frames.

Teacher forcing: with a `history` of F clean frames, q, k, v are those of F noisy ones, of which
frame f follows clean frame f. It stands where clean frame f + 1 would and sees itself, no other
noisy frame, and of the clean ones g <= f what that place sees: f + 1 - g < W  or  g < K.

Backends: `triton` (CUDA, forward and backward, skips masked blocks), `sdpa` (torch's own kernels,
one call for all frames that see equally many; the choice on a CPU), `flash_attn` and `xformers`
(full attention only), `reference` (plain torch, float32 softmax).
Source: block-causal diffusion forcing and teacher forcing as compared in Self-Forcing (arXiv
2506.08009), sinks as in arXiv 2309.17453.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from worldenv.ops import backend as backends
from worldenv.ops.checks import check_floating, check_same, check_shape, shape_of

if backends.NO_TRITON is None:
    from worldenv.ops import triton_ops

_OP = "spatiotemporal_attention"


def frames_seen(
    frames: int, window: int | None, sinks: int, causal: bool = True, halves: int = 0
) -> list[list[int]]:
    """Per query frame, the key frames it sees. halves: with a history of as many clean frames
    before the F noisy ones among the keys, queries of the noisy frames (1) or of all 2 F (2)."""
    if not causal:
        return [list(range(frames))] * frames

    def seen(query: int, before: int) -> list[int]:
        near = frames + 1 if window is None else window
        return [g for g in range(before) if query - g < near or g < sinks]

    clean = [seen(f, f + 1) for f in range(frames)]
    noisy = [[*seen(f + 1, f + 1), frames + f] for f in range(frames)]
    return (clean, noisy, clean + noisy)[halves]


def frame_mask(
    frames: int, window: int | None, sinks: int, causal: bool, halves: int = 0
) -> Tensor:
    """`frames_seen` as bool [query frames, key frames] on the CPU."""
    rows = frames_seen(frames, window, sinks, causal, halves)
    keys = torch.arange(2 * frames if halves else frames)
    return torch.stack([torch.isin(keys, torch.tensor(row)) for row in rows])


def spatiotemporal_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    sinks: int = 0,
    causal: bool = True,
    history: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Plain torch, softmax in float32 (float64 stays float64). Shapes as
    `spatiotemporal_attention`."""
    tokens, heads, dim = q.shape[2:]
    halves = 0 if history is None else q.shape[1] // k.shape[1]
    allowed = frame_mask(k.shape[1], window, sinks, causal, halves).to(q.device)
    if history is not None:
        k, v = (torch.cat(pair, 1) for pair in zip(history, (k, v), strict=True))
    wide = torch.promote_types(q.dtype, torch.float32)
    qt, kt, vt = (x.flatten(1, 2).transpose(1, 2).to(wide) for x in (q, k, v))  # [B, H, F*S, D]
    groups = heads // k.shape[3]
    kt, vt = kt.repeat_interleave(groups, 1), vt.repeat_interleave(groups, 1)
    scores = qt @ kt.transpose(-1, -2) * dim**-0.5
    allowed = allowed.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    probability = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return (probability @ vt).transpose(1, 2).reshape(q.shape).to(q.dtype)


def _take(x: Tensor, frames: list[int]) -> Tensor:
    """These frames of x [B, F, ...]; a view where they follow each other."""
    if frames == list(range(frames[0], frames[-1] + 1)):
        return x[:, frames[0] : frames[-1] + 1]
    return x.index_select(1, torch.tensor(frames, device=x.device))


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    history: tuple[Tensor, Tensor] | None,
    window: int | None,
    sinks: int,
    causal: bool,
) -> Tensor:
    """Frames that see equally many are one call, side by side in the batch and without a mask: a
    masked call computes what it masks (on a CPU up to six times the work of these)."""
    batch, _, tokens, heads, dim = q.shape
    if not causal:  # all tokens are one frame
        shape, whole = q.shape, (x.flatten(1, 2).unsqueeze(1) for x in (q, k, v))
        return _sdpa(*whole, None, None, 0, True).view(shape)
    halves = 0 if history is None else q.shape[1] // k.shape[1]
    seen = frames_seen(k.shape[1], window, sinks, True, halves)
    if history is not None:
        k, v = (torch.cat(pair, 1) for pair in zip(history, (k, v), strict=True))
    alike: dict[int, list[int]] = {}
    for frame, keys in enumerate(seen):
        alike.setdefault(len(keys), []).append(frame)
    parts, order = [], [frame for frames in alike.values() for frame in frames]
    for frames in alike.values():
        keys = [g for frame in frames for g in seen[frame]]
        qkv = (_take(q, frames), _take(k, keys), _take(v, keys))
        rows = (x.reshape(batch * len(frames), -1, *x.shape[3:]).transpose(1, 2) for x in qkv)
        part = F.scaled_dot_product_attention(*rows, enable_gqa=heads != k.shape[3])
        parts.append(part.transpose(1, 2).reshape(batch, len(frames), tokens, heads, dim))
    if len(parts) == 1:
        return parts[0]
    return _take(torch.cat(parts, 1), sorted(range(len(order)), key=order.__getitem__))


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    sinks: int,
    causal: bool,
    history: tuple[Tensor, Tensor] | None,
) -> None:
    given = {"q": q, "k": k, "v": v}
    if history is not None:
        if len(history) != 2:
            raise ValueError(f"{_OP}: history must be keys and values, got {len(history)} tensors")
        given |= dict(zip(("k of history", "v of history"), history, strict=True))
    check_floating(_OP, **given)
    check_same(_OP, **given)
    for name, x in given.items():
        if x.dim() != 5:
            raise ValueError(f"{_OP}: {name} must be [B,F,S,H,D], got shape {shape_of(x)}")
    for name, x in list(given.items())[3:]:
        check_shape(_OP, name, x, k.shape, "B,F,S,Hk,D, like k")
    frames = (k.shape[1],) if history is None else (k.shape[1], 2 * k.shape[1])
    same = (0, 2, 4)
    if (
        k.shape != v.shape
        or q.shape[1] not in frames
        or any(q.shape[i] != k.shape[i] for i in same)
    ):
        raise ValueError(
            f"{_OP}: k and v must be [B,F,S,H,D] like q, with as many heads or a divisor of them"
            f"{'' if history is None else ' (and, with a history, half the frames or all)'}; "
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
    if not causal and (window is not None or sinks or history is not None):
        raise ValueError(
            f"{_OP}: window, sinks and history need causal=True, got window={window}, "
            f"sinks={sinks}, history {'absent' if history is None else 'given'}"
        )


def spatiotemporal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    sinks: int = 0,
    causal: bool = True,
    history: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention over the tokens of F frames, block-causal over frames by default.

    Args:
        q: [B, F, S, H, D] float; D of 32, 64 or 128 runs on every backend.
        k, v: [B, F, S, Hk, D], Hk a divisor of H (grouped heads), same dtype and device as q.
        window: frames a query sees backwards, its own included; None for all.
        sinks: first frames that stay visible beyond the window.
        causal: False for full attention (window and sinks must then be left at their defaults).
        history: keys and values of F clean frames, like k and v, for teacher forcing (see above).
            q then holds the F noisy frames, or 2 F: first the clean ones, which see each other by
            the rule without a history. A history that requires no gradient costs none.
        backend: auto | triton | sdpa | flash_attn | xformers | reference.

    Returns:
        Like q. Differentiable. Empty inputs give an empty result; NaN or inf in a frame reaches
        exactly the outputs that see that frame (in triton and reference it may spread further).

    Raises:
        ValueError, TypeError: shape, dtype or device of an argument; the message names it.
        BackendUnavailable: a forced backend cannot run.
    """
    _check(q, k, v, window, sinks, causal, history)
    if q.numel() == 0:
        return torch.empty_like(q) + 0 * sum(x.sum() for x in (k, v, *(history or ())))
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
        past = history or (None, None)
        return triton_ops.attention_fwd(q, k, v, *past, window, sinks, causal)[0]
    if name == "sdpa":
        return _sdpa(q, k, v, history, window, sinks, causal)
    if name == "reference":
        return spatiotemporal_attention_reference(
            q, k, v, window=window, sinks=sinks, causal=causal, history=history
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
