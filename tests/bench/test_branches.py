"""What a branch is worth: frames before success, labelled by how their episodes ended."""

from dataclasses import replace

import pytest
import torch
from small_world import ROBOT, made_up

from bench import branches
from worldenv.data.windows import chunk_sequences
from worldenv.presets import preset
from worldenv.stages import store


def test_a_value_is_shown_the_time_left_and_how_the_episode_ended():
    base = preset("smoke")
    config = replace(base, device="cpu", env=replace(base.env, image_size=16))
    policy = store.build("policy", config).eval()
    lost, won = chunk_sequences([made_up(chunks=5), made_up(chunks=5, seed=4)], ROBOT.chunk)
    won = replace(won, success=torch.arange(6) >= 3)
    shown = branches.looked_at(policy, [lost, won], chunks=10)
    assert shown.won.tolist() == [0.0] * 6 + [1.0] * 3, "no frame after success"
    assert shown.left.tolist() == pytest.approx(
        [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 1.0, 0.9, 0.8], abs=1e-6
    )
    assert shown.features.shape == (9, policy.feature_width)
    view = {"image": won.images[2:3], "proprio": won.proprio[2:3]}
    with torch.no_grad():
        alone = policy.both(view | {"instruction": [won.instruction]})[2]
    torch.testing.assert_close(shown.features[8:], alone.float())


def test_a_value_is_fitted_to_all_kinds_alike(monkeypatch):
    monkeypatch.setattr(branches, "STEPS", 80)
    g = torch.Generator().manual_seed(0)
    features, left = torch.randn(60, 8, generator=g), torch.rand(60, generator=g)
    won = (features[:, 0] > 0).float()
    few, many = (branches.Looked(features[:n], left[:n], won[:n]) for n in (20, 60))
    value = branches.fitted(0, [few, many])
    with torch.no_grad():
        right = (value(features, left) > 0) == won.bool()
    assert right[:20].all(), "drawn more often than the others"
    assert right[20:].float().mean() > 0.75
