"""Does the gate let good worlds pass and refuse spoiled ones?

    python -m bench.gate RUN... [--spoil RUN...] [--work DIR] [--out FILE]

Every round's world of the finished runs is measured as the stage fidelity does, and put before the
gate. Of each run after --spoil the first round is also trained anew, spoiled on purpose (`ARMS`),
in a folder of --work for each arm, which keeps what is done: the same command goes on, or does some
of the arms. What is not spoiled is the run's own. Thresholds for real frames are calibrated by the
explored episodes in every arm; that in imagination is not, for no measure of the gate reads it. The
run folders are only read, and may be of versions before real frames had a threshold of their own.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn

from bench.__main__ import origin
from bench.thresholds import model
from worldenv.config import Config
from worldenv.data.episode import Episode
from worldenv.fields import fingerprint
from worldenv.gate import GateConfig
from worldenv.runtime.seeds import derive
from worldenv.stages import (
    collect,
    fidelity,
    gate,
    reflector,
    simulator,
    store,
    thresholds,
    training,
)
from worldenv.stages.run import Run, open_run, read_record, world_of, write_json, write_record

ROOT = Path(__file__).parents[1]
Round = tuple[list[Episode], list[Episode], list[Episode]]


def shuffled(run: Run, number: int) -> Round:
    """A round whose actions are dealt out anew, chunk by chunk, among all its episodes."""
    *trained, held = collect.load_round(run, number)
    size = run.config.env.chunk
    episodes = [e for part in trained for e in part]
    whole = np.concatenate([e.actions for e in episodes])
    end = len(whole) // size * size
    order = np.random.default_rng(derive("shuffled", run.config.seed)).permutation(end // size)
    whole[:end] = whole[:end].reshape(-1, size, whole.shape[1])[order].reshape(end, -1)
    ends = np.cumsum([len(e.actions) for e in episodes])[:-1]
    for episode, actions in zip(episodes, np.split(whole, ends), strict=True):
        episode.actions = actions
    return *trained, held


def demonstrated(run: Run, number: int) -> Round:
    """A round that knows of no explored episode."""
    demonstrations, _, held = collect.load_round(run, number)
    return demonstrations, [], held


def blank(run: Run, mark: str, number: int) -> dict:
    """In place of the simulator's training: none."""
    demonstrations, explored, _ = collect.load_round(run, number)
    made = training.begin(run, "simulator", number, [*demonstrations, *explored])
    store.save("simulator", made, run.path("checkpoints", f"simulator-{number}.safetensors"))
    return {}


def unexplored(*arguments) -> dict:
    """The reflector's training without the explored episodes and their replays."""
    return LEARN(*arguments[:-1], [])


LEARN = reflector._learn
ARMS: dict[str, dict[str, Callable]] = {
    "reflector untrained": {"reflector._learn": lambda *_: {}},
    "simulator untrained": {"simulator.run": blank},
    "reflector of demonstrations alone": {"reflector._learn": unexplored},
    "simulator of shuffled actions": {"simulator.load_round": shuffled},
    "simulator of demonstrations alone": {"simulator.load_round": demonstrated},
}
"""What of the stages is replaced; what is not made anew is the run's own."""


@contextlib.contextmanager
def patched(changes: dict[str, Callable]) -> Iterator[None]:
    """The stages, changed so."""
    with contextlib.ExitStack() as stack:
        for name, other in changes.items():
            stage, attribute = name.split(".")
            whole = {"simulator": simulator, "reflector": reflector}[stage]
            stack.enter_context(mock.patch.object(whole, attribute, other))
        stack.enter_context(
            mock.patch.object(thresholds, "imagined", return_value={"threshold": 0.5})
        )
        yield


def mark_of(run: Run, what: str) -> str:
    """Of what a world came from: not of what the gate asks of it."""
    config = run.config
    parts = (config.collect, config.simulator, config.reflector)
    return fingerprint(config.seed, *parts, what, "false_stops")


