"""Work cut into the same pieces on every machine: threads decide when a piece is done, not what.

A piece runs on one thread from beginning to end, and every torch op in it on that thread alone, so
one, two or eight cores give the same bits. Nothing waits inside a piece, so a core that is busy
with something else costs its share and no more; threads that share each op lose everything to a
neighbour (measured: seven times). Batches are cut into `SHARDS`, more pieces than cores, so that a
slow core simply does fewer. On a GPU there is one piece: the device is the parallel one; or as many
as are asked for, one after the other, so that several ranks can share them.

Python threads suffice: torch holds no lock inside an op, and a backward pass runs in the thread
that asked for it. Where several ranks make up a run, each does some of the pieces.
"""

import ctypes
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from worldenv.runtime import ranks
from worldenv.runtime.device import usable_cores

SHARDS = 4  # of a batch on a CPU: enough for a slow core to do fewer, few enough to stay large
T = TypeVar("T")

_count = _shards = 0
_pool: ThreadPoolExecutor | None = None


def use_threads(count: int = 0, shards: int = 0) -> None:
    """Let `run` use `count` threads, and torch one in each. 0: OMP_NUM_THREADS, or all cores.

    shards: that batches are cut into on any device (0: as many as it wants itself)."""
    global _count, _pool, _shards
    count, _shards = count or _default(), shards
    torch.set_num_threads(1)
    if count != _count:
        if _pool is not None:
            _pool.shutdown()
        _keep_memory()
        _pool = ThreadPoolExecutor(count, "piece", torch.set_num_threads, (1,))
        _count = count


def threads() -> int:
    """How many threads `run` uses."""
    return _count or _default()


def _default() -> int:
    stated = os.environ.get("OMP_NUM_THREADS", "")
    return int(stated) if stated.isdigit() and int(stated) else usable_cores()


def shards(device: torch.device) -> int:
    """Into how many pieces a batch on `device` is cut."""
    return _shards or (SHARDS if device.type == "cpu" else 1)


def shares(total: int, pieces: int) -> list[slice]:
    """`pieces` consecutive stretches of 0..total, as even as can be; empty ones are left out."""
    edges = [total * i // pieces for i in range(pieces + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges) if a < b]


def run(pieces: Iterable[Callable[[], T]]) -> list[T]:
    """What each piece returns, in order. Pieces must not depend on each other.

    The first error is raised once no piece runs any more; those that had not begun never do.
    """
    work = list(pieces)
    if _pool is None:
        use_threads()
    if len(work) == 1:
        return [work[0]()]
    grad, stop = torch.is_grad_enabled(), threading.Event()

    def guarded(piece: Callable[[], T]) -> T | None:
        if stop.is_set():
            return None
        try:
            with torch.set_grad_enabled(grad):  # a thread's own setting, which begins as True
                return piece()
        except BaseException:
            stop.set()
            raise

    futures = [_pool.submit(guarded, piece) for piece in work]
    try:
        return [future.result() for future in futures]
    except BaseException:
        stop.set()
        for future in futures:
            future.exception()
        raise


def shared(pieces: Sequence[Callable[[], T]]) -> list[T]:
    """As `run`, of all ranks: each piece is done by one of them, and all have what it returns."""
    if ranks.count() == 1:
        return run(pieces)
    mine = ranks.Claims(len(pieces))
    lanes = run([lambda: {k: pieces[k]() for k in mine}] * min(threads(), len(pieces)))
    return ranks.merge({k: done for lane in lanes for k, done in lane.items()})


def spread(pieces: Sequence[Callable[[], T]], device: torch.device) -> list[T]:
    """As `shared`, with no more at a time than a batch on `device` has pieces."""
    stretches = shares(len(pieces), shards(device))
    done = shared([lambda s=s: [piece() for piece in pieces[s]] for s in stretches])
    return [result for stretch in done for result in stretch]


def gradients(
    parameters: Sequence[Tensor],
    losses: Sequence[Callable[[], tuple[Tensor, T]]],
    weights: Sequence[float] | None = None,
    max_norm: float | None = None,
) -> tuple[Tensor, list[T], Tensor]:
    """Set `.grad` of parameters to that of the losses' weighted sum (default: their mean).

    losses: each returns a scalar and anything; they are the pieces. Where there are more than the
    device has pieces, a piece is several, one after the other: memory for the activations of one,
    and for one gradient. max_norm: the gradient is scaled down to it. Returns the weighted loss,
    what else the losses returned, and the norm before scaling. Parameters that no loss depends on
    get no gradient.
    """
    weights = weights or [1 / len(losses)] * len(losses)

    cut = shares(len(losses), shards(parameters[0].device))
    own = cut[ranks.share(len(cut))]
    pieces = run([lambda s=s: _gradient(parameters, losses[s], weights[s]) for s in own])
    told = ranks.gather(([made for _, made in pieces], _given(parameters, pieces)))
    done = [part for made, _ in told for piece in made for part in piece]
    given = [any(each) for each in zip(*(given for _, given in told), strict=True)]
    grads = [grads for grads, _ in pieces]
    if ranks.count() > 1 and any(given):
        grads = [_summed(parameters, grads, given)]
    parts = _parts(parameters)

    def add(rows: slice) -> Tensor:
        """Sum the pieces' gradients in order, for some of the parameters; their norm."""
        totals: list[Tensor] = []
        for i in range(rows.start, rows.stop):
            parameters[i].grad = None
            if given[i]:
                found = [piece[i] for piece in grads if piece[i] is not None]
                # Never into what autograd gave, which may be one tensor for two parameters; and
                # laid out as the parameter, for fused optimisers pair them by memory order.
                total = torch.empty_like(parameters[i], requires_grad=False).copy_(found[0])
                for other in found[1:]:
                    total.add_(other)
                parameters[i].grad = total
                totals.append(total)
        return torch.stack(torch._foreach_norm(totals)).norm() if totals else torch.zeros(())

    norm = torch.stack(run([lambda p=p: add(p) for p in parts])).norm()
    if max_norm is not None and norm > max_norm:
        scale = float(max_norm / (norm + 1e-6))

        def shrink(rows: slice) -> None:
            for parameter in parameters[rows]:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)

        run([lambda p=p: shrink(p) for p in parts])
    return sum(loss for loss, _ in done), [rest for _, rest in done], norm


