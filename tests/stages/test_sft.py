"""Imitation through the policy protocol: continuous actions and tokens, by the same stage."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from worldenv.config import Config, EnvConfig, PolicyConfig, SFTConfig, SimulatorConfig
from worldenv.data.episode import Episode
from worldenv.envs.libero.robot import embodiment
from worldenv.models.policy import Policy
from worldenv.rl.policy import Policy as Protocol
from worldenv.runtime.errors import UserError
from worldenv.stages import sft, store
from worldenv.stages.run import Run

K = 3
SMALL = PolicyConfig(width=16, layers=1, heads=1, encoder_channels=8)


class TokenPolicy(Policy):
    """The small network with K logits where it has a mean: left, still, right."""

    distribution = "categorical"

    def __init__(self) -> None:
        robot = embodiment(16, 2)
        super().__init__(SMALL, replace(robot, action=robot.action * K))
        self.embodiment = robot

    def both(self, observation):
        return self._tokens(*super().both(observation))

    def augmented(self, observation, generator, shift, noise):
        return self._tokens(*super().augmented(observation, generator, shift, noise), None)[:2]

    def _tokens(self, mu, log_scale, features):
        return mu.unflatten(-1, (7, K)), None, features

    def normalise(self, action):
        return action.round().long() + 1

    def command(self, action):
        return action.float() - 1


def episode(seed: int) -> Episode:
    """Every action goes where the brightness of its frame says."""
    steps = 12
    way = np.random.default_rng(seed).integers(-1, 2, steps)
    images = np.full((steps, 2, 16, 16, 3), 128, np.uint8) + (way * 100)[:, None, None, None, None]
    return Episode(
        suite="libero_spatial",
        task=8,
        instruction="go there",
        start=seed,
        seed=seed,
        source="expert",
        actions=np.repeat(way[:, None], 7, 1).astype(np.float32),
        dones=np.zeros(steps, bool),
        frame_steps=np.arange(steps),
        images=images.astype(np.uint8),
        proprio=np.random.default_rng(seed).normal(size=(steps, 8)).astype(np.float32),
        success=True,
    )


@pytest.fixture
def run(tmp_path, monkeypatch):
    config = Config(
        run_dir=tmp_path,
        device="cpu",
        env=EnvConfig(image_size=16, chunk=2),
        collect=replace(Config().collect, record_every=2),
        simulator=SimulatorConfig(patch=8),
        policy=SMALL,
        sft=SFTConfig(steps=60, batch=16, shift=0, lr=3e-3),
    )
    monkeypatch.setattr(sft, "recorded", lambda *a: [episode(k) for k in range(6)])
    run = Run(config)
    yield run
    run.close()


@pytest.mark.parametrize("micro", [0, 2])
def test_a_policy_of_tokens_learns_what_was_demonstrated(run, monkeypatch, micro):
    monkeypatch.setattr(store, "_build", lambda *a: TokenPolicy())
    assert isinstance(TokenPolicy(), Protocol)
    run.config = replace(run.config, sft=replace(run.config.sft, micro_batch=micro))
    sizes = []
    sample = sft.ActionWindows.sample

    def watched(windows, generator, batch):
        sizes.append(batch)
        return sample(windows, generator, batch)

    monkeypatch.setattr(sft.ActionWindows, "sample", watched)
    record = sft.run(run, "mark")
    assert record["accuracy"] > 0.6  # the second of a chunk's two actions cannot be seen
    assert set(sizes) == {micro or 4}
    assert len(sizes) == 60 * 16 // (micro or 4)
    policy = store.load("policy", run.path("checkpoints", "policy-sft.safetensors"))
    shown = episode(99)
    view = {
        "image": torch.from_numpy(shown.images),
        "proprio": torch.from_numpy(shown.proprio),
        "instruction": ["go there"] * 12,
    }
    first = policy.command(policy(view)[0].argmax(-1))[:, 0]
    assert (first.numpy() == shown.actions).mean() > 0.8


def test_a_continuous_policy_learns_by_the_same_stage(run):
    record = sft.run(run, "mark")
    assert record["l1"] < 0.6
    assert {"loss", "l1", "scale", "samples"} == set(record)


def test_a_micro_batch_that_leaves_samples_over_is_refused():
    with pytest.raises(UserError, match=r"sft\.micro_batch.*divisor of batch 32"):
        Config(sft=SFTConfig(micro_batch=5))
