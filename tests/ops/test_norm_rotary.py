"""RMS norm with rotary positions: definition, instruction sets, gradients, named errors."""

from __future__ import annotations

import pytest
import torch

from worldenv.ops import norm_rotary
from worldenv.ops.backend import NO_CPP

ISAS = {0: "portable", 1: "avx2", 2: "avx512"}
SHAPES = [((2, 3, 5), 4, 64), ((1, 1), 1, 2), ((7, 9), 3, 10), ((2, 33), 2, 24), ((0, 4), 2, 8)]
cpp = pytest.mark.skipif(NO_CPP is not None, reason=str(NO_CPP))


def arguments(lead, heads, dim, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(*lead, heads * dim).to(dtype)
    angle = 10 * torch.randn(*lead, dim // 2)
    return x, torch.randn(heads * dim), torch.polar(torch.ones_like(angle), angle)


def definition(x, weight, rotary, eps=1e-6):
    """In double, pair by pair."""
    y = x.double() / (x.double().square().mean(-1, True) + eps).sqrt() * weight.double()
    a, b = y.unflatten(-1, (-1, rotary.shape[-1], 2)).unbind(-1)
    c, s = (part.double().unsqueeze(-2) for part in (rotary.real, rotary.imag))
    return torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("lead", "heads", "dim"), SHAPES)
def test_matches_its_definition(lead, heads, dim, backend):
    x, weight, rotary = arguments(lead, heads, dim)
    got = norm_rotary(x, weight, rotary, backend=backend)
    assert got.shape == (*lead, heads, dim)
    torch.testing.assert_close(got.double(), definition(x, weight, rotary), atol=3e-6, rtol=1e-5)


@cpp
@pytest.mark.parametrize("isa", ISAS, ids=ISAS.values())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lead", "heads", "dim"), SHAPES[:-1])
def test_every_instruction_set_with_its_gradient(lead, heads, dim, dtype, isa):
    ops = torch.ops.worldenv
    if isa > ops.best_isa():
        pytest.skip(f"this CPU has no {ISAS[isa]}")
    x, weight, rotary = arguments(lead, heads, dim, dtype)
    wide = torch.randn(x.numel() // x.shape[-1], 3 * x.shape[-1]).to(dtype)
    rows = wide[:, x.shape[-1] : 2 * x.shape[-1]]  # as sliced from a qkv projection
    rows.copy_(x.flatten(0, -2))
    turns = torch.view_as_real(rotary).reshape(len(rows), dim)
    got = ops.norm_rotary(rows, weight, turns, 1e-6, isa)
    leaves = [rows.double().requires_grad_(), weight.double().requires_grad_()]
    want = definition(*leaves, rotary.reshape(len(rows), -1)).flatten(1)
    tolerance = (
        {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0, "rtol": 1e-2}
    )
    torch.testing.assert_close(got.double(), want.detach(), **tolerance)
    grad = torch.randn(got.shape).to(dtype)
    by_x, by_weight = ops.norm_rotary_bwd(grad, rows, weight, turns, 1e-6, isa)
    want_x, want_weight = torch.autograd.grad(want, leaves, grad.double())
    loose = {"atol": 1e-4 if dtype == torch.float32 else 3e-2, "rtol": 1e-2}
    torch.testing.assert_close(by_x.double(), want_x, **loose)
    torch.testing.assert_close(by_weight.double(), want_weight, **loose)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("lead", [(5,), (1, 5), (3, 5), (1, 1, 5), (2, 1, 5), (2, 3, 1), (1,)])
def test_positions_broadcast(lead, backend):
    x, weight, _ = arguments((2, 3, 5), 2, 8)
    angle = torch.randn(*lead, 4)
    rotary = torch.polar(torch.ones_like(angle), angle)
    whole = rotary.expand(2, 3, 5, 4).contiguous()
    got = norm_rotary(x, weight, rotary, backend=backend)
    torch.testing.assert_close(got, norm_rotary(x, weight, whole, backend=backend))


@cpp
def test_gradients_through_autograd_equal_the_reference():
    x, weight, rotary = arguments((2, 3, 20), 4, 32)
    grad = torch.randn(2, 3, 20, 4, 32)
    results = []
    for backend in ("cpp", "reference"):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = norm_rotary(*leaves, rotary, backend=backend)
        results.append(torch.autograd.grad(out, leaves, grad))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


def test_gradcheck():
    x, weight, rotary = arguments((2, 3), 2, 4)
    leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
    assert torch.autograd.gradcheck(lambda *a: norm_rotary(*a, rotary), leaves)


@cpp
def test_opcheck():
    x, weight, rotary = arguments((3, 5), 2, 8)
    rows = x.flatten(0, -2).requires_grad_()
    turns = torch.view_as_real(rotary).reshape(len(rows), 8)
    torch.library.opcheck(
        torch.ops.worldenv.norm_rotary.default, (rows, weight.requires_grad_(), turns, 1e-6)
    )


def test_a_nan_stays_in_its_row():
    x, weight, rotary = arguments((4, 3), 2, 8)
    x[1, 2, 5] = float("nan")
    bad = norm_rotary(x, weight, rotary).isnan().flatten(2).any(-1)
    assert bad.nonzero().tolist() == [[1, 2]]


def test_bad_arguments_are_named():
    x, weight, rotary = arguments((2, 3), 2, 4)
    with pytest.raises(ValueError, match=r"weight must be \[E\]"):
        norm_rotary(x, weight[:-1], rotary)
    with pytest.raises(TypeError, match="rotary must be complex"):
        norm_rotary(x, weight, rotary.real)
    with pytest.raises(ValueError, match="divisor of 8"):
        norm_rotary(x, weight, torch.ones(3, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="rotary must broadcast"):
        norm_rotary(x, weight, rotary[:, :2])
    with pytest.raises(TypeError, match="x must be floating"):
        norm_rotary(x.int(), weight, rotary)
    with pytest.raises(ValueError, match="eps"):
        norm_rotary(x, weight, rotary, eps=0.0)
