"""What makes the learned world right about the grasp: one change of its training at a time.

    python -m bench.worlds RUN... [--variants NAME...] [--passes 1 2 4] [--work DIR] [--out FILE]

Of each finished run the first round's simulator is trained anew with one change, and asked about
the same 100 fresh real episodes of the imitated policy, which no training sees: is the thing
carried off after the last closing of the gripper, as it was? The run's own simulator is the
baseline. --passes: of sampling a frame. The run folders are only read; they may be of older
versions.
"""

import argparse
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bench.__main__ import origin
from bench.thresholds import model
from worldenv.config import SimulatorConfig, load
from worldenv.data.episode import Episode
from worldenv.data.episodes import DatasetWriter
from worldenv.data.windows import chunk_sequences, from_first_step
from worldenv.envs.start import Start
from worldenv.fields import fingerprint, to_dict
from worldenv.rl.noise import Laplace
from worldenv.runtime.seeds import derive
from worldenv.stages import collect, simulator, store, trial
from worldenv.stages.reflector import calibrate_on_real
from worldenv.stages.run import Run, open_run, read_record, write_json, write_record
from worldenv.stages.scene import World

ROOT = Path(__file__).parents[1]
EPISODES = 100
PUSH = 3.0  # of a near success, in pushes

VARIANTS: dict[str, Callable[[SimulatorConfig], SimulatorConfig]] = {
    "as it is": lambda part: part,
    "steps 4x": lambda part: replace(part, steps=4 * part.steps),
    "steps 16x": lambda part: replace(part, steps=16 * part.steps),
    "data 5x": lambda part: part,  # the episodes of all runs
    "data 5x, steps 4x": lambda part: replace(part, steps=4 * part.steps),
    "near successes": lambda part: part,  # half of the episodes pushed at the closing alone
    "window 2": lambda part: replace(part, window=2),
    "window 2, equal time": lambda part: replace(part, window=2, steps=round(part.steps / 1.5)),
    # A clip must be longer than the window for training to show what the cache then holds.
    "window 4": lambda part: replace(part, window=4, frames=5),
    "window 4, equal time": lambda part: replace(
        part, window=4, frames=5, steps=round(part.steps / 2.5)
    ),
    "window 2, history": lambda part: replace(part, window=2, history_gradient=True),
}


def opened(source: Path, work: Path, name: str, sources: list[Path]) -> Run:
    """A folder for a variant (or, "fresh", for the episodes that all are asked about)."""
    config = load(source / "config.json")
    part = VARIANTS.get(name, VARIANTS["as it is"])(config.simulator)
    folder = work / source.name / name.replace(" ", "-").replace(",", "")
    run = Run(replace(config, run_dir=folder, threads=1, simulator=part))
    data = run.dir / "data"
    if not data.exists():
        if "data" in name:
            (data / "explore-0").mkdir(parents=True)
            for other in sources:
                (data / "explore-0" / other.name).mkdir()
                for file in (other / "data" / "explore-0").rglob("*.hdf5"):
                    (data / "explore-0" / other.name / file.name).symlink_to(file.resolve())
            (data / "demonstrations").symlink_to((source / "data" / "demonstrations").resolve())
        elif name == "near successes":
            data.mkdir()
            (data / "demonstrations").symlink_to((source / "data" / "demonstrations").resolve())
        else:
            data.symlink_to((source / "data").resolve())
    if name == "near successes" and not (data / "explore-0").exists():
        collect_near(source, run)
    return run


