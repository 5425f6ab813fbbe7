"""Cameras: points to pixels, in the world and in the hand, mirrored or not."""

import math
from dataclasses import replace

import pytest
import torch

from worldenv.data.camera import Camera
from worldenv.data.embodiment import Embodiment, differences
from worldenv.data.rig import Rig, hand_pose, project
from worldenv.envs.libero.cameras import AGENTVIEW, of_tasks
from worldenv.envs.libero.robot import embodiment
from worldenv.fields import from_dict, to_dict
from worldenv.runtime.errors import UserError

AT_ORIGIN = (1.0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1)
PLAIN = Camera("plain", 90.0, "world", AT_ORIGIN)
NOWHERE = torch.eye(4)


def test_a_camera_sees_right_up_and_ahead():
    points = torch.tensor([[0.0, 0, -1], [0.5, 0, -1], [0, 0.5, -1], [1, 1, -2], [0, 0, 1]])
    pixels, depth = project(PLAIN, points, NOWHERE, 100)
    assert depth.tolist() == [1, 1, 1, 2, -1]  # the last is behind
    expected = torch.tensor([[50.0, 50], [75, 50], [50, 25], [75, 25]])
    torch.testing.assert_close(pixels[:4], expected)


def test_images_may_lie_mirrored_or_upside_down():
    point = torch.tensor([0.5, 0.25, -1.0])
    for changes, expected in (
        ({"mirrored": True}, [25, 37.5]),
        ({"upside_down": True}, [75, 62.5]),
        ({"mirrored": True, "upside_down": True}, [25, 62.5]),
    ):
        pixels, _ = project(replace(PLAIN, **changes), point, NOWHERE, 100)
        torch.testing.assert_close(pixels, torch.tensor(expected))


def test_a_place_scales_with_the_image():
    points = torch.randn(4, 5, 3) - torch.tensor([0, 0, 5.0])
    small, _ = project(PLAIN, points, NOWHERE, 64)
    large, _ = project(PLAIN, points, NOWHERE, 256)
    torch.testing.assert_close(4 * small, large)


def test_a_camera_in_the_hand_moves_with_it():
    camera = replace(PLAIN, mount="hand")
    turn = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, math.pi / 2], [0.2, -0.4, 0.9]])
    hand = hand_pose(torch.randn(3, 3), turn)
    before = torch.tensor([0.3, -0.2, -1.0])
    points = (hand[:, :3, :3] @ before) + hand[:, :3, 3]
    pixels, depth = project(camera, points, hand, 64)
    expected, _ = project(PLAIN, before, NOWHERE, 64)
    torch.testing.assert_close(pixels, expected.expand(3, 2), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(depth, torch.ones(3))


def test_a_pose_is_what_its_axis_and_angle_say():
    quarter = hand_pose(torch.tensor([1.0, 2, 3]), torch.tensor([0, 0, math.pi / 2]))
    expected = torch.tensor([[0.0, -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]])
    torch.testing.assert_close(quarter, expected, atol=1e-6, rtol=0)
    turns = 3 * torch.randn(50, 3).double()
    skew = torch.zeros(50, 3, 3).double()
    for (i, j), k in {(0, 1): 2, (1, 2): 0, (2, 0): 1}.items():
        skew[:, i, j], skew[:, j, i] = -turns[:, k], turns[:, k]
    poses = hand_pose(torch.zeros(50, 3).double(), turns)[:, :3, :3]
    torch.testing.assert_close(poses, torch.linalg.matrix_exp(skew))
    still = hand_pose(torch.zeros(3), torch.zeros(3))
    assert torch.equal(still, torch.eye(4))


def test_a_ray_goes_through_its_pixel():
    cameras = of_tasks("libero_spatial", (8,))
    rig, hand = Rig(cameras), hand_pose(torch.randn(3), torch.randn(3))
    pose = rig.poses(hand)
    places = torch.randint(16, (20, 2))  # row, column
    through = rig.rays(16)[:, places[:, 0], places[:, 1]].transpose(0, 1)  # [20, V, 3]
    points = (pose[:, :3, :3] @ (2 * through)[..., None])[..., 0] + pose[:, :3, 3]
    pixels, depth = rig.project(points, hand.expand(20, 4, 4), 16)
    torch.testing.assert_close(through.norm(dim=-1), torch.ones(20, 2))
    assert (depth > 0).all()
    expected = (places.flip(-1) + 0.5)[:, None].expand(20, 2, 2)
    torch.testing.assert_close(pixels, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fov": 0.0}, "fov: expected a number above 0 and at most 179"),
        ({"fov": 180.0}, "fov: expected"),
        ({"mount": "head"}, "mount: expected one of world, hand, got 'head'. Did you mean 'hand'"),
        ({"pose": AT_ORIGIN[:12]}, "pose: expected a list of numbers , at least 16"),
        ({"pose": (*AT_ORIGIN, 1.0)}, "pose: expected a rotation and a position"),
        ({"pose": (2.0, *AT_ORIGIN[1:])}, "pose: expected a rotation and a position"),
        ({"pose": (-1.0, *AT_ORIGIN[1:])}, "pose: expected a rotation"),  # a mirror image
        ({"pose": (math.nan, *AT_ORIGIN[1:])}, "pose: expected a list of numbers"),
    ],
)
def test_a_camera_that_cannot_be_is_refused(changes, said):
    with pytest.raises(UserError) as raised:
        from_dict(Camera, to_dict(PLAIN) | changes, "top view")
    assert f"top view {said}" in str(raised.value)


def test_cameras_are_named_as_the_views_are():
    robot = embodiment(64, cameras=of_tasks("libero_spatial", (8,)))
    values = to_dict(robot)
    values["cameras"].reverse()
    with pytest.raises(UserError, match="cameras: expected none, or agentview, robot0_eye_in_hand"):
        from_dict(Embodiment, values)
    assert from_dict(Embodiment, to_dict(robot)) == robot


def test_where_cameras_stand_matters_to_what_draws_only():
    one, other = (
        embodiment(64, cameras=of_tasks(s, (0,))) for s in ("libero_spatial", "libero_object")
    )
    assert not differences(one, other)
    assert set(differences(one, other, drawn=True)) == {"cameras"}


def test_tasks_seen_from_different_places_have_no_cameras():
    assert of_tasks("libero_10", (0, 1, 4, 6, 7)) == of_tasks("libero_10", (0,))
    assert of_tasks("libero_10", (2, 3)) == of_tasks("libero_goal", range(10))  # kitchen, table
    assert of_tasks("libero_10", (0, 2)) == ()
    kinds = {of_tasks("libero_10", (t,))[0].pose for t in range(10)}
    assert len(kinds) == 3
    assert len(set(AGENTVIEW.values())) == 4


def test_a_damaged_camera_of_a_robot_is_named():
    values = to_dict(embodiment(64, cameras=of_tasks("libero_spatial", (8,))))
    values["cameras"][1]["mount"] = "foot"
    with pytest.raises(UserError, match=r"cameras\.mount: expected one of world, hand, got 'foot'"):
        from_dict(Embodiment, values)
