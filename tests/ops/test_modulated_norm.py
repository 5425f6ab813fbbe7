"""Modulated norm: value, gradients, broadcasting and named errors."""

from __future__ import annotations

import pytest
import torch

from worldenv.ops import modulated_norm


@pytest.mark.parametrize("shape", [(2, 3, 5, 32), (1, 1), (4, 1000)])
def test_matches_its_definition(shape):
    x = torch.randn(shape)
    shift, scale = torch.randn(2, *shape[:1], *([1] * (len(shape) - 2)), shape[-1])
    mean, variance = x.mean(-1, True), x.var(-1, correction=0, keepdim=True)
    want = (x - mean) / (variance + 1e-6).sqrt() * (1 + scale) + shift
    torch.testing.assert_close(modulated_norm(x, shift, scale), want)


def test_gradcheck_with_broadcast_modulation():
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    shift, scale = (torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True) for _ in "ss")
    assert torch.autograd.gradcheck(modulated_norm, (x, shift, scale))


def test_half_precision_keeps_its_dtype():
    x = torch.randn(2, 4, 32).bfloat16()
    shift, scale = torch.randn(2, 2, 1, 32)
    assert modulated_norm(x, shift, scale).dtype == torch.bfloat16


def test_bad_arguments_are_named():
    x, m = torch.zeros(2, 3, 8), torch.zeros(2, 1, 8)
    with pytest.raises(ValueError, match="shift must broadcast"):
        modulated_norm(x, m[..., :5], m)
    with pytest.raises(ValueError, match="scale must broadcast"):
        modulated_norm(x, m, torch.zeros(1, 2, 1, 8))
    with pytest.raises(ValueError, match="eps"):
        modulated_norm(x, m, m, eps=0.0)
    with pytest.raises(TypeError, match="x must be floating"):
        modulated_norm(x.int(), m, m)
    with pytest.raises(ValueError, match="E >= 1"):
        modulated_norm(x[..., :0], m, m)
