"""Several processes as one run: what they tell each other, and what one of them does for all.

torchrun says who is who (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); without it a run
is one process. Every rank runs the same program on the same numbers. What takes long is cut into
pieces that some rank does (`runtime.parallel`), what is written rank 0 writes (`together`). All
random numbers are named by what they are for, never by a rank, so how many ranks there are changes
no bit of what one process would compute on the same kind of machine.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from worldenv.runtime.errors import UserError

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # rank 0 may be busy for hours with what others wait for
_BLOCK = 1 << 18  # numbers that are sent at once: 1 MB, so that ranks add while others send

_alone = False  # whether this rank does something for all of them now
_calls = 0  # of `claims`, which every rank makes in the same order


def join(device: torch.device) -> None:
    """Meet the other ranks, if torchrun started any. UserError where they do not come."""
    stated = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")}
    if dist.is_initialized() or stated["WORLD_SIZE"] in ("", "1"):
        return
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        value = os.environ.get(name, "")
        if not value or (name != "MASTER_ADDR" and not value.isdigit()):
            raise UserError(
                f"{name}: expected what torchrun sets, got {value!r} beside "
                f"WORLD_SIZE={stated['WORLD_SIZE']}. Start with torchrun --nproc-per-node N "
                "-m worldenv, or unset WORLD_SIZE for one process."
            )
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError, dist.DistError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"rank {stated['RANK']} did not meet the other {int(stated['WORLD_SIZE']) - 1} at "
            f"{place}: {error}. Check that every node runs the same torchrun command with the "
            "same --rdzv-endpoint, and that its port is open."
        ) from error


def announced() -> int:
    """How many ranks torchrun says there are, whether they have met or not."""
    said = os.environ.get("WORLD_SIZE", "")
    return max(1, int(said)) if said.isdigit() else 1


def leave() -> None:
    """Part from the others; a second call does nothing."""
    if dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    """How many ranks work together now: 1 in what `together` runs."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def number() -> int:
    """This rank's own, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def lead() -> bool:
    """Whether this is the rank that writes and talks."""
    return number() == 0


def gather(value: T) -> list[T]:
    """The value of every rank, by rank, on each of them; tensors come to this rank's device."""
    if count() == 1:
        return [value]
    devices: list[torch.device] = []
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, _moved(value, torch.device("cpu"), devices))
    found[number()] = value
    other = next((d for d in devices if d.type != "cpu"), None)
    return found if other is None else [_moved(part, other, []) for part in found]


def together(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, on every rank: it runs there alone, and the others wait. An
    error of it is raised on all."""
    global _alone
    if count() == 1:
        return work()
    told: list[Any] = [None, None]
    if lead():
        _alone = True
        try:
            told[0] = work()
        except BaseException as error:  # noqa: BLE001 - whatever it is, all ranks raise it
            told[1] = error
        finally:
            _alone = False
    error = told[1]
    dist.broadcast_object_list(told, 0)
    if told[1] is not None:
        raise error or told[1]
    return told[0]


def share(total: int) -> slice:
    """The stretch of 0..total that is this rank's own."""
    here, of = (number(), count()) if count() > 1 else (0, 1)
    return slice(total * here // of, total * (here + 1) // of)


class Claims:
    """Pieces 0..total that some rank is to do, each once. To be made on every rank; an iterator
    that threads may share, over those that fall to this one.

    order: a rank's own share first, then those of others, from the ends that they come to last: who
    is done early takes them over.
    """

    def __init__(self, total: int) -> None:
        global _calls
        own = share(total)
        mine = range(own.start, own.stop)
        self.order = [*mine, *(k for k in reversed(range(total)) if k not in mine)]
        self._turn, self._name = threading.Lock(), f"claim/{_calls}"
        self._store = dist.distributed_c10d._get_default_store() if count() > 1 else None
        _calls += count() > 1

    def taken(self, piece: int) -> bool:
        """Whether it falls to this rank: no other has begun it, and none will."""
        return self._store is None or self._store.add(f"{self._name}/{piece}", 1) == 1

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        with self._turn:
            while self.order:
                piece = self.order.pop(0)
                if self.taken(piece):
                    return piece
        raise StopIteration


def merge(found: dict[int, T]) -> list[T]:
    """All ranks' pieces, in order; found: what this one made, by number."""
    whole = {k: piece for part in gather(found) for k, piece in part.items()}
    return [whole[k] for k in sorted(whole)]


def total(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """The sum of the `parts` of all ranks, flat `[n]` on every one; like: one of that size.

    On a CPU it is added rank by rank, part by part, as one process that had them all would: bit for
    bit the same, however many ranks there are. On GPUs by their own collective, to rounding.
    """
    out = torch.zeros_like(like)
    if like.device.type != "cpu":
        for part in parts:
            out.add_(part)
        dist.all_reduce(out)
        return out
    here, last, sent = number(), count() - 1, []
    for begin in range(0, len(out), _BLOCK):
        block = slice(begin, begin + _BLOCK)
        if here:
            dist.recv(out[block], here - 1)
        for k, part in enumerate(parts):
            if k or here:
                out[block].add_(part[block])
            else:
                out[block].copy_(part[block])
        if here < last:
            sent.append(dist.isend(out[block], here + 1))
    for message in sent:
        message.wait()
    dist.broadcast(out, last)
    return out


def _moved(value: Any, device: torch.device, seen: list[torch.device]) -> Any:
    """`value` with every tensor in it on `device`; where they were is added to `seen`."""
    if isinstance(value, Tensor):
        seen.append(value.device)
        return value.to(device)
    if isinstance(value, dict):
        return {k: _moved(v, device, seen) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(v, device, seen) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        inside = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        moved = {k: _moved(v, device, seen) for k, v in inside.items()}
        return dataclasses.replace(value, **{k: v for k, v in moved.items() if v is not inside[k]})
    return value
