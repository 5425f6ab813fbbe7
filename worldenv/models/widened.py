"""Frozen bfloat16 layers on a CPU that only emulates bfloat16: multiplied in float32 instead.

Several times faster there, and rounded less. Weights stay as they are in memory, and are widened
one layer at a time, for the gradient too. On a GPU nothing changes.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable


def widen(module: nn.Module) -> None:
    """Let every linear layer of `module` whose weight is a frozen bfloat16 compute in float32."""
    for layer in module.modules():
        frozen = isinstance(layer, nn.Linear) and not layer.weight.requires_grad
        if frozen and layer.weight.dtype == torch.bfloat16:
            layer.forward = partial(_forward, layer)


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    if x.device.type not in ("cpu", "meta"):
        return F.linear(x, layer.weight, layer.bias)
    return _Widened.apply(x, layer.weight, layer.bias)


class _Widened(torch.autograd.Function):
    """x W^T + b; what it keeps for the gradient is W as it is, not a wider copy."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        wide = None if bias is None else bias.float()
        return F.linear(x.float(), weight.float(), wide).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return (grad.float() @ weight.float()).to(grad.dtype), None, None
