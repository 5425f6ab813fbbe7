"""The whole method, stage by stage, and its results.

    demonstrations -> sft -> (explore -> simulator [-> distill] -> reflector -> fidelity ->
    posttrain) x rounds -> evaluate -> videos -> results.json, report.html

Every stage is skipped where its artifacts match the configuration, so this is also how a run is
resumed. A stage run alone works on what stages before it made with the same configuration, and is
refused otherwise.
"""

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from worldenv.config import Config
from worldenv.data.embodiment import Embodiment
from worldenv.fields import fingerprint, from_dict, to_dict
from worldenv.models.folder import weight_bytes
from worldenv.runtime import checkpoint, ranks
from worldenv.runtime.errors import UserError, unknown, write_error
from worldenv.stages import (
    collect,
    demonstrations,
    distill,
    estimate,
    evaluate,
    fidelity,
    folders,
    posttrain,
    records,
    reflector,
    results,
    sft,
    simulator,
    store,
    thresholds,
)
from worldenv.stages.run import Run, Stage, Step, read_record

LARGEST_TIMED = 1 << 30  # bytes of weights that are run to say how long a run takes
FIRST = (collect.DEMONSTRATIONS, sft.STAGE)
ROUND = (
    collect.EXPLORE,
    simulator.STAGE,
    distill.STAGE,
    reflector.STAGE,
    fidelity.STAGE,
    posttrain.STAGE,
)
STAGES = (*(s.name for s in (*FIRST, *ROUND, evaluate.STAGE)), "report")


def steps(config: Config) -> dict[str, Step]:
    """All that a run records, by name, in order."""
    wanted = [stage for stage in ROUND if stage.wanted(config)]
    loop = [(stage, n) for n in range(config.posttrain.rounds) for stage in wanted]
    order: list[tuple[Stage, int]] = [*((s, 0) for s in FIRST), *loop, (evaluate.STAGE, 0)]
    return {step.name: step for step in (Step(stage, number) for stage, number in order)}


def run_all(run: Run, files: Mapping[str, Path] | None = None, number: int = 0) -> Path:
    """Run every stage that is not done yet; returns the path of results.json.

    files: checkpoints to use in place of training (policy, simulator, reflector: their path), the
    last two in round `number`.
    """

    def prepare() -> dict[str, str]:
        demonstrations.check(run.config)
        named = _named(run, files or {}, number)
        marks = _marks(run, named)
        folders.check(run, _left(run, marks, named, steps(run.config)))
        run.save_config()
        _adopt(run, named, marks)
        _announce(run, marks)
        return marks

    marks = ranks.together(prepare)
    for name, step in steps(run.config).items():
        records.perform(run, step, marks[name])
    return ranks.together(lambda: results.report(run, list(marks)))


def _announce(run: Run, marks: Mapping[str, str]) -> None:
    """Say how long what is left to do will take. On a GPU it is not known, and of published models
    in their full size only `worldenv-train --plan` says it: it runs none of them."""
    every = steps(run.config)
    left = [n for n, step in every.items() if not records.at_hand(run.dir, step, marks[n])]
    parts = (run.config.policy, run.config.simulator, run.config.reflector)
    folders = {part.folder for part in parts if part.kind != "small"}
    if left and run.device.type == "cpu" and sum(map(weight_bytes, folders)) < LARGEST_TIMED:
        seconds = estimate.estimate(run.config, estimate.calibrate(run.config, run.reality))
        print(estimate.describe({name: seconds.get(name, 0.0) for name in left}), flush=True)


def _left(
    run: Run, marks: Mapping[str, str], named: Mapping[str, "_File"], names: Iterable[str]
) -> list[str]:
    """Stages of those of the steps `names` that have work to do."""
    every = steps(run.config)
    left = [n for n in names if not records.at_hand(run.dir, every[n], marks[n])]
    return [every[name].stage.name for name in left if name not in named]


