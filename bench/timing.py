"""Timing rivals in one process: each is checked first, then all are interleaved and the minimum
kept.

Liberty taken: on a CPU the clock is the thread's own CPU time with one thread, so that other
processes on a shared machine cost cache misses but not waiting; only ratios are gated. On a GPU
CUDA events are used.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Run = Callable[[], Tensor | tuple[Tensor, ...]]

LONG = 10.0  # seconds: such a run disturbs itself less than a busy machine disturbs a short one
SHORTEST = 5e-3  # seconds: what takes less is repeated, or it would time the caches its rival left


class GateFailed(AssertionError):
    """A variant's result differs from the reference: no speed may be reported for it."""


@dataclass(frozen=True)
class Case:
    """One op at one shape: `ours` against rivals, all on the same inputs.

    Attributes:
        op, shape, dtype: for the table.
        ours: our implementation. rivals: by name; the first is the one the target is set against.
        truth: the correct result, computed plainly.
        tolerance: largest |result - truth| allowed, relative to the largest |truth|.
        unlike: rivals that compute something else of the same size; timed, not compared.
        part: of a result, what `truth` computed, where the whole would take minutes.
        work: floating point operations of one run. traffic: bytes it must move.
    """

    op: str
    shape: str
    dtype: str
    ours: Run
    rivals: dict[str, Run]
    truth: Run
    tolerance: float
    work: float = 0.0
    traffic: float = 0.0
    unlike: tuple[str, ...] = ()
    part: Callable[[Tensor], Tensor] | None = None

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape} {self.dtype}"


@dataclass(frozen=True)
class Row:
    """A measured case: seconds of each variant, rivals' ratios to ours, share of the machine's
    limit."""

    case: str
    seconds: float
    rivals: dict[str, float] = field(default_factory=dict)
    of_limit: float | None = None

    @property
    def ratios(self) -> dict[str, float]:
        return {name: seconds / self.seconds for name, seconds in self.rivals.items()}


def _whole(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A result in float64; several tensors, such as gradients, as one vector."""
    if isinstance(result, Tensor):
        return result.double()
    return torch.cat([part.double().flatten() for part in result])


def gate(case: Case) -> None:
    """Compare every variant with the truth on the case's inputs.

    Raises:
        GateFailed: naming the variant and its error.
    """
    truth = _whole(case.truth())
    scale = truth.abs().max().clamp_min(1e-30)
    for name, run in {"ours": case.ours, **case.rivals}.items():
        if name in case.unlike:
            continue
        got = _whole(run() if case.part is None else case.part(run()))
        error = float("inf")
        if got.shape == truth.shape:
            error = ((got - truth).abs().max() / scale).item() if truth.numel() else 0.0
        if not error <= case.tolerance:
            raise GateFailed(
                f"{case.name}: {name} is off by {error:.2e} (allowed {case.tolerance})"
            )


def clock(run: Run, repeats: int = 1) -> float:
    """Seconds of one run on the current device, the mean of `repeats` in a row."""
    if torch.cuda.is_available():
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3 / repeats
    began = time.thread_time()
    for _ in range(repeats):
        run()
    return (time.thread_time() - began) / repeats


def measure(case: Case, limits: Limits, seconds: float = 2.0) -> Row:
    """Gate, then interleave all variants, minimum per variant: at least 5 rounds and, up to
    `seconds`, until 5 have brought nothing better by more than a hundredth. What takes longer than
    `LONG` is run once."""
    gate(case)
    variants = {"ours": case.ours, **case.rivals}
    best = {name: clock(run) for name, run in variants.items()}
    short = {name: run for name, run in variants.items() if best[name] < LONG}
    repeats = {name: max(1, int(SHORTEST / max(best[name], 1e-6))) for name in short}
    idle, spent, done = 0, 0.0, 0
    while short and (done < 5 or (idle < 5 and spent < seconds)):
        idle, done = idle + 1, done + 1
        for name, run in short.items():
            took = clock(run, repeats[name])
            spent += took * repeats[name]
            idle = 0 if took < 0.99 * best[name] else idle
            best[name] = min(best[name], took)
    ours = best.pop("ours")
    least = max(case.work / limits.flops, case.traffic / limits.bytes_per_second)
    return Row(case.name, ours, best, least / ours if least else None)


@dataclass(frozen=True)
class Limits:
    """What this machine reaches: a large matmul (float operations/s) and a large copy (bytes/s)."""

    flops: float
    bytes_per_second: float


def limits(device: str, dtype: torch.dtype = torch.float32, size: int = 1024) -> Limits:
    """Measure both once; the copy counts its read and its write."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    source = torch.empty(64 << 20, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    matmul = min(clock(lambda: a @ b) for _ in range(10))
    copy = min(clock(lambda: target.copy_(source)) for _ in range(10))
    return Limits(2 * size**3 / matmul, 2 * source.numel() / copy)


def backward_of(function: Callable[..., Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a scalar function's leaves."""
    return torch.autograd.grad(function(*leaves), leaves)
