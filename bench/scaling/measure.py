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


def seconds(work: Callable[[], object], budget: float) -> float:
    """Of one time, the median over `budget` seconds or `LEAST` times; all ranks begin each
    together, and make as many."""
    spent: list[float] = []
    count = 1
    while len(spent) < count:
        ranks.gather(0)
        begun = time.perf_counter()
        work()
        spent.append(time.perf_counter() - begun)
        if len(spent) == 1:
            count = max(LEAST, *ranks.gather(int(budget / spent[0])))
    return statistics.median(spent)


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
    return {
        "gather_seconds": seconds(lambda: ranks.gather(0), budget / 4),
        "gather_large_seconds": seconds(lambda: ranks.gather(many), budget / 2),
        "gather_large_bytes": many.nbytes * ranks.count(),
        "sum_of_one_seconds": seconds(lambda: ranks.total([one], one), budget / 4),
        "sum_seconds": seconds(lambda: ranks.total([many], many), budget),
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
        exchange = seconds(lambda: ranks.total([own], own), budget / 4)
    # Two in turn on each thread: in the pool's threads, as a step's are.
    piece = seconds(lambda: parallel.run([work.piece] * 2 * threads), budget / 2) / 2
    return {
        "seconds": seconds(work.step, budget),
        "piece_seconds": statistics.mean(ranks.gather(piece)),
        "exchange_seconds": exchange,
        "numbers": numbers,
        "pieces": parallel.SHARDS,
        "gradients": bits if grads else None,
    }
