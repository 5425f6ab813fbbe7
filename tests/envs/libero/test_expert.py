"""The scripted expert: its geometry on plain point clouds, and whole episodes in real LIBERO on the
primitive pack. Success rates over whole suites are in bench/expert_success.py.
"""

import numpy as np
import pytest

from worldenv.envs.expert import demonstrate
from worldenv.envs.libero.assets import resolve_assets
from worldenv.envs.libero.expert import single_goal
from worldenv.envs.libero.grasps import choose_grasp
from worldenv.envs.libero.robot import ACTION
from worldenv.envs.libero.worker import LiberoSimulator
from worldenv.envs.start import Start
from worldenv.runtime.errors import UserError

SHOULDER = np.array([-0.5, 0.0, 0.33])
JOURNEY = np.array([0.0, 0.1, 0.0])
NOTHING = np.zeros((0, 3))


def filled_box(half: tuple[float, float, float], centre: tuple[float, float, float]) -> np.ndarray:
    """Points [N, 3] on a 5 mm grid inside a box."""
    axes = [np.arange(-h, h + 1e-9, 0.005) for h in half]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3) + centre


def cup(radius: float, height: float) -> np.ndarray:
    """Points [N, 3] of an open cylinder on the ground, wall 4 mm, with a floor."""
    grid = filled_box((radius, radius, height / 2), (0, 0, height / 2))
    distance = np.linalg.norm(grid[:, :2], axis=1)
    angle = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    ring = np.concatenate([
        np.stack([r * np.cos(angle), r * np.sin(angle), np.full(90, z)], axis=1)
        for r in (radius - 0.004, radius)
        for z in np.arange(0.0, height + 1e-9, 0.005)
    ])  # fmt: skip
    return np.concatenate([ring, grid[(distance < radius) & (grid[:, 2] < 0.006)]])


def test_long_box_is_held_across_its_narrow_side() -> None:
    along_x = choose_grasp(filled_box((0.06, 0.02, 0.03), (0, 0, 0.03)), NOTHING, SHOULDER, JOURNEY)
    along_y = choose_grasp(filled_box((0.02, 0.06, 0.03), (0, 0, 0.03)), NOTHING, SHOULDER, JOURNEY)
    assert along_x.yaw == pytest.approx(0.0)
    assert along_y.yaw == pytest.approx(np.pi / 2)
    np.testing.assert_allclose(along_x.position[:2], 0.0, atol=1e-6)


def test_wide_open_thing_is_held_by_its_rim_away_from_a_neighbour() -> None:
    bowl = cup(0.055, 0.05)
    free = choose_grasp(bowl, NOTHING, SHOULDER, JOURNEY)
    assert np.linalg.norm(free.position[:2]) == pytest.approx(0.053, abs=0.005)
    beside = free.position[:2] / np.linalg.norm(free.position[:2]) * 0.09
    wall = filled_box((0.02, 0.02, 0.10), (*beside, 0.10))
    blocked = choose_grasp(bowl, wall, SHOULDER, JOURNEY)
    assert np.linalg.norm(blocked.position - free.position) > 0.02


def test_candidates_differ_and_repeat() -> None:
    bowl = cup(0.055, 0.05)
    first, second = (choose_grasp(bowl, NOTHING, SHOULDER, JOURNEY, k) for k in (0, 1))
    assert first.cost <= second.cost
    assert not first.resembles(second)


def test_thing_too_wide_to_hold_is_refused() -> None:
    with pytest.raises(UserError, match="no part of the object"):
        choose_grasp(filled_box((0.1, 0.1, 0.03), (0, 0, 0.03)), NOTHING, SHOULDER, JOURNEY)


class _Foreign:
    """A simulator of a task the expert has no skill for."""

    suite = "libero_goal"
    goal_state = (("turnon", "flat_stove_1"),)


def test_unsupported_goal_names_the_suites() -> None:
    with pytest.raises(UserError, match="libero_spatial and libero_object"):
        single_goal(_Foreign())


@pytest.mark.libero
@pytest.mark.slow
@pytest.mark.parametrize(("task", "noise"), [(3, 0.0), (3, 0.25), (4, 0.0), (9, 0.0)])
def test_solves_the_primitive_pack(
    task: int, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLDENV_LIBERO_ASSETS", raising=False)
    source = resolve_assets(None, "libero_spatial")
    simulator = LiberoSimulator("libero_spatial", task, assets=source.path)
    recorded = []
    result = demonstrate(
        simulator,
        Start(task, 0, seed=0),
        simulator.expert,
        ACTION,
        noise=noise,
        rng=np.random.default_rng(0),
        record=(lambda *row: recorded.append(row)) if noise else None,
    )
    simulator.close()
    assert result.success
    assert result.steps <= 160
    assert result.actions.shape == result.executed.shape == (result.steps, 7)
    assert np.abs(result.actions).max() <= 1.0
    assert set(np.unique(result.actions[:, 6])) == {-1.0, 1.0}
    if noise == 0.0:
        np.testing.assert_array_equal(result.actions, result.executed)
        return
    assert len(recorded) == result.steps
    np.testing.assert_array_equal(np.stack([row[1] for row in recorded]), result.actions)
    assert recorded[0][0]["image"].shape == (2, 64, 64, 3)
    disturbance = np.abs(result.executed - result.actions)[:, :6]
    assert 0.005 < disturbance.mean() < 0.5
