"""Stage bookkeeping, and training that resumes to the same bits."""

import os
import signal
import time

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from worldenv.config import Config
from worldenv.runtime import checkpoint
from worldenv.runtime.errors import NonFiniteError, UserError
from worldenv.runtime.logging import read_metrics
from worldenv.runtime.seeds import generator
from worldenv.stages import training
from worldenv.stages.run import Run


@pytest.fixture
def run(tmp_path):
    run = Run(Config(run_dir=tmp_path, device="cpu"))
    yield run
    run.close()


@pytest.fixture(autouse=True)
def _usual_interrupts():
    """Background shells start their children with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 2)


def fit(run, module, stop_at: int | None = None, bad_at: int | None = None):
    def loss_at(step: int, shard: int):
        if (step, shard) == (stop_at, 1):  # as from the keyboard, in the middle of a step
            signal.raise_signal(signal.SIGINT)
        x = torch.randn(8, 4, generator=generator("x", step, shard))
        loss = (module(x) - x[:, :2]).square().mean()
        if step == bad_at:
            loss = loss * float("nan")
        return loss, {"loss": loss.detach()}

    return training.train(run, "toy", "mark", module, loss_at, steps=40, lr=0.05, ema=True)


def test_resume_after_ctrl_c_gives_the_same_bits(run, tmp_path):
    whole = model()
    tail = fit(run, whole)
    training.finish(run, "toy")
    broken = model()
    with pytest.raises(KeyboardInterrupt):
        fit(run, broken, stop_at=23)
    resumed = model()
    assert fit(run, resumed) == tail
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
    steps = [row["step"] for row in read_metrics(tmp_path, "toy")]
    assert steps == sorted(set(steps))


def test_a_second_ctrl_c_stops_at_once(run):
    def impatient(step: int, shard: int):
        for _ in range(2 if shard == 0 else 0):
            time.sleep(0.5)  # until the main thread waits, and is there to hear it
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        return module.weight.sum(), {}

    module = model()
    with pytest.raises(KeyboardInterrupt):
        training.train(run, "toy", "mark", module, impatient, steps=3, lr=0.1)
    assert not run.path("checkpoints", "toy.partial.safetensors").exists()


def test_a_nan_loss_stops_with_its_step(run):
    with pytest.raises(UserError, match=r"toy loss.*11|11.*toy loss"):
        fit(run, model(), bad_at=11)


def test_the_schedule_warms_up_and_ends_at_zero():
    rates = [training.learning_rate(s, 100, 1.0) for s in range(100)]
    assert rates[0] < rates[4]
    assert max(rates) == pytest.approx(1.0, abs=0.01)
    assert rates[-1] == pytest.approx(0.0, abs=1e-6)


# Of a checkpoint that another version of the program left: what becomes of its tensors.
MISFITS = {
    "moments of another shape": lambda name, t: t[:1] if name.endswith("/exp_avg") else t,
    "weights of another shape": lambda name, t: t[:1] if name == "model/weight" else t,
    "an average of another shape": lambda name, t: t[:1] if name == "ema/weight" else t,
    "betas that are one number": lambda name, t: t[0] if name.endswith("/betas") else t,
    "a moment less": lambda name, t: None if name.endswith("weight/exp_avg") else t,
    "a weight less": lambda name, t: None if name == "model/weight" else t,
    "no average": lambda name, t: None if name.startswith("ema/") else t,
}


@pytest.mark.parametrize("damage", ["truncated", "another mark", "no step", "no JSON", *MISFITS])
def test_training_begins_anew_where_nothing_can_be_gone_on_from(run, damage):
    whole = model()
    fit(run, whole)
    training.finish(run, "toy")
    path = run.path("checkpoints", "toy.partial.safetensors")
    with pytest.raises(KeyboardInterrupt):
        fit(run, model(), stop_at=23)
    tensors, metadata = checkpoint.load(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:300])
    elif damage in MISFITS:
        changed = {name: MISFITS[damage](name, t) for name, t in tensors.items()}
        checkpoint.save(path, {n: t for n, t in changed.items() if t is not None}, metadata)
    elif damage == "no JSON":
        save_file(tensors, path, metadata={"worldenv": "{"})
    else:
        changed = {"another mark": {**metadata, "mark": "x"}, "no step": {"mark": "mark"}}[damage]
        checkpoint.save(path, tensors, changed)
    again = model()
    fit(run, again)
    assert all(map(torch.equal, whole.parameters(), again.parameters()))


def test_a_gradient_that_is_not_finite_makes_no_step(run):
    """Of a loss that is: the root of nothing has no slope."""
    module = model()
    before = {name: value.clone() for name, value in module.state_dict().items()}

    def loss_at(step: int, shard: int):
        loss = (module.weight - module.weight.detach()).abs().sqrt().sum()
        return loss, {"loss": loss.detach()}

    with pytest.raises(NonFiniteError, match=r"toy gradient .* at step 0"):
        training.train(run, "toy", "mark", module, loss_at, steps=2, lr=0.05)
    assert all(value.equal(before[name]) for name, value in module.state_dict().items())
