"""Rollout, advantages and update on a toy world whose best action is known."""

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn
from toy_world import ToyEnv, ToyPolicy, seeds, starts

from worldenv.config import PosttrainConfig
from worldenv.envs.start import Start
from worldenv.rl.loss import episode_rewards, gae_advantages, group_advantages
from worldenv.rl.noise import Laplace, sample_laplace
from worldenv.rl.rollout import Trajectories, join, rollout
from worldenv.rl.update import Learner, update
from worldenv.runtime.errors import UserError


def test_an_episode_is_the_same_in_any_row_and_company():
    policy = ToyPolicy()
    many = rollout(ToyEnv(3), policy, starts(8), seeds=seeds(8))
    lone = rollout(ToyEnv(1), policy, starts(8), seeds=seeds(8))
    for name in ("action", "episode", "step", "final_reward", "length", "terminated", "logprob"):
        assert torch.equal(getattr(many, name), getattr(lone, name)), name
    assert many.length.sum() == len(many.episode)
    assert many.length.max() <= 3
    assert (many.final_reward > 0).equal(many.terminated)
    parts = (slice(0, 3), slice(3, 8))
    joined = join([rollout(ToyEnv(2), policy, starts(8)[p], seeds=seeds(8)[p]) for p in parts])
    for name in ("action", "episode", "step", "final_reward", "instruction", "info"):
        got, want = getattr(joined, name), getattr(many, name)
        assert torch.equal(got, want) if torch.is_tensor(want) else got == want, name
    few = rollout(ToyEnv(5), policy, starts(2), seeds=seeds(2))
    assert torch.equal(few.action, many.action[many.episode < 2])


def test_stop_ends_a_row_and_callbacks_see_every_episode():
    ended, looked = [], []
    trajectories = rollout(
        ToyEnv(2),
        ToyPolicy(),
        starts(5, index=100),
        seeds=seeds(5),
        stop=lambda observation, info, live: info["steps"] >= 2,
        on_finish=lambda episode, info: ended.append((episode, int(info["steps"]))),
        on_step=lambda rows, before, action, after, info: looked.append((rows >= 0).sum()),
    )
    assert sorted(ended) == [(k, 2) for k in range(5)]
    assert sum(looked) == 10
    assert trajectories.length.tolist() == [2] * 5


class FilmedEnv(ToyEnv):
    """A ToyEnv with large pictures, that also films what happens within a chunk."""

    def observe(self):
        seen = super().observe()
        return seen | {"image": np.full((self.num_envs, 2, 128, 128, 3), 7, np.uint8)}

    def step(self, actions):
        *rest, info = super().step(actions)
        film = {"image": np.zeros((2, 2, 128, 128, 3), np.uint8)}
        return *rest, info | {"frames": [film] * self.num_envs}


def kept_bytes(thing) -> int:
    """Bytes of all arrays in a value."""
    if isinstance(thing, dict):
        return sum(map(kept_bytes, thing.values()))
    if isinstance(thing, list | tuple):
        return sum(map(kept_bytes, thing))
    return getattr(thing, "nbytes", 0)


@pytest.mark.parametrize("images", [True, False])
def test_rollouts_kept_every_picture_whoever_asked(images):
    filmed = []
    trajectories = rollout(
        FilmedEnv(2),
        ToyPolicy(),
        starts(4),
        seeds=seeds(4),
        on_finish=lambda episode, info: filmed.append(info["frames"]["image"].shape),
        images=images,
    )
    assert filmed == [(2, 2, 128, 128, 3)] * 4
    decisions = len(trajectories.step)
    pictures = decisions * 2 * 128 * 128 * 3 * images
    assert 0 <= kept_bytes(vars(trajectories)) - pictures < decisions * 1024
    joined = join([trajectories, trajectories])
    assert (joined.image is not None) == images
    assert len(joined.step) == 2 * decisions


def test_samples_have_the_laplace_scale():
    mu, log_scale = torch.zeros(4000, 1, 2), torch.full((4000, 1, 2), -1.0)
    x = sample_laplace(mu, log_scale, torch.arange(4000), torch.zeros(4000, dtype=torch.int64))
    assert x.abs().mean() == pytest.approx(np.exp(-1), rel=0.05)  # E|x - mu| = b
    assert abs(float(x.mean())) < 0.02


