"""What can be wrong with a folder, done to a copy. Files may be links: each is replaced."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Damage = Callable[[Path], None]


class Payload:
    """What must never run: it prints `RAN`."""

    def __reduce__(self):
        return print, (RAN,)


RAN = "code ran"


def edit(path: Path, change: Callable) -> None:
    """Rewrite a JSON file; `change` gets what is in it, and returns what shall be."""
    value = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps(change(value)))


def retensor(folder: Path, name: str, change: Callable, stem: str = "model") -> None:
    """Replace one tensor, in its shard or in the only file; None takes it out."""
    index, path = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if index.exists():
        path = folder / json.loads(index.read_text())["weight_map"][name]
    tensors = {n: t.clone() for n, t in load_file(path).items()}
    value = change(tensors.pop(name))
    path.unlink()
    save_file(tensors if value is None else {**tensors, name: value}, path, {"format": "pt"})


def poisoned(tensor: Tensor) -> Tensor:
    """With one NaN."""
    tensor.flatten()[-1] = torch.nan
    return tensor


def repickle(path: Path, value: object) -> None:
    """Another PyTorch file in its place."""
    path.unlink()
    torch.save(value, path)


def drop(name: str) -> Damage:
    """Take a file away."""
    return lambda folder: (folder / name).unlink()


def put(name: str, text: str) -> Damage:
    """Text in the place of a file."""

    def act(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text(text)

    return act


def cut(name: str) -> Damage:
    """The first half of a file."""

    def act(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / name).write_bytes(data[: len(data) // 2])

    return act
