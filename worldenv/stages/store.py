"""Trained models on disk: weights beside the configuration that built them."""

from pathlib import Path

import torch
from torch import nn

from worldenv.config import (
    Config,
    PolicyConfig,
    ReflectorConfig,
    SimulatorConfig,
    from_dict,
    to_dict,
)
from worldenv.models.policy import Policy
from worldenv.models.reflector import Reflector
from worldenv.models.simulator import Simulator
from worldenv.runtime import checkpoint
from worldenv.runtime.errors import UserError

_KINDS = {"policy": PolicyConfig, "simulator": SimulatorConfig, "reflector": ReflectorConfig}


def build(kind: str, config: Config) -> nn.Module:
    """A new model of `kind` (policy, simulator, reflector) with its preset's sizes."""
    return _build(kind, getattr(config, kind), config.env.image_size, config.env.chunk)


def _build(kind: str, part: object, image_size: int, chunk: int) -> nn.Module:
    if kind == "policy":
        return Policy(part, image_size, chunk=chunk)
    if kind == "simulator":
        return Simulator(part, image_size, views=2, proprio=8, chunk=chunk, actions=7)
    return Reflector(part, image_size)


def save(kind: str, model: nn.Module, config: Config, path: Path, **facts: object) -> None:
    """Write a model with the configuration needed to build it again."""
    metadata = {
        "kind": kind,
        "config": to_dict(getattr(config, kind)),
        "image_size": config.env.image_size,
        "chunk": config.env.chunk,
        **facts,
    }
    checkpoint.save(path, model.state_dict(), metadata)


def load(kind: str, path: Path, device: torch.device | str = "cpu") -> nn.Module:
    """Read a model written by `save`, ready for inference."""
    tensors, metadata = checkpoint.load(path, device)
    if metadata.get("kind") != kind:
        raise UserError(f"{path}: expected a {kind} checkpoint, got {metadata.get('kind')!r}")
    part = from_dict(_KINDS[kind], metadata["config"], f"{path}: config")
    model = _build(kind, part, metadata["image_size"], metadata["chunk"])
    checkpoint.load_module(model, tensors, path)
    return model.to(device).eval()
