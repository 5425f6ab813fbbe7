"""Has imitation converged? Success in the real benchmark against the number of optimiser steps.

    python bench/sft_steps.py --seed 0 1 2 3 4 --steps 1000 2000

Trains the default preset's policy anew for each number of steps, on the same demonstrations, and
evaluates it on the tuning starts 0-19, and, where results/default/seed-N.json exists, on the same
held-out episodes as that run's policies (which decide nothing). Adds the runs to
results/default/sft-steps.json, in place of earlier ones of the same seed and number of steps; a
finished training is not repeated.
"""

import argparse
import copy
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from worldenv.config import Config, EvaluateConfig, SFTConfig
from worldenv.envs.libero.benchmark import TUNING
from worldenv.fields import to_dict
from worldenv.models.policy import Policy
from worldenv.report.statistics import paired_difference, wilson
from worldenv.runtime import device as devices
from worldenv.runtime.revision import commit
from worldenv.stages import pipeline, store
from worldenv.stages.evaluate import evaluate_policy, held_out_starts
from worldenv.stages.results import success_of
from worldenv.stages.run import Run, write_json

ROOT = Path(__file__).parents[1]


def measure(seed: int, steps: int, fixture_seeds: tuple[int, ...], folder: Path) -> dict:
    """Imitate for `steps` steps and count the successes."""
    config = Config(
        seed=seed,
        run_dir=folder / f"seed-{seed}-steps-{steps}",
        sft=SFTConfig(steps=steps),
        evaluate=EvaluateConfig(starts=(0, TUNING), fixture_seeds=fixture_seeds),
    )
    run = Run(config)
    began = time.perf_counter()
    pipeline.run_stage(run, "demonstrations")
    trained = pipeline.run_stage(run, "sft")
    policy = store.load("policy", run.dir / "checkpoints" / "policy-sft.safetensors")
    label = f"seed {seed}, {steps} steps"
    outcomes = evaluate_policy(run, policy, held_out_starts(run), label)
    rival = ROOT / "results" / "default" / f"seed-{seed}.json"
    held_out = None
    if rival.exists():
        held_out = against_posttrained(run, policy, label, json.loads(rival.read_text()))
    run.close()
    wins = sum(outcome["success"] for outcome in outcomes)
    rate = wilson(wins, len(outcomes))
    print(f"seed {seed}, {steps} steps: {wins}/{len(outcomes)} ({rate.low:.0%} to {rate.high:.0%})")
    return {
        "seed": seed,
        "steps": steps,
        "l1": round(trained["l1"], 5),
        "successes": wins,
        "episodes": len(outcomes),
        "wilson": [round(rate.low, 4), round(rate.high, 4)],
        "held_out": held_out,
        "sft_seconds": trained["seconds"],
        "seconds": round(time.perf_counter() - began, 1),
        "config": to_dict(replace(config, run_dir=Path(config.run_dir.name))),
        "command": " ".join(["python", "bench/sft_steps.py", *sys.argv[1:]]),
        "commit": commit(),
        "machine": devices.describe(),
    }


def against_posttrained(run: Run, policy: Policy, label: str, results: dict) -> dict:
    """The policy on the held-out episodes of a default run, and what its post-trained one gains."""
    run = copy.copy(run)
    run.config = replace(run.config, evaluate=EvaluateConfig())
    outcomes = results["evaluation"]["sft"]
    if run.config.sft.steps != SFTConfig().steps:
        outcomes = evaluate_policy(run, policy, held_out_starts(run), f"{label}, held out")
    outcomes = sorted(outcomes, key=lambda e: (e["task"], e["start"], e["seed"]))
    both = {"sft": outcomes, "posttrained": results["evaluation"]["posttrained"]}
    found = success_of(both, "success")
    print(f"{label}, held out: {found}")
    return found


def summarise(rows: list[dict], fewer: int, more: int) -> None:
    """Prints the mean change of success over the seeds that have both, with its t interval."""
    parts = {
        "tuning starts": lambda row: row,
        "held out": lambda row: (row["held_out"] or {}).get("sft"),
    }
    for name, part in parts.items():
        found = {(row["seed"], row["steps"]): part(row) for row in rows if part(row)}
        rate = {key: counts["successes"] / counts["episodes"] for key, counts in found.items()}
        pairs = {
            s: (rate[s, n], rate[s, more]) for s, n in rate if n == fewer and (s, more) in rate
        }
        if len(pairs) < 2:
            continue
        change = paired_difference(*zip(*pairs.values(), strict=True), list(pairs))
        print(
            f"{more} instead of {fewer} steps, {name}, {len(pairs)} seeds: "
            f"{100 * change.mean:+.1f} points ({100 * change.low:+.1f} to {100 * change.high:+.1f})"
        )


def main() -> None:
    """Parses the command line, measures, and writes the results beside the earlier ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="seeds of the pipeline")
    parser.add_argument("--steps", type=int, nargs="+", default=[1000, 2000])
    parser.add_argument("--fixture-seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "sft-steps")
    parser.add_argument("--out", type=Path, default=ROOT / "results/default/sft-steps.json")
    arguments = parser.parse_args()
    rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    for seed in arguments.seed:
        for steps in arguments.steps:
            row = measure(seed, steps, tuple(arguments.fixture_seeds), arguments.folder)
            rows = [r for r in rows if (r["seed"], r["steps"]) != (seed, steps)] + [row]
            write_json(arguments.out, sorted(rows, key=lambda r: (r["seed"], r["steps"])))
    summarise(rows, min(arguments.steps), max(arguments.steps))


if __name__ == "__main__":
    main()
