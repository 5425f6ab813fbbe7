"""Trained models on disk: weights beside the configuration that built them."""

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from worldenv.config import (
    CollectConfig,
    Config,
    EnvConfig,
    PolicyConfig,
    ReflectorConfig,
    SimulatorConfig,
    from_dict,
    to_dict,
)
from worldenv.envs.libero.cameras import cameras
from worldenv.models.action_map import Hand
from worldenv.models.policy import Policy
from worldenv.models.reflector import Reflector
from worldenv.models.simulator import Simulator
from worldenv.runtime import checkpoint
from worldenv.runtime.errors import NonFiniteError, UserError

_KINDS = {"policy": PolicyConfig, "simulator": SimulatorConfig, "reflector": ReflectorConfig}


def build(kind: str, config: Config) -> nn.Module:
    """A new model of `kind` (policy, simulator, reflector) with its preset's sizes."""
    part, image_size, chunk = getattr(config, kind), config.env.image_size, config.env.chunk
    if kind == "policy":
        return Policy(part, image_size, chunk=chunk)
    if kind == "simulator":
        drawn = {}
        if part.action_map:
            env = config.env
            hand = Hand((0, 1, 2), (3, 4, 5), (6, 7), 0.08)
            drawn = {"cameras": cameras(env.suite, env.tasks), "hand": hand}
        return Simulator(part, image_size, views=2, proprio=8, chunk=chunk, actions=7, **drawn)
    return Reflector(part, image_size)


def save(kind: str, model: nn.Module, config: Config, path: Path, **facts: object) -> None:
    """Write a model with the configuration needed to build it again: its own sizes (it may come
    from another run), and the run's image size and chunk.
    """
    metadata = {
        "kind": kind,
        "config": to_dict(model.config),
        "image_size": config.env.image_size,
        "chunk": config.env.chunk,
        **facts,
    }
    checkpoint.save(path, model.state_dict(), metadata)


def load(
    kind: str, path: Path, device: torch.device | str = "cpu", fits: Config | None = None
) -> nn.Module:
    """Read a model written by `save`, ready for inference.

    fits: the configuration it is to be used with, of the same image size and chunk. UserError
    naming the file for anything else than a whole model of this kind with finite weights.
    """
    tensors, metadata = checkpoint.load(path, device)
    if metadata.get("kind") != kind:
        raise UserError(f"{path}: expected a {kind} checkpoint, got {metadata.get('kind')!r}")
    config = _config(kind, metadata, path)
    if fits is not None:
        for name in ("image_size", "chunk"):
            own, asked = getattr(config.env, name), getattr(fits.env, name)
            if own != asked:
                flag = f"--env.{name.replace('_', '-')}"
                raise UserError(
                    f"{path}: this {kind} was trained with env.{name} {own}, got {asked}. Use the "
                    f"preset or the run folder it was trained with (or worldenv-train {flag} "
                    f"{own}), or another checkpoint."
                )
    for name, tensor in tensors.items():
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise NonFiniteError(
                f"{path}: {name} {list(tensor.shape)}: expected finite weights, got {bad} NaN or "
                f"infinite value(s). This {kind} is of no use: name another, or train it anew."
            )
    model = build(kind, config)
    checkpoint.load_module(model, tensors, path)
    return model.to(device).eval()


def _config(kind: str, metadata: dict, path: Path) -> Config:
    """The configuration, checked, that a model was built with; of others than its own part and the
    sizes it depends on, nothing is known.
    """
    part = from_dict(
        _KINDS[kind], checkpoint.fact(metadata, "config", dict, path), f"{path}: config"
    )
    sizes = {name: checkpoint.fact(metadata, name, int, path) for name in ("image_size", "chunk")}
    try:
        return replace(
            Config(),
            env=EnvConfig(**sizes),
            collect=CollectConfig(record_every=1),
            **{"simulator": SimulatorConfig(patch=1), kind: part},
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def digest(model: nn.Module) -> str:
    """Of a model's weights: the same for the same policy, whatever file it came from."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()
