"""The real environment: LIBERO's own physics, the same bits on every repeat, no worker left."""

import os
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from worldenv.data.episode import check_episode
from worldenv.envs.libero import environment_id
from worldenv.envs.libero.assets import configure_libero, resolve_assets
from worldenv.envs.start import Start
from worldenv.runtime.errors import UserError

pytest.importorskip("robosuite", reason="robosuite is not installed")
pytest.importorskip("libero", reason="hf-libero is not installed")

from worldenv.envs.libero import worker
from worldenv.envs.libero.env import LiberoEnv, LiberoVectorEnv
from worldenv.envs.libero.worker import (
    SETTLING_ACTION,
    SETTLING_STEPS,
    LiberoSimulator,
    placement_seed,
    read_init_state,
)
from worldenv.envs.pool import WorkerError

pytestmark = [pytest.mark.libero, pytest.mark.slow]

SUITE, TASK = "libero_spatial", 3
BITS = ("qpos", "qvel", "qacc_warmstart", "ctrl")


def actions(count: int, seed: int = 0) -> np.ndarray:
    """Actions [count, 7] that press the hand towards the table, so that contacts occur."""
    draw = np.random.default_rng(seed).uniform(-1, 1, (count, 7))
    draw[:, 2] = -0.7 + 0.3 * draw[:, 2]
    draw[:, 3:6] *= 0.3
    return draw.astype(np.float32)


def same(a, b) -> bool:
    """True if two observations are equal bit for bit."""
    return all(np.array_equal(a[name], b[name]) for name in ("image", "proprio"))


@pytest.fixture(scope="module")
def assets():
    return resolve_assets(None, SUITE).path


@pytest.fixture(scope="module")
def simulator(assets):
    simulator = LiberoSimulator(SUITE, TASK, assets=assets)
    yield simulator
    simulator.close()


@pytest.fixture(scope="module")
def env():
    env = LiberoVectorEnv(SUITE, 2, workers=2, max_steps=11, record_every=3)
    yield env
    env.close()


def starts(*seeds: int | None) -> list[Start | None]:
    return [None if seed is None else Start(TASK, seed % 50, seed) for seed in seeds]


@pytest.fixture(scope="module")
def original(simulator):
    """LIBERO's own wrapper, with its hard resets, on the same task."""
    configure_libero(simulator._assets)
    from libero.libero.envs.env_wrapper import ControlEnv

    original = ControlEnv(
        bddl_file_name=simulator.env.bddl_file_name,
        has_offscreen_renderer=False,
        use_camera_obs=False,
        hard_reset=True,
    )
    yield original
    original.close()


@pytest.mark.parametrize("index", [5, None])
def test_physics_is_libero_s_own(simulator, original, index, monkeypatch):
    """Trajectory, fixtures and success of LIBERO's wrapper with its hard resets, bit for bit."""
    for liberty in ("_disturb_arm", "_let_down"):
        monkeypatch.setattr(simulator, liberty, lambda: None)
    simulator.reset(Start(TASK, 1, 99))  # something to leak from
    simulator.step(np.ones(7))
    simulator.reset(Start(TASK, index, 4))
    init_state = read_init_state(SUITE, Start(TASK, index, 4))
    if index is None:
        np.random.seed(placement_seed(4))  # noqa: NPY002 - robosuite's generator
        original.reset()
        init_state = original.sim.get_state().flatten()
    np.random.seed(4)  # noqa: NPY002 - robosuite draws from the global generator
    original.reset()
    original.set_init_state(init_state)
    original.sim.forward()
    for _ in range(SETTLING_STEPS):
        original.step(SETTLING_ACTION)
    for action in actions(24).astype(np.float64):
        *_, done, _ = original.step(action)
        assert simulator.step(action) == done
        for name in BITS:
            ours, theirs = (getattr(sim.data, name) for sim in (simulator.sim, original.sim))
            assert np.array_equal(ours, theirs), f"{name} differs"
    assert np.array_equal(simulator.sim.model.body_pos, original.sim.model.body_pos)


def test_contact_query_is_robosuite_s_own(simulator):
    simulator.reset(Start(TASK, 0, 0))
    env = simulator.env
    things = [*env.objects_dict.values(), *env.fixtures_dict.values()]
    stock = type(env).check_contact
    for a in things:
        assert env.check_contact(a) == stock(env, a)
        for b in things:
            assert env.check_contact(a, b) == stock(env, a, b)
    assert any(env.check_contact(a) for a in things)


