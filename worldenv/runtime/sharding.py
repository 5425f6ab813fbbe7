"""Models whose parameters the ranks share out while they train: FSDP2 (`fully_shard`).

Each rank holds a stretch of every parameter, of its gradient and of its optimiser's moments; a
block's parameters are whole while it computes, the rest of the model's as long as a loss does. What
acts, imagines or judges does it whole (`whole`): ranks do unequal shares of that, and FSDP2 wants
all of them in step. Parameters are sharded in the precision that they have, gradients are added in
float32. In training the numbers are those of one process to rounding, not bit for bit.

A loss may call any method of the model: the whole of it runs as one forward method of the root
(`losses`). It may not read the parameters of a block other than through the block's `forward`.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from worldenv.runtime import parallel, ranks

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


def shard(module: M, wanted: bool = True) -> M:
    """The module, of which this rank keeps its own part from here on if it is `wanted`; on all
    ranks. Its optimiser is to be made afterwards."""
    if not wanted:
        return module
    from torch.distributed import fsdp  # takes seconds to import

    blank = _blank(module)
    for parameter in module.parameters():  # FSDP2 takes no other layout
        parameter.data = parameter.data.contiguous()
    device = next(module.parameters()).device
    how = fsdp.MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for part in (*blocks(module), module):
        fsdp.fully_shard(part, mesh=_mesh(device.type), mp_policy=how)
    module.losses = lambda loss_of: loss_of()
    fsdp.register_fsdp_forward_method(module, "losses")
    object.__setattr__(module, "_blank", blank)  # a plain attribute: no module of this one's own
    return module


def sharded(module: nn.Module) -> bool:
    """Whether `shard` has cut it."""
    return "_blank" in vars(module)


@contextmanager
def whole(module: M) -> Iterator[M]:
    """The model whole, on every rank: itself, or of a sharded one a copy that ends with this."""
    if not sharded(module):
        yield module
        return
    blank = vars(module)["_blank"]
    empty = dict(blank.named_parameters(remove_duplicate=False))
    try:
        yield _filled(module)
    finally:
        _put(blank, empty)


def gathered(module: M) -> M:
    """The model whole for good: itself, or what takes the place of a sharded one."""
    return _filled(module) if sharded(module) else module


def full(tensor: Tensor) -> Tensor:
    """A part of all ranks' tensor to all of it, on every rank."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def is_part(tensor: Tensor) -> bool:
    """Whether other ranks have the rest of it."""
    return hasattr(tensor, "full_tensor")


def gradients(
    module: nn.Module,
    parameters: Sequence[Tensor],
    losses: Sequence[Callable[[], tuple[Tensor, T]]],
    weights: Sequence[float] | None = None,
    max_norm: float | None = None,
) -> tuple[Tensor, list[T], Tensor]:
    """`parallel.gradients` of a module that may be sharded. If it is, each rank makes its losses
    one after the other, and all of them equally many: who has fewer makes one again, for nothing.

    Gradients are added up after every loss, not once a step: a whole one on every rank is what
    sharding is to avoid. All losses must depend on the same parameters.
    """
    if not sharded(module):
        return parallel.gradients(parameters, losses, weights, max_norm)
    weights = weights or [1 / len(losses)] * len(losses)
    cut = parallel.shares(len(losses), parallel.shards(parameters[0].device))
    own = [k for stretch in cut[ranks.share(len(cut))] for k in range(stretch.start, stretch.stop)]
    module.zero_grad()
    made: list[tuple[Tensor, T]] = []
    for turn in range(max(ranks.gather(len(own)))):
        mine = turn < len(own)
        k = own[turn] if mine else 0
        loss, rest = module.losses(losses[k])
        # FSDP2 takes the mean over ranks.
        (loss * (weights[k] * ranks.count() if mine else 0.0)).backward()
        if mine:
            made.append(((loss * weights[k]).detach(), rest))
    done = [part for told in ranks.gather(made) for part in told]
    norm = _norm(parameters)
    if max_norm is not None and norm > max_norm:
        scale = float(max_norm / (norm + 1e-6))
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
    return sum(loss for loss, _ in done), [rest for _, rest in done], norm


def _norm(parameters: Sequence[Tensor]) -> Tensor:
    """Of the gradient of all ranks' parts."""
    parts = [p.grad.to_local() for p in parameters if p.grad is not None]
    square = torch.stack(torch._foreach_norm(parts)).square().sum()
    dist.all_reduce(square)
    return square.sqrt()


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """What is whole only while it computes: the entries of the outermost lists, of those that hold
    something to be trained."""
    for child in module.children():
        if not isinstance(child, nn.ModuleList):
            yield from blocks(child)
            continue
        yield from (part for part in child if any(p.requires_grad for p in part.parameters()))


def _blank(module: M) -> M:
    """A copy without parameters' numbers, whose buffers are the module's own."""
    memo: dict[int, Tensor] = {id(buffer): buffer for buffer in module.buffers()}
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
    return copy.deepcopy(module, memo)


def _filled(module: M) -> M:
    """The blank copy with all numbers of a sharded module."""
    blank = vars(module)["_blank"]
    for part in module.modules():
        if hasattr(part, "reshard"):
            part.reshard()
    own, made = dict(module.named_parameters()), {}
    with torch.no_grad():
        for name, empty in blank.named_parameters():
            value = full(own[name].detach())
            value = torch.empty_like(empty, device=value.device).copy_(value)
            made[id(empty)] = nn.Parameter(value, empty.requires_grad)
    _put(blank, {n: made[id(p)] for n, p in blank.named_parameters(remove_duplicate=False)})
    return blank.train(module.training)


def _put(module: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, parameter)


@cache
def _mesh(kind: str) -> object:
    """All ranks in a row."""
    return dist.init_device_mesh(kind, (ranks.count(),))
