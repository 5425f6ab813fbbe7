"""The ring cache and frame attention: every backend against full attention over the window."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from worldenv.ops import BackendUnavailable, FrameCache, frame_attention, spatiotemporal_attention
from worldenv.ops import backend as backends

needs_cpp = pytest.mark.skipif(backends.NO_CPP is not None, reason=str(backends.NO_CPP))
ISAS = {
    0: "portable",
    1: "avx2",
    2: "avx512",
    3: "avx512bf16",
    4: "amx",
    5: "avx512bf16 emulated",
}


def random_frames(batch, frames, tokens, heads, kv_heads, dim, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, frames, tokens, h, dim) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def slot_states(cache: FrameCache) -> list[torch.Tensor]:
    return [t.clone() for t in (*cache.k, *cache.v)]


@pytest.mark.parametrize(
    ("backend", "layout"),
    [
        ("reference", "plain"),
        ("sdpa", "plain"),
        pytest.param("cpp", "packed", marks=needs_cpp),
        pytest.param("sdpa", "packed", marks=needs_cpp),
    ],
)
@pytest.mark.parametrize(("window", "sinks"), [(4, 2), (3, 0), (20, 0)])
def test_ragged_generation_equals_windowed_attention(backend, layout, window, sinks):
    """Rows advance, stall and restart at their own times, beyond wrap-around."""
    batch, frames, tokens, heads, kv_heads, dim = 3, 12, 5, 4, 2, 32
    q, k, v = random_frames(batch, frames, tokens, heads, kv_heads, dim)
    full = spatiotemporal_attention(q, k, v, window=window, sinks=sinks, backend="reference")
    cache = FrameCache(
        2, batch, window - 1 + sinks, tokens, kv_heads, dim, sinks=sinks, layout=layout
    )
    rng = np.random.default_rng(0)
    row = torch.arange(batch)
    for _ in range(40):
        at = torch.from_numpy(cache.positions.copy())
        now = [x[row, at] for x in (q, k, v)]
        out = frame_attention(*now, cache, 1, backend=backend)
        torch.testing.assert_close(out, full[row, at], atol=2e-6, rtol=1e-5)
        cache.append(1, now[1], now[2])
        cache.advance(rng.random(batch) < 0.7)
        cache.reset((cache.positions >= frames) | (rng.random(batch) < 0.05))


@needs_cpp
@pytest.mark.parametrize("isa", ISAS, ids=ISAS.values())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loud", [1.0, 8.0, 64.0])
def test_every_instruction_set_is_as_accurate_as_torch(isa, dtype, loud):
    """Awkward shapes; `loud` scores take the running-maximum path. Error <= 2x torch's own."""
    best = torch.ops.worldenv.best_isa()
    if (2 if isa == 5 else isa) > best:
        pytest.skip(f"this CPU has no {ISAS[isa]}")
    shapes = [(64, 2, 64, 3), (63, 2, 32, 2), (1, 3, 128, 0), (97, 1, 48, 1), (5, 1, 7, 2)]
    for tokens, heads, dim, past in (*shapes, (1000, 1, 64, 1)):
        q, k, v = random_frames(1, past + 1, tokens, heads, heads, dim, dtype, seed=tokens)
        q = q * loud
        cache = FrameCache(1, 1, max(past, 1), tokens, heads, dim, dtype=dtype, layout="packed")
        for f in range(past):
            cache.append(0, k[:, f], v[:, f])
            cache.advance()
        last = [x[:, past] for x in (q, k, v)]
        tensors = (cache.k[0], cache.v[0], cache.table, cache.cached)
        out = torch.ops.worldenv.frame_attention(*last, *tensors, isa)
        keys, values = (x.flatten(1, 2).transpose(1, 2) for x in (k, v))
        query = last[0].transpose(1, 2)
        attend = torch.nn.functional.scaled_dot_product_attention
        exact = attend(*(x.double() for x in (query, keys, values))).transpose(1, 2)
        plain = attend(query, keys, values).transpose(1, 2)
        allowed = 2 * (plain.double() - exact).abs().max() + 2 * torch.finfo(dtype).eps
        assert (out.double() - exact).abs().max() <= allowed, (tokens, heads, dim, past)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spoiled", ["q", "k", "v"])
