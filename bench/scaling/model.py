"""The time of a step on several ranks, from what one rank computes and what their messages cost.

    step = slow * (largest share * piece + rest) + gather + sum + broadcast

A batch is cut into pieces, of which a rank does at most ceil(pieces / ranks); what follows (the
gradients' sum, its norm, the optimiser) every rank does itself. `slow` is how much longer a piece
takes while as many ranks compute as there are: what cores have in common, and more ranks than
cores. On CPUs gradients are added in a chain of ranks, block by block (`runtime.ranks.total`), and
broadcast along a binomial tree. On GPUs sums are rings: within a node, then among nodes each GPU
its share. Nothing is fitted to the steps that are predicted, and no message is hidden behind
computing: as this code does it, but harsher than FSDP, which fetches the next layer meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BLOCK = 1 << 18  # numbers that `runtime.ranks.total` sends at once
BYTES = 4  # of a number in it
TOLERANCE = 0.15
PAPER = "paper-scaling.json"  # the costs of a `Kind` each, in results/bench
ALONE, TWO = "1 process of 1 thread", "2 processes of 1 thread"
ROLLOUT, UPDATES = "imagination", ("update of the policy", "update of the critic")


@dataclass(frozen=True)
class Work:
    """A step of one kind, in seconds of one core that is alone."""

    piece: float
    rest: float  # what every rank does itself
    numbers: int  # gradients that are summed; 0: none
    pieces: int = 4


@dataclass(frozen=True)
class Messages:
    """What a number of ranks on CPUs tell each other."""

    gather: float  # seconds, of next to nothing
    start: float  # seconds of the sum of one number
    rate: float  # bytes a second from one rank to the next, while all send

    @classmethod
    def of(cls, ranks: int, measured: Mapping[str, float]) -> Messages:
        """From a small gather, and a small and a large sum (`bench.scaling.measure`)."""
        start = measured["sum_of_one_seconds"]
        sent = BYTES * hops(measured["numbers"], ranks)
        return cls(measured["gather_seconds"], start, sent / (measured["sum_seconds"] - start))

    def seconds(self, numbers: int, ranks: int) -> float:
        """Of a step that sums so many numbers: what the pieces returned is gathered, then these."""
        if ranks == 1:
            return 0.0
        return self.gather + bool(numbers) * self.start + BYTES * hops(numbers, ranks) / self.rate


def hops(numbers: int, ranks: int) -> float:
    """Numbers that pass one after the other until every rank has the sum: the last rank gets the
    first block after ranks - 2 others have, then all of them; and the rounds of the broadcast."""
    if ranks == 1:
        return 0
    return numbers + (ranks - 2) * min(numbers, BLOCK) + math.ceil(math.log2(ranks)) * numbers


def step(
    work: Work, ranks: int, slow: float, messages: Messages | None = None, threads: int = 1
) -> float:
    """Seconds of a step on so many ranks of so many threads each."""
    largest = math.ceil(work.pieces / (ranks * threads))
    computed = slow * (largest * work.piece + work.rest)
    return computed + (messages.seconds(work.numbers, ranks) if messages else 0.0)


def compared(arms: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each step of each arm but the one that is alone: predicted beside measured.

    From that come the pieces and the rest; from the others what their messages cost by themselves,
    and pieces without any: one slowness for all kinds, their median.
    """
    alone = arms[ALONE]["work"]
    rows = []
    for arm, found in arms.items():
        ranks, threads = found["processes"], found["threads"]
        if arm == ALONE:
            continue
        slow = slowness(found["work"], alone)
        messages = Messages.of(ranks, found["messages"]) if ranks > 1 else None
        for kind, own in found["work"].items():
            one = alone[kind]
            rest = max(0.0, one["seconds"] - one["pieces"] * one["piece_seconds"])
            of = Work(one["piece_seconds"], rest, own["numbers"], one["pieces"])
            predicted = step(of, ranks, slow, messages, threads)
            rows.append(
                {
                    "work": kind,
                    "arm": arm,
                    "predicted_seconds": predicted,
                    "measured_seconds": own["seconds"],
                    "error": predicted / own["seconds"] - 1,
                }
            )
    return rows


