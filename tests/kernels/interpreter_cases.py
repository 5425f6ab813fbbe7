"""Triton kernels in the interpreter; run by test_triton_interpreter.py in a process of its own.

float32 only: the interpreter is silently wrong in bf16. Outputs of torch.empty are poisoned with
NaN.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from worldenv.kernels import attention, attention_backward
from worldenv.ops import (
    FrameCache,
    action_loss,
    frame_attention,
    modulated_norm,
    norm_rotary,
    spatiotemporal_attention,
)
from worldenv.ops import backend as backends
from worldenv.ops.action_loss import METRICS
from worldenv.ops.attention import frame_mask

assert backends.INTERPRETED, "run through test_triton_interpreter.py"


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Whatever a kernel leaves unwritten reads as NaN."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(t):
        return t.fill_(float("nan")) if t.is_floating_point() else t

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


def compare(function, leaves: dict, weight):
    """Value and gradients by name of backend=triton against backend=reference."""
    results = []
    for backend in ("triton", "reference"):
        inputs = {n: t.detach().clone().requires_grad_() for n, t in leaves.items()}
        out = function(**inputs, backend=backend)
        (out * weight).sum().backward()
        results.append({"out": out.detach(), **{n: t.grad for n, t in inputs.items()}})
    for name, want in results[1].items():
        torch.testing.assert_close(
            results[0][name], want, atol=3e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("shape", "kv_heads", "options"),
    [
        ((1, 5, 7, 2, 32), 1, {"window": 2, "sinks": 1}),
        ((2, 1, 1, 1, 64), 1, {}),
        ((1, 2, 63, 1, 32), 1, {}),
        ((1, 3, 40, 3, 24), 3, {"window": 1}),
        ((1, 6, 20, 1, 16), 1, {"window": 2, "sinks": 2}),
        ((1, 2, 20, 2, 128), 2, {"causal": False}),
    ],
)
def test_spatiotemporal_attention(shape, kv_heads, options):
    torch.manual_seed(0)
    b, f, s, h, d = shape
    leaves = {
        n: torch.randn(b, f, s, heads, d)
        for n, heads in zip("qkv", (h, kv_heads, kv_heads), strict=True)
    }

    def attend(**x):
        return spatiotemporal_attention(**x, **options)

    compare(attend, leaves, torch.randn(shape))


def teacher_forced(q, k, v, past_k, past_v, **options):
    return spatiotemporal_attention(q, k, v, history=(past_k, past_v), **options)


def teacher_forcing_leaves(shape, kv_heads, halves):
    torch.manual_seed(0)
    b, f, s, h, d = shape
    names = ("k", "v", "past_k", "past_v")
    q = torch.randn(b, f * halves, s, h, d)
    return {"q": q, **{n: torch.randn(b, f, s, kv_heads, d) for n in names}}


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize(
    ("shape", "kv_heads", "options"),
    [
        ((1, 5, 7, 2, 32), 1, {"window": 2, "sinks": 1}),
        ((2, 1, 1, 1, 64), 1, {}),
        ((1, 2, 33, 1, 32), 1, {"window": 2}),
        ((1, 2, 5, 3, 24), 3, {"window": 1}),
        ((1, 5, 9, 1, 16), 1, {"window": 3, "sinks": 2}),
        ((1, 2, 17, 1, 128), 1, {"window": 9}),
    ],
)
def test_teacher_forcing(shape, kv_heads, options, halves):
    leaves = teacher_forcing_leaves(shape, kv_heads, halves)

    def attend(**x):
        return teacher_forced(**x, **options)

    compare(attend, leaves, torch.randn(leaves["q"].shape))


def test_teacher_forcing_with_a_constant_history():
    leaves = teacher_forcing_leaves((1, 3, 7, 2, 32), 1, 1)
    past = {n: leaves.pop(n) for n in ("past_k", "past_v")}
    weight = torch.randn(leaves["q"].shape)
    compare(lambda **x: teacher_forced(**x, **past, window=3), leaves, weight)


@pytest.mark.parametrize("halves", [0, 1, 2])
@pytest.mark.parametrize(("window", "sinks"), [(2, 1), (None, 0)])
def test_masked_tiles_are_not_visited(monkeypatch, window, sinks, halves):
    """With frames of whole tiles, exactly those are visited of which something is seen; and a
    history that needs no gradient gets none."""
    visited = {}

    def count(module, name):
        tile = getattr(module, name)

        def counted(*args):
            visited[name] = visited.get(name, 0) + 1
            return tile(*args)

        monkeypatch.setattr(module, name, counted)

    count(attention, "_softmax_tile")
    count(attention_backward, "_grad_query_tile")
    count(attention_backward, "_grad_key_tile")
    frames, tokens, dim = 4, 32, 16
    leaves = teacher_forcing_leaves((1, frames, tokens, 1, dim), 1, max(halves, 1))
    past = [leaves.pop("past_k"), leaves.pop("past_v")]
    leaves = [x.requires_grad_() for x in leaves.values()]
    seen = frame_mask(frames, window, sinks, True, halves)

    def tiles_seen(kernel, frames_seen):
        sizes = attention.tiles(dim, torch.float32, kernel)
        return int(frames_seen.sum()) * tokens**2 // (sizes["BLOCK_M"] * sizes["BLOCK_N"])

    def run():
        visited.clear()
        options = {"history": tuple(past) if halves else None, "window": window, "sinks": sinks}
        spatiotemporal_attention(*leaves, **options, backend="triton").sum().backward()

    run()
    own = seen[:, frames:] if halves else seen
    assert visited == {
        "_softmax_tile": tiles_seen("forward", seen),
        "_grad_query_tile": tiles_seen("query", seen),
        "_grad_key_tile": tiles_seen("key", own),
    }
    if halves:
        past[0].requires_grad_()
        run()
        assert visited["_grad_key_tile"] == tiles_seen("key", seen)


def test_attention_takes_views_of_one_projection():
    qkv = torch.randn(1, 4, 5, 3, 2, 32)
    q, k, v = qkv.unbind(3)
    got = spatiotemporal_attention(q, k, v, backend="triton")
    torch.testing.assert_close(got, spatiotemporal_attention(q, k, v), atol=1e-5, rtol=1e-4)
    (past_k, k), (past_v, v) = k.chunk(2, 1), v.chunk(2, 1)
    for kept in (past_k, past_k.contiguous()):  # strides of k, and others
        got = teacher_forced(q, k, v, kept, past_v, backend="triton")
        want = teacher_forced(q, k, v, kept, past_v, backend="reference")
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim"), [(5, 2, 1, 32), (33, 1, 1, 24), (1, 1, 1, 64)]
)
def test_frame_attention_over_ragged_rows(tokens, heads, kv_heads, dim):
    torch.manual_seed(0)
    cache = FrameCache(1, 3, 3, tokens, kv_heads, dim, sinks=1, layout="plain")
    rng = np.random.default_rng(1)
    for step in range(9):
        q = torch.randn(3, tokens, heads, dim)
        k, v = torch.randn(2, 3, tokens, kv_heads, dim)
        got = frame_attention(q, k, v, cache, 0, backend="triton")
        want = frame_attention(q, k, v, cache, 0, backend="reference")
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
        cache.append(0, k, v)
        cache.advance(rng.random(3) < 0.7)
        if step == 6:
            cache.reset(np.array([False, True, False]))


@pytest.mark.parametrize(
    ("shape", "modulation"),
    [
        ((2, 3, 5, 33), (2, 3, 1, 33)),
        ((1, 7), (7,)),
        ((2, 5, 16), (2, 1, 16)),
        ((2, 3, 8), (1, 3, 1)),
    ],
)
def test_modulated_norm(shape, modulation):
    torch.manual_seed(0)
    leaves = {
        "x": torch.randn(shape),
        "shift": torch.randn(modulation),
        "scale": torch.randn(modulation),
    }
    compare(modulated_norm, leaves, torch.randn(shape))


@pytest.mark.parametrize(
    ("lead", "heads", "dim"), [((2, 3, 5), 3, 16), ((1, 1), 1, 2), ((3, 7), 2, 6)]
)
def test_norm_rotary(lead, heads, dim):
    torch.manual_seed(0)
    angle = torch.randn(*lead, dim // 2)
    rotary = torch.polar(torch.ones_like(angle), angle)
    leaves = {"x": torch.randn(*lead, heads * dim), "weight": torch.randn(heads * dim)}

    def op(**x):
        return norm_rotary(**x, rotary=rotary)

    compare(op, leaves, torch.randn(*lead, heads, dim))
    qkv = torch.randn(*lead, 3 * heads * dim)  # a slice of a projection, rows apart
    k = qkv.chunk(3, -1)[1]
    for turns in (rotary, rotary[0]):
        got = norm_rotary(k, leaves["weight"], turns, backend="triton")
        want = norm_rotary(k, leaves["weight"], turns, backend="reference")
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["laplace", "gaussian"])
@pytest.mark.parametrize("reference", [None, "mu", "scale"])
@pytest.mark.parametrize("shape", [(9, 8, 7), (1, 1, 1)])
def test_action_loss(kind, reference, shape):
    torch.manual_seed(0)
    arguments = {n: torch.randn(shape) * 0.5 for n in ("mu", "log_scale", "action")}
    arguments |= {
        "behaviour_logprob": torch.randn(shape[:2]) - 5,
        "advantage": torch.randn(shape[0]),
        "mask": torch.rand(shape[:2]) < 0.8,
    }
    options = {"distribution": kind, "entropy_weight": 0.01}
    if reference:
        options |= {"reference_mu": torch.randn(shape), "kl_weight": 0.1}
    if reference == "scale":
        options["reference_log_scale"] = torch.randn(shape)
    arguments["action"][~arguments["mask"]] = float("nan")
    results = []
    for backend in ("triton", "reference"):
        leaves = {n: arguments[n].clone().requires_grad_() for n in ("mu", "log_scale")}
        loss, metrics = action_loss(**{**arguments, **leaves}, **options, backend=backend)
        (2 * loss).backward()
        results.append(
            {
                "loss": loss.detach(),
                **dict(zip(METRICS, metrics, strict=True)),
                **{n: t.grad for n, t in leaves.items()},
            }
        )
    for name, want in results[1].items():
        torch.testing.assert_close(
            results[0][name], want, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("shape", [(5, 3, 7, 33), (1, 1, 1, 1), (2, 1, 2, 1500)])
def test_token_loss(reference, shape):
    torch.manual_seed(0)
    logits = 3 * torch.randn(shape)
    action = torch.randint(shape[-1], shape[:3])
    mask = torch.rand(shape[:2]) < 0.8
    behaviour = torch.randn(shape[:2]) - shape[2] * np.log(shape[3])
    logits[~mask] = float("nan")
    options = {"entropy_weight": 0.02}
    if reference:
        options |= {"reference_mu": torch.randn(shape), "kl_weight": 0.1}
    results = []
    for backend in ("triton", "reference"):
        leaf = logits.clone().requires_grad_()
        loss, metrics = action_loss(
            leaf, None, action, behaviour, torch.linspace(-1, 1, shape[0]), mask,
            distribution="categorical", backend=backend, **options,
        )  # fmt: skip
        (2 * loss).backward()
        results.append(
            {"loss": loss.detach(), **dict(zip(METRICS, metrics, strict=True)), "grad": leaf.grad}
        )
    for name, want in results[1].items():
        torch.testing.assert_close(
            results[0][name], want, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_token_outside_the_vocabulary_makes_the_loss_nan():
    rows = (torch.tensor([[[5]]]), torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1))
    options = {"distribution": "categorical", "backend": "triton"}
    assert action_loss(torch.zeros(1, 1, 1, 5), None, *rows, **options)[0].isnan()


def test_opcheck():
    """Schema and fake of each Triton op agree with what it does."""
    checks = ("test_schema", "test_faketensor")
    ops = torch.ops.worldenv
    k, v = torch.randn(2, 1, 2, 3, 1, 16)
    for frames, past in ((2, (None, None)), (2, (k, v)), (4, (k, v))):
        q = torch.randn(1, frames, 3, 1, 16)
        given = (q, k, v, *past, None, 0, True)
        torch.library.opcheck(ops.attention_fwd_triton.default, given, test_utils=checks)
        out, lse = ops.attention_fwd_triton(*given)
        for into_past in {False, past[0] is not None}:
            saved = (q, q, k, v, *past, out, lse, None, 0, True, into_past)
            torch.library.opcheck(ops.attention_bwd_triton.default, saved, test_utils=checks)
    x, m = torch.randn(4, 8), torch.randn(2, 8)
    norm = (x, m, m, 1e-6)
    torch.library.opcheck(ops.modulated_norm_fwd_triton.default, norm, test_utils=checks)
    _, mean, rstd = ops.modulated_norm_fwd_triton(*norm)
    torch.library.opcheck(
        ops.modulated_norm_bwd_triton.default, (x, x, m, mean, rstd), test_utils=checks
    )
    turns = torch.randn(4, 4)
    torch.library.opcheck(ops.norm_rotary_triton.default, (x, m[0], turns, 1e-6), test_utils=checks)
    torch.library.opcheck(
        ops.norm_rotary_bwd_triton.default, (x, x, m[0], turns, 1e-6), test_utils=checks
    )
