"""Published Wan transformers as they lie on the disk: found, measured, checked, memory-mapped.

Read are `WanTransformer3DModel` folders of diffusers (a whole pipeline's or its `transformer`), the
authors' own (`Wan-AI/Wan2.x-*`), whose names are others, and WoVR's (`RLinf-Wan-LIBERO-*`: the
authors' names and the action embedders, without config and text embedder). Sizes are those of the
tensors found, for configs in circulation claim parts that are not there; where one contradicts them
in what must agree, that is an error. Not read: image-to-video models, which see the image through
CLIP, and pairs of experts (A14B).
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from worldenv.models.folder import AGAIN, check_folder, few, listed, read_json
from worldenv.models.wan import WanSizes, WanTransformer
from worldenv.models.weights import Shards, check_shapes, shapes
from worldenv.ops import gelu
from worldenv.runtime.errors import UserError

_STEMS = ("diffusion_pytorch_model", "model", "model-00001")
_CLASSES = ("WanTransformer3DModel", "WanModel")
_HEAD_DIM = 128  # of every published Wan; where no config says how many heads there are
# From the authors' names to diffusers', in this order (norm3 is the norm of the cross-attention).
_RENAMES = (
    (r"\.(self|cross)_attn\.([qkv])\.", r".\1_attn.to_\2."),
    (r"\.(self|cross)_attn\.o\.", r".\1_attn.to_out.0."),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.norm3\.", ".norm2."),
    (r"\.modulation$", ".scale_shift_table"),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
    (r"^(time|text)_embedding\.0\.", r"condition_embedder.\1_embedder.linear_1."),
    (r"^(time|text)_embedding\.2\.", r"condition_embedder.\1_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^head\.scale_shift_table$", "scale_shift_table"),
    (r"^head\.head\.", "proj_out."),
)
_TEXT = re.compile(r"condition_embedder\.text_embedder\..*")
_IMAGE = re.compile(r".*(image_embedder|img_emb|add_[kv]_proj|[kv]_img|norm_added_[qk]).*")
_WIDE = re.compile(r".*(scale_shift_table|time_embedder|\.norm2\.|^proj_out).*")  # float32 always


def load(
    folder: Path, kind: Literal["wan", "wovr"], constant_text: bool, precision: str
) -> WanTransformer:
    """The transformer in a folder, computing in `precision` ("float32" or "bfloat16"); tensors that
    have their precision on the disk stay there, memory-mapped.

    constant_text: it will only ever be given an empty text, so what reads one is left out.
    UserError, naming file and key, for all but one whole model of this kind with finite weights.
    """
    model, shards, names = _described(folder, kind)
    spare = re.compile(r"blocks\.\d+\.(norm2\..*|attn2\.(to_[qk]|norm_[qk])\..*)")
    own = model.state_dict()
    old = [names[name] for name in own if not (constant_text and spare.fullmatch(name))]
    tensors = {diffusers_name(name): tensor for name, tensor in shards.read(old).items()}
    if constant_text:
        constants = list(_constants(tensors, model.sizes.layers))
        model.forget_text(constants)
        tensors |= {f"blocks.{i}.attn2.constant": c for i, c in enumerate(constants)}
    for name in tensors:
        tensors[name] = tensors[name].to(_dtype(name, precision))
    model.load_state_dict(tensors, assign=True)
    return model


def sizes(folder: Path, kind: Literal["wan", "wovr"]) -> WanSizes:
    """What the headers of a folder's tensors say. UserError as `load`'s."""
    return _described(folder, kind)[0].sizes


def blank(sizes: WanSizes, constant_text: bool, precision: str) -> WanTransformer:
    """A transformer as `load` makes it, without weights: on `meta`."""
    with torch.device("meta"):
        model = WanTransformer(sizes)
        if constant_text:
            model.forget_text([torch.empty(sizes.width)] * sizes.layers)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(_dtype(name, precision))
    return model


def _dtype(name: str, precision: str) -> torch.dtype:
    """Of a tensor, where the model computes in `precision`."""
    return torch.float32 if _WIDE.fullmatch(name) else getattr(torch, precision)


def _described(folder: Path, kind: str) -> tuple[WanTransformer, Shards, dict[str, str]]:
    """The model on `meta`, and the tensors that are its, with their names in the files."""
    where, config = _find(folder, kind)
    shards = Shards(where, _stem(where))
    names = {diffusers_name(name): name for name in shards.shapes}
    found = {name: shards.shapes[old] for name, old in names.items()}
    twice = sorted(shards.shapes.keys() - names.values())
    if twice:
        raise UserError(f"{where}: expected each tensor once, got {few(twice)} twice. {AGAIN}")
    _check_kind(where, found, kind)
    if kind == "wovr":  # which reads actions where there was text
        names = {name: old for name, old in names.items() if not _TEXT.fullmatch(name)}
        found = {name: found[name] for name in names}
    sizes = _sizes(where, found, config)
    with torch.device("meta"):
        model = WanTransformer(sizes)
    check_shapes(shapes(model.state_dict()), found, where)
    return model, shards, names


def diffusers_name(name: str) -> str:
    """A tensor's name in diffusers, of its name there or in the authors' files."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def read_prompt(path: Path, text_dim: int) -> Tensor:
    """The embedded text in a safetensors file of one tensor, `[n, text_dim]` float32, without its
    padding (rows of zeros at the end)."""
    shards = Shards(path.parent, path.stem)
    if len(shards.shapes) != 1:
        raise UserError(f"{path}: expected one tensor, got {few(sorted(shards.shapes))}.")
    ((name, tensor),) = shards.read(shards.shapes).items()
    if tensor.dim() == 3 and len(tensor) == 1:
        tensor = tensor[0]
    if tensor.dim() != 2 or tensor.shape[1] != text_dim:
        raise UserError(
            f"{path}: {name}: expected [n, {text_dim}], rows of Wan's text encoder, got "
            f"{list(tensor.shape)}."
        )
    rows = tensor.float()
    said = int(rows.any(1).nonzero().max()) + 1 if rows.any() else 0
    return rows[:said].clone()


