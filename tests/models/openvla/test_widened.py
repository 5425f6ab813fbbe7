"""Emulated bfloat16 in float32: as exact as can be, the same gradients, nothing wide kept."""

import copy

import pytest
import torch
from published.openvla_policy import look, policy
from torch import nn

from worldenv.models.widened import widen
from worldenv.runtime import device


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_that_of_float32_rounded_once(bias):
    torch.manual_seed(0)
    layer = nn.Linear(48, 20, bias=bias).bfloat16().requires_grad_(False)
    exact = copy.deepcopy(layer).float()
    widen(layer)
    x = torch.randn(3, 5, 48).bfloat16().requires_grad_(True)
    wide = x.detach().float().requires_grad_(True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    z = exact(wide)
    assert torch.equal(y, z.bfloat16())
    grad = torch.randn_like(z).bfloat16()
    y.backward(grad)
    z.backward(grad.float())
    assert torch.equal(x.grad, wide.grad.bfloat16())
    assert [t.dtype for t in kept] == [torch.bfloat16]
    assert kept[0].data_ptr() == layer.weight.data_ptr()


def test_what_is_trained_or_float32_is_left_alone():
    layers = nn.Sequential(nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2).requires_grad_(False))
    widen(layers)
    assert all("forward" not in vars(layer) for layer in layers)


@pytest.mark.parametrize("native", [True, False])
def test_policies_are_widened_where_the_processor_emulates(shallow, monkeypatch, native):
    dtype = torch.bfloat16 if native else torch.float32
    monkeypatch.setattr(device, "autocast_dtype", lambda kind: dtype)
    model = policy(shallow, precision="bfloat16", lora_rank=2)
    assert ("forward" in vars(model.projector.fc1.base_layer)) is not native
    mu = model(look(1))[0]
    mu.square().sum().backward()
    assert all(p.grad is not None for p in model.trainable_groups()["adapter"])
    with torch.no_grad():
        assert torch.equal(model(look(1))[0], mu)  # a rollout and its update agree
        exact = policy(shallow)(look(1))[0]
    assert (mu - exact).abs().mean() < 0.1 * exact.abs().mean()
