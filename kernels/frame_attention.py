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

from worldenv.kernels.attention import LOG2E, _join, _load_rows


@triton.jit
def _attend_tile(
    at, acc, top, total, q, k_base, v_base, k_row, v_row, columns, tokens, dim, scale,
    EDGE: tl.constexpr, WHOLE: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens [at, at + BLOCK_N) of one frame added to the running softmax."""
    lane = tl.arange(0, BLOCK_N)
    k = _load_rows(k_base, at, lane, k_row, columns, tokens, dim, EDGE, WHOLE)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if EDGE:
        s = tl.where((at + lane < tokens)[None, :], s, float("-inf"))
    p, acc, top, total = _join(s, acc, top, total, scale, False)
    v = _load_rows(v_base, at, lane, v_row, columns, tokens, dim, EDGE, WHOLE)
    acc += tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return acc, top, total


@triton.jit
def frame_attention_fwd_kernel(
    q, k, v, cache_k, cache_v, table, cached, out, q_batch, q_row, q_head, k_batch, k_row, k_head,
    v_batch, v_row, v_head, heads, groups, slots, tokens, dim, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // heads, pair % heads
    kv = h // groups
    first = tl.program_id(0) * BLOCK_M
    lane = tl.arange(0, BLOCK_M)
    rows = first + lane
    columns = tl.arange(0, BLOCK_D)
    q_base = q + b * q_batch + h * q_head
    queries = _load_rows(q_base, first, lane, q_row, columns, tokens, dim, True, WHOLE)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    per_frame = tl.cdiv(tokens, BLOCK_N)
    ring = (b * (heads // groups) + kv) * slots
    # One loop over the tiles of all frames: loads run ahead within a loop, not across two.
    for i in range(tl.load(cached + b) * per_frame):
        at = ring + tl.load(table + b * slots + i // per_frame)
        acc, top, total = _attend_tile(
            i % per_frame * BLOCK_N, acc, top, total, queries, cache_k + at * tokens * dim,
            cache_v + at * tokens * dim, dim, dim, columns, tokens, dim, scale, EDGE, WHOLE,
            BLOCK_N, PRECISION,
        )  # fmt: skip
    k_base = k + b * k_batch + kv * k_head
    v_base = v + b * v_batch + kv * v_head
    for i in range(per_frame):
        acc, top, total = _attend_tile(
            i * BLOCK_N, acc, top, total, queries, k_base, v_base, k_row, v_row, columns, tokens,
            dim, scale, EDGE, WHOLE, BLOCK_N, PRECISION,
        )  # fmt: skip
    inside = (rows[:, None] < tokens) & (columns[None, :] < dim)
    to = out + ((b * tokens + rows[:, None]) * heads + h) * dim + columns[None, :]
    tl.store(to, (acc / total[:, None]).to(out.dtype.element_ty), inside)


def tiles(tokens: int, dim: int, dtype: torch.dtype) -> dict[str, int | bool]:
    """Tile sizes and launch options; EDGE where the last tile of a frame is not full."""
    block_d = max(16, triton.next_power_of_2(dim))
    most = 64 if dtype != torch.float32 else 32 if block_d <= 64 else 16
    block = min(most, max(16, triton.next_power_of_2(tokens)))
    return {
        "BLOCK_M": block, "BLOCK_N": block, "BLOCK_D": block_d, "EDGE": tokens % block != 0,
        "WHOLE": block_d == dim, "num_warps": 4, "num_stages": 3,
    }  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, table: Tensor, cached: Tensor
) -> Tensor:
    """q [B,S,H,D], k, v [B,S,Hk,D] with contiguous D, cache [B,Hk,slots,S,D] -> [B,S,H,D]."""
    batch, tokens, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    sizes = tiles(tokens, dim, q.dtype)
    strides = [s for x in (q, k, v) for s in x.stride()[:3]]
    grid = (triton.cdiv(tokens, sizes["BLOCK_M"]), batch * heads)
    frame_attention_fwd_kernel[grid](
        q, k, v, cache_k, cache_v, table, cached, out, *strides, heads, heads // k.shape[2],
        cache_k.shape[2], tokens, dim, dim**-0.5 * LOG2E,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", **sizes,
    )  # fmt: skip
    return out
