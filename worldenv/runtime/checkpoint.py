"""Checkpoints: one safetensors file with its JSON metadata in the header, replaced atomically.

A reader sees the previous file or the new one, never a part: the new file is written beside it,
flushed to the disk and renamed over it. Nothing is pickled. Optimizer state is flattened to tensors
under parameter names, so a resumed run on a CPU repeats the uninterrupted one bit for bit (random
draws come from `seeds`, which keep no state).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from worldenv.runtime.errors import UserError, read_error, write_error

_HEADER_KEY = "worldenv"
_STATE = "optimizer/state/"
_GROUP = "optimizer/group/"
_AGAIN = "Run the stage that wrote it again, or name another checkpoint."
_ANOTHER = "It was trained with another configuration: use the one saved beside it, or train anew."


def save(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write `tensors` and JSON-able `metadata` to `path`, atomically.

    Tensors may live on any device and share memory; each is stored whole. Raises UserError when the
    file cannot be written (disk full, no permission): what was at `path` before is still there.
    """
    path = Path(path)
    header = {_HEADER_KEY: json.dumps(dict(metadata), allow_nan=False)}
    # One name for all attempts, so that what a killed process left behind is written over.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(_unshared(tensors), temporary, metadata=header)
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise write_error(path, error) from error
    finally:
        if temporary.is_file():
            temporary.unlink()


def load(
    path: Path | str, device: torch.device | str = "cpu", header: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (header: none of them) and metadata that `save` wrote to `path`.

    Raises UserError for a missing file, a truncated one, and one that `save` did not write.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"No checkpoint at {path}. Run the stage that writes it, or correct the path."
        )
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = _metadata(file.metadata() or {}, path)
            names = () if header else file.keys()
            return {name: file.get_tensor(name) for name in names}, metadata
    except SafetensorError as error:
        raise UserError(
            f"{path} ({path.stat().st_size:,} bytes) is truncated or no safetensors file: {error}. "
            "If a stage of a run wrote it, run that stage again: it is made anew. Otherwise name a "
            "checkpoint that worldenv wrote; PyTorch's own files are pickles, which are not opened."
        ) from error
    except OSError as error:
        raise read_error(path, error) from error


def _metadata(header: Mapping[str, str], path: Path) -> dict[str, Any]:
    if _HEADER_KEY not in header:
        raise UserError(
            f"{path} is a safetensors file, but not one of worldenv's: its header lacks "
            f"{_HEADER_KEY!r}. Name a checkpoint that worldenv wrote."
        )
    try:
        metadata = json.loads(header[_HEADER_KEY])
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: metadata {_HEADER_KEY!r}: expected JSON, got {error}. {_AGAIN}"
        ) from error
    if not isinstance(metadata, dict):
        raise UserError(
            f"{path}: metadata {_HEADER_KEY!r}: expected a JSON object, got "
            f"{type(metadata).__name__}. {_AGAIN}"
        )
    return metadata


def fact(metadata: Mapping[str, Any], name: str, kind: type, path: Path | str) -> Any:
    """`metadata[name]`, sure to be a `kind`; UserError naming the file and the field otherwise."""
    value = metadata.get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        got = repr(value)[:80] if name in metadata else "none"
        raise UserError(f"{path}: metadata {name!r}: expected {kind.__name__}, got {got}. {_AGAIN}")
    return value


