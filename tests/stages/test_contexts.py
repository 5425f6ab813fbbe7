"""What the simulator trains on, and which policy and contexts post-training begins with."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from worldenv.config import PosttrainConfig
from worldenv.data.windows import FrameSequence
from worldenv.presets import preset
from worldenv.runtime.seeds import generator
from worldenv.stages import posttrain
from worldenv.stages.posttrain import choose_contexts, starting_policy
from worldenv.stages.simulator import balanced


@pytest.mark.parametrize("lost", [0.0, 0.5, 1.0])
def test_shares_of_failures_and_of_mid_episode_contexts(lost):
    won = [True] * 70 + [False] * 10 + [True] * 15 + [False] * 5
    rl = PosttrainConfig(contexts=2000, middle_contexts=0.3, lost_contexts=lost)
    firsts, middles = list(range(80)), list(range(80, 100))
    chosen = choose_contexts(won, firsts, middles, rl, generator("contexts"))
    assert len(chosen) == 2000
    assert abs(sum(c >= 80 for c in chosen) / 2000 - 0.3) < 0.03
    assert abs(sum(not won[c] for c in chosen) / 2000 - lost) < 0.03


def test_without_failures_any_context_serves():
    rl = PosttrainConfig(contexts=8, lost_contexts=1.0)
    assert set(choose_contexts([True] * 3, [0, 1, 2], [], rl, generator("contexts"))) <= {0, 1, 2}


def test_the_simulator_trains_as_if_there_were_as_many_failures():
    def episode(success: bool) -> FrameSequence:
        frames = torch.zeros(3, dtype=torch.bool)
        frames[-1] = success
        empty = torch.zeros(3, 0)
        return FrameSequence(empty, empty, empty, frames, torch.arange(3), 0, 0, "lift the cup")

    won = [True, True, False, True]
    weights = torch.tensor(balanced([episode(w) for w in won]))
    lost = ~torch.tensor(won)
    torch.testing.assert_close(weights[lost].sum(), weights[~lost].sum())


def test_rounds_go_on_from_each_other_unless_they_restart():
    anew, on = PosttrainConfig(restart=True), PosttrainConfig()
    assert [starting_policy(anew, n) for n in range(3)] == ["policy-sft"] * 3
    assert [starting_policy(on, n) for n in range(3)] == ["policy-sft", "policy-0", "policy-1"]


def test_episodes_of_a_group_share_a_world_and_err_each_for_itself(monkeypatch):
    seen = []
    monkeypatch.setattr(
        posttrain, "rollout_shards", lambda envs, policy, starts, **_: seen.append(starts)
    )
    base = preset("smoke")
    rl = replace(base.posttrain, contexts=3, group=4)
    run = SimpleNamespace(config=replace(base, posttrain=rl))
    envs = [SimpleNamespace(contexts=[SimpleNamespace(won=True)] * 5)]
    learner = SimpleNamespace(policy=None, noise=None, features=False)
    for step in (0, 1):
        posttrain._imagine_contexts(run, learner, envs, [0, 1, 2, 3, 4], [], (0, step))
    for starts in seen:
        worlds = [{s.seed for s in starts[k : k + 4]} for k in (0, 4, 8)]
        assert [len(group) for group in worlds] == [1, 1, 1]
    assert len({s.mistakes for starts in seen for s in starts}) == 24