def test_a_push_moves_the_whole_chunk_alike_and_is_all_that_is_scored():
    noise, n = Laplace(push=0.1, translation=(0, 1, 2)), 4000
    mu, log_scale = torch.randn(n, 8, 7), torch.full((n, 8, 7), -3.0)
    drawn = noise.log_scale(log_scale)
    zeros = torch.zeros(n, dtype=torch.int64)
    action = noise.sample(mu, drawn, torch.arange(n), zeros)
    push = action - mu
    assert not push[..., 3:].any()
    torch.testing.assert_close(push[..., :3], push[:, :1, :3].expand(-1, 8, -1), atol=1e-6, rtol=0)
    assert push[:, 0, :3].abs().mean() == pytest.approx(0.1, rel=0.05)  # E|x| = b
    density = torch.distributions.Laplace(0.0, 0.1).log_prob(push[:, 0, :3]).sum(1, keepdim=True)
    torch.testing.assert_close(noise.logprob(mu, drawn, action), density, atol=1e-4, rtol=1e-4)


def test_a_push_of_what_nearly_succeeds_moves_only_chunks_that_close_the_gripper():
    noise = Laplace(push=0.1, translation=(0, 1), closing=(3, -1.0))
    mu = torch.zeros(4, 8, 4)
    mu[:, :, 3] = 1.0  # open
    mu[1, 4:, 3] = -1.0  # closes
    mu[2, :, 3] = -1.0  # is closed
    mu[3, :4, 3] = -1.0  # opens
    action = noise.sample(mu, noise.log_scale(mu), torch.arange(4), torch.zeros(4).long())
    moved = (action != mu).flatten(1).any(1)
    assert moved.tolist() == [False, True, False, False]
    assert torch.equal(action[..., 2:], mu[..., 2:])


def test_group_advantages():
    reward = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1])
    advantage, live = group_advantages(reward, 4, "loop")
    assert live.tolist() == [True] * 4 + [False] * 4
    assert not advantage[4:].any()
    assert advantage[0] / advantage[1] == pytest.approx(-3)  # 1 - 0 against 0 - 1/3
    advantage, _ = group_advantages(reward, 4, "grpo")
    assert float(advantage[:4].sum()) == pytest.approx(0, abs=1e-5)


def test_gae_carries_the_final_reward_back_and_never_bootstraps_a_failure():
    t = rollout(ToyEnv(2), ToyPolicy(), starts(6), seeds=seeds(6))
    reward = episode_rewards(t, "binary")
    value = torch.zeros(len(t.episode))
    _, target, _ = gae_advantages(t, reward, value, gamma=1.0, lam=1.0)
    assert torch.equal(target, reward[t.episode])
    _, target, _ = gae_advantages(t, torch.zeros(6), value + 0.5, gamma=1.0, lam=1.0)
    assert not target.any()


