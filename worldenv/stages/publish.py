"""A folder for the hub of what a run made: weights or episodes, what they are, and a card.

The weights are the run's file as it is, so that whoever fetches them has the same bytes. The card's
figures are those of results.json, and only where they are of these very weights.
"""

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from worldenv.report.statistics import wilson
from worldenv.runtime import checkpoint, hub, strict_json
from worldenv.runtime.errors import UserError, unknown, write_error
from worldenv.stages import pipeline
from worldenv.stages.run import Run, Step, world_of, write_json

_PREFIXES = {
    "policy": ("policy-",),
    "simulator": ("simulator-", "distill-"),
    "reflector": ("reflector-",),
    "data": (),
}
_WORDS = {
    "policy": "A robot policy",
    "simulator": "A learned world: a robot's next camera frame, from past ones and actions",
    "reflector": "A judge: whether a robot's task has been done, from its cameras",
}


@dataclass(frozen=True)
class Chosen:
    """What of a run is published: its kind, its name, the step that made it and where it lies."""

    kind: str
    name: str
    step: Step
    path: Path


def find(run: Run, kind: str, name: str | None) -> Chosen:
    """The policy, simulator, reflector or data of this name (None: of the last round; the
    demonstrations). UserError unless it is there, as the run's configuration makes it."""
    last = run.config.posttrain.rounds - 1
    every = {chosen.name: chosen for chosen in _made(run, kind)}
    defaults = {"simulator": world_of(run.config, last), "data": "demonstrations"}
    name = name or defaults.get(kind, f"{kind}-{last}")
    if name not in every:
        raise unknown(f"{kind} of {run.dir}", name, every)
    pipeline.check_made(run, [every[name].step.name])
    return every[name]


def _made(run: Run, kind: str) -> Iterator[Chosen]:
    for step in pipeline.steps(run.config).values():
        for made in map(Path, step.makes):
            weights = made.suffix == ".safetensors" and made.name.startswith(_PREFIXES[kind])
            if weights or (kind == "data" and made.parent.name == "data"):
                yield Chosen(kind, made.stem, step, run.dir / made)


def write(
    run: Run, chosen: Chosen, folder: Path, repository: str, license_: str | None = None
) -> None:
    """Write all that is published to `folder`, which is not there before, nor if this fails.

    repository: what the card calls it.
    """
    if folder.exists():
        raise UserError(
            f"{folder}: expected no such folder yet, got one. Delete it, or name --out."
        )
    results = _results(run)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            draft = scratch / folder.name
            draft.mkdir()
            if chosen.kind == "data":
                shutil.copytree(chosen.path, draft / "data")
            else:
                _copy_model(chosen, draft)
            if results is not None:
                write_json(draft / "results.json", results)
            card = _card(run, chosen, results, repository, license_)
            (draft / "README.md").write_text(card, encoding="utf-8")
            draft.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise write_error(folder, error) from error


def _copy_model(chosen: Chosen, draft: Path) -> None:
    """The checkpoint, its header as config.json, and what others' tools read of published ones."""
    shutil.copyfile(chosen.path, draft / "model.safetensors")
    header = checkpoint.load(chosen.path, header=True)[1]
    write_json(draft / "config.json", {"model_type": f"worldenv-{chosen.kind}", **header})
    exported = chosen.path.with_suffix("")
    for file in exported.rglob("*") if exported.is_dir() else ():
        if file.is_file() and file.suffix not in hub.PICKLES:
            target = draft / "peft" / file.relative_to(exported)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def _results(run: Run) -> dict | None:
    """results.json, if the run has been evaluated as it stands. UserError for another's."""
    try:
        pipeline.check_made(run, ["evaluate"])
    except UserError as error:
        print(f"without figures: {error}")
        return None
    path = run.dir / "results.json"
    results = strict_json.read(path) if path.exists() else {}
    if results.get("evaluation") != run.record("evaluate")["outcomes"]:
        raise UserError(
            f"{path}: expected what the run's evaluation found, got "
            f"{'something else' if results else 'no such file'}. Write it with worldenv-train "
            "report, with the run's settings."
        )
    return results


