"""What one rank of an arm measures: steps of each kind of work, a piece of each without messages,
and the messages without work."""

import hashlib
import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bench.scaling.model import BLOCK
from bench.steady import Work
from worldenv.config import Config
from worldenv.runtime import parallel, ranks
from worldenv.stages.estimate import IMAGINED

LARGE = 16  # blocks of a large sum, and of a large gather: 16 MB
LEAST = 3  # times that anything is timed


def rollout(imagine: Callable[[], object], config: Config) -> Work:
    """Whole episodes, as `rl.rollout_shards` divides them: as many decisions as one has, and then
    what the policy saw goes to all ranks. imagine: one decision of a piece's rows."""
    count, env = decisions(config), config.env
    rows = config.posttrain.rows // parallel.SHARDS
    shape = (rows * count, env.views, 3, env.image_size, env.image_size)

    def piece() -> Tensor:
        for _ in range(count):
            imagine()
        return torch.zeros(shape, dtype=torch.uint8)

    def step() -> list[Tensor]:
        parallel.shared([piece] * parallel.SHARDS)
        return []

    return Work(step, piece, told=math.prod(shape))


def decisions(config: Config) -> int:
    """Of an imagined episode, about."""
    return round(IMAGINED * config.max_chunks)


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
    """Of ranks that have nothing else to do; sums are of as many parts as a step's."""
    one, many = torch.ones(1), torch.ones(LARGE * BLOCK)
    blocks = [*many.split(BLOCK)]
    small, large, least, most = seconds(
        2 * budget,
        lambda: ranks.gather(0),
        lambda: ranks.gather(many),
        lambda: ranks.total(parts([one]), [one]),
        lambda: ranks.total(parts(blocks), blocks),
    )
    return {
        "gather_seconds": small,
        "gather_large_seconds": large,
        "gather_large_bytes": many.nbytes * ranks.count(),
        "sum_of_one_seconds": least,
        "sum_seconds": most,
        "numbers": many.numel(),
    }


def parts(grads: list[Tensor]) -> list[list[Tensor]]:
    """A rank's own of a step's pieces."""
    return [grads] * math.ceil(parallel.SHARDS / ranks.count())


def measured(work: Work, threads: int, budget: float) -> dict[str, object]:
    """Seconds of a step; of a piece, while every thread and rank does as many as in the step, until
    the slowest is done; on one rank, of what is left without pieces; and of the sum of the step's
    gradients; how many numbers these have, and a digest of them."""
    grads = [g.clone() for g in work.step()]
    bits = hashlib.sha256(b"".join(g.contiguous().numpy().tobytes() for g in grads)).hexdigest()
    exchange = 0.0
    if ranks.count() > 1 and grads:
        (exchange,) = seconds(budget / 4, lambda: ranks.total(parts(grads), grads))
    largest = math.ceil(parallel.SHARDS / (ranks.count() * threads))
    pieces = [work.piece] * max(2, largest * threads)  # one alone would not be in a thread
    step, computed, met, rest = seconds(
        budget,
        work.step,
        lambda: (parallel.run(pieces), ranks.gather(0)),
        lambda: ranks.gather(0),
        work.rest if ranks.count() == 1 else lambda: None,
    )
    return {
        "seconds": step,
        "piece_seconds": (computed - met) * threads / len(pieces),
        "rest_seconds": rest,
        "exchange_seconds": exchange,
        "numbers": sum(g.numel() for g in grads),
        "pieces": parallel.SHARDS,
        "told_bytes": parallel.SHARDS * work.told,
        "gradients": bits if grads else None,
    }
