"""What several processes on one machine are worth: each kind of work of a run, on 1, 2 and 4 ranks.

    python -m bench.scaling          the tables; writes results/bench/scaling-<machine>.json
    python -m bench.scaling --whole  besides, a tenth of the default, end to end, into the same file
    python -m bench.scaling --paper  what GPUs would have to do: results/bench/paper-scaling.json
    python -m bench.scaling --check  nothing is measured: the model beside what the file has

Each arm is started by torchrun: one process of one thread, one of a thread for each core, and two
and four processes of one thread, one after the other in every round; of two rounds the quieter
figure counts. A step's gradients are compared with those of one process, bit for bit. The model
(`bench.scaling.model`) predicts every other step from those of the first arm; one that is off by
more than 15%, or other bits, end this with 1. The machine must be quiet otherwise; on a shared one
the first arm alone differs by a quarter from one time to the next.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.__main__ import RESULTS, machine, machine_file
from bench.scaling import measure, paper
from bench.scaling.model import ALONE, ROLLOUT, TOLERANCE, TWO, UPDATE, against, compared, worth
from bench.steady import work
from worldenv.config import Config
from worldenv.presets import preset
from worldenv.runtime import device as devices
from worldenv.runtime import ranks
from worldenv.runtime.revision import commit
from worldenv.stages.run import write_json

WHOLE = (
    "--gate.no-on --gate.held-out 3 --collect.demonstrations 2 --collect.episodes 24 "
    "--sft.steps 100 --simulator.tokenizer-steps 150 --simulator.steps 100 --reflector.steps 60 "
    "--posttrain.iterations 1 --evaluate.starts 20 29 --evaluate.fixture-seeds 1000"
)
"""The default with a tenth of its steps and episodes, and without the gate."""
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]


def threaded() -> str:
    """What the arm of one process on every core is called."""
    return f"1 process of {devices.usable_cores()} threads"


def arms() -> dict[str, tuple[int, int]]:
    """Processes, and threads of each, by what they are called."""
    most = {threaded(): (1, devices.usable_cores())}
    return {ALONE: (1, 1), TWO: (2, 1), **most, "4 processes of 1 thread": (4, 1)}


def rank(threads: int, out: Path, name: str, budget: float) -> None:
    """One process of an arm; rank 0 writes what it measured."""
    ranks.join(torch.device("cpu"))
    config = preset(name)
    works = work(config)
    works[ROLLOUT] = measure.rollout(works.pop("imagination").piece, config)
    found = measure.arm(works, threads, budget)
    if ranks.lead():
        out.write_text(json.dumps(found))
    ranks.leave()


def arm(processes: int, threads: int, said: argparse.Namespace) -> dict[str, Any]:
    """What an arm measured."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        words = ["-m", "bench.scaling", "--rank", str(threads), "--out", str(out)]
        words += ["--preset", said.preset, "--seconds", str(said.seconds)]
        launch = [*LAUNCH, str(processes), *words]
        subprocess.run(launch, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return {"processes": processes, "threads": threads, **json.loads(out.read_text())}


def iteration(config: Config) -> dict[str, float]:
    """How often an iteration of post-training does each kind of work."""
    rl = config.posttrain
    episodes = rl.contexts * rl.group
    decisions = episodes * measure.decisions(config)
    return {ROLLOUT: episodes / rl.rows, UPDATE: rl.epochs * decisions / rl.minibatch}


def quieter(one: Any, other: Any) -> Any:
    """Two measurements of an arm as one: of times the shorter."""
    if isinstance(one, dict):
        return {key: quieter(one[key], other[key]) for key in one}
    if not isinstance(one, float) and one != other:
        raise ValueError(f"expected the same work in every round, got {one} and {other}")
    return min(one, other) if isinstance(one, float) else one


def rows(found: dict[str, dict]) -> list[dict[str, Any]]:
    """A row for each kind of work on each arm."""
    alone = found[ALONE]["work"]
    return [
        {
            "work": kind,
            "arm": name,
            "seconds": own["seconds"],
            "exchange_seconds": own["exchange_seconds"],
            "speed": alone[kind]["seconds"] / own["seconds"],
            "same_bits": own["gradients"] == alone[kind]["gradients"],
        }
        for name, of in found.items()
        for kind, own in of["work"].items()
    ]


def show(report: dict[str, Any]) -> int:
    """Print a report; whether a prediction or the bits are off."""
    bad = 0
    for row in rows(report["arms"]):
        bad += not row["same_bits"]
        print(
            f"{row['work']:22} {row['arm']:24} {1000 * row['seconds']:7.1f} ms, "
            f"{row['speed']:.2f} times {ALONE}, sum {1000 * row['exchange_seconds']:.1f} ms"
            + ("" if row["same_bits"] else ", OTHER BITS")
        )
    for row in compared(report["arms"]):
        off = abs(row["error"]) > TOLERANCE
        bad += off
        print(
            f"{row['work']:22} {row['arm']:24} predicted {1000 * row['predicted_seconds']:7.1f} ms,"
            f" measured {1000 * row['measured_seconds']:7.1f}: {row['error']:+.0%}"
            + (f", BEYOND {TOLERANCE:.0%}" if off else "")
        )
    print(f"rollout, {TWO}: {worth(report['arms']):.0%} of twice {ALONE}")
    for kind, ratio in against(report["arms"], threaded()).items():
        print(f"{kind}, {TWO}: {ratio:.2f} times as long as {threaded()}")
    for name, seconds in report.get("whole", {}).get("total_seconds", {}).items():
        print(f"a tenth of the default, {name}: {seconds:.0f} s")
    return int(bad > 0)


def whole() -> dict[str, Any]:
    """Seconds of each stage of `WHOLE`, on two processes and on one of as many threads."""
    found: dict[str, Any] = {"flags": WHOLE, "stages": {}, "total_seconds": {}}
    for name, (processes, threads) in ((n, s) for n, s in arms().items() if n in (TWO, threaded())):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            words = [str(processes), "-m", "worldenv", *WHOLE.split(), "--run-dir", str(run)]
            subprocess.run([*LAUNCH, *words, "--threads", str(threads)], check=True)
            stages = json.loads((run / "results.json").read_text())["stages"]
            found["stages"][name] = {stage: of["seconds"] for stage, of in stages.items()}
            found["total_seconds"][name] = sum(found["stages"][name].values())
    return found


def main() -> int:
    """Parses the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--whole", action="store_true", help="a tenth of the default, end to end")
    parser.add_argument("--paper", action="store_true", help="FLOPs and bytes at full size")
    parser.add_argument("--check", action="store_true", help="of what was measured before")
    parser.add_argument("--seconds", type=float, default=1.5, help="that each thing is repeated")
    parser.add_argument("--rounds", type=int, default=2, help="of all arms")
    parser.add_argument("--preset", default="default", help="whose sizes; others write nothing")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.rank:
        rank(said.rank, said.out, said.preset, said.seconds)
        return 0
    about = machine()
    path = RESULTS / f"scaling-{machine_file()}"
    origin = {"commit": commit(), "machine": about | {"cores": devices.usable_cores()}}
    if said.paper:
        write_json(paper.FILE, {"command": "python -m bench.scaling --paper", **paper.costs()})
        return 0
    if (said.check or said.whole) and not path.exists():
        parser.error(f"expected {path}, got none. Measure first: python -m bench.scaling")
    if said.check:
        return show(json.loads(path.read_text()))
    if said.whole:
        report = json.loads(path.read_text())
        report["whole"] = {"command": "python -m bench.scaling --whole", **origin, **whole()}
        write_json(path, report)
        return show(report)
    found: dict[str, dict] = {}
    report = {"command": "python -m bench.scaling", **origin}
    report |= {"iteration": iteration(preset(said.preset)), "arms": found}
    if path.exists() and (before := json.loads(path.read_text()).get("whole")):
        report["whole"] = before
    for _ in range(said.rounds):
        for name, (processes, threads) in arms().items():
            new = arm(processes, threads, said)
            found[name] = quieter(found[name], new) if name in found else new
            times = (f"{kind} {of['seconds']:.3f} s" for kind, of in new["work"].items())
            print(f"{name}: {', '.join(times)}", flush=True)
            if said.preset == "default" and len(found) == len(arms()):
                write_json(path, report)
    return show(report)


if __name__ == "__main__":
    sys.exit(main())
