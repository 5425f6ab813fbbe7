"""The time of a step on several ranks, from what one rank computes and what their messages cost.

    step = slow * (largest share * piece + rest) + gather + sum

A batch is cut into pieces, of which a rank does at most ceil(pieces / ranks); what follows (the
norm of the gradients, the optimiser) every rank does itself. `slow` is how much longer a piece of
this kind takes while as many ranks compute as there are, until the last of them is done: what cores
have in common, more ranks than cores, and the wait for the slowest. On CPUs gradients are added in
a chain of ranks (`runtime.ranks.total`), and each block is broadcast along a binomial tree while
the next ones are added. On GPUs sums are rings: within a node, then among nodes each GPU its share.
Nothing is fitted to the steps that are predicted, and no message is hidden behind computing: as
this code does it, but harsher than FSDP, which fetches the next layer meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BLOCK = 1 << 18  # numbers that `runtime.ranks.total` sends at once, about
BYTES = 4  # of a number in it
TOLERANCE = 0.15
PAPER = "paper-scaling.json"  # the costs of a `Kind` each, in results/bench
ALONE, TWO = "1 process of 1 thread", "2 processes of 1 thread"
ROLLOUT, UPDATE = "rollout", "update of the policy"


@dataclass(frozen=True)
class Work:
    """A step of one kind, in seconds of one core that is alone."""

    piece: float
    rest: float  # what every rank does itself
    numbers: int  # gradients that are summed; 0: none
    pieces: int = 4
    told: int = 0  # bytes of results that every rank gets


@dataclass(frozen=True)
class Messages:
    """What a number of ranks on CPUs tell each other."""

    gather: float  # seconds, of next to nothing
    start: float  # seconds of the sum of one number
    rate: float  # bytes a second from one rank to the next, while all send
    gathered: float = math.inf  # bytes a second of results, of all ranks together

    @classmethod
    def of(cls, ranks: int, measured: Mapping[str, float]) -> Messages:
        """From small and large gathers and sums (`bench.scaling.measure`)."""
        start = measured["sum_of_one_seconds"]
        rate = BYTES * hops(measured["numbers"], ranks) / (measured["sum_seconds"] - start)
        gathered = measured["gather_large_bytes"] / measured["gather_large_seconds"]
        return cls(measured["gather_seconds"], start, rate, gathered)

    def seconds(self, work: Work, ranks: int) -> float:
        """Of a step: what the pieces returned is gathered, then the gradients are summed."""
        if ranks == 1:
            return 0.0
        summed = bool(work.numbers) * self.start + BYTES * hops(work.numbers, ranks) / self.rate
        return self.gather + work.told / self.gathered + summed


def hops(numbers: int, ranks: int) -> float:
    """Numbers that pass one after the other until every rank has the sum: of the rank that sends
    most, the last, as many as the broadcast has rounds; the first block has come to it from rank to
    rank before, and its last goes on for the remaining rounds."""
    if ranks == 1:
        return 0
    rounds = math.ceil(math.log2(ranks))
    return rounds * numbers + (ranks - 2 + rounds) * min(numbers, BLOCK)


def step(
    work: Work, ranks: int, slow: float, messages: Messages | None = None, threads: int = 1
) -> float:
    """Seconds of a step on so many ranks of so many threads each."""
    largest = math.ceil(work.pieces / (ranks * threads))
    computed = slow * (largest * work.piece + work.rest)
    return computed + (messages.seconds(work, ranks) if messages else 0.0)


def compared(arms: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each step of each arm but the one that is alone: predicted beside measured.

    From that come the pieces and the rest; from the others what their messages cost by themselves,
    and how much longer a piece takes there.
    """
    alone = arms[ALONE]["work"]
    rows = []
    for arm, found in arms.items():
        ranks, threads = found["processes"], found["threads"]
        if arm == ALONE:
            continue
        messages = Messages.of(ranks, found["messages"]) if ranks > 1 else None
        for kind, own in found["work"].items():
            one = alone[kind]
            of = Work(
                one["piece_seconds"],
                one["rest_seconds"],
                own["numbers"],
                one["pieces"],
                own["told_bytes"],
            )
            slow = own["piece_seconds"] / one["piece_seconds"]
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
    times = report["iteration"]  # how often each kind is done
    one, two = (report["arms"][arm]["work"] for arm in (ALONE, TWO))
    beside = {  # seconds of one process, while another computes too
        kind: n * one[kind]["seconds"] * two[kind]["piece_seconds"] / one[kind]["piece_seconds"]
        for kind, n in times.items()
    }
    imagined = beside.pop(ROLLOUT)
    updated = sum(beside.values())
    exchange = sum(n * two[kind]["exchange_seconds"] for kind, n in times.items())
    return {
        "imagined": imagined,
        "updated": updated,
        "shared": sum(n * two[kind]["seconds"] for kind, n in times.items()),
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
