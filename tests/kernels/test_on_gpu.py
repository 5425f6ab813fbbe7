"""Triton kernels on a GPU in the dtypes that train: error at most twice that of plain torch, by
name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from worldenv.config import SimulatorConfig
from worldenv.envs.libero.robot import embodiment
from worldenv.models.simulator import Simulator
from worldenv.ops import (
    FrameCache,
    action_loss,
    frame_attention,
    modulated_norm,
    norm_rotary,
    spatiotemporal_attention,
)
from worldenv.ops.action_loss import METRICS

pytestmark = pytest.mark.gpu


def compare(function, leaves: dict, dtype, weight):
    """backend=triton in `dtype` against the float64 reference, allowed twice the reference's
    own."""

    def run(backend, kind):
        inputs = {n: t.to(kind).requires_grad_() for n, t in leaves.items()}
        out = function(**inputs, backend=backend)
        (out * weight.to(out.dtype)).sum().backward()
        return {"out": out.detach(), **{n: t.grad for n, t in inputs.items()}}

    rounded = {n: t.to(dtype).double() for n, t in leaves.items()}
    leaves = rounded
    want, plain, got = (
        run("reference", torch.float64),
        run("reference", dtype),
        run("triton", dtype),
    )
    for name, value in want.items():
        allowed = 2 * (plain[name] - value).abs().max()
        allowed = allowed + 8 * torch.finfo(dtype).eps * value.abs().max()
        assert (got[name] - value).abs().max() <= allowed, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "kv_heads", "options"),
    [
        ((2, 5, 64, 4, 64), 2, {"window": 2, "sinks": 1}),
        ((1, 3, 63, 3, 128), 3, {}),
        ((1, 2, 1000, 1, 32), 1, {"window": 1}),
        ((1, 1, 1, 1, 64), 1, {}),
        ((1, 4, 100, 2, 96), 1, {"causal": False}),
    ],
)
def test_spatiotemporal_attention(shape, kv_heads, options, dtype):
    torch.manual_seed(0)
    b, f, s, h, d = shape
    heads = {"q": h, "k": kv_heads, "v": kv_heads}
    leaves = {n: torch.randn(b, f, s, x, d, device="cuda") for n, x in heads.items()}

    def attend(**x):
        return spatiotemporal_attention(**x, **options)

    compare(attend, leaves, dtype, torch.randn(shape, device="cuda"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_frame_attention_over_ragged_rows(dim, dtype):
    torch.manual_seed(0)
    cache = FrameCache(1, 3, 3, 65, 2, dim, sinks=1, dtype=dtype, device="cuda")
    rng = np.random.default_rng(1)
    for step in range(9):
        q = torch.randn(3, 65, 4, dim, device="cuda").to(dtype)
        k, v = torch.randn(2, 3, 65, 2, dim, device="cuda").to(dtype)
        got = frame_attention(q, k, v, cache, 0, backend="triton")
        want = frame_attention(q, k, v, cache, 0, backend="reference")
        bound = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(got, want, atol=bound, rtol=bound)
        cache.append(0, k, v)
        cache.advance(rng.random(3) < 0.7)
        if step == 6:
            cache.reset(np.array([False, True, False]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("shape", "modulation"), [((4, 33, 1536), (4, 1, 1536)), ((5, 7), (7,))])
def test_modulated_norm(shape, modulation, dtype):
    torch.manual_seed(0)
    shapes = {"x": shape, "shift": modulation, "scale": modulation}
    leaves = {n: torch.randn(s, device="cuda") for n, s in shapes.items()}
    compare(modulated_norm, leaves, dtype, torch.randn(shape, device="cuda"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("lead", "heads", "dim"), [((4, 33), 12, 128), ((2, 3000), 2, 32)])
def test_norm_rotary(lead, heads, dim, dtype):
    torch.manual_seed(0)
    angle = torch.randn(lead[1], dim // 2, device="cuda", dtype=torch.float64)
    rotary = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
    leaves = {
        "x": torch.randn(*lead, heads * dim, device="cuda"),
        "weight": torch.randn(heads * dim, device="cuda"),
    }

    def op(**x):
        return norm_rotary(**x, rotary=rotary)

    compare(op, leaves, dtype, torch.randn(*lead, heads, dim, device="cuda"))


@pytest.mark.parametrize("kind", ["laplace", "gaussian"])
def test_action_loss(kind):
    torch.manual_seed(0)
    shape = (300, 8, 7)
    leaves = {n: torch.randn(shape, device="cuda") * 0.5 for n in ("mu", "log_scale")}
    rows = {
        "action": torch.randn(shape, device="cuda"),
        "behaviour_logprob": torch.randn(shape[:2], device="cuda") - 9,
        "advantage": torch.randn(shape[0], device="cuda"),
        "mask": torch.rand(shape[:2], device="cuda") < 0.8,
        "reference_mu": torch.randn(shape, device="cuda"),
    }
    results = []
    for backend in ("triton", "reference"):
        inputs = {n: t.clone().requires_grad_() for n, t in leaves.items()}
        options = {"distribution": kind, "kl_weight": 0.1, "entropy_weight": 0.01}
        loss, metrics = action_loss(**inputs, **rows, **options, backend=backend)
        loss.backward()
        results.append(
            {
                "loss": loss,
                **dict(zip(METRICS, metrics, strict=True)),
                **{n: t.grad for n, t in inputs.items()},
            }
        )
    for name, want in results[1].items():
        torch.testing.assert_close(results[0][name], want, atol=1e-5, rtol=1e-4)


def test_token_loss():
    torch.manual_seed(0)
    logits = 3 * torch.randn(64, 8, 7, 256, device="cuda")
    rows = (
        torch.randint(256, (64, 8, 7), device="cuda"),
        torch.randn(64, 8, device="cuda") - 39,
        torch.randn(64, device="cuda"),
        torch.rand(64, 8, device="cuda") < 0.8,
    )
    options = {"reference_mu": torch.randn_like(logits), "kl_weight": 0.1, "entropy_weight": 0.01}
    results = []
    for backend in ("triton", "reference"):
        leaf = logits.clone().requires_grad_()
        loss, metrics = action_loss(
            leaf, None, *rows, **options, distribution="categorical", backend=backend
        )
        loss.backward()
        results.append(
            {"loss": loss, **dict(zip(METRICS, metrics, strict=True)), "grad": leaf.grad}
        )
    for name, want in results[1].items():
        torch.testing.assert_close(results[0][name], want, atol=1e-5, rtol=1e-4)


def test_a_step_is_captured_in_a_graph():
    """Attention and append read slots from the device: replaying after `advance` uses the new
    ones."""
    cache = FrameCache(1, 2, 3, 16, 2, 64, device="cuda")
    q, k, v = torch.randn(3, 2, 16, 2, 64, device="cuda")
    frame_attention(q, k, v, cache, 0)
    cache.append(0, k, v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = frame_attention(q, k, v, cache, 0)
        cache.append(0, k, v)
    for _ in range(5):
        want = frame_attention(q, k, v, cache, 0, backend="reference")
        graph.replay()
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-4)
        cache.advance()


@pytest.mark.parametrize(("precision", "close"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_a_captured_frame_is_the_eager_one(monkeypatch, precision, close):
    """The simulator's step as a graph, over ragged rows, a wrapped ring and a refilled row."""
    torch.manual_seed(0)
    config = SimulatorConfig(
        width=96, layers=2, heads=3, patch=8, window=2, frames=2, precision=precision
    )
    model = Simulator(config, embodiment(32)).cuda().eval()
    with torch.no_grad():  # zero-initialised layers would hide mistakes
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model = model.for_generation()
    image = torch.randint(0, 255, (3, 1, 2, 32, 32, 3), dtype=torch.uint8, device="cuda")
    proprio, first = torch.randn(3, 1, 8, device="cuda"), torch.zeros(3, 1, 8, 7, device="cuda")
    actions = torch.randn(6, 3, 8, 7, device="cuda")
    refill = np.array([False, True, False])

    def generate():
        state = model.start(3)
        model.prefill(state, ~np.zeros(3, bool), image, proprio, first, torch.arange(3).cuda())
        frames = []
        for i, action in enumerate(actions):
            if i == 4:
                seed = torch.tensor([9], device="cuda")
                model.prefill(state, refill, image[1:2], proprio[1:2], first[1:2], seed)
            model.step(state, action, 2, np.array([True, i != 1, i % 2 == 0]))
            frames.append(torch.cat((state.latents.flatten(1), state.proprio), 1))
        return torch.stack(frames), state

    got, state = generate()
    assert 2 in state.captured
    monkeypatch.setattr(FrameCache, "capturable", False)
    want, state = generate()
    assert not state.captured
    torch.testing.assert_close(got, want, atol=close, rtol=close)
