"""LeRobot 0.6.1 as far as a plug-in sees it: the shapes of its protocols, and its loop over them.

What is here has the names, fields and conduct that lerobot's own has (configs/policies.py,
configs/rewards.py, envs/configs.py, envs/utils.py, policies/pretrained.py, policies/factory.py,
rewards/pretrained.py, scripts/lerobot_eval.py), and nothing more. Where lerobot is installed the
tests take that instead (`conftest.py`).
"""

import abc
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

VERSION = "0.6.1"
PLUGIN = Path(__file__).parents[2] / "plugins" / "lerobot"


class ChoiceRegistry:
    """draccus': subclasses by name."""

    choices: ClassVar[dict[str, type]]

    @classmethod
    def register_subclass(cls, name: str) -> Callable[[type], type]:
        return lambda made: cls.choices.setdefault(name, made)

    @classmethod
    def get_choice_class(cls, name: str) -> type:
        return cls.choices[name]

    @classmethod
    def get_choice_name(cls, made: type) -> str:
        return next(name for name, known in cls.choices.items() if known is made)

    @property
    def type(self) -> str:
        return self.get_choice_name(type(self))


class FeatureType(StrEnum):
    STATE = "STATE"
    VISUAL = "VISUAL"
    ENV = "ENV"
    ACTION = "ACTION"


@dataclass
class PolicyFeature:
    type: FeatureType
    shape: tuple[int, ...]


@dataclass
class PreTrainedConfig(ChoiceRegistry, abc.ABC):
    choices: ClassVar[dict[str, type]] = {}
    input_features: dict[str, PolicyFeature] | None = field(default_factory=dict)
    output_features: dict[str, PolicyFeature] | None = field(default_factory=dict)
    device: str | None = None
    pretrained_path: str | None = None

    @property
    @abc.abstractmethod
    def observation_delta_indices(self): ...

    @property
    @abc.abstractmethod
    def action_delta_indices(self): ...

    @property
    @abc.abstractmethod
    def reward_delta_indices(self): ...

    @abc.abstractmethod
    def get_optimizer_preset(self): ...

    @abc.abstractmethod
    def get_scheduler_preset(self): ...

    @abc.abstractmethod
    def validate_features(self): ...


@dataclass
class RewardModelConfig(ChoiceRegistry, abc.ABC):
    choices: ClassVar[dict[str, type]] = {}
    input_features: dict[str, PolicyFeature] = field(default_factory=dict)
    output_features: dict[str, PolicyFeature] = field(default_factory=dict)
    device: str | None = None
    pretrained_path: str | None = None


@dataclass
class EnvConfig(ChoiceRegistry, abc.ABC):
    choices: ClassVar[dict[str, type]] = {}
    task: str | None = None
    fps: int = 30
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(default_factory=dict)
    max_parallel_tasks: int = 1
    disable_env_checker: bool = True

    @property
    @abc.abstractmethod
    def gym_kwargs(self): ...


class _Named(nn.Module):
    config_class = name = None

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any) -> None:
        super().__init__()
        self.config = config

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__ != __name__ and not (cls.config_class and cls.name):
            raise TypeError(f"Class {cls.__name__} must define 'config_class' and 'name'")


class PreTrainedPolicy(_Named, abc.ABC):
    @abc.abstractmethod
    def get_optim_params(self): ...

    @abc.abstractmethod
    def reset(self): ...

    @abc.abstractmethod
    def forward(self, batch): ...

    @abc.abstractmethod
    def predict_action_chunk(self, batch): ...

    @abc.abstractmethod
    def select_action(self, batch): ...


class PreTrainedRewardModel(_Named, abc.ABC):
    @abc.abstractmethod
    def compute_reward(self, batch): ...


def make_policy_processor_pipelines(input_steps: list, output_steps: list) -> tuple:
    assert not [*input_steps, *output_steps]
    return (lambda batch: batch), (lambda action: action)


def preprocess_observation(seen: dict) -> dict[str, Tensor]:
    """Pictures [B, H, W, 3] uint8 to [B, 3, H, W] in [0, 1]."""
    made = {}
    for name, image in seen["pixels"].items():
        assert image.dtype == np.uint8
        picture = torch.from_numpy(image).permute(0, 3, 1, 2).contiguous().float()
        made[f"observation.images.{name}"] = picture / 255
    return made | {"observation.state": torch.from_numpy(seen["agent_pos"]).float()}


