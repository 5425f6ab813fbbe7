"""Random OpenVLA folders in the exact published layout, of any size; written piece by piece.

write(folder)                     a tiny OpenVLA-OFT
write(folder, heads=False)        a tiny token policy
write(folder, FULL)               7.54 billion parameters in four shards
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from torch import Tensor

from worldenv.models.published_sizes import OPENVLA

KEY = "libero_spatial_no_noops"
PIECE = 1 << 24  # numbers written at once


@dataclass(frozen=True)
class Layout:
    """Sizes. The towers' depths follow from their timm names: others need those changed too."""

    image: int = 28
    dino: int = 32
    siglip: int = 16
    siglip_hidden: int = 60
    width: int = 16
    layers: int = 2
    heads: int = 2
    hidden: int = 24
    vocabulary: int = 32064
    proprio: int = 8
    actions: int = 7
    depths: tuple[int, int] = (24, 27)


TINY = Layout()
FULL = Layout(**{f.name: getattr(OPENVLA, f.name) for f in fields(OPENVLA) if f.name != "padding"})


def shapes(layout: Layout = TINY) -> dict[str, list[int]]:
    """All 982 tensors of the full size, in order; 43 of them are never used."""
    side, e = (layout.image // 14) ** 2, layout.width
    out: dict[str, list[int]] = {}
    for tower, d, hidden, depth, dino in (
        ("featurizer", layout.dino, 4 * layout.dino, layout.depths[0], True),
        ("fused_featurizer", layout.siglip, layout.siglip_hidden, layout.depths[1], False),
    ):
        own: dict[str, list[int]] = {"cls_token": [1, 1, d], "reg_token": [1, 4, d]} if dino else {}
        own |= {"pos_embed": [1, side, d], **_layer("patch_embed.proj", d, 3, 14, 14)}
        for i in range(depth):
            own |= _block(f"blocks.{i}.", d, hidden, dino)
        own |= _norm("norm", d)
        if not dino:
            own |= {"attn_pool.latent": [1, 1, d], **_layer("attn_pool.q", d, d)}
            own |= _layer("attn_pool.kv", 2 * d, d) | _layer("attn_pool.proj", d, d)
            own |= _norm("attn_pool.norm", d) | _layer("attn_pool.mlp.fc1", hidden, d)
            own |= _layer("attn_pool.mlp.fc2", d, hidden)
        out |= {f"vision_backbone.{tower}.{name}": shape for name, shape in own.items()}
    seen = layout.dino + layout.siglip
    for name, size in (("fc1", (4 * seen, seen)), ("fc2", (e, 4 * seen)), ("fc3", (e, e))):
        out |= _layer(f"projector.{name}", *size)
    out["language_model.model.embed_tokens.weight"] = [layout.vocabulary, e]
    for i in range(layout.layers):
        start = f"language_model.model.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            out[f"{start}self_attn.{name}.weight"] = [e, e]
        for name in ("gate_proj", "up_proj"):
            out[f"{start}mlp.{name}.weight"] = [layout.hidden, e]
        out[f"{start}mlp.down_proj.weight"] = [e, layout.hidden]
        out[f"{start}input_layernorm.weight"] = [e]
        out[f"{start}post_attention_layernorm.weight"] = [e]
    out["language_model.model.norm.weight"] = [e]
    out["language_model.lm_head.weight"] = [layout.vocabulary, e]
    return out


def _layer(name: str, *size: int) -> dict[str, list[int]]:
    return {f"{name}.weight": list(size), f"{name}.bias": [size[0]]}


def _norm(name: str, d: int) -> dict[str, list[int]]:
    return {f"{name}.weight": [d], f"{name}.bias": [d]}


def _block(start: str, d: int, hidden: int, dino: bool) -> dict[str, list[int]]:
    scale = {f"{start}ls{i}.scale_factor": [d] for i in (1, 2)} if dino else {}
    return {
        **_norm(f"{start}norm1", d),
        **_layer(f"{start}attn.qkv", 3 * d, d),
        **_layer(f"{start}attn.proj", d, d),
        **_norm(f"{start}norm2", d),
        **_layer(f"{start}mlp.fc1", hidden, d),
        **_layer(f"{start}mlp.fc2", d, hidden),
        **scale,
    }


def random(name: str, shape: list[int], generator: torch.Generator, count: int) -> Tensor:
    """`count` numbers of a tensor, away from what any initialisation would leave."""
    x = torch.randn(count, generator=generator)
    if name.endswith("embed_tokens.weight"):
        return 0.3 * x
    if len(shape) > 1 and not name.endswith(("token", "pos_embed", "latent")):
        return x / math.sqrt(math.prod(shape[1:]))
    ones = name.endswith("weight")
    return (0.5 if name.endswith("scale_factor") else float(ones)) + 0.1 * x


def write_shards(
    folder: Path,
    sizes: Mapping[str, list[int]],
    limit: float,
    stem: str = "model",
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Random tensors in files of at most `limit` bytes and their index, streamed."""
    code = {torch.bfloat16: ("BF16", 2), torch.float32: ("F32", 4)}[dtype]
    total = code[1] * sum(map(math.prod, sizes.values()))
    files: list[dict[str, list[int]]] = [{}]
    filled = 0
    for name, shape in sizes.items():
        more = code[1] * math.prod(shape)
        if files[-1] and filled + more > limit:
            files.append({})
            filled = 0
        files[-1][name] = shape
        filled += more
    generator = torch.Generator().manual_seed(seed)
    table = {}
    for number, held in enumerate(files, 1):
        path = folder / f"{stem}-{number:05}-of-{len(files):05}.safetensors"
        _write_file(path, held, code, dtype, generator)
        table |= dict.fromkeys(held, path.name)
    index = {"metadata": {"total_size": total}, "weight_map": table}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_file(
    path: Path,
    held: dict[str, list[int]],
    code: tuple[str, int],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    at, header = 0, {"__metadata__": {"format": "pt"}}
    for name, shape in held.items():
        end = at + code[1] * math.prod(shape)
        header[name] = {"dtype": code[0], "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in held.items():
            numbers = math.prod(shape)
            for start in range(0, numbers, PIECE):
                piece = random(name, shape, generator, min(PIECE, numbers - start))
                file.write(piece.to(dtype).view(torch.uint8).numpy().tobytes())


def config(layout: Layout = TINY) -> dict:
    """config.json; text_config holds what differs from LlamaConfig's defaults, nothing else."""
    text = {
        "model_type": "llama",
        "pad_token_id": 32000,
        "torch_dtype": "bfloat16",
        "vocab_size": layout.vocabulary,
    }
    if layout.width != FULL.width:
        text |= {
            "hidden_size": layout.width,
            "intermediate_size": layout.hidden,
            "num_attention_heads": layout.heads,
            "num_hidden_layers": layout.layers,
            "num_key_value_heads": layout.heads,
        }
    return {
        "arch_specifier": "no-align+fused-gelu-mlp",
        "architectures": ["OpenVLAForActionPrediction"],
        "auto_map": {"AutoConfig": "configuration_prismatic.OpenVLAConfig"},
        "hf_llm_id": "meta-llama/Llama-2-7b-hf",
        "image_resize_strategy": "resize-naive",
        "image_sizes": [layout.image, layout.image],
        "llm_backbone_id": "llama2-7b-pure",
        "llm_max_length": 2048,
        "model_type": "openvla",
        "n_action_bins": 256,
        "norm_stats": {"bridge_orig": statistics(layout)[KEY], "fractal": statistics(layout)[KEY]},
        "output_projector_states": False,
        "pad_to_multiple_of": 64,
        "pad_token_id": 32000,
        "text_config": text,
        "timm_model_ids": [
            "vit_large_patch14_reg4_dinov2.lvd142m",
            "vit_so400m_patch14_siglip_224",
        ],
        "timm_override_act_layers": [None, None],
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_fused_vision_backbone": True,
        "vision_backbone_id": "dinosiglip-vit-so-224px",
    }


def statistics(layout: Layout = TINY, key: str = KEY) -> dict:
    """dataset_statistics.json; the gripper's actions are not scaled."""

    def entry(dims: int, start: float) -> dict:
        low = [round(start - 0.1 * i, 3) for i in range(dims)]
        high = [round(0.9 + 0.05 * i, 3) for i in range(dims)]
        less, more = [x - 0.05 for x in low], [x + 0.05 for x in high]
        middle = {"mean": [0.1] * dims, "std": [0.3] * dims}
        return {**middle, "max": more, "min": less, "q01": low, "q99": high}

    action = entry(layout.actions, -0.7)
    action["mask"] = [True] * (layout.actions - 1) + [False]
    proprio = entry(layout.proprio, -0.2)
    return {
        key: {
            "action": action,
            "proprio": proprio,
            "num_transitions": 52970,
            "num_trajectories": 432,
        }
    }


PREPROCESSOR = {
    "auto_map": {"AutoImageProcessor": "processing_prismatic.PrismaticImageProcessor"},
    "image_processor_type": "PrismaticImageProcessor",
    "image_resize_strategy": "resize-naive",
    "means": [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5]],
    "stds": [[0.229, 0.224, 0.225], [0.5, 0.5, 0.5]],
    "tvf_do_letterbox": False,
    "tvf_normalize_params": [
        {
            "inplace": False,
            "mean": [0.484375, 0.455078125, 0.40625],
            "std": [0.228515625, 0.2236328125, 0.224609375],
        },
        {"inplace": False, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    ],
    "use_fused_vision_backbone": True,
}


def write_tokenizer(folder: Path) -> None:
    """A stand-in for Llama-2's with the ids that matter; words are spelt letter by letter."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": 3 + i for i in range(256)}}
    letters = {chr(c): 29872 + i for i, c in enumerate(range(33, 127))}
    vocabulary |= {f"<dummy{i}>": i for i in range(259, 29871)} | {"▁": 29871} | letters
    vocabulary |= {f"<dummy{i}>": i for i in range(29872 + len(letters), 32000)}
    model = models.BPE(
        vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    words = ("<unk>", "<s>", "</s>", "<PAD>")
    tokenizer.add_special_tokens([AddedToken(w, normalized=False, special=True) for w in words])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<PAD>", "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "added_tokens.json").write_text('{"<PAD>": 32000}')
    more = {"tokenizer_class": "LlamaTokenizer", "processor_class": "PrismaticProcessor"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**special, **more}))


def head_shapes(layout: Layout = TINY) -> dict[str, list[int]]:
    """The L1 action head, as it is named within `module.`."""
    e, wide = layout.width, layout.actions * layout.width
    out = _norm("model.layer_norm1", wide) | _layer("model.fc1", e, wide)
    for i in range(2):
        out |= _norm(f"model.mlp_resnet_blocks.{i}.ffn.0", e)
        out |= _layer(f"model.mlp_resnet_blocks.{i}.ffn.1", e, e)
    return out | _norm("model.layer_norm2", e) | _layer("model.fc2", layout.actions, e)


def component(
    sizes: Mapping[str, list[int]], seed: int, prefix: str = "module."
) -> dict[str, Tensor]:
    """Random tensors of a .pt file."""
    generator = torch.Generator().manual_seed(seed)
    return {
        prefix + name: random(name, shape, generator, math.prod(shape)).view(shape)
        for name, shape in sizes.items()
    }


def adapter_shapes(layers: Mapping[str, list[int]], rank: int) -> dict[str, list[int]]:
    """Published names of an adapter's tensors; layers: weights' names and shapes."""
    out = {}
    for name, (rows, *inner) in layers.items():
        last = [1] * (len(inner) - 1)  # of a convolution: one pixel
        start = f"base_model.model.{name.removesuffix('.weight')}"
        out |= {f"{start}.lora_A.weight": [rank, *inner]}
        out |= {f"{start}.lora_B.weight": [rows, rank, *last]}
    return out


def write_adapter(
    folder: Path, layout: Layout = TINY, rank: int = 4, alpha: int = 2, more: bool = False
) -> None:
    """lora_adapter/ as peft 0.11 wrote it: of all linear layers, the unused ones too; `more`: of
    patch embeddings and the language model's head as well, as RLinf's."""
    also = ("patch_embed.proj.weight", "lm_head.weight") if more else ()
    layers = {
        n: s
        for n, s in shapes(layout).items()
        if n.endswith(also)
        or (len(s) == 2 and not n.endswith(("embed_tokens.weight", "lm_head.weight")))
    }
    (folder / "lora_adapter").mkdir()
    sizes = adapter_shapes(layers, rank)
    write_shards(folder / "lora_adapter", sizes, math.inf, "adapter_model", 3, torch.float32)
    (folder / "lora_adapter/adapter_model.safetensors.index.json").unlink()
    only = folder / "lora_adapter/adapter_model-00001-of-00001.safetensors"
    only.rename(folder / "lora_adapter/adapter_model.safetensors")
    described = {
        "alpha_pattern": {},
        "auto_mapping": {"base_model_class": "OpenVLAForActionPrediction"},
        "base_model_name_or_path": "openvla/openvla-7b",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": "gaussian",
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "target_modules": sorted({n.split(".")[-2] for n in layers}),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / "lora_adapter/adapter_config.json").write_text(json.dumps(described))


def write(
    folder: Path, layout: Layout = TINY, *, heads: bool = True, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """The whole folder; heads: OpenVLA-OFT's .pt files, which token policies lack."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = shapes(layout)
    # As published where the size is; always four files.
    limit = 5e9 if layout == FULL else 0.3 * dtype.itemsize * sum(map(math.prod, sizes.values()))
    write_shards(folder, sizes, limit, dtype=dtype)
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config(layout), indent=2))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    (folder / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    (folder / "dataset_statistics.json").write_text(json.dumps(statistics(layout)))
    if heads:
        head = {n: t.bfloat16() for n, t in component(head_shapes(layout), 1).items()}
        torch.save(head, folder / "action_head--150000_checkpoint.pt")
        sizes = _layer("fc1", layout.width, layout.proprio)
        sizes |= _layer("fc2", layout.width, layout.width)
        torch.save(component(sizes, 2), folder / "proprio_projector--150000_checkpoint.pt")
    return folder
