"""Tiny random Wan transformers in the layouts they are published in: diffusers' (in one file or in
shards), the authors' own, and WoVR's. And an embedded text, and a video VAE for them.
"""

import json
import math
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

SIZES = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 256,
    "ffn_dim": 160,
    "num_layers": 3,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "patch_size": [1, 2, 2],
    "image_dim": None,
    "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024,
}
ACTIONS = 7
AUTHORS = (  # diffusers' names to the authors', by parts of the name
    ("attn1", "self_attn"),
    ("attn2", "cross_attn"),
    ("to_out.0", "o"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("norm2", "norm3"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("proj_out", "head.head"),
)


def shapes(sizes: dict) -> dict[str, list[int]]:
    """Names, in diffusers' naming, and shapes of all tensors."""
    e = sizes["num_attention_heads"] * sizes["attention_head_dim"]
    f, z, t = sizes["ffn_dim"], sizes["in_channels"], sizes["text_dim"]
    out = {"scale_shift_table": [1, 2, e], "patch_embedding.weight": [e, z, 1, 2, 2]}
    out["patch_embedding.bias"] = [e]
    linear = {
        "condition_embedder.time_embedder.linear_1": (e, sizes["freq_dim"]),
        "condition_embedder.time_embedder.linear_2": (e, e),
        "condition_embedder.time_proj": (6 * e, e),
        "condition_embedder.text_embedder.linear_1": (e, t),
        "condition_embedder.text_embedder.linear_2": (e, e),
        "proj_out": (4 * sizes["out_channels"], e),
    }
    for i in range(sizes["num_layers"]):
        block = f"blocks.{i}"
        out[f"{block}.scale_shift_table"] = [1, 6, e]
        out |= {f"{block}.norm2.weight": [e], f"{block}.norm2.bias": [e]}
        for attention in ("attn1", "attn2"):
            layers = ("to_q", "to_k", "to_v", "to_out.0")
            linear |= {f"{block}.{attention}.{layer}": (e, e) for layer in layers}
            out |= {f"{block}.{attention}.norm_{x}.weight": [e] for x in "qk"}
        linear |= {f"{block}.ffn.net.0.proj": (f, e), f"{block}.ffn.net.2": (e, f)}
    for name, (rows, columns) in linear.items():
        out |= {f"{name}.weight": [rows, columns], f"{name}.bias": [rows]}
    return out


def action_shapes(sizes: dict) -> dict[str, list[int]]:
    """Of WoVR's action embedders."""
    e, a = sizes["num_attention_heads"] * sizes["attention_head_dim"], ACTIONS
    layers = {
        "action_mlp1.0": (e, a),
        "action_mlp1.2": (e, e),
        "action_mlp2.0": (4 * e, 4 * a),
        "action_mlp2.2": (e, 4 * e),
    }
    return {f"{n}.weight": [r, c] for n, (r, c) in layers.items()} | {
        f"{n}.bias": [r] for n, (r, _) in layers.items()
    }


def random(names: dict[str, list[int]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors far from their defaults: nothing is zero, norms are not one."""
    generator, out = torch.Generator().manual_seed(0), {}
    for name, shape in names.items():
        x = torch.randn(shape, generator=generator)
        if re.search(r"norm(_q|_k|2)\.weight", name):
            x = 1 + 0.1 * x
        elif len(shape) > 1 and "table" not in name:
            x = x * math.prod(shape[1:]) ** -0.5
        else:
            x = 0.1 * x
        out[name] = x.to(dtype)
    return out


def authors_name(name: str) -> str:
    """What Wan's authors call a tensor of diffusers."""
    if name == "scale_shift_table":
        return "head.modulation"
    name = name.replace("scale_shift_table", "modulation")
    for theirs, own in AUTHORS:
        name = re.sub(rf"(?<![a-z_]){re.escape(theirs)}(?=\.|$)", own, name)
    return name


def write(
    folder: Path,
    naming: str = "diffusers",
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    **sizes: object,
) -> dict[str, torch.Tensor]:
    """A transformer folder; its tensors by diffusers' names. naming: diffusers or authors."""
    sizes = {**SIZES, **sizes}
    folder.mkdir(parents=True)
    tensors = random(shapes(sizes), dtype)
    config = {"_class_name": "WanTransformer3DModel", "_diffusers_version": "0.33.0", **sizes}
    stored = tensors
    if naming == "authors":
        heads, dim = sizes["num_attention_heads"], sizes["attention_head_dim"]
        config = {"_class_name": "WanModel", "_diffusers_version": "0.33.0", "model_type": "ti2v"}
        config |= {"dim": heads * dim, "num_heads": heads, "eps": 1e-6, "text_len": 512}
        config |= {"in_dim": sizes["in_channels"], "out_dim": sizes["out_channels"]}
        config |= {k: sizes[k] for k in ("ffn_dim", "freq_dim", "num_layers")}
        stored = {authors_name(name): tensor for name, tensor in tensors.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save(folder, stored, shards)
    return tensors


def save(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """Under the names that diffusers and Wan's authors give the files."""
    stem, names = "diffusion_pytorch_model", list(tensors)
    if shards == 1:
        save_file(tensors, folder / f"{stem}.safetensors", {"format": "pt"})
        return
    table = {}
    for i in range(shards):
        file, part = f"{stem}-{i + 1:05d}-of-{shards:05d}.safetensors", names[i::shards]
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        table |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": table}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def write_wovr(
    folder: Path, dtype: torch.dtype = torch.bfloat16, **sizes: object
) -> dict[str, torch.Tensor]:
    """One of WoVR's folders; its tensors by diffusers' names. No config: heads are of 128."""
    sizes = {**SIZES, "num_attention_heads": 2, "attention_head_dim": 128, "num_layers": 2} | sizes
    folder.mkdir(parents=True)
    names = {n: s for n, s in shapes(sizes).items() if "text_embedder" not in n}
    tensors = random(names | action_shapes(sizes), dtype)
    stored = {authors_name(name): tensor for name, tensor in tensors.items()}
    save_file(stored, folder / "model-00001.safetensors")
    return tensors


def write_prompt(path: Path, words: int, text_dim: int = SIZES["text_dim"]) -> torch.Tensor:
    """An embedded text `[512, text_dim]`, padded with zeros."""
    text = torch.zeros(512, text_dim)
    text[:words] = torch.randn(words, text_dim, generator=torch.Generator().manual_seed(1))
    save_file({"prompt_embeds": text}, path)
    return text
