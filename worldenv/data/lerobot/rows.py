"""Rows of a data set's episodes, and whether they are the rows its metadata speaks of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from worldenv.data.lerobot.layout import DataSet
from worldenv.data.lerobot.tables import numbers, parquet
from worldenv.runtime.errors import UserError

CHECKED = ("episode_index", "frame_index", "index", "timestamp", "task_index")


class Rows:
    """Reads one episode after the other; a file stays open, and its last row groups in memory, for
    the episodes that follow.
    """

    def __init__(self, dataset: DataSet, columns: Sequence[str]) -> None:
        """columns: what is wanted beside what is CHECKED."""
        self.dataset, self.columns = dataset, [*CHECKED, *columns]
        self._path: Path | None = None
        self._groups: tuple[int, int] | None = None

    def of(self, episode: int) -> pa.Table:
        """The rows [T] of the episode in place `episode`, in order and checked."""
        data = self.dataset
        path, first = data.data_file(episode), int(data.rows_before[episode])
        last = first + int(data.length[episode])
        with parquet(path):
            self._open(path)
            begin, end = np.searchsorted(self._ends, [first, last - 1], side="right").tolist()
            if end < len(self._ends) and self._groups != (begin, end):
                groups = range(begin, end + 1)
                self._table = self._file.read_row_groups(groups, self._have, use_threads=False)
                self._groups = begin, end
        total = int(self._ends[-1]) if len(self._ends) else 0
        if last > total:
            wanted = f"rows {first} to {last} of the file"
            raise _disagrees(path, "index", wanted, f"{total} rows", data, episode)
        offset = int(self._ends[begin - 1]) if begin else 0
        rows = self._table.slice(first - offset, last - first)
        self._check(rows, path, episode)
        return rows

    def _open(self, path: Path) -> None:
        if path == self._path:
            return
        self._path = self._groups = None
        self._file = pq.ParquetFile(path)
        facts = self._file.metadata
        sizes = [facts.row_group(k).num_rows for k in range(facts.num_row_groups)]
        self._ends = np.cumsum(np.array(sizes, np.int64))
        self._have = [name for name in self._file.schema_arrow.names if name in self.columns]
        self._path = path

    def _check(self, rows: pa.Table, path: Path, episode: int) -> None:
        data, count = self.dataset, np.arange(len(rows))
        expected = {
            "episode_index": np.full(len(rows), data.number[episode]),
            "frame_index": count,
            "index": data.first[episode] + count,
        }
        for name, values in expected.items():
            got = numbers(rows, name, path)
            wrong = np.flatnonzero(got != values)
            if len(wrong):
                k = int(wrong[0])
                raise _disagrees(path, name, f"{values[k]} in row {k}", got[k], data, episode)
        time, due = numbers(rows, "timestamp", path, "f"), count / data.fps
        wrong = np.flatnonzero(~(np.abs(time - due) <= 1e-4 + 1e-6 * due))  # kept as float32
        if len(wrong):
            k = int(wrong[0])
            raise UserError(
                f"{path}: timestamp: expected {due[k]:.4f} s in row {k} of episode "
                f"{data.number[episode]}, by {data.fps:g} frames a second (fps in meta/info.json), "
                f"got {time[k]:.4f}. Give info.json the rate of its data, or download both again."
            )
        task, said = numbers(rows, "task_index", path), data.texts[data.text[episode]]
        for key in np.unique(task).tolist():
            if data.tasks.get(key) != said:
                known = repr(data.tasks[key]) if key in data.tasks else f"task {key}, unknown"
                raise _disagrees(path, "task_index", f"{said!r}", known, data, episode)


def _disagrees(
    path: Path, key: str, expected: str, got: object, data: DataSet, episode: int
) -> UserError:
    return UserError(
        f"{path}: {key}: expected {expected} of episode {data.number[episode]}, as {data.folder}/"
        f"meta says, got {got}. The index and the data are not of one version: download the data "
        "set again, whole."
    )
