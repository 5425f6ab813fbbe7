"""JSON and Parquet files as LeRobot keeps them: read whole, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from worldenv.runtime.errors import UserError

AGAIN = "Copy or download it again."


@contextmanager
def parquet(path: Path) -> Iterator[None]:
    """pyarrow's complaints about a damaged file become a UserError naming `path`."""
    try:
        yield
    except (
        pa.ArrowException,
        OSError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        MemoryError,
        OverflowError,
    ) as error:
        raise unreadable(path, "a complete Parquet file", str(error)) from error


def unreadable(path: Path, expected: str, why: str) -> UserError:
    """The error for a file that is absent or is not what its name says."""
    if not path.is_file():
        got = "a folder" if path.is_dir() else "no such file"
        return UserError(f"{path}: expected {expected}, got {got}. {AGAIN}")
    with open(path, "rb") as file:
        pointer = file.read(40).startswith(b"version https://git-lfs")
    if pointer:
        return UserError(
            f"{path}: expected {expected}, got Git LFS's note where it lies. Run `git lfs pull`."
        )
    got = f"{path.stat().st_size} bytes: {' '.join(why.split())[:300]}"
    return UserError(f"{path}: expected {expected}, got {got}. {AGAIN}")


def read_json(path: Path) -> dict[str, Any]:
    """The object a JSON file holds."""
    return _object(_text(path), path, "JSON")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects a file of JSON lines holds, in order."""
    lines = [line for line in _text(path).split("\n") if line.strip()]
    return [_object(line, path, f"JSON in line {k + 1}") for k, line in enumerate(lines)]


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, "UTF-8 text", str(error)) from error


def _object(text: str, path: Path, expected: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise unreadable(path, expected, str(error)) from error
    if not isinstance(value, dict):
        raise unreadable(path, f"{expected}: an object", f"it holds {type(value).__name__}")
    return value


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file, or those of `columns` that it has."""
    with parquet(path):
        file = pq.ParquetFile(path)
        have = file.schema_arrow.names
        wanted = have if columns is None else [name for name in columns if name in have]
        return file.read(wanted, use_threads=False)


def numbers(table: pa.Table, name: str, path: Path, kind: str = "i") -> np.ndarray:
    """A column as int64 [N] (kind "i"), float64 ("f") or bool ("b").

    One entry a row, plain or a list of one.
    """
    values = vectors(table, name, path, kind)
    if values.shape[1] != 1:
        raise _odd(path, name, "one number a row", f"{values.shape[1]}")
    return values[:, 0]


_KINDS = {  # what it becomes, dtypes taken, and their name in messages
    "i": (np.int64, "iu", "whole numbers"),
    "f": (np.float64, "fiu", "real numbers"),
    "s": (np.float32, "fiu", "real numbers"),
    "b": (np.bool_, "b", "true or false"),
}


def vectors(table: pa.Table, name: str, path: Path, kind: str = "s") -> np.ndarray:
    """A column of numbers as [N, D]: float32 (kind "s"), or as `numbers` has it."""
    dtype, taken, words = _KINDS[kind]
    if name not in table.column_names:
        raise _odd(path, name, "such a column", f"only {', '.join(table.column_names[:12])}")
    with parquet(path):
        column = table.column(name).combine_chunks()
        rows, nulls, even = len(column), column.null_count, True
        while pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
            even &= len(pc.unique(pc.list_value_length(column))) == 1
            column = column.flatten()
            nulls += column.null_count
        flat = column.to_numpy(zero_copy_only=False)
    if nulls or flat.dtype.kind not in taken:
        raise _odd(path, name, words, f"{nulls} empty entries" if nulls else str(flat.dtype))
    if not even or not len(flat) or len(flat) % rows:
        raise _odd(path, name, "as many numbers in every row", f"{len(flat)} in {rows} rows")
    with np.errstate(over="ignore"):
        return flat.astype(dtype).reshape(rows, -1)


def texts(table: pa.Table, name: str, path: Path) -> list[str]:
    """A column of text, or of lists of text: the first of each."""
    if name not in table.column_names:
        raise _odd(path, name, "such a column", f"only {', '.join(table.column_names[:12])}")
    with parquet(path):
        values = table.column(name).to_pylist()
    found = [v[0] if isinstance(v, list) and v else v for v in values]
    for row, value in enumerate(found):
        if not isinstance(value, str):
            raise _odd(path, name, "text", f"{value!r} in row {row}")
    return found


def _odd(path: Path, name: str, expected: str, got: str) -> UserError:
    return UserError(f"{path}: {name}: expected {expected}, got {got}. {AGAIN}")
