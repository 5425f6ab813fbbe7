"""The action loss: every backend against float64 autograd, by name; masks; defined edges."""

from __future__ import annotations

import pytest
import torch

from worldenv.ops import action_logprob, action_loss
from worldenv.ops import backend as backends
from worldenv.ops.action_loss import METRICS, action_loss_reference

needs_cpp = pytest.mark.skipif(backends.NO_CPP is not None, reason=str(backends.NO_CPP))
KINDS = ["laplace", "gaussian", "categorical"]
ISAS = {0: "portable", 1: "avx2", 2: "avx512"}


def batch(kind, shape, vocabulary=11, seed=0):
    """Arguments of action_loss with ratios on both sides of the clip."""
    g = torch.Generator().manual_seed(seed)
    b, c, _ = shape
    logits = (*shape, vocabulary) if kind == "categorical" else shape
    mu = torch.randn(logits, generator=g)
    log_scale = None if kind == "categorical" else torch.randn(shape, generator=g) * 0.3
    action = torch.randn(shape, generator=g)
    if kind == "categorical":
        action = torch.randint(vocabulary, shape, generator=g)
    behaviour = action_logprob(mu, log_scale, action, distribution=kind, backend="reference")
    return {
        "mu": mu,
        "log_scale": log_scale,
        "action": action,
        "behaviour_logprob": behaviour + 0.3 * torch.randn((b, c), generator=g),
        "advantage": torch.randn(b, generator=g),
        "mask": torch.rand((b, c), generator=g) < 0.8,
    }


def reference_policy(kind, mu, with_scale):
    g = torch.Generator().manual_seed(5)
    out = {"reference_mu": mu + 0.3 * torch.randn(mu.shape, generator=g)}
    if with_scale and kind != "categorical":
        out["reference_log_scale"] = 0.3 * torch.randn(mu.shape, generator=g)
    return out


def run(function, arguments, **options):
    leaves = {n: arguments[n] for n in ("mu", "log_scale") if arguments[n] is not None}
    leaves = {n: t.detach().clone().requires_grad_() for n, t in leaves.items()}
    loss, metrics = function(**{**arguments, **leaves}, **options)
    (3 * loss).backward()
    metrics = dict(zip(METRICS, metrics, strict=True))
    return {"loss": loss.detach(), **metrics, **{n: t.grad for n, t in leaves.items()}}