@pytest.mark.parametrize("index", [7, None])
def test_repeats_are_bit_exact_after_other_episodes(simulator, index):
    def run(start, looks):
        simulator.reset(start)
        views, states = [], []
        for step, action in enumerate(actions(16, seed=start.seed)):
            simulator.step(action)
            states.append(simulator.state())
            if step % looks == looks - 1:
                views.append(simulator.observe())
        return np.array(states), views

    first, seen = run(Start(TASK, index, 21), 8)
    run(Start(TASK, None, 5), 16)
    run(Start(TASK, 3, 6), 16)
    again, seen_often = run(Start(TASK, index, 21), 2)
    assert np.array_equal(first, again)
    assert all(same(a, b) for a, b in zip(seen, seen_often[3::4], strict=True))


def test_seed_moves_the_fixtures_and_images_are_real(simulator):
    poses, views = [], []
    for seed in (0, 1):
        simulator.reset(Start(TASK, 2, seed))
        poses.append(simulator.sim.model.body_pos.copy())
        views.append(simulator.observe())
    assert not np.array_equal(*poses)
    image = views[0]["image"]
    assert image.shape == (2, 64, 64, 3)
    assert image.dtype == np.uint8
    assert image.std(axis=(1, 2, 3)).min() > 10
    proprio = views[0]["proprio"]
    assert proprio.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(proprio[3:6]), np.pi, atol=0.2)  # looks down
    assert 0.03 < proprio[6] < 0.045  # open
    assert simulator.goal_state == [["on", "akita_black_bowl_1", "plate_1"]]
    body = simulator.sim.data.body("akita_black_bowl_1_main").xpos
    assert np.array_equal(simulator.objects()["akita_black_bowl_1"], body.astype(np.float32))


def test_fresh_placements_are_like_the_benchmarks(assets):
    """Overlapping objects used to throw each other off the table; the arm used not to deviate."""
    simulator = LiberoSimulator(SUITE, 8, assets=assets)
    joints = []
    for seed in (77009, 77022, 77035, 77047):
        simulator.reset(Start(8, None, seed))
        robot, data = simulator.env.robots[0], simulator.sim.data
        bowl, plate = (data.get_body_xpos(f"{n}_main") for n in ("akita_black_bowl_1", "plate_1"))
        assert min(bowl[2], plate[2]) > 0.88, seed
        assert np.linalg.norm((bowl - plate)[:2]) < 0.25, seed
        joints.append(data.qpos[robot._ref_joint_pos_indexes] - robot.init_qpos)
    theirs = np.array([read_init_state(SUITE, Start(8, k, 0)) for k in range(20)])
    arm = 1 + np.array(robot._ref_joint_pos_indexes)
    np.testing.assert_allclose(np.std(joints), theirs[:, arm].std(0).mean(), rtol=0.3)
    simulator.close()


def test_fresh_placements_were_drawn_among_other_fixtures(assets):
    """As the init states were: the bowl of task 4 lies where another draw's drawer was."""
    simulator = LiberoSimulator(SUITE, 4, assets=assets)
    names = ("akita_black_bowl_1_main", "wooden_cabinet_1_cabinet_top")

    def offsets(starts):
        for start in starts:
            simulator.reset(start)
            bowl, drawer = map(simulator.sim.data.get_body_xpos, names)
            yield bowl - drawer

    ours = np.array([*offsets(Start(4, None, seed) for seed in range(77000, 77010))])
    theirs = np.array([*offsets(Start(4, k, k) for k in range(10))])
    spread = ours.std(0)[:2] / theirs.std(0)[:2]  # with today's fixtures 0.05 and 0.16
    assert 0.5 < spread.min() < spread.max() < 2.0, spread
    np.testing.assert_allclose(ours[:, 2], theirs[:, 2], atol=0.005)  # in the drawer
    simulator.close()


def test_simulator_refuses_bad_requests(simulator, assets):
    with pytest.raises(UserError, match="init states 0 to 49, got 50"):
        simulator.reset(Start(TASK, 50, 0))
    with pytest.raises(UserError, match="holds task 3, got a start of task 4"):
        simulator.reset(Start(4, 0, 0))
    with pytest.raises(UserError, match="libero_spatial"):
        LiberoSimulator("libero_spatal", 0, assets=assets)
    with pytest.raises(UserError, match="tasks 0 to 9, got task 10"):
        LiberoSimulator(SUITE, 10, assets=assets)
    with pytest.raises(UserError, match="from 1 to render_size 128, got 129"):
        LiberoSimulator(SUITE, 0, assets=assets, image_size=129)