def test_infinities_are_the_same_on_tiles_and_on_vectors(spoiled, dtype):
    """inf - inf, of which AMX would make NaN when it splits a float, must not reach a result."""
    if torch.ops.worldenv.best_isa() < 4:
        pytest.skip("this CPU has no AMX")
    frames = dict(zip("qkv", random_frames(1, 2, 64, 2, 2, 32, dtype), strict=True))
    frames[spoiled][0, :, 5, 0, 3] = -torch.inf
    q, k, v = frames.values()
    cache = FrameCache(1, 1, 1, 64, 2, 32, dtype=dtype, layout="packed")
    cache.append(0, k[:, 0], v[:, 0])
    cache.advance()
    inputs = (q[:, 1], k[:, 1], v[:, 1], cache.k[0], cache.v[0], cache.table, cache.cached)
    vectors, tiles = (torch.ops.worldenv.frame_attention(*inputs, isa) for isa in (3, 4))
    assert tiles[:, :, 1].isfinite().all()  # the other head
    if spoiled == "v":  # a weight is never quite 0 here
        assert (tiles[:, :, 0, 3] == -torch.inf).all()
    close = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(tiles, vectors, equal_nan=True, atol=close, rtol=close)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_cache_gathers_what_was_appended(dtype):
    _, k, v = random_frames(2, 3, 7, 1, 3, 10, dtype)
    cache = FrameCache(1, 2, 2, 7, 3, 10, dtype=dtype, layout="packed")
    for f in range(3):
        cache.append(0, k[:, f], v[:, f])
        cache.advance(np.array([True, f != 1]))
    got_k, got_v, valid = cache.gather(0)
    assert valid.all()
    torch.testing.assert_close(got_k[0], k[0, 1:], atol=0, rtol=0)
    torch.testing.assert_close(got_v[1], v[1, [0, 2]], atol=0, rtol=0)


@pytest.mark.parametrize("layout", ["plain", pytest.param("packed", marks=needs_cpp)])
def test_writing_one_row_leaves_the_others_untouched(layout):
    cache = FrameCache(1, 3, 2, 4, 2, 16, layout=layout)
    for f in range(4):
        frame = torch.full((3, 4, 2, 16), float(f + 1))
        cache.append(0, frame, frame)
        cache.advance(np.array([True, f < 1, False]))
    cache.reset(np.array([False, False, True]))
    assert cache.positions.tolist() == [4, 1, 0]
    assert cache.lengths.tolist() == [2, 1, 0]
    k, _, valid = cache.gather(0)
    assert valid.tolist() == [[True, True], [True, False], [False, False]]
    assert k[0, :, 0, 0, 0].tolist() == [3.0, 4.0]
    assert k[1, 0, 0, 0, 0].item() == 1.0


@pytest.mark.parametrize("layout", ["plain", pytest.param("packed", marks=needs_cpp)])
def test_stale_slots_never_leak(layout):
    """Slots beyond a row's length may hold NaN, as after a reset of a row that diverged."""
    cache = FrameCache(1, 2, 3, 4, 1, 16, layout=layout)
    for t in (*cache.k, *cache.v):
        t.fill_(float("nan"))
    q, k, v = (x[:, 0] for x in random_frames(2, 1, 4, 1, 1, 16))
    backend = "cpp" if layout == "packed" else "reference"
    out = frame_attention(q, k, v, cache, 0, backend=backend)
    assert torch.isfinite(out).all()
    bad = k.clone()
    bad[0, 0, 0, 0] = float("nan")
    out = frame_attention(q, bad, v, cache, 0, backend=backend)
    assert out[0].isnan().all()
    assert torch.isfinite(out[1]).all()


