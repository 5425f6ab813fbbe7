"""Folders of published models as they lie on the disk: their shards, and which folder it is.

Nothing here opens a whole shard, and no library that defines a model is imported.
"""

import hashlib
import struct
from pathlib import Path
from typing import Any

from worldenv.runtime import strict_json
from worldenv.runtime.checkpoint import read_error
from worldenv.runtime.errors import UserError

INDEX = "model.safetensors.index.json"
SAMPLES, SAMPLE = 16, 64 << 10  # stretches of each shard that the digest reads, and their bytes
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
    """Which model a folder holds: of its settings, its tensors' names and shapes, and samples of
    every shard. UserError for what is no folder or lacks a shard.

    Samples, since a shard has gigabytes: a fine-tuned copy has another digest, one where single
    numbers were edited may have the same.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: expected the folder of a published model, got none there.")
    found = hashlib.sha256()
    weights = shards(folder)
    texts = {p for p in folder.iterdir() if p.suffix in (".json", ".jinja", ".model", ".txt")}
    try:
        for path in sorted(texts, key=lambda p: p.name):
            if path.is_file():
                found.update(
                    path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest()
                )
        for path in weights:
            _update(found, path)
    except OSError as error:
        raise read_error(folder, error) from error
    return found.hexdigest()


def _update(found: Any, path: Path) -> None:
    """Of a shard: its size, its header, and samples of its numbers."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
        if not 2 <= length <= size - 8:
            raise UserError(f"{path} ({size:,} bytes) is truncated or no safetensors. {AGAIN}")
        found.update(f"{path.name} {size}".encode() + file.read(length))
        for i in range(SAMPLES):
            file.seek(8 + length + max(0, size - 8 - length - SAMPLE) * i // (SAMPLES - 1))
            found.update(file.read(SAMPLE))
