"""One rollout for both worlds: `rollout(env, policy, starts)` knows a VectorEnv and a policy only.

Rows are refilled as they finish, so a batch stays full while episodes are left. An episode's
action noise depends on its own seed alone, not on the row or the company it runs in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from worldenv.rl.noise import OWN, Noise
from worldenv.runtime import parallel

Actor = Callable[[Mapping[str, Any]], tuple[Tensor, Tensor | None]]
"""A `rl.policy.Policy`; or any function, which is taken for a Laplace policy whose units are the
environment's."""
Stop = Callable[[Mapping[str, Any], Mapping[str, Any], np.ndarray], np.ndarray]


@dataclass
class Trajectories:
    """M episodes as N flat decisions, in order of time; everything on one device."""

    image: Tensor | None  # [N, V, H, W, 3] uint8, what the policy saw; None if not asked for
    proprio: Tensor  # [N, P]
    action: Tensor  # [N, C, A] as it was drawn, in the policy's units or as token ids
    mu: Tensor | None  # [N, C, A]; None of tokens, whose logits nobody needs again
    log_scale: Tensor | None  # [N, C, A] of the noise, [N, 1, n] if it pushes whole chunks
    logprob: Tensor  # [N, C] of the action under it, [N, 1]
    episode: Tensor  # [N] int64, row of the per-episode fields
    step: Tensor  # [N] int64, chunk within the episode
    reward: Tensor  # [N] after the decision
    instruction: list[str]  # [M]
    final_reward: Tensor  # [M] reward of the last step
    length: Tensor  # [M] int64, decisions
    terminated: Tensor  # [M] bool
    info: list[dict[str, Any]] = field(default_factory=list)  # [M] env's info at the end
    features: Tensor | None = None  # [N, E] of the policy, if they were asked for

    def instructions(self, rows: Tensor) -> list[str]:
        """Instruction of each decision in rows `[n]`."""
        return [self.instruction[e] for e in self.episode[rows].tolist()]

    def to(self, device: torch.device) -> "Trajectories":
        """The same with its tensors on a device."""
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


def rollout(
    env: VectorEnv,
    policy: Actor,
    starts: Sequence[Any],
    *,
    seeds: Sequence[int],
    noise: Noise | Literal["own"] | None = "own",
    stop: Stop | None = None,
    on_finish: Callable[[int, dict[str, Any]], None] | None = None,
    on_step: Callable[[np.ndarray, Mapping, Tensor, Mapping, Mapping], None] | None = None,
    images: bool = True,
    features: bool = False,
) -> Trajectories:
    """Run one episode from each of `starts` (any number) in the env's B rows.

    seeds: of the episodes' action noise, one per start (see `runtime.seeds.derive`).
    policy: actions are drawn as `noise` says (by default from its own distribution), or without
    noise are the likeliest; the environment gets what it makes of them (`Policy.command`).
    stop(observation, info, rows) may end further rows. on_finish(episode, info) and on_step(episode
    of each row or -1, observation before, action that the environment got, observation after, info)
    are called as things happen. images: whether to keep what the policy saw, which an update needs
    and outcomes do not (a decision at 128 px has 98 KB). features: whether to keep the policy's.
    Decisions come back sorted by episode, then time.
    """
    how = _how(policy, noise)
    command = getattr(policy, "command", None)
    recorder = _Recorder(len(starts), images)
    noise_seeds = torch.tensor(seeds, dtype=torch.int64)
    rows = np.full(env.num_envs, -1)  # episode of each row
    rows[: len(starts)] = np.arange(min(len(starts), env.num_envs))
    waiting = int(rows.max()) + 1
    first = [starts[max(e, 0)] for e in rows]
    observation, info = env.reset(options={"starts": first})
    count = np.zeros(env.num_envs, np.int64)
    while (rows >= 0).any():
        view = _as_tensors(observation)
        own = noise_seeds[np.maximum(rows, 0)]
        draw = None if noise is None else (own, torch.as_tensor(count))
        decision = _decide(policy, view, how, draw, features)
        action = decision["action"]
        executed = action if command is None else command(action)
        given = executed if isinstance(observation["image"], Tensor) else executed.cpu().numpy()
        after, reward, terminated, truncated, info = env.step(given)
        live = rows >= 0
        reward, terminated, truncated = (
            torch.as_tensor(x).to(action.device) for x in (reward, terminated, truncated)
        )
        recorder.add(rows, count, view, decision, reward)
        if on_step is not None:
            on_step(rows, view, executed, _as_tensors(after), info)
        ended = (terminated | truncated).cpu().numpy()
        done = ended.copy()
        if stop is not None:
            done |= stop(_as_tensors(after), info, live)
        count += 1
        refill = np.zeros(env.num_envs, bool)
        begin: list[Any] = [None] * env.num_envs
        for row in np.flatnonzero(live & done):
            last = {k: v[row] for k, v in info.items()}
            recorder.finish(rows[row], view["instruction"][row], terminated[row], reward[row], last)
            if on_finish is not None:
                on_finish(int(rows[row]), last)
            rows[row] = -1
            if waiting < len(starts):
                rows[row], refill[row], begin[row], count[row] = waiting, True, starts[waiting], 0
                waiting += 1
        observation = after
        if refill.any():
            observation, info = env.reset(options={"reset_mask": refill, "starts": begin})
    return recorder.result()


