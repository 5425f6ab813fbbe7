"""A run folder: its configuration, its metrics, and which stages are finished.

A stage writes its artifacts, then its record `stages/<name>.json` with the fingerprint of
everything it depends on. A stage whose record matches is skipped, so a run can be repeated,
resumed or extended by the same command.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worldenv.config import Config, fingerprint, load, to_dict
from worldenv.runtime import device as devices
from worldenv.runtime import parallel
from worldenv.runtime.checkpoint import write_error
from worldenv.runtime.errors import UserError
from worldenv.runtime.logging import RunLogger
from worldenv.stages.reality import Reality


class Run:
    """Everything a stage needs: `config`, `dir`, `device`, `logger`, `reality` (the real
    benchmark) and the finished records."""

    def __init__(self, config: Config) -> None:
        self.config, self.dir = config, Path(config.run_dir)
        self.device = devices.pick(config.device)
        parallel.use_threads(config.threads)
        self.logger = RunLogger(self.dir)
        self.reality = Reality(config)
        self.records: dict[str, dict[str, Any]] = {}
        write_json(self.dir / "config.json", to_dict(config))

    def path(self, *parts: str) -> Path:
        """A path inside the run folder; its parent is created."""
        path = self.dir.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def stage(
        self, name: str, parts: tuple, after: tuple[str, ...], work: Callable[[str], dict]
    ) -> dict:
        """Do `work(fingerprint)` unless a record of the same fingerprint exists.

        parts: configs the stage depends on; after: names of the stages it builds on. Returns what
        work returned (JSON-able), with `seconds` and `fingerprint`.
        """
        mark = fingerprint(
            self.config.seed, *parts, *(self.record(other)["fingerprint"] for other in after)
        )
        path = self.path("stages", f"{name}.json")
        stored = read_json(path)
        if stored is not None and stored.get("fingerprint") == mark:
            print(f"{name}: done in an earlier run ({stored['seconds']:.0f} s), skipped")
            self.records[name] = stored
            return stored
        spent = self._spent(name, mark)
        begun = time.perf_counter()
        try:
            record = work(mark)
        except BaseException:
            self._spent(name, mark, time.perf_counter() - begun)
            raise
        seconds = spent + time.perf_counter() - begun
        record = {**record, "seconds": round(seconds, 2), "fingerprint": mark}
        write_json(path, record)
        self.path("stages", f"{name}.unfinished.json").unlink(missing_ok=True)
        self.records[name] = record
        return record

    def record(self, name: str) -> dict:
        """The record of a finished stage of this run. UserError if it has not run."""
        if name not in self.records:
            stored = read_json(self.dir / "stages" / f"{name}.json")
            if stored is None:
                raise UserError(
                    f"stage {name!r} has not run in {self.dir}. Run worldenv-train with this "
                    "run_dir first, or name an artifact of another run."
                )
            self.records[name] = stored
        return self.records[name]

    def _spent(self, name: str, mark: str, more: float = 0.0) -> float:
        """Seconds earlier, interrupted attempts at a stage took."""
        path = self.path("stages", f"{name}.unfinished.json")
        stored = read_json(path) or {}
        seconds = stored.get("seconds", 0.0) if stored.get("fingerprint") == mark else 0.0
        if more:
            write_json(path, {"seconds": seconds + more, "fingerprint": mark})
        return seconds

    def close(self) -> None:
        """Close the metrics and end the simulators."""
        self.logger.close()
        self.reality.close()


def open_run(run_dir: Path, **changes: Any) -> Run:
    """Open an existing run folder with its own configuration, some top-level fields changed."""
    config = load(Path(run_dir) / "config.json")
    return Run(dataclasses.replace(config, run_dir=Path(run_dir), **changes))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; UserError if the disk refuses."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(value, indent=2) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise write_error(path, error) from error


def read_json(path: Path) -> dict | None:
    """Read JSON; None where the file is absent or was cut off."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
