"""GELU: its definition, every instruction set, gradients, extremes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from worldenv.ops import gelu
from worldenv.ops.backend import NO_CPP

ISAS = {0: "portable", 1: "avx2", 2: "avx512"}
cpp = pytest.mark.skipif(NO_CPP is not None, reason=str(NO_CPP))


@cpp
@pytest.mark.parametrize("isa", ISAS, ids=ISAS.values())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 17, 40_000])
def test_every_instruction_set_with_its_gradient(count, dtype, isa):
    ops = torch.ops.worldenv
    if isa > ops.best_isa():
        pytest.skip(f"this CPU has no {ISAS[isa]}")
    torch.manual_seed(0)
    x, grad = (4 * torch.randn(2, count)).to(dtype)
    leaf = x.double().requires_grad_()
    want = F.gelu(leaf, approximate="tanh")
    (want_grad,) = torch.autograd.grad(want, leaf, grad.double())
    tolerance = (
        {"atol": 2e-6, "rtol": 2e-6} if dtype == torch.float32 else {"atol": 1e-6, "rtol": 5e-3}
    )
    torch.testing.assert_close(ops.gelu(x, isa).double(), want.detach(), **tolerance)
    close = {"atol": 5e-6, "rtol": 5e-6} if dtype == torch.float32 else {"atol": 1e-4, "rtol": 5e-3}
    torch.testing.assert_close(ops.gelu_bwd(grad, x, isa).double(), want_grad, **close)


def test_extremes_stay_finite_and_nan_stays_nan():
    x = torch.tensor([-1e30, -200.0, -10.0, 0.0, 10.0, 200.0, 1e30, float("nan")])
    got = gelu(x)
    torch.testing.assert_close(got[:7], torch.tensor([0.0, 0, 0, 0, 10, 200, 1e30]))
    assert got[7].isnan()


def test_keeps_shape_and_layout_does_not_matter():
    x = torch.randn(5, 3, 7).transpose(0, 2)
    torch.testing.assert_close(gelu(x), F.gelu(x, approximate="tanh"))


def test_gradcheck_and_opcheck():
    x = torch.randn(11, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gelu, x)
    if NO_CPP is None:
        torch.library.opcheck(
            torch.ops.worldenv.gelu.default, (x.detach().float().requires_grad_(),)
        )


def test_integers_are_refused():
    with pytest.raises(TypeError, match="x must be floating"):
        gelu(torch.ones(2, dtype=torch.int64))
