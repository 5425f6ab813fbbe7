"""Several environments share the episodes of several tasks, with a stand-in for the benchmark."""

from dataclasses import replace

import pytest
import torch
from stand_in import StandIn

from worldenv.envs.libero import benchmark
from worldenv.envs.start import Start
from worldenv.presets import preset
from worldenv.stages.reality import Reality, Watcher

TASKS = (4, 1, 7, 2)


@pytest.mark.parametrize("order", ["by task", "in turn"])
def test_no_scene_is_built_twice_but_where_tasks_run_out(monkeypatch, order):
    built = []

    class Built(StandIn):
        def reset(self, *, seed=None, options=None):
            (start,) = options["starts"]
            if self.starts[0] is None or self.starts[0].task != start.task:
                built.append(start.task)
            return super().reset(seed=seed, options=options)

    monkeypatch.setattr(benchmark, "LiberoVectorEnv", Built)
    base = preset("smoke")
    config = replace(base, env=replace(base.env, tasks=TASKS, max_steps=16, workers=2))
    starts = [Start(task, None, 10 * task + k) for task in TASKS for k in range(5)]
    if order == "in turn":
        starts.sort(key=lambda s: s.seed % 10)

    def policy(view):
        mu = torch.zeros(len(view["image"]), 8, 7)
        mu[..., 0] = view["image"].float().mean()
        return mu, mu

    real = Reality(config)
    how = {"noise": None, "terminate": "success", "images": True}
    done = real.roll_out(policy, starts, lambda env: Watcher(), seeds=[0] * len(starts), **how)
    assert set(built) == set(TASKS)
    assert len(built) <= len(TASKS) + 1
    # In the order of the starts, whoever did them: what is seen tells the seed.
    width = StandIn("libero_goal", 1, image_size=64, chunk=8, max_steps=16).size
    lit = [int((d.image[0, 0, 0, :, 0] == 200).sum()) for d in done]
    assert lit == [s.seed % width for s in starts]
    built.clear()
    held = list(real._held)
    real.roll_out(policy, [Start(held[1], None, 3)], lambda env: Watcher(), seeds=[0], **how)
    assert built == ([] if held[0] == held[1] else [held[1]])
    real.close()