def test_rows_step_record_truncate_and_freeze(env):
    observation, info = env.reset(options={"starts": starts(8, 8)})
    assert env.observation_space.contains(observation)
    assert (
        observation["instruction"]
        == ("pick up the black bowl on the cookie box and place it on the plate",) * 2
    )
    assert same({k: observation[k][:1] for k in ("image", "proprio")},
                {k: observation[k][1:] for k in ("image", "proprio")})  # fmt: skip
    assert info["steps"].tolist() == [0, 0]
    chunk = np.stack([actions(8)] * 2)
    observation, reward, terminated, truncated, info = env.step(chunk)
    assert env.observation_space.contains(observation)
    assert np.array_equal(observation["image"][0], observation["image"][1])  # two workers agree
    assert (reward.tolist(), terminated.tolist(), truncated.tolist()) == (
        [0, 0],
        [False] * 2,
        [False] * 2,
    )
    assert info["steps"].tolist() == [8, 8]
    assert info["success_step"].tolist() == [-1, -1]
    frames = info["frames"][0]
    assert frames["steps"].tolist() == [3, 6, 8]
    assert np.array_equal(frames["image"][-1], observation["image"][0])
    assert len(frames["dones"]) == 8
    observation, _, _, truncated, info = env.step(chunk)  # 11 = 8 + 3: ends within the chunk
    assert truncated.tolist() == [True, True]
    assert info["steps"].tolist() == [11, 11]
    assert info["frames"][1]["steps"].tolist() == [9, 11]
    assert set(observation) == {"image", "proprio", "instruction"}  # where things are is no part
    seen = env.objects(1)
    assert [*seen] == [0, 3, 6, 8, 9, 11]
    assert [*seen[11]] == ["akita_black_bowl_1", "plate_1"]  # what is moved comes first
    frozen, reward, _, truncated, info = env.step(np.full_like(chunk, np.nan))
    assert same(frozen, observation)
    assert truncated.tolist() == [True, True]
    assert len(info["frames"][0]["steps"]) == 0
    mask = np.array([False, True])
    refilled, info = env.reset(options={"reset_mask": mask, "starts": starts(None, 9)})
    assert info["steps"].tolist() == [11, 0]
    assert ([*env.objects(0)], [*env.objects(1)]) == ([*seen], [0])
    assert np.array_equal(refilled["image"][0], frozen["image"][0])
    assert not np.array_equal(refilled["image"][1], frozen["image"][1])
    _, _, _, truncated, info = env.step(chunk)
    assert info["steps"].tolist() == [11, 8]
    assert truncated.tolist() == [True, False]


def test_bad_actions_and_starts_are_named(env):
    env.reset(options={"starts": starts(1, 2)})
    chunk = np.stack([actions(8)] * 2)
    with pytest.raises(UserError, match=r"\[2, 8, 7\].*got \[2, 8, 6\]"):
        env.step(chunk[..., :6])
    with pytest.raises(UserError, match="floating point, got int64"):
        env.step(chunk.astype(np.int64))
    chunk[1, 2, 3] = np.nan
    with pytest.raises(UserError, match="got nan in row 1, chunk step 2, dim 3"):
        env.step(chunk)
    with pytest.raises(UserError, match="init states 0 to 49, got 77"):
        env.reset(options={"starts": [Start(TASK, 77, 0), Start(TASK, 0, 0)]})
    assert env.step(np.zeros_like(chunk))[-1]["steps"].tolist() == [8, 8]  # no row was harmed
    with pytest.raises(UserError, match="task 10"):
        env.reset(options={"starts": [Start(10, 0, 0)] * 2})
    with pytest.raises(UserError, match="reset_mask"):
        env.reset(options={"rest_mask": None})
    with pytest.raises(UserError, match=r"bool \[2\]"):
        env.reset(options={"reset_mask": [1, 0, 1]})


def test_errors_travel_from_workers(env):
    env.reset(options={"starts": starts(1, 2)})
    start, past = Start(TASK, 77, 0), np.zeros((0, 7))
    with pytest.raises(UserError, match="init states 0 to 49, got 77"):
        env._pool.exchange({0: ("reset", [(0, start, None, past, False)])})
    with pytest.raises(WorkerError, match="KeyError: 5"):
        env._pool.exchange({0: ("step", [(5, past, True, frozenset())])})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # neither cost a worker
        env.step(np.zeros(env.action_space.shape, np.float32))


