"""What is said of a robot goes into checkpoints and back, and unlike robots do not meet unseen."""

from dataclasses import replace

import numpy as np
import pytest

from worldenv.data.embodiment import Embodiment, Entry, check_fits, differences
from worldenv.data.episode import Episode
from worldenv.envs.libero.robot import embodiment
from worldenv.fields import from_dict, to_dict
from worldenv.presets import preset
from worldenv.runtime.errors import UserError
from worldenv.stages import store

PANDA = embodiment(64)
OTHER = replace(
    PANDA,
    name="gripper on rails",
    views=("top",),
    proprio=(Entry("x", "position"), Entry("finger", "gripper")),
    action=("translate", "grip"),
)


def episode(views: int = 2, proprio: int = 8, actions: int = 7) -> Episode:
    return Episode(
        suite="libero_spatial",
        task=0,
        instruction="lift the cup",
        start=0,
        seed=0,
        source="demonstration",
        actions=np.zeros((3, actions), np.float32),
        dones=np.zeros(3, bool),
        frame_steps=np.arange(2),
        images=np.zeros((2, views, 16, 16, 3), np.uint8),
        proprio=np.zeros((2, proprio), np.float32),
        success=False,
    )


def test_sizes_and_places_follow_from_the_entries():
    assert (PANDA.V, PANDA.P, PANDA.A) == (2, 8, 7)
    assert PANDA.actions("translate") == (0, 1, 2)
    assert PANDA.actions("grip") == (6,)
    assert PANDA.entries("rotation") == (3, 4, 5)
    assert PANDA.opening([9.0] * 6 + [0.04, -0.03]) == pytest.approx(0.07)


def test_what_a_policy_wants_larger_is_rendered_larger():
    assert embodiment(128).render_size == 128
    assert embodiment(224).render_size == embodiment(256).render_size == 256


def test_an_embodiment_comes_back_from_json_as_it_was():
    for robot in (PANDA, OTHER):
        assert from_dict(Embodiment, to_dict(robot)) == robot


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proprio": "xyz"}, "proprio: expected a list of tables"),
        ({"proprio": [{"name": "x", "kind": "smell"}]}, "proprio.kind: expected one of position"),
        ({"proprio": [{"name": "x", "knd": "joint"}]}, "did you mean 'kind'"),
        ({"views": []}, "views: expected a list of text, at least 1"),
        ({"action": ["fly"]}, "action: expected a list of one of translate"),
        ({"render_size": 32}, "render_size: expected at least image_size 64"),
        ({"rotation": 45}, "rotation: expected one of 0, 90, 180, 270"),
    ],
)
def test_a_damaged_embodiment_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        from_dict(Embodiment, to_dict(PANDA) | changes, "robot")


def test_robots_are_alike_whatever_size_was_rendered():
    assert not differences(PANDA, replace(PANDA, render_size=512))
    assert differences(PANDA, OTHER).keys() == {"name", "views", "proprio", "action"}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"views": 1}, r"views: expected 2 \(agentview, robot0_eye_in_hand\).*got 1"),
        ({"proprio": 9}, "numbers of proprio: expected 8"),
        ({"actions": 6}, "numbers of an action: expected 7"),
    ],
)
def test_episodes_of_another_robot_are_refused(sizes, message):
    check_fits(episode(), PANDA, "here")
    with pytest.raises(UserError, match=message):
        check_fits(episode(**sizes), PANDA, "here")


@pytest.mark.parametrize("kind", ["policy", "simulator", "reflector"])
def test_models_of_another_robot_are_built_saved_and_refused(kind, tmp_path):
    config = preset("smoke")
    model = store._build(kind, getattr(config, kind), OTHER)
    store.save(kind, model, tmp_path / "m.safetensors")
    assert store.load(kind, tmp_path / "m.safetensors").embodiment == OTHER
    with pytest.raises(UserError, match=r"robot gripper on rails, of which name is gripper on"):
        store.load(kind, tmp_path / "m.safetensors", fits=config)
    scaled = replace(store.build(kind, config).embodiment, normalisation="q99")
    store.save(kind, store._build(kind, getattr(config, kind), scaled), tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"normalisation is q99; this configuration's.*mean-std"):
        store.load(kind, tmp_path / "m.safetensors", fits=config)
