"""How exploring policies act: drawn and scored by the same distribution.

Of continuous actions there are two kinds. Every action by itself, Laplace with the policy's own
scale (World-Env section 3.5). Or one push for all of a chunk: the noise of single actions averages
out within a chunk, and most of it is in dimensions on which little depends, so that what it teaches
drowns in what it disturbs. A push moves the hand by some millimetres, which is what decides a
grasp, and is all that is scored. Tokens are drawn from the policy's own logits at a temperature.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from worldenv.config import CollectConfig, PosttrainConfig
from worldenv.ops import action_logprob
from worldenv.runtime.errors import UserError
from worldenv.runtime.seeds import counter_uniform


@dataclass(frozen=True)
class Laplace:
    """Laplace noise about a policy's mean.

    scale: multiple of the policy's Laplace scale, for every action by itself. push: if not 0, the
    Laplace scale of a translation added to all actions of a chunk instead, in the policy's units.
    translation: the dimensions of an action that move the hand, which a push needs to know.
    closing: the gripper's dimension and the sign that closes it: only chunks that close it are
    pushed (to explore what nearly succeeds; such noise is not scored).
    """

    scale: float = 1.0
    push: float = 0.0
    translation: tuple[int, ...] = ()
    closing: tuple[int, float] | None = None
    distribution: ClassVar[str] = "laplace"

    def __post_init__(self) -> None:
        if self.push and not self.translation:
            raise ValueError("a push needs the dimensions that it moves, got none")

    def log_scale(self, log_scale: Tensor) -> Tensor:
        """Of what is drawn: `[B, C, A]`, or with a push one for each dimension that it moves,
        `[B, 1, n]`; log_scale: the policy's."""
        if self.push:
            shape = len(log_scale), 1, len(self.translation)
            return log_scale.new_full(shape, math.log(self.push))
        return log_scale + math.log(self.scale)

    def drawn(self, action: Tensor) -> Tensor:
        """What of an action `[B, C, A]` the noise has moved: all of it, or with a push the chunk's
        mean translation `[B, 1, n]`."""
        return action[..., self.translation].mean(1, keepdim=True) if self.push else action

    centre = drawn  # about which it is drawn, of mu

    def greedy(self, mu: Tensor) -> Tensor:
        """Actions without noise."""
        return mu

    def sample(self, mu: Tensor, log_scale: Tensor, seeds: Tensor, step: Tensor) -> Tensor:
        """Actions `[B, C, A]` about mu `[B, C, A]`; log_scale as `log_scale` returns it; seeds and
        step `[B]` int64 determine each row's noise."""
        if not self.push:
            return sample_laplace(mu, log_scale, seeds, step)
        action = mu.clone()
        push = sample_laplace(torch.zeros_like(log_scale), log_scale, seeds, step)
        if self.closing is not None:
            grip, closes = self.closing
            shut = mu[..., grip] * closes > 0
            push = push * (shut[:, -1] & ~shut[:, 0])[:, None, None]
        action[..., self.translation] += push
        return action

    def logprob(self, mu: Tensor, log_scale: Tensor, action: Tensor) -> Tensor:
        """Of action `[B, C, A]`, per chunk step `[B, C]`, or of the push `[B, 1]`."""
        return action_logprob(self.centre(mu), log_scale, self.drawn(action))


@dataclass(frozen=True)
class Tokens:
    """Tokens drawn from a policy's logits over a temperature, and scored likewise."""

    temperature: float = 1.0
    distribution: ClassVar[str] = "categorical"

    def log_scale(self, log_scale: None) -> None:
        """Tokens have none."""

    def drawn(self, action: Tensor) -> Tensor:
        """All of the tokens `[B, C, A]`."""
        return action

    def centre(self, mu: Tensor) -> Tensor:
        """Logits of what is drawn, `[B, C, A, K]`."""
        return mu.float() / self.temperature

    def greedy(self, mu: Tensor) -> Tensor:
        """The likeliest tokens, `[B, C, A]`."""
        return mu.argmax(-1)

    def sample(self, mu: Tensor, log_scale: None, seeds: Tensor, step: Tensor) -> Tensor:
        """Tokens `[B, C, A]` of logits mu `[B, C, A, K]`; seeds and step as of `Laplace`."""
        u = counter_uniform(seeds, step, mu.shape[1:])
        # Gumbel-max: the first of exponential clocks that run at the tokens' probabilities. The
        # floor, half a step of u, keeps the log finite.
        clock = torch.log1p(-u).neg().clamp_min(2.0**-25)
        return (self.centre(mu) - clock.log()).argmax(-1)

    def logprob(self, mu: Tensor, log_scale: None, action: Tensor) -> Tensor:
        """Of tokens `[B, C, A]`, per chunk step `[B, C]`."""
        return action_logprob(self.centre(mu), None, action, distribution="categorical")


Noise = Laplace | Tokens
OWN: dict[str, Noise] = {"laplace": Laplace(), "categorical": Tokens()}
"""The policy's own distribution, of each kind."""


def exploration(
    distribution: str, part: CollectConfig | PosttrainConfig, translation: Sequence[int]
) -> Noise:
    """How a policy of this distribution explores; translation: the dimensions of an action that
    move the hand."""
    if distribution != "categorical":
        return Laplace(part.scale, part.push, tuple(translation))
    if part.push:
        raise UserError(
            f"{type(part).__name__}.push: expected 0 for a policy whose actions are tokens, which "
            f"cannot be pushed by a fraction; got {part.push}. Tokens explore by temperature."
        )
    return Tokens(part.temperature)


def sample_laplace(mu: Tensor, log_scale: Tensor, seeds: Tensor, step: Tensor) -> Tensor:
    """Actions `[B, C, A]` from Laplace(mu, exp(log_scale)), noise seeded per row and step."""
    u = counter_uniform(seeds, step, mu.shape[1:]) - 0.5
    # |u| < 0.5 up to rounding: the floor keeps log finite.
    return mu - log_scale.exp() * u.sign() * torch.log1p((-2 * u.abs()).clamp_min(-1 + 1e-7))
