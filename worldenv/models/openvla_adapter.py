"""Low-rank adapters of an OpenVLA policy, by peft: put on, read and written as published.

Keys are `base_model.model.<module path>.lora_A.weight`; the paths are the published ones.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor

from worldenv.models import vit
from worldenv.models.folder import read_json
from worldenv.models.openvla import HEADS, TOWERS, OpenVLA, linears
from worldenv.models.weights import Shards, check_shapes
from worldenv.runtime.errors import UserError, write_error

FOLDER = "lora_adapter"  # beside the published shards
HEAD = "language_model.lm_head"  # of a policy that writes tokens: trained in full, beside adapters
_PREFIX = "base_model.model."
_LARGEST_ALPHA = 16  # as published: alpha is the rank, 16 at most
_PLAIN = {"use_dora": False, "bias": "none", "fan_in_fan_out": False, "lora_bias": False}


def attach(model: OpenVLA) -> None:
    """Put adapters on the backbone: the folder's (adapter "apply"), or new ones without effect.

    UserError for an adapter that is not plain LoRA, or of other layers or another rank.
    """
    config = model.config
    if config.adapter == "apply":
        _apply(model, config.folder / FOLDER)
        return
    _inject(model, config.lora_rank, min(config.lora_rank, _LARGEST_ALPHA), linears(model))


def _inject(model: OpenVLA, rank: int, alpha: float, names: list[str], **more: Any) -> None:
    inject_adapter_in_model(
        LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=0.0,
            init_lora_weights="gaussian",
            target_modules=names,
            base_model_name_or_path=str(model.config.folder),
            **more,
        ),
        model,
    )


def _apply(model: OpenVLA, folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"policy.adapter apply: expected an adapter in {folder}, got none.")
    path = folder / "adapter_config.json"
    described = read_json(path)
    rank, alpha = described.get("r"), described.get("lora_alpha")
    for name, value in {"peft_type": "LORA", **_PLAIN}.items():
        if described.get(name, value) != value:
            raise UserError(
                f"{path}: {name}: expected {value!r}, got {described[name]!r}: merge it with the "
                "program that wrote it."
            )
    if described.get("rank_pattern") or described.get("alpha_pattern"):
        raise UserError(f"{path}: expected one rank for all layers, got patterns of ranks.")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(f"{path}: expected r and lora_alpha, got {rank!r} and {alpha!r}.")
    if model.config.lora_rank not in (0, rank):
        raise UserError(
            f"policy.lora_rank: expected the adapter's rank {rank} ({path}), or 0 to leave it as "
            f"it is; got {model.config.lora_rank}."
        )
    shards = Shards(folder, "adapter_model")
    called = {_plain(name): name for name in shards.shapes}
    layers = {name.rsplit(".lora_", 1)[0] for name in called if ".lora_" in name}
    modules = dict(model.named_modules())
    _inject(
        model,
        rank,
        alpha,
        sorted(layer for layer in layers if layer in modules),
        use_rslora=bool(described.get("use_rslora")),
    )
    own = _adapter_names(model)
    if f"{HEAD}.weight" in called and HEAD in (described.get("modules_to_save") or ()):
        own[f"{HEAD}.weight"] = f"{HEAD}.weight"
    shapes = {name: list(model.get_parameter(real).shape) for name, real in own.items()}
    found = {name: shards.shapes[real] for name, real in called.items()}
    reason = "It was trained on another model, or another part of it."
    check_shapes(shapes, found, folder, reason, _spare(model))
    tensors = shards.read(called[name] for name in own)
    with torch.no_grad():
        for name, real in own.items():
            parameter = model.get_parameter(real)
            parameter.data = tensors[called[name]].to(parameter.dtype, copy=True)


def _plain(name: str) -> str:
    """A tensor of an adapter, by module path; older writers left the adapter's own name in."""
    return re.sub(r"\.(lora_[AB])\.default\.", r".\1.", name.removeprefix(_PREFIX))


def _adapter_names(model: OpenVLA) -> dict[str, str]:
    """Published names of the model's adapter tensors, without prefix, and their own."""
    return {
        name.replace(".default.", "."): name
        for name, _ in model.named_parameters()
        if ".lora_" in name
    }


def _spare(model: OpenVLA) -> re.Pattern:
    """Adapters of layers that the actions do not depend on."""
    parts = [
        rf"{re.escape(tower)}\.{vit.unused(kind).pattern}"
        for tower, kind in zip(TOWERS, vit.KINDS.values(), strict=True)
    ]
    if model.distribution != "categorical":
        parts.append(r"language_model\.lm_head\.lora_[AB]\.weight")
    return re.compile("|".join(f"(?:{part})" for part in parts))


def export(model: OpenVLA, folder: Path) -> None:
    """Write what was trained as others' tools read it: `lora_adapter/` and `<head>--latest_*.pt`.
    UserError if the disk refuses."""
    if _adapter_names(model):
        save_adapter(model, folder / FOLDER)
    save_heads(model, folder, "latest")


def save_adapter(model: OpenVLA, folder: Path) -> None:
    """Write the adapter as peft does: adapter_config.json and adapter_model.safetensors; with it,
    as one of peft's `modules_to_save`, the head of a policy of tokens.

    UserError if the policy has none, or the folder cannot be written.
    """
    names = _adapter_names(model)
    if not names:
        raise UserError("The policy has no adapter: it was loaded with policy.lora_rank 0.")
    tensors: dict[str, Tensor] = {
        _PREFIX + name: model.get_parameter(real).detach().cpu().contiguous()
        for name, real in names.items()
    }
    described = model.peft_config["default"]
    if model.distribution == "categorical":
        head = model.get_parameter(f"{HEAD}.weight").detach().cpu().contiguous()
        tensors[f"{_PREFIX}{HEAD}.weight"] = head
        described = replace(described, modules_to_save=[HEAD])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        described.save_pretrained(folder)
    except OSError as error:
        raise write_error(folder, error) from error


def save_heads(model: OpenVLA, folder: Path, step: int | str) -> None:
    """Write the heads beside it, under the published names and as the published loader reads them.

    The head of a token policy is part of the language model: it goes with the adapter.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in HEADS:
            if hasattr(model, name):
                tensors = {
                    n: t.detach().cpu() for n, t in getattr(model, name).state_dict().items()
                }
                torch.save(tensors, folder / f"{name}--{step}_checkpoint.pt")
    except (OSError, RuntimeError) as error:
        raise write_error(folder, error) from error
