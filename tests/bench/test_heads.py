"""Tokens belong to the frames that were drawn from them, and a head is taught what happened."""

from dataclasses import replace

import pytest
import torch
from small_world import ROBOT, made_up

from bench import heads
from worldenv.config import SimulatorConfig
from worldenv.data.windows import FrameSequence, chunk_sequences
from worldenv.models.simulator import Simulator
from worldenv.stages.reflector import NEAR

LENGTHS = (5, 3, 8, 4)


@pytest.fixture(scope="module")
def real() -> list[FrameSequence]:
    """Of different lengths, none like the one before it."""
    return chunk_sequences([made_up(chunks=n, seed=n) for n in LENGTHS], ROBOT.chunk)


@pytest.fixture(scope="module", params=[0, 2], ids=["no window", "window"])
def simulator(request) -> Simulator:
    torch.manual_seed(0)
    network = Simulator(SimulatorConfig(width=48, layers=1, heads=2, window=request.param), ROBOT)
    with torch.no_grad():
        for weights in network.parameters():
            weights += 0.1 * torch.randn_like(weights)
    return network.eval()


@pytest.mark.parametrize("given", [1, 2])
def test_every_generated_frame_can_be_drawn_from_its_tokens(simulator, real, monkeypatch, given):
    monkeypatch.setattr(heads, "GROUP", 2)
    shown, tokens = heads.imagined(heads.Listening(simulator), real, 1, 7, given)
    drawn = 0
    for s, own, of in zip(shown, real, tokens, strict=True):
        assert torch.equal(s.images[:given], own.images[:given])
        assert of.shape == (len(own) - given, simulator.tokens, 48)
        latents = simulator.tokenizer.encode(s.images)
        with torch.no_grad():
            again = simulator.head(
                of.float(), latents[given - 1 : -1], latents[:1].expand_as(latents[given:])
            )
        # Bytes are latents to 1/255, tokens halves.
        again = simulator.tokenizer.clip(again)
        assert (again - latents[given:]).abs().mean() < 0.02
        drawn += len(again)
        if len(again) > 1:
            assert (again.flip(0) - latents[given:]).abs().mean() > 0.05
    assert drawn == sum(map(len, real)) - given * len(real)


def test_near_is_before_success_or_before_the_end_of_a_failure():
    won = torch.arange(10) >= 6
    assert heads._near(won).nonzero()[:, 0].tolist() == [*range(6 - NEAR, 6)]
    assert heads._near(won & False).nonzero()[:, 0].tolist() == [*range(10 - NEAR, 10)]


def test_a_head_learns_what_its_tokens_say(real):
    # Of each episode the last two frames are a success, and one of the tokens says so.
    won = [replace(s, success=torch.arange(len(s)) >= len(s) - 2) for s in real]
    g = torch.Generator().manual_seed(0)
    tokens = [torch.randn(len(s) - 1, 3, 8, generator=g) for s in real]
    for of in tokens:
        of[:, 1, 2] = 0.0
        of[-2:, 1, 2] = 3.0
    head = heads.trained(0, tokens, won)
    for of in tokens:
        with torch.no_grad():
            said = head(of)
        assert bool((said[-2:] > 0).all())
        assert bool((said[:-2] < 0).all())


def test_verdicts_are_of_the_highest_logit_above_the_threshold():
    said = heads.highest([torch.tensor([-3.0, 2.0, 0.0]), torch.tensor([-1.0, -2.0])])
    assert said == [2.0, -1.0]
    found = heads.told([2.0, -1.0, 3.0, -2.0], 0.5, [True, False, False, False])
    assert found["value"] == 0.75
    assert found["auc"] == pytest.approx(2 / 3, abs=1e-4)
