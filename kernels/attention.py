"""Spatiotemporal attention on a GPU: forward and backward, block-causal over frames with window and
sinks.

Tokens of all frames form one sequence of N = F * S; token i belongs to frame i // S. A tile of
queries visits only the keys between its first visible and last visible frame, plus the sink frames,
so masked blocks are skipped rather than computed. Online softmax in base 2; the backward pass
recomputes probabilities from the saved log-sum-exp.

Teacher forcing (HALVES 1: queries of the noisy frames; 2: of the clean frames, then of the noisy
ones) has keys of clean frames, `k`, and of as many noisy ones, `own_k`. A tile lies in one half.
Noisy frame f sees the clean frames that clean frame f would see under a window of one less, and of
the noisy ones itself alone: window 1, no sinks. So everything below knows one rule; programs apply
it once or twice.

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
History = tuple[Tensor, Tensor] | None


@triton.jit
def _load_rows(
    base, at, lane, stride, columns, limit, dim, EDGE: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """Rows at + lane of a [N, D] matrix; zero beyond `limit` (asked only at an EDGE) or beyond D
    (asked only where the tile is not the WHOLE of it)."""
    to = base + tl.full((), at, tl.int64) * stride + (lane[:, None] * stride + columns[None, :])
    rows = (at + lane < limit)[:, None]
    inside = columns[None, :] < dim
    if EDGE and not WHOLE:
        return tl.load(to, rows & inside, other=0.0)
    if EDGE:
        return tl.load(to, rows, other=0.0)
    if not WHOLE:
        return tl.load(to, inside, other=0.0)
    return tl.load(to)


@triton.jit
def _half(n, HALVES: tl.constexpr, BLOCK: tl.constexpr):
    """Of the queries of this program: the first within its half, whether that half is noisy, and
    how many stand before the half and in all."""
    if HALVES == 0:
        return tl.program_id(0) * BLOCK, 0, 0, n
    tiles = tl.cdiv(n, BLOCK)
    noisy = tl.program_id(0) // tiles + (2 - HALVES)
    return tl.program_id(0) % tiles * BLOCK, noisy, noisy * (HALVES - 1) * n, HALVES * n


@triton.jit
def _seen_by_queries(first, last, tokens, window, sinks, BLOCK_N: tl.constexpr):
    """Keys that queries [first, last] see: sinks [0, a), then [begin, end) in tiles of BLOCK_N, of
    which `lead` come before the `full` tiles that every query sees whole; `edges` in all others."""
    early, late = first // tokens, last // tokens
    begin = tl.maximum(early - window + 1, 0)
    a = tl.minimum(sinks, begin) * tokens
    everyone = tl.minimum(tl.maximum(late - window + 1, 0), early + 1)
    lead = tl.cdiv((everyone - begin) * tokens, BLOCK_N)
    full = tl.maximum((early + 1 - begin) * tokens // BLOCK_N - lead, 0)
    edges = tl.cdiv(a, BLOCK_N) + tl.cdiv((late + 1 - begin) * tokens, BLOCK_N) - full
    return a, begin * tokens, (late + 1) * tokens, lead, full, edges


@triton.jit
def _edge(t, a, begin, end, lead, full, BLOCK_N: tl.constexpr):
    """Edge tile t: where it begins, and where its keys end."""
    i = t - tl.cdiv(a, BLOCK_N)
    at = tl.where(i < 0, t, tl.where(i < lead, i, i + full)) * BLOCK_N
    return tl.where(i < 0, at, begin + at), tl.where(i < 0, a, end)


@triton.jit
def _sees(rows, keys, stop, tokens, window, sinks):
    """bool [M, N]: by row, the keys of its window and of the sinks; keys end at `stop`."""
    frame = rows // tokens
    before = (frame + 1) * tokens
    after = (frame - window + 1) * tokens
    near = (keys[None, :] >= after[:, None]) | (keys < sinks * tokens)[None, :]
    return near & (keys[None, :] < tl.minimum(before, stop)[:, None])


@triton.jit
def _softmax_tile(
    at, stop, acc, top, total, q, k_base, v_base, k_row, v_row, rows, columns, dim, tokens, window,
    sinks, scale, EDGE: tl.constexpr, WHOLE: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys [at, at + BLOCK_N) added to the running softmax of one query tile."""
    lane = tl.arange(0, BLOCK_N)
    k = _load_rows(k_base, at, lane, k_row, columns, stop, dim, EDGE, WHOLE)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if EDGE:
        s = tl.where(_sees(rows, at + lane, stop, tokens, window, sinks), s, float("-inf"))
    high = tl.maximum(top, tl.max(s, 1) * scale)
    base = high
    if EDGE:  # a row may have seen nothing yet
        base = tl.where(high == float("-inf"), 0.0, high)
    p = tl.exp2(s * scale - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    v = _load_rows(v_base, at, lane, v_row, columns, stop, dim, EDGE, WHOLE)
    acc = acc * shrink[:, None]
    acc += tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return acc, high, total


@triton.jit
def _softmax_tiles(
    times, acc, top, total, q, k_base, v_base, k_row, v_row, first, last, rows, columns, dim,
    tokens, window, sinks, scale, WHOLE: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """All keys that queries [first, last] see added to their running softmax, once or not."""
    a, begin, end, lead, full, edges = _seen_by_queries(first, last, tokens, window, sinks, BLOCK_N)
    for i in range(lead, lead + full * times):
        acc, top, total = _softmax_tile(
            begin + i * BLOCK_N, end, acc, top, total, q, k_base, v_base, k_row, v_row, rows,
            columns, dim, tokens, window, sinks, scale, False, WHOLE, BLOCK_N, PRECISION,
        )  # fmt: skip
    for t in range(edges * times):
        at, stop = _edge(t, a, begin, end, lead, full, BLOCK_N)
        acc, top, total = _softmax_tile(
            at, stop, acc, top, total, q, k_base, v_base, k_row, v_row, rows,
            columns, dim, tokens, window, sinks, scale, True, WHOLE, BLOCK_N, PRECISION,
        )  # fmt: skip
    return acc, top, total


@triton.jit
def attention_fwd_kernel(
    q, k, v, own_k, own_v, out, lse, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    heads, groups, frames, tokens, dim, window, sinks, scale, HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
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
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    last = tl.minimum(first + BLOCK_M, n) - 1
    acc, top, total = _softmax_tiles(
        1, acc, top, total, queries, k + k_at, v + v_at, k_row, v_row, first, last, rows, columns,
        dim, tokens, window - noisy, sinks, scale, WHOLE, BLOCK_N, PRECISION,
    )  # fmt: skip
    if HALVES != 0:
        acc, top, total = _softmax_tiles(
            noisy, acc, top, total, queries, own_k + k_at, own_v + v_at, k_row, v_row, first, last,
            rows, columns, dim, tokens, 1, 0, scale, WHOLE, BLOCK_N, PRECISION,
        )  # fmt: skip
    inside = (rows[:, None] < n) & (columns[None, :] < dim)
    to = out + ((b * length + before + rows[:, None]) * heads + h) * dim + columns[None, :]
    tl.store(to, (acc / total[:, None]).to(out.dtype.element_ty), inside)
    tl.store(lse + pair * length + before + rows, top + tl.log2(total), rows < n)


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
    times, acc_k, acc_v, k_tile, v_tile, q_base, g_base, lse, delta, q_row, g_row, first, last,
    keys, columns, dim, frames, tokens, window, sinks, scale, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All queries of one head that see keys [first, last], once or not."""
    frame, early, late = keys // tokens, first // tokens, last // tokens
    after, begin = frame * tokens, early * tokens
    before = tl.where(frame < sinks, frames, tl.minimum(frame + window, frames)) * tokens
    end = tl.where(early < sinks, frames, tl.minimum(late + window, frames)) * tokens
    everyone = tl.where(late < sinks, frames, tl.minimum(early + window, frames)) * tokens
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
                past, acc_k, acc_v, k_tile, v_tile, q_base, g_base, lse + head, delta + head, q_row,
                g_row, first, last, keys, columns, dim, frames, tokens, window, sinks, scale, WHOLE,
                BLOCK_M, PRECISION,
            )  # fmt: skip
            q_base, g_base, head = q_base + n * q_row, g_base + n * g_row, head + n
        acc_k, acc_v = _grad_key_tiles(
            1, acc_k, acc_v, k_tile, v_tile, q_base, g_base, lse + head, delta + head, q_row, g_row,
            first, last, keys, columns, dim, frames, tokens, reach, kept, scale, WHOLE, BLOCK_M,
            PRECISION,
        )  # fmt: skip
    inside = (keys[:, None] < n) & (columns[None, :] < dim)
    to = ((b * n + keys[:, None].to(tl.int64)) * kv_heads + kv) * dim + columns[None, :]
    tl.store(grad_k + to, (acc_k * plain_scale).to(grad_k.dtype.element_ty), inside)
    tl.store(grad_v + to, acc_v.to(grad_v.dtype.element_ty), inside)


def tiles(dim: int, dtype: torch.dtype, kernel: str, groups: int = 1) -> dict[str, int | bool]:
    """Tile sizes and launch options of a kernel: forward | query | key (the backward passes).
    `bench.compiled` shows what the compiler makes of them, and fails where registers spill."""
    block_d = max(16, triton.next_power_of_2(dim))
    wide = block_d > 64
    if block_d > 128:  # what fits into shared memory
        m, n = (16, 16) if dtype == torch.float32 else (32, 64) if kernel == "key" else (64, 32)
        warps, stages = 4 if dtype == torch.float32 else 8, 2
    elif dtype == torch.float32:
        m, n, warps, stages = (16, 32, 4, 2) if kernel == "key" else (32, 16 if wide else 32, 4, 2)
    elif kernel == "forward":
        m, n, warps, stages = 128, 64, 8 if wide else 4, 3
    elif kernel == "query":
        m, n, warps, stages = 64, 64, 4, 2
    else:
        m, n, warps, stages = (32, 128, 8, 2) if wide else (64 if groups == 1 else 32, 64, 4, 2)
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    return {"BLOCK_D": block_d, "WHOLE": block_d == dim, **sizes}


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, past: bool, window: int | None, sinks: int, causal: bool
) -> tuple:
    """Without causality all tokens are one frame, whose tokens see each other."""
    frames, tokens, heads, dim = k.shape[1], *q.shape[2:]
    if not causal:
        frames, tokens = 1, frames * tokens
    strides = [x.stride(axis) for x in (q, k, v) for axis in (0, 2, 3)]
    most = frames + past
    reach = most if window is None else min(window, most)
    sizes = (heads, heads // k.shape[3], frames, tokens, dim, reach, sinks)
    return *strides, *sizes, dim**-0.5 * LOG2E


def _precision(q: Tensor) -> str:
    return "ieee" if q.dtype == torch.float32 else "tf32"


def _one_row_stride(x: Tensor) -> Tensor:
    """Frames and tokens as one axis: needs stride(F) = S * stride(S) and contiguous D."""
    regular = x.stride(4) == 1 and x.stride(1) == x.shape[2] * x.stride(2)
    return x if regular else x.contiguous()


def _operands(q: Tensor, k: Tensor, v: Tensor, history: History) -> tuple[list[Tensor], int]:
    """q, then k and v of history and of the frames themselves, alike in strides; and HALVES."""
    q, k, v = (_one_row_stride(x) for x in (q, k, v))
    if history is None:
        return [q, k, v, k, v], 0
    pairs = []
    for pair in zip(history, (k, v), strict=True):
        alike = [_one_row_stride(x) for x in pair]
        if len({tuple(x.stride(axis) for axis in (0, 2, 3)) for x in alike}) > 1:
            alike = [x.contiguous() for x in alike]
        pairs.append(alike)
    (past_k, k), (past_v, v) = pairs
    return [q, past_k, past_v, k, v], q.shape[1] // k.shape[1]


def forward(
    q: Tensor, k: Tensor, v: Tensor, history: History, window: int | None, sinks: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """q [B,F,S,H,D], k, v [B,F,S,Hk,D] -> out like q, log-sum-exp [B,H,F*S] (base 2, float32).
    With a history (keys and values like k and v), q may have 2 F frames."""
    operands, halves = _operands(q, k, v, history)
    batch, frames, tokens, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, frames * tokens, dtype=torch.float32, device=q.device)
    sizes = tiles(dim, q.dtype, "forward")
    arguments = _arguments(*operands[:3], halves > 0, window, sinks, causal)
    flags = {"HALVES": halves, "PRECISION": _precision(q)}
    count = triton.cdiv(k.shape[1] * tokens, sizes["BLOCK_M"]) * max(halves, 1)
    attention_fwd_kernel[count, batch * heads](*operands, out, lse, *arguments, **flags, **sizes)
    return out, lse


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
    past = [x.new_empty(x.shape if into_history else 0) for x in (k, v)]
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
