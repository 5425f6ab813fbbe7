"""What sharding over ranks saves, and which models need it: replicated where that fits.

A sharded model's weights, gradients, moments and average are cut by the ranks while it trains; two
blocks (one computes, the next arrives) and all that is in no block are whole beside that. While it
acts or imagines all of it is.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from worldenv.config import Config
from worldenv.runtime import sharding
from worldenv.runtime.errors import UserError
from worldenv.stages.plan_costs import Costs, Model
from worldenv.stages.plan_moments import Machine, Moment, highest, moments

TRAINED_IN = {
    "policy": ("sft", "posttrain"),
    "simulator": ("simulator", "distill"),
    "reflector": ("reflector",),
}
_STEPS = ("a step", "an update", "the critic's")
_CUT = ("optimiser", "moving average", "snapshot, reference")


@dataclass(frozen=True)
class Choice:
    """For one model, how it is to train on several ranks, and why."""

    model: str
    sharded: bool
    why: str  # with the bytes in it as `{size}` of `sizes`
    sizes: tuple[int, ...]


def spread(
    found: dict[str, list[Moment]], config: Config, costs: Costs, here: Machine
) -> dict[str, list[Moment]]:
    """Moments of a run whose `config.fsdp` is shared among `here.ranks`."""
    for name in config.fsdp if here.ranks > 1 else ():
        model, net = getattr(costs, name), _net(name, costs)
        for stage in found.keys() & set(TRAINED_IN[name]):
            found[stage] = [_cut(m, model, net, here.ranks, stage) for m in found[stage]]
    return found


def _cut(moment: Moment, model: Model, net: nn.Module, ranks: int, stage: str) -> Moment:
    """A moment of a stage that trains `model`."""
    if moment.what not in _STEPS and stage != "posttrain":
        return moment
    parts = dict(moment.parts)
    held, trained = model.frozen_bytes + model.trained_bytes, model.trained_bytes
    kept = "optimiser" in parts and moment.what != "the critic's"
    if moment.what in _STEPS:
        parts["weights, frozen"] -= model.frozen_bytes * (ranks - 1) // ranks
        parts["weights, trained"] -= trained * (ranks - 1) // ranks
        blocks = [_bytes(block) for block in sharding.blocks(net)]
        parts["gathered"] = held - sum(blocks) + 2 * max(blocks, default=0)
    else:
        parts["this rank's part"] = held // ranks  # beside the whole
    if moment.what in ("a step", "an update"):
        # Of its own part that of now and what was before; of a block all of it.
        parts["gradients"] = 2 * trained // ranks + parts["gathered"]
    elif "gradients" in parts and moment.what != "the critic's":
        parts["gradients"] = trained // ranks
    for kind in _CUT if kept else ():
        if kind in parts:
            parts[kind] //= ranks
    return replace(moment, parts=parts)


def choices(config: Config, costs: Costs, here: Machine) -> Iterator[Choice]:
    """Of every model that is trained, on several ranks."""
    for name, stages in TRAINED_IN.items():
        if not getattr(costs, name).trained:
            continue
        others = tuple(n for n in config.fsdp if n != name)
        whole = _needs(replace(config, fsdp=others), costs, here, stages)
        if whole is None:
            continue
        try:
            cut = _needs(replace(config, fsdp=(*others, name)), costs, here, stages)
        except UserError as error:
            why = f"whole on every rank, {{}} of {{}} while it trains: {error}"
            yield Choice(name, False, why, (whole, here.memory))
            continue
        sizes = (whole, here.memory, cut)
        if whole <= here.memory:
            why = "whole on every rank: {} of {} while it trains; sharded {}"
        elif cut <= here.memory:
            why = f"sharded (--fsdp {name}): whole it needs {{}} of {{}} while it trains, else {{}}"
        elif cut < whole:
            why = "fits neither whole ({} of {} while it trains) nor sharded ({})"
        else:
            why = "whole it needs {} of {}; sharding saves nothing where it needs most ({})"
        yield Choice(name, cut <= here.memory < whole, why, sizes)


def _needs(config: Config, costs: Costs, here: Machine, stages: tuple[str, ...]) -> int | None:
    """Bytes at most of the stages that train a model; None where there are none."""
    before, costs.config = costs.config, config
    try:
        found = spread(moments(config, costs, here), config, costs, here)
    finally:
        costs.config = before
    return max((highest(found[s]).bytes for s in stages if s in found), default=None)


def _net(name: str, costs: Costs) -> nn.Module:
    return {"policy": costs.net, "simulator": costs.world}.get(name) or nn.Module()


def _bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())
