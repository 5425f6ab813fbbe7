"""Published models, held against the run before anything of it begins.

Each that a command will train or ask is built once, on the CPU whatever the device, and let go:
that finds every fault of its folder (a NaN among the weights too) and whether it fits the run's
robot. What was found whole is noted in `checked.json`, and not built for this again.
"""

from collections.abc import Iterable

from worldenv.fields import fingerprint
from worldenv.stages import store
from worldenv.stages.run import Run, read_record, write_record

KINDS = {"sft": "policy", "simulator": "simulator", "reflector": "reflector"}
"""Stages that build a model from nothing, and which."""


def check(run: Run, stages: Iterable[str]) -> None:
    """UserError for the first fault of the folders that models of `stages`, by name, are built
    from; nothing is written then."""
    path = run.dir / "checked.json"
    known = read_record(path) or {}
    found = {}
    for kind in dict.fromkeys(KINDS[stage] for stage in stages if stage in KINDS):
        part = getattr(run.config, kind)
        if not part.reads:
            continue
        found[kind] = fingerprint(part, run.embodiment, *store.digests(part))
        if known.get(kind) != found[kind]:
            store.build(kind, run.config)
    if found:
        write_record(path, {**known, **found})
