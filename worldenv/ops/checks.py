"""Argument checks shared by the ops: each message names the argument, what was expected and what
came."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def check_floating(op: str, **tensors: torch.Tensor) -> None:
    """Raise TypeError unless every tensor is a torch tensor of a floating dtype."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} must be floating point, got {tensor.dtype}")


def check_same(op: str, **tensors: torch.Tensor) -> None:
    """Raise unless all tensors share dtype (TypeError) and device (ValueError)."""
    names = list(tensors)
    first = tensors[names[0]]
    for name in names[1:]:
        other = tensors[name]
        if other.dtype != first.dtype:
            raise TypeError(
                f"{op}: {name} must have the dtype of {names[0]} ({first.dtype}), "
                f"got {other.dtype}; "
                f"convert it with .to({names[0]}.dtype)"
            )
        if other.device != first.device:
            raise ValueError(
                f"{op}: {name} must be on the device of {names[0]} ({first.device}), "
                f"got {other.device}; "
                f"move it with .to({names[0]}.device)"
            )


def check_shape(
    op: str, name: str, tensor: torch.Tensor, expected: tuple[int, ...], letters: str
) -> None:
    """Raise ValueError unless `tensor` has exactly the expected shape (`letters` names its
    axes)."""
    if tensor.shape != expected:
        raise ValueError(
            f"{op}: {name} must be [{letters}] = {tuple(expected)}, got {shape_of(tensor)}"
        )
