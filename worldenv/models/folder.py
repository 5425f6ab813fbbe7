"""Folders of published models as they lie on the disk: what is in them, and which one it is.

Their tensors are read by `weights`. No library that defines a model is imported.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from worldenv.runtime import strict_json
from worldenv.runtime.errors import UserError, read_error

AGAIN = "Download it again, whole, or name another."
_SETTINGS, _WEIGHTS = (".json", ".jinja", ".model", ".txt"), (".safetensors", ".pt", ".pth")
SAMPLES, SAMPLE = 16, 64 << 10  # stretches of each file that the digest reads, and their bytes


def check_folder(folder: Path, field: str) -> None:
    """UserError unless the folder that the configuration names in `field` is there."""
    if not folder.is_dir():
        raise UserError(
            f"config {field}: expected the folder of a published model, got {folder}, where there "
            "is none. Name the one you downloaded."
        )


def read_json(path: Path, otherwise: dict[str, Any] | None = None) -> dict[str, Any]:
    """The table in a JSON file; without that file `otherwise`, UserError if that is None."""
    try:
        value = strict_json.read(path)
    except FileNotFoundError:
        if otherwise is not None:
            return otherwise
        raise UserError(
            f"{path.parent}: expected {path.name}, got {listed(path.parent)}. {AGAIN}"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a table, got {type(value).__name__}. {AGAIN}")
    return value


def few(names: Iterable[str], between: str = ", ", most: int = 4) -> str:
    """A few of the names, and how many there are."""
    names = list(names)
    more = f" and {len(names) - most} more ({len(names)} in all)" if len(names) > most else ""
    return between.join(names[:most]) + more


def listed(folder: Path) -> str:
    """What a folder holds, in words."""
    if not folder.is_dir():
        return "a file of another kind" if folder.exists() else "no such folder"
    return few(sorted(path.name for path in folder.iterdir())) or "nothing"


def digest(folder: Path) -> str:
    """Which model a folder holds: of its settings, and of size and samples of every file of
    weights, in folders below it too; or of a file by itself. UserError for neither.

    Samples, since a file has gigabytes: a fine-tuned copy has another digest, one where single
    numbers were edited may have the same.
    """
    if not folder.exists():
        raise UserError(
            f"{folder}: expected the folder of a published model, got none there. Name the one you "
            "downloaded."
        )
    found = hashlib.sha256()
    try:
        for path in [folder] if folder.is_file() else sorted(folder.rglob("*")):
            if path.suffix not in (*_SETTINGS, *_WEIGHTS) or not path.is_file():
                continue
            size = path.stat().st_size
            found.update(f"{path.relative_to(folder)} {size}".encode() + b"\0")
            found.update(path.read_bytes() if path.suffix in _SETTINGS else _samples(path, size))
    except OSError as error:
        raise read_error(folder, error) from error
    return found.hexdigest()


def weight_bytes(folder: Path) -> int:
    """Of the files of weights in a folder, and in those below it."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.suffix in _WEIGHTS)


def _samples(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        parts = []
        for i in range(SAMPLES):
            file.seek(max(0, size - SAMPLE) * i // (SAMPLES - 1))
            parts.append(file.read(SAMPLE))
    return b"".join(parts)
