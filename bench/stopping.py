"""When to stop post-training, asked without reality, and what reality says afterwards.

    python -m bench.stopping train RUN... [--work DIR]    policies after 4 to 20 iterations
    python -m bench.stopping judge RUN... [--work DIR]    what imagination says of each
    python -m bench.stopping name RUN... [--work DIR]     the iteration that each rule stops at
    python -m bench.stopping play RUN... [--work DIR]     real success of each; --out FILE

The first round of finished runs goes on for more iterations than the run made, in the run's own
world, with no check in reality. `judge` plays each of its policies there, under other noise, in the
world of the run's second round and in those of all other RUNs, and measures how far it has gone
from the policy that explored. `name` writes down where rules would stop; only then will `play` ask
reality, on fresh placements. The run folders are only read; they may be of older versions.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from bench.__main__ import origin
from bench.thresholds import model
from worldenv.config import Config, load
from worldenv.data.windows import FrameSequence, chunk_sequences, from_first_step
from worldenv.envs.start import Start
from worldenv.fields import fingerprint
from worldenv.models.policy import Policy
from worldenv.report.statistics import wilson
from worldenv.runtime.errors import UserError
from worldenv.runtime.logging import read_metrics
from worldenv.runtime.seeds import derive
from worldenv.stages import posttrain, store
from worldenv.stages.collect import load_round
from worldenv.stages.evaluate import resumed
from worldenv.stages.run import (
    Run,
    open_run,
    read_record,
    world_of,
    write_json,
    write_record,
)
from worldenv.stages.scene import World

ROOT = Path(__file__).parents[1]
ITERATIONS, EVERY = 20, 4
LOOKED_AT = (0, 4, 8, 12, 20)  # iterations
CONTEXTS = 40  # first frames from which policies are judged in imagination
PLACEMENTS = 60  # fresh ones on which they are played in reality


# ---------------------------------------------------------------- train


def copied(source: Path, work: Path) -> Config:
    """The configuration of a folder with what the round reads of a finished run."""
    config = load(source / "config.json")
    rl = replace(config.posttrain, iterations=ITERATIONS, real_check_every=0, snapshot_every=EVERY)
    own = replace(config, run_dir=work / source.name, threads=1, posttrain=rl)
    own.run_dir.mkdir(parents=True, exist_ok=True)
    if not (own.run_dir / "data").exists():
        (own.run_dir / "data").symlink_to((source / "data").resolve())
    judged = read_record(source / "stages" / "reflector-0.json")
    if judged is not None:  # it says in which tasks the round is trained
        write_record(own.run_dir / "stages" / "reflector-0.json", judged)
    old, last = open_run(source), config.posttrain.rounds - 1
    for kind, names in {
        "policy": ["policy-sft"],
        "simulator": [world_of(config, n) for n in {0, last}],
        "reflector": [f"reflector-{n}" for n in {0, last}],
    }.items():
        for name in names:
            path = own.run_dir / "checkpoints" / f"{name}.safetensors"
            if not path.exists():
                store.save(kind, model(old, kind, name), path)
    old.close()
    return own


def train(source: Path, work: Path) -> None:
    """Post-train, keeping policies; says whether its beginning repeats the run's own."""
    run = Run(copied(source, work))
    try:
        mark = fingerprint(run.config.seed, run.config.posttrain, "stopping")
        if read_record(run.dir / "stages" / "train.json") is None:
            write_record(run.path("stages", "train.json"), posttrain.run(run, mark, 0))
    finally:
        run.close()
    was, now = (
        [row["imagined_success"] for row in read_metrics(folder, "posttrain-0")]
        for folder in (source, run.dir)
    )
    same = sum(a == b for a, b in zip(was, now, strict=False))
    print(f"{source.name}: {same} of its {len(was)} iterations repeat the run's own")


def policies(run: Run) -> dict[int, Policy]:
    """By iteration, the imitated one first."""
    paths = {0: run.path("checkpoints", "policy-sft.safetensors")}
    paths |= {k: run.path(*posttrain.snapshots(0), f"{k}.safetensors") for k in LOOKED_AT if k}
    return {k: store.load("policy", path) for k, path in paths.items()}


# ---------------------------------------------------------------- judge


def shown(run: Run) -> tuple[list[FrameSequence], list[FrameSequence]]:
    """First-round episodes from their first steps: to begin imagination from, those held out first;
    and those held out."""
    _, trained, held = load_round(run, 0)
    sequences = [
        from_first_step(chunk_sequences(episodes, run.config.env.chunk))
        for episodes in (held, trained)
    ]
    return [*sequences[0], *sequences[1]][:CONTEXTS], sequences[0]