def _find(folder: Path, kind: str) -> tuple[Path, dict[str, Any]]:
    """Where the transformer's files lie, and its config, empty where WoVR has none."""
    check_folder(folder, "simulator.folder")
    if (folder / "transformer_2").exists():
        raise UserError(
            f"{folder}: expected one transformer, got two experts (transformer, transformer_2), "
            "which are not supported. Name a Wan 2.1 T2V 1.3B or 2.2 TI2V 5B."
        )
    where = folder / "transformer" if (folder / "transformer").is_dir() else folder
    config = read_json(where / "config.json", None if kind == "wan" else {})
    named = config.get("_class_name")
    if (config or kind == "wan") and named not in _CLASSES:
        raise UserError(
            f"{where / 'config.json'}: _class_name: expected {' or '.join(_CLASSES)}, got "
            f"{named!r}. Name the folder of a Wan pipeline, or its transformer."
        )
    return where, config


def _stem(where: Path) -> str:
    """What the weights' files are called."""
    found = [
        stem
        for stem in _STEMS
        if any((where / f"{stem}.safetensors{end}").exists() for end in ("", ".index.json"))
    ]
    if len(found) != 1:
        names = " or ".join(f"{stem}.safetensors" for stem in _STEMS)
        raise UserError(
            f"{where}: expected one checkpoint, {names} or its shards and index, got "
            f"{listed(where) if not found else ' and '.join(found)}. {AGAIN}"
        )
    return found[0]