def test_grad_needs_the_reference():
    q, k, v = (x[:, 0].requires_grad_() for x in random_frames(1, 1, 4, 1, 1, 16))
    cache = FrameCache(1, 1, 2, 4, 1, 16)
    with pytest.raises(BackendUnavailable, match="no gradient"):
        frame_attention(q, k, v, cache, 0, backend="sdpa")
    frame_attention(q, k, v, cache, 0).sum().backward()
    assert v.grad is not None


def test_empty_batch_and_bad_arguments():
    empty = FrameCache(1, 0, 2, 4, 1, 16)
    none = torch.zeros(0, 4, 1, 16)
    empty.append(0, none, none)
    empty.advance()
    assert frame_attention(none, none, none, empty, 0).shape == (0, 4, 1, 16)

    cache = FrameCache(1, 1, 2, 4, 1, 16)
    x = torch.zeros(1, 4, 1, 16)
    with pytest.raises(ValueError, match=r"k must be \[B,S,H,D\]"):
        cache.append(0, x[:, :3], x[:, :3])
    with pytest.raises(ValueError, match="layer"):
        cache.append(1, x, x)
    with pytest.raises(TypeError, match="v must have the dtype of k"):
        cache.append(0, x, x.double())
    with pytest.raises(ValueError, match="mask must be bool"):
        cache.advance(np.ones(2, dtype=bool))
    with pytest.raises(ValueError, match="q must be"):
        frame_attention(x[:, :2], x, x, cache, 0)
    with pytest.raises(ValueError, match="sinks"):
        FrameCache(1, 1, 2, 4, 1, 16, sinks=3)
    with pytest.raises(ValueError, match="backend must be one of"):
        frame_attention(x, x, x, cache, 0, backend="flash_attn")


@needs_cpp
def test_strided_inputs_and_opcheck():
    """Queries, keys and values as views of one projection, as the model calls it."""
    qkv = torch.randn(2, 8, 3, 2, 32)
    q, k, v = qkv.unbind(2)
    cache = FrameCache(1, 2, 2, 8, 2, 32, layout="packed")
    cache.append(0, k, v)
    cache.advance()
    torch.testing.assert_close(
        frame_attention(q, k, v, cache, 0, backend="cpp"),
        frame_attention(q.clone(), k.clone(), v.clone(), cache, 0, backend="reference"),
        atol=2e-6,
        rtol=1e-5,
    )
    state = (cache.k[0], cache.v[0])
    index = (cache.table, cache.cached)
    torch.library.opcheck(torch.ops.worldenv.frame_attention.default, (q, k, v, *state, *index))
    torch.library.opcheck(torch.ops.worldenv.frame_cache_append.default, (*state, k, v, *index))


@needs_cpp
def test_kernel_refuses_what_would_read_out_of_bounds():
    cache = FrameCache(1, 1, 2, 4, 1, 16, layout="packed")
    x = torch.zeros(1, 4, 1, 16)
    tensors = (x, x, x, cache.k[0], cache.v[0])
    attend = torch.ops.worldenv.frame_attention
    with pytest.raises(RuntimeError, match="lies outside"):
        attend(*tensors, cache.table, torch.tensor([3], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="is no slot"):
        attend(*tensors, cache.table + 9, cache.cached)
    with pytest.raises(RuntimeError, match="must hold"):
        attend(x, x, x, cache.k[0][:, :, :1], cache.v[0], cache.table, cache.cached)
    with pytest.raises(RuntimeError, match="cannot run on this CPU"):
        attend(*tensors, cache.table, cache.cached, 9)


@needs_cpp
def test_compiles_in_one_graph():
    cache = FrameCache(1, 1, 2, 4, 1, 16, layout="packed")
    q, k, v = (x[:, 0] for x in random_frames(1, 1, 4, 1, 1, 16))

    def step(q, k, v):
        return frame_attention(q, k, v, cache, 0) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(q, k, v), step(q, k, v))