def rollout_shards(
    envs: Sequence[VectorEnv],
    policy: Actor,
    starts: Sequence[Any],
    *,
    seeds: Sequence[int],
    noise: Noise | Literal["own"] | None = "own",
    images: bool = True,
    features: bool = False,
) -> Trajectories:
    """`rollout` in several environments at once, each with a consecutive share of the episodes."""

    def piece(env: VectorEnv, share: slice) -> Trajectories:
        return rollout(
            env,
            policy,
            starts[share],
            seeds=seeds[share],
            noise=noise,
            images=images,
            features=features,
        )

    shares = parallel.shares(len(starts), len(envs))
    pieces = [partial(piece, *pair) for pair in zip(envs, shares, strict=False)]
    return join(parallel.shared(pieces))


def join(parts: Sequence[Trajectories]) -> Trajectories:
    """The episodes of several rollouts, in order, as if of one."""
    flat = ("proprio", "action", "logprob", "step", "reward")
    optional = ("image", "mu", "log_scale", "features")
    given = [name for name in optional if getattr(parts[0], name) is not None]
    whole = dict.fromkeys(optional) | {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in (*flat, "final_reward", "length", "terminated", *given)
    }
    before = np.cumsum([0, *(len(part.length) for part in parts)])
    episode = torch.cat([p.episode + int(n) for p, n in zip(parts, before, strict=False)])
    return Trajectories(
        **whole,
        episode=episode,
        instruction=[word for part in parts for word in part.instruction],
        info=[info for part in parts for info in part.info],
    )


def _how(policy: Actor, noise: Noise | Literal["own"] | None) -> Noise:
    """What draws and scores a policy's actions."""
    distribution = getattr(policy, "distribution", "laplace")
    how = OWN[distribution] if noise in ("own", None) else noise
    if how.distribution != distribution:
        raise ValueError(
            f"rollout: expected noise for a {distribution} policy, got {how} ({how.distribution})"
        )
    return how


@torch.no_grad()
def _decide(
    policy: Actor,
    view: Mapping[str, Any],
    how: Noise,
    draw: tuple[Tensor, Tensor] | None,
    features: bool,
) -> dict[str, Tensor | None]:
    """What is recorded of a decision; draw: seeds and steps `[B]` of its noise, if there is any."""
    mu, log_scale, seen = policy.both(view) if features else (*policy(view), None)
    log_scale = how.log_scale(log_scale)
    if draw is None:
        action = how.greedy(mu)
    else:
        action = how.sample(mu, log_scale, *(x.to(mu.device) for x in draw))
    return {
        "action": action,
        "mu": None if how.distribution == "categorical" else mu,
        "log_scale": log_scale,
        "logprob": how.logprob(mu, log_scale, action),
        "features": seen,
    }


def _as_tensors(observation: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: torch.as_tensor(value) if key != "instruction" else value
        for key, value in observation.items()
    }


class _Recorder:
    """Collects live rows step by step; sorts them by episode at the end."""

    def __init__(self, episodes: int, images: bool) -> None:
        self.images = images
        self.steps: list[dict[str, Tensor]] = []
        self.ends: list[dict[str, Any]] = [{} for _ in range(episodes)]

    def add(
        self,
        rows: np.ndarray,
        count: np.ndarray,
        view: Mapping[str, Any],
        decision: Mapping[str, Tensor | None],
        reward: Tensor,
    ) -> None:
        index = np.flatnonzero(rows >= 0)
        device = reward.device
        at = torch.as_tensor(index).to(device)
        values = {"proprio": view["proprio"], **decision, "reward": reward.float()}
        if self.images:
            values["image"] = view["image"]
        step = {name: x.to(device)[at] for name, x in values.items() if x is not None}
        step["episode"] = torch.as_tensor(rows[index]).to(device)
        step["step"] = torch.as_tensor(count[index]).to(device)
        self.steps.append(step)

    def finish(
        self, episode: int, instruction: str, terminated: Tensor, reward: Tensor, info: dict
    ) -> None:
        self.ends[episode] = {
            "instruction": instruction,
            "terminated": terminated,
            "reward": reward.float(),
            # Frames that were recorded on the way are on_finish's alone.
            "info": {k: v for k, v in info.items() if not isinstance(v, Mapping)},
        }

    def result(self) -> Trajectories:
        flat = {name: torch.cat([s[name] for s in self.steps]) for name in self.steps[0]}
        order = torch.argsort(flat["episode"], stable=True)
        flat = {name: value[order] for name, value in flat.items()}
        flat = dict.fromkeys(("image", "mu", "log_scale")) | flat
        return Trajectories(
            **flat,
            instruction=[e["instruction"] for e in self.ends],
            final_reward=torch.stack([e["reward"] for e in self.ends]),
            length=torch.bincount(flat["episode"], minlength=len(self.ends)),
            terminated=torch.stack([e["terminated"] for e in self.ends]),
            info=[e["info"] for e in self.ends],
        )
