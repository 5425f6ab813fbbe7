"""RMS norm of queries or keys, then rotary positions: what Wan's attention does to both.

Backends: `triton` (CUDA) and `cpp` (CPU, f32 and bf16), each one pass forward and one backward,
and `reference` (torch's rms_norm and a complex product: five passes over memory).
Sources: arXiv 1910.07467 (RMS norm), arXiv 2104.09864 (rotary), Wan's 3D positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from worldenv.ops import backend as backends
from worldenv.ops.checks import check_floating, shape_of

if backends.NO_TRITON is None:
    from worldenv.ops import triton_ops

_OP = "norm_rotary"


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate interleaved pairs of x `[..., S, H, D]` by unit complex numbers `[..., S, D/2]`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    pairs = torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2)))
    turned = pairs * rotary.unsqueeze(-2).to(pairs.dtype)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def norm_rotary_reference(
    x: Tensor, weight: Tensor, rotary: Tensor, *, eps: float = 1e-6
) -> Tensor:
    """Plain torch. Shapes as `norm_rotary`."""
    y = F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)
    return rotate(y.unflatten(-1, (-1, 2 * rotary.shape[-1])), rotary)


def norm_rotary(
    x: Tensor, weight: Tensor, rotary: Tensor, *, eps: float = 1e-6, backend: str = "auto"
) -> Tensor:
    """RMS norm over the channels of all heads, then a rotation of each head's pairs.

    Args:
        x: [..., S, E] float, channels contiguous (a slice of a qkv projection is taken as it is).
        weight: [E] float, of the norm.
        rotary: complex64 [..., S, D/2], unit numbers; its leading axes broadcast to those of x.
            D divides E.
        eps: added to the mean square, > 0.
        backend: auto | triton | cpp | reference.

    Returns:
        [..., S, H, D] in the dtype of x, H = E / D. Differentiable in x and weight.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device, named.
        BackendUnavailable: a forced backend cannot run.
    """
    check_floating(_OP, x=x, weight=weight)
    if x.dim() < 2 or x.shape[-1] == 0:
        raise ValueError(f"{_OP}: x must be [..., S, E] with E >= 1, got {shape_of(x)}")
    width = x.shape[-1]
    if weight.shape != (width,):
        raise ValueError(f"{_OP}: weight must be [E] = ({width},), got {shape_of(weight)}")
    if not rotary.is_complex():
        raise TypeError(f"{_OP}: rotary must be complex, got {rotary.dtype}")
    dim = 2 * rotary.shape[-1] if rotary.dim() else 0
    if dim == 0 or width % dim:
        raise ValueError(
            f"{_OP}: rotary must be [..., S, D/2] with D a divisor of {width}, "
            f"got {shape_of(rotary)}"
        )
    pairs = zip(reversed(rotary.shape[:-1]), reversed(x.shape[:-1]), strict=False)
    if rotary.dim() > x.dim() or any(a not in (1, b) for a, b in pairs):
        raise ValueError(f"{_OP}: rotary must broadcast to x {shape_of(x)}, got {shape_of(rotary)}")
    for name, t in (("weight", weight), ("rotary", rotary)):
        if t.device != x.device:
            raise ValueError(
                f"{_OP}: {name} must be on the device of x ({x.device}), got {t.device}"
            )
    if eps <= 0:
        raise ValueError(f"{_OP}: eps must be > 0, got {eps}")
    why_not = {
        "triton": backends.no_triton(x, most=16384),
        "cpp": backends.no_cpp(x.device, x.dtype),
        "reference": None,
    }
    name = backends.choose(_OP, backend, why_not)
    if name == "reference" or not x.numel():
        return norm_rotary_reference(x, weight, rotary, eps=eps)
    op = triton_ops.norm_rotary if name == "triton" else torch.ops.worldenv.norm_rotary
    rows = x.reshape(-1, width)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    turns = (
        torch.view_as_real(_unrepeated(rotary, x).to(torch.complex64)).reshape(-1, dim).contiguous()
    )
    out = op(rows, weight.float(), turns, eps)
    return out.view(*x.shape[:-1], width // dim, dim)


def _unrepeated(rotary: Tensor, x: Tensor) -> Tensor:
    """Rotary without leading axes over which it is the same; expanded where an inner axis is."""
    while rotary.dim() > 2 and rotary.shape[0] == 1:
        rotary = rotary[0]
    if rotary.shape[:-1] == x.shape[x.dim() - rotary.dim() : -1]:
        return rotary
    return rotary.expand(*x.shape[:-1], -1)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.eps = inputs[3]


def _backward(ctx, grad):
    grad_x, grad_weight = torch.ops.worldenv.norm_rotary_bwd(
        grad.contiguous(), *ctx.saved_tensors, ctx.eps
    )
    return grad_x, grad_weight, None, None, None


if backends.NO_CPP is None:

    @torch.library.register_fake("worldenv::norm_rotary")
    def _(x: Tensor, *_: object) -> Tensor:
        return x.new_empty(x.shape)

    @torch.library.register_fake("worldenv::norm_rotary_bwd")
    def _(grad: Tensor, x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape), weight.new_empty(weight.shape)

    torch.library.register_autograd("worldenv::norm_rotary", _backward, setup_context=_save)
