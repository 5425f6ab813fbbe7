"""What false stops of the reflector, injected at known rates, cost in post-training.

    python -m bench.false_stops RUN [--rates 0 0.05 0.2] [--iterations 4] [--out FILE]

In a folder of --work for each rate, the first round of the run's imitated policy is post-trained
anew in the run's own world, without any check in reality; then it plays the tuning episodes that
such a check would. The run folder is only read.
"""

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from bench.__main__ import machine
from worldenv.config import Config, load
from worldenv.envs.start import Start
from worldenv.fields import fingerprint
from worldenv.report.statistics import paired_difference, wilson
from worldenv.runtime.logging import read_metrics
from worldenv.runtime.revision import commit
from worldenv.runtime.seeds import derive
from worldenv.stages import posttrain, store
from worldenv.stages.collect import TUNING_STARTS
from worldenv.stages.evaluate import evaluate_policy
from worldenv.stages.run import Run, read_record, world_of, write_json, write_record

ROOT = Path(__file__).parents[1]


def configured(run: Path, rate: float, given: argparse.Namespace) -> Config:
    """The run's configuration, but for its mistakes, its iterations, its checks and its folder."""
    config = load(run / "config.json")
    rl = replace(
        config.posttrain, false_stops=rate, iterations=given.iterations, real_check_every=0
    )
    return replace(config, run_dir=given.work / f"{run.name}-{rate:g}", threads=1, posttrain=rl)


def trained(run: Path, config: Config) -> Path:
    """The folder with what the round reads and the policy that it makes."""
    folder = config.run_dir
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    if not (folder / "data").exists():
        (folder / "data").symlink_to((run / "data").resolve())
    for name in ("policy-sft", world_of(config, 0), "reflector-0"):
        shutil.copyfile(
            run / "checkpoints" / f"{name}.safetensors",
            folder / "checkpoints" / f"{name}.safetensors",
        )
    return folder


def outcomes(run: Run, name: str, label: str) -> list[dict]:
    """The tuning episodes of a check in reality, by the policy in checkpoints/<name>."""
    config = run.config
    starts = [
        Start(task, k % TUNING_STARTS, derive(config.seed, "check fixture", k) % 2**31)
        for task in config.env.tasks
        for k in range(config.posttrain.real_check_episodes)
    ]
    policy = store.load("policy", run.path("checkpoints", f"{name}.safetensors"), run.acting)
    found = evaluate_policy(run, policy, starts, label)
    return sorted(found, key=lambda e: (e["task"], e["start"], e["seed"]))


def measured(run: Path, rate: float, given: argparse.Namespace) -> dict:
    """Real outcomes before and after, and imagined success of every iteration."""
    config = configured(run, rate, given)
    folder = trained(run, config)
    mark = fingerprint(config.seed, config.posttrain, "false stops")
    path = folder / "stages" / "false-stops.json"
    kept = read_record(path)
    if kept is not None and kept["mark"] == mark:
        return kept
    here = Run(config)
    try:
        record = posttrain.run(here, mark, 0)
        rows = read_metrics(folder, "posttrain-0")
        after = outcomes(here, "policy-0", f"rate {rate:g}")
        before = outcomes(here, "policy-sft", "imitation") if rate == given.rates[0] else None
    finally:
        here.close()
    record = {
        "mark": mark,
        "rate": rate,
        "imagined_success": [round(row["imagined_success"], 4) for row in rows],
        "contexts": record["contexts"],
        "after": after,
        "before": before,
    }
    write_record(path, record)
    return record


def summary(record: dict, reference: list[dict]) -> dict:
    """Counts, an interval, and the paired difference to the outcomes `reference`."""
    won = [e["success"] for e in record["after"]]
    rate = wilson(sum(won), len(won))
    pairs = ([float(e["success"]) for e in rows] for rows in (reference, record["after"]))
    change = paired_difference(*pairs, [(e["task"], e["start"]) for e in reference])
    return {
        "rate": record["rate"],
        "imagined_success": record["imagined_success"],
        "successes": sum(won),
        "episodes": len(won),
        "interval": [round(rate.low, 4), round(rate.high, 4)],
        "difference": [round(x, 4) for x in (change.mean, change.low, change.high)],
    }


def main() -> None:
    """Parses the command line, trains, plays, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="finished run")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0, 0.05, 0.2])
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "false-stops")
    parser.add_argument("--out", type=Path, default=ROOT / "results/false-stops/results.json")
    given = parser.parse_args()
    code, records = commit(), [measured(given.run, rate, given) for rate in given.rates]
    first = records[0]
    rows = [summary(record, first["after"]) for record in records]
    for row in rows:
        print(row)
    arguments = (Path(a).name if a.startswith("/") else a for a in sys.argv[1:])
    write_json(
        given.out,
        {
            "command": " ".join(["python", "-m", "bench.false_stops", *arguments]),
            "commit": code,
            "machine": {**machine(), "threads": 1},
            "seed": load(given.run / "config.json").seed,
            "imitation": {
                "successes": sum(e["success"] for e in first["before"]),
                "episodes": len(first["before"]),
            },
            "rates": rows,
            "episodes": {f"{r['rate']:g}": r["after"] for r in records} | {"sft": first["before"]},
        },
    )


if __name__ == "__main__":
    main()