def slowness(own: Mapping[str, Mapping], alone: Mapping[str, Mapping]) -> float:
    """Of a piece beside those of the other ranks, over one that is alone: the median kind's."""
    ratios = sorted(own[k]["piece_seconds"] / alone[k]["piece_seconds"] for k in alone)
    return (ratios[(len(ratios) - 1) // 2] + ratios[len(ratios) // 2]) / 2


def worth(arms: Mapping[str, Mapping[str, Any]]) -> float:
    """The rollout on two processes, over twice one."""
    one, two = (arms[name]["work"][ROLLOUT]["seconds"] for name in (ALONE, TWO))
    return one / two / 2


def against(arms: Mapping[str, Mapping[str, Any]], other: str) -> dict[str, float]:
    """Seconds of each kind on two processes over those of another arm."""
    two, one = (arms[name]["work"] for name in (TWO, other))
    return {kind: two[kind]["seconds"] / one[kind]["seconds"] for kind in one}


def stale(report: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of an iteration of post-training on two processes. "shared": both imagine, then both
    update, as measured. "stale": one imagines while the other updates on the iteration before;
    without a message, in its favour. "least": half of the computing each, the bound of any way.
    """
    arms, times = report["arms"], report["iteration"]  # how often each kind is done
    one, two = (
        {kind: n * arms[arm]["work"][kind]["seconds"] for kind, n in times.items()}
        for arm in (ALONE, TWO)
    )
    slow = slowness(arms[TWO]["work"], arms[ALONE]["work"])
    imagined = slow * one[ROLLOUT]
    updated = slow * sum(one.values()) - imagined
    exchange = sum(n * arms[TWO]["work"][kind]["exchange_seconds"] for kind, n in times.items())
    return {
        "imagined": imagined,
        "updated": updated,
        "shared": sum(two.values()),
        "stale": max(imagined, updated),
        "least": (imagined + updated) / 2,
        "exchange": exchange,
    }


# ---------------------------------------------------------------- on GPUs, on paper


@dataclass(frozen=True)
class Cluster:
    """Nodes of H100 SXM GPUs.

    Peak of dense bf16 and NVLink: NVIDIA's H100 datasheet (989 TFLOP/s; 900 GB/s, both ways
    together). InfiniBand: DGX H100's user guide, a 400 Gb/s adapter for each GPU. Reached of the
    peak: 38 to 43% in training Llama 3 405B on 8,192 and more of them (arXiv 2407.21783, table 4).
    What is reached of a link, and the time of a step of a ring, are assumptions.
    """

    node: int = 8
    flops: float = 989e12
    reached: float = 0.4
    nvlink: float = 450e9  # bytes a second and GPU, each way
    infiniband: float = 50e9
    of_link: float = 0.8
    nvlink_step: float = 3e-6  # seconds
    infiniband_step: float = 10e-6

    def compute(self, flops: float) -> float:
        """Seconds of so many operations on one GPU."""
        return flops / (self.flops * self.reached)

    def scattered(self, size: float, gpus: int, calls: int = 1) -> float:
        """Seconds of gathering from all GPUs, or of summing to a share on each, `size` bytes in
        `calls` parts: a ring in the node, and one among nodes of each GPU's share."""
        here = min(gpus, self.node)
        nodes = math.ceil(gpus / self.node)
        inside = (here - 1) / here * size / (self.nvlink * self.of_link)
        among = (nodes - 1) / nodes * size / here / (self.infiniband * self.of_link)
        steps = (here - 1) * self.nvlink_step + (nodes - 1) * self.infiniband_step
        return inside + among + calls * steps

    def summed(self, size: float, gpus: int) -> float:
        """Seconds until every GPU has the sum: 2 (N - 1) / N of it passes each link of a ring."""
        return 2 * self.scattered(size, gpus)


@dataclass(frozen=True)
class Kind:
    """A step of one kind of work at full size; of these ways:

    "replicated": the gradients' sum in float32. "sharded" (FSDP): weights gathered in bf16 before
    the forward and again before the backward pass of each micro-batch, gradients summed to their
    shares in float32, layer by layer. "gathered": `size` bytes of results, which every rank gets
    through its host's memory.
    """

    name: str
    way: str
    flops: float  # of the whole batch
    samples: int  # in it
    numbers: int = 0  # that are trained, or of weights that are sharded
    layers: int = 1
    micro: int = 0  # samples at a time on a GPU; 0: all of them
    size: float = 0.0

    def largest(self, gpus: int) -> int:
        """Samples of the GPU that has most."""
        return math.ceil(self.samples / gpus)

    def messages(self, cluster: Cluster, gpus: int, gathers: float) -> float:
        """Seconds of a step; gathers: bytes a second that `runtime.ranks.gather` brings."""
        if gpus == 1:
            return 0.0
        if self.way == "replicated":
            return cluster.summed(4 * self.numbers, gpus)
        if self.way == "gathered":
            return self.size / gathers
        passes = math.ceil(self.largest(gpus) / self.micro) if self.micro else 1
        sent = (2 + 2 + 4) * self.numbers
        return passes * cluster.scattered(sent, gpus, 3 * self.layers)

    def ratio(self, cluster: Cluster, gpus: int, gathers: float) -> float:
        """Of messages to computing."""
        own = self.flops * self.largest(gpus) / self.samples
        return self.messages(cluster, gpus, gathers) / cluster.compute(own)

    def first(self, above: float, cluster: Cluster, gathers: float) -> int | None:
        """GPUs from which on messages take more than so many times the computing; None if they do
        not while each has a sample. Whole nodes beyond the first."""
        found = None
        for gpus in reversed(gpu_counts(cluster, self.samples)):
            if self.ratio(cluster, gpus, gathers) <= above:
                break
            found = gpus
        return found


def gpu_counts(cluster: Cluster, most: int) -> list[int]:
    """2, 3 .. a node, then whole nodes, up to `most`."""
    return [
        *range(2, min(cluster.node, most) + 1),
        *range(2 * cluster.node, most + 1, cluster.node),
    ]
