"""What several processes on one machine are worth: each kind of work of a run, on 1, 2 and 4 ranks.

    python -m bench.scaling          the table; writes results/bench/scaling-<machine>.json

Each arm is started by torchrun: one process of one thread, one of a thread for each core, and two
and four processes of one thread. Before a kind of work is timed its gradients are compared with
those of one process, bit for bit. Besides, what the ranks' messages cost by themselves: a sum of as
many numbers as the work has gradients. The machine must be quiet otherwise.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.__main__ import RESULTS, machine, machine_file
from bench.steady import work
from worldenv.config import Config
from worldenv.runtime import device as devices
from worldenv.runtime import parallel, ranks
from worldenv.runtime.revision import commit
from worldenv.stages.run import write_json

SECONDS = 6.0
ALONE = "1 process of 1 thread"


def arms() -> dict[str, tuple[int, int]]:
    """Processes, and threads of each, by what they are called."""
    cores = devices.usable_cores()
    return {
        ALONE: (1, 1),
        f"1 process of {cores} threads": (1, cores),
        "2 processes of 1 thread": (2, 1),
        "4 processes of 1 thread": (4, 1),
    }


def seconds(step: Callable[[], object]) -> float:
    """Of one step, the median over `SECONDS` on every rank; all make as many."""
    step()
    begun = time.perf_counter()
    step()
    count = max(3, int(SECONDS / (time.perf_counter() - begun)))
    spent = []
    for _ in range(max(ranks.gather(count))):
        ranks.gather(0)  # all begin together
        begun = time.perf_counter()
        step()
        spent.append(time.perf_counter() - begun)
    return statistics.median(spent)


def measured(step: Callable[[], list[Tensor]]) -> dict[str, object]:
    """Time of a kind of work, a digest of its gradients, and the time of their sum alone."""
    grads = step()
    bits = hashlib.sha256(b"".join(g.contiguous().numpy().tobytes() for g in grads)).hexdigest()
    numbers = sum(g.numel() for g in grads)
    own = torch.ones(max(numbers, 1))
    exchange = 0.0
    if ranks.count() > 1 and numbers:
        exchange = seconds(lambda: ranks.total([own], own))
    return {
        "seconds": seconds(step),
        "gradients": bits if grads else None,
        "numbers": numbers,
        "exchange_seconds": exchange,
    }


def rank(threads: int, out: Path) -> None:
    """One process of an arm; rank 0 writes what it measured."""
    ranks.join(torch.device("cpu"))
    parallel.use_threads(threads)
    found = {name: measured(step) for name, step in work(Config()).items()}
    if ranks.lead():
        out.write_text(json.dumps(found))
    ranks.leave()


def arm(processes: int, threads: int) -> dict[str, dict]:
    """What an arm measured, by kind of work."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        words = [*launch, "-m", "bench.scaling", "--rank", str(threads), "--out", str(out)]
        subprocess.run(words, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return json.loads(out.read_text())


def main() -> int:
    """Parses the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        rank(arguments.rank, arguments.out)
        return 0
    found = {name: arm(*size) for name, size in arms().items()}
    rows = [
        {
            "work": name,
            "arm": of,
            **own[name],
            "speed": found[ALONE][name]["seconds"] / own[name]["seconds"],
            "same_bits": own[name]["gradients"] == found[ALONE][name]["gradients"],
        }
        for of, own in found.items()
        for name in own
    ]
    for row in rows:
        told = f"messages {1000 * row['exchange_seconds']:.1f} ms"
        told += "" if row["same_bits"] else ", OTHER BITS"
        print(
            f"{row['work']:22} {row['arm']:24} {1000 * row['seconds']:7.1f} ms, "
            f"{row['speed']:.2f} times {ALONE}, {told}"
        )
    about = machine()
    report = {"command": "python -m bench.scaling", "commit": commit(), "machine": about}
    write_json(RESULTS / f"scaling-{machine_file(about)}", {**report, "rows": rows})
    return int(not all(row["same_bits"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
