"""worldenv's policy and reflector as LeRobot asks for them: to act and to judge, not to train."""

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.rewards.pretrained import PreTrainedRewardModel
from torch import Tensor

from lerobot_policy_worldenv.configuration_worldenv import WorldenvConfig, WorldenvReflectorConfig
from lerobot_policy_worldenv.skin import Skin, checkpoint
from worldenv.rl.noise import OWN
from worldenv.runtime.errors import UserError
from worldenv.stages import store


def _shapes(*features: Mapping[str, Any] | None) -> dict[str, tuple[int, ...]]:
    """Of LeRobot's features, by key."""
    return {key: tuple(f.shape) for group in features for key, f in (group or {}).items()}


class WorldenvPolicy(PreTrainedPolicy):
    """Decides on a whole chunk at its likeliest, as worldenv evaluates, and gives it out action by
    action."""

    config_class, name = WorldenvConfig, "worldenv"

    def __init__(
        self, config: WorldenvConfig, dataset_stats: Any = None, dataset_meta: Any = None
    ) -> None:
        """Loads `config.checkpoint`; statistics are its own. UserError as of `checkpoint` and
        `Skin`."""
        super().__init__(config)
        path = checkpoint("policy", config.checkpoint, "--policy.checkpoint")
        self.policy = store.load("policy", path)
        shapes = _shapes(config.input_features, config.output_features)
        self.skin = Skin(self.policy.embodiment, shapes, config.cameras, "--policy.cameras")
        self.reset()

    def reset(self) -> None:
        """Forget what is left of a chunk: episodes begin."""
        self._left: deque[Tensor] = deque()

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor]) -> Tensor:
        """`[B, C, A]` float32. UserError as of `Skin.observation`."""
        device = next(self.policy.parameters()).device
        mu, _ = self.policy(self.skin.observation(batch, device))
        return self.policy.command(OWN[self.policy.distribution].greedy(mu))

    def select_action(self, batch: dict[str, Tensor]) -> Tensor:
        """The next action of every row `[B, A]`; each C-th call looks and decides."""
        if not self._left:
            self._left.extend(self.predict_action_chunk(batch).unbind(1))
        return self._left.popleft()

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict | None]:
        """UserError: it is not trained here."""
        return self.config.get_optimizer_preset()

    def get_optim_params(self) -> dict:
        """UserError: it is not trained here."""
        return self.config.get_optimizer_preset()


class WorldenvReflectorRewardModel(PreTrainedRewardModel):
    """R(o_1:t) in [0, 1]: how near to success an episode is, from its first frame and this one."""

    config_class, name = WorldenvReflectorConfig, "worldenv_reflector"

    def __init__(
        self, config: WorldenvReflectorConfig, dataset_stats: Any = None, dataset_meta: Any = None
    ) -> None:
        """Loads `config.checkpoint`. UserError as of `checkpoint` and `Skin`."""
        super().__init__(config)
        path = checkpoint("reflector", config.checkpoint, "--reward_model.checkpoint")
        self.reflector = store.load("reflector", path)
        self.skin = self._skin(_shapes(config.input_features)) if config.input_features else None
        self.reset()

    def reset(self) -> None:
        """Episodes begin: the next frames are their first."""
        self._judge, self._rows = None, 0

    @torch.no_grad()
    def compute_reward(self, batch: dict[str, Tensor]) -> Tensor:
        """`[B]` of one more frame of B episodes, `[B, 3, H, W]` a camera; of their last, where the
        batch has T of each, `[B, T, 3, H, W]`, from the first on.

        UserError as of `Skin.observation`, and for other than B rows before `reset`.
        """
        if self.skin is None:
            self.skin = self._skin({k: tuple(v.shape[1:]) for k, v in batch.items()
                                    if k.startswith("observation") and v.ndim == 4})  # fmt: skip
        first = batch.get(self.skin.cameras[0])
        if not isinstance(first, Tensor) or first.ndim != 5:
            return self._watch(batch)
        self.reset()
        for t in range(first.shape[1]):
            reward = self._watch(
                {k: v[:, t] if k.startswith("observation") else v for k, v in batch.items()}
            )
        self.reset()
        return reward

    def _watch(self, batch: Mapping[str, Any]) -> Tensor:
        device = self.reflector.proprio_mean.device
        seen = self.skin.observation(batch, device)
        count = len(seen["proprio"])
        if self._judge is None:
            self._judge, self._rows = self.reflector.onlooker(count), count
        if count != self._rows:
            raise UserError(
                f"compute_reward: expected the {self._rows} episodes it watches, got {count}. Call "
                "reset() where episodes begin."
            )
        every = torch.ones(count, dtype=torch.bool)
        return self._judge.watch(seen["image"], seen["proprio"], seen["instruction"], every)

    def _skin(self, shapes: dict[str, tuple[int, ...]]) -> Skin:
        robot, cameras = self.reflector.embodiment, self.config.cameras
        return Skin(robot, shapes, cameras, "--reward_model.cameras")
