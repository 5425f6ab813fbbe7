"""Attention of one new frame over a ragged ring cache on a GPU.

Each program holds a tile of one row's queries and walks that row's own slots through the table,
then the frame's own keys and values; rows of different lengths simply loop a different number of
times. Online softmax in base 2.

Liberty taken: no split over keys; at 64-256 queries per frame and tens of rows the grid fills the
device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from worldenv.kernels.attention import LOG2E, _load_rows


@triton.jit
def _attend_frame(
    acc, top, total, q, k_base, v_base, k_row, v_row, columns, tokens, dim, scale,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All tokens of one frame added to the running softmax."""
    for at in range(0, tokens, BLOCK_N):
        keys = at + tl.arange(0, BLOCK_N)
        k = _load_rows(k_base, keys, k_row, columns, tokens, dim)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        s = tl.where((keys < tokens)[None, :], s, float("-inf"))
        high = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - high[:, None])
        shrink = tl.exp2(top - high)
        total = total * shrink + tl.sum(p, 1)
        v = _load_rows(v_base, keys, v_row, columns, tokens, dim)
        acc = acc * shrink[:, None]
        acc += tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        top = high
    return acc, top, total


@triton.jit
def frame_attention_fwd_kernel(
    q, k, v, cache_k, cache_v, table, cached, out, q_batch, q_row, q_head, k_batch, k_row, k_head,
    v_batch, v_row, v_head, heads, groups, slots, tokens, dim, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // heads, pair % heads
    kv = h // groups
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    queries = _load_rows(q + b * q_batch + h * q_head, rows, q_row, columns, tokens, dim)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    past = tl.load(cached + b)
    ring = (b * (heads // groups) + kv) * slots
    for j in range(past):
        slot = tl.load(table + b * slots + j).to(tl.int64)
        at = (ring + slot) * tokens * dim
        acc, top, total = _attend_frame(
            acc, top, total, queries, cache_k + at, cache_v + at, dim, dim, columns, tokens, dim,
            scale, BLOCK_N, PRECISION,
        )  # fmt: skip
    acc, top, total = _attend_frame(
        acc, top, total, queries, k + b * k_batch + kv * k_head, v + b * v_batch + kv * v_head,
        k_row, v_row, columns, tokens, dim, scale, BLOCK_N, PRECISION,
    )  # fmt: skip
    inside = (rows[:, None] < tokens) & (columns[None, :] < dim)
    to = out + ((b * tokens + rows[:, None]) * heads + h) * dim + columns[None, :]
    tl.store(to, (acc / total[:, None]).to(out.dtype.element_ty), inside)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, table: Tensor, cached: Tensor
) -> Tensor:
    """q [B,S,H,D], k, v [B,S,Hk,D] with contiguous D, cache [B,Hk,slots,S,D] -> [B,S,H,D]."""
    batch, tokens, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    block = min(64, max(16, triton.next_power_of_2(tokens)))
    if q.dtype == torch.float32:
        block = min(block, 32)
    strides = [s for x in (q, k, v) for s in x.stride()[:3]]
    grid = (triton.cdiv(tokens, block), batch * heads)
    frame_attention_fwd_kernel[grid](
        q, k, v, cache_k, cache_v, table, cached, out, *strides, heads, heads // k.shape[2],
        cache_k.shape[2], tokens, dim, dim**-0.5 * LOG2E,
        BLOCK_M=block, BLOCK_N=block, BLOCK_D=max(16, triton.next_power_of_2(dim)),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=4, num_stages=3,
    )  # fmt: skip
    return out
