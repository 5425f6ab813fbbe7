"""Spatiotemporal attention on a GPU: forward and backward, block-causal over frames with window and
sinks.

Tokens of all frames form one sequence of N = F * S; token i belongs to frame i // S. A tile of
queries visits only the keys between its first visible and last visible frame, plus the sink frames,
so masked blocks are skipped rather than computed. Online softmax in base 2; the backward pass
recomputes probabilities from the saved log-sum-exp.

Liberties taken: fixed tile sizes per head dim (nothing is tuned at run time, so the interpreter and
ahead-of-time compilation see the same code); float32 inputs multiply in full precision; q/k norm
and rotary stay outside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634


@triton.jit
def _visible(query_frame, key_frame, window, sinks, CAUSAL: tl.constexpr):
    """bool [M, N]: frame of each query against frame of each key."""
    if CAUSAL:
        near = query_frame[:, None] - key_frame[None, :] < window
        return (key_frame[None, :] <= query_frame[:, None]) & (near | (key_frame[None, :] < sinks))
    return (query_frame[:, None] >= 0) & (key_frame[None, :] >= 0)


@triton.jit
def _load_rows(base, rows, stride, columns, limit, dim):
    """Rows of a [N, D] matrix, zero beyond N or D."""
    inside = (rows[:, None] < limit) & (columns[None, :] < dim)
    return tl.load(base + rows[:, None].to(tl.int64) * stride + columns[None, :], inside, other=0.0)


@triton.jit
def _forward_range(
    start, stop, acc, top, total, q, k_base, v_base, k_row, v_row, rows, columns, n, dim, tokens,
    window, sinks, scale, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys [start, stop) added to the running softmax of one query tile."""
    for at in range(start, stop, BLOCK_N):
        keys = at + tl.arange(0, BLOCK_N)
        k = _load_rows(k_base, keys, k_row, columns, stop, dim)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        seen = (
            _visible(rows // tokens, keys // tokens, window, sinks, CAUSAL) & (keys < stop)[None, :]
        )
        s = tl.where(seen, s, float("-inf"))
        high = tl.maximum(top, tl.max(s, 1))
        base = tl.where(high == float("-inf"), 0.0, high)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        v = _load_rows(v_base, keys, v_row, columns, stop, dim)
        acc = acc * shrink[:, None]
        acc += tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        top = high
    return acc, top, total


@triton.jit
def _key_bounds(first, last, tokens, frames, window, sinks, CAUSAL: tl.constexpr):
    """Key ranges of queries [first, last]: sinks [0, a), then the window [b, c)."""
    if CAUSAL:
        begin = tl.maximum(first // tokens - window + 1, 0)
        end = tl.minimum(last // tokens + 1, frames)
        sink = tl.minimum(sinks, begin)
        return sink * tokens, begin * tokens, end * tokens
    return 0, 0, frames * tokens


@triton.jit
def attention_fwd_kernel(
    q, k, v, out, lse, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    heads, groups, frames, tokens, dim, window, sinks, scale,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // heads, pair % heads
    n = frames * tokens
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    k_base = k + b * k_batch + (h // groups) * k_head
    v_base = v + b * v_batch + (h // groups) * v_head
    queries = _load_rows(q + b * q_batch + h * q_head, rows, q_row, columns, n, dim)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    last = tl.minimum(tile * BLOCK_M + BLOCK_M, n) - 1
    sink_stop, begin, end = _key_bounds(tile * BLOCK_M, last, tokens, frames, window, sinks, CAUSAL)
    if CAUSAL:
        acc, top, total = _forward_range(
            0, sink_stop, acc, top, total, queries, k_base, v_base, k_row, v_row, rows, columns, n,
            dim, tokens, window, sinks, scale, CAUSAL, BLOCK_N, PRECISION,
        )  # fmt: skip
    acc, top, total = _forward_range(
        begin, end, acc, top, total, queries, k_base, v_base, k_row, v_row, rows, columns, n,
        dim, tokens, window, sinks, scale, CAUSAL, BLOCK_N, PRECISION,
    )  # fmt: skip
    inside = (rows[:, None] < n) & (columns[None, :] < dim)
    to = out + ((b * n + rows[:, None]) * heads + h) * dim + columns[None, :]
    tl.store(to, (acc / total[:, None]).to(out.dtype.element_ty), inside)
    tl.store(lse + pair * n + rows, top + tl.log2(total), rows < n)


@triton.jit
def attention_bwd_delta_kernel(
    out, grad, delta, heads, n, dim, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    """delta = rowsum(out * grad), one number per query and head."""
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // heads, pair % heads
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    base = (b * n * heads + h) * dim
    o = _load_rows(out + base, rows, heads * dim, columns, n, dim).to(tl.float32)
    g = _load_rows(grad + base, rows, heads * dim, columns, n, dim).to(tl.float32)
    tl.store(delta + pair * n + rows, tl.sum(o * g, 1), rows < n)


@triton.jit
def _grad_query_range(
    start, stop, acc, q, g, lse, delta, k_base, v_base, k_row, v_row, rows, columns, dim, tokens,
    window, sinks, scale, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for at in range(start, stop, BLOCK_N):
        keys = at + tl.arange(0, BLOCK_N)
        k = _load_rows(k_base, keys, k_row, columns, stop, dim)
        v = _load_rows(v_base, keys, v_row, columns, stop, dim)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        seen = (
            _visible(rows // tokens, keys // tokens, window, sinks, CAUSAL) & (keys < stop)[None, :]
        )
        p = tl.where(seen, tl.exp2(s - lse[:, None]), 0.0)
        slope = p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        acc += tl.dot(slope.to(k.dtype), k, input_precision=PRECISION)
    return acc


@triton.jit
def attention_bwd_query_kernel(
    q, k, v, grad, lse, delta, grad_q, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch,
    v_row, v_head, heads, groups, frames, tokens, dim, window, sinks, scale, plain_scale,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // heads, pair % heads
    n = frames * tokens
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    k_base = k + b * k_batch + (h // groups) * k_head
    v_base = v + b * v_batch + (h // groups) * v_head
    queries = _load_rows(q + b * q_batch + h * q_head, rows, q_row, columns, n, dim)
    base = (b * n * heads + h) * dim
    g = _load_rows(grad + base, rows, heads * dim, columns, n, dim)
    row_lse = tl.load(lse + pair * n + rows, rows < n, other=0.0)
    row_delta = tl.load(delta + pair * n + rows, rows < n, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    last = tl.minimum(tile * BLOCK_M + BLOCK_M, n) - 1
    sink_stop, begin, end = _key_bounds(tile * BLOCK_M, last, tokens, frames, window, sinks, CAUSAL)
    if CAUSAL:
        acc = _grad_query_range(
            0, sink_stop, acc, queries, g, row_lse, row_delta, k_base, v_base, k_row, v_row, rows,
            columns, dim, tokens, window, sinks, scale, CAUSAL, BLOCK_N, PRECISION,
        )  # fmt: skip
    acc = _grad_query_range(
        begin, end, acc, queries, g, row_lse, row_delta, k_base, v_base, k_row, v_row, rows,
        columns, dim, tokens, window, sinks, scale, CAUSAL, BLOCK_N, PRECISION,
    )  # fmt: skip
    inside = (rows[:, None] < n) & (columns[None, :] < dim)
    to = grad_q + base + rows[:, None].to(tl.int64) * heads * dim + columns[None, :]
    tl.store(to, (acc * plain_scale).to(grad_q.dtype.element_ty), inside)


@triton.jit
def attention_bwd_key_kernel(
    q, k, v, grad, lse, delta, grad_k, grad_v, q_batch, q_row, q_head, k_batch, k_row, k_head,
    v_batch, v_row, v_head, heads, groups, frames, tokens, dim, window, sinks, scale, plain_scale,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values; visits the queries of every head in its group that can see
    it."""
    tile = tl.program_id(0)
    kv_heads = heads // groups
    pair = tl.program_id(1).to(tl.int64)
    b, kv = pair // kv_heads, pair % kv_heads
    n = frames * tokens
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    k_tile = _load_rows(k + b * k_batch + kv * k_head, keys, k_row, columns, n, dim)
    v_tile = _load_rows(v + b * v_batch + kv * v_head, keys, v_row, columns, n, dim)
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    begin, end = 0, n
    if CAUSAL:
        first = tile * BLOCK_N // tokens
        last = (tl.minimum(tile * BLOCK_N + BLOCK_N, n) - 1) // tokens
        begin = first * tokens
        end = tl.where(first < sinks, frames, tl.minimum(last + window, frames)) * tokens
    for h in range(kv * groups, kv * groups + groups):
        base = (b * n * heads + h) * dim
        for at in range(begin, end, BLOCK_M):
            rows = at + tl.arange(0, BLOCK_M)
            queries = _load_rows(q + b * q_batch + h * q_head, rows, q_row, columns, end, dim)
            g = _load_rows(grad + base, rows, heads * dim, columns, end, dim)
            statistics = (b * heads + h) * n + rows
            row_lse = tl.load(lse + statistics, rows < end, other=0.0)
            row_delta = tl.load(delta + statistics, rows < end, other=0.0)
            s = tl.dot(queries, tl.trans(k_tile), input_precision=PRECISION) * scale
            seen = _visible(rows // tokens, keys // tokens, window, sinks, CAUSAL)
            seen = seen & (rows < end)[:, None] & (keys < n)[None, :]
            p = tl.where(seen, tl.exp2(s - row_lse[:, None]), 0.0)
            acc_v += tl.dot(tl.trans(p.to(g.dtype)), g, input_precision=PRECISION)
            slope = p * (
                tl.dot(g, tl.trans(v_tile), input_precision=PRECISION) - row_delta[:, None]
            )
            acc_k += tl.dot(
                tl.trans(slope.to(q.dtype.element_ty)), queries, input_precision=PRECISION
            )
    inside = (keys[:, None] < n) & (columns[None, :] < dim)
    to = ((b * n + keys[:, None].to(tl.int64)) * kv_heads + kv) * dim + columns[None, :]
    tl.store(grad_k + to, (acc_k * plain_scale).to(grad_k.dtype.element_ty), inside)
    tl.store(grad_v + to, acc_v.to(grad_v.dtype.element_ty), inside)


def tiles(dim: int, dtype: torch.dtype, backward: bool) -> dict[str, int]:
    """Tile sizes and launch options; the largest that fit the registers of an A100 or H100."""
    block_d = max(16, triton.next_power_of_2(dim))
    if dtype == torch.float32:
        sizes = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    elif backward:
        sizes = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    else:
        sizes = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8 if dim > 64 else 4, "num_stages": 3}
    return {"BLOCK_D": block_d, **sizes}


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: int, causal: bool
) -> tuple:
    frames, tokens, heads, dim = q.shape[1:]
    strides = []
    for x in (q, k, v):
        strides += [x.stride(0), x.stride(2), x.stride(3)]
    reach = frames if window is None else min(window, frames)
    scale = dim**-0.5
    return (
        *strides,
        heads,
        heads // k.shape[3],
        frames,
        tokens,
        dim,
        reach,
        sinks,
        scale * LOG2E,
    ), {
        "CAUSAL": causal,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }


def _one_row_stride(x: Tensor) -> Tensor:
    """Frames and tokens as one axis: needs stride(F) = S * stride(S) and contiguous D."""
    regular = x.stride(4) == 1 and x.stride(1) == x.shape[2] * x.stride(2)
    return x if regular else x.contiguous()


def forward(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """q [B,F,S,H,D], k, v [B,F,S,Hk,D] -> out like q, log-sum-exp [B,H,F*S] (base 2, float32)."""
    q, k, v = (_one_row_stride(x) for x in (q, k, v))
    batch, frames, tokens, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, frames * tokens, dtype=torch.float32, device=q.device)
    sizes = tiles(dim, q.dtype, backward=False)
    arguments, flags = _arguments(q, k, v, window, sinks, causal)
    grid = (triton.cdiv(frames * tokens, sizes["BLOCK_M"]), batch * heads)
    attention_fwd_kernel[grid](q, k, v, out, lse, *arguments, **flags, **sizes)
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    window: int | None, sinks: int, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, contiguous, in their dtypes."""
    q, k, v = (_one_row_stride(x) for x in (q, k, v))
    grad = grad.contiguous()
    batch, frames, tokens, heads, dim = q.shape
    n = frames * tokens
    delta = torch.empty_like(lse)
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    sizes = tiles(dim, q.dtype, backward=True)
    block = {name: sizes[name] for name in ("BLOCK_M", "BLOCK_D")}
    grid = (triton.cdiv(n, sizes["BLOCK_M"]), batch * heads)
    attention_bwd_delta_kernel[grid](out, grad, delta, heads, n, dim, **block)
    arguments, flags = _arguments(q, k, v, window, sinks, causal)
    arguments = (*arguments, dim**-0.5)
    saved = (q, k, v, grad, lse, delta)
    attention_bwd_query_kernel[grid](*saved, grad_q, *arguments, **flags, **sizes)
    grid = (triton.cdiv(n, sizes["BLOCK_N"]), batch * k.shape[3])
    attention_bwd_key_kernel[grid](*saved, grad_k, grad_v, *arguments, **flags, **sizes)
    return grad_q, grad_k, grad_v
