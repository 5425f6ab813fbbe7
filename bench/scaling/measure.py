"""What one rank of an arm measures: steps of each kind of work, a piece of each without messages,
and the messages without work."""

import hashlib
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from bench.scaling.model import BLOCK
from bench.steady import Work
from worldenv.runtime import parallel, ranks

LARGE = 16 * BLOCK  # numbers of a large sum, and of a large gather: 16 MB
LEAST = 3  # times that anything is timed


def seconds(budget: float, *works: Callable[[], object]) -> list[float]:
    """Of each, the shortest of what `budget` seconds allow, at least `LEAST`: made in turn, so that
    what else the machine does in a moment does not fall on one alone. All ranks begin each
    together, and make as many."""
    spent: list[list[float]] = []
    count = 1
    while len(spent) < count:
        spent.append([])
        for work in works:
            ranks.gather(0)
            begun = time.perf_counter()
            work()
            spent[-1].append(time.perf_counter() - begun)
        if len(spent) == 1:
            count = max(LEAST, *ranks.gather(int(budget / sum(spent[0]))))
    return [min(times) for times in zip(*spent, strict=True)]


def arm(works: Mapping[str, Work], threads: int, budget: float) -> dict[str, dict]:
    """What a rank of an arm finds; each of them calls it."""
    parallel.use_threads(threads)
    return {
        "messages": messages(budget) if ranks.count() > 1 else {},
        "work": {name: measured(work, threads, budget) for name, work in works.items()},
    }


def messages(budget: float) -> dict[str, float]:
    """Of ranks that have nothing else to do."""
    one, many = torch.ones(1), torch.ones(LARGE)
    small, large, least, most = seconds(
        2 * budget,
        lambda: ranks.gather(0),
        lambda: ranks.gather(many),
        lambda: ranks.total([one], one),
        lambda: ranks.total([many], many),
    )
    return {
        "gather_seconds": small,
        "gather_large_seconds": large,
        "gather_large_bytes": many.nbytes * ranks.count(),
        "sum_of_one_seconds": least,
        "sum_seconds": most,
        "numbers": LARGE,
    }


def measured(work: Work, threads: int, budget: float) -> dict[str, object]:
    """Seconds of a step, of a piece on every thread and rank at once, and of the sum of as many
    numbers as the step has gradients; how many, and a digest of them."""
    grads = work.step()
    bits = hashlib.sha256(b"".join(g.contiguous().numpy().tobytes() for g in grads)).hexdigest()
    numbers = sum(g.numel() for g in grads)
    exchange = 0.0
    if ranks.count() > 1 and numbers:
        own = torch.ones(numbers)
        (exchange,) = seconds(budget / 4, lambda: ranks.total([own], own))
    # Two in turn on each thread: in the pool's threads, as a step's are.
    pieces = [work.piece] * 2 * threads
    step, two = seconds(budget, work.step, lambda: parallel.run(pieces))
    return {
        "seconds": step,
        "piece_seconds": statistics.mean(ranks.gather(two / 2)),
        "exchange_seconds": exchange,
        "numbers": numbers,
        "pieces": parallel.SHARDS,
        "gradients": bits if grads else None,
    }
