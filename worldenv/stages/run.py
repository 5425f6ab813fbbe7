"""A run folder and what a stage is.

A stage writes its artifacts, then its record `stages/<name>.json` with the fingerprint of
everything it depends on and the digests of what it made (`records.py`). A stage whose record
matches is skipped, so a run can be repeated, resumed or extended by the same command.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from worldenv.config import Config, PolicyConfig, load
from worldenv.fields import fingerprint, to_dict
from worldenv.runtime import device as devices
from worldenv.runtime import parallel, ranks
from worldenv.runtime.errors import UserError, read_error, write_error
from worldenv.runtime.lock import FolderLock
from worldenv.runtime.logging import NoLogger, RunLogger
from worldenv.stages.reality import Reality, benchmark, embodiment


def acting(device: torch.device, part: PolicyConfig) -> torch.device:
    """Where a policy acts in the real benchmark: on the CPU, on a thread for each episode, or where
    it trains if only that device is fast enough."""
    return device if part.large else torch.device("cpu")


class Run:
    """Everything a stage needs: `config`, `dir`, `device`, `logger`, `benchmark`, `reality` (its
    episodes), `embodiment` (its robot) and the finished records.

    writes: whether to be the only run at work in the folder (UserError if there is another).
    Whoever only reads disturbs nobody. force: whether to train in a world that the gate refuses.
    """

    def __init__(self, config: Config, writes: bool = True, force: bool = False) -> None:
        self.config, self.dir, self.force = config, Path(config.run_dir), force
        self.device = devices.pick(config.device)
        # Several shards on a GPU run one after the other: their activations add up else.
        alone = self.device.type == "cuda" and config.shards
        count = 1 if alone else config.threads
        parallel.use_threads(count, config.shards)
        self._lock: FolderLock | None = None
        if writes:
            ranks.together(self._hold)
        self.reality, self.embodiment = Reality(config), embodiment(config)
        self.benchmark = benchmark(config)

    def _hold(self) -> None:
        self._lock = FolderLock(self.dir)

    @property
    def acting(self) -> torch.device:
        """Where this run's policies act in the real benchmark."""
        return acting(self.device, self.config.policy)

    @cached_property
    def logger(self) -> RunLogger:
        """The run's metrics, opened when the first stage logs; rank 0 writes them."""
        return RunLogger(self.dir) if ranks.lead() else NoLogger()

    def path(self, *parts: str) -> Path:
        """A path inside the run folder; its parent is created."""
        path = self.dir.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def save_config(self) -> None:
        """Write config.json: of what is at work in the folder, or finished there."""
        write_json(self.dir / "config.json", to_dict(self.config))

    def record(self, name: str) -> dict:
        """The record of a finished stage of this run. UserError if it has not run."""
        record = read_record(self.dir / "stages" / f"{name}.json")
        if record is None:
            raise UserError(
                f"stage {name!r} has not run in {self.dir}. Run worldenv-train with this "
                "run_dir first, or name an artifact of another run."
            )
        return record

    def close(self) -> None:
        """Close the metrics, end the simulators and let others work in the folder."""
        self.reality.close()
        if "logger" in self.__dict__:
            self.logger.close()
        if self._lock is not None:
            self._lock.release()


@dataclass(frozen=True)
class Stage:
    """One step of the method, declared beside its code.

    In `makes` "{n}" stands for the round.
    """

    name: str
    work: Callable[[Run, str, int], dict]
    """work(run, fingerprint, round) writes what the stage makes; returns its record, JSON-able."""
    settings: Callable[[Config, int], tuple]
    """What of the configuration its result depends on, in a round."""
    needs: Callable[[Config, int], tuple[str, ...]] = lambda config, number: ()
    """Names of the recorded stages whose artifacts it reads, in a round."""
    makes: tuple[str, ...] = ()
    """Files and folders that later stages read, relative to the run folder."""
    keeps: tuple[str, ...] = ()
    """Files by which interrupted work goes on, besides checkpoints/<log>.*.safetensors."""
    logs: Callable[[str, int], tuple[str, ...]] = lambda name, number: (name,)
    """Its names in the metrics, of the step's name and round."""
    rounds: bool = True
    """Whether it runs once in every round."""
    wanted: Callable[[Config], bool] = lambda config: True
    """Whether a configuration has it at all."""


@dataclass(frozen=True)
class Step:
    """A stage in one of the rounds."""

    stage: Stage
    number: int

    @property
    def name(self) -> str:
        """Of its record."""
        return f"{self.stage.name}-{self.number}" if self.stage.rounds else self.stage.name

    @property
    def makes(self) -> tuple[str, ...]:
        """Paths of its artifacts, relative to the run folder."""
        return tuple(path.format(n=self.number) for path in self.stage.makes)

    @property
    def logs(self) -> tuple[str, ...]:
        """What it is called in the metrics."""
        return self.stage.logs(self.name, self.number)

    def needs(self, config: Config) -> tuple[str, ...]:
        """Names of the steps it builds on, each once."""
        return tuple(dict.fromkeys(self.stage.needs(config, self.number)))

    def mark(self, config: Config, marks: dict[str, str]) -> str:
        """Its fingerprint; marks: of the steps before it."""
        before = (marks[name] for name in self.needs(config))
        cut = ("shards", config.shards) if config.shards else ()
        settings = (*self.stage.settings(config, self.number), *cut)
        return fingerprint(config.seed, *settings, *before)


def open_run(run_dir: Path, **changes: Any) -> Run:
    """An existing run folder with its own configuration, some top-level fields changed; to read."""
    config = load(Path(run_dir) / "config.json")
    return Run(dataclasses.replace(config, run_dir=Path(run_dir), **changes), writes=False)


def policy_before(number: int) -> str:
    """Name of the checkpoint of the policy that explores in a round."""
    return f"policy-{number - 1}" if number else "policy-sft"


def stage_before(number: int) -> str:
    """Name of the step that made this policy."""
    return f"posttrain-{number - 1}" if number else "sft"


def world_of(config: Config, number: int) -> str:
    """Name of the step, and of its checkpoint, that made the world a round imagines in."""
    return f"{'distill' if config.distill.on else 'simulator'}-{number}"


def data_up_to(number: int) -> tuple[str, ...]:
    """Names of the steps that recorded what `collect.load_round` reads."""
    return ("demonstrations", *(f"explore-{n}" for n in range(number + 1)))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; UserError if the disk refuses."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(value, indent=2) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise write_error(path, error) from error


def write_record(path: Path, record: dict) -> None:
    """Write a record that `read_record` recognises as whole."""
    record = json.loads(json.dumps(record))  # as it will be read
    write_json(path, {**record, "seal": fingerprint(path.name, record)})


def read_record(path: Path) -> dict | None:
    """What `write_record` wrote; None if there is none, and if it is not as it was written, which
    is said: a record can be made again.
    """
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        record = None
    except OSError as error:
        raise read_error(path, error) from error
    # Sealed under its name: cut short, edited or another's, it is not taken for this one.
    if isinstance(record, dict) and record.pop("seal", None) == fingerprint(path.name, record):
        return record
    _say_broken(path)
    return None


@cache
def _say_broken(path: Path) -> None:
    print(f"{path} is not as worldenv wrote it: what it was the record of is done again")
