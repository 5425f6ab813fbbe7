"""Policies whose actions are tokens: drawn, executed, scored, trained and imitated."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from toy_world import ToyEnv, ToyPolicy, seeds, starts

from worldenv.config import CollectConfig, Config, PolicyConfig, PosttrainConfig
from worldenv.models.policy import ValueHead
from worldenv.rl.loss import imitation_loss, policy_loss
from worldenv.rl.noise import Laplace, Tokens, exploration
from worldenv.rl.policy import twin
from worldenv.rl.rollout import join, rollout
from worldenv.rl.update import Learner, update
from worldenv.runtime.errors import UserError

K = 5
BEST = K - 1  # the token whose command exceeds 0.6


class TokenPolicy(nn.Module):
    """Two actions of two dimensions, each one of K evenly spaced numbers from -1 to 1."""

    distribution, feature_width = "categorical", 3

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.net = nn.Linear(2, 4 * K)
        nn.init.zeros_(self.net.weight)
        nn.init.zeros_(self.net.bias)

    def forward(self, observation):
        self.calls += 1
        return self.net(observation["proprio"]).view(-1, 2, 2, K), None

    def both(self, observation):
        proprio = observation["proprio"]
        return *self(observation), torch.cat([proprio, proprio.sum(1, keepdim=True)], 1)

    def command(self, action):
        return action.float() * 2 / (K - 1) - 1


def learner(**changes) -> Learner:
    torch.manual_seed(0)
    policy = TokenPolicy()
    changes = {"group": 4, "lr": 0.05, "max_mu_change": 10.0, "max_clip_fraction": 1.0, **changes}
    config = PosttrainConfig(**{"push": 0.0, "advantage": "loop", **changes})
    optimizer = torch.optim.AdamW(policy.parameters(), config.lr, weight_decay=0)
    return Learner(policy, optimizer, config, exploration("categorical", config, ()))


def test_tokens_are_recorded_and_their_commands_executed():
    policy, executed, given = TokenPolicy(), [], []

    class Watched(ToyEnv):
        def step(self, actions):
            executed.append(actions)
            return super().step(actions)

    def note(rows, before, action, after, info):
        given.append(action.numpy())

    t = rollout(Watched(2), policy, starts(4, 6), seeds=seeds(4), on_step=note)
    assert t.action.dtype == torch.int64
    assert t.action.shape[1:] == (2, 2)
    assert (t.mu, t.log_scale) == (None, None)
    assert all(map(np.array_equal, executed, given))
    assert set(np.unique(executed)) <= {-1.0, -0.5, 0.0, 0.5, 1.0}
    won = policy.command(t.action)[:, 0, 0] > 0.6
    assert torch.equal(won, t.reward > 0)
    torch.testing.assert_close(t.logprob, torch.full_like(t.logprob, -2 * np.log(K)))
    assert join([t, t]).mu is None


def test_tokens_depend_on_seed_and_step_alone():
    torch.manual_seed(0)
    policy = TokenPolicy()
    nn.init.normal_(policy.net.weight)
    many = rollout(ToyEnv(3), policy, starts(8, 20), seeds=seeds(8))
    lone = rollout(ToyEnv(1), policy, starts(8, 20), seeds=seeds(8))
    assert torch.equal(many.action, lone.action)
    other = rollout(ToyEnv(3), policy, starts(8, 20), seeds=seeds(8, 1))
    assert not torch.equal(many.action, other.action)
    greedy = rollout(ToyEnv(3), policy, starts(8, 20), seeds=seeds(8), noise=None)
    view = {"proprio": greedy.proprio}
    assert torch.equal(greedy.action, policy(view)[0].argmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_their_probability_says(temperature):
    n, noise = 40_000, Tokens(temperature)
    logits = torch.tensor([0.0, 1.0, -2.0, 0.5]).expand(n, 1, 1, 4)
    drawn = noise.sample(logits, None, torch.arange(n), torch.zeros(n, dtype=torch.int64))
    share = torch.bincount(drawn.flatten(), minlength=4) / n
    p = (logits[0, 0, 0] / temperature).softmax(-1)
    deviation = (p * (1 - p) / n).sqrt()
    assert ((share - p).abs() < 4 * deviation).all()
    torch.testing.assert_close(noise.logprob(logits, None, drawn)[:, 0], p.log()[drawn[:, 0, 0]])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"advantage": "grpo", "temperature": 1.5, "micro_batch": 5},
        {"kl_weight": 0.01, "entropy_weight": 0.001},
        {"advantage": "loop-gae"},
    ],
    ids=["loop", "grpo", "kl", "value head"],
)
def test_the_probability_of_a_rewarded_token_rises(changes):
    agent = learner(**changes)
    if agent.config.kl_weight:
        agent.reference = twin(agent.policy, agent.policy.state_dict())
    if agent.config.critic:
        agent.critic = ValueHead(TokenPolicy.feature_width)
        agent.critic_optimizer = torch.optim.Adam(agent.critic.parameters(), 0.05)

    def probability() -> torch.Tensor:
        seen = {"proprio": torch.tensor([[0.6, 0.0]])}
        return agent.policy(seen)[0].softmax(-1)[0, 0, 0, BEST].item()

    before = probability()
    for step in range(15):
        episodes = rollout(
            ToyEnv(8),
            agent.policy,
            starts(32, 6),
            seeds=seeds(32, step),
            noise=agent.noise,
            features=agent.features,
        )
        metrics = update(agent, episodes, 0, step)
        if "first_ratio" in metrics:
            assert metrics["first_ratio"] == pytest.approx(1.0, abs=1e-6)
            assert 0 < metrics["mu_change"] < 0.5
    assert probability() > before + 0.3


def test_a_value_head_costs_no_forward_pass():
    agent = learner(advantage="loop-gae", minibatch=10_000)
    agent.critic = ValueHead(TokenPolicy.feature_width)
    agent.critic_optimizer = torch.optim.Adam(agent.critic.parameters(), 0.05)
    episodes = rollout(
        ToyEnv(8), agent.policy, starts(32, 6), seeds=seeds(32), noise=agent.noise, features=True
    )
    assert torch.equal(episodes.features[:, :2], episodes.proprio)
    assert join([episodes, episodes]).features.shape == (2 * len(episodes.step), 3)
    agent.policy.calls = 0
    before = agent.critic.net[-1].bias.item()
    assert "skipped" not in update(agent, episodes, 0, 0)
    assert agent.critic.net[-1].bias.item() != before
    assert agent.policy.calls == 2 * 4  # by shard: one gradient, one look at what it changed


def test_gradients_are_those_of_autograd_through_the_formula():
    torch.manual_seed(1)
    n, noise = 12, Tokens(1.3)
    config = learner(kl_weight=0.3, entropy_weight=0.2, clip_low=0.1, clip_high=0.3).config
    policy, reference = TokenPolicy(), TokenPolicy()
    for module in (policy, reference):
        nn.init.normal_(module.net.weight)
    view = {"proprio": torch.randn(n, 2)}
    action = torch.randint(K, (n, 2, 2))
    with torch.no_grad():
        old = noise.logprob(policy(view)[0], None, action) + 0.3 * torch.randn(n, 2)
        asked = reference(view)[0]
    advantage = torch.randn(n)
    batch = {
        "observation": view,
        "action": action,
        "log_scale": None,
        "logprob": old,
        "advantage": advantage,
        "reference_mu": asked,
    }
    loss, _, _ = policy_loss(policy, batch, noise, config)
    got = torch.autograd.grad(loss, list(policy.parameters()))

    logp, logq = (policy(view)[0] / 1.3).log_softmax(-1), (asked / 1.3).log_softmax(-1)
    ratio = (logp.gather(-1, action[..., None]).squeeze(-1).sum(-1) - old).exp()
    a = advantage[:, None]
    surrogate = torch.minimum(ratio * a, ratio.clamp(0.9, 1.3) * a).mean()
    kl = (logp.exp() * (logp - logq)).sum((-1, -2)).mean()
    entropy = -(logp.exp() * logp).sum((-1, -2)).mean()
    expected = -surrogate + 0.3 * kl - 0.2 * entropy
    torch.testing.assert_close(loss, expected)
    for mine, theirs in zip(
        got, torch.autograd.grad(expected, list(policy.parameters())), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_imitation_of_tokens_is_their_cross_entropy():
    torch.manual_seed(0)
    logits, target = torch.randn(3, 2, 4, K, requires_grad=True), torch.randint(K, (3, 2, 4))
    loss, logged = imitation_loss(logits, None, target, 0.05)
    expected = nn.functional.cross_entropy(logits.flatten(0, 2), target.flatten())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits)
    )
    assert logged["accuracy"] == (logits.argmax(-1) == target).float().mean()


def test_noise_of_another_distribution_is_refused():
    for policy, noise in ((TokenPolicy(), Laplace()), (ToyPolicy(), Tokens())):
        with pytest.raises(ValueError, match=r"rollout: expected noise for a \w+ policy"):
            rollout(ToyEnv(1), policy, starts(1), seeds=seeds(1), noise=noise)


def test_tokens_cannot_be_pushed(monkeypatch):
    with pytest.raises(UserError, match=r"CollectConfig\.push: expected 0 .* got 0\.053"):
        exploration("categorical", CollectConfig(), (0, 1, 2))
    config = Config()
    monkeypatch.setattr(PolicyConfig, "distribution", "categorical")
    with pytest.raises(UserError, match=r"collect\.push.*tokens"):
        replace(config, seed=1)
    half = replace(config.collect, push=0.0)
    with pytest.raises(UserError, match=r"posttrain\.push.*tokens"):
        replace(config, collect=half)
    rl = replace(config.posttrain, push=0.0)
    assert replace(config, collect=half, posttrain=rl).policy.distribution == "categorical"
