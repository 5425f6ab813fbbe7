"""Backward pass of attention.py: recomputes probabilities from the saved log-sum-exp."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from worldenv.kernels.attention import (
    History,
    _arguments,
    _edge,
    _half,
    _load_rows,
    _operands,
    _precision,
    _seen_by_queries,
    _sees,
    tiles,
)


@triton.jit
def attention_bwd_delta_kernel(
    out, grad, delta, heads, n, dim, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(out * grad), one number per query and head."""
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // heads, pair % heads
    first = tl.program_id(0) * BLOCK_M
    lane = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    base = (b * n * heads + h) * dim
    row = heads * dim
    o = _load_rows(out + base, first, lane, row, columns, n, dim, True, WHOLE).to(tl.float32)
    g = _load_rows(grad + base, first, lane, row, columns, n, dim, True, WHOLE).to(tl.float32)
    tl.store(delta + pair * n + first + lane, tl.sum(o * g, 1), first + lane < n)


@triton.jit
def _grad_query_tile(
    at, stop, acc, q, g, lse, delta, k_base, v_base, k_row, v_row, rows, columns, dim, tokens,
    window, sinks, scale, EDGE: tl.constexpr, WHOLE: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK_N)
    k = _load_rows(k_base, at, lane, k_row, columns, stop, dim, EDGE, WHOLE)
    v = _load_rows(v_base, at, lane, v_row, columns, stop, dim, EDGE, WHOLE)
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])
    if EDGE:
        p = tl.where(_sees(rows, at + lane, stop, tokens, window, sinks), p, 0.0)
    slope = p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return acc + tl.dot(slope.to(k.dtype), k, input_precision=PRECISION)


