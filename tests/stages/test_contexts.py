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
    chosen = choose_contexts(won, [8] * 100, firsts, middles, rl, generator("contexts"))
    assert len(chosen) == 2000
    assert abs(sum(c >= 80 for c in chosen) / 2000 - 0.3) < 0.03
    assert abs(sum(not won[c] for c in chosen) / 2000 - lost) < 0.03


def test_without_failures_any_context_serves():
    rl = PosttrainConfig(contexts=8, lost_contexts=1.0)
    chosen = choose_contexts([True] * 3, [8] * 3, [0, 1, 2], [], rl, generator("contexts"))
    assert set(chosen) <= {0, 1, 2}


@pytest.mark.parametrize("contexts", [30, 40])
def test_tasks_take_turns_whatever_they_leave_to_gain(contexts):
    """Task 0 has always failed, 1 has always succeeded, 2 has no context on its way to a grasp."""
    tasks = [0] * 90 + [1] * 5 + [2] * 5
    won = [False] * 90 + [True] * 5 + [True, False] * 2 + [True]
    firsts = [*range(0, 90, 3), 90, 91, *range(95, 100)]
    middles = [c for c in range(95) if c not in firsts]
    rl = PosttrainConfig(contexts=contexts)
    counts = []
    for step in range(3):
        g = generator("contexts", step)
        chosen = choose_contexts(won, tasks, firsts, middles, rl, g, step * contexts)
        counts.append([sum(tasks[c] == t for c in chosen) for t in range(3)])
    assert all(max(count) - min(count) <= 1 for count in counts)
    assert [sum(count) for count in zip(*counts, strict=True)] == [contexts] * 3


def test_with_one_task_contexts_are_those_that_they_always_were():
    """The default's random numbers: two and a place for every context."""
    won = [k % 3 == 0 for k in range(60)]
    rl, g = PosttrainConfig(contexts=9), generator("as before")
    expected = []
    for _ in range(9):
        middle, lost = torch.rand(2, generator=g).tolist()
        pool = range(20, 60) if middle < rl.middle_contexts else range(20)
        pool = [c for c in pool if won[c] == (lost >= rl.lost_contexts)]
        expected.append(pool[int(torch.randint(len(pool), (), generator=g))])
    firsts, middles = list(range(20)), list(range(20, 60))
    found = choose_contexts(won, [8] * 60, firsts, middles, rl, generator("as before"), 18)
    assert found == expected


def episode(success: bool, task: int = 0) -> FrameSequence:
    frames = torch.zeros(3, dtype=torch.bool)
    frames[-1] = success
    empty = torch.zeros(3, 0)
    return FrameSequence(empty, empty, empty, frames, torch.arange(3), 0, task, "lift the cup")


def test_the_simulator_trains_as_if_each_task_had_as_many_failures():
    """Of the ten successes nine are of task 1: those of task 0 count no less for it."""
    kinds = [(0, True), (0, False), (0, False), *[(1, True)] * 9, (1, False), *[(2, True)] * 3]
    weights = torch.tensor(balanced([episode(won, task) for task, won in kinds]))
    shares = {
        kind: float(sum(w for w, k in zip(weights, kinds, strict=True) if k == kind))
        for kind in set(kinds)
    }
    expected = {(0, True): 0.5, (0, False): 0.5, (1, True): 0.5, (1, False): 0.5, (2, True): 1.0}
    assert shares == pytest.approx(expected)


def test_the_simulator_trains_as_if_there_were_as_many_failures():
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
    envs = [SimpleNamespace(contexts=[SimpleNamespace(won=True, task=8)] * 5)]
    learner = SimpleNamespace(policy=None, noise=None, features=False)
    for step in (0, 1):
        posttrain._imagine_contexts(run, learner, envs, [0, 1, 2, 3, 4], [], (0, step))
    for starts in seen:
        worlds = [{s.seed for s in starts[k : k + 4]} for k in (0, 4, 8)]
        assert [len(group) for group in worlds] == [1, 1, 1]
    assert len({s.mistakes for starts in seen for s in starts}) == 24
