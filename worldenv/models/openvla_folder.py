"""An OpenVLA folder, as published, to a policy: found, checked, then memory-mapped.

    policy = load(PolicyConfig(kind="openvla-oft", folder=folder), embodiment)

Shapes are those of the tensors, held against config.json and the timm names in it. Nothing is
downloaded, no code of the folder runs, no pickle is opened. The peak of memory is the weights once
(and in float32 what is trained).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from worldenv.config import PolicyConfig
from worldenv.data.embodiment import Embodiment
from worldenv.models import vit
from worldenv.models.folder import AGAIN, check_folder, few, listed, read_json
from worldenv.models.openvla import HEADS, TOWERS, OpenVLA, Sizes
from worldenv.models.openvla_inputs import BINS, EMPTY, Gripper, Pixels, Units, Words
from worldenv.models.openvla_statistics import statistics
from worldenv.models.weights import Shards, check_shapes, read_pth, shapes
from worldenv.models.widened import widen
from worldenv.runtime import device
from worldenv.runtime.errors import UserError

_FIXED = {  # of config.json: what this model is built for
    "model_type": "openvla",
    "arch_specifier": "no-align+fused-gelu-mlp",
    "use_fused_vision_backbone": True,
    "image_resize_strategy": "resize-naive",
    "n_action_bins": BINS,
}
_WRAPPERS = ("module.", "_orig_mod.")  # that training puts around a component's names


def load(config: PolicyConfig, embodiment: Embodiment, train: bool = True) -> OpenVLA:
    """The policy in `config.folder` for a robot, on the CPU.

    train: whether it gets its adapters, and its heads float32; otherwise everything is as on disk.
    UserError, before any tensor is read, for whatever is missing, foreign, or at odds.
    """
    folder = config.folder
    check_folder(folder, "policy.folder")
    if config.images is not None and config.images > embodiment.V:
        raise UserError(
            f"policy.images: expected at most the {embodiment.V} cameras of {embodiment.name}, got "
            f"{config.images}."
        )
    if config.decode == "autoregressive" and embodiment.chunk != 1:
        raise UserError(
            f"policy.decode autoregressive: expected chunks of 1 action, got {embodiment.chunk}."
        )
    described, shards = describe(folder), Shards(folder)
    sizes = _sizes(folder, described, shards)
    with torch.device("meta"):
        model = OpenVLA(config, embodiment, sizes)
    wanted = _backbone(model, shards, folder / "config.json")
    parts = _components(model, folder)
    uses_proprio = hasattr(model, "proprio_projector")
    bounds = statistics(config, described.get("norm_stats"), embodiment, uses_proprio)
    closed = float(embodiment.gripper_closes)
    gripper = Gripper(embodiment.actions("grip"), opened=-closed, closed=closed)
    model.units, model.words = Units(*bounds, gripper), words(folder, sizes)
    model.pixels = Pixels(described["image_sizes"][0], config.crop, _normalisations(folder))
    # From here on, data.
    read, dtype = shards.read(wanted.values()), getattr(torch, config.precision)
    tensors = {own: read[called].to(dtype) for own, called in wanted.items()}
    for part, found in parts.items():
        tensors |= {f"{part}.{n}": t for n, t in found.items()}
    if hasattr(model, "scale_head") and "scale_head" not in parts:
        tensors["scale_head.weight"] = torch.zeros(model.scale_head.weight.shape)
        tensors["scale_head.bias"] = torch.full((embodiment.A,), -2.0)
    model.load_state_dict(tensors, assign=True)
    # Angles are no weights: made anew, where the others were read.
    model.language_model.model.rotary_emb = LlamaRotaryEmbedding(sizes.llama)
    if config.adapter == "apply" or (train and config.lora_rank):
        from worldenv.models import openvla_adapter  # peft takes seconds, and heads do without

        openvla_adapter.attach(model)
    model.requires_grad_(False)
    if train:
        model.freeze()
    if device.autocast_dtype("cpu") is torch.float32:
        widen(model)
    return model.eval()


def sizes(folder: Path) -> Sizes:
    """What a folder's config.json and the headers of its shards say. UserError as `load`'s."""
    return _sizes(folder, describe(folder), Shards(folder))


def describe(folder: Path) -> dict[str, Any]:
    """config.json, sure to be of an OpenVLA that this model is built for."""
    path = folder / "config.json"
    described = read_json(path)
    for name, value in _FIXED.items():
        if described.get(name) != value:
            raise UserError(
                f"{path}: {name}: expected {value!r}, got {described.get(name)!r}. Name a folder "
                "of OpenVLA, or of OpenVLA-OFT."
            )
    ids, sides = described.get("timm_model_ids"), described.get("image_sizes")
    if ids != list(vit.KINDS):
        raise UserError(f"{path}: timm_model_ids: expected {list(vit.KINDS)}, got {ids!r}.")
    square = isinstance(sides, list) and len(sides) == 2 and sides[0] == sides[1]
    if not square or type(sides[0]) is not int or sides[0] % 14 or sides[0] <= 0:
        raise UserError(f"{path}: image_sizes: expected one multiple of 14 twice, got {sides!r}.")
    for name, kind in (("text_config", dict), ("pad_to_multiple_of", int)):
        if not isinstance(described.get(name), kind):
            got = repr(described.get(name))[:80]
            raise UserError(f"{path}: {name}: expected {kind.__name__}, got {got}. {AGAIN}")
    return described


def _sizes(folder: Path, described: dict[str, Any], shards: Shards) -> Sizes:
    """What config.json and the tensors say, which need not agree yet."""
    text = dict(described["text_config"])
    path = folder / "config.json"
    if text.pop("model_type", "llama") != "llama":
        raise UserError(f"{path}: text_config.model_type: expected 'llama'. {AGAIN}")
    for name in ("torch_dtype", "dtype"):
        text.pop(name, None)
    try:
        llama = LlamaConfig(**text)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(f"{path}: text_config: {error}. {AGAIN}") from error
    towers = []
    for tower, kind in zip(TOWERS, vit.KINDS.values(), strict=True):
        names = (f"{tower}.pos_embed", f"{tower}.blocks.0.mlp.fc1.weight")
        absent = [name for name in names if len(shards.shapes.get(name, ())) < 2]
        if absent:
            raise UserError(f"{folder}: missing {few(absent)}, or of another shape. {AGAIN}")
        width, hidden = shards.shapes[names[0]][-1], shards.shapes[names[1]][0]
        towers.append((kind, described["image_sizes"][0], width, hidden))
    return Sizes(tuple(towers), llama, llama.vocab_size - described["pad_to_multiple_of"])


def _backbone(model: OpenVLA, shards: Shards, source: Path) -> dict[str, str]:
    """Names of the backbone's tensors, and what the shards call them."""
    heads = tuple(f"{name}." for name in HEADS)
    own = {n: s for n, s in shapes(model.state_dict()).items() if not n.startswith(heads)}
    # Older files keep timm's name of a layer scale.
    called = {re.sub(r"\.gamma$", ".scale_factor", name): name for name in shards.shapes}
    found = {name: shards.shapes[real] for name, real in called.items()}
    patterns = [
        rf"{re.escape(tower)}\.{vit.unused(kind).pattern}"
        for tower, kind in zip(TOWERS, vit.KINDS.values(), strict=True)
    ]
    if model.distribution != "categorical":
        patterns.append(r"language_model\.lm_head\.weight")
    reason = f"Expected is what {source} describes: the two are not of one download. {AGAIN}"
    spare = re.compile("|".join(f"(?:{p})" for p in patterns))
    check_shapes(own, found, source.parent, reason, spare)
    return {name: called[name] for name in own}


