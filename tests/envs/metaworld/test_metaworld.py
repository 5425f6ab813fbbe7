"""Meta-World through the seam: seeded, the same bits on every repeat, its experts, lost workers."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest

from worldenv.envs.benchmark import begun, check, find
from worldenv.envs.metaworld.benchmark import MT10, MT50, TASKS
from worldenv.envs.start import Start
from worldenv.presets import preset
from worldenv.runtime.errors import UserError
from worldenv.stages import reality

BASE = preset("smoke")
CONFIG = replace(BASE, env=begun(replace(BASE.env, workers=1), "metaworld"))
DRAWER = MT10.index("drawer-open")


def test_what_it_lacks_is_named_with_the_command(monkeypatch):
    found = find("metaworld")
    assert check(CONFIG) is found
    assert (CONFIG.env.suite, CONFIG.env.max_steps) == ("mt10", 200)
    monkeypatch.setattr("worldenv.envs.metaworld.benchmark.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"no metaworld\. Run `pip install --no-deps metaworld"):
        found.check(CONFIG.env)


@pytest.fixture(scope="module")
def env():
    pytest.importorskip(
        "metaworld.env_dict", reason="metaworld is not installed (pip install --no-deps)"
    )
    env = reality.make_env(CONFIG)
    env.record_every = 4
    yield env
    env.close()


def test_tasks_are_the_package_s(env):
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS, MT10_V3

    assert [f"{name}-v3" for name in MT50] == list(ALL_V3_ENVIRONMENTS)
    assert [f"{name}-v3" for name in MT10] == list(MT10_V3)
    assert {*TASKS} == {*find("metaworld").suites}


def test_repeats_are_bit_exact_after_other_episodes_and_a_lost_worker(env):
    chunks = np.random.default_rng(0).uniform(-1, 1, (3, 1, 8, 4)).astype(np.float32)

    def run(start, kill=False):
        first, _ = env.reset(options={"starts": [start]})
        seen = [first]
        for k, chunk in enumerate(chunks):
            if kill and k == 1:
                os.kill(env._pool.pids[0], signal.SIGKILL)
            seen.append(env.step(chunk)[0])
        return seen

    def same(one, other):
        pairs = list(zip(one, other, strict=True))
        return all(np.array_equal(a[k], b[k]) for a, b in pairs for k in ("image", "proprio"))

    start = Start(DRAWER, None, 5)
    seen = run(start)
    assert seen[0]["image"].shape == (1, 2, 64, 64, 3)
    assert seen[0]["image"].std(axis=(2, 3, 4)).min() > 10
    assert not same(seen, run(Start(DRAWER, 5, 0)))
    assert same(seen, run(start))
    with pytest.warns(RuntimeWarning, match="episodes are redone"):
        redone = run(start, kill=True)
    assert same(seen, redone)


def test_its_expert_demonstrates_through_noise(env):
    (episode,) = env.demonstrate([Start(DRAWER, 0, 0)], noise=0.25, seed=1, record_every=8)
    assert episode.success
    assert (episode.benchmark, episode.suite, episode.instruction) == (
        "metaworld", "mt10", "drawer open")  # fmt: skip
    assert episode.actions.shape[1] == 4
    assert 40 < len(episode) < 200
    assert np.abs(episode.actions).max() <= 1