def _given(parameters: Sequence[Tensor], pieces: Sequence[tuple]) -> list[bool]:
    """Which parameters any piece of this rank has a gradient for."""
    return [any(grads[i] is not None for grads, _ in pieces) for i in range(len(parameters))]


def _summed(
    parameters: Sequence[Tensor], grads: Sequence[Sequence[Tensor | None]], given: Sequence[bool]
) -> list[Tensor | None]:
    """The sum over all pieces of all ranks; a gradient for each parameter that is `given` one."""
    where = [i for i, has in enumerate(given) if has]
    of = [[piece[i] for i in where] for piece in grads]
    found = iter(ranks.total(of, [parameters[i] for i in where]))
    return [next(found) if has else None for has in given]


def _gradient(
    parameters: Sequence[Tensor],
    losses: Sequence[Callable[[], tuple[Tensor, T]]],
    weights: Sequence[float],
) -> tuple[Sequence[Tensor | None], list[tuple[Tensor, T]]]:
    """Gradient of the weighted sum of losses, made one after the other, and what they returned."""
    total: list[Tensor | None] = [None] * len(parameters)
    made = []
    for loss_of, weight in zip(losses, weights, strict=True):
        loss, rest = loss_of()
        scaled = loss * weight
        made.append((scaled.detach(), rest))
        grads = torch.autograd.grad(scaled, parameters, allow_unused=True)
        if len(losses) == 1:
            return grads, made
        for i, grad in enumerate(grads):  # never into what autograd gave
            if grad is not None:
                total[i] = grad.clone() if total[i] is None else total[i].add_(grad)
    return total, made


def _parts(parameters: Sequence[Tensor]) -> list[slice]:
    """The parameters as `SHARDS` stretches of about equally many numbers."""
    sizes = torch.tensor([p.numel() for p in parameters])
    middle = (sizes.cumsum(0) - sizes / 2) / sizes.sum()
    owner = (middle * shards(parameters[0].device)).long().tolist()
    return [slice(owner.index(o), owner.index(o) + owner.count(o)) for o in sorted(set(owner))]


def _keep_memory() -> None:
    """Ask glibc to keep what is freed: a step's tensors are of the same sizes as the last one's,
    and fresh pages from the kernel cost more than filling them."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim, mmap = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        libc.mallopt(mmap, 1 << 30)
        libc.mallopt(trim, (1 << 31) - 1)
