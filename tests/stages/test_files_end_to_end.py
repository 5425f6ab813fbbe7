"""Suites without a scripted expert, from files in LIBERO's official layout to the report.

Official assets are not shipped: where they are absent a stand-in takes the real benchmark's place
(the same interface, no physics), and everything else is the program itself.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, VectorEnv
from official_files import write_official

from worldenv.config import DataConfig, PolicyConfig
from worldenv.data.libero_tasks import SUITES, instruction_of
from worldenv.presets import preset
from worldenv.stages import demonstrations, pipeline, reality
from worldenv.stages.run import Run

TASKS = {"libero_goal": 7, "libero_10": 2}


class StandIn(VectorEnv):
    """LiberoVectorEnv's interface; every other seed succeeds after twelve steps."""

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012

    def __init__(self, suite, num_envs, *, image_size, chunk, max_steps, terminate="success",
                 record_every=None, **_):  # fmt: skip
        self.suite, self.num_envs, self.size = suite, num_envs, image_size
        self.chunk, self.max_steps, self.terminate = chunk, max_steps, terminate
        self.record_every = record_every
        self.starts, self.steps = [None] * num_envs, np.zeros(num_envs, int)

    def reset(self, *, seed=None, options=None):
        mask = options.get("reset_mask", np.ones(self.num_envs, bool))
        for row in np.flatnonzero(mask):
            self.starts[row], self.steps[row] = options["starts"][row], 0
        return self.observe(), self.info()

    def look(self, row, step):
        picture = np.full((2, self.size, self.size, 3), 40, np.uint8)
        picture[:, step % self.size :, : self.starts[row].seed % self.size] = 200
        return {"image": picture, "proprio": np.full(8, step / 1000, np.float32)}

    def observe(self):
        seen = [self.look(row, step) for row, step in enumerate(self.steps)]
        words = tuple(instruction_of(SUITES[self.suite][s.task]) for s in self.starts)
        return {k: np.stack([s[k] for s in seen]) for k in seen[0]} | {"instruction": words}

    def info(self):
        lucky = np.array([s.seed % 2 == 1 for s in self.starts])
        won = lucky & (self.steps >= 12)
        return {"success": won, "steps": self.steps.copy(), "success_step": np.where(won, 12, -1)}

    def step(self, actions):
        assert actions.shape == (self.num_envs, self.chunk, 7)
        before, won = self.steps.copy(), self.info()["success"]
        self.steps = np.minimum(self.steps + self.chunk, self.max_steps)
        info = self.info()
        if self.record_every:
            info["frames"] = [self.frames(row, before[row]) for row in range(self.num_envs)]
        terminated = info["success"] & (self.terminate == "success")
        truncated = (self.steps >= self.max_steps) & ~terminated
        reward = (info["success"] & ~won) * 1.0
        return self.observe(), reward, terminated, truncated, info

    def frames(self, row, before):
        steps = [s for s in range(before + 1, self.steps[row] + 1) if s % self.record_every == 0]
        seen = [self.look(row, s) for s in steps]
        dones = np.arange(before + 1, self.steps[row] + 1) >= 12
        return {"steps": np.array(steps), "dones": dones & (self.starts[row].seed % 2 == 1),
                **{k: np.stack([s[k] for s in seen]) for k in seen[0]}}  # fmt: skip


def tiny(folder, suite):
    """The smoke preset, smaller still: one round, one task."""
    base = preset("smoke")
    return replace(
        base,
        run_dir=folder / "run",
        env=replace(base.env, suite=suite, tasks=(TASKS[suite],), max_steps=32),
        data=DataConfig(paths=(folder / "official",), episodes=2),
        policy=PolicyConfig(width=32, layers=1, heads=2, encoder_channels=8),
        sft=replace(base.sft, steps=2, batch=4),
        simulator=replace(base.simulator, steps=2),
        reflector=replace(base.reflector, steps=2),
        posttrain=replace(base.posttrain, rounds=1, iterations=1, contexts=1),
    )


def trained(config, suite) -> dict:
    name = SUITES[suite][TASKS[suite]]
    write_official(config.data.paths[0] / suite / f"{name}_demo.hdf5", demos=3, size=128, steps=40)
    run = Run(config)
    try:
        return json.loads(pipeline.run_all(run).read_text())
    finally:
        run.close()


@pytest.mark.slow
@pytest.mark.parametrize("suite", TASKS)
def test_trains_from_files_with_a_stand_in_for_reality(tmp_path, monkeypatch, suite):
    monkeypatch.setattr(reality, "LiberoVectorEnv", StandIn)
    monkeypatch.setattr(demonstrations, "resolve_assets", lambda *_: None)
    results = trained(tiny(tmp_path, suite), suite)
    assert results["stages"]["demonstrations"]["episodes"] == 2
    assert results["tasks"][0]["instruction"] == instruction_of(SUITES[suite][TASKS[suite]])
    assert results["posttrained"]["episodes"] == 2
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.libero
@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize("suite", TASKS)
def test_trains_from_files_in_the_real_benchmark(tmp_path, suite):
    results = trained(tiny(tmp_path, suite), suite)
    assert results["stages"]["demonstrations"]["episodes"] == 2
    assert results["posttrained"]["episodes"] == 2