def env_to_policy_features(config: EnvConfig) -> dict[str, PolicyFeature]:
    found = {}
    for key, feature in config.features.items():
        visual = feature.type is FeatureType.VISUAL
        shape = (feature.shape[2], *feature.shape[:2]) if visual else feature.shape
        found[config.features_map[key]] = PolicyFeature(feature.type, shape)
    return found


def make_policy(cfg: PreTrainedConfig, env_cfg: EnvConfig) -> PreTrainedPolicy:
    features = env_to_policy_features(env_cfg)
    kinds = {key: feature.type is FeatureType.ACTION for key, feature in features.items()}
    cfg.output_features = {key: features[key] for key, acts in kinds.items() if acts}
    cfg.input_features = {key: features[key] for key, acts in kinds.items() if not acts}
    return _sibling(type(cfg), "modeling_", "Policy")(config=cfg).to(cfg.device)


def make_reward_model(cfg: RewardModelConfig) -> PreTrainedRewardModel:
    return _sibling(type(cfg), "modeling_", "RewardModel")(config=cfg).to(cfg.device)


def make_pre_post_processors(policy_cfg: Any) -> tuple:
    module = type(policy_cfg).__module__.replace("configuration_", "processor_")
    make = getattr(importlib.import_module(module), f"make_{policy_cfg.type}_pre_post_processors")
    return make(policy_cfg, dataset_stats=None)


def _sibling(config: type, part: str, ending: str) -> type:
    """LeRobot's convention: the class lies in the module beside its configuration's."""
    module = importlib.import_module(config.__module__.replace("configuration_", part))
    return getattr(module, config.__name__.removesuffix("Config") + ending)


def rollout(env, policy, env_preprocessor, env_postprocessor, preprocessor, postprocessor,
            seeds=None, render_callback=None) -> dict[str, Tensor]:  # fmt: skip
    """All rows until the last is done; what follows a row's end is to be masked."""
    policy.reset()
    seen, _ = env.reset(seed=seeds, options={"lerobot_new_rollout": True})
    kept: dict[str, list] = {"action": [], "reward": [], "success": [], "done": []}
    done, most = np.zeros(env.num_envs, bool), env.call("_max_episode_steps")[0]
    while not done.all() and len(kept["done"]) < most:
        batch = preprocess_observation(seen) | {"task": list(env.call("task_description"))}
        with torch.inference_mode():
            action = policy.select_action(preprocessor(env_preprocessor(batch)))
        action = env_postprocessor({"action": postprocessor(action)})["action"].numpy()
        assert action.ndim == 2
        seen, reward, terminated, truncated, info = env.step(action)
        if render_callback is not None:
            render_callback(env)
        done = terminated | truncated | done
        row = (action, reward, np.array(info["is_success"]), done)
        for values, value in zip(kept.values(), row, strict=True):
            values.append(torch.from_numpy(value))
    return {name: torch.stack(values, 1) for name, values in kept.items()}


_MODULES = {
    "lerobot": (),
    "lerobot.configs": (FeatureType, PolicyFeature, PreTrainedConfig),
    "lerobot.configs.rewards": (RewardModelConfig,),
    "lerobot.envs": (EnvConfig, preprocess_observation, env_to_policy_features),
    "lerobot.policies": (make_policy, make_pre_post_processors),
    "lerobot.policies.pretrained": (PreTrainedPolicy,),
    "lerobot.processor": (make_policy_processor_pipelines,),
    "lerobot.rewards": (make_reward_model,),
    "lerobot.rewards.factory": (),
    "lerobot.rewards.pretrained": (PreTrainedRewardModel,),
    "lerobot.scripts": (),
    "lerobot.scripts.lerobot_eval": (rollout,),
}


def modules() -> dict[str, ModuleType]:
    """By the names under which a plug-in imports them."""
    made = {}
    for name, things in _MODULES.items():
        made[name] = ModuleType(name)
        for thing in things:
            setattr(made[name], thing.__name__, thing)
    made["lerobot.rewards.factory"].make_reward_pre_post_processors = make_pre_post_processors
    return made


def forget() -> None:
    """Of what was imported, all that a stand-in may have shaped."""
    for name in [
        n for n in sys.modules if n.split(".")[0] in ("lerobot", "lerobot_policy_worldenv")
    ]:
        del sys.modules[name]
    for registry in (PreTrainedConfig, RewardModelConfig, EnvConfig):
        registry.choices.clear()
