"""The whole method, stage by stage, and its results.

    demonstrations -> sft -> (explore -> simulator -> reflector -> fidelity -> posttrain) x rounds
    -> evaluate -> videos -> results.json, report.html

Every stage is skipped where its artifacts match the configuration, so this is also how a run is
resumed.
"""

import hashlib
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from worldenv.config import fingerprint
from worldenv.report.page import write_report
from worldenv.report.statistics import paired_difference
from worldenv.runtime import device as devices
from worldenv.runtime.errors import UserError, unknown
from worldenv.runtime.logging import read_metrics
from worldenv.runtime.revision import commit
from worldenv.stages import (
    collect,
    demonstrations,
    evaluate,
    fidelity,
    posttrain,
    reflector,
    sft,
    simulator,
    store,
)
from worldenv.stages.imagine import imagine, real_episodes
from worldenv.stages.run import Run, write_json

ROUND_STAGES = ("explore", "simulator", "reflector", "fidelity", "posttrain")
STAGES = ("demonstrations", "sft", *ROUND_STAGES, "evaluate", "report")


def run_all(run: Run) -> Path:
    """Run every stage that is not done yet; returns the path of results.json."""
    demonstrations.check(run.config)
    with devices.PeakMemory() as memory:
        for stage in STAGES[:2]:
            run_stage(run, stage)
        for number in range(run.config.posttrain.rounds):
            for stage in ROUND_STAGES:
                run_stage(run, stage, number)
        run_stage(run, "evaluate")
    _remember_peak(run, memory.bytes)
    return run_stage(run, "report")


def run_stage(run: Run, stage: str, number: int = 0) -> dict | Path:
    """Run one stage (of round `number`), or skip it if it is done."""
    if stage not in STAGES:
        raise unknown("stage", stage, STAGES)
    if stage == "report":
        return _report(run)
    name = f"{stage}-{number}" if stage in ROUND_STAGES else stage
    parts, after, work = _plan(run, stage, number)
    return run.stage(name, parts, after, work)


def _plan(
    run: Run, stage: str, number: int
) -> tuple[tuple, tuple[str, ...], Callable[[str], dict]]:
    """What a stage depends on (configs, earlier stages) and what it does."""
    config = run.config
    env = config.env
    # Where the assets come from and how many workers serve them change no result worth redoing.
    world = (env.suite, list(env.tasks), env.image_size, env.chunk, env.max_steps)
    last = f"policy-{number - 1}" if number else "policy-sft"
    before = f"posttrain-{number - 1}" if number else "sft"
    rl = config.posttrain
    plans: dict[str, tuple[tuple, tuple[str, ...], Callable[[str], dict]]] = {
        "demonstrations": (
            (world, demonstrations.identity(config))
            if config.data.paths
            else (world, config.collect.demonstrations, config.collect.demonstration_noise),
            (),
            lambda mark: collect.demonstrate(run, mark),
        ),
        "sft": (
            (config.sft, config.policy),
            ("demonstrations",),
            lambda mark: sft.run(run, mark),
        ),
        "explore": (
            (world, config.collect),
            (before,),
            lambda mark: collect.explore(
                run, mark, number, run.path("checkpoints", f"{last}.safetensors")
            ),
        ),
        "simulator": (
            (config.simulator,),
            (f"explore-{number}", *((f"simulator-{number - 1}",) if number else ())),
            lambda mark: simulator.run(run, mark, number),
        ),
        "reflector": (
            (config.reflector, config.sampling_steps(number)),
            (f"simulator-{number}", *((f"reflector-{number - 1}",) if number else ())),
            lambda mark: reflector.run(
                run, mark, number, run.path("checkpoints", f"{last}.safetensors")
            ),
        ),
        "fidelity": (
            (config.sampling_steps(number),),
            (f"reflector-{number}",),
            lambda mark: fidelity.run(run, mark, number),
        ),
        "posttrain": (
            # One round more continues a finished run: how many there are changes none of them.
            (replace(rl, rounds=1),),
            (before, f"fidelity-{number}"),
            lambda mark: posttrain.run(run, mark, number),
        ),
        "evaluate": (
            (world, config.evaluate),
            ("sft", f"posttrain-{rl.rounds - 1}"),
            lambda mark: evaluate.run(
                run, mark, {"sft": "policy-sft", "posttrained": f"policy-{rl.rounds - 1}"}
            ),
        ),
    }
    return plans[stage]


def adopt(run: Run, kind: str, path: Path, number: int) -> None:
    """Use a checkpoint of another run as this run's artifact (kind: policy, simulator, reflector).

    The stage that would have made it is recorded as done.
    """
    store.load(kind, path)  # refuses anything that is not one
    name = {"policy": "policy-sft"}.get(kind, f"{kind}-{number}")
    target = run.path("checkpoints", f"{name}.safetensors")
    if Path(path).resolve() != target.resolve():
        shutil.copyfile(path, target)
    stage = "sft" if kind == "policy" else name
    with target.open("rb") as file:
        mark = fingerprint("adopted", hashlib.file_digest(file, "sha256").hexdigest())
    record = {"adopted": str(path), "seconds": 0.0, "fingerprint": mark}
    write_json(run.path("stages", f"{stage}.json"), record)
    run.records[stage] = record


# ---------------------------------------------------------------- results


def _report(run: Run) -> Path:
    """Videos, results.json and report.html from what the stages left."""
    results = collect_results(run)
    media = run.path("media", "x").parent
    mark = fingerprint(run.record("evaluate")["fingerprint"])
    if not (media / f"{mark}.done").exists():
        shutil.rmtree(media, ignore_errors=True)
        _videos(run, media)
        (media / f"{mark}.done").touch()
    path = run.path("results.json")
    write_json(path, results)
    write_report(run.dir)
    return path


