"""Post-training in the benchmark itself: where its episodes begin, and a few that are real."""

from dataclasses import replace

import pytest
import torch

from worldenv.config import PolicyConfig
from worldenv.presets import preset
from worldenv.rl.loss import has_signal
from worldenv.runtime.seeds import derive
from worldenv.stages import physics, posttrain, store
from worldenv.stages.collect import exploration_start
from worldenv.stages.run import Run

TASKS = (3, 5, 8)


@pytest.fixture
def run(tmp_path):
    base = preset("smoke")
    rl = replace(base.posttrain, world="real", rounds=1, contexts=4, group=2, iterations=1)
    config = replace(
        base,
        run_dir=tmp_path,
        device="cpu",
        env=replace(base.env, tasks=TASKS, max_steps=16, workers=1),
        policy=PolicyConfig(width=16, layers=1, heads=1, encoder_channels=8),
        posttrain=rl,
    )
    run = Run(config)
    torch.manual_seed(0)
    store.save(
        "policy", store.build("policy", config), run.path("checkpoints", "policy-sft.safetensors")
    )
    yield run
    run.close()


def learner(run: Run):
    policy = store.load("policy", run.path("checkpoints", "policy-sft.safetensors"))
    return posttrain.new_learner(run, policy, 0)


def test_groups_begin_where_exploration_would_and_tasks_take_turns(run, monkeypatch):
    seen = []

    class Seen(Exception):
        pass

    def roll_out(policy, starts, watch, *, seeds, **how):
        seen.append((starts, seeds))
        raise Seen

    monkeypatch.setattr(run.reality, "roll_out", roll_out)
    for step in range(3):
        with pytest.raises(Seen):
            physics.real_groups(run, learner(run), (0, step))
    starts = [s for each, _ in seen for s in each]
    assert starts[::2] == starts[1::2], "a group begins as one"
    assert [s.task for s in starts[::2]] == [TASKS[k % 3] for k in range(12)]
    explored = [exploration_start(run.config, TASKS[k % 3], 0, k // 3) for k in range(12)]
    assert starts[::2] == explored
    assert len(set(explored)) == 12
    seeds = [s for _, each in seen for s in each]
    assert len(set(seeds)) == 24, "episodes of a group differ by their noise"
    assert seeds[:2] == [derive(run.config.seed, "action", 0, 0, 0, n) for n in range(2)]


@pytest.mark.libero
def test_a_real_iteration_is_the_same_rollout_as_an_imagined_one(run):
    run.config = replace(run.config, env=replace(run.config.env, tasks=(8,)))
    run.config = replace(run.config, posttrain=replace(run.config.posttrain, contexts=1))
    episodes = physics.real_groups(run, learner(run), (0, 0))
    assert episodes.length.tolist() == [2, 2]
    assert episodes.episode.tolist() == [0, 0, 1, 1]
    assert not episodes.terminated.any()
    assert not has_signal(episodes.terminated.float(), 2).any()
    assert torch.equal(episodes.image[0], episodes.image[2]), "a group begins as one"
    assert not torch.equal(episodes.image[1], episodes.image[3])
    again = physics.real_groups(run, learner(run), (0, 0))
    for name in ("image", "proprio", "action", "logprob", "reward"):
        assert torch.equal(getattr(episodes, name), getattr(again, name)), name
