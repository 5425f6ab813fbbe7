"""Does the action map make the world truer? One and eight chunks ahead, with and without it.

    python -m bench.action_map RUN... [--steps 400] [--arms none map] [--work FOLDER] [--out FILE]

Each run folder's first simulator is trained anew by its own stage on the run's episodes, once for
each arm: the same seed, weights, batches and noise; only `simulator.action_map` (and `ray_maps`)
differ. Then real actions are replayed in it on episodes it was not trained on (those held out of
the first round, and the second round's), from their first frames as the stage `fidelity` does, and
from two places in mid-episode. Errors are means over replays; differences to the first arm are
paired by replay. Their bootstrap intervals resample episodes and say nothing of what another
training would give; the t intervals over the runs do. The run folders are only read; trained
simulators stay in --work and are not trained twice.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.__main__ import origin
from worldenv.config import Config, load
from worldenv.data.episodes import read_episodes
from worldenv.data.windows import FrameSequence, chunk_sequences, from_first_step
from worldenv.fields import fingerprint, to_dict
from worldenv.models.simulator import Simulator
from worldenv.report.statistics import bootstrap_difference, paired_difference
from worldenv.runtime.revision import commit
from worldenv.runtime.seeds import derive
from worldenv.stages import simulator as stage
from worldenv.stages import store
from worldenv.stages.collect import load_round
from worldenv.stages.run import Run, read_record, write_json, write_record

ROOT = Path(__file__).parents[1]
ARMS = {
    "none": {},
    "map": {"action_map": True},
    "map-and-rays": {"action_map": True, "ray_maps": True},
}
AHEAD = (1, 8)  # chunks
MIDDLE = (4, 8)  # frames from where replays in mid-episode begin
MOVED = 0.15 * 127.5  # grey levels since the frame before, as the simulator's loss has it

Row = dict[str, float | int | str | None]


def trained(run: Path, arm: str, steps: int, work: Path) -> tuple[Config, Simulator, dict]:
    """The first round's simulator of a run, trained as it was there but for the arm and steps."""
    config = load(run / "config.json")
    part = replace(config.simulator, steps=steps, **ARMS[arm])
    folder = work / f"{run.name}-{arm}-{steps}"
    config = replace(config, run_dir=folder, simulator=part, threads=1)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data").exists():
        (folder / "data").symlink_to((run / "data").resolve())
    here = Run(config)
    try:
        mark, path = fingerprint(config.seed, part), folder / "stages" / "simulator-0.json"
        record = read_record(path)
        if record is None or record.get("mark") != mark:
            record = {"mark": mark, **stage.run(here, mark, 0)}
            write_record(path, record)
    finally:
        here.close()
    model = store.load("simulator", folder / "checkpoints" / "simulator-0.safetensors")
    return config, model, {k: v for k, v in record.items() if k != "mark"}


def unseen(run: Path, config: Config) -> list[FrameSequence]:
    """Sequences, from the first step, of episodes that the first round's simulator is not trained
    on; those long enough to look the farthest ahead."""
    reading = Run(replace(config, run_dir=run), writes=False)
    _, _, episodes = load_round(reading, 0)
    reading.close()
    episodes += read_episodes(run / "data" / "explore-1", config.env.image_size)
    sequences = from_first_step(chunk_sequences(episodes, config.env.chunk))
    return [s for s in sequences if len(s) > max(AHEAD)]


