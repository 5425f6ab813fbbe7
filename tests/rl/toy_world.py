"""A world whose best action is known, and a policy for it."""

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import nn

from worldenv.envs.start import Start
from worldenv.runtime.seeds import derive


class ToyEnv(VectorEnv):
    """Success when the first action dimension exceeds the start's index / 10; three chunks."""

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012

    def __init__(self, rows: int) -> None:
        self.num_envs = rows
        self.limit, self.count = np.zeros(rows), np.zeros(rows, int)
        self.over, self.won = np.ones(rows, bool), np.zeros(rows, bool)

    def reset(self, *, seed=None, options=None):
        mask = options.get("reset_mask", np.ones(self.num_envs, bool))
        for row in np.flatnonzero(mask):
            self.limit[row] = options["starts"][row].index / 10
            self.count[row], self.over[row], self.won[row] = 0, False, False
        return self.observe(), {}

    def observe(self):
        proprio = np.stack([self.limit, self.count], 1).astype(np.float32)
        image = np.zeros((self.num_envs, 1, 2, 2, 3), np.uint8)
        return {"image": image, "proprio": proprio, "instruction": ("go",) * self.num_envs}

    def step(self, actions):
        live = ~self.over
        self.count += live
        self.won |= live & (actions[:, 0, 0] > self.limit)
        self.over |= self.won | (self.count >= 3)
        truncated = self.over & ~self.won
        info = {"success": self.won.copy(), "steps": self.count.copy()}
        return self.observe(), self.won * live * 1.0, self.won.copy(), truncated, info


class ToyPolicy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 4)
        nn.init.zeros_(self.net.weight)
        nn.init.zeros_(self.net.bias)

    def forward(self, observation):
        mu = self.net(observation["proprio"]).view(-1, 2, 2)
        return mu, torch.full_like(mu, -1.0)

    def both(self, observation):
        return *self(observation), observation["proprio"]


def seeds(n: int, salt: int = 0) -> list[int]:
    return [derive("toy", salt, k) for k in range(n)]


def starts(n: int, index: int = 3) -> list[Start]:
    return [Start(0, index, k) for k in range(n)]
