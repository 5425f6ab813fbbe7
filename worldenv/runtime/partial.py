"""What a stage that is interrupted goes on from: its partial checkpoint, of a sharded model too.

    <name>.partial.safetensors     all of it; or what is not sharded, and which folder has the rest
    <name>.partial.a (or .b)       the parts of a sharded model, written by all ranks

Parts are written by PyTorch's distributed checkpoint (DCP), while training goes on, and can be read
by any number of ranks, one included. The file is replaced when the last of them is on the disk: who
is interrupted before that goes on from the checkpoint before. Nothing is pickled: DCP's own files
would be, so parts are stored by its safetensors format, and what DCP does not check when it reads
that (whether all files are there, and whole) is checked here.
"""

import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from worldenv.runtime import checkpoint, ranks
from worldenv.runtime.errors import UserError
from worldenv.runtime.sharding import is_part

_SLOTS = ("a", "b")


class Partial:
    """The partial checkpoint at `path`. Every method is to be called on every rank."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None

    def save(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Replace it by these tensors, parts of all ranks' among them, and JSON-able metadata.

        Parts are copied and then written on a thread; the next save waits for that. UserError as of
        `checkpoint.save`.
        """
        parts = {name: t.detach().clone() for name, t in tensors.items() if is_part(t)}
        if not parts:
            if ranks.lead():
                checkpoint.save(self.path, tensors, metadata)
                self._drop(_SLOTS)
            return
        from torch.distributed import checkpoint as dcp  # takes seconds to import

        self.wait()
        rest = {name: t.detach().clone() for name, t in tensors.items() if name not in parts}
        slot = ranks.together(self._free)
        writer = dcp.HuggingFaceStorageWriter(str(self._folder(slot)), save_distributed=True)
        writing = dcp.async_save(parts, storage_writer=writer, process_group=_group())
        self._writing = self._pool.submit(self._commit, writing, slot, rest, metadata)

    def wait(self) -> None:
        """Until the last save is on the disk. UserError where the disk refused it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def resume(
        self, mark: str, facts: Mapping[str, type], like: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """As `checkpoint.resume`; like: tensors of the model that goes on, by name: what is of one
        of them (`model/<name>`, `optimizer/state/<name>/..`) comes as this rank's part of it if
        that is one."""
        found = checkpoint.resume(self.path, mark, facts)
        if found is None:
            return None
        tensors, metadata = found
        try:
            if "parts" in metadata:
                tensors |= self._read(metadata, like)
        except (UserError, SafetensorError, OSError) as error:
            print(f"nothing to go on from, so the stage begins anew: {error}")
            return None
        return {name: _laid_out(t, _owner(name, like)) for name, t in tensors.items()}, metadata

    def remove(self) -> None:
        """The stage is done."""
        self.wait()
        if ranks.lead():
            self.path.unlink(missing_ok=True)
            self._drop(_SLOTS)

    def _folder(self, slot: str) -> Path:
        return self.path.with_suffix(f".{slot}")

    def _drop(self, slots: tuple[str, ...]) -> None:
        for slot in slots:
            shutil.rmtree(self._folder(slot), ignore_errors=True)

    def _free(self) -> str:
        """The slot that the file does not name, emptied."""
        used = None
        with suppress(UserError):  # none, or a damaged one that is about to be replaced
            used = checkpoint.load(self.path, header=True)[1].get("parts")
        slot = _SLOTS[used == _SLOTS[0]]
        self._drop((slot,))
        return slot

    def _commit(self, writing: Future, slot: str, rest: dict, metadata: Mapping[str, Any]) -> None:
        """Let the file name the folder once all ranks have written, as rank 0 hears."""
        folder = self._folder(slot)
        try:
            writing.result()
        except Exception as error:
            raise UserError(
                f"{folder}: cannot be written: {error}. Free some space, or correct the "
                "permissions, and run the same command again: it goes on from the checkpoint "
                "before."
            ) from error
        if ranks.lead():
            files = {path.name: path.stat().st_size for path in folder.iterdir()}
            checkpoint.save(self.path, rest, {**metadata, "parts": slot, "files": files})

    def _read(self, metadata: Mapping[str, Any], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from torch.distributed import checkpoint as dcp

        slot = checkpoint.fact(metadata, "parts", str, self.path)
        files = checkpoint.fact(metadata, "files", dict, self.path)
        folder = self._folder(slot if slot in _SLOTS else _SLOTS[0])
        there = {p.name: p.stat().st_size for p in folder.iterdir()} if folder.is_dir() else {}
        if there != files:
            raise UserError(
                f"{folder}: expected the files {files} (bytes), got {there}: it is not whole."
            )
        reader = dcp.HuggingFaceStorageReader(str(folder))
        state = {}
        for name, stored in reader.read_metadata().state_dict_metadata.items():
            owner, kind = _owner(name, like), stored.properties.dtype
            if owner is not None and owner.shape == stored.size:
                state[name] = torch.empty_like(owner, dtype=kind, requires_grad=False)
            else:  # what does not fit is said by who takes it
                state[name] = torch.empty(stored.size, dtype=kind)
        alone = ranks.count() == 1
        try:
            with warnings.catch_warnings():  # that one process reads it
                warnings.simplefilter("ignore")
                dcp.load(
                    state,
                    storage_reader=reader,
                    process_group=None if alone else _group(),
                    no_dist=alone,
                )
        except dcp.CheckpointException as error:
            raise UserError(f"{folder}: cannot be read: {error}") from error
        return state


def _owner(name: str, like: Mapping[str, Tensor]) -> Tensor | None:
    """The tensor of the model that an entry of a checkpoint belongs to."""
    if name.startswith("critic/"):
        return None
    return next((like[part] for part in name.split("/") if part in like), None)


def _laid_out(tensor: Tensor, owner: Tensor | None) -> Tensor:
    """A whole tensor as this rank's part of it, where its owner is one."""
    if owner is None or not is_part(owner) or is_part(tensor) or tensor.shape != owner.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(owner.device)
    return distribute_tensor(tensor, owner.device_mesh, owner.placements, src_data_rank=None)


@cache
def _group() -> dist.ProcessGroup:
    """Of all ranks, for what a thread of each tells the others beside the run's own words."""
    return dist.new_group(backend="gloo", timeout=ranks.PATIENCE)
