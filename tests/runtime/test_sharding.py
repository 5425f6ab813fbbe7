"""Sharded over ranks, a model learns what it learns whole, to rounding; and its checkpoints move."""

from functools import partial
from pathlib import Path

import pytest
import torch
from ranked import Group
from torch import nn

# Seconds to import: once here, not in every rank.
from torch.distributed import checkpoint as dcp
from torch.distributed import fsdp  # noqa: F401

from worldenv.config import Config, ReflectorConfig
from worldenv.envs.libero.robot import embodiment
from worldenv.models.policy import Policy
from worldenv.models.reflector import Reflector
from worldenv.models.simulator import Simulator
from worldenv.runtime import checkpoint, parallel, ranks, sharding
from worldenv.runtime.partial import Partial
from worldenv.runtime.seeds import generator
from worldenv.stages.estimate import policy_loss, reflector_loss, simulator_loss

KINDS = {
    "policy": (Policy, policy_loss),
    "simulator": (Simulator, simulator_loss),
    "reflector": (Reflector, reflector_loss),
}


def small(kind: str) -> nn.Module:
    torch.manual_seed(0)
    part = getattr(Config(), kind)
    return KINDS[kind][0](part, embodiment(32))


def learned(folder: Path, wanted: bool = True) -> dict:
    found = {}
    for kind, (_, loss) in KINDS.items():
        module = sharding.shard(small(kind), wanted)
        parameters = list(module.parameters())
        pieces = [lambda m=module, f=loss: (f(m, 1), None)] * 4
        out = sharding.gradients(module, parameters, pieces)
        found[kind] = {"loss": out[0], "norm": out[2], "grads": {n: sharding.full(p.grad) for n, p in module.named_parameters() if p.grad is not None}}
    return found


@pytest.mark.parametrize("count", [2, 3, 4])
def test_grads(count, tmp_path):
    parallel.use_threads(1)
    want = learned(tmp_path, False)
    for own in Group(learned, tmp_path, count).found():
        for kind in KINDS:
            a, b = own[kind]["grads"], want[kind]["grads"]
            assert a.keys() == b.keys()
            worst = max((float((a[n]-b[n]).norm()/b[n].norm().clamp_min(1e-30)), float(b[n].norm()), n) for n in a)
            tot = (sum((a[n]-b[n]).square().sum() for n in a)/sum(b[n].square().sum() for n in a))**.5
            print(kind, own[kind]["loss"]-want[kind]["loss"], own[kind]["norm"]/want[kind]["norm"]-1, worst, tot)