@pytest.mark.parametrize("accident", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_worker_is_replaced_and_its_episode_redone(env, accident):
    chunk = np.stack([actions(8, 1), actions(8, 2)])

    def run(disturb):
        env.reset(options={"starts": starts(30, 31)})
        env.step(chunk)
        if disturb:
            os.kill(env._pool.pids[1], accident)
        return env.step(chunk)

    observation, *_, info = run(False)
    patience, env._pool.timeout_s = env._pool.timeout_s, 8.0
    with pytest.warns(RuntimeWarning, match="worker 1 d.*episodes are redone"):
        redone, *_, info_redone = run(True)
    env._pool.timeout_s = patience
    assert same(observation, redone)
    assert info["steps"].tolist() == info_redone["steps"].tolist() == [11, 11]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(False)


def test_never_terminates_without_the_oracle(env):
    """Success is only reported when told to ignore it; else it ends the row at its sub-step."""
    from worldenv.envs.server import Chunk
    from worldenv.envs.workers import _Row

    dones = np.array([False, False, True, False])
    view = {"image": np.zeros((2, 4, 4, 3), np.uint8), "proprio": np.zeros(8, np.float32)}
    view["objects"] = {}
    row = _Row(Start(TASK, 0, 0))
    assert row.advance(np.zeros((4, 7)), Chunk(dones, [(4, view)]), 220, "never") == 1.0
    assert (row.steps, row.success_step, row.finished) == (4, 3, False)
    assert row.frames(Chunk(~dones, [(1, view)]))["success"].tolist() == [True]
    assert row.advance(np.zeros((4, 7)), Chunk(dones, [(4, view)]), 8, "never") == 0.0
    assert (row.terminated, row.truncated) == (False, True)
    row = _Row(Start(TASK, 0, 0))
    assert row.advance(np.zeros((4, 7)), Chunk(dones[:3], [(3, view)]), 3, "success") == 1.0
    assert (row.terminated, row.truncated, len(row.actions[0])) == (True, False, 3)


def test_gymnasium_s_checker_passes():
    """check_env on one row (it knows no vector environments), then the vector one by its id."""
    env = LiberoEnv(SUITE, max_steps=220)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # These advise; unbounded proprio and half-turned angles are meant.
            warnings.filterwarnings("ignore", message=".*Box observation space.*infinity")
            check_env(env, skip_render_check=True)
    finally:
        env.close()
    rows = gymnasium.make_vec(environment_id(SUITE), num_envs=3)
    try:
        assert isinstance(rows.unwrapped, LiberoVectorEnv)
        assert rows.metadata["autoreset_mode"] is gymnasium.vector.AutoresetMode.DISABLED
        assert rows.unwrapped.max_steps == 220
        assert rows.action_space.shape == (3, 8, 7)
    finally:
        rows.close()


def test_import_loads_no_simulator():
    code = "import sys, worldenv.envs; print([m for m in ('mujoco', 'torch') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_demonstrations_repeat_and_keep_their_order(env):
    asked = [Start(TASK, 0, 0), Start(TASK, None, 1), Start(TASK, 2, 2)]
    first = env.demonstrate(asked, noise=0.25, seed=5, record_every=4)
    again = env.demonstrate(asked, noise=0.25, seed=5, record_every=4)
    for start, a, b in zip(asked, first, again, strict=True):
        check_episode(a, "demonstration")
        assert (a.task, a.start, a.seed, a.success) == (TASK, start.index, start.seed, False)
        assert a.frame_steps.tolist() == [0, 4, 8, 11]
        assert a.actions.shape == (11, 7)
        for name in ("actions", "images", "proprio"):
            assert np.array_equal(getattr(a, name), getattr(b, name))
    assert not np.array_equal(first[0].actions, first[2].actions)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros(env.action_space.shape, np.float32))


PROGRAM = """
import signal, sys, numpy as np
from worldenv.envs.libero.env import LiberoVectorEnv
from worldenv.envs.start import Start
# A shell starts background jobs with SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
env = LiberoVectorEnv("libero_spatial", 1)
if sys.argv[1] == "close":
    env.reset(options={"starts": [Start(3, None, 0)]})
else:
    env._pool.exchange({0: ("reset", [])})
print(*env._pool.pids.values(), flush=True)
while sys.argv[1] != "close":
    env._pool.exchange({0: ("reset", [])})
env.step(np.zeros((1, 8, 7), np.float32))
env.close()
"""


@pytest.mark.parametrize("how", ["close", "interrupt", "kill"])
def test_no_process_outlives_its_parent(how):
    parent = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=os.getcwd(),
    )
    worker = int(parent.stdout.readline())
    if how != "close":
        time.sleep(0.3)
        parent.send_signal(signal.SIGINT if how == "interrupt" else signal.SIGKILL)
    _, errors = parent.communicate(timeout=60)
    if how == "close":
        assert (errors, parent.returncode) == ("", 0)
    elif how == "interrupt":
        assert errors.strip().endswith("KeyboardInterrupt")
        assert "Exception ignored" not in errors
    for _ in range(100):
        if not os.path.exists(f"/proc/{worker}"):
            break
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{worker}")


def test_init_states_are_read_by_several_threads_at_once(monkeypatch):
    """torch's list of what may be unpickled is the process's: one reader emptied it for another."""
    load = torch.load

    def slow(path, **arguments):
        time.sleep(0.02 * int(path.name.startswith("pick_up_the_black_bowl_from")))
        return load(path, **arguments)

    monkeypatch.setattr(torch, "load", slow)
    worker._init_states.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda task: read_init_state(SUITE, Start(task, 0, 0)), range(10)))
    assert [state.ndim for state in found] == [1] * 10