@triton.jit
def _grad_query_tiles(
    times, acc, q, g, lse, delta, k_base, v_base, k_row, v_row, first, last, rows, columns, dim,
    tokens, window, sinks, scale, WHOLE: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    a, begin, end, lead, full, edges = _seen_by_queries(first, last, tokens, window, sinks, BLOCK_N)
    for i in range(lead, lead + full * times):
        acc = _grad_query_tile(
            begin + i * BLOCK_N, end, acc, q, g, lse, delta, k_base, v_base, k_row, v_row, rows,
            columns, dim, tokens, window, sinks, scale, False, WHOLE, BLOCK_N, PRECISION,
        )  # fmt: skip
    for t in range(edges * times):
        at, stop = _edge(t, a, begin, end, lead, full, BLOCK_N)
        acc = _grad_query_tile(
            at, stop, acc, q, g, lse, delta, k_base, v_base, k_row, v_row, rows, columns, dim,
            tokens, window, sinks, scale, True, WHOLE, BLOCK_N, PRECISION,
        )  # fmt: skip
    return acc


@triton.jit
def attention_bwd_query_kernel(
    q, k, v, own_k, own_v, grad, lse, delta, grad_q, q_batch, q_row, q_head, k_batch, k_row, k_head,
    v_batch, v_row, v_head, heads, groups, frames, tokens, dim, window, sinks, scale, plain_scale,
    HALVES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // heads, pair % heads
    n = frames * tokens
    first, noisy, before, length = _half(n, HALVES, BLOCK_M)
    lane = tl.arange(0, BLOCK_M)
    rows = first + lane
    columns = tl.arange(0, BLOCK_D)
    k_at = b * k_batch + (h // groups) * k_head
    v_at = b * v_batch + (h // groups) * v_head
    q_base = q + b * q_batch + h * q_head + before * q_row
    queries = _load_rows(q_base, first, lane, q_row, columns, n, dim, True, WHOLE)
    base = ((b * length + before) * heads + h) * dim
    g = _load_rows(grad + base, first, lane, heads * dim, columns, n, dim, True, WHOLE)
    row_lse = tl.load(lse + pair * length + before + rows, rows < n, other=0.0)
    row_delta = tl.load(delta + pair * length + before + rows, rows < n, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    last = tl.minimum(first + BLOCK_M, n) - 1
    acc = _grad_query_tiles(
        1, acc, queries, g, row_lse, row_delta, k + k_at, v + v_at, k_row, v_row, first, last, rows,
        columns, dim, tokens, window - noisy, sinks, scale, WHOLE, BLOCK_N, PRECISION,
    )  # fmt: skip
    if HALVES != 0:
        acc = _grad_query_tiles(
            noisy, acc, queries, g, row_lse, row_delta, own_k + k_at, own_v + v_at, k_row, v_row,
            first, last, rows, columns, dim, tokens, 1, 0, scale, WHOLE, BLOCK_N, PRECISION,
        )  # fmt: skip
    inside = (rows[:, None] < n) & (columns[None, :] < dim)
    to = grad_q + base + rows[:, None].to(tl.int64) * heads * dim + columns[None, :]
    tl.store(to, (acc * plain_scale).to(grad_q.dtype.element_ty), inside)


@triton.jit
def _grad_key_tile(
    at, end, acc_k, acc_v, k_tile, v_tile, q_base, g_base, lse, delta, q_row, g_row, columns, dim,
    after, before, scale, EDGE: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries [at, at + BLOCK_M); scores are kept as [keys, queries], so that the probabilities
    go from the registers into their product. Key j is seen by queries [after[j], before[j])."""
    lane = tl.arange(0, BLOCK_M)
    rows = at + lane
    queries = _load_rows(q_base, at, lane, q_row, columns, end, dim, EDGE, WHOLE)
    g = _load_rows(g_base, at, lane, g_row, columns, end, dim, EDGE, WHOLE)
    if EDGE:
        row_lse = tl.load(lse + rows, rows < end, other=0.0)
        row_delta = tl.load(delta + rows, rows < end, other=0.0)
    else:
        row_lse = tl.load(lse + rows)
        row_delta = tl.load(delta + rows)
    s = tl.dot(k_tile, tl.trans(queries), input_precision=PRECISION)
    p = tl.exp2(s * scale - row_lse[None, :])
    if EDGE:
        seen = (rows[None, :] >= after[:, None]) & (rows[None, :] < before[:, None])
        p = tl.where(seen, p, 0.0)
    acc_v += tl.dot(p.to(g.dtype), g, input_precision=PRECISION)
    slope = p * (tl.dot(v_tile, tl.trans(g), input_precision=PRECISION) - row_delta[None, :])
    acc_k += tl.dot(slope.to(queries.dtype), queries, input_precision=PRECISION)
    return acc_k, acc_v


@triton.jit
def _grad_key_tiles(
    times, ahead, acc_k, acc_v, k_tile, v_tile, q_base, g_base, lse, delta, q_row, g_row, first,
    last, keys, columns, dim, frames, tokens, window, sinks, scale, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All queries of one head that see keys [first, last], once or not; `ahead` of their first
    frame are others."""
    frame, early, late = keys // tokens, first // tokens, last // tokens
    after, begin = ahead + frame * tokens, ahead + early * tokens
    before = tl.where(frame < sinks, frames, tl.minimum(frame + window, frames)) * tokens + ahead
    end = tl.where(early < sinks, frames, tl.minimum(late + window, frames)) * tokens + ahead
    everyone = tl.where(late < sinks, frames, tl.minimum(early + window, frames)) * tokens + ahead
    lead = tl.cdiv((late - early) * tokens, BLOCK_M)
    full = tl.maximum((everyone - begin) // BLOCK_M - lead, 0)
    edges = tl.cdiv(end - begin, BLOCK_M) - full
    for i in range(lead, lead + full * times):
        acc_k, acc_v = _grad_key_tile(
            begin + i * BLOCK_M, end, acc_k, acc_v, k_tile, v_tile, q_base, g_base, lse, delta,
            q_row, g_row, columns, dim, after, before, scale, False, WHOLE, BLOCK_M, PRECISION,
        )  # fmt: skip
    for i in range(edges * times):
        acc_k, acc_v = _grad_key_tile(
            begin + tl.where(i < lead, i, i + full) * BLOCK_M, end, acc_k, acc_v, k_tile, v_tile,
            q_base, g_base, lse, delta, q_row, g_row, columns, dim, after, before, scale, True,
            WHOLE, BLOCK_M, PRECISION,
        )  # fmt: skip
    return acc_k, acc_v


@triton.jit
def attention_bwd_key_kernel(
    q, k, v, own_k, own_v, grad, lse, delta, grad_k, grad_v, grad_own_k, grad_own_v, q_batch, q_row,
    q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, heads, groups, frames, tokens, dim,
    window, sinks, scale, plain_scale, HALVES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values, those of noisy frames first; visits the queries of every head in
    its group that can see it."""
    kv_heads = heads // groups
    pair = tl.program_id(1).to(tl.int64)
    b, kv = pair // kv_heads, pair % kv_heads
    n = frames * tokens
    first, reach, kept, length = tl.program_id(0) * BLOCK_N, window, sinks, n
    if HALVES != 0:
        past = tl.program_id(0) // tl.cdiv(n, BLOCK_N)
        first, length = tl.program_id(0) % tl.cdiv(n, BLOCK_N) * BLOCK_N, HALVES * n
        reach, kept = tl.where(past == 1, window - 1, 1), past * sinks
        k, v = tl.where(past == 1, k, own_k), tl.where(past == 1, v, own_v)
        grad_k = tl.where(past == 1, grad_k, grad_own_k)
        grad_v = tl.where(past == 1, grad_v, grad_own_v)
    last = tl.minimum(first + BLOCK_N, n) - 1
    lane = tl.arange(0, BLOCK_N)
    keys = first + lane
    columns = tl.arange(0, BLOCK_D)
    k_base = k + b * k_batch + kv * k_head
    v_base = v + b * v_batch + kv * v_head
    k_tile = _load_rows(k_base, first, lane, k_row, columns, n, dim, True, WHOLE)
    v_tile = _load_rows(v_base, first, lane, v_row, columns, n, dim, True, WHOLE)
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    g_row = heads * dim
    for h in range(kv * groups, kv * groups + groups):
        q_base = q + b * q_batch + h * q_head
        g_base = grad + (b * length * heads + h) * dim
        head = (b * heads + h) * length
        if HALVES == 2:
            acc_k, acc_v = _grad_key_tiles(
                past, 0, acc_k, acc_v, k_tile, v_tile, q_base, g_base, lse + head, delta + head,
                q_row, g_row, first, last, keys, columns, dim, frames, tokens, window, sinks, scale,
                WHOLE, BLOCK_M, PRECISION,
            )  # fmt: skip
        acc_k, acc_v = _grad_key_tiles(
            1, length - n, acc_k, acc_v, k_tile, v_tile, q_base, g_base, lse + head, delta + head,
            q_row, g_row, first, last, keys, columns, dim, frames, tokens, reach, kept, scale,
            WHOLE, BLOCK_M, PRECISION,
        )  # fmt: skip
    inside = (keys[:, None] < n) & (columns[None, :] < dim)
    to = ((b * n + keys[:, None].to(tl.int64)) * kv_heads + kv) * dim + columns[None, :]
    tl.store(grad_k + to, (acc_k * plain_scale).to(grad_k.dtype.element_ty), inside)
    tl.store(grad_v + to, acc_v.to(grad_v.dtype.element_ty), inside)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, history: History, out: Tensor, lse: Tensor,
    window: int | None, sinks: int, causal: bool, into_history: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v, then of the history (empty unless `into_history`: that costs nothing
    then), contiguous, in their dtypes."""
    operands, halves = _operands(q, k, v, history)
    grad = grad.contiguous()
    batch, frames, tokens, heads, dim = q.shape
    n, per_half = frames * tokens, k.shape[1] * tokens
    delta = torch.empty_like(lse)
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    own = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v)]
    shape = k.shape if into_history else (0,)
    past = [torch.empty(shape, dtype=x.dtype, device=x.device) for x in (k, v)]
    sizes = tiles(dim, q.dtype, "query")
    rows = {name: sizes[name] for name in ("BLOCK_M", "BLOCK_D", "WHOLE")}
    grid = (triton.cdiv(n, sizes["BLOCK_M"]), batch * heads)
    attention_bwd_delta_kernel[grid](out, grad, delta, heads, n, dim, **rows)
    arguments = (*_arguments(*operands[:3], halves > 0, window, sinks, causal), dim**-0.5)
    saved, flags = (*operands, grad, lse, delta), {"HALVES": halves, "PRECISION": _precision(q)}
    grid = (triton.cdiv(per_half, sizes["BLOCK_M"]) * max(halves, 1), batch * heads)
    attention_bwd_query_kernel[grid](*saved, grad_q, *arguments, **flags, **sizes)
    sizes = tiles(dim, q.dtype, "key", heads // k.shape[3])
    grid = (triton.cdiv(per_half, sizes["BLOCK_N"]) * (1 + into_history), batch * k.shape[3])
    of_keys = (*past, *own) if halves else (*own, *own)
    attention_bwd_key_kernel[grid](*saved, *of_keys, *arguments, **flags, **sizes)
    return grad_q, *own, *past
