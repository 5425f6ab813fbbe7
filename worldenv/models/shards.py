"""Tensors of a published folder: named and measured first, memory-mapped when they are asked for.

A folder holds `<stem>.safetensors`, or shards and `<stem>.safetensors.index.json`, which says where
each tensor is. Whatever is wrong with them is a UserError that names the file before any work.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from worldenv.runtime import strict_json
from worldenv.runtime.checkpoint import read_error
from worldenv.runtime.errors import NonFiniteError, UserError

AGAIN = "Download the folder again."


class Shards:
    """The tensors under `<folder>/<stem>*`: `shapes` and `kinds` (F32, BF16, ...) by name, data by
    `read`."""

    def __init__(self, folder: Path, stem: str = "model") -> None:
        self.folder = folder
        self.shapes: dict[str, list[int]] = {}
        self.kinds: dict[str, str] = {}
        self.places: dict[str, Path] = {}
        index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
        if index.exists() and single.exists():
            raise UserError(
                f"{folder}: expected one checkpoint, got two: {single.name}, and the shards of "
                f"{index.name}. Move the one away that is not meant."
            )
        if single.exists():
            self._take(single, None)
        elif index.exists():
            for path, names in _files(index).items():
                self._take(path, names)
        else:
            raise UserError(
                f"{folder}: expected {index.name} and its shards, or {single.name}; got neither. "
                f"Name the folder of a published model, or download it again."
            )

    def _take(self, path: Path, names: list[str] | None) -> None:
        with _opened(path) as file:
            present = set(file.keys())
            listed = present if names is None else set(names)
            if listed != present:
                absent, more = sorted(listed - present), sorted(present - listed)
                wrong = f"lacks {few(absent)}, which" if absent else f"holds {few(more)}, which"
                says = "its index places there" if absent else "its index does not name"
                raise UserError(f"{path} {wrong} {says}: not of one download. {AGAIN}")
            for name in present:
                part = file.get_slice(name)
                self.shapes[name], self.kinds[name] = part.get_shape(), part.get_dtype()
                self.places[name] = path

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name, in the file's own memory. NonFiniteError naming one with a NaN."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.places[name], []).append(name)
        out = {}
        for path, wanted in by_file.items():
            with _opened(path) as file:
                for name in wanted:
                    out[name] = finite(file.get_tensor(name), name, path)
        return out


def _files(index: Path) -> dict[Path, list[str]]:
    """Shards and the names of their tensors, as an index has them."""
    value = strict_json.read(index)
    table = value.get("weight_map") if isinstance(value, dict) else None
    named = isinstance(table, dict) and all(isinstance(v, str) for v in table.values())
    if not named or not table:
        raise UserError(f"{index}: weight_map: expected a table from tensors to files. {AGAIN}")
    files: dict[Path, list[str]] = {}
    for name, file in table.items():
        if Path(file).name != file:
            raise UserError(f"{index}: {name}: expected the name of a file beside it, got {file!r}")
        files.setdefault(index.parent / file, []).append(name)
    absent = [path.name for path in files if not path.is_file()]
    if absent:
        raise UserError(
            f"{index.parent}: expected {len(files)} shards, as {index.name} has them; missing: "
            f"{few(absent)}. {AGAIN}"
        )
    return files


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise UserError(
            f"{path} ({path.stat().st_size:,} bytes) is cut short or no safetensors file: {error}. "
            f"{AGAIN}"
        ) from error
    except OSError as error:
        raise read_error(path, error) from error


def read_json(path: Path) -> dict[str, Any]:
    """A table in a JSON file of the folder; UserError without one."""
    try:
        value = strict_json.read(path)
    except FileNotFoundError:
        raise UserError(f"{path.parent}: expected {path.name}, got none. {AGAIN}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a table, got {type(value).__name__}. {AGAIN}")
    return value


def finite(tensor: Tensor, name: str, path: Path) -> Tensor:
    """The tensor, if it has no NaN and no infinity; NonFiniteError naming it otherwise."""
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor
    # The two ends of a tensor are NaN if any of it is; a mask would be as large as itself.
    if not torch.stack(tensor.aminmax()).isfinite().all():
        bad = tensor.numel() - int(tensor.isfinite().sum())
        raise NonFiniteError(
            f"{path}: {name} {list(tensor.shape)}: expected finite weights, got {bad} NaN or "
            f"infinite value(s). {AGAIN}"
        )
    return tensor


def check_shapes(
    own: Mapping[str, list[int]],
    found: Mapping[str, list[int]],
    source: Path | str,
    reason: str,
    spare: re.Pattern | None = None,
) -> None:
    """UserError unless `found` has the names and shapes of `own`, and no others but `spare` ones.

    reason: what `own` comes from, and how to mend a difference.
    """
    missing = [name for name in own if name not in found]
    more = [n for n in found if n not in own and not (spare and spare.fullmatch(n))]
    other = [
        f"{name}: expected {list(own[name])}, got {list(found[name])}"
        for name in own
        if name in found and list(own[name]) != list(found[name])
    ]
    wrong = [f"missing {few(missing)}"] if missing else []
    wrong += [f"unexpected {few(more)}"] if more else []
    wrong += [few(other, "; ")] if other else []
    if wrong:
        raise UserError(f"{source}: {'; '.join(wrong)}. {reason}")


def few(names: Iterable[str], between: str = ", ", most: int = 4) -> str:
    """A few of the names, and how many there are."""
    names = list(names)
    more = f" and {len(names) - most} more ({len(names)} in all)" if len(names) > most else ""
    return between.join(names[:most]) + more