def run_stage(
    run: Run, stage: str, number: int = 0, files: Mapping[str, Path] | None = None
) -> dict | Path:
    """Run one stage (of round `number`), or skip it if it is done.

    files: as in `run_all`. With them, what the stage needs and the folder lacks is made first, and
    what follows from them is made anew.
    """
    every = steps(run.config)
    marks, before, target = ranks.together(lambda: _prepare(run, stage, number, files or {}))
    for name in before:
        records.perform(run, every[name], marks[name])
    if target is None:
        return ranks.together(lambda: results.report(run, list(every)))
    return records.perform(run, every[target], marks[target])


def _prepare(
    run: Run, stage: str, number: int, files: Mapping[str, Path]
) -> tuple[dict[str, str], list[str], str | None]:
    """Marks of all steps, the names of those to do before a stage, and its own (None: the report).
    What is named in `files` is in place then."""
    if stage not in STAGES:
        raise unknown("stage", stage, STAGES)
    every = steps(run.config)
    named = _named(run, files, number)
    marks = _marks(run, named)
    target = next((s for s in every.values() if (s.stage.name, s.number) == (stage, number)), None)
    target = target or every.get(stage)  # none: the report, of everything
    if target is None and stage != "report":
        got, mend = f"{stage}.steps 0", f"--{stage}.steps"
        if not run.config.learned:
            got, mend = "posttrain.world real", "--posttrain.world learned"
        raise UserError(
            f"{stage}: expected a configuration that has this stage, got {got}. Set {mend}."
        )
    needs = target.needs(run.config) if target else tuple(every)
    before = _before(run, stage if target is None else target.name, needs, marks, named)
    todo = before if target is None else [*before, target.name]
    folders.check(run, _left(run, marks, named, todo))
    run.save_config()
    _adopt(run, named, marks)
    return marks, before, None if target is None else target.name


def check_made(run: Run, names: Iterable[str], otherwise: str = "") -> None:
    """UserError unless the steps `names` are finished as the run's configuration makes them, and
    their artifacts are as they made them. otherwise: what else can be done, for the message.
    """
    every, marks = steps(run.config), _marks(run, {})
    for name in names:
        if name not in every:
            raise UserError(
                f"{run.dir}: expected a run with a learned world, got one of posttrain.world real, "
                f"which has no {name}. Name another run."
            )
        if not records.finished(run.dir, every[name], marks[name]):
            raise UserError(
                f"{name} in {run.dir} {records.standing(run.dir, every[name], marks[name])}. Run "
                f"worldenv-train in this folder, with its settings, first{otherwise}."
            )


def check_round(config: Config, number: int) -> None:
    """UserError unless `number` is one of the run's rounds."""
    if not 0 <= number < config.posttrain.rounds:
        raise UserError(
            f"round {number}: expected 0..{config.posttrain.rounds - 1} (posttrain.rounds)"
        )


def _marks(run: Run, named: Mapping[str, "_File"]) -> dict[str, str]:
    """The fingerprint that each step's record must have. Of an adopted one it is the file's, be
    the configuration as it may, as long as the file fits it. A named file that is what the step
    itself made here changes nothing.
    """
    marks: dict[str, str] = {}
    for name, step in steps(run.config).items():
        own = step.mark(run.config, marks)
        record = read_record(run.dir / "stages" / f"{name}.json") or {}
        if name in named:
            made = records.finished(run.dir, step, own) or {"artifacts": {}}
            itself = named[name].sha256 in [a["sha256"] for a in made["artifacts"].values()]
            marks[name] = own if itself else named[name].mark
        elif "adopted" in record:
            _check_adopted(run, step, record)
            marks[name] = record["fingerprint"]
        else:
            marks[name] = own
    return marks


def _before(
    run: Run,
    target: str,
    needs: Iterable[str],
    marks: Mapping[str, str],
    named: Mapping[str, "_File"],
) -> list[str]:
    """Names of the steps to do (or to bring back) before `target`. UserError naming those that the
    user has to decide about.
    """
    every, config = steps(run.config), run.config
    missing: set[str] = set()
    todo = list(needs)
    while todo:
        name = todo.pop()
        if name not in named and not records.finished(run.dir, every[name], marks[name]):
            missing.add(name)
            if not records.at_hand(run.dir, every[name], marks[name]):
                todo += every[name].needs(config)
    follows = _followers(config, named)
    order = [name for name in every if name in missing]
    refused = []
    for name in order:
        step, mark = every[name], marks[name]
        foreign = records.foreign(run.dir, step, mark) and name not in follows
        if (foreign or not named) and not records.at_hand(run.dir, step, mark):
            refused.append(step)
    if refused:
        first = refused[0]
        command = first.stage.name + (f" --round {first.number}" if first.number else "")
        reasons = ", ".join(
            f"{step.name} ({records.standing(run.dir, step, marks[step.name])})"
            for step in refused[:3]
        ) + (f" and {len(refused) - 3} more" if len(refused) > 3 else "")
        raise UserError(
            f"{target} builds on stages that {run.dir} does not hold as this configuration makes "
            f"them: {reasons}. Run `worldenv-train {command}` first, or `worldenv-train` for all "
            "of them, with the same settings; or give the settings that the folder was made with."
        )
    return order


