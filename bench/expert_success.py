"""How often the scripted expert succeeds: each task of a suite, from each of the first init states.

    python bench/expert_success.py libero_spatial --noise 0.25

The judge is the benchmark's own success check. Prints a line per task and adds the run to
results/expert.json, in place of an earlier one of the same suite, assets and noise. Official assets
are used where WORLDENV_LIBERO_ASSETS names them, else the primitive pack. Nothing is rendered.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from worldenv.data.libero_tasks import SUITES
from worldenv.envs.expert import demonstrate
from worldenv.envs.libero.assets import resolve_assets
from worldenv.envs.libero.expert import EXPERT_SUITES
from worldenv.envs.libero.robot import ACTION
from worldenv.envs.libero.worker import LiberoSimulator
from worldenv.envs.start import Start
from worldenv.runtime.graphics import adopt

ROOT = Path(__file__).parents[1]


def measure_task(simulator: LiberoSimulator, task: int, arguments: argparse.Namespace) -> dict:
    """Successes and lengths over the starts of one task."""
    results = []
    for index in range(arguments.starts):
        start = Start(task, index, seed=index)
        results.append(
            demonstrate(
                simulator,
                start,
                simulator.expert,
                ACTION,
                noise=arguments.noise,
                rng=np.random.default_rng([task, index]),
                max_steps=arguments.max_steps,
                attempts=arguments.attempts,
            )
        )
    return {
        "task": task,
        "instruction": simulator.instruction,
        "successes": sum(result.success for result in results),
        "episodes": len(results),
        "success": [result.success for result in results],
        "steps": [result.steps for result in results],
    }


def measure(arguments: argparse.Namespace) -> dict:
    """The whole suite, one task after another in this process."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    source = resolve_assets(None, arguments.suite)
    began, tasks = time.perf_counter(), []
    for task in range(len(SUITES[arguments.suite])):
        simulator = LiberoSimulator(arguments.suite, task, assets=source.path)
        tasks.append(row := measure_task(simulator, task, arguments))
        simulator.close()
        print(
            f"{arguments.suite} {task}: {row['successes']}/{row['episodes']}"
            f"  steps {row['steps']}  {row['instruction']}",
            flush=True,
        )
    return {
        "suite": arguments.suite,
        "assets": source.kind,
        "noise": arguments.noise,
        "attempts": arguments.attempts,
        "max_steps": arguments.max_steps,
        "successes": sum(row["successes"] for row in tasks),
        "episodes": sum(row["episodes"] for row in tasks),
        "mean_steps_of_successes": round(
            float(
                np.mean(
                    [n for r in tasks for n, ok in zip(r["steps"], r["success"], strict=True) if ok]
                )
            ),
            1,
        ),
        "tasks": tasks,
        "seconds": round(time.perf_counter() - began, 1),
        "command": " ".join(["python", "bench/expert_success.py", *sys.argv[1:]]),
        "commit": commit.stdout.strip(),
        "machine": {
            "processor": platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
        },
    }


def main() -> None:
    """Parses the command line, measures, and writes the result beside the earlier ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=EXPERT_SUITES)
    parser.add_argument("--starts", type=int, default=5, help="init states per task")
    parser.add_argument("--noise", type=float, default=0.0, help="action noise of the expert")
    parser.add_argument("--attempts", type=int, default=1, help="grasps to try per start")
    parser.add_argument("--max-steps", type=int, default=220)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "expert.json")
    arguments = parser.parse_args()
    adopt()
    run = measure(arguments)
    print(f"{run['suite']} ({run['assets']} assets, noise {run['noise']}): "
          f"{run['successes']}/{run['episodes']}")  # fmt: skip
    runs = json.loads(arguments.out.read_text()) if arguments.out.exists() else []

    def key(row: dict) -> tuple:
        return row["suite"], row["assets"], row["noise"], row["attempts"]

    runs = sorted([row for row in runs if key(row) != key(run)] + [run], key=key)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