def collect_near(source: Path, run: Run) -> None:
    """Every second of the first round's episodes, and as many of which only the chunk that closes
    the gripper is pushed, three times as far."""
    config, old = run.config, open_run(source)
    folder = run.dir / "data" / "explore-0.unfinished"
    shutil.rmtree(folder, ignore_errors=True)
    episodes = collect.recorded(old, "explore-0")
    episodes.sort(key=lambda e: (e.task, e.seed))
    policy = model(old, "policy", "policy-sft")
    robot = run.embodiment
    noise = Laplace(
        push=PUSH * config.collect.push,
        translation=robot.actions("translate"),
        closing=(robot.actions("grip")[0], robot.gripper_closes),
    )
    starts = [
        Start(e.task, e.start, derive(config.seed, "near", k) % 2**31)
        for k, e in enumerate(episodes[1::2])
    ]
    hold = config.collect.hold_chunks * config.env.chunk
    with DatasetWriter(folder) as writer:
        for episode in episodes[::2]:
            writer.append(episode)
        run.reality.roll_out(
            policy.eval(),
            starts,
            lambda env: collect.EpisodeRecorder(config, starts, writer.append, hold),
            seeds=[derive(config.seed, "near noise", k) for k in range(len(starts))],
            noise=noise,
            terminate="never",
            record_every=config.collect.record_every,
        )
    os.replace(folder, folder.with_suffix(""))
    old.close()


def fresh(source: Path, work: Path, sources: list[Path]) -> list[Episode]:
    """The episodes that all are asked about; collected once."""
    run = opened(source, work, "fresh", sources)
    old = open_run(source)
    policy = model(old, "policy", "policy-sft")
    try:
        return trial.held_out(run, policy, EPISODES, 0)
    finally:
        run.close()
        old.close()


def measured(source: Path, work: Path, name: str, sources: list[Path], passes: int) -> dict:
    """Figures of one variant's world, each frame of it sampled in so many passes; kept."""
    run = opened(source, work, name, sources)
    path = run.dir / "stages" / f"measured-{passes}.json"
    config = replace(run.config, posttrain=replace(run.config.posttrain, sampling_steps=passes))
    mark = fingerprint("worlds", config.simulator, passes, EPISODES)
    record = read_record(path)
    if record is not None and record["mark"] == mark:
        run.close()
        return record
    old = open_run(source)
    try:
        made = run.path("checkpoints", "simulator-0.safetensors")
        if name == "as it is":
            world = model(old, "simulator", "simulator-0")
        else:
            if not made.exists():
                simulator.run(run, mark, 0)
            world = store.load("simulator", made)
        judge = model(old, "reflector", "reflector-0")
        # An older judge lacks the threshold that its verdicts on real frames need.
        calibrate_on_real(run, 0, judge, collect.load_round(run, 0)[1])
        episodes = fresh(source, work, sources)
        real = from_first_step(chunk_sequences(episodes, config.env.chunk))
        asked = World(config, run.embodiment, world, judge, real, 0)
        record = {
            "mark": mark,
            "simulator": to_dict(config.simulator),
            "passes": passes,
            **trial.about_things(run, asked, episodes),
            "frames": asked.frames(8),
        }
        write_record(path, record)
    finally:
        run.close()
        old.close()
    return record


def told(record: dict) -> str:
    """The grasp, a chunk before: agreement, where it was carried and where not."""
    grasp = record["event"]["grasp"]["1"]
    parts = (grasp, grasp["of_yes"], grasp["of_no"])
    return "  ".join(f"{p['value']:.2f} ({p['low']:.2f} to {p['high']:.2f})" for p in parts)


def main() -> None:
    """Parses the command line, trains, asks, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="finished runs of different seeds")
    parser.add_argument("--only", type=Path, nargs="+", help="of those, the ones to work on")
    parser.add_argument("--variants", nargs="+", default=["as it is"], choices=VARIANTS)
    parser.add_argument("--passes", type=int, nargs="+", default=[1], help="of sampling a frame")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "worlds")
    parser.add_argument("--out", type=Path, default=ROOT / "results/worlds/results.json")
    given = parser.parse_args()
    seeds: dict[str, dict] = {}
    for source in given.only or given.runs:
        own = seeds[str(load(source / "config.json").seed)] = {}
        for name in given.variants:
            for passes in given.passes:
                label = name if passes == 1 else f"{name}, {passes} passes"
                own[label] = measured(source, given.work, name, given.runs, passes)
                print(source.name, label, told(own[label]), flush=True)
    write_json(
        given.out,
        {
            **origin("bench.worlds", threads=1),
            "seeds": seeds,
        },
    )


if __name__ == "__main__":
    main()