def _videos(run: Run, media: Path) -> None:
    """A few held-out episodes before and after post-training, beside their imagination."""
    config = run.config
    last = config.posttrain.rounds - 1
    load = lambda kind, name: store.load(  # noqa: E731
        kind, run.path("checkpoints", f"{name}.safetensors"), run.device
    )
    world, judge = load("simulator", f"simulator-{last}"), load("reflector", f"reflector-{last}")
    outcomes = run.record("evaluate")["outcomes"]
    starts = evaluate.held_out_starts(run)
    changed = {
        (b["task"], b["start"], b["seed"])
        for b, a in zip(outcomes["sft"], outcomes["posttrained"], strict=True)
        if a["success"] and not b["success"]
    }
    shown = [s for s in starts if (s.task, s.index, s.seed) in changed][:2]
    shown += [s for s in starts if s not in shown][: 2 - len(shown)]
    steps = config.sampling_steps(last)
    for label, name in (("before", "policy-sft"), ("after", f"policy-{last}")):
        episodes = real_episodes(run, load("policy", name).cpu(), shown)
        imagine(run, episodes, world, judge, media, label, steps=steps)
        if label == "after":
            policy = load("policy", name)
            imagine(
                run,
                episodes[:1],
                world,
                judge,
                media,
                "closed-loop",
                drive="policy",
                policy=policy,
                steps=steps,
            )


def collect_results(run: Run) -> dict:
    """What results.json holds."""
    config = run.config
    last = config.posttrain.rounds - 1
    records = {name: run.record(name) for name in stage_names(config.posttrain.rounds)}
    outcomes = records["evaluate"]["outcomes"]
    measured = records[f"fidelity-{last}"]
    reflector_quality = measured["reflector"]
    skip = {"fingerprint", "outcomes", "reflector"}
    stages = {
        name: {k: v for k, v in record.items() if k not in skip} for name, record in records.items()
    }
    imagined = [records[f"posttrain-{n}"] for n in range(last + 1)]
    seconds = sum(r["imagination_seconds"] for r in imagined)
    names = {e.task: e.instruction for e in collect.load_round(run, -1)[0]}
    return {
        "preset": config.preset,
        "seed": config.seed,
        "commit": commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "suite": config.env.suite,
        "tasks": [{"id": t, "instruction": names.get(t, "")} for t in config.env.tasks],
        **success_of(outcomes, "success"),
        "no_oracle": success_of(outcomes, "success_no_oracle"),
        "fidelity": {
            **{k: v for k, v in measured.items() if k not in {*skip, "seconds"}},
            "closed_loop_gap": _closed_loop_gap(run, last, imagined[-1]["kept_iteration"]),
        },
        "reflector": reflector_quality,
        "stages": stages,
        "total_seconds": round(sum(r["seconds"] for r in records.values()), 1),
        "frames_per_second": round(sum(r["frames"] for r in imagined) / max(seconds, 1e-9), 1),
        "real_episodes_used": sum(
            r.get("check_episodes", 0) + (r["episodes"] if n.startswith(("demo", "explore")) else 0)
            for n, r in records.items()
        ),
        "peak_memory_bytes": records["evaluate"].get("peak_memory_bytes"),
        "machine": devices.describe(),
        "evaluation": outcomes,
    }


def stage_names(rounds: int) -> list[str]:
    """Names of all recorded stages, in order."""
    loop = [f"{stage}-{n}" for n in range(rounds) for stage in ROUND_STAGES]
    return ["demonstrations", "sft", *loop, "evaluate"]


def success_of(outcomes: dict[str, list[dict]], key: str) -> dict:
    """Counts and the paired difference of outcomes["sft"] and outcomes["posttrained"], episodes in
    the same order; errors clustered by task and start."""
    before, after = (outcomes[label] for label in ("sft", "posttrained"))
    clusters = [(e["task"], e["start"]) for e in before]
    values = [[float(e[key]) for e in rows] for rows in (before, after)]
    summary = {
        label: {"successes": int(sum(v)), "episodes": len(v)}
        for label, v in zip(("sft", "posttrained"), values, strict=True)
    }
    if len(set(clusters)) < 2:
        return {**summary, "paired_difference": None}
    difference = paired_difference(*values, clusters)
    rounded = {k: round(getattr(difference, k), 4) for k in ("mean", "low", "high")}
    return {**summary, "paired_difference": rounded}


def _closed_loop_gap(run: Run, last: int, kept: int | None) -> float | None:
    """Imagined minus real success of the kept policy, None without checks in reality."""
    rows = [r for r in read_metrics(run.dir, f"check-{last}") if r["step"] == kept]
    return round(rows[-1]["imagined"] - rows[-1]["real"], 4) if rows else None


def _remember_peak(run: Run, peak: int) -> None:
    """Keep the highest memory of all attempts at this run beside the last stage's record."""
    record = run.record("evaluate")
    record["peak_memory_bytes"] = max(peak, record.get("peak_memory_bytes") or 0)
    write_json(run.path("stages", "evaluate.json"), record)


def check_round(run: Run, number: int) -> None:
    """UserError unless `number` is one of the run's rounds."""
    if not 0 <= number < run.config.posttrain.rounds:
        raise UserError(
            f"round {number}: expected 0..{run.config.posttrain.rounds - 1} (posttrain.rounds)"
        )