def _check_kind(where: Path, shapes: Mapping[str, list[int]], kind: str) -> None:
    images = [name for name in shapes if _IMAGE.fullmatch(name)]
    if images:
        raise UserError(
            f"{where}: an image-to-video model ({few(images, most=2)}), which sees its image "
            "through CLIP, is not supported. Name a Wan 2.1 T2V 1.3B or 2.2 TI2V 5B."
        )
    found = "wovr" if "action_mlp1.0.weight" in shapes else "wan"
    if found != kind:
        reads = "has WoVR's action embedders" if found == "wovr" else "has no action embedders"
        raise UserError(
            f"{where}: expected a simulator of kind {kind}, but it {reads}. "
            f"Set config simulator.kind to {found}, or name another folder."
        )


def _sizes(where: Path, shapes: Mapping[str, list[int]], config: Mapping[str, Any]) -> WanSizes:
    """Sizes of the tensors, UserError where the config says otherwise."""
    telling = {
        "patch_embedding.weight": 5,
        "proj_out.weight": 2,
        "blocks.0.ffn.net.0.proj.weight": 2,
        "condition_embedder.time_embedder.linear_1.weight": 2,
    }
    missing = [name for name in telling if len(shapes.get(name, [])) != telling[name]]
    if missing:
        raise UserError(f"{where}: missing or misshapen {few(missing)}: no Wan. {AGAIN}")
    patch, head, ffn, time = (shapes[name] for name in telling)
    width, channels = patch[0], patch[1]
    heads = config.get("num_attention_heads", config.get("num_heads", width // _HEAD_DIM))
    layers = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    text = shapes.get("condition_embedder.text_embedder.linear_1.weight", [0, 0])[1]
    said = {
        "num_layers": layers,
        "dim": width,
        "ffn_dim": ffn[0],
        "freq_dim": time[1],
        "eps": 1e-6,
        "cross_attn_norm": True,
        "patch_size": [1, 2, 2],
        **dict.fromkeys(("in_channels", "in_dim"), channels),
        **dict.fromkeys(("out_channels", "out_dim"), head[0] // 4),
        **dict.fromkeys(["text_dim"] if text else [], text),
    }
    wrong = [
        f"{key}: expected {value}, as its tensors have, got {config[key]}"
        for key, value in said.items()
        if config.get(key) not in (None, value)
    ]
    if not isinstance(heads, int) or heads < 1 or width % heads or (width // heads) % 2:
        wrong.append(f"heads: expected a divisor of the width {width}, got {heads}")
    elif config.get("attention_head_dim", width // heads) != width // heads:
        got = f"{heads} x {config['attention_head_dim']}"
        wrong.append(f"attention_head_dim: expected heads of {width} in all, got {got}")
    if channels != head[0] // 4:
        wrong.append(f"channels: expected as many in as out, got {channels} and {head[0] // 4}")
    if wrong:
        raise UserError(f"{where / 'config.json'} contradicts the weights: {few(wrong, '; ')}.")
    for key in ("image_dim", "added_kv_proj_dim"):
        if config.get(key):
            said = f"{config[key]!r}"[:40]
            print(f"{where / 'config.json'}: {key} {said}: no such tensors; left out")
    actions = shapes.get("action_mlp1.0.weight", [0, 0])[1]
    return WanSizes(heads, width // heads, layers, ffn[0], channels, text, time[1], actions)


def _constants(tensors: dict[str, Tensor], layers: int) -> Iterator[Tensor]:
    """What each block adds when the text is empty, `[E]`; takes what that is computed from out of
    `tensors`, and all that embeds texts."""
    embedder = "condition_embedder.text_embedder.linear_"
    of_nothing, weight, bias = (
        tensors[embedder + name].float() for name in ("1.bias", "2.weight", "2.bias")
    )
    word = F.linear(gelu(of_nothing), weight, bias)
    for name in [name for name in tensors if _TEXT.fullmatch(name)]:
        del tensors[name]
    for i in range(layers):
        value = word
        for layer in ("to_v", "to_out.0"):
            name = f"blocks.{i}.attn2.{layer}"
            weight, bias = tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.bias")
            value = F.linear(value, weight.float(), bias.float())
        yield value
