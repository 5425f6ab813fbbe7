"""What to change where a configuration does not fit: smaller batches first, results last.

Each change is one that the stages which do not fit ask for; the next is tried on top of it, until
everything fits. What makes no moment lower is left out again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from worldenv.config import Config
from worldenv.runtime.errors import UserError
from worldenv.stages.plan_costs import Costs
from worldenv.stages.plan_moments import Machine, highest, moments
from worldenv.stages.plan_ranks import spread


@dataclass(frozen=True)
class Change:
    """A field of the configuration and its new value."""

    part: str
    field: str
    value: object

    @property
    def flag(self) -> str:
        """As on the command line, where a flag without its own value says yes."""
        name = self.field.replace("_", "-")
        no = "no-" if self.value is False else ""
        return f"--{self.part}.{no}{name}"

    @property
    def said(self) -> str:
        """What follows the flag."""
        return "" if isinstance(self.value, bool) else str(self.value)

    def applied(self, config: Config) -> Config:
        """UserError where another field does not allow it."""
        part = replace(getattr(config, self.part), **{self.field: self.value})
        return replace(config, **{self.part: part})


ROOM = 0.98  # of the memory: the process itself is not the same size every time


def advise(config: Config, costs: Costs, here: Machine) -> list[Change]:
    """Changes with which every stage fits; none if there are no such."""
    made: list[Change] = []
    room = int(ROOM * here.memory)
    needs = _needs(config, costs, here)
    for stage in needs:
        for part, field, values in _LADDER[stage]:
            for value in values(config):
                if needs[stage] <= room:
                    break
                change = Change(part, field, value)
                try:
                    changed = change.applied(config)
                except UserError:
                    continue
                found = costs if field in _SIZES else Costs(changed, here.widened)
                after = _needs(changed, found, here)
                if after[stage] < needs[stage]:
                    config, costs, needs = changed, found, after
                    made = [c for c in made if (c.part, c.field) != (part, field)] + [change]
        if needs[stage] > room:
            return []
    return made


def _needs(config: Config, costs: Costs, here: Machine) -> dict[str, int]:
    costs.config = config
    found = spread(moments(config, costs, here), config, costs, here)
    return {name: highest(of).bytes for name, of in found.items()}


_SIZES = ("micro_batch", "rows", "batch", "minibatch", "contexts", "encode_batch", "kl_weight")
"""Fields of which costs need not be measured anew."""


def _halves(part: str, field: str, least: int = 1) -> Callable[[Config], Iterator[int]]:
    """Half of what there is, and so on down to `least`."""

    def values(config: Config) -> Iterator[int]:
        size = getattr(getattr(config, part), field)
        while size > least:
            size = max(least, size // 2)
            yield size

    return values


def _micro(part: str, whole: str) -> Callable[[Config], Iterator[int]]:
    """Halves of a micro-batch, or of the batch that is its own; divisors of it."""

    def values(config: Config) -> Iterator[int]:
        own = getattr(config, part)
        batch = getattr(own, whole)
        size = own.micro_batch or batch
        for less in range(size - 1, 0, -1):
            if batch % less == 0:
                yield less

    return values


def _is(part: str, field: str, value: object) -> Callable[[Config], Iterator[object]]:
    """Another value, for a published model."""

    def values(config: Config) -> Iterator[object]:
        own = getattr(config, part)
        if own.kind != "small" and getattr(own, field) != value:
            yield value

    return values


_POLICY = (
    ("policy", "checkpointing", _is("policy", "checkpointing", True)),
    ("policy", "precision", _is("policy", "precision", "bfloat16")),
)
_WORLD = (
    ("simulator", "precision", _is("simulator", "precision", "bfloat16")),
    ("simulator", "tokenizer_precision", _is("simulator", "tokenizer_precision", "bfloat16")),
)
_JUDGE = (
    ("reflector", "encode_batch", _halves("reflector", "encode_batch")),
    ("reflector", "keep_first", _is("reflector", "keep_first", False)),
    ("reflector", "precision", _is("reflector", "precision", "bfloat16")),
)
_ROWS = ("posttrain", "rows", _halves("posttrain", "rows", 4))
_LADDER = {
    "sft": (("sft", "micro_batch", _micro("sft", "batch")), *_POLICY),
    "simulator": (
        ("simulator", "batch", _halves("simulator", "batch", 4)),
        *_WORLD,
        ("simulator", "frames", _halves("simulator", "frames")),
        ("simulator", "window", _halves("simulator", "window")),
    ),
    "distill": (
        ("distill", "batch", _halves("distill", "batch", 4)),
        *_WORLD,
        ("distill", "frames", _halves("distill", "frames", 2)),
    ),
    "reflector": (
        ("reflector", "batch", _halves("reflector", "batch", 4)),
        _ROWS,
        *_JUDGE,
        *_WORLD,
    ),
    "posttrain": (
        ("posttrain", "micro_batch", _micro("posttrain", "minibatch")),
        _ROWS,
        *_POLICY,
        *_JUDGE,
        *_WORLD,
        ("posttrain", "minibatch", _halves("posttrain", "minibatch", 4)),
        ("posttrain", "contexts", _halves("posttrain", "contexts")),
    ),
}
"""What each stage can do without, the cheapest first."""
