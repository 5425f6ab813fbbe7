"""One policy update from imagined episodes, guarded: a runaway update is undone.

The guard compares clip fraction and the mean change of mu with their limits; beyond them the
policy before the update is restored and the learning rate halved (a rate ten times too high was
seen to destroy a policy in one iteration).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from worldenv.config import PosttrainConfig
from worldenv.ops.action_loss import METRICS
from worldenv.rl.loss import episode_rewards, gae_advantages, group_advantages, policy_loss
from worldenv.rl.noise import Noise
from worldenv.rl.rollout import Trajectories
from worldenv.runtime.logging import check_finite
from worldenv.runtime.seeds import generator


@dataclass
class Learner:
    """A policy, the frozen reference it started from, and what trains it."""

    policy: nn.Module
    reference: nn.Module
    optimizer: torch.optim.Optimizer
    config: PosttrainConfig
    critic: nn.Module | None = None
    critic_optimizer: torch.optim.Optimizer | None = None

    @property
    def noise(self) -> Noise:
        """How rollouts explore, and what updates score."""
        return Noise(self.config.scale, self.config.push)


def update(learner: Learner, trajectories: Trajectories, seed: int, step: int) -> dict[str, float]:
    """Train on one iteration's episodes (G consecutive per context); returns what to log."""
    config, policy = learner.config, learner.policy
    reward = episode_rewards(trajectories, config.reward)
    if learner.critic is None:
        advantage, live = group_advantages(reward, config.group, config.advantage)
        advantage, keep = advantage[trajectories.episode], live[trajectories.episode]
        groups = int(live.sum()) // config.group
    else:
        advantage, keep = _critic_update(learner, trajectories, reward, seed, step)
        groups = len(reward) // config.group
    metrics = {
        "imagined_success": float(trajectories.terminated.float().mean()),
        "reward": float(reward.mean()),
        "groups": groups,
        "length": float(trajectories.length.float().mean()),
        "decisions": len(trajectories.episode),
    }
    rows = keep.nonzero()[:, 0]
    if not len(rows):
        return {**metrics, "skipped": 1, "lr": _lr(learner.optimizer)}
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    optimizer_before = copy.deepcopy(learner.optimizer.state_dict())
    logged: list[Tensor] = []
    for epoch in range(config.epochs):
        order = torch.randperm(len(rows), generator=generator(seed, "minibatch", step, epoch))
        for part in rows[order.to(rows.device)].split(config.minibatch):
            batch = _minibatch(learner, trajectories, part, advantage)
            loss, values, mu = policy_loss(policy, batch, learner.noise, config)
            check_finite("posttrain loss", loss, step)
            learner.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            learner.optimizer.step()
            change = (mu.detach() - trajectories.mu[part]).abs().mean()
            logged.append(torch.cat((values, torch.stack((loss.detach(), norm, change)))))
    names = (*METRICS, "loss", "grad_norm", "drift")
    metrics |= dict(zip(names, torch.stack(logged).mean(0).tolist(), strict=True))
    metrics["first_ratio"] = float(logged[0][names.index("ratio_mean")])
    metrics["mu_change"] = _mu_change(learner, trajectories, rows[: config.minibatch])
    runaway = (
        metrics["clip_fraction"] > config.max_clip_fraction
        or metrics["mu_change"] > config.max_mu_change
    )
    if runaway:
        policy.load_state_dict(before)
        learner.optimizer.load_state_dict(optimizer_before)
        for group in learner.optimizer.param_groups:
            group["lr"] /= 2
    return {**metrics, "undone": int(runaway), "lr": _lr(learner.optimizer)}


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
        "log_scale": trajectories.log_scale[rows],
        "logprob": trajectories.logprob[rows],
        "advantage": advantage[rows],
    }
    if learner.config.kl_weight:
        with torch.no_grad():
            batch["reference_mu"] = learner.reference(batch["observation"])[0]
    return batch


@torch.no_grad()
def _mu_change(learner: Learner, trajectories: Trajectories, rows: Tensor) -> float:
    mu, _ = learner.policy(_observation(trajectories, rows))
    return float((mu - trajectories.mu[rows]).abs().mean())


def _critic_update(
    learner: Learner, trajectories: Trajectories, reward: Tensor, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Advantages by GAE, then one pass of regression on the value targets."""
    config = learner.config
    everything = torch.arange(len(trajectories.episode), device=reward.device)

    def per_part(fn: Callable[[Tensor], Tensor], rows: Tensor) -> list[Tensor]:
        return [fn(part) for part in rows.split(config.minibatch)]

    with torch.no_grad():
        value = torch.cat(
            per_part(lambda r: learner.critic(_observation(trajectories, r)), everything)
        )
    group = config.group if config.advantage == "loop-gae" else 1
    advantage, target = gae_advantages(
        trajectories, reward, value, config.gamma, config.gae_lambda, group
    )

    def fit(part: Tensor) -> Tensor:
        loss = (learner.critic(_observation(trajectories, part)) - target[part]).square().mean()
        learner.critic_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        learner.critic_optimizer.step()
        return loss.detach()

    order = torch.randperm(len(everything), generator=generator(seed, "critic", step))
    per_part(fit, everything[order.to(everything.device)])
    return advantage, torch.ones_like(trajectories.episode, dtype=torch.bool)


def _lr(optimizer: torch.optim.Optimizer) -> float:
    return optimizer.param_groups[0]["lr"]
