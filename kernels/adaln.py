"""Modulated layer norm on a GPU: one pass forward, one pass backward with partial sums for shift
and scale.

`share` consecutive rows of x use one row of shift and scale (the tokens of a frame, say).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def modulated_norm_fwd_kernel(
    x, shift, scale, out, mean, rstd, share, width, eps, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * width + columns, inside, other=0.0).to(tl.float32)
    mu = tl.sum(value) / width
    centred = tl.where(inside, value - mu, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred) / width + eps)
    at = row // share * width + columns
    s = tl.load(scale + at, inside, other=0.0).to(tl.float32)
    t = tl.load(shift + at, inside, other=0.0).to(tl.float32)
    y = centred * inverse * (1.0 + s) + t
    tl.store(out + row * width + columns, y.to(out.dtype.element_ty), inside)
    tl.store(mean + row, mu)
    tl.store(rstd + row, inverse)


@triton.jit
def modulated_norm_bwd_kernel(
    x, scale, grad, mean, rstd, grad_x, part_shift, part_scale, share, width, chunk, chunks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`chunk` rows that share one modulation: their dx, and their part of dshift and dscale."""
    group = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    s = 1.0 + tl.load(scale + group * width + columns, inside, other=0.0).to(tl.float32)
    sum_shift = tl.zeros((BLOCK,), tl.float32)
    sum_scale = tl.zeros((BLOCK,), tl.float32)
    for i in range(part * chunk, tl.minimum((part + 1) * chunk, share)):
        row = group * share + i
        g = tl.load(grad + row * width + columns, inside, other=0.0).to(tl.float32)
        value = tl.load(x + row * width + columns, inside, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + row)
        normal = tl.where(inside, (value - tl.load(mean + row)) * inverse, 0.0)
        sum_shift += g
        sum_scale += g * normal
        gs = g * s
        dx = gs - tl.sum(gs) / width - normal * (tl.sum(gs * normal) / width)
        tl.store(grad_x + row * width + columns, (dx * inverse).to(grad_x.dtype.element_ty), inside)
    to = (group * chunks + part) * width + columns
    tl.store(part_shift + to, sum_shift, inside)
    tl.store(part_scale + to, sum_scale, inside)


def _warps(width: int) -> int:
    return 8 if width > 2048 else 4


def forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x [R,E], shift and scale [R/share,E], all contiguous -> out [R,E], mean [R], rstd [R]."""
    rows, width = x.shape
    out = torch.empty_like(x)
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    modulated_norm_fwd_kernel[(rows,)](
        x, shift, scale, out, mean, rstd, rows // shift.shape[0], width, eps,
        BLOCK=triton.next_power_of_2(width), num_warps=_warps(width),
    )  # fmt: skip
    return out, mean, rstd


def backward(
    grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [R,E], shift and scale [R/share,E] (the latter two in float32)."""
    rows, width = x.shape
    groups = scale.shape[0]
    share = rows // groups
    chunk = max(1, min(share, 16 if groups * share > 2048 else 4))
    chunks = triton.cdiv(share, chunk)
    grad_x = torch.empty_like(x)
    parts = [
        torch.empty(groups, chunks, width, dtype=torch.float32, device=x.device) for _ in range(2)
    ]
    modulated_norm_bwd_kernel[(groups, chunks)](
        x, scale, grad.contiguous(), mean, rstd, grad_x, *parts, share, width, chunk, chunks,
        BLOCK=triton.next_power_of_2(width), num_warps=_warps(width),
    )  # fmt: skip
    return grad_x, parts[0].sum(1), parts[1].sum(1)
