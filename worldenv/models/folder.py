"""Folders of published models as they lie on the disk: their shards, and which folder it is.

Nothing here reads a whole shard, and no library that defines a model is imported.
"""

import hashlib
from pathlib import Path
from typing import Any

from worldenv.runtime import strict_json
from worldenv.runtime.checkpoint import read_error
from worldenv.runtime.errors import UserError

INDEX = "model.safetensors.index.json"
_SETTINGS, _WEIGHTS = (".json", ".jinja", ".model", ".txt"), (".safetensors", ".pt", ".pth")
SAMPLES, SAMPLE = 16, 64 << 10  # stretches of each file that the digest reads, and their bytes
AGAIN = "Download the folder again, whole, or name another."


def read(folder: Path, name: str) -> dict[str, Any]:
    """The table in a folder's JSON file; an empty one if there is no such file."""
    try:
        value = strict_json.read(folder / name)
    except FileNotFoundError:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{folder / name}: expected a JSON object, got a list or a value. {AGAIN}")
    return value


def shards(folder: Path) -> list[Path]:
    """The files of a folder's weights. UserError naming those that are missing."""
    index = read(folder, INDEX)
    named = index.get("weight_map", {"": "model.safetensors"})
    if not isinstance(named, dict) or not all(isinstance(n, str) for n in named.values()):
        raise UserError(f"{folder / INDEX}: weight_map: expected tensors' files by name. {AGAIN}")
    paths = [folder / name for name in sorted(set(named.values()))]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        pickles = any(folder.glob("*.bin"))
        hint = " Its .bin files are pickles, which are not opened." if pickles else ""
        raise UserError(
            f"{missing[0]} is missing ({len(missing)} of {len(paths)} safetensors files of this "
            f"model).{hint} {AGAIN}"
        )
    return paths


def digest(folder: Path) -> str:
    """Which model a folder holds: of its settings, and of size and samples of every file of
    weights, in folders below it too. UserError for what is no folder.

    Samples, since a file has gigabytes: a fine-tuned copy has another digest, one where single
    numbers were edited may have the same.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: expected the folder of a published model, got none there.")
    found = hashlib.sha256()
    try:
        for path in sorted(folder.rglob("*")):
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
