"""Tensors of published models: named and measured first, memory-mapped when they are asked for.

A folder holds `<stem>.safetensors`, or shards and `<stem>.safetensors.index.json`, which says where
each tensor is; heads and the files of some authors are PyTorch's own, opened for tensors alone.
Whatever is wrong with them is a UserError that names the file and the tensor.
"""

import pickle
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from worldenv.models.folder import AGAIN, few, listed, read_json
from worldenv.runtime.errors import NonFiniteError, UserError, read_error

_FLOATS = ("BF16", "F16", "F32", "F64")
_FINITE: set[tuple] = set()
"""Tensors, by file as it was, that have no NaN: each stage loads its models anew, and needs not
read all of their weights anew for that."""
# What torch's reader ends in where a file is not what it was.
_DAMAGE = (
    *(RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError),
    struct.error,
)


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
                f"{folder}: expected {index.name} and its shards, or {single.name}; got "
                f"{listed(folder)}.{_pickles(folder)} {AGAIN}"
            )

    def _take(self, path: Path, names: list[str] | None) -> None:
        with _opened(path) as file:
            present = set(file.keys())
            named = present if names is None else set(names)
            if named != present:
                absent, more = sorted(named - present), sorted(present - named)
                wrong = f"lacks {few(absent)}, which" if absent else f"holds {few(more)}, which"
                says = "its index places there" if absent else "its index does not name"
                raise UserError(f"{path} {wrong} {says}: not of one download. {AGAIN}")
            for name in present:
                part = file.get_slice(name)
                self.shapes[name], self.kinds[name] = part.get_shape(), part.get_dtype()
                self.places[name] = path

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Weights by name, in the file's own memory. UserError naming those that are quantised,
        NonFiniteError one with a NaN."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.places[name], []).append(name)
        asked = [name for part in by_file.values() for name in part]
        odd = [f"{name} {self.kinds[name]}" for name in asked if self.kinds[name] not in _FLOATS]
        if odd:
            raise UserError(
                f"{self.folder}: expected weights as {', '.join(_FLOATS)}, got {few(odd)}. "
                "Quantised copies are not supported: download the original."
            )
        out = {}
        for path, wanted in by_file.items():
            found = path.stat()
            seen = (path, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
            with _opened(path) as file:
                for name in wanted:
                    out[name] = file.get_tensor(name)
                    if (*seen, name) not in _FINITE:
                        finite(out[name], name, path)
                        _FINITE.add((*seen, name))
        return out


def _files(index: Path) -> dict[Path, list[str]]:
    """Shards and the names of their tensors, as an index has them."""
    table = read_json(index).get("weight_map")
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
            f"{few(absent)}.{_pickles(index.parent)} {AGAIN}"
        )
    return files


def _pickles(folder: Path) -> str:
    held = folder.is_dir() and any(folder.glob("*.bin"))
    return " Its .bin files are pickles, which are not opened." if held else ""


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


def read_pth(path: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file, memory-mapped where its format allows, under its names.

    A table that holds the weights as "model_state_dict" is unwrapped. UserError for a damaged file,
    for one that holds code, and for one that holds no table of finite tensors.
    """
    try:
        # Before torch 1.6 files were plain pickles, which cannot be mapped.
        mapped = zipfile.is_zipfile(path)
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: expected tensors alone, got a pickle that asks for code or is damaged: "
            f"{_first(error)} Such a file is not opened. If you trust its author, load it "
            "elsewhere and save its state dict by itself."
        ) from error
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise read_error(path, error) from error
    except _DAMAGE as error:
        raise UserError(f"{path} is damaged: {_first(error)} {AGAIN}") from error
    if isinstance(held, dict):
        held = held.get("model_state_dict", held)
    if not isinstance(held, dict) or not held:
        raise UserError(f"{path}: expected a table of tensors, got {_what(held)}. {AGAIN}")
    for name, tensor in held.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path}: {name!r}: expected a tensor, got {_what(tensor)}. {AGAIN}")
        finite(tensor, name, path)
    return dict(held)


def _first(error: Exception) -> str:
    """The first sentence of torch's long messages that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "GLOBAL" in line or "nsupported" in line]
    return (telling or lines or [type(error).__name__])[0].split("Please")[0].rstrip(" .") + "."


def _what(value: object) -> str:
    return "an empty table" if value == {} else f"a {type(value).__name__}"


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


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Of tensors, or of a state, by name."""
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def check_shapes(
    own: Mapping[str, list[int]],
    found: Mapping[str, list[int]],
    source: Path | str,
    reason: str = AGAIN,
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


def fill(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    source: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Give `module`, which may be on `meta`, the `tensors` read from `source` as its own.

    dtype: what floating point tensors become (None: they stay as they are, which copies nothing).
    UserError for missing, unexpected and misshapen tensors; `module` is untouched then.
    """
    check_shapes(shapes(module.state_dict()), shapes(tensors), source)
    own = {
        name: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    module.load_state_dict(own, assign=True)