def resume(
    path: Path, mark: str, facts: Mapping[str, type]
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What an interrupted stage left at `path` under `mark`: tensors and metadata, which holds
    `facts` (name: type).

    None if there is nothing to go on from: no file, one of another mark, or a damaged one, which is
    said in a line.
    """
    if not path.exists():
        return None
    try:
        tensors, metadata = load(path)
        if metadata.get("mark") != mark:
            return None
        for name, kind in facts.items():
            fact(metadata, name, kind, path)
    except UserError as error:
        print(f"nothing to go on from, so the stage begins anew: {error}")
        return None
    return tensors, metadata


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` under the names `prefix + name`."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def selected(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of `tensors` whose name begins with `prefix`, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def weights(module: nn.Module, frozen: bool = True) -> dict[str, Tensor]:
    """A module's state; with `frozen` False, without the parameters that require no gradient: they
    come from elsewhere."""
    held = {n for n, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {n: t for n, t in module.state_dict().items() if frozen or n not in held}


def load_module(
    module: nn.Module, tensors: Mapping[str, Tensor], source: Path | str, frozen: bool = True
) -> None:
    """Copy `tensors` into `module`, by name: all of it, or with `frozen` False what `weights` then
    names. Raises UserError naming the differences; nothing is copied then.

    source: where the tensors came from, for the message.
    """
    check_fit(weights(module, frozen), tensors, source, type(module).__name__)
    module.load_state_dict(dict(tensors), strict=frozen)


def check_fit(
    own: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    source: Path | str,
    name: str,
    mend: str = _ANOTHER,
) -> None:
    """UserError unless `tensors` have the names and shapes of `own`, which belong to a `name`.

    mend: what the message advises.
    """
    wrong = [f"missing {name}" for name in own if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in own]
    wrong += [
        f"{name}: expected {_layout(own[name])}, got {_layout(tensors[name])}"
        for name in own
        if name in tensors and _layout(own[name]) != _layout(tensors[name])
    ]
    if wrong:
        shown = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise UserError(f"{source} does not fit {name}: {shown}. {mend}")


def _layout(tensor: Tensor) -> str:
    """What must agree for one tensor to be copied into another; precisions may differ."""
    kind = "" if tensor.is_floating_point() else f" {str(tensor.dtype).removeprefix('torch.')}"
    return f"{list(tensor.shape)}{kind}"


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state and its groups' numbers (lr, betas, ...) as tensors named by parameter.

    Raises ValueError for a parameter that is not `module`'s, TypeError for state that is not a
    tensor.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    out: dict[str, Tensor] = {}
    for index, group in enumerate(optimizer.param_groups):
        for key, value in _numbers(group).items():
            out[f"{_GROUP}{index}/{key}"] = torch.tensor(value, dtype=torch.float64)
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise ValueError(
                    f"the optimizer's parameter {list(parameter.shape)} is not the module's"
                )
            for key, value in optimizer.state.get(parameter, {}).items():
                if not isinstance(value, Tensor):
                    raise TypeError(
                        f"optimizer state {key!r} is a {type(value).__name__}, expected a tensor"
                    )
                out[f"{_STATE}{names[id(parameter)]}/{key}"] = value
    return out


def load_optimizer(
    optimizer: torch.optim.Optimizer, module: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Restore what `optimizer_tensors` took. `tensors` may hold other names too; they are left
    alone.

    Raises UserError when the state is of parameters that `module` lacks or of other shapes; nothing
    is changed then.
    """
    state, groups = _optimizer_state(optimizer, module, tensors)
    for group, numbers in zip(optimizer.param_groups, groups, strict=True):
        group.update(numbers)
    optimizer.state.clear()
    optimizer.state.update(state)


def _optimizer_state(
    optimizer: torch.optim.Optimizer, module: nn.Module, tensors: Mapping[str, Tensor]
) -> tuple[dict[nn.Parameter, dict[str, Tensor]], list[dict[str, Any]]]:
    """What `load_optimizer` restores: by parameter, and the numbers of each group."""
    parameters = dict(module.named_parameters())
    state: dict[nn.Parameter, dict[str, Tensor]] = {}
    for name, tensor in selected(_STATE, tensors).items():
        owner, key = name.rsplit("/", 1)
        if owner not in parameters:
            raise UserError(
                f"The checkpoint's optimizer state is of {owner}, which the model lacks. "
                "Train anew."
            )
        if tensor.ndim and tensor.shape != parameters[owner].shape:
            raise UserError(
                f"The checkpoint's optimizer state {key!r} of {owner}: expected "
                f"{list(parameters[owner].shape)}, got {list(tensor.shape)}. Train anew."
            )
        # Adam keeps its step count on the CPU. Moments belong beside their parameter, and laid out
        # like it: the fused kernel pairs them by memory order.
        if tensor.ndim == 0:
            value = tensor.detach().clone()
        else:
            value = torch.empty_like(parameters[owner], dtype=tensor.dtype).copy_(tensor)
        state.setdefault(parameters[owner], {})[key] = value.detach()
    if len({frozenset(values) for values in state.values()}) > 1:
        raise UserError("The checkpoint's optimizer state is not whole. Train anew.")
    stored = selected(_GROUP, tensors)
    groups: list[dict[str, Any]] = []
    for index, group in enumerate(optimizer.param_groups):
        groups.append({})
        for key, value in _numbers(group).items():
            name = f"{index}/{key}"
            if name not in stored:
                raise UserError(
                    f"The checkpoint lacks the optimizer's {key!r} of group {index}. Train anew."
                )
            saved = stored[name].tolist()
            if isinstance(saved, list) != isinstance(value, tuple):
                raise UserError(
                    f"The checkpoint's {key!r} of the optimizer's group {index}: expected one like "
                    f"{value}, got {saved}. Train anew."
                )
            groups[-1][key] = tuple(saved) if isinstance(value, tuple) else type(value)(saved)
    return state, groups


def training_tensors(
    module: nn.Module, optimizer: torch.optim.Optimizer, frozen: bool = True
) -> dict[str, Tensor]:
    """What a training stage needs to go on: `weights`, as "model/<name>", and optimizer state."""
    return prefixed("model/", weights(module, frozen)) | optimizer_tensors(optimizer, module)


def load_training(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    source: Path | str,
    frozen: bool = True,
) -> None:
    """Restore what `training_tensors` took; `source` is where it came from, for messages.

    Raises UserError where it does not fit; nothing is changed then.
    """
    check_training(module, optimizer, tensors, source, frozen)
    load_module(module, selected("model/", tensors), source, frozen)
    load_optimizer(optimizer, module, tensors)


def check_training(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    source: Path | str,
    frozen: bool = True,
) -> None:
    """UserError where `load_training` would raise it."""
    check_fit(weights(module, frozen), selected("model/", tensors), source, type(module).__name__)
    _optimizer_state(optimizer, module, tensors)


def _numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group's numeric settings (not flags, not None)."""
    return {
        key: value
        for key, value in group.items()
        if key != "params"
        and not isinstance(value, bool)
        and (isinstance(value, int | float) or (isinstance(value, tuple) and value))
    }


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, no two in the same memory, as safetensors wants them."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != value.nbytes:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        out[name] = value
    return out


def _flush(path: Path) -> None:
    """Wait until the file or folder has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
