"""The launches that production makes of its Triton kernels, compiled for a GPU that need not exist.

Production's own launchers run, on tensors without memory; where a kernel would be launched it is
compiled instead, by Triton's own path from arguments to specialisation, so that tile sizes, warps,
stages and what is known of sizes and strides are exactly those of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from worldenv.kernels import (
    action_loss,
    adaln,
    attention,
    attention_backward,
    frame_attention,
    norm_rotary,
    token_loss,
)


class _Absent:
    """A driver that names its device and has none."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


@dataclass(frozen=True)
class Launch:
    """One compiled launch: the kernel's name, its constants and options, the code."""

    kernel: str
    options: dict[str, object]
    warps: int
    shared: int
    cubin: bytes


@contextmanager
def recorded(capability: int) -> Iterator[list[Launch]]:
    """Within: launches are compiled for sm_`capability` and appended to the list, not run."""
    launches: list[Launch] = []

    def launch(kernel: JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_only(*args: object, **options: object) -> None:
            compiled = kernel.warmup(*args, grid=grid, **options)
            meta = compiled.metadata
            launches.append(
                Launch(kernel.__name__, options, meta.num_warps, meta.shared, compiled.asm["cubin"])
            )

        return compile_only

    driver.set_active(_Absent(capability))
    try:
        with mock.patch.object(JITFunction, "__getitem__", launch):
            yield launches
    finally:
        driver._active = None


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _qkv(
    lead: tuple[int, ...], heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Queries and keys as norm_rotary leaves them, values as a part of one projection."""
    q, k = _empty(*lead, heads, dim, dtype=dtype), _empty(*lead, kv_heads, dim, dtype=dtype)
    return q, k, _empty(*lead, 3, kv_heads, dim, dtype=dtype).select(-3, 2)


def _attention(
    dim: int, dtype: torch.dtype, causal: bool = True, groups: int = 1, sinks: int = 0,
    halves: int = 0,
) -> None:  # fmt: skip
    """Nine frames of 256 tokens under a window of 5; halves: teacher forcing, with queries of the
    noisy frames (1) or of all, and gradients into history (2)."""
    q, k, v = _qkv((4, 9, 256), 24, 24 // groups, dim, dtype)
    reach = (5 if causal else None, sinks, causal)
    past = (k, v) if halves else None
    if halves == 2:
        q = _empty(4, 18, 256, 24, dim, dtype=dtype)
    out, lse = attention.forward(q, k, v, past, *reach)
    attention_backward.backward(out, q, k, v, past, out, lse, *reach, into_history=halves == 2)


def _frame_attention(tokens: int, dim: int, dtype: torch.dtype) -> None:
    q, k, v = _qkv((16, tokens), 24, 24, dim, dtype)
    cache = _empty(16, 24, 9, tokens, dim, dtype=dtype)
    table, cached = _empty(16, 9, dtype=torch.int32), _empty(16, dtype=torch.int32)
    frame_attention.forward(q, k, v, cache, cache, table, cached)


def _pointwise(width: int, dim: int, dtype: torch.dtype) -> None:
    """Both norms of 16 frames of 256 tokens."""
    x, modulation = _empty(4096, width, dtype=dtype), _empty(16, width, dtype=dtype)
    rows, weight, turns = _empty(4096), _empty(width), _empty(4096, dim)
    part = _empty(4096, 3 * width, dtype=dtype)[:, :width]
    adaln.forward(x, modulation, modulation, 1e-6)
    adaln.backward(x, x, modulation, rows, rows)
    norm_rotary.forward(part, weight, turns, 1e-6)
    norm_rotary.backward(x, part, weight, turns, 1e-6)


def _losses() -> None:
    """Chunks of 8 actions of 7 dimensions, or tokens of 256, beside a reference policy."""
    rows = (_empty(512, 8), _empty(512), _empty(512, 8, dtype=torch.bool))
    mu, logits = _empty(512, 8, 7), _empty(512, 8, 7, 256)
    weights = (0.2, 0.2, 0.1, 0.01)
    for gaussian in (False, True):
        action_loss.forward(mu, mu, mu, *rows, mu, mu, gaussian, *weights)
    tokens = _empty(512, 8, 7, dtype=torch.int64)
    token_loss.forward(logits, tokens, *rows, logits, *weights)


def production() -> dict[str, Callable[[], None]]:
    """What to launch, by name; the heaviest to compile first."""
    bf16, f32 = torch.bfloat16, torch.float32
    cases: dict[str, Callable[[], None]] = {}
    for dim in (128, 64):
        cases[f"D{dim} f32"] = partial(_attention, dim, f32)
    for dim in (128, 64):
        cases[f"D{dim} bf16"] = partial(_attention, dim, bf16)
        cases[f"D{dim} bf16 full"] = partial(_attention, dim, bf16, False)
        cases[f"D{dim} bf16 grouped, sinks"] = partial(_attention, dim, bf16, True, 3, 2)
        cases[f"D{dim} bf16 noisy"] = partial(_attention, dim, bf16, halves=1)
        cases[f"D{dim} bf16 clean, noisy"] = partial(_attention, dim, bf16, halves=2)
    for dim in (128, 64):
        for tokens in (64, 256):
            cases[f"D{dim} bf16 S{tokens}"] = partial(_frame_attention, tokens, dim, bf16)
        cases[f"D{dim} f32 S64"] = partial(_frame_attention, 64, dim, f32)
        cases[f"E{24 * dim} D{dim} bf16"] = partial(_pointwise, 24 * dim, dim, bf16)
    cases["(8, 7) f32"] = _losses
    return cases
