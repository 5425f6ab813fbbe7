"""Modulated layer norm (adaLN): layer_norm(x) * (1 + scale) + shift, the normalisation of a DiT
block.

Backends: `triton` (CUDA, forward and backward in one pass each), `reference` (torch's own
layer_norm and addcmul; the choice on a CPU, where it is within a few percent of the memory bound).
Source: arXiv 2212.09748.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from worldenv.ops import backend as backends
from worldenv.ops.checks import check_floating, shape_of

if backends.NO_TRITON is None:
    from worldenv.ops import triton_ops

_OP = "modulated_norm"


def modulated_norm_reference(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6
) -> Tensor:
    """Plain torch: statistics in float32 by layer_norm, then one fused multiply-add."""
    y = F.layer_norm(x, (x.shape[-1],), eps=eps)
    return torch.addcmul(shift.to(y.dtype), y, 1 + scale.to(y.dtype))


def modulated_norm(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, backend: str = "auto"
) -> Tensor:
    """layer_norm(x) * (1 + scale) + shift over the last axis, without learned affine.

    Args:
        x: [..., E] float.
        shift, scale: broadcastable to x, last axis E or 1; may be wider than x (float32 beside
            bf16).
        eps: added to the variance, > 0.
        backend: auto | triton | reference.

    Returns:
        The shape and dtype of x. Differentiable in x, shift and scale. NaN stays in its own row.

    Raises:
        ValueError, TypeError: shapes that do not broadcast to x, or non-float inputs.
    """
    check_floating(_OP, x=x, shift=shift, scale=scale)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{_OP}: x must be [..., E] with E >= 1, got {shape_of(x)}")
    if eps <= 0:
        raise ValueError(f"{_OP}: eps must be > 0, got {eps}")
    for name, t in (("shift", shift), ("scale", scale)):
        pairs = zip(reversed(t.shape), reversed(x.shape), strict=False)
        if t.dim() > x.dim() or any(a not in (1, b) for a, b in pairs):
            raise ValueError(f"{_OP}: {name} must broadcast to x {shape_of(x)}, got {shape_of(t)}")
        if t.device != x.device:
            raise ValueError(
                f"{_OP}: {name} must be on the device of x ({x.device}), got {t.device}"
            )
    why_not = {"triton": backends.no_triton(x, most=16384), "reference": None}
    if backends.choose(_OP, backend, why_not) == "triton" and x.numel():
        return _triton(x, shift, scale, eps)
    return modulated_norm_reference(x, shift, scale, eps=eps)


def _triton(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Flatten to rows; modulation is kept unexpanded where it varies over leading axes only."""
    lead = max(_leading_axes(t, x) for t in (shift, scale))
    rows = (*x.shape[:lead], *[1] * (x.dim() - lead - 1), x.shape[-1])
    shift, scale = (t.expand(rows).reshape(-1, x.shape[-1]).contiguous() for t in (shift, scale))
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    return triton_ops.modulated_norm_fwd(flat, shift, scale, eps)[0].view(x.shape)


def _leading_axes(t: Tensor, x: Tensor) -> int:
    """How many leading axes of x (E aside) the modulation t varies over."""
    shape = (1,) * (x.dim() - t.dim()) + tuple(t.shape)
    varying = [i for i in range(x.dim() - 1) if shape[i] != 1]
    return varying[-1] + 1 if varying else 0