def prepared(run: Run, folder: Path, made: set[str]) -> Config:
    """The folder with what the round reads and what of it is not made anew."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    if not (folder / "data").exists():
        (folder / "data").symlink_to((run.dir / "data").resolve())
    names = {
        "policy": "policy-sft",
        "simulator": world_of(run.config, 0),
        "reflector": "reflector-0",
    }
    for kind, name in names.items():
        path = folder / "checkpoints" / f"{name}.safetensors"
        if kind not in made and not path.exists():
            store.save(kind, model(run, kind, name), path)
    return replace(run.config, run_dir=folder, threads=1)


def spoiled(run: Run, arm: str, work: Path) -> dict:
    """The measurements of the first round's world, spoiled."""
    folder, mark = work / f"{run.dir.name}-{arm.replace(' ', '-')}", mark_of(run, arm)
    path = folder / "stages" / "spoiled.json"
    kept = read_record(path)
    if kept is not None and kept["mark"] == mark:
        return kept["record"]
    made = {name.split(".")[0] for name in ARMS[arm]}
    here = Run(prepared(run, folder, made))
    files = {kind: folder / "checkpoints" / f"{kind}-0.safetensors" for kind in made}
    try:
        with patched(ARMS[arm]):
            if "simulator" in made and not files["simulator"].exists():
                simulator.run(here, mark, 0)
            if "reflector" in made and not files["reflector"].exists():
                reflector.run(here, mark, 0, folder / "checkpoints" / "policy-sft.safetensors")
        record = measured(here, model(here, "simulator", world_of(run.config, 0)), 0)
    finally:
        here.close()
    write_record(path, {"mark": mark, "record": record})
    return record


def measured(run: Run, world: nn.Module, number: int) -> dict:
    """What the stage fidelity would record. A reflector that lacks it gets its threshold for real
    frames."""
    judge = model(run, "reflector", f"reflector-{number}")
    _, explored, _ = collect.load_round(run, number)
    calibrated = reflector.calibrate_on_real(run, number, judge, explored)
    record = fidelity.measure(run, number, world, judge)
    record["reflector"].pop("roc")
    return {**record, "calibrated": calibrated}


def good(run: Run, work: Path, first: bool) -> Iterator[tuple[int, dict]]:
    """(round, measurements) of a run's own worlds; first: of the first round's alone."""
    for number in range(1 if first else run.config.posttrain.rounds):
        path = work / f"{run.dir.name}-round-{number}.json"
        mark = mark_of(run, str(number))
        kept = read_record(path)
        if kept is None or kept["mark"] != mark:
            world = model(run, "simulator", world_of(run.config, number))
            kept = {"mark": mark, "record": measured(run, world, number)}
            write_record(path, kept)
        yield number, kept["record"]


def verdicts(worlds: dict[str, dict]) -> dict[str, dict]:
    """By world: the gate's rows by the configuration's defaults, and what it is refused for."""
    said = {}
    for name, world in worlds.items():
        rows = gate.judged(world["record"], GateConfig())
        failed = [row["measure"] for row in rows if not row["passed"]]
        said[name] = {"good": world["good"], "failed": failed, "measures": rows}
    return said


def table(said: dict[str, dict]) -> str:
    """Markdown: every measure's value and the bound it is judged by, and the verdict."""
    names = [measure.limit for measure in gate.MEASURES]
    lines = [f"| world | {' | '.join(names)} | refused for |", "|---" * (len(names) + 2) + "|"]
    for name, world in said.items():
        cells = []
        for row in world["measures"]:
            bound = row["low"] if row["least"] else row["high"]
            shown = " ".join("none" if x is None else f"{x:.3g}" for x in (row["value"], bound))
            cells.append(shown if row["passed"] else f"**{shown}**")
        reasons = ", ".join(world["failed"]) or "passes"
        lines.append(f"| {name} | {' | '.join(cells)} | {reasons} |")
    return "\n".join(lines)


def report(out: Path, worlds: dict[str, dict]) -> None:
    """Writes what is known so far."""
    found = {
        **origin("bench.gate", threads=1),
        "verdicts": verdicts(worlds),
        "records": {name: world["record"] for name, world in worlds.items()},
    }
    write_json(out, found)


def main() -> None:
    """Parses the command line, trains, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="*", help="finished runs")
    parser.add_argument("--spoil", type=Path, nargs="*", default=[], help="runs to spoil")
    parser.add_argument("--first", action="store_true", help="of the runs, the first round alone")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS], metavar="ARM")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "gate")
    parser.add_argument("--out", type=Path, default=ROOT / "results/gate/results.json")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    worlds = {}
    for folder in given.runs:
        run = open_run(folder, threads=1)
        for number, record in good(run, given.work, given.first):
            name = f"seed {run.config.seed}, {folder.name}, round {number}"
            worlds[name] = {"good": True, "record": record}
        run.close()
    for folder in given.spoil:
        run = open_run(folder, threads=1)
        for arm in given.arms:
            name = f"seed {run.config.seed}, {folder.name}, {arm}"
            worlds[name] = {"good": False, "record": spoiled(run, arm, given.work)}
            report(given.out, worlds)
        run.close()
    report(given.out, worlds)
    print(table(verdicts(worlds)))


if __name__ == "__main__":
    main()
