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
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from worldenv.runtime.errors import UserError

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # rank 0 may be busy for hours with what others wait for
_PICKLED = 1 << 16  # bytes of tensors in what a rank tells that are not worth messages of their own
_BLOCK = 1 << 18  # numbers at least that are sent at once: ranks add while others send

_alone = False  # whether this rank does something for all of them now
_calls = 0  # of `claims`, which every rank makes in the same order


def join(device: torch.device) -> None:
    """Meet the other ranks, if torchrun started any. UserError, within `wait`, naming those that do
    not come."""
    size = os.environ.get("WORLD_SIZE", "")
    if dist.is_initialized() or size in ("", "1"):
        return
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        value = os.environ.get(name, "")
        if not value or (name != "MASTER_ADDR" and not value.isdigit()):
            raise UserError(
                f"{name}: expected what torchrun sets, got {value!r} beside WORLD_SIZE={size}. "
                "Start with torchrun --nproc-per-node N -m worldenv, or unset WORLD_SIZE for one "
                "process."
            )
    here, count = int(os.environ["RANK"]), int(size)
    if here >= count:
        raise UserError(
            f"RANK: expected one of 0..{count - 1}, got {here} beside WORLD_SIZE={count}. Number "
            "the processes from 0."
        )
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    try:
        store = _met(here, count)
        dist.init_process_group(backend, store=store, rank=here, world_size=count, timeout=wait())
        dist.distributed_c10d._set_pg_timeout(PATIENCE)  # from now on `watch` looks after them
    except (RuntimeError, ValueError, dist.DistError) as error:
        raise UserError(
            f"rank {here} did not meet the other {count - 1} at {place()}: {error}. Check that "
            "MASTER_ADDR is the node of rank 0, that every node runs the same torchrun command "
            "with the same --rdzv-endpoint, that its port is open, and that GLOO_SOCKET_IFNAME "
            "names a network that the nodes share."
        ) from error


def place() -> str:
    """Where the ranks meet."""
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def wait() -> timedelta:
    """How long to wait for ranks that have not come: WORLDENV_JOIN_SECONDS, or five minutes."""
    stated = os.environ.get("WORLDENV_JOIN_SECONDS") or "300"
    if not stated.isdigit() or not int(stated):
        raise UserError(
            f"WORLDENV_JOIN_SECONDS: expected whole seconds above 0, got {stated!r}. Unset it for "
            "five minutes."
        )
    return timedelta(seconds=int(stated))


def _met(here: int, count: int) -> dist.Store:
    """The store of all ranks, once every one has come. UserError naming those that have not."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun keeps it, not us
    until, host = time.monotonic() + wait().total_seconds(), os.environ["MASTER_ADDR"]
    port, leads = int(os.environ["MASTER_PORT"]), here == 0 and not agent
    server = dist.TCPStore(host, port, None, leads, wait(), wait_for_workers=False)
    # What an earlier start has left there is not ours.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"worldenv/{attempt}", server)
    if store.add(f"here/{here}", 1) > 1 and not agent:
        raise UserError(
            f"RANK: expected one process of each number, got two that are {here} at {place()}. "
            "Give every run a port of its own, and every node a number of its own (--node-rank)."
        )
    missing = [*range(count)]
    while missing := [n for n in missing if not store.check([f"here/{n}"])]:
        if time.monotonic() > until:
            each = int(os.environ.get("LOCAL_WORLD_SIZE") or 0)
            nodes = sorted({n // each for n in missing}) if each else []
            of = f" (of node {', '.join(map(str, nodes))})" if nodes else ""
            raise UserError(
                f"rank {', '.join(map(str, missing))}{of}: expected at {place()} within "
                f"{wait().total_seconds():.0f} s, never came; the other "
                f"{count - len(missing)} of {count} did. Start them with the same command, or see "
                "why they ended. WORLDENV_JOIN_SECONDS sets how long to wait."
            )
        time.sleep(0.1)
    server.set_timeout(PATIENCE)
    return store


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
    """The value of every rank, by rank, on each of them; tensors are on the kind of device they
    were on. Many bytes of tensors travel as they are; what holds them is pickled."""
    if count() == 1:
        return [value]
    own: list[Tensor] = []
    _mapped(value, Tensor, own.append)
    small = sum(x.nbytes for x in own) <= _PICKLED
    told: list[Any] = [None] * count()
    dist.all_gather_object(told, _mapped(value, Tensor, lambda x: _Told.of(x, small)))
    return [_whole(told[rank], rank, iter(own)) for rank in range(count())]


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


def total(parts: Sequence[Sequence[Tensor | None]], like: Sequence[Tensor]) -> list[Tensor]:
    """The sum of the `parts` of all ranks, on every one: tensors of the shapes of `like`, which a
    part may lack some of.

    On a CPU it is added rank by rank, part by part, as one process that had them all would: bit for
    bit the same, however many ranks there are. On GPUs by their own collective, to rounding.
    """
    sizes = [x.numel() for x in like]
    flat = torch.zeros(sum(sizes), device=like[0].device)
    out = [x.view(y.shape) for x, y in zip(flat.split(sizes), like, strict=True)]
    here, last, sent, end = number(), count() - 1, [], 0

    def add(these: slice) -> None:
        for k, part in enumerate(parts):
            has = [(x, y) for x, y in zip(out[these], part[these], strict=True) if y is not None]
            first = not (k or here)  # not added to zero, which would lose the sign of another
            if has:
                (torch._foreach_copy_ if first else torch._foreach_add_)(*zip(*has, strict=True))

    if flat.device.type != "cpu":
        add(slice(None))
        dist.all_reduce(flat)
        return out
    for these in _blocks(like):
        begin, end = end, end + sum(sizes[these])
        block = flat[begin:end]
        if here:
            dist.recv(block, here - 1)
        add(these)
        if here < last:
            sent.append(dist.isend(block, here + 1))
        sent.append(dist.broadcast(block, last, async_op=True))
    for message in sent:
        message.wait()
    return out


def _blocks(like: Sequence[Tensor]) -> Iterator[slice]:
    """Stretches of tensors that are sent together."""
    begin = size = 0
    for end, x in enumerate(like, 1):
        size += x.numel()
        if size >= _BLOCK or end == len(like):
            yield slice(begin, end)
            begin, size = end, 0


@dataclasses.dataclass(frozen=True)
class _Told:
    """A tensor in what a rank tells; content: where it is not sent by itself."""

    shape: torch.Size
    dtype: torch.dtype
    kind: str
    content: Tensor | None

    @classmethod
    def of(cls, x: Tensor, small: bool) -> _Told:
        return cls(x.shape, x.dtype, x.device.type, x.detach().cpu() if small else None)


def _whole(skeleton: Any, rank: int, own: Iterator[Tensor]) -> Any:
    """What a rank told, with its tensors, which it sends to all now; own: this rank's."""

    def received(told: _Told) -> Tensor:
        if told.content is not None:
            return told.content.to(told.kind)
        if rank == number():
            tensor = next(own)
        else:
            tensor = torch.empty(told.shape, dtype=told.dtype, device=told.kind)
        if tensor.numel():
            dist.broadcast(tensor.detach().contiguous().reshape(-1).view(torch.uint8), rank)
        return tensor

    return _mapped(skeleton, _Told, received)


def _mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """`value` with what is of a kind in it changed, in order."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {k: _mapped(v, kind, change) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_mapped(v, kind, change) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        inside = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        changed = {k: _mapped(v, kind, change) for k, v in inside.items()}
        return dataclasses.replace(
            value, **{k: v for k, v in changed.items() if v is not inside[k]}
        )
    return value
