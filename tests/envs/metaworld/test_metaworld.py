"""Meta-World through the seam: seeded, the same bits on every repeat, its experts, lost workers;
and a run of its preset, made tiny."""

import json
import os
import signal
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from worldenv import cli
from worldenv.envs.benchmark import begun, check, find
from worldenv.envs.metaworld.benchmark import INSTALL
from worldenv.envs.metaworld.tasks import MT10, MT50, TASKS
from worldenv.envs.start import Start
from worldenv.presets import preset
from worldenv.runtime.errors import UserError
from worldenv.stages import estimate, reality, results

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
    makefile = (Path(__file__).parents[3] / "Makefile").read_text()
    assert f"METAWORLD := {INSTALL.split()[-1]}\n" in makefile


def test_the_preset_takes_less_than_the_default():
    """Fewer real control steps, no more training of the world; twice the iterations, all told."""
    config = preset("metaworld")
    assert check(config) is find("metaworld")
    costs = estimate.Costs(sample=0.016, window=0.84, judged=0.4, frame=0.02, chunk=0.18)
    totals = [sum(estimate.estimate(c, costs).values()) for c in (config, preset("default"))]
    assert totals[0] < totals[1]
    assert 2 <= len(config.env.tasks) <= 3
    assert len(config.evaluate.fixture_seeds) == 1  # a start says everything of an episode


@pytest.fixture(scope="module")
def package():
    if find_spec("metaworld") is None:  # one that is there and does not import is a failure
        pytest.skip(f"metaworld is not installed: {INSTALL}")


@pytest.fixture(scope="module")
def env(package):
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


def test_the_preset_runs_from_demonstrations_to_results(package, tmp_path, monkeypatch, capsys):
    """As small as it can be, on the task that its expert is done with soonest."""
    task = MT50.index("handle-press")
    small = {
        "env": {"tasks": task, "image-size": 32, "max-steps": 48, "workers": 1},
        "collect": {"demonstrations": 1, "episodes": 2, "held-out": 0.5},
        "policy": {"width": 16, "layers": 1, "heads": 2, "encoder-channels": 8},
        "sft": {"steps": 2, "batch": 4},
        "simulator": {"steps": 2, "batch": 4, "width": 24, "layers": 1},
        "reflector": {"steps": 1},
        "posttrain": {"iterations": 1, "contexts": 2, "group": 2},
    }
    words = [f"--{part}.{k}={v}" for part, own in small.items() for k, v in own.items()]
    words += ["--evaluate.starts", "20", "21", "--gate.no-on", "--device=cpu"]
    words += ["--preset", "metaworld", "--run-dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["worldenv-train", *words])
    monkeypatch.setattr(cli.pipeline, "_announce", lambda run, marks: None)  # it takes seconds
    monkeypatch.setattr(results, "_draw_videos", lambda run: None)
    cli._train()
    assert "report.html" in capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (found["benchmark"], found["suite"]) == ("metaworld", "mt50")
    assert found["tasks"][0]["instruction"] == "handle press"
    assert found["stages"]["demonstrations"]["successes"] == 1
    assert found["stages"]["explore-0"]["episodes"] == 2
    assert [found[k]["episodes"] for k in ("sft", "posttrained")] == [1, 1]
