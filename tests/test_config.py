"""Configuration: round trip, unknown keys, validation, presets."""

import json
from dataclasses import replace

import pytest

from worldenv.config import Config, EnvConfig, fingerprint, from_dict, load, to_dict
from worldenv.presets import NAMES, preset
from worldenv.runtime.errors import UserError


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
    with pytest.raises(UserError, match=r"env\.tasks.*0\.\.9"):
        Config(env=EnvConfig(tasks=(11,)))
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


def test_fingerprints_follow_values():
    base = Config()
    assert fingerprint(base.sft) == fingerprint(Config().sft)
    assert fingerprint(base.sft) != fingerprint(replace(base.sft, lr=0.1))
