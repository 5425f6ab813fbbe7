"""RMS norm and rotary positions on a GPU: one pass forward, one pass backward with partial sums for
the weight.

A row holds one token's channels of all heads as pairs; the rotation of a pair is the same in every
head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def norm_rotary_fwd_kernel(
    x, weight, rotary, out, turns, stride, width, dim, eps, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, BLOCK)
    inside = pair < width // 2
    a = tl.load(x + row * stride + 2 * pair, inside, other=0.0).to(tl.float32)
    b = tl.load(x + row * stride + 2 * pair + 1, inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(a * a + b * b) / width + eps)
    a *= inverse * tl.load(weight + 2 * pair, inside, other=0.0)
    b *= inverse * tl.load(weight + 2 * pair + 1, inside, other=0.0)
    turn = rotary + row % turns * dim + 2 * (pair % (dim // 2))
    c = tl.load(turn, inside, other=0.0)
    s = tl.load(turn + 1, inside, other=0.0)
    to = out + row * width + 2 * pair
    tl.store(to, (a * c - b * s).to(out.dtype.element_ty), inside)
    tl.store(to + 1, (b * c + a * s).to(out.dtype.element_ty), inside)


@triton.jit
def norm_rotary_bwd_kernel(
    grad, x, weight, rotary, grad_x, part, turns, rows, chunk, stride, width, dim, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`chunk` rows: their dx, and their part of the weight's gradient."""
    program = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, BLOCK)
    inside = pair < width // 2
    wa = tl.load(weight + 2 * pair, inside, other=0.0)
    wb = tl.load(weight + 2 * pair + 1, inside, other=0.0)
    sum_a = tl.zeros((BLOCK,), tl.float32)
    sum_b = tl.zeros((BLOCK,), tl.float32)
    for row in range(program * chunk, tl.minimum((program + 1) * chunk, rows)):
        a = tl.load(x + row * stride + 2 * pair, inside, other=0.0).to(tl.float32)
        b = tl.load(x + row * stride + 2 * pair + 1, inside, other=0.0).to(tl.float32)
        inverse = 1.0 / tl.sqrt(tl.sum(a * a + b * b) / width + eps)
        turn = rotary + row % turns * dim + 2 * (pair % (dim // 2))
        c = tl.load(turn, inside, other=0.0)
        s = tl.load(turn + 1, inside, other=0.0)
        at = row * width + 2 * pair
        p = tl.load(grad + at, inside, other=0.0).to(tl.float32)
        q = tl.load(grad + at + 1, inside, other=0.0).to(tl.float32)
        ga = p * c + q * s
        gb = q * c - p * s
        sum_a += ga * a * inverse
        sum_b += gb * b * inverse
        ga *= wa
        gb *= wb
        back = tl.sum(ga * a + gb * b) / width * inverse * inverse
        tl.store(grad_x + at, ((ga - a * back) * inverse).to(grad_x.dtype.element_ty), inside)
        tl.store(grad_x + at + 1, ((gb - b * back) * inverse).to(grad_x.dtype.element_ty), inside)
    to = part + program * width + 2 * pair
    tl.store(to, sum_a, inside)
    tl.store(to + 1, sum_b, inside)


def _block(width: int) -> dict[str, int]:
    return {"BLOCK": triton.next_power_of_2(width // 2), "num_warps": 8 if width > 2048 else 4}


def forward(x: Tensor, weight: Tensor, rotary: Tensor, eps: float) -> Tensor:
    """x [R,E] with contiguous channels, weight [E] and rotary [turns,D] float32 -> out
    [R,E]. Row r takes rotary r % turns."""
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    norm_rotary_fwd_kernel[(rows,)](
        x, weight, rotary, out, rotary.shape[0], x.stride(0), width, rotary.shape[1], eps,
        **_block(width),
    )  # fmt: skip
    return out


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, rotary: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x [R,E] and weight [E]; grad [R,E] contiguous."""
    rows, width = x.shape
    chunk = 16 if rows > 2048 else 4
    programs = triton.cdiv(rows, chunk)
    grad_x = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    part = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    norm_rotary_bwd_kernel[(programs,)](
        grad, x, weight, rotary, grad_x, part, rotary.shape[0], rows, chunk, x.stride(0), width,
        rotary.shape[1], eps, **_block(width),
    )  # fmt: skip
    return grad_x, part.sum(0)