def _components(model: OpenVLA, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Tensors, memory-mapped, of each head that is on disk."""
    for name, what in (("vision_backbone", "FiLM"), ("noisy_action_projector", "diffusion")):
        if _files(folder, name):
            raise UserError(
                f"{_files(folder, name)[0]}: a policy with {what}, which is not supported. Name a "
                "folder of one that was trained without."
            )
    found = {}
    for name in HEADS:
        paths = _files(folder, name)
        if not hasattr(model, name):
            if paths:
                raise UserError(
                    f"{folder} holds {paths[0].name}, which policy.kind {model.config.kind} with "
                    f"policy.proprio {model.config.proprio} does not use. Mend these two."
                )
            continue
        if len(paths) > 1:
            raise UserError(
                f"{folder}: expected one {name} checkpoint, got {len(paths)}: "
                f"{few(p.name for p in paths)}. Move those away that are not meant."
            )
        if not paths and name == "scale_head":
            continue  # none is published
        if not paths:
            raise UserError(
                f"{folder}: expected {name}--*_checkpoint.pt, got none. {AGAIN} Policies that "
                "write tokens are of policy.kind openvla-token; those trained without proprio want "
                "policy.proprio false."
            )
        tensors = _unwrapped(read_pth(paths[0]))
        if any(key.startswith("noise_predictor.") for key in tensors):
            raise UserError(f"{paths[0]}: a diffusion head: expected the L1 head. Name another.")
        reason = "It belongs to another policy, or to a robot of other sizes."
        own = shapes(getattr(model, name).state_dict())
        check_shapes(own, shapes(tensors), paths[0], reason)
        found[name] = tensors
    return found


def _files(folder: Path, component: str) -> list[Path]:
    """By the rule of the published loader: both words are in the name."""
    return sorted(p for p in folder.glob(f"*{component}*") if "checkpoint" in p.name)


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By name, without what wrapped their module."""
    out = {}
    for key, tensor in tensors.items():
        while key.startswith(_WRAPPERS):
            key = key.removeprefix(_WRAPPERS[0]).removeprefix(_WRAPPERS[1])
        out[key] = tensor
    return out


def words(folder: Path, sizes: Sizes) -> Words:
    """A folder's tokenizer. UserError where it is not Llama-2's."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder}: expected {path.name}, got {listed(folder)}. {AGAIN}")
    try:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(path), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
    except Exception as error:  # nothing narrower: what the tokenizers library raises
        raise UserError(f"{path}: no tokenizer: {error}. {AGAIN}") from error
    words = Words(tokenizer)
    ids = words.ids("go")
    known = tokenizer.convert_tokens_to_ids("<unk>") != words.empty is not None
    if not known or ids[0] != words.first or max(ids) >= sizes.tokens - BINS:
        raise UserError(
            f"{path}: expected Llama-2's tokenizer, which begins with <s>, knows {EMPTY!r} and has "
            f"{sizes.tokens} tokens; got {ids} of a prompt. {AGAIN}"
        )
    return words


def _normalisations(folder: Path) -> list[tuple[list[float], list[float]]]:
    """Mean and deviation of each tower, as preprocessor_config.json has them where they are used.

    (Its `means` and `stds` are others, not rounded, and unused.)
    """
    path = folder / "preprocessor_config.json"
    entries = read_json(path).get("tvf_normalize_params")
    numbers = [
        (entry.get("mean"), entry.get("std")) if isinstance(entry, dict) else (None, None)
        for entry in (entries if isinstance(entries, list) else [])
    ]
    whole = len(numbers) == 2 and all(
        isinstance(v, list) and len(v) == 3 and all(isinstance(x, float | int) for x in v)
        for pair in numbers
        for v in pair
    )
    if not whole:
        raise UserError(
            f"{path}: tvf_normalize_params: expected mean and std of three channels for two "
            f"towers, got {str(entries)[:80]}. {AGAIN}"
        )
    return numbers