def double(arguments):
    return {
        n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for n, t in arguments.items()
    }


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reference", [None, "mu", "scale"])
@pytest.mark.parametrize("shape", [(5, 8, 7), (1, 1, 1), (63, 3, 5), (40, 8, 7)])
def test_loss_metrics_and_gradients_match_float64(backend, kind, reference, shape):
    arguments = batch(kind, shape)
    options = {"distribution": kind, "clip_low": 0.2, "clip_high": 0.28, "entropy_weight": 0.01}
    if reference:
        arguments |= reference_policy(kind, arguments["mu"], reference == "scale")
        options["kl_weight"] = 0.1
    want = run(action_loss_reference, double(arguments), **options)
    got = run(action_loss, arguments, backend=backend, **options)
    for name, value in want.items():
        torch.testing.assert_close(
            got[name].double(), value, atol=2e-6, rtol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@needs_cpp
@pytest.mark.parametrize("isa", ISAS, ids=ISAS.values())
def test_every_instruction_set(isa):
    if isa > torch.ops.worldenv.best_isa():
        pytest.skip(f"this CPU has no {ISAS[isa]}")
    constants = (0.2, 0.28, 0.1, 0.01, isa)
    for kind in KINDS:
        arguments = batch(kind, (70, 4, 7))
        tensors = [t for t in arguments.values() if t is not None]
        other = reference_policy(kind, arguments["mu"], False)["reference_mu"]
        if kind == "categorical":
            out = torch.ops.worldenv.token_loss(*tensors, other, *constants)
        else:
            out = torch.ops.worldenv.action_loss(
                *tensors, other, None, KINDS.index(kind), *constants
            )
        options = {"clip_high": 0.28, "kl_weight": 0.1, "entropy_weight": 0.01}
        want = run(
            action_loss_reference,
            double(arguments),
            distribution=kind,
            reference_mu=other,
            **options,
        )
        torch.testing.assert_close(out[0].double(), want["loss"], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(3 * out[2].double(), want["mu"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("kind", KINDS)
def test_unchanged_policy_has_ratio_one_exactly(backend, kind):
    arguments = batch(kind, (37, 8, 7))
    with torch.no_grad():
        inputs = (arguments["mu"], arguments["log_scale"], arguments["action"])
        behaviour = action_logprob(*inputs, distribution=kind, backend=backend)
    arguments["behaviour_logprob"] = behaviour
    rows = slice(3, 20)  # a minibatch of the rollout
    part = {n: None if t is None else t[rows] for n, t in arguments.items()}
    _, metrics = action_loss(**part, distribution=kind, backend=backend)
    metrics = dict(zip(METRICS, metrics, strict=True))
    assert metrics["ratio_max"].item() == 1.0
    assert metrics["kl_behaviour"].item() == 0.0
    assert metrics["clip_fraction"].item() == 0.0


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_steps_may_hold_anything(backend, kind):
    arguments = batch(kind, (6, 8, 7))
    clean = run(action_loss, arguments, distribution=kind, backend=backend)
    dirty = {n: None if t is None else t.clone() for n, t in arguments.items()}
    off = ~dirty["mask"]
    dirty["behaviour_logprob"][off] = -float("inf")
    if kind != "categorical":
        dirty["action"][off] = float("nan")
    got = run(action_loss, dirty, distribution=kind, backend=backend)
    for name, value in clean.items():
        torch.testing.assert_close(got[name], value, atol=0, rtol=0)
        assert got[name].isfinite().all()
    assert (got["mu"][off] == 0).all()


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_defined_edges(backend):
    arguments = batch("laplace", (4, 8, 7))
    nothing = run(action_loss, {**arguments, "mask": torch.zeros(4, 8)}, backend=backend)
    assert nothing["loss"].item() == 0
    assert (nothing["mu"] == 0).all()
    none = {n: t[:0] for n, t in arguments.items()}
    assert action_loss(**none, backend=backend)[0].item() == 0
    arguments["mask"] = torch.ones(4, 8)
    arguments["mu"][1, 1, 1] = float("nan")
    assert run(action_loss, arguments, backend=backend)["loss"].isnan()
    arguments = batch("laplace", (4, 8, 7))
    arguments["behaviour_logprob"] -= 300  # a runaway update: the ratio overflows
    assert run(action_loss, arguments, backend=backend)["ratio_max"].isinf()


@needs_cpp
def test_half_precision_and_strided_inputs():
    arguments = batch("laplace", (8, 8, 7))
    half = {n: t.bfloat16() if n in ("mu", "log_scale") else t for n, t in arguments.items()}
    got = run(action_loss, half, backend="cpp")
    want = run(action_loss, half, backend="reference")
    assert got["mu"].dtype == torch.bfloat16
    torch.testing.assert_close(got["mu"], want["mu"])
    strided = arguments | {"mu": arguments["mu"].transpose(0, 1).contiguous().transpose(0, 1)}
    torch.testing.assert_close(
        run(action_loss, strided, backend="cpp")["mu"],
        run(action_loss, arguments, backend="cpp")["mu"],
    )


@needs_cpp
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_and_compile(kind):
    arguments = batch(kind, (3, 2, 7))
    tensors = [t for t in arguments.values() if t is not None]
    tensors[0].requires_grad_()
    constants = (0.2, 0.2, 0.0, 0.01)
    if kind == "categorical":
        inputs = (*tensors, None, *constants)
        op, logprob = torch.ops.worldenv.token_loss, torch.ops.worldenv.token_logprob
        torch.library.opcheck(logprob.default, (tensors[0].detach(), tensors[1]))
    else:
        tensors[1].requires_grad_()
        inputs = (*tensors, None, None, KINDS.index(kind), *constants)
        op, logprob = torch.ops.worldenv.action_loss, torch.ops.worldenv.action_logprob
        torch.library.opcheck(logprob.default, (*(t.detach() for t in tensors[:3]), 0))
    torch.library.opcheck(op.default, inputs)

    def loss(**x):
        return action_loss(**x, distribution=kind)[0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**arguments), loss(**arguments))


def test_bad_arguments_are_named():
    a = batch("laplace", (4, 8, 7))
    for change, message in [
        ({"log_scale": a["log_scale"][:, :2]}, "log_scale must be"),
        ({"advantage": a["advantage"][:2]}, "advantage must be"),
        ({"mask": a["mask"].T}, "mask must be"),
        ({"clip_low": -0.1}, "clip_low must be >= 0"),
        ({"kl_weight": 0.1}, "needs reference_mu"),
        ({"distribution": "cauchy"}, "distribution must be one of"),
        ({"distribution": "categorical"}, "categorical needs mu"),
        ({"mu": a["mu"][0]}, r"mu must be \[B,C,A\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            action_loss(**{**a, **change})
    tokens = batch("categorical", (2, 2, 3))
    with pytest.raises(TypeError, match="integer action ids"):
        action_loss(**{**tokens, "action": tokens["action"].float()}, distribution="categorical")
    if backends.NO_CPP is None:
        tokens["action"][0, 0, 0] = 99
        with pytest.raises(RuntimeError, match="must lie in"):
            action_loss(**tokens, distribution="categorical", backend="cpp")


def test_metrics_are_detached():
    arguments = batch("laplace", (4, 8, 7))
    arguments["mu"].requires_grad_()
    _, metrics = action_loss(**arguments)
    assert metrics.shape == (len(METRICS),)
    assert not metrics.requires_grad
