"""One policy update from imagined episodes, guarded: a runaway update is undone.

The guard compares clip fraction and the mean change of mu with their limits; beyond them, or where
anything is not finite, the policy before the update is restored and the learning rate halved (a
rate ten times too high was seen to destroy a policy in one iteration). An update needs memory for a
few times what is trained; of the rest of the policy there is one.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from worldenv.config import PosttrainConfig
from worldenv.ops.action_loss import METRICS
from worldenv.rl.loss import (
    episode_rewards,
    gae_advantages,
    group_advantages,
    has_signal,
    policy_loss,
)
from worldenv.rl.noise import Noise
from worldenv.rl.policy import trainable
from worldenv.rl.rollout import Trajectories
from worldenv.runtime import parallel, sharding
from worldenv.runtime.logging import check_finite
from worldenv.runtime.seeds import generator


@dataclass
class Learner:
    """A policy and what trains it.

    noise: how rollouts explore, and what updates score. reference: a frozen policy (see
    `rl.policy.twin`), where the KL has a weight. critic: from the policy's features, which rollouts
    then record, to values `[n]`.
    """

    policy: nn.Module
    optimizer: torch.optim.Optimizer
    config: PosttrainConfig
    noise: Noise
    reference: nn.Module | None = None
    critic: nn.Module | None = None
    critic_optimizer: torch.optim.Optimizer | None = None

    @property
    def features(self) -> bool:
        """Whether rollouts must record the policy's features."""
        return self.critic is not None


def update(learner: Learner, trajectories: Trajectories, seed: int, step: int) -> dict[str, float]:
    """Train on one iteration's episodes (G consecutive per context); returns what to log."""
    config, policy = learner.config, learner.policy
    reward = episode_rewards(trajectories, config.reward)
    if learner.critic is None:
        advantage, live = group_advantages(reward, config.group, config.advantage)
        advantage, keep = advantage[trajectories.episode], live[trajectories.episode]
        groups = int(live.sum()) // config.group
    else:
        advantage, keep, explained = _critic_update(learner, trajectories, reward, seed, step)
        groups = int(has_signal(reward, config.group).sum()) // config.group
    metrics = {
        "imagined_success": float(trajectories.terminated.float().mean()),
        "reward": float(reward.mean()),
        "groups": groups,
        "length": float(trajectories.length.float().mean()),
        "decisions": len(trajectories.episode),
    }
    if learner.critic is not None:
        metrics["explained_variance"] = explained
    rows = keep.nonzero()[:, 0]
    if not len(rows):
        return {**metrics, "skipped": 1, **_rates(learner.optimizer)}
    before = {name: p.detach().clone() for name, p in trainable(policy).items()}
    optimizer_before = copy.deepcopy(learner.optimizer.state_dict())
    logged = _descend(learner, trajectories, rows, advantage, seed, step)
    metrics |= {name: sum(x[name] for x in logged) / len(logged) for name in logged[0]}
    metrics["first_ratio"] = logged[0]["ratio_mean"]
    metrics["mu_change"] = _mu_change(learner, trajectories, rows[: config.minibatch])
    # Said so that a NaN is a runaway too: whatever it is compared with, it is not within limits.
    within = (
        math.isfinite(metrics["loss"] + metrics["grad_norm"])
        and metrics["clip_fraction"] <= config.max_clip_fraction
        and metrics["mu_change"] <= config.max_mu_change
    )
    if not within:
        with torch.no_grad():
            for name, parameter in trainable(policy).items():
                parameter.copy_(before[name])
        learner.optimizer.load_state_dict(optimizer_before)
        for group in learner.optimizer.param_groups:
            group["lr"] /= 2
        metrics = {k: v for k, v in metrics.items() if math.isfinite(v)}
    return {**metrics, "undone": int(not within), **_rates(learner.optimizer)}


