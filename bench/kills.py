"""Random kills of random ranks over all stages of a tiny run, resumed on other numbers of ranks.

    python -m bench.kills --kills 30 --seed 0

Every run is the whole method on `examples/own_benchmark.py`, on 1, 2 or 3 forked ranks. One of them
is killed at a random moment of a random stage; or stopped, so that it only falls silent; or its
memory runs out. All must end within a minute; 1, 2 or 3 ranks go on, until the next kill. Weights,
metrics and evaluation must then be those of one process that nobody disturbed, bit for bit, and
nothing may be lost that a checkpoint, a record or a recorded episode held.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bench.__main__ import origin
from bench.ranked import Ranks
from worldenv import launch
from worldenv.config import Config
from worldenv.envs.benchmark import begun
from worldenv.presets import preset
from worldenv.runtime import checkpoint, parallel, ranks, watch
from worldenv.runtime.errors import UserError
from worldenv.stages import collect, evaluate, pipeline, training
from worldenv.stages.run import Run, write_json

ROOT = Path(__file__).parents[1]
STAGES = ("demonstrations", "sft", "explore-0", "simulator-0", "reflector-0", "fidelity-0",
          "posttrain-0", "evaluate", "the report")  # fmt: skip
EACH = 5  # kills of a run
MINUTE = 60.0
KINDS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "memory": signal.SIGUSR1}


def config(folder: Path) -> Config:
    """The smallest run that has every stage; three groups, for up to three ranks."""
    base = preset("smoke")
    env = begun(base.env, str(ROOT / "examples" / "own_benchmark.py"))
    small = {"width": 16, "layers": 1, "heads": 2, "encoder_channels": 8}
    return replace(
        base,
        run_dir=folder / "run",
        device="cpu",
        threads=1,
        env=replace(env, image_size=32, workers=1),
        collect=replace(base.collect, episodes=4),
        policy=replace(base.policy, **small),
        sft=replace(base.sft, steps=6, batch=4),
        simulator=replace(base.simulator, steps=3, refresh_steps=1, width=24),
        reflector=replace(base.reflector, steps=2, refresh_steps=1),
        posttrain=replace(base.posttrain, rounds=1, iterations=2, contexts=3),
    )


def whole(folder: Path) -> None:
    """A rank: every stage, with a checkpoint after every step."""
    training.CHECKPOINT_SECONDS, pipeline._announce = 0.0, lambda run, marks: None
    with launch.together(settings := config(folder)), closing(Run(settings)) as run:
        (folder / f"begun-{ranks.number()}").touch()
        pipeline.run_all(run)


def _rank(folder: Path) -> None:
    _told(folder)

    def exhausted(*_: object) -> None:
        raise MemoryError("asked for by bench.kills")

    signal.signal(signal.SIGUSR1, exhausted)
    try:
        whole(folder)
    except BaseException as error:  # noqa: BLE001 - a rank ends with whatever it is
        print(f"\nerror: {error}" if isinstance(error, UserError) else f"{error!r}", flush=True)
        os._exit(2)


def _told(folder: Path) -> None:
    """Have rank 0 leave in `resumed.jsonl` what every stage finds to go on from."""

    def note(**found: object) -> None:
        if ranks.lead():
            with (folder / "resumed.jsonl").open("a") as file:
                file.write(json.dumps(found) + "\n")

    resume, left = checkpoint.resume, collect.left_to_record
    play = evaluate.evaluate_policy

    def resumed(path: Path, *rest: object) -> object:
        found = resume(path, *rest)
        note(name=path.name, at=found[1]["step"] if found else 0)
        return found

    def missing(place: Path, mark: str, starts: list, alone: bool) -> list:
        found = left(place, mark, starts, alone)
        note(name=place.name, at=len(starts) - len(found))
        return found

    def played(run: Run, policy: object, starts: list, label: str, *rest: object) -> list:
        if label.startswith("evaluate"):
            done = len(evaluate.held_out_starts(run)) - len(starts)
            note(name=label.removeprefix("evaluate ") + ".json", at=done)
        return play(run, policy, starts, label, *rest)

    checkpoint.resume, collect.left_to_record = resumed, missing
    evaluate.evaluate_policy = played


class Group(Ranks):
    """Ranks of one start of the run."""

    def __init__(self, folder: Path, count: int) -> None:
        super().__init__(lambda _: _rank(folder), folder, count, WORLDENV_JOIN_SECONDS="30")

    def alive(self) -> list[int]:
        return [n for n, process in enumerate(self.ranks) if process.is_alive()]

    def end(self, seconds: float) -> bool:
        """Whether all ended by themselves in that time; they have ended afterwards."""
        until = time.monotonic() + seconds
        while self.alive() and time.monotonic() < until:
            time.sleep(0.05)
        slow = bool(self.alive())
        for process in self.ranks:
            process.kill()
            process.join()
        return not slow


def where(run: Path) -> str:
    """The stage at work, by the notes in the folder."""
    done = {p.name for p in (run / "stages").glob("*.json")}
    for name in STAGES[:-1]:
        if f"{name}.unfinished.json" in done:
            return name
        if f"{name}.json" not in done:
            return f"before {name}"
    return STAGES[-1]


def kept(run: Path) -> dict[str, int]:
    """All that a checkpoint, a file of episodes or of outcomes holds, by its name."""
    found = {}
    for path in run.glob("checkpoints/*.partial.safetensors"):
        with safe_open(path, framework="pt") as file:
            found[path.name] = json.loads(next(iter(file.metadata().values())))["step"]
    for path in run.glob("data/*"):
        found[path.name] = sum(1 for _ in collect.each_episode(path))
    for path in run.glob("evaluation/*.json"):
        name = path.name.split(".")[0] + ".json"
        found[name] = found.get(name, 0) + len(json.loads(path.read_text())["episodes"])
    return found


def outcome(folder: Path) -> dict:
    """All that a run computed: weights, metrics without times, what became of every episode."""
    run = folder / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("time", "frames_per_second")
    results = json.loads((run / "results.json").read_text())
    return {
        "weights": {
            f"{p.name} {k}": t.flatten().view(torch.uint8).numpy().tobytes()
            for p in sorted(run.glob("checkpoints/*.safetensors"))
            for k, t in load_file(p).items()
        },
        "metrics": [{k: v for k, v in row.items() if k not in timed} for row in rows],
        "evaluation": results["evaluation"],
        "fidelity": results["fidelity"],
    }


def lost(folder: Path, before: dict[str, int], seen: int) -> list[str]:
    """What of `before` the starts since line `seen` of resumed.jsonl did not go on from."""
    path = folder / "resumed.jsonl"
    lines = path.read_text().splitlines()[seen:] if path.exists() else []
    rows = [json.loads(line) for line in lines]
    first = {row["name"]: row["at"] for row in reversed(rows)}
    return [f"{name}: {had}, went on from {first[name]}"
            for name, had in before.items() if name in first and first[name] < had]  # fmt: skip


def disturb(
    group: Group, folder: Path, stage: str, within: float, kind: str, draw: random.Random
) -> dict | None:
    """Once a stage is at work, wait `within` seconds and end a rank; what came of it. None where
    the run ended before."""
    place = STAGES.index(stage)
    while len(group.alive()) == len(group.ranks):
        now = where(folder / "run").removeprefix("before ")
        if STAGES.index(now) >= place and len([*folder.glob("begun-*")]) == len(group.ranks):
            break
        time.sleep(0.01)
    time.sleep(within)
    victim = draw.choice(range(len(group.ranks)))
    if len(group.alive()) < len(group.ranks):
        return None
    row = {"kind": kind, "stage": where(folder / "run"), "rank": victim, "of": len(group.ranks)}
    began = time.monotonic()
    os.kill(group.ranks[victim].pid, KINDS[kind])
    if kind == "stop" and len(group.ranks) == 1:
        group.ranks[victim].kill()  # nobody is there to notice
    row["all_ended"] = group.end(MINUTE)
    row["seconds"] = round(time.monotonic() - began, 1)
    row["kept"] = kept(folder / "run")
    said = [(folder / "run" / "ranks" / f"rank-{n}.log") for n in range(1, row["of"])]
    said = [folder / "rank-0.log", *said]
    words = [p.read_text(errors="replace") if p.exists() else "" for p in said]
    named = {n for n, text in enumerate(words) if f"rank {victim} is gone" in text}
    row["named_by"] = sorted(named)
    return row


def one_run(
    number: int, rows: list[dict], kinds: list[str], seconds: dict[str, float],
    draw: random.Random, wanted: dict, report: Callable[[str], None],
) -> list[str]:  # fmt: skip
    """A run killed once for each of `kinds`, then finished; what differs from `wanted`."""
    wrong = []
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        folder = Path(name)
        stages = sorted(draw.sample(STAGES, len(kinds)), key=STAGES.index)
        before, seen = {}, 0
        for stage, kind in zip(stages, kinds, strict=True):
            count = draw.choice((1, 2, 3))
            for path in [
                *folder.glob("rank-*.log"),
                *folder.glob("run/ranks/*"),
                *folder.glob("begun-*"),
            ]:
                path.unlink()
            group = Group(folder, count)
            row = disturb(group, folder, stage, draw.random() * seconds[stage], kind, draw)
            if row is None:
                group.end(MINUTE)
                report(f"run {number}: on {count} ranks ended before its kill")
                texts = "".join(p.read_text() for p in folder.glob("rank-*.log"))
                if not (folder / "run" / "results.json").exists():
                    wrong.append(f"run {number} ended by itself: {texts[-1500:]}")
                break
            row |= {"run": number, "lost": lost(folder, before, seen)}
            wrong += [f"run {number}: lost {x}" for x in row["lost"]]
            if not row["all_ended"]:
                wrong.append(f"run {number}: not ended within a minute: {row}")
            if count > 1 and not row["named_by"]:
                wrong.append(f"run {number}: nobody named the rank: {row}")
            before = row["kept"]
            log = folder / "resumed.jsonl"
            seen = len(log.read_text().splitlines()) if log.exists() else 0
            if rows and rows[-1]["run"] == number:
                rows[-1]["resumed_on"] = count
            rows.append(row)
            report(f"{len(rows):3d} run {number}: {row}")
        count = draw.choice((1, 2, 3))
        if rows and rows[-1]["run"] == number:
            rows[-1]["resumed_on"] = count
        group = Group(folder, count)
        group.end(600)
        wrong += [f"run {number}: lost {x}" for x in lost(folder, before, seen)]
        try:
            got = outcome(folder)
        except OSError:
            text = (folder / "rank-0.log").read_text()
            return [*wrong, f"run {number} did not finish: {text[-1500:]}"]
        for part in wanted:
            if got[part] != wanted[part]:
                wrong.append(f"run {number}: {part} differ from the uninterrupted run's")
        report(f"    run {number}: finished on {count}, {len(wrong)} wrong")
    return wrong


def summary(seed: int, runs: int, rows: list[dict], wrong: list[str]) -> dict:
    """What results.json holds."""
    left = [row for row in rows if row["of"] > 1]
    return {
        **origin("bench.kills", seed=seed, silence_seconds=watch.SILENCE),
        "runs": runs,
        "kills_by_stage": {n: sum(r["stage"].endswith(n) for r in rows) for n in STAGES},
        "kills_with_others_left": len(left),
        "of_these_named": sum(bool(row["named_by"]) for row in left),
        "slowest_end_seconds": max(row["seconds"] for row in rows),
        "wrong": wrong,
        "kills": rows,
    }


def main() -> int:
    """Kills, compares, writes results/kills/results.json; 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--stops", type=int, default=3, help="of them: stopped, not killed")
    parser.add_argument("--memory", type=int, default=3, help="of them: out of memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "kills" / "results.json")
    given = parser.parse_args()
    draw = random.Random(given.seed)
    kinds = ["stop"] * given.stops + ["memory"] * given.memory
    kinds += ["kill"] * (given.kills - len(kinds))
    draw.shuffle(kinds)
    parallel.use_threads(1)
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        whole(Path(name))  # here, so that ranks are forked with all that it imports
        wanted = outcome(Path(name))
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        Group(Path(name), 1).end(900)
        records = Path(name) / "run" / "stages"
        seconds = {n: json.loads((records / f"{n}.json").read_text())["seconds"]
                   for n in STAGES[:-1]} | {STAGES[-1]: 2.0}  # fmt: skip
    print("undisturbed:", seconds, flush=True)
    rows: list[dict] = []
    wrong: list[str] = []
    number = 0
    while len(rows) < given.kills:
        some = kinds[len(rows) : len(rows) + EACH]
        wrong += one_run(number, rows, some, seconds, draw, wanted, lambda s: print(s, flush=True))
        number += 1
        write_json(given.out, summary(given.seed, number, rows, wrong))
    print(*wrong, f"{len(rows)} kills in {number} runs, {len(wrong)} wrong", sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    threading.current_thread().name = "bench.kills"
    sys.exit(main())
