"""What can be said of the policy, the world and the judge on LeRobot's command lines.

LeRobot finds the classes by names: `modeling_worldenv` has `WorldenvPolicy` and
`WorldenvReflectorRewardModel`, `processor_worldenv` what stands around them.
"""

from dataclasses import dataclass, field
from typing import Any

from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.configs.rewards import RewardModelConfig
from lerobot.envs import EnvConfig

from worldenv.runtime.errors import UserError


@PreTrainedConfig.register_subclass("worldenv")
@dataclass
class WorldenvConfig(PreTrainedConfig):
    """A policy of worldenv's, to act."""

    # A run's folder (its last round's policy), a checkpoint, or user/name@revision on the hub.
    checkpoint: str | None = None
    # Keys of the cameras in the order of the robot's views; empty: told by their names.
    cameras: list[str] = field(default_factory=list)

    @property
    def observation_delta_indices(self) -> None:
        """It sees the present alone."""

    @property
    def action_delta_indices(self) -> None:
        """It is not trained here."""

    @property
    def reward_delta_indices(self) -> None:
        """It is not trained here."""

    def get_optimizer_preset(self) -> Any:
        """UserError: it is not trained here."""
        raise UserError(
            "policy worldenv: expected to act (lerobot-eval), got training. worldenv-train trains "
            "it: --data takes LeRobotDatasets, --policy a checkpoint to begin with."
        )

    def get_scheduler_preset(self) -> Any:
        """UserError: it is not trained here."""
        return self.get_optimizer_preset()

    def validate_features(self) -> None:
        """The policy does, which knows its robot."""


@RewardModelConfig.register_subclass("worldenv_reflector")
@dataclass
class WorldenvReflectorConfig(RewardModelConfig):
    """A reflector of worldenv's, to judge."""

    # A run's folder (its last round's reflector), a checkpoint, or user/name@revision on the hub.
    checkpoint: str | None = None
    # As of the policy, among the keys of input_features, or of the first batch where it has none.
    cameras: list[str] = field(default_factory=list)


@EnvConfig.register_subclass("worldenv_world")
@dataclass
class WorldenvWorldConfig(EnvConfig):
    """The learned world of a run."""

    # Folder of a run with a simulator and a reflector.
    run: str | None = None
    # Whose world; by default of the last round that is finished.
    round: int | None = None
    # As of worldenv-train.
    device: str = "auto"

    def __post_init__(self) -> None:
        """Features and rhythm are those of the run's robot."""
        if self.run is None:
            return
        from lerobot_policy_worldenv import skin
        from worldenv.stages.run import open_run  # seconds, which other environments are spared

        robot = open_run(self.run, device=self.device).embodiment
        kinds = {skin.ACTION: FeatureType.ACTION, "agent_pos": FeatureType.STATE}
        self.fps = round(robot.control_hz)
        self.features = {
            key: PolicyFeature(kinds.get(key, FeatureType.VISUAL), shape)
            for key, shape in skin.features(robot).items()
        }
        self.features_map = {key: key for key in self.features} | {"agent_pos": skin.STATE}

    @property
    def gym_kwargs(self) -> dict:
        """None: it is not made by name."""
        return {}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict:
        """{suite: {task: environment of n_envs rows}}. Never of several processes: a world imagines
        all its rows at once. UserError as of `open_world`."""
        if self.run is None:
            raise UserError(
                "--env.run: expected the folder of a run with a learned world, got none. Name one "
                "that worldenv-train made."
            )
        from lerobot_policy_worldenv.world import worlds

        return worlds(self.run, self.round, self.device, n_envs)
