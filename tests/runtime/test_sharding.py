"""Sharded over ranks, a model learns what it learns whole, to rounding; its checkpoints move."""

import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from ranked import Group

# They take seconds to import: once here, not in every rank.
from torch import (
    Tensor,
    _dynamo,  # noqa: F401
    nn,
)
from torch.distributed import checkpoint as dcp
from torch.distributed import fsdp  # noqa: F401

from worldenv.config import Config
from worldenv.envs.libero.robot import embodiment
from worldenv.models.openvla import ActionHead
from worldenv.models.policy import Policy
from worldenv.models.reflector import Reflector
from worldenv.models.simulator import Simulator
from worldenv.runtime import checkpoint, parallel, ranks, sharding
from worldenv.runtime.errors import UserError
from worldenv.runtime.partial import Partial
from worldenv.stages.estimate import policy_loss, reflector_loss, simulator_loss

WEIGHTS = [0.1, 0.2, 0.3, 0.4]
FACTS = {"step": int}
SMALL = {"width": 16, "heads": 2, "layers": 2}
MODELS = {
    "policy": (Policy, replace(Config().policy, encoder_channels=8, **SMALL), policy_loss),
    "simulator": (Simulator, replace(Config().simulator, window=1, **SMALL), simulator_loss),
    "reflector": (
        Reflector,
        replace(Config().reflector, encoder_channels=8, width=16),
        reflector_loss,
    ),
    "published action head": (
        lambda part, robot: ActionHead(robot.A, part),
        16,
        lambda head, batch: head(torch.linspace(-1, 1, batch * 7 * 16).view(batch, -1)).var(),
    ),
}


class Training:
    """A model of its kind, cut if there are ranks, and its optimiser; the same on every rank."""

    def __init__(self, kind: str) -> None:
        make, part, self.loss = MODELS[kind]
        torch.manual_seed(0)
        self.module: nn.Module = sharding.shard(make(part, embodiment(32)), ranks.count() > 1)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), 1e-3, fused=True)

    def step(self) -> tuple[float, float]:
        """The loss and the gradient's norm."""
        # As many samples as the piece has weight, so that no two are alike.
        pieces = [partial(self._piece, k) for k in range(4)]
        own = list(self.module.parameters())
        loss, rest, norm = sharding.gradients(self.module, own, pieces, WEIGHTS, max_norm=1.0)
        assert rest == [0, 1, 2, 3]
        self.optimizer.step()
        return float(loss), float(norm)

    def _piece(self, k: int) -> tuple[Tensor, int]:
        return self.loss(self.module, 1 + k % 2) * (1 + k), k

    def gradient(self) -> Tensor:
        """All of it, flat."""
        named = self.module.named_parameters()
        return torch.cat([sharding.full(p.grad).flatten() for _, p in named if p.grad is not None])


def learned(folder: Path) -> dict:
    """Two steps of each kind: the first gradient, losses and norms, and the weights at the end,
    as they are where a model is whole."""
    found = {}
    for kind in MODELS:
        training = Training(kind)
        logged = [training.step()]
        gradient = training.gradient()
        logged.append(training.step())
        with sharding.whole(training.module) as module:
            state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        found[kind] = {"gradient": gradient, "logged": logged, "state": state}
    return found


@pytest.fixture(scope="module")
def alone():
    parallel.use_threads(1)
    yield learned(Path())
    parallel.use_threads()


@pytest.mark.parametrize("count", [2, 4])
def test_gradients_and_losses_are_those_of_one_process(count, alone, tmp_path):
    for own in Group(learned, tmp_path, count).found():
        for kind, want in alone.items():
            got = own[kind]
            error = (got["gradient"] - want["gradient"]).norm() / want["gradient"].norm()
            assert error <= 1e-6, kind
            torch.testing.assert_close(
                torch.tensor(got["logged"]), torch.tensor(want["logged"]), rtol=1e-5, atol=0
            )
            assert got["state"].keys() == want["state"].keys()
            for name, tensor in want["state"].items():
                torch.testing.assert_close(got["state"][name], tensor, rtol=0, atol=2e-4)


def tensors(training: Training) -> dict[str, Tensor]:
    return checkpoint.training_tensors(training.module, training.optimizer)


def resumed(path: Path) -> tuple[int, list[tuple[float, float]]]:
    """The step that a checkpoint is of, and the next two."""
    training = Training("policy")
    like = dict(training.module.state_dict())
    found, metadata = Partial(path).resume("mark", FACTS, like)
    checkpoint.load_training(training.module, training.optimizer, found, path)
    return metadata["step"], [training.step() for _ in range(2)]


def killed(folder: Path) -> dict:
    """Two steps, a checkpoint, two more while it is written; and in the next one rank 1 dies."""
    training, partial_ = Training("policy"), Partial(folder / "x.partial.safetensors")
    for _ in range(2):
        training.step()
    partial_.save(tensors(training), {"mark": "mark", "step": 2})
    logged = [training.step() for _ in range(2)]
    partial_.wait()
    if ranks.number() == 1:
        write = dcp.HuggingFaceStorageWriter.write_data

        def dying(self, *given):
            write(self, *given).wait()
            os.kill(os.getpid(), signal.SIGKILL)

        dcp.HuggingFaceStorageWriter.write_data = dying
    partial_.save(tensors(training), {"mark": "mark", "step": 4})
    try:
        partial_.wait()
    except UserError as error:
        return {"logged": logged, "error": str(error)}
    return {}


def continued(folder: Path) -> dict:
    return {"resumed": resumed(folder.parent / "x.partial.safetensors")}


def test_an_interrupted_save_loses_nothing_and_any_number_of_ranks_goes_on(tmp_path, capsys):
    parallel.use_threads(1)
    first = Group(killed, tmp_path, 2)
    told = first.of(0)
    assert "x.partial.b: cannot be written" in told["error"]
    assert [*first.of(1, -signal.SIGKILL)] == []
    assert len([*(tmp_path / "x.partial.a").iterdir()]) == 2
    (tmp_path / "three").mkdir()
    found = [resumed(tmp_path / "x.partial.safetensors")]
    found += [own["resumed"] for own in Group(continued, tmp_path / "three", 3).found()]
    for step, logged in found:
        assert step == 2
        torch.testing.assert_close(
            torch.tensor(logged), torch.tensor(told["logged"]), rtol=1e-5, atol=0
        )
    # What is not whole is told from what is; of an unsharded run nothing else is left.
    path = tmp_path / "x.partial.safetensors"
    next((tmp_path / "x.partial.a").iterdir()).unlink()
    assert Partial(path).resume("mark", FACTS, {}) is None
    assert "it is not whole" in capsys.readouterr().out
    Partial(path).save({"x": torch.ones(1)}, {"mark": "mark", "step": 5})
    assert [p.name for p in tmp_path.glob("x.*")] == ["x.partial.safetensors"]
