"""The pipeline with stages that write what the real ones would, and learn nothing."""

import hashlib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from worldenv.config import Config
from worldenv.presets import preset
from worldenv.runtime import logging
from worldenv.runtime.logging import read_metrics
from worldenv.stages import evaluate, pipeline, records, results
from worldenv.stages.run import Run, Stage, Step, read_record

COSTS = pipeline.estimate.Costs(sample=0.01, window=0.1, judged=0.05, frame=0.01, chunk=0.1)
SMOKE = preset("smoke")
NAMES = tuple(pipeline.steps(SMOKE))


def makes(step: Step) -> list[str]:
    """Paths of what a step of small models makes: no adapters, which published ones leave."""
    return [path for path in step.makes if path.startswith("data/") or Path(path).suffix]


class NoMemory(nullcontext):
    """Stands in for the watch over memory, which looks at every process of the machine."""

    def __enter__(self) -> "NoMemory":
        return self

    def peaks(self) -> dict[str, int]:
        return {"peak_memory_bytes": 1}


class Board:
    """Stands in for TensorBoard: one file of what was logged."""

    def __init__(self, folder: str, purge_step: int | None) -> None:
        self.path = Path(folder) / "events"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.path.write_text(f"{name} {value}")

    def close(self) -> None:
        pass


class Toy:
    """Runs stages in `folder`. What a stage makes depends on its fingerprint and on what the stages
    before it made; `done` lists the steps that worked to their end.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.done, self.stop = folder, [], ""
        patch.setattr(pipeline, "FIRST", tuple(map(self._stage, pipeline.FIRST)))
        patch.setattr(pipeline, "ROUND", tuple(map(self._stage, pipeline.ROUND)))
        patch.setattr(evaluate, "STAGE", self._stage(evaluate.STAGE))
        patch.setattr(results, "report", self._report)
        patch.setattr(logging, "SummaryWriter", Board)
        patch.setattr(records.devices, "PeakMemory", NoMemory)
        patch.setattr(pipeline.estimate, "calibrate", lambda *_: COSTS)  # it takes seconds

    def config(self, **changes) -> Config:
        """The smoke preset; changes: of top-level fields, or of a part's ("sft__lr")."""
        config = SMOKE
        for name, value in changes.items():
            part, _, field = name.partition("__")
            value = replace(getattr(config, part), **{field: value}) if field else value
            config = replace(config, **{part: value})
        return replace(config, run_dir=self.folder, device="cpu")

    def run(self, stage="all", number=0, *, files=None, stop="", **changes) -> list[str]:
        """Names of the steps that worked; stop: the step that is interrupted half way."""
        self.done, self.stop = [], stop
        run = Run(self.config(**changes))
        try:
            if stage == "all":
                pipeline.run_all(run, files, number)
            else:
                pipeline.run_stage(run, stage, number, files)
        finally:
            run.close()
        return self.done

    def interrupt(self, stop: str, *command, **changes) -> None:
        """Run until `stop` is half way."""
        with pytest.raises(KeyboardInterrupt):
            self.run(*command, stop=stop, **changes)

    def steps(self, **changes) -> dict[str, Step]:
        """All steps by name."""
        return pipeline.steps(self.config(**changes))

    def state(self) -> dict[str, object]:
        """What stands in place: artifacts, records (without clocks and inodes), metrics by log."""
        found: dict[str, object] = {}
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            name = str(path.relative_to(self.folder))
            if name.startswith(("data/", "checkpoints/", "tensorboard/")):
                found[name] = path.read_bytes()
            elif name.startswith("stages/"):
                record = read_record(path)
                assert record is not None
                clocks = {"seconds", "artifacts", "peak_memory_bytes", "went_on"}
                found[name] = {k: v for k, v in record.items() if k not in clocks}
        for row in read_metrics(self.folder):
            found.setdefault(f"log {row['stage']}", []).append(row["mark"])
        return found

    def everything(self) -> dict[str, bytes]:
        """All files of the folder."""
        files = (p for p in self.folder.rglob("*") if p.is_file() and p.name != ".lock")
        return {str(p.relative_to(self.folder)): p.read_bytes() for p in files}

    def _stage(self, stage: Stage) -> Stage:
        def work(run: Run, mark: str, number: int) -> dict:
            return self._work(run, Step(stage, number), mark)

        return replace(stage, work=work)

    def _work(self, run: Run, step: Step, mark: str) -> dict:
        every = pipeline.steps(run.config)
        seen = [mark]
        for name in step.needs(run.config):
            for path in makes(every[name]):
                files = sorted((run.dir / path).rglob("*.hdf5")) or [run.dir / path]
                seen += [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        content = hashlib.sha256("".join(seen).encode()).hexdigest()
        partial = run.path("checkpoints", f"{step.name}.partial.safetensors")
        went_on = partial.exists() and partial.read_text() == mark
        partial.write_text(mark)
        run.logger.rewind(step.logs[-1], 0)
        run.logger.log(step.logs[-1], 0, mark=mark, value=int(mark, 16))
        names = [f"{p}/{k}.hdf5" if p.startswith("data/") else p for p in makes(step) for k in "ab"]
        for count, name in enumerate(names):
            if count and self.stop == step.name and name.startswith("data/"):
                break
            if self.stop != step.name or name.startswith("data/"):
                run.path(*name.split("/")).write_text(content)
        if self.stop == step.name:
            raise KeyboardInterrupt
        partial.unlink()
        self.done.append(step.name)
        return {"went_on": went_on, "outcomes": {}}

    def _report(self, run: Run, names: list[str]) -> Path:
        path = run.path("results.json")
        path.write_text(str(run.config.seed))
        return path
