"""Something with the real benchmark's interface and no physics, which takes no time."""

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from worldenv.data.libero_tasks import SUITES, instruction_of
from worldenv.envs.libero.robot import embodiment
from worldenv.envs.workers import spaces_of


class StandIn(VectorEnv):
    """LiberoVectorEnv's interface; every other seed succeeds after twelve steps."""

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012

    def __init__(self, suite, num_envs, *, image_size, chunk, max_steps, terminate="success",
                 record_every=None, views=2, **_):  # fmt: skip
        spaces = spaces_of(embodiment(image_size, chunk, views=views), [])
        self.single_observation_space, self.single_action_space = spaces
        self.suite, self.num_envs, self.size = suite, num_envs, image_size
        self.chunk, self.max_steps, self.terminate = chunk, max_steps, terminate
        self.record_every = record_every
        self.starts, self.steps = [None] * num_envs, np.zeros(num_envs, int)

    def reset(self, *, seed=None, options=None):
        mask = options.get("reset_mask", np.ones(self.num_envs, bool))
        for row in np.flatnonzero(mask):
            self.starts[row], self.steps[row] = options["starts"][row], 0
        return self.observe(), self.info()

    def look(self, row, step):
        picture = np.full((2, self.size, self.size, 3), 40, np.uint8)
        picture[:, step % self.size :, : self.starts[row].seed % self.size] = 200
        return {"image": picture, "proprio": np.full(8, step / 1000, np.float32)}

    def observe(self):
        seen = [self.look(row, step) for row, step in enumerate(self.steps)]
        words = tuple(instruction_of(SUITES[self.suite][s.task]) for s in self.starts)
        return {k: np.stack([s[k] for s in seen]) for k in seen[0]} | {"instruction": words}

    def lucky(self):
        return [s.seed % 2 == 1 for s in self.starts]

    def info(self):
        won = np.array(self.lucky()) & (self.steps >= 12)
        return {"success": won, "steps": self.steps.copy(), "success_step": np.where(won, 12, -1)}

    def step(self, actions):
        assert actions.shape == (self.num_envs, self.chunk, 7)
        before, won = self.steps.copy(), self.info()["success"]
        self.steps = np.minimum(self.steps + self.chunk, self.max_steps)
        info = self.info()
        if self.record_every:
            info["frames"] = [self.frames(row, before[row]) for row in range(self.num_envs)]
        terminated = info["success"] & (self.terminate == "success")
        truncated = (self.steps >= self.max_steps) & ~terminated
        reward = (info["success"] & ~won) * 1.0
        return self.observe(), reward, terminated, truncated, info

    def frames(self, row, before):
        steps = [s for s in range(before + 1, self.steps[row] + 1) if s % self.record_every == 0]
        seen = [self.look(row, s) for s in steps]
        dones = np.arange(before + 1, self.steps[row] + 1) >= 12
        return {"steps": np.array(steps), "dones": dones & self.lucky()[row],
                **{k: np.stack([s[k] for s in seen]) for k in seen[0]}}  # fmt: skip
