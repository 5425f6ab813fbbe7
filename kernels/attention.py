"""Spatiotemporal attention on a GPU: block-causal over frames with window and sinks; the backward
pass is in attention_backward.py.

Tokens of all frames form one sequence of N = F * S; token i belongs to frame i // S. A tile of
queries visits only the keys between its first visible and last visible frame, plus the sink frames,
so masked blocks are skipped rather than computed. Online softmax in base 2.

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
    tile, noisy, before, length = tl.program_id(0), HALVES, 0, n
    if HALVES == 2:
        noisy = tile // tl.cdiv(n, BLOCK)
        tile, before, length = tile % tl.cdiv(n, BLOCK), noisy.to(tl.int64) * n, 2 * n
    return tile * BLOCK, noisy, before, length


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
def _join(s, acc, top, total, scale, EMPTY: tl.constexpr):
    """Scores of a tile join a running softmax: their probabilities, and its state rescaled to the
    new maximum. EMPTY: a row may have seen nothing yet."""
    high = tl.maximum(top, tl.max(s, 1) * scale)
    base = high
    if EMPTY:
        base = tl.where(high == float("-inf"), 0.0, high)
    p = tl.exp2(s * scale - base[:, None])
    shrink = tl.exp2(top - base)
    return p, acc * shrink[:, None], high, total * shrink + tl.sum(p, 1)


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
    p, acc, top, total = _join(s, acc, top, total, scale, EDGE)
    v = _load_rows(v_base, at, lane, v_row, columns, stop, dim, EDGE, WHOLE)
    acc += tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return acc, top, total


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
    q, k, v, own_k, own_v, out, lse, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row,
    v_head, heads, groups, frames, tokens, dim, window, sinks, scale, HALVES: tl.constexpr,
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