def _descend(
    learner: Learner,
    trajectories: Trajectories,
    rows: Tensor,
    advantage: Tensor,
    seed: int,
    step: int,
) -> list[dict[str, float]]:
    """The optimiser's steps on decisions `rows`, and what to log of each. A loss or gradient that
    is not finite is the last and makes no step."""
    config, parameters = learner.config, list(trainable(learner.policy).values())
    logged: list[dict[str, float]] = []
    for epoch in range(config.epochs):
        order = torch.randperm(len(rows), generator=generator(seed, "minibatch", step, epoch))
        for part in _minibatches(rows[order.to(rows.device)], config.minibatch):

            def shard(own: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
                batch = _minibatch(learner, trajectories, own, advantage)
                loss, values, mu = policy_loss(learner.policy, batch, learner.noise, config)
                return loss, (values, _change(learner, trajectories, own, mu.detach()).mean())

            owns = _pieces(part, config.micro_batch)
            weights = [len(own) / len(part) for own in owns]
            losses = [partial(shard, own) for own in owns]
            loss, rest, norm = sharding.gradients(
                learner.policy, parameters, losses, weights, max_norm=1.0
            )
            numbers = _merged([values for values, _ in rest], weights)
            drift = sum(float(d) * w for (_, d), w in zip(rest, weights, strict=True))
            logged.append(
                {**numbers, "loss": float(loss), "grad_norm": float(norm), "drift": drift}
            )
            if not math.isfinite(logged[-1]["loss"] + logged[-1]["grad_norm"]):
                if len(logged) == 1:  # not of the steps made, so undoing them would not help
                    check_finite("posttrain loss", loss, step)
                return logged
            learner.optimizer.step()
    return logged


def _merged(parts: list[Tensor], weights: list[float]) -> dict[str, float]:
    """Metrics of `action_loss` of a minibatch from those of its shards."""
    table = torch.stack(parts)
    mean = (table * torch.tensor(weights, device=table.device)[:, None]).sum(0)
    numbers = dict(zip(METRICS, mean.tolist(), strict=True))
    numbers["ratio_max"] = float(table[:, METRICS.index("ratio_max")].max())
    numbers["steps"] = float(table[:, METRICS.index("steps")].sum())
    return numbers


def _minibatches(rows: Tensor, most: int) -> tuple[Tensor, ...]:
    """Rows in parts of at most `most`, as equal as can be: the optimiser makes a step of full size
    by each, and a rest of one decision would make it by chance."""
    return rows.tensor_split(math.ceil(len(rows) / most))


def _pieces(rows: Tensor, most: int = 0) -> list[Tensor]:
    """Rows of a minibatch by piece, of at most so many each (0: as many as a shard has)."""
    shares = parallel.shares(len(rows), parallel.shards(rows.device))
    return [piece for share in shares for piece in rows[share].split(most or len(rows))]


def _observation(trajectories: Trajectories, rows: Tensor) -> dict:
    return {
        "image": trajectories.image[rows],
        "proprio": trajectories.proprio[rows],
        "instruction": trajectories.instructions(rows),
    }


def _minibatch(
    learner: Learner, trajectories: Trajectories, rows: Tensor, advantage: Tensor
) -> dict:
    batch = {
        "observation": _observation(trajectories, rows),
        "action": trajectories.action[rows],
        "log_scale": None if trajectories.log_scale is None else trajectories.log_scale[rows],
        "logprob": trajectories.logprob[rows],
        "advantage": advantage[rows],
    }
    if learner.config.kl_weight:
        with torch.no_grad():
            batch["reference_mu"] = learner.reference(batch["observation"])[0]
    return batch


def _change(learner: Learner, trajectories: Trajectories, rows: Tensor, mu: Tensor) -> Tensor:
    """How far the policy has moved since the rollout: `[n, C, A]` of its means, or `[n, C]` of a
    token's log-probability, where logits would move for nothing."""
    if trajectories.mu is not None:
        return (mu - trajectories.mu[rows]).abs()
    logprob = learner.noise.logprob(mu, None, trajectories.action[rows])
    return (logprob - trajectories.logprob[rows]).abs() / mu.shape[2]


@torch.no_grad()
def _mu_change(learner: Learner, trajectories: Trajectories, rows: Tensor) -> float:
    def change(policy: nn.Module, own: Tensor) -> tuple[Tensor, int]:
        mu, _ = policy(_observation(trajectories, own))
        moved = _change(learner, trajectories, own, mu)
        return moved.sum(), moved.numel()

    with sharding.whole(learner.policy) as policy:
        pieces = [partial(change, policy, own) for own in _pieces(rows, learner.config.micro_batch)]
        totals, counts = zip(*parallel.spread(pieces, rows.device), strict=True)
    return float(sum(totals)) / sum(counts)


def _critic_update(
    learner: Learner, trajectories: Trajectories, reward: Tensor, seed: int, step: int
) -> tuple[Tensor, Tensor, float]:
    """Advantages by GAE, which carry signal, and how much of the outcomes the critic explained;
    then its regression on value targets."""
    config, critic = learner.config, learner.critic
    everything = torch.arange(len(trajectories.episode), device=reward.device)

    def value_of(rows: Tensor) -> Tensor:
        return critic(trajectories.features[rows])

    batches = everything.split(config.minibatch)
    with torch.no_grad():
        pieces = [partial(value_of, own) for batch in batches for own in _pieces(batch)]
        value = torch.cat(parallel.shared(pieces))
    outcome = reward[trajectories.episode]
    explained = float(1 - (outcome - value).var() / outcome.var().clamp_min(1e-6))
    group = config.group if config.advantage == "loop-gae" else 1
    advantage, target, live = gae_advantages(
        trajectories, reward, value, config.gamma, config.gae_lambda, group
    )

    def shard(own: Tensor) -> tuple[Tensor, None]:
        return (value_of(own) - target[own]).square().mean(), None

    parameters = [p for p in critic.parameters() if p.requires_grad]
    for epoch in range(config.critic_epochs):
        order = torch.randperm(len(everything), generator=generator(seed, "critic", step, epoch))
        for part in _minibatches(everything[order.to(everything.device)], config.minibatch):
            owns = _pieces(part)
            losses = [partial(shard, own) for own in owns]
            weights = [len(own) / len(part) for own in owns]
            loss, _, norm = parallel.gradients(parameters, losses, weights)
            check_finite("critic loss", loss, step)
            check_finite("critic gradient", norm, step)
            learner.critic_optimizer.step()
    return advantage, live, explained


def _rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    first, *others = (group["lr"] for group in optimizer.param_groups)
    return {"lr": first} | {f"lr_{k}": rate for k, rate in enumerate(others, 1)}
