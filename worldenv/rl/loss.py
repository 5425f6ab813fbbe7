"""The objectives: of post-training (advantages of whole episodes, the clipped loss of a minibatch),
and of imitation.

LOOP (World-Env section 3.5): A_n = R_n - mean of the other rollouts of the context, the same for
all steps of episode n; ratio per chunk step over the action's dimensions (of a push: per chunk).
GRPO normalises by the group's deviation. GAE lets a learned critic say which steps earned the
reward; with the others' mean as the value of the context (loop-gae) the group stays the baseline of
the whole episode.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from worldenv.config import PosttrainConfig
from worldenv.ops import action_logprob, action_loss, gae, group_normalized, leave_one_out
from worldenv.rl.noise import Noise
from worldenv.rl.rollout import Trajectories


def episode_rewards(trajectories: Trajectories, kind: str) -> Tensor:
    """Reward `[M]`: R at the end, or 1 where the reflector ended the episode as a success."""
    if kind == "continuous":
        return trajectories.final_reward
    return trajectories.terminated.float()


def group_advantages(reward: Tensor, group: int, kind: str) -> tuple[Tensor, Tensor]:
    """Advantages `[M]` of G consecutive rollouts per context, and which groups carry signal `[M]`.

    Advantages are divided by their standard deviation over the groups with signal, so the
    learning rate means the same at any success rate.
    """
    op = leave_one_out if kind == "loop" else group_normalized
    advantage = op(reward, group)
    live = has_signal(reward, group)
    if kind == "loop" and live.any():
        advantage = advantage / (advantage[live].std() + 1e-6)
    return advantage, live


def gae_advantages(
    trajectories: Trajectories,
    reward: Tensor,
    value: Tensor,
    gamma: float,
    lam: float,
    group: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-decision advantages, value targets and which decisions carry signal, `[N]`; the reward
    arrives at the last decision.

    value `[N]`: the critic's estimates. In groups of more than one, the first decision's is
    replaced by the mean reward of the group's other episodes (with lam 1 its advantage is LOOP's).
    Running out of time is failing the task, so the last step of a truncated episode is terminal
    too: bootstrapping there would hide the failure. Where all rewards of a group (without groups:
    of all episodes) are equal, advantages are the critic's noise and nothing else; they are left
    out, for divided by their own deviation they would make a step of full size.
    """
    count, horizon = len(reward), int(trajectories.length.max())
    e, t = trajectories.episode, trajectories.step
    shape, device = (horizon, count), value.device
    rewards, values = torch.zeros(shape, device=device), torch.zeros(horizon + 1, count)
    values = values.to(device)
    values[t, e] = value
    if group > 1:
        values[0] = reward - leave_one_out(reward, group)
    last = trajectories.length - 1
    episodes = torch.arange(count, device=device)
    rewards[last, episodes] = reward
    terminated = torch.zeros(shape, dtype=torch.bool, device=device)
    terminated[last, episodes] = True
    never = torch.zeros_like(terminated)
    advantage, target = gae(rewards, values, terminated, never, gamma=gamma, lam=lam)
    advantage, target = advantage[t, e], target[t, e]
    live = has_signal(reward, group if group > 1 else count)[e]
    if live.any():
        advantage = (advantage - advantage[live].mean()) / (advantage[live].std() + 1e-6)
    return advantage, target, live


def has_signal(reward: Tensor, group: int) -> Tensor:
    """Whether the rewards `[M]` of an episode's group of consecutive ones differ, `[M]` bool."""
    low, high = reward.view(-1, group).aminmax(dim=1)
    return (high - low > 1e-3).repeat_interleave(group)


def policy_loss(
    policy: torch.nn.Module, batch: Mapping[str, Any], noise: Noise, config: PosttrainConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Clipped loss of a minibatch of decisions: (loss, metrics of `action_loss`, mu).

    Scored as it was drawn: by the same noise, with the same scale b, which is not trained here, or
    the same temperature.
    """
    mu, _ = policy(batch["observation"])
    loss, metrics = action_loss(
        noise.centre(mu),
        batch["log_scale"],
        noise.drawn(batch["action"]),
        batch["logprob"],
        batch["advantage"],
        torch.ones_like(batch["logprob"]),
        distribution=noise.distribution,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        reference_mu=noise.centre(batch["reference_mu"]) if config.kl_weight else None,
        kl_weight=config.kl_weight,
        entropy_weight=config.entropy_weight,
    )
    return loss, metrics, mu


def imitation_loss(
    mu: Tensor, log_scale: Tensor | None, target: Tensor, scale_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of imitating `target` `[B, C, A]`, as `Policy.normalise` gives it, and what to log.

    Continuous: L1, and the Laplace likelihood of the scale about detached means, so that the spread
    never trades against accuracy. Tokens: cross-entropy.
    """
    if log_scale is None:
        loss = -action_logprob(mu, None, target, distribution="categorical").mean()
        loss = loss / target.shape[-1]
        right = (mu.argmax(-1) == target).float().mean()
        return loss, {"loss": loss.detach(), "accuracy": right}
    l1 = (mu - target).abs().mean()
    likelihood = action_logprob(mu.detach(), log_scale, target).mean()
    likelihood = likelihood / mu.shape[-1]
    loss = l1 - scale_weight * likelihood
    return loss, {
        "loss": loss.detach(),
        "l1": l1.detach(),
        "scale": log_scale.detach().exp().mean(),
    }