def world(run: Run, config: Config, number: int, real: list[FrameSequence]) -> World:
    """The world of a run's round, to judge policies from the first frames of `real`."""
    folder = run.dir / "checkpoints"
    simulator = store.load("simulator", folder / f"{world_of(config, number)}.safetensors")
    reflector = store.load("reflector", folder / f"reflector-{number}.safetensors")
    return World(config, run.embodiment, simulator, reflector, real, number, imagined=real)


def judge(source: Path, work: Path, others: list[Path]) -> None:
    """Write what imagination says of each policy, by episode, from the same first frames."""
    run = Run(copied(source, work))
    path = run.path("stages", "judged.json")
    kept = read_record(path) or {}
    try:
        real, held = shown(run)
        config, last = run.config, run.config.posttrain.rounds - 1
        judges: dict[str, Callable[[], World]] = {
            "own": lambda: world(run, config, 0, real),
            "own again": lambda: world(run, replace(config, seed=config.seed + 1000), 0, real),
            "later": lambda: world(run, config, last, real),
        }
        for other in others:
            if other.name != source.name:

                def foreign(other: Path = other) -> World:
                    there = replace(config, run_dir=copied(other, work).run_dir)
                    return world(Run(there, writes=False), config, last, real)

                judges[other.name] = foreign
        acting = policies(run)
        for name, make in judges.items():
            if name in kept:
                continue
            asked = make()
            kept[name] = {
                str(k): asked.succeeds(policy, range(len(real))) for k, policy in acting.items()
            }
            print(source.name, name, {k: sum(v) for k, v in kept[name].items()}, flush=True)
            write_record(path, kept)
        kept["distance"] = distances(acting, held, run.embodiment.actions("translate"))
        write_record(path, kept)
    finally:
        run.close()


@torch.no_grad()
def distances(
    acting: dict[int, Policy], held: list[FrameSequence], moves: tuple[int, ...]
) -> dict[str, float]:
    """How far each policy has gone from imitation on held-out real frames: the root mean square of
    the change of a chunk's mean translation, in the policy's units, as a push is."""

    def means(policy: Policy) -> torch.Tensor:
        said = [
            policy(
                {"image": s.images, "proprio": s.proprio, "instruction": [s.instruction] * len(s)}
            )
            for s in held
        ]
        return torch.cat([mu[..., list(moves)].mean(1) for mu, _ in said])

    first = means(acting[0])
    return {
        str(k): round(float((means(p) - first).square().sum(1).mean().sqrt()), 5)
        for k, p in acting.items()
    }


# ---------------------------------------------------------------- name


def rates(judged: dict, name: str) -> list[float]:
    """Imagined success by iteration."""
    return [sum(judged[name][str(k)]) / len(judged[name][str(k)]) for k in LOOKED_AT]


def agreed(judged: dict) -> list[float]:
    """Share of the episodes that succeed under both noises."""
    pairs = ((judged["own"][str(k)], judged["own again"][str(k)]) for k in LOOKED_AT)
    return [sum(a and b for a, b in zip(*pair, strict=True)) / len(pair[0]) for pair in pairs]


def others(judged: dict) -> list[list[float]]:
    """Imagined success in each other run's world, by iteration."""
    known = ("own", "own again", "later", "distance")
    return [rates(judged, name) for name in judged if name not in known]


def best(values: list[float]) -> int:
    """The earliest iteration that nothing beats."""
    return LOOKED_AT[values.index(max(values))]


def within(judged: dict, budget: float) -> int:
    """The last iteration that is no further from imitation than the budget."""
    return max(k for k in LOOKED_AT if judged["distance"][str(k)] <= budget)


RULES: dict[str, Callable[[dict], int]] = {
    "after 4": lambda j: 4,
    "after 8": lambda j: 8,
    "after 12": lambda j: 12,
    "after 20": lambda j: 20,
    "own world": lambda j: best(rates(j, "own")),
    "two noises": lambda j: best(agreed(j)),
    "later world": lambda j: best(rates(j, "later")),
    "lower of own and later": lambda j: best(
        [min(pair) for pair in zip(rates(j, "own"), rates(j, "later"), strict=True)]
    ),
    "mean of others' worlds": lambda j: best([sum(r) for r in zip(*others(j), strict=True)]),
    "lowest of others' worlds": lambda j: best([min(r) for r in zip(*others(j), strict=True)]),
    "distance 0.05": lambda j: within(j, 0.05),
    "distance 0.07": lambda j: within(j, 0.07),
}
"""Where to stop, of what `judge` wrote."""


