"""GELU in its tanh approximation, the activation of Wan's feed-forward.

Backends: `cpp` (CPU, f32 and bf16: torch's tanh form is several times slower there than its exact
one) and `reference` (torch; the choice on a GPU). Source: arXiv 1606.08415.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from worldenv.ops import backend as backends
from worldenv.ops.checks import check_floating

_OP = "gelu"


def gelu_reference(x: Tensor) -> Tensor:
    """Plain torch."""
    return F.gelu(x, approximate="tanh")


def gelu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), element by element.

    Args:
        x: float, any shape.
        backend: auto | cpp | reference.

    Returns:
        The shape and dtype of x. Differentiable.

    Raises:
        TypeError: x is not floating point.
        BackendUnavailable: a forced backend cannot run.
    """
    check_floating(_OP, x=x)
    why_not = {"cpp": backends.no_cpp(x.device, x.dtype), "reference": None}
    if backends.choose(_OP, backend, why_not) == "cpp":
        return torch.ops.worldenv.gelu(x.contiguous())
    return gelu_reference(x)


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def _backward(ctx, grad):
    return torch.ops.worldenv.gelu_bwd(grad.contiguous(), *ctx.saved_tensors), None


if backends.NO_CPP is None:

    @torch.library.register_fake("worldenv::gelu")
    def _(x: Tensor, *_: object) -> Tensor:
        return x.new_empty(x.shape)

    @torch.library.register_fake("worldenv::gelu_bwd")
    def _(grad: Tensor, x: Tensor, *_: object) -> Tensor:
        return x.new_empty(x.shape)

    torch.library.register_autograd("worldenv::gelu", _backward, setup_context=_save)
