"""What false stops of the reflector, injected at known rates, cost in post-training.

    python -m bench.false_stops RUN [--rates 0.05 0.2] [--iterations 4] [--out FILE]

In a folder of --work for each rate, the first round of the run's imitated policy is post-trained
anew in the run's own world, without any check in reality; then it plays the tuning episodes that
such a check would. What no false stops lead to is the run itself: its own checks after as many
iterations, and before the first. The run folder is only read.
"""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

from bench.__main__ import origin
from worldenv.config import Config, load
from worldenv.envs.libero.benchmark import TUNING
from worldenv.envs.start import Start
from worldenv.fields import fingerprint
from worldenv.report.statistics import wilson
from worldenv.runtime.errors import UserError
from worldenv.runtime.logging import read_metrics
from worldenv.runtime.revision import commit
from worldenv.runtime.seeds import derive
from worldenv.stages import posttrain, store
from worldenv.stages.evaluate import evaluate_policy
from worldenv.stages.run import Run, read_record, world_of, write_json, write_record

ROOT = Path(__file__).parents[1]


def configured(run: Path, rate: float, given: argparse.Namespace) -> Config:
    """The run's configuration, but for its mistakes, its iterations, its checks and its folder."""
    config = load(run / "config.json")
    rl = replace(
        config.posttrain, false_stops=rate, iterations=given.iterations, real_check_every=0
    )
    return replace(
        config,
        run_dir=given.work / f"{run.name}-{rate:g}-{given.iterations}",
        threads=1,
        posttrain=rl,
    )


def prepared(run: Path, config: Config) -> Path:
    """The folder with what the round reads."""
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
        Start(task, k % TUNING, derive(config.seed, "check fixture", k) % 2**31)
        for task in config.env.tasks
        for k in range(config.posttrain.real_check_episodes)
    ]
    policy = store.load("policy", run.path("checkpoints", f"{name}.safetensors"), run.acting)
    found = evaluate_policy(run, policy, starts, label)
    return sorted(found, key=lambda e: (e["task"], e["start"], e["seed"]))


def measured(run: Path, rate: float, given: argparse.Namespace) -> dict:
    """Real outcomes, and imagined success of every iteration."""
    config = configured(run, rate, given)
    folder = prepared(run, config)
    mark = fingerprint(config.seed, config.posttrain, "false stops")
    path = folder / "stages" / "false-stops.json"
    kept = read_record(path)
    if kept is not None and kept["mark"] == mark:
        return kept
    here = Run(config)
    try:
        if not here.path("checkpoints", "policy-0.safetensors").exists():
            posttrain.run(here, mark, 0)
        rows = read_metrics(folder, "posttrain-0")
        played = outcomes(here, "policy-0", f"rate {rate:g}")
    finally:
        here.close()
    record = {
        "mark": mark,
        "rate": rate,
        "imagined_success": imagined(rows),
        "successes": sum(e["success"] for e in played),
        "episodes": played,
    }
    write_record(path, record)
    return record


def imagined(rows: list[dict]) -> list[float]:
    """Imagined success of each iteration."""
    return [round(row["imagined_success"], 4) for row in rows]


def itself(run: Path, iterations: int) -> dict:
    """Real successes of the run's own policy before and after so many iterations, and imagined
    success of each. UserError if it was not checked then."""
    checks = {row["step"]: row["real"] for row in read_metrics(run, "check-0")}
    if not {0, iterations} <= checks.keys():
        raise UserError(
            f"{run}: expected checks in reality at iterations 0 and {iterations}, got {[*checks]}. "
            "Name a run with posttrain.real_check_every, and one of its checks."
        )
    config = load(run / "config.json")
    count = config.posttrain.real_check_episodes * len(config.env.tasks)
    rows = read_metrics(run, "posttrain-0")[:iterations]
    won = {step: counted(round(real * count), count) for step, real in checks.items()}
    return {"imitation": won[0], "imagined_success": imagined(rows), "trained": won[iterations]}


def counted(successes: int, episodes: int) -> dict:
    """Counts with a 95% interval of their ratio."""
    rate = wilson(successes, episodes)
    interval = [round(rate.low, 4), round(rate.high, 4)]
    return {"successes": successes, "episodes": episodes, "interval": interval}


def main() -> None:
    """Parses the command line, trains, plays, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="finished run")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 0.2])
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "false-stops")
    parser.add_argument("--out", type=Path, default=ROOT / "results/false-stops/results.json")
    given = parser.parse_args()
    without = itself(given.run, given.iterations)
    code, records = commit(), [measured(given.run, rate, given) for rate in given.rates]
    rates = {f"{r['rate']:g}": counted(r["successes"], len(r["episodes"])) for r in records}
    for record in records:
        rates[f"{record['rate']:g}"]["imagined_success"] = record["imagined_success"]
    for name, row in {"none": without, **rates}.items():
        print(name, row)
    write_json(
        given.out,
        {
            **origin("bench.false_stops", threads=1),
            "commit": code,  # as it was when the first run began
            "seed": load(given.run / "config.json").seed,
            "without": without,
            "rates": rates,
            "episodes": {f"{r['rate']:g}": r["episodes"] for r in records},
        },
    )


if __name__ == "__main__":
    main()
