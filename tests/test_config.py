"""Configuration: round trip, unknown keys, validation, presets."""

import json
from dataclasses import replace

import pytest
import torch

from worldenv.config import Config, EnvConfig, load
from worldenv.fields import fingerprint, from_dict, to_dict
from worldenv.presets import NAMES, preset
from worldenv.runtime.errors import UserError
from worldenv.stages import store


@pytest.mark.parametrize("name", NAMES)
def test_presets_survive_json(name):
    config = preset(name)
    assert config.preset == name
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


def test_unknown_keys_are_refused_with_the_nearest_name():
    with pytest.raises(UserError, match=r"'stepz'; did you mean 'steps'"):
        from_dict(Config, {"sft": {"stepz": 3}})
    with pytest.raises(UserError, match="Did you mean 'default'"):
        preset("defualt")


def test_values_are_checked():
    with pytest.raises(UserError, match=r"env\.tasks.*of at least 0|env\.tasks.*from 0"):
        Config(env=EnvConfig(tasks=(-1,)))
    base = Config()
    odd = replace(base.policy, heads=3)
    with pytest.raises(UserError, match=r"policy\.heads"):
        replace(base, policy=odd)


def test_a_damaged_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        load(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load(tmp_path / "config.json")


def test_a_number_written_without_its_point_is_the_same_configuration():
    base = Config()
    whole = from_dict(Config, {"simulator": {"mlp_ratio": 3}, "env": {"tasks": [8]}})
    assert whole == base
    assert fingerprint(whole.simulator) == fingerprint(base.simulator)


def test_the_models_are_built_at_every_size_that_is_admitted():
    for size in (8, 24, 96):
        part = replace(Config().simulator, patch=8, width=12, heads=2, layers=1)
        small = replace(Config().policy, width=8, heads=1, layers=1, encoder_channels=8)
        config = Config(env=EnvConfig(image_size=size), simulator=part, policy=small)
        image = torch.zeros(1, 2, size, size, 3, dtype=torch.uint8)
        mean, _ = store.build("policy", config)(
            {"image": image, "proprio": torch.zeros(1, 8), "instruction": ["go"]}
        )
        assert mean.shape == (1, 8, 7)
        world = store.build("simulator", config).tokenizer
        assert torch.equal(world.decode(world.encode(image), 2), image)


def test_fingerprints_follow_values():
    base = Config()
    assert fingerprint(base.sft) == fingerprint(Config().sft)
    assert fingerprint(base.sft) != fingerprint(replace(base.sft, lr=0.1))
