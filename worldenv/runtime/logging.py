"""The run's numbers: one JSON object a line in `metrics.jsonl`, and the same as TensorBoard curves.

Each line is flushed as it is written, so a killed run keeps all but perhaps its last line; that one
is dropped on the next start. A stage that resumes calls `rewind`, which removes what it is about to
log again.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from worldenv.runtime.errors import NonFiniteError, UserError, write_error

Value = int | float | str | bool | None | Tensor | list


class RunLogger:
    """Appends metrics to `run_dir/metrics.jsonl` and `run_dir/tensorboard/<stage>/`.

    run_dir: created if absent. Raises UserError when it cannot be written, or holds a damaged log.
    """

    def __init__(self, run_dir: Path | str) -> None:
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / "metrics.jsonl"
        self._writers: dict[str, SummaryWriter] = {}
        self._purge: dict[str, int] = {}
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            _drop_unfinished_line(self.path)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise write_error(self.path, error) from error

    def log(self, stage: str, step: int, **metrics: Value) -> None:
        """Record `metrics` of `stage` at `step`. 0-d tensors are read; a NaN or infinity is stored
        as null.

        A loss that must not be NaN goes through `check_finite` first.
        """
        values = {name: _plain(name, value) for name, value in metrics.items()}
        row = {"stage": stage, "step": step, "time": round(time.time(), 3)} | values
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
            writer = self._writer(stage)
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    writer.add_scalar(name, value, step)
        except OSError as error:
            raise write_error(self.path, error) from error

    def rewind(self, stage: str, step: int) -> None:
        """Forget what `stage` logged at `step` or later: it goes on from there."""
        self._purge[stage] = step
        self._rewrite((stage,), lambda row: row["stage"] != stage or row["step"] < step, [])

    def restore(self, stages: Collection[str], rows: list[dict[str, Any]]) -> None:
        """Have `rows`, as `read_metrics` gives them, for all that `stages` ever logged."""
        self._rewrite(stages, lambda row: row["stage"] not in stages, rows)

    def _rewrite(
        self,
        stages: Collection[str],
        keep: Callable[[dict[str, Any]], bool],
        more: list[dict[str, Any]],
    ) -> None:
        """Replace the log by its rows that `keep` holds for, and `more`; closes the curves of
        `stages`.
        """
        rows = read_metrics(self.run_dir)
        kept = [row for row in rows if keep(row)]
        for stage in stages:
            if stage in self._writers:
                self._writers.pop(stage).close()
        if len(kept) == len(rows) and not more:
            return
        temporary = self.path.with_name(".metrics.jsonl.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in [*kept, *more])
                file.flush()
                os.fsync(file.fileno())
            self._file.close()
            os.replace(temporary, self.path)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise write_error(self.path, error) from error
        finally:
            temporary.unlink(missing_ok=True)

    def close(self) -> None:
        """Flush and close; a second call does nothing."""
        self._file.close()
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _writer(self, stage: str) -> SummaryWriter:
        if stage not in self._writers:
            folder = self.run_dir / "tensorboard" / stage
            self._writers[stage] = SummaryWriter(str(folder), purge_step=self._purge.get(stage))
        return self._writers[stage]


class NoLogger:
    """A `RunLogger` of a rank that writes nothing."""

    def log(self, stage: str, step: int, **metrics: Value) -> None:
        """As `RunLogger.log`."""

    def rewind(self, stage: str, step: int) -> None:
        """As `RunLogger.rewind`."""

    def close(self) -> None:
        """As `RunLogger.close`."""


def read_metrics(run_dir: Path | str, stage: str | None = None) -> list[dict[str, Any]]:
    """The rows of a run's log, in the order they were written; of one stage if named.

    An unfinished last line is ignored; [] if there is no log. Raises UserError for any other
    damage.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    # What follows the last newline is unfinished or empty.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
            row["stage"], row["step"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number}, is no metrics row: {line[:80]!r}. Delete that line."
            ) from error
        rows.append(row)
    return [row for row in rows if stage is None or row["stage"] == stage]


def check_finite(name: str, value: Tensor | float, step: int) -> None:
    """Raise NonFiniteError naming `name` and `step` if `value` holds a NaN or an infinity.

    Reads the tensor, so on a GPU it waits for it: call it where the loss is read anyway.
    """
    tensor = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))
    finite = torch.isfinite(tensor)
    if bool(finite.all()):
        return
    nans = int(torch.isnan(tensor).sum())
    infinities = tensor.numel() - int(finite.sum()) - nans
    raise NonFiniteError(
        f"{name} {list(tensor.shape)} holds {nans} NaN and {infinities} infinite of "
        f"{tensor.numel()} values at step {step}. The last checkpoint is kept. Lower the learning "
        "rate, or look for NaN in the data."
    )


def _plain(name: str, value: Value) -> int | float | str | bool | list | None:
    """A JSON value; non-finite numbers become None, since JSON has none."""
    if isinstance(value, Tensor):
        value = value.tolist()
    elif hasattr(value, "item") and not isinstance(value, int | float):  # NumPy scalars
        value = value.item()
    if isinstance(value, list | tuple):
        return [_plain(name, element) for element in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, int | float | str | bool):
        return value
    raise TypeError(
        f"metric {name!r} is a {type(value).__name__}; expected number, string or list of them"
    )


def _drop_unfinished_line(path: Path) -> None:
    """Cut the file after its last newline: a killed process may have left half a row."""
    if not path.is_file():
        return
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        with path.open("r+b") as file:
            file.truncate(end)