def name(source: Path, work: Path) -> dict[str, int]:
    """What each rule says, written once: what reality said cannot change it."""
    path = work / source.name / "stages" / "named.json"
    judged = read_record(work / source.name / "stages" / "judged.json")
    if judged is None or "distance" not in judged:
        raise UserError(
            f"{source.name}: expected what imagination says, got none. Run judge first."
        )
    named = read_record(path)
    if named is None:
        named = {rule: stop(judged) for rule, stop in RULES.items()}
        write_record(path, named)
    print(source.name, named)
    return named


# ---------------------------------------------------------------- play


def play(source: Path, work: Path) -> dict[int, list[dict]]:
    """Real outcomes of each policy on the same fresh placements."""
    if read_record(work / source.name / "stages" / "named.json") is None:
        raise UserError(f"{source.name}: where to stop has not been named. Run name first.")
    run = Run(copied(source, work))
    task = run.config.env.tasks[0]
    starts = [
        Start(task, None, derive(run.config.seed, "stopping", k) % 2**31) for k in range(PLACEMENTS)
    ]
    try:
        played = {}
        for k, policy in policies(run).items():
            mark = fingerprint("stopping", store.digest(policy), run.config.seed)
            path = run.path("stages", f"played-{k}.json")
            played[k] = resumed(run, policy, starts, f"{source.name} after {k}", path, mark)
    finally:
        run.close()
    return played


def counted(episodes: list[dict]) -> dict:
    """Successes, with a 95% interval of their share."""
    won = sum(e["success"] for e in episodes)
    rate = wilson(won, len(episodes))
    interval = [round(rate.low, 4), round(rate.high, 4)]
    return {"successes": won, "episodes": len(episodes), "interval": interval}


def written(sources: list[Path], work: Path, out: Path) -> None:
    """Plays what is left, and writes everything."""
    seeds = {}
    for source in sources:
        played = play(source, work)
        judged = read_record(work / source.name / "stages" / "judged.json")
        ran = [row["imagined_success"] for row in read_metrics(work / source.name, "posttrain-0")]
        seeds[str(load(source / "config.json").seed)] = {
            "real": {str(k): counted(v) for k, v in played.items()},
            "own": rates(judged, "own"),
            "two_noises": agreed(judged),
            "later": rates(judged, "later"),
            "others": others(judged),
            "distance": judged["distance"],
            "trained_in": [round(x, 4) for x in ran],
            "checks": {
                str(row["step"]): round(row["real"], 4) for row in read_metrics(source, "check-0")
            },
            "named": name(source, work),
            "episodes": {str(k): [e["success"] for e in v] for k, v in played.items()},
        }
    write_json(
        out,
        {
            **origin("bench.stopping", threads=1),
            "iterations": [*LOOKED_AT],
            "contexts": CONTEXTS,
            "seeds": seeds,
            "rules": ruled(seeds),
        },
    )
    print(json.dumps(ruled(seeds), indent=1))


def ruled(seeds: dict[str, dict]) -> dict[str, dict]:
    """By rule: the stop and the real success of each seed, and how far below the best of all that
    were played it is in the mean."""
    table = {}
    for rule in RULES:
        stops = {seed: found["named"][rule] for seed, found in seeds.items()}
        won = {s: seeds[s]["real"][str(k)]["successes"] for s, k in stops.items()}
        most = {s: max(r["successes"] for r in f["real"].values()) for s, f in seeds.items()}
        lost = sum((most[s] - won[s]) / PLACEMENTS for s in seeds) / len(seeds)
        table[rule] = {"stops": stops, "successes": won, "below_best": round(lost, 4)}
    return table


def main() -> None:
    """Parses the command line and does what it asks of every run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "judge", "name", "play"))
    parser.add_argument("runs", type=Path, nargs="+", help="finished runs of different seeds")
    parser.add_argument("--only", type=Path, nargs="+", help="of those, the ones to work on")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "stopping")
    parser.add_argument("--out", type=Path, default=ROOT / "results/stopping/results.json")
    given = parser.parse_args()
    if given.what == "play":
        written(given.only or given.runs, given.work, given.out)
        return
    for source in given.only or given.runs:
        if given.what == "judge":
            judge(source, given.work, given.runs)
        else:
            {"train": train, "name": name}[given.what](source, given.work)


if __name__ == "__main__":
    main()