def imagined(
    simulator: Simulator, real: Sequence[FrameSequence], begin: int, steps: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Replays from frame `begin`, of which the simulator sees the one before too, as it does where
    post-training begins in mid-episode: images `[N, F, ...]` and proprio, F = 1 + the farthest."""
    first, everyone = max(begin - 1, 0), np.ones(len(real), bool)
    image = torch.stack([s.images[first : begin + 1] for s in real])
    proprio = torch.stack([s.proprio[first : begin + 1] for s in real])
    led = torch.stack([s.actions[first:begin] for s in real])
    nothing = torch.zeros_like(real[0].actions[:1]).expand(len(real), -1, -1, -1)
    state = simulator.start(len(real))
    seeds = torch.tensor([derive(seed, begin, i) for i in range(len(real))])
    simulator.prefill(state, everyone, image, proprio, torch.cat([nothing, led], 1), seeds)
    frames = [(image[:, -1], proprio[:, -1])]
    for t in range(begin, begin + max(AHEAD)):
        action = torch.stack([s.actions[t] for s in real])
        frames.append(simulator.step(state, action, steps, everyone))
    return tuple(torch.stack(kind, 1) for kind in zip(*frames, strict=True))


def errors(simulator: Simulator, real: list[FrameSequence], steps: int, seed: int) -> Iterator[Row]:
    """One row for each replay and distance. Errors: of the hand in mm; squared, of colours in 0..1,
    over all pixels, those of each view, and those that moved since the frame before."""
    for begin in (0, *MIDDLE):
        held = [i for i, s in enumerate(real) if len(s) > begin + max(AHEAD)]
        images, poses = imagined(simulator, [real[i] for i in held], begin, steps, seed)
        for (k, i), ahead in itertools.product(enumerate(held), AHEAD):
            at = begin + ahead
            true, before = (real[i].images[j].float() for j in (at, at - 1))
            wrong = ((images[k, ahead].float() - true) / 255).square()
            moved = ((true - before).abs() > MOVED).any(-1)
            views = {f"mse_view_{v}": float(w.mean()) for v, w in enumerate(wrong)}
            yield {
                "from": "mid-episode" if begin else "first frame",
                "ahead": ahead,
                "episode": i,
                "effector_mm": 1000 * float((poses[k, ahead] - real[i].proprio[at])[:3].norm()),
                "mse": float(wrong.mean()),
                **views,
                "mse_moving": float(wrong[moved].mean()) if moved.any() else None,
            }


def compared(arms: dict[str, list[Row]]) -> list[dict]:
    """For each kind of replay, distance and error: the mean of every arm, and its difference to the
    first arm in percent of that one's mean, with the bounds of a 95% interval."""
    base, *others = arms
    kinds = sorted({(r["from"], r["ahead"]) for r in arms[base]})
    names = [n for n in arms[base][0] if n not in ("from", "ahead", "episode", "run")]
    table = []
    for (where, ahead), name in itertools.product(kinds, names):
        chosen = {
            arm: [r for r in rows if (r["from"], r["ahead"]) == (where, ahead)]
            for arm, rows in arms.items()
        }
        kept = [k for k, r in enumerate(chosen[base]) if r[name] is not None]
        values = {arm: np.array([rows[k][name] for k in kept]) for arm, rows in chosen.items()}
        clusters = [(chosen[base][k].get("run"), chosen[base][k]["episode"]) for k in kept]
        mean = {arm: float(v.mean()) for arm, v in values.items()}
        row = {"from": where, "ahead": ahead, "error": name, "replays": len(kept), "mean": mean}
        if name.startswith("mse"):
            row["psnr"] = {arm: round(float(-10 * np.log10(m)), 3) for arm, m in mean.items()}
        row["difference_percent"] = {}
        for arm in others:
            scaled = (values[x] / mean[base] for x in (base, arm))
            d = bootstrap_difference(*scaled, clusters, draws=4000)
            row["difference_percent"][arm] = [round(100 * x, 2) for x in (d.mean, d.low, d.high)]
        table.append(row)
    return table


def over_runs(table: list[dict], by_run: dict[str, list[dict]]) -> None:
    """Adds to each row the mean of the runs' differences in percent, with its 95% t interval."""
    for k, row in enumerate(table):
        row["over_runs_percent"] = {}
        for arm in row["difference_percent"]:
            changes = [rows[k]["difference_percent"][arm][0] / 100 for rows in by_run.values()]
            d = paired_difference([0.0] * len(changes), changes, list(by_run))
            bounds = (d.mean, d.low, d.high)
            row["over_runs_percent"][arm] = [round(100 * float(x), 2) for x in bounds]


def main() -> None:
    """Parses the command line, trains, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="finished runs of two rounds")
    parser.add_argument("--steps", type=int, default=400, help="of each training")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["none", "map"])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "action-map")
    parser.add_argument("--out", type=Path, default=ROOT / "results/action-map/results.json")
    given = parser.parse_args()
    code, rows, trainings = commit(), {arm: [] for arm in given.arms}, []
    by_run: dict[str, list[dict]] = {}
    for run in given.runs:
        own: dict[str, list[Row]] = {}
        for arm in given.arms:
            config, model, record = trained(run, arm, given.steps, given.work)
            trainings.append({"run": run.name, "seed": config.seed, "arm": arm, **record})
            seed = derive(config.seed, "action map")
            found = errors(model, unseen(run, config), config.sampling_steps(0), seed)
            own[arm] = [{"run": run.name, **row} for row in found]
            rows[arm] += own[arm]
        by_run[run.name] = compared(own)
    whole = compared(rows)
    over_runs(whole, by_run)
    report = {
        **origin("bench.action_map", threads=1),
        "commit": code,  # as it was when the first training began
        "config": to_dict(replace(config, run_dir=Path("."))),
        "trainings": trainings,
        "all": whole,
        "by_run": by_run,
    }
    write_json(given.out, report)
    for row in whole:
        means = ", ".join(f"{arm} {m:.5g}" for arm, m in row["mean"].items())
        print(f"{row['from']}, {row['ahead']} ahead, {row['error']}: {means}")
        for name in ("difference_percent", "over_runs_percent"):
            for arm, (d, low, high) in row[name].items():
                print(f"    {arm}: {name} {d:+.1f} ({low:+.1f} to {high:+.1f})")


if __name__ == "__main__":
    main()