def _card(
    run: Run, chosen: Chosen, results: dict | None, repository: str, license_: str | None
) -> str:
    """README.md: what the hub reads of it, then what people do."""
    from huggingface_hub import DatasetCardData, EvalResult, ModelCardData  # a moment to import

    suite, tasks = run.config.env.suite, ", ".join(map(str, run.config.env.tasks))
    common = {"license": license_, "tags": ["worldenv", "robotics", suite]}
    measured = _success(run, chosen, results)
    if chosen.kind == "data":
        facts = DatasetCardData(**common, task_categories=["robotics"])
    else:
        found = None
        if measured:
            found = EvalResult(
                task_type="robotics",
                dataset_type=suite,
                dataset_name=f"{suite}, tasks {tasks}, held-out starts",
                metric_type="success_rate",
                metric_name=f"success of {measured['episodes']} episodes",
                metric_value=round(measured["successes"] / measured["episodes"], 4),
            )
        facts = ModelCardData(
            **common,
            library_name="worldenv",
            pipeline_tag="robotics",
            model_name=chosen.name,
            eval_results=[found] if found else None,
        )
    robot = f"{run.embodiment.name}, cameras of {run.config.env.image_size} pixels"
    lines = [
        f"---\n{facts.to_yaml()}\n---",
        f"# {chosen.name}",
        f"{_WORDS.get(chosen.kind, 'Episodes of a robot')}, from a run of worldenv (World-Env, "
        f"[arXiv 2509.24948](https://arxiv.org/abs/2509.24948)): {suite}, tasks {tasks}; robot "
        f"{robot}.",
        "## Figures",
        *(_figures(run, chosen, results, measured) or ["This run has not measured it."]),
        "## Use",
        f"```\n{_use(run, chosen, repository)}\n```",
        *_origin(results),
    ]
    return "\n\n".join(lines) + "\n"


def _success(run: Run, chosen: Chosen, results: dict | None) -> dict | None:
    """Successes and episodes of a policy that the run evaluated."""
    labels = {"policy-sft": "sft", f"policy-{run.config.posttrain.rounds - 1}": "posttrained"}
    return results and results.get(labels.get(chosen.name, ""))


def _figures(run: Run, chosen: Chosen, results: dict | None, measured: dict | None) -> list[str]:
    """Paragraphs, none where nothing was measured."""
    if chosen.kind == "data":
        record = run.record(chosen.step.name)
        return [f"{record['episodes']} episodes, of which {record['successes']} succeeded."]
    if measured:
        rate = wilson(measured["successes"], measured["episodes"])
        text = (
            f"Success in the real benchmark, on held-out starts: {measured['successes']} of "
            f"{measured['episodes']}, {rate.mean:.1%} (95% interval {rate.low:.1%} to "
            f"{rate.high:.1%})."
        )
        gain = results["paired_difference"]
        if chosen.name != "policy-sft" and gain:
            before = results["sft"]
            text += (
                f" The imitated policy it was post-trained from: {before['successes']} of "
                f"{before['episodes']}; paired difference {100 * gain['mean']:+.1f} points (95% "
                f"interval {100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})."
            )
        return [text]
    found = results and results["stages"].get(f"fidelity-{chosen.step.number}")
    if not found or chosen.kind == "policy":
        return []
    numbers = {k: v for k, v in found.items() if isinstance(v, int | float)}
    if chosen.kind == "reflector":
        last = chosen.step.number == run.config.posttrain.rounds - 1
        judged = results["reflector"] if last else {}
        numbers = {k: v for k, v in judged.items() if isinstance(v, int | float)}
    rows = [f"| {name} | {value:g} |" for name, value in numbers.items()]
    head = "Measured on held-out real episodes of the run (docs/measures.md says how):"
    return [head, "\n".join(["| | |", "| --- | --- |", *rows])] if rows else []


def _use(run: Run, chosen: Chosen, repository: str) -> str:
    preset = run.config.preset
    if chosen.kind == "data":
        return f"worldenv-train --preset {preset} --data {repository}"
    lines = [f"worldenv-train --preset {preset} --{chosen.kind} {repository}"]
    if chosen.kind == "policy":
        lines.append(f"worldenv-collect policy --preset {preset} --policy {repository}")
    return "\n".join(lines)


def _origin(results: dict | None) -> list[str]:
    if not results:
        return []
    facts = {
        "command": f"`{results['command']}`",
        "seed": results["seed"],
        "commit of worldenv": results["commit"],
        "real episodes used": results["real_episodes_used"],
        "assets": results["stages"]["evaluate"].get("assets"),
        "machine": results["machine"].get("gpu") or results["machine"].get("cpu"),
    }
    rows = "\n".join(f"- {k}: {v}" for k, v in facts.items() if v is not None)
    return ["## How it was made", rows, "Everything that the run measured is in results.json."]
