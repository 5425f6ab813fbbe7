"""Where a run's time goes: its stages, and the ops inside each kind of work.

    python -m bench.profile runs/default   writes results/profile/<machine>.json

Stages: seconds of a finished run, from its results.json. Ops: shares of one thread's time in a unit
of each kind of work of `bench.steady`, by torch's profiler.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from bench.__main__ import machine_file, origin
from bench.steady import work
from worldenv.config import Config
from worldenv.runtime import parallel
from worldenv.stages.run import write_json

FOLDER = Path(__file__).parents[1] / "results" / "profile"
SHOWN = 10  # ops of each kind of work


def ops(step: Callable[[], object]) -> dict[str, float]:
    """Share of each op's own time in the work's, the largest first."""
    step()
    threads = _ExperimentalConfig(profile_all_threads=True)  # pieces run in the pool's
    with profile(activities=[ProfilerActivity.CPU], experimental_config=threads) as trace:
        for _ in range(3):
            step()
    own = {e.key: e.self_cpu_time_total for e in trace.key_averages()}
    whole = sum(own.values())
    largest = sorted(own, key=own.get, reverse=True)[:SHOWN]
    return {name: round(own[name] / whole, 3) for name in largest}


def main() -> int:
    """Parses the command line, profiles, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run on this machine")
    run = parser.parse_args().run
    results = json.loads((run / "results.json").read_text())
    stages = {name: record["seconds"] for name, record in results["stages"].items()}
    total = sum(stages.values())
    for name, seconds in stages.items():
        print(f"{name:16} {seconds:8.1f} s  {seconds / total:4.0%}")
    print(f"{'in all':16} {total:8.1f} s")
    parallel.use_threads(1)
    shares = {}
    for name, step in work(Config()).items():
        shares[name] = ops(step)
        print(f"{name}: " + ", ".join(f"{op} {share:.0%}" for op, share in shares[name].items()))
    path = FOLDER / machine_file()
    write_json(
        path,
        {
            **origin("bench.profile"),
            "run": {k: results[k] for k in ("command", "commit", "seed", "machine")},
            "stage_seconds": stages,
            "op_shares": shares,
        },
    )
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
