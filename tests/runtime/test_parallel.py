"""The same bits on any number of threads, and errors that leave nothing running."""

import threading
import time

import pytest
import torch
from torch import nn

from worldenv.config import Config
from worldenv.envs.libero.robot import embodiment
from worldenv.models.policy import Policy
from worldenv.models.simulator import Simulator
from worldenv.ranges import Shards
from worldenv.runtime import parallel
from worldenv.runtime.seeds import generator


@pytest.fixture(autouse=True)
def _usual_threads():
    yield
    parallel.use_threads()


def gradients_on(threads: int, module: nn.Module, loss) -> list[torch.Tensor]:
    parallel.use_threads(threads)
    parameters = list(module.parameters())
    pieces = [lambda shard=shard: (loss(shard), None) for shard in range(4)]
    total, _, norm = parallel.gradients(parameters, pieces, max_norm=0.01)
    return [total, norm, *(p.grad for p in parameters if p.grad is not None)]


def policy_loss():
    policy = Policy(Config().policy, embodiment(64))

    def loss(shard: int) -> torch.Tensor:
        g = generator("policy", shard)
        seen = {
            "image": torch.randint(256, (3, 2, 64, 64, 3), generator=g).byte(),
            "proprio": torch.randn(3, 8, generator=g),
            "instruction": ["put the bowl on the plate"] * 3,
        }
        mu, log_scale = policy(seen)
        return (mu - log_scale).square().mean()

    return policy, loss


def simulator_loss():
    simulator = Simulator(Config().simulator, embodiment(64))

    def loss(shard: int) -> torch.Tensor:
        g = generator("simulator", shard)
        batch = {
            "image": torch.randint(256, (2, 4, 2, 64, 64, 3), generator=g).byte(),
            "reference": torch.randint(256, (2, 2, 64, 64, 3), generator=g).byte(),
            "proprio": torch.randn(2, 4, 8, generator=g),
            "action": torch.randn(2, 4, 8, 7, generator=g),
            "previous_proprio": torch.randn(2, 8, generator=g),
            "previous_action": torch.randn(2, 8, 7, generator=g),
        }
        return simulator.loss(batch, g, True)[0]

    return simulator, loss


@pytest.mark.parametrize("make", [policy_loss, simulator_loss])
def test_gradients_are_the_same_bits_on_1_2_and_4_threads(make):
    torch.manual_seed(0)
    module, loss = make()
    once = [x.clone() for x in gradients_on(1, module, loss)]
    for threads in (2, 4):
        assert all(map(torch.equal, once, gradients_on(threads, module, loss)))


def test_gradients_are_those_of_the_whole_batch():
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)), torch.randn(10, 5)
    shares = parallel.shares(10, 4)
    assert [s.stop - s.start for s in shares] == [2, 3, 2, 3]
    weights = [(s.stop - s.start) / 10 for s in shares]
    pieces = [lambda s=s: (module(x[s]).square().mean(), None) for s in shares]
    loss, _, norm = parallel.gradients(list(module.parameters()), pieces, weights)
    whole = module(x).square().mean()
    expected = torch.autograd.grad(whole, list(module.parameters()))
    torch.testing.assert_close(loss, whole.detach())
    for p, e in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e)
    torch.testing.assert_close(norm, torch.cat([e.flatten() for e in expected]).norm())


@pytest.mark.parametrize("count", [1, 4, 5, 16])
def test_however_many_losses_there_are_their_gradients_add_up(count):
    torch.manual_seed(0)
    module, x, unused = nn.Linear(5, 1), torch.randn(16, 5), nn.Parameter(torch.ones(2))
    parameters, shares = [*module.parameters(), unused], parallel.shares(16, count)
    weights = [(s.stop - s.start) / 16 for s in shares]
    pieces = [lambda s=s: (module(x[s]).square().mean(), s) for s in shares]
    loss, rest, _ = parallel.gradients(parameters, pieces, weights)
    whole = module(x).square().mean()
    assert rest == shares
    torch.testing.assert_close(loss, whole.detach())
    for p, e in zip(parameters, torch.autograd.grad(whole, [*module.parameters()]), strict=False):
        torch.testing.assert_close(p.grad, e)
    assert unused.grad is None


def test_parameters_that_share_a_gradient_get_their_own():
    """Autograd gives a + b one gradient tensor; summing shards into it would count each twice."""
    a, b, unused = (nn.Parameter(torch.ones(3)) for _ in range(3))
    pieces = [lambda: ((a + b).sum(), None)] * 4
    _, _, norm = parallel.gradients([a, b, unused], pieces, max_norm=1.0)
    assert norm == pytest.approx(6**0.5)
    assert a.grad.tolist() == b.grad.tolist() == pytest.approx([6**-0.5] * 3)
    assert unused.grad is None
    pieces *= 2  # two losses to a piece
    _, _, norm = parallel.gradients([a, b, unused], pieces)
    assert norm == pytest.approx(6**0.5)


def test_a_channels_last_parameter_gets_a_gradient_laid_out_like_it():
    layer = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 9, 9)
    parallel.gradients(list(layer.parameters()), [lambda: (layer(x).square().sum(), None)] * 2)
    assert layer.weight.grad.stride() == layer.weight.stride()


def test_pieces_keep_the_callers_gradient_mode():
    with torch.no_grad():
        assert parallel.run([torch.is_grad_enabled] * 3) == [False] * 3
    assert parallel.run([torch.is_grad_enabled] * 3) == [True] * 3


def test_the_first_error_is_raised_when_nothing_runs_any_more():
    parallel.use_threads(2)
    running, begun = [], []

    def slow() -> None:
        running.append(1)
        time.sleep(0.2)
        running.pop()

    def bad() -> None:
        time.sleep(0.05)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        parallel.run([slow, bad, *[lambda: begun.append(1)] * 50])
    assert not running
    assert len(begun) < 50


def test_torch_computes_on_one_thread_in_each():
    parallel.use_threads(3)
    barrier = threading.Barrier(3)

    def count() -> int:
        barrier.wait(10)  # three threads at once
        return torch.get_num_threads()

    assert parallel.run([count] * 3) == [1, 1, 1]


def test_batches_that_are_cut_can_be_cut():
    """config.py does not import torch, so it says by itself how many shards there are."""
    assert Shards.__metadata__[0].step == parallel.SHARDS
