"""The cameras written down are the simulator's, by its matrices and by what it renders."""

import os

import numpy as np
import pytest
import torch

from worldenv.data.libero_tasks import SUITES
from worldenv.data.rig import hand_pose, project
from worldenv.envs.libero.assets import resolve_assets
from worldenv.envs.libero.cameras import kind_of, of_tasks
from worldenv.envs.start import Start

pytest.importorskip("robosuite", reason="robosuite is not installed")
pytest.importorskip("libero", reason="hf-libero is not installed")

from robosuite.utils.camera_utils import get_camera_transform_matrix

from worldenv.envs.libero.worker import CAMERAS, LiberoSimulator

pytestmark = [pytest.mark.libero, pytest.mark.slow]

SIZE = 64
ONE_OF_EACH_KIND = {
    kind_of(suite, task): (suite, task) for suite in SUITES for task in range(len(SUITES[suite]))
}


@pytest.fixture(scope="module")
def simulator():
    suite = "libero_spatial"
    simulator = LiberoSimulator(suite, 8, assets=resolve_assets(None, suite).path)
    simulator.reset(Start(8, 3, 5))
    yield simulator
    simulator.close()


def seen(simulator: LiberoSimulator, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [V, N, 2] of points [N, 3] by our cameras, and by robosuite's matrices."""
    proprio = torch.from_numpy(simulator.proprio()).double()
    hand = hand_pose(proprio[:3], proprio[3:6])
    ours, theirs = [], []
    for camera in of_tasks(simulator.suite, (simulator.task,)):
        ours.append(project(camera, torch.from_numpy(points), hand, SIZE)[0].numpy())
        matrix = get_camera_transform_matrix(simulator.sim, camera.name, SIZE, SIZE)
        x = np.concatenate([points, np.ones((len(points), 1))], 1) @ matrix.T
        theirs.append(x[:, :2] / x[:, 2:3])
        theirs[-1][:, 0] = SIZE - theirs[-1][:, 0]  # the episodes' images are mirrored
    return np.stack(ours), np.stack(theirs)


def agree(simulator: LiberoSimulator) -> None:
    site = simulator.sim.data.site_xpos[simulator.env.robots[0].eef_site_id]
    around = site + np.random.default_rng(0).uniform(-0.03, 0.03, (20, 3))
    ours, theirs = seen(simulator, np.concatenate([site[None], around]))
    assert np.abs(ours - theirs).max() < 0.05
    assert (ours[:, 0] > 0).all()
    assert (ours[:, 0] < SIZE).all()


def test_projected_points_are_where_the_simulators_matrices_put_them(simulator):
    simulator.reset(Start(8, 3, 5))
    draw = np.random.default_rng(1)
    for _ in range(4):
        agree(simulator)
        for _ in range(8):
            simulator.step(draw.uniform(-1, 1, 7))


def test_a_point_of_light_in_the_hand_is_drawn_where_it_is_projected(simulator):
    simulator.reset(Start(8, 3, 5))
    model, data = simulator.sim.model._model, simulator.sim.data._data
    site = simulator.env.robots[0].eef_site_id
    # Beyond the fingers, which hide the hand's own place from the camera behind them.
    offset = np.array([0, 0, 0.05])
    ahead = data.site_xpos[site] + data.site_xmat[site].reshape(3, 3) @ offset
    ours, _ = seen(simulator, ahead[None])
    model.site_pos[site] += offset
    same_frame, model.site_sameframe[site] = model.site_sameframe[site], 0
    model.site_rgba[site], model.site_size[site] = (1, 0, 1, 1), 0.01
    simulator.sim.forward()
    with_light = simulator.observe()["image"].astype(float)
    model.site_pos[site], model.site_rgba[site] = model.site_pos[site] - offset, (1, 0, 1, 0)
    model.site_sameframe[site] = same_frame
    change = np.abs(with_light - simulator.observe()["image"]).sum(-1)
    centres = np.arange(SIZE) + 0.5
    for view in range(len(CAMERAS)):
        weight = change[view] * (change[view] > 30)
        assert weight.sum() > 0
        middle = [(weight.sum(axis) @ centres) / weight.sum() for axis in (0, 1)]
        assert np.abs(ours[view, 0] - middle).max() < 1


@pytest.mark.assets
@pytest.mark.parametrize("kind", ONE_OF_EACH_KIND)
def test_every_kind_of_scene_is_seen_from_where_it_is_said(kind):
    suite, task = ONE_OF_EACH_KIND[kind]
    assets = resolve_assets(os.environ["WORLDENV_LIBERO_ASSETS"], suite).path
    simulator = LiberoSimulator(suite, task, assets=assets)
    simulator.reset(Start(task, 3, 5))
    agree(simulator)
    simulator.close()
