"""What a busy neighbour costs, and that the number of threads changes no bit.

    python -m bench.steady           the table; writes results/bench/steady-<machine>.json
    python -m bench.steady --check   fail where a stage takes more than twice its quiet time

Each kind of work of a run is repeated for a few seconds on every core: quiet, then beside a process
that does nothing but count. Before that its gradients are computed on one, two and four threads and
compared bit for bit (of imagined and real episodes the tests do that). The machine must be quiet
otherwise.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bench.__main__ import RESULTS, machine_file, origin
from worldenv.config import Config
from worldenv.envs.start import Start
from worldenv.runtime import parallel
from worldenv.stages import estimate, store
from worldenv.stages.reality import Reality, Watcher
from worldenv.stages.run import write_json

LIMIT = 2.0
SECONDS = 8.0


@dataclass(frozen=True)
class Work:
    """A unit of a kind of work; one of the `SHARDS` pieces that it is cut into, by itself; what is
    left without the pieces; and the bytes that all ranks are told of each piece."""

    step: Callable[[], list[Tensor]]  # returns the gradients, if there are any
    piece: Callable[[], object]
    rest: Callable[[], object] = lambda: None
    told: int = 0

    def __call__(self) -> list[Tensor]:
        return self.step()


def training_step(module: nn.Module, loss: Callable[[int], Tensor]) -> Work:
    """A step of the loop in stages/training.py."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 0.0, fused=True)

    def step(loss: Callable[[int], Tensor] = loss) -> list[Tensor]:
        torch.manual_seed(0)
        pieces = [lambda k=k: (loss(k), None) for k in range(parallel.SHARDS)]
        parallel.gradients(parameters, pieces, max_norm=1.0)
        optimizer.step()
        return [p.grad for p in parameters if p.grad is not None]

    def piece() -> object:
        return torch.autograd.grad(loss(0), parameters, allow_unused=True)

    def rest() -> object:
        return step(lambda _: sum(p.sum() for p in parameters))

    return Work(step, piece, rest)


def work(config: Config) -> dict[str, Work]:
    """A unit of each kind of work, at the sizes of the default run."""
    torch.manual_seed(0)
    policy, simulator, reflector = (
        store.build(kind, config) for kind in ("policy", "simulator", "reflector")
    )
    shard = lambda batch: batch // parallel.SHARDS  # noqa: E731
    rows, minibatch = shard(config.posttrain.rows), shard(config.posttrain.minibatch)

    imagine = partial(estimate.imagine, simulator, reflector, policy, config, rows)

    def frames() -> list[Tensor]:
        parallel.shared([imagine] * parallel.SHARDS)
        return []

    return {
        "imitation": training_step(
            policy, lambda _: estimate.policy_loss(policy, shard(config.sft.batch))
        ),
        "simulator": training_step(
            simulator,
            lambda _: estimate.simulator_loss(simulator, shard(config.simulator.batch)),
        ),
        "reflector": training_step(
            reflector,
            lambda _: estimate.reflector_loss(reflector, shard(config.reflector.batch)),
        ),
        "update of the policy": training_step(
            policy, lambda _: estimate.policy_loss(policy, minibatch)
        ),
        "imagination": Work(frames, imagine),
    }


def episodes(reality: Reality) -> Callable[[], list[Tensor]]:
    """One real episode for every worker, of an untrained policy."""
    config = reality.config
    policy = store.build("policy", config).eval()
    starts = [Start(config.env.tasks[0], index, 0) for index in range(config.env.workers)]

    def step() -> list[Tensor]:
        reality.roll_out(
            policy,
            starts,
            lambda env: Watcher(),
            seeds=[0] * len(starts),
            noise=None,
            terminate="never",
        )
        return []

    return step


def same_bits(step: Callable[[], list[Tensor]]) -> bool | None:
    """Whether 1, 2 and 4 threads give the same gradients; None of work that has none."""
    results = []
    for count in (1, 2, 4):
        parallel.use_threads(count)
        results.append([g.clone() for g in step()])
    parallel.use_threads()
    if not results[0]:
        return None
    return all(all(map(torch.equal, results[0], other)) for other in results[1:])


def milliseconds(step: Callable[[], object]) -> float:
    """The mean over `SECONDS`: a neighbour is felt on average, not at best."""
    step()
    spent: list[float] = []
    while sum(spent) < SECONDS:
        begun = time.perf_counter()
        step()
        spent.append(time.perf_counter() - begun)
    return 1000 * statistics.fmean(spent)


def measured(name: str, step: Callable[[], list[Tensor]]) -> dict[str, object]:
    """A row of the table, which is printed."""
    bits = same_bits(step)
    quiet = milliseconds(step)
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        busy = milliseconds(step)
    finally:
        neighbour.kill()
        neighbour.wait()
    compared = {True: ", same bits on 1, 2 and 4 threads", False: ", OTHER BITS", None: ""}
    print(
        f"{name:22} {quiet:7.1f} ms quiet, {busy / quiet:.2f} times that beside a neighbour"
        f"{compared[bits]}"
    )
    return {"work": name, "quiet_ms": quiet, "ratio": busy / quiet, "same_bits": bits}


def main() -> int:
    """Parses the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help=f"fail beyond {LIMIT} times")
    arguments = parser.parse_args()
    parallel.use_threads()
    config = Config()
    with closing(Reality(config)) as reality:
        works = {**work(config), "real episodes": episodes(reality)}
        rows = [measured(name, step) for name, step in works.items()]
    report = {**origin("bench.steady", threads=parallel.threads()), "work": rows}
    write_json(RESULTS / f"steady-{machine_file()}", report)
    bad = [r["work"] for r in rows if r["ratio"] > LIMIT or r["same_bits"] is False]
    if arguments.check and bad:
        print(f"more than {LIMIT} times, or other bits: {', '.join(bad)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
