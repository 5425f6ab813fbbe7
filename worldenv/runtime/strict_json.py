"""JSON files as people and programs leave them: read whole, or refused by name.

Python's reader takes NaN, keeps the last of two equal keys, and ends in RecursionError,
UnicodeDecodeError or a plain ValueError for other faults. A byte-order mark, which editors on
Windows write, is not a fault.
"""

import json
from pathlib import Path
from typing import Any

from worldenv.runtime.errors import UserError

LARGEST = 64 << 20  # bytes; a run's own files stay far below


def read(path: Path | str, largest: int = LARGEST) -> Any:
    """The value in a JSON file. FileNotFoundError if there is none, UserError for anything else."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: expected a JSON file, got a folder or device of that name.")
        size = path.stat().st_size
        if size > largest:
            raise UserError(f"{path}: expected at most {largest:,} bytes of JSON, got {size:,}.")
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {path}: {error}. Check the path and its rights.") from error
    return parse(data, str(path))


def parse(data: bytes | str, where: str) -> Any:
    """The value of a JSON text; `where` it came from, for the UserError."""
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: expected UTF-8, got a byte that is none at {error.start}. "
            "Save the file as UTF-8."
        ) from error
    except RecursionError as error:
        raise UserError(f"{where}: expected JSON, got lists or tables nested too deep.") from error
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}. Mend or restore the file.") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} comes twice")
    return table


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is not a number in JSON")
