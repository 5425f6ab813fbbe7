"""Which implementation of an op runs: one visible choice per call, forced or automatic.

Each op lists its backends in order of preference together with the reason, if any, why one cannot
run on the given tensors. `auto` takes the first that can run and logs the choice once; a forced
backend that cannot run raises `BackendUnavailable` with that reason and how to mend it. Nothing
here ever catches a kernel's failure.

Liberty taken: what is installed is probed once at import, so `torch.compile` sees constants, not
imports.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping

import torch

BACKENDS = ("auto", "reference", "cpp", "triton", "cuda", "sdpa", "flash_attn", "xformers")
CPP_DTYPES = (torch.float32, torch.bfloat16)

_log = logging.getLogger("worldenv.ops")
_announced: set[tuple[str, str]] = set()


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run on these tensors or this machine."""


def _find(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a missing parent package
        return False


def has_kernel(op: str, key: str) -> bool:
    """Whether worldenv::`op` has a kernel for a dispatch key such as CPU or CUDA."""
    return hasattr(torch.ops.worldenv, op) and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"worldenv::{op}", key
    )


def _load_extension() -> str | None:
    """Import the compiled extension; returns why it is absent, or None when its ops are
    registered."""
    if not _find("worldenv._C"):
        return "worldenv._C is not built (pip install --no-build-isolation -e .)"
    importlib.import_module("worldenv._C")
    if not has_kernel("gae", "CPU"):
        return "worldenv._C is older than its sources (pip install --no-build-isolation -e .)"
    return None


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NO_CPP: str | None = _load_extension()
NO_TRITON: str | None = None
if not _find("triton"):
    NO_TRITON = "Triton is not installed (pip install triton)"
elif not _find("worldenv.kernels"):
    NO_TRITON = "worldenv.kernels is not installed (pip install --no-build-isolation -e .)"
elif not (INTERPRETED or torch.cuda.is_available()):
    NO_TRITON = (
        "no CUDA device was found (use one, or set TRITON_INTERPRET=1 before the import for tests)"
    )
NO_FLASH_ATTN: str | None = (
    None if _find("flash_attn") else "flash-attn is not installed (pip install flash-attn)"
)
NO_XFORMERS: str | None = (
    None if _find("xformers") else "xformers is not installed (pip install xformers)"
)


def no_cpp(
    device: torch.device, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...] = CPP_DTYPES
) -> str | None:
    """Why the C++ kernels cannot take tensors of this device and dtype, or None. On `meta`, where
    nothing is computed, they say what they would take and make."""
    if NO_CPP is not None:
        return NO_CPP
    if device.type not in ("cpu", "meta"):
        return f"the C++ kernels take CPU tensors, got {device}"
    if dtype not in dtypes:
        return f"the C++ kernel takes {' or '.join(str(d)[6:] for d in dtypes)}, got {dtype}"
    return None


def no_triton(tensor: torch.Tensor, most: int | None = None) -> str | None:
    """Why the Triton kernels cannot take `tensor`, or None; most: the longest last axis."""
    if NO_TRITON is not None:
        return NO_TRITON
    if not tensor.is_cuda and not INTERPRETED:
        return f"Triton kernels take CUDA tensors, got {tensor.device} (move them with .cuda())"
    if tensor.dtype == torch.float64:
        return "the Triton kernels compute in float32, got float64"
    if most is not None and tensor.shape[-1] > most:
        return f"it takes a last axis of at most {most}, got {tensor.shape[-1]}"
    return None


def no_cuda(tensor: torch.Tensor, op: str) -> str | None:
    """Why the CUDA kernel registered as worldenv::`op` cannot take `tensor`, or None."""
    if not tensor.is_cuda:
        return "CUDA kernels take CUDA tensors, got one of another device (move it with .cuda())"
    if NO_CPP is not None:
        return NO_CPP
    if not has_kernel(op, "CUDA"):
        return "worldenv._C was built without CUDA (install nvcc and a CUDA torch, then rebuild)"
    return None


def no_gradient(*tensors: torch.Tensor | None) -> str | None:
    """Why a kernel without a backward pass cannot take `tensors`, or None."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return "it has no gradient (call it under torch.no_grad(), or use backend='reference')"
    return None


def choose(op: str, requested: str, why_not: Mapping[str, str | None]) -> str:
    """Pick the backend of one call.

    Args:
        op: name of the public function, for messages.
        requested: `auto` or one of `BACKENDS`.
        why_not: backends of this op in order of preference; the value is None when the backend can
            run, else the reason and remedy.

    Raises:
        ValueError: `requested` is not a backend of this op.
        BackendUnavailable: `requested` cannot run here.
    """
    if requested == "auto":
        for name, reason in why_not.items():
            if reason is None:
                if not torch.compiler.is_compiling():
                    _announce(op, name, why_not)
                return name
        reasons = "; ".join(f"{name}: {reason}" for name, reason in why_not.items())
        raise BackendUnavailable(f"{op}: no backend can run: {reasons}")
    if requested not in why_not:
        known = ", ".join(["auto", *why_not])
        raise ValueError(f"{op}: backend must be one of {known}; got {requested!r}")
    reason = why_not[requested]
    if reason is not None:
        raise BackendUnavailable(f"{op}: backend {requested!r} cannot run: {reason}")
    return requested


def _announce(op: str, name: str, why_not: Mapping[str, str | None]) -> None:
    if (op, name) in _announced:  # on the way of every call
        return
    _announced.add((op, name))
    if name == "reference" and NO_CPP is not None and ("all", NO_CPP) not in _announced:
        _announced.add(("all", NO_CPP))
        _log.warning("slow: %s runs in plain torch, as other ops may, for %s", op, NO_CPP)
    passed = [f"{other}: {reason}" for other, reason in why_not.items() if reason is not None]
    _log.info("%s runs on %s%s", op, name, f" ({'; '.join(passed)})" if passed else "")