def test_the_group_is_the_baseline_of_the_whole_episode():
    """With lambda 1 the first decisions have LOOP's advantage, later ones R minus the critic's."""
    t = rollout(ToyEnv(4), ToyPolicy(), starts(12), seeds=seeds(12))
    reward, value = t.terminated.float(), torch.linspace(0, 1, len(t.episode))
    assert reward.view(-1, 4).std(1).max() > 0
    advantage, target, live = gae_advantages(t, reward, value, gamma=1.0, lam=1.0, group=4)
    mixed = [0 < row.sum() < 4 for row in reward.view(-1, 4)]
    assert live.tolist() == [mixed[e // 4] for e in t.episode.tolist()]
    others = (reward.view(-1, 4).sum(1, keepdim=True) - reward.view(-1, 4)).flatten() / 3
    raw = torch.where(t.step == 0, (reward - others)[t.episode], reward[t.episode] - value)
    torch.testing.assert_close(advantage, (raw - raw[live].mean()) / raw[live].std())
    torch.testing.assert_close(target, reward[t.episode])


def learner(**changes) -> Learner:
    torch.manual_seed(0)
    policy = ToyPolicy()
    changes = {"group": 4, "lr": 0.05, "max_mu_change": 10.0, "max_clip_fraction": 1.0, **changes}
    changes = {"push": 0.0, **changes}
    config = PosttrainConfig(scale=1.0, **changes)
    optimizer = torch.optim.AdamW(policy.parameters(), config.lr, weight_decay=0)
    return Learner(policy, optimizer, config, Laplace(config.scale, config.push, (0, 1)))


@pytest.mark.parametrize(("advantage", "push"), [("loop", 0.0), ("grpo", 0.0), ("loop", 0.4)])
def test_updates_raise_success_and_the_first_ratio_is_one(advantage, push):
    agent, rates = learner(advantage=advantage, push=push), []
    for step in range(15):
        own = seeds(32, step)
        episodes = rollout(ToyEnv(8), agent.policy, starts(32, 6), seeds=own, noise=agent.noise)
        metrics = update(agent, episodes, 0, step)
        rates.append(metrics["imagined_success"])
        if "first_ratio" in metrics:
            assert metrics["first_ratio"] == pytest.approx(1.0, abs=1e-6)
    assert np.mean(rates[-3:]) > np.mean(rates[:3]) + 0.2


def test_a_runaway_update_is_undone_and_the_rate_halved():
    agent = learner(lr=50.0, max_mu_change=0.1)
    episodes = rollout(ToyEnv(8), agent.policy, starts(32, 6), seeds=seeds(32))
    metrics = update(agent, episodes, 0, 0)
    assert metrics["undone"] == 1
    assert metrics["lr"] == 25.0
    assert not any(p.any() for p in agent.policy.parameters())


def test_groups_without_signal_change_nothing():
    agent = learner()
    episodes = rollout(ToyEnv(8), agent.policy, starts(16, 1000), seeds=seeds(16))
    metrics = update(agent, episodes, 0, 0)
    assert metrics["skipped"] == 1
    assert metrics["groups"] == 0
    assert not any(p.any() for p in agent.policy.parameters())


class Value(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)

    def forward(self, features):
        return self.net(features)[:, 0]


def with_critic(agent: Learner) -> Learner:
    agent.critic = Value()
    agent.critic_optimizer = torch.optim.Adam(agent.critic.parameters(), 0.05)
    return agent


def seen(agent: Learner, begin: list[Start], salt: int = 0) -> Trajectories:
    own = seeds(len(begin), salt)
    return rollout(ToyEnv(8), agent.policy, begin, seeds=own, features=agent.features)


@pytest.mark.parametrize("advantage", ["gae", "loop-gae"])
@pytest.mark.parametrize("limit", [1000, -1000])  # nothing succeeds, or everything at once
def test_equal_rewards_move_no_policy_by_the_critics_noise(advantage, limit):
    agent = with_critic(learner(advantage=advantage))
    episodes = seen(agent, starts(16, limit))
    assert episodes.terminated.float().std() == 0
    metrics = update(agent, episodes, 0, 0)
    assert metrics["skipped"] == 1
    assert not any(p.any() for p in agent.policy.parameters())


def test_no_step_is_made_by_the_few_decisions_that_are_left_over():
    whole = learner(minibatch=10_000)
    episodes = rollout(ToyEnv(8), whole.policy, starts(32, 6), seeds=seeds(32))
    decisions = int(update(whole, episodes, 0, 0)["steps"]) // 2  # a chunk has two
    agent, sizes = learner(minibatch=decisions - 1), [0]
    agent.policy.register_forward_hook(
        lambda _, given, said: sizes.append(sizes.pop() + len(given[0]["proprio"]))
    )
    agent.optimizer.register_step_post_hook(lambda *_: sizes.append(0))
    update(agent, episodes, 0, 0)
    assert sizes[:-1] == [-(-decisions // 2), decisions // 2]


def test_an_update_that_ends_in_nan_is_undone():
    agent = learner(lr=1e30, minibatch=8)
    episodes = rollout(ToyEnv(8), agent.policy, starts(32, 6), seeds=seeds(32))
    metrics = update(agent, episodes, 0, 0)
    assert metrics["undone"] == 1
    assert all(np.isfinite(v) for v in metrics.values())
    assert not any(p.any() for p in agent.policy.parameters())


@pytest.mark.parametrize("advantage", ["gae", "loop-gae"])
def test_gae_trains_policy_and_critic(advantage):
    agent = with_critic(learner(advantage=advantage))
    logged = []
    for step in range(15):
        logged.append(update(agent, seen(agent, starts(32, 6), step), 0, step))
    rates = [metrics["imagined_success"] for metrics in logged]
    assert np.mean(rates[-3:]) > np.mean(rates[:3]) + 0.2
    explained = [metrics["explained_variance"] for metrics in logged]
    assert max(explained[1:]) > explained[0]


def test_a_critic_makes_as_many_passes_as_it_is_told_to():
    agent, steps = with_critic(learner(advantage="gae", critic_epochs=3, minibatch=10_000)), []
    agent.critic_optimizer.register_step_post_hook(lambda *_: steps.append(1))
    update(agent, seen(agent, starts(32, 6)), 0, 0)
    assert len(steps) == 3


def test_a_nan_loss_names_the_step():
    agent = learner()
    episodes = rollout(ToyEnv(8), agent.policy, starts(32, 6), seeds=seeds(32))
    episodes.logprob[:] = float("nan")
    with pytest.raises(UserError, match=r"posttrain loss.*7|7.*posttrain loss"):
        update(agent, episodes, 0, 7)


def test_the_toy_is_a_vector_env():
    assert isinstance(ToyEnv(2), gymnasium.vector.VectorEnv)