def _followers(config: Config, named: Iterable[str]) -> set[str]:
    """Names of all steps that build on one of `named`."""
    found = set(named)
    for name, step in steps(config).items():
        if found.intersection(step.needs(config)):
            found.add(name)
    return found


# ---------------------------------------------------------------- named checkpoints


@dataclass(frozen=True)
class _File:
    """A checkpoint that stands in for a stage."""

    path: Path
    step: Step
    sha256: str
    robot: Embodiment
    """Without cameras where the model draws nothing of theirs."""

    @property
    def mark(self) -> str:
        """Fingerprint: the same for the same content, wherever it lies."""
        return fingerprint("adopted", self.sha256)


def _named(run: Run, files: Mapping[str, Path], number: int) -> dict[str, _File]:
    """The checkpoints in `files` by the step they stand in for. UserError for what is none, or
    does not fit the run's configuration."""
    named = {}
    for kind, path in files.items():
        if kind != "policy" and not run.config.learned:
            raise UserError(
                f"--{kind} {path}: expected none with --posttrain.world real, where nothing is "
                "imagined. Leave it out."
            )
        model = store.load(kind, path, fits=run.config)
        if kind == "reflector":
            thresholds.of_reality(model)  # the evaluation, hours from now, would refuse it
        drawn = getattr(model.config, "action_map", False)
        robot = run.embodiment if drawn else replace(run.embodiment, cameras=())
        step = steps(run.config)["sft" if kind == "policy" else f"{kind}-{number}"]
        named[step.name] = _File(Path(path), step, records.sha256(Path(path)), robot)
    return named


def _adopt(run: Run, named: Mapping[str, _File], marks: Mapping[str, str]) -> None:
    """Put the files in place of what their steps would have made, and record them."""
    for name, file in named.items():
        if marks[name] != file.mark:
            continue
        target = run.path(*Path(file.step.makes[0]).parts)
        draft = target.with_name(f".{target.name}.tmp")
        try:
            shutil.copyfile(file.path, draft)  # before `settle`: it may move the file itself
            if records.settle(run, file.step, file.mark) is None:
                os.replace(draft, target)
                record = {"adopted": str(file.path), "embodiment": to_dict(file.robot)}
                records.finish(run, file.step, file.mark, record, 0.0)
        except OSError as error:
            raise write_error(target, error) from error
        finally:
            draft.unlink(missing_ok=True)


def _check_adopted(run: Run, step: Step, record: dict) -> None:
    """UserError unless an adopted checkpoint is as it was and fits the configuration."""
    mend = (
        f"Name a checkpoint again (--{'policy' if step.name == 'sft' else step.stage.name} FILE), "
        f"or delete {run.dir / 'stages' / step.name}.json to train one."
    )
    changes = records.changes(run.dir, step, record)
    if changes:
        raise UserError(
            f"{run.dir / changes[0]}, adopted from {record['adopted']}, is gone or changed. {mend}"
        )
    own = from_dict(Embodiment, record["embodiment"], f"{step.name}: embodiment")
    what = f"{step.name} was adopted from {record['adopted']}, trained"
    try:
        store.check_fits(own, run.embodiment, what, drawn=bool(own.cameras))
        path = run.dir / step.makes[0]
        seen = store.shown(checkpoint.load(path, header=True)[1], path)
        store.check_shown(seen, run.config.env, what)
    except UserError as error:
        raise UserError(f"{error} {mend}") from error
