"""Keys move the hand where the first fixed camera sees them point."""

from dataclasses import replace

import pytest
import torch

from worldenv.data.embodiment import Entry
from worldenv.data.rig import project
from worldenv.envs.libero.cameras import of_tasks
from worldenv.envs.libero.robot import embodiment
from worldenv.play.controls import controls, reaches


@pytest.mark.parametrize("suite", ["libero_spatial", "libero_object"])
def test_keys_point_as_the_camera_sees(suite):
    robot = embodiment(64, cameras=of_tasks(suite, [0]))
    camera, hand = robot.cameras[0], torch.tensor([0.0, 0.1, 1.0])
    seen = {}
    for control in controls(robot)[:3]:
        moved = hand.clone()
        moved[control.index] += 0.01 * control.sign
        pixels, depth = project(
            camera, torch.stack([hand, moved]), torch.eye(4).expand(2, 4, 4), 64
        )
        column, row = (pixels[1] - pixels[0]).tolist()
        seen[control.words[0]] = (column, row, float(depth[1] - depth[0]))
        assert control.name == "xyz"[control.index]
    assert seen["right"][0] > 0.1
    assert seen["away"][2] > 0.001
    assert seen["up"][1] < -0.1
    assert dict(zip("xyz", (c.keys[0] for c in controls(robot)[:3]), strict=True)) == {
        "x": "KeyW",
        "y": "KeyD",
        "z": "KeyR",
    }


def test_any_robot_has_its_keys():
    one = embodiment(64)
    assert [c.words[0] for c in controls(one)[:3]] == ["x +", "y +", "z +"]
    grip = controls(replace(one, gripper_closes=-1))[-1]
    assert (grip.keys, grip.words, grip.sign) == (("Space",), ("close", "open"), -1.0)
    flat = replace(one, action=("grip", "translate", "translate"))
    assert [(c.index, c.kind) for c in controls(flat)] == [
        (0, "grip"), (1, "translate"), (2, "translate"),
    ]  # fmt: skip
    arms = replace(
        one,
        action=("translate",) * 14,
        proprio=tuple(Entry(f"joint {n}", "joint") for n in range(14)),
    )
    found = controls(arms)
    assert found[0].words == ("translate 1 +", "translate 1 −")
    assert found[-1].keys == ()
    held = [code for c in found for code in c.keys]
    assert len(held) == len(set(held))


def test_no_two_controls_share_a_key():
    every = [code for c in controls(embodiment(64)) for code in c.keys]
    assert len(every) == len(set(every)) == 13


def test_a_key_goes_as_far_as_the_episodes_did():
    robot = embodiment(64)
    actions = torch.zeros(100, 7).numpy()
    actions[:, 1], actions[:, 4], actions[:, 6] = 0.5, 0.1, 1
    reached = reaches(robot, [actions[:50], actions[50:]])
    assert reached == pytest.approx([0.5] * 3 + [0.1] * 3 + [1.0])
    assert reaches(robot, [actions * 0])[:6] == pytest.approx([0.02] * 6)
    assert max(reaches(robot, [actions * 3])) == 1
