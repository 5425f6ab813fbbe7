"""The whole method, stage by stage, and its results.

    demonstrations -> sft -> (explore -> simulator -> reflector -> fidelity -> posttrain) x rounds
    -> evaluate -> videos -> results.json, report.html

Every stage is skipped where its artifacts match the configuration, so this is also how a run is
resumed.
"""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from worldenv.config import fingerprint
from worldenv.runtime import device as devices
from worldenv.runtime.errors import UserError, unknown
from worldenv.stages import (
    collect,
    demonstrations,
    evaluate,
    fidelity,
    posttrain,
    reflector,
    results,
    sft,
    simulator,
    store,
)
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
        return results.report(run, stage_names(run.config.posttrain.rounds))
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


def stage_names(rounds: int) -> list[str]:
    """Names of all recorded stages, in order."""
    loop = [f"{stage}-{n}" for n in range(rounds) for stage in ROUND_STAGES]
    return ["demonstrations", "sft", *loop, "evaluate"]


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
