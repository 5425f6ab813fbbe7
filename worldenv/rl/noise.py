"""How exploring policies act: drawn and scored by the same distribution.

Two kinds. Every action by itself, Laplace with the policy's own scale (World-Env section 3.5). Or
one push for all of a chunk: the noise of single actions averages out within a chunk, and most of it
is in dimensions on which little depends, so that what it teaches drowns in what it disturbs. A push
moves the hand by some millimetres, which is what decides a grasp, and is all that is scored.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from worldenv.ops import action_logprob
from worldenv.runtime.seeds import counter_uniform

TRANSLATION = 3  # the first dimensions of an action move the hand (OSC_POSE)


@dataclass(frozen=True)
class Noise:
    """Laplace noise about a policy's mean.

    scale: multiple of the policy's Laplace scale, for every action by itself. push: if not 0, the
    Laplace scale of a translation added to all actions of a chunk instead, in units of the action.
    """

    scale: float = 1.0
    push: float = 0.0

    def log_scale(self, log_scale: Tensor) -> Tensor:
        """Of what is drawn: `[B, C, A]`, or `[B, 1, 3]` with a push; log_scale: the policy's."""
        if self.push:
            return torch.full_like(log_scale[:, :1, :TRANSLATION], math.log(self.push))
        return log_scale + math.log(self.scale)

    def drawn(self, action: Tensor) -> Tensor:
        """What the noise moves of mu or action `[B, C, A]`: all of it, or with a push the chunk's
        mean translation `[B, 1, 3]`."""
        return action[..., :TRANSLATION].mean(1, keepdim=True) if self.push else action

    def sample(self, mu: Tensor, log_scale: Tensor, seeds: Tensor, step: Tensor) -> Tensor:
        """Actions `[B, C, A]` about mu `[B, C, A]`; log_scale as `log_scale` returns it; seeds and
        step `[B]` int64 determine each row's noise."""
        if not self.push:
            return sample_laplace(mu, log_scale, seeds, step)
        action = mu.clone()
        zero = torch.zeros_like(log_scale)
        action[..., :TRANSLATION] += sample_laplace(zero, log_scale, seeds, step)
        return action

    def logprob(self, mu: Tensor, log_scale: Tensor, action: Tensor) -> Tensor:
        """Of action `[B, C, A]`, per chunk step `[B, C]`, or of the push `[B, 1]`."""
        return action_logprob(self.drawn(mu), log_scale, self.drawn(action))


OWN_NOISE = Noise()  # the policy's own distribution


def sample_laplace(mu: Tensor, log_scale: Tensor, seeds: Tensor, step: Tensor) -> Tensor:
    """Actions `[B, C, A]` from Laplace(mu, exp(log_scale)), noise seeded per row and step."""
    u = counter_uniform(seeds, step, mu.shape[1:]) - 0.5
    # |u| < 0.5 up to rounding: the floor keeps log finite.
    return mu - log_scale.exp() * u.sign() * torch.log1p((-2 * u.abs()).clamp_min(-1 + 1e-7))
