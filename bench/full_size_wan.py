"""Random folders of Wan 2.2 TI2V 5B and of WoVR for `bench.full_size`, and one chunk with them.

Writing is streamed: a few MB are in memory at a time. The video VAE, of 2.2, is beside the
transformer. What is imagined is noise; `tests/models/test_wan*.py` say that it is the right one.
"""

import dataclasses
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from worldenv.layouts import wan as layout
from worldenv.models.published_sizes import VAE_2_2_WIDTHS, WAN_2_2_5B

KINDS = ("wan", "wovr")
SHARD = 5 << 30  # bytes
FULL = {
    "num_attention_heads": WAN_2_2_5B.heads,
    "attention_head_dim": WAN_2_2_5B.head_dim,
    "in_channels": WAN_2_2_5B.channels,
    "out_channels": WAN_2_2_5B.channels,
    "text_dim": WAN_2_2_5B.text_dim,
    "ffn_dim": WAN_2_2_5B.ffn,
    "num_layers": WAN_2_2_5B.layers,
}


def sizes(part: int) -> dict[str, object]:
    """Of TI2V 5B, with about 1 / part of its parameters: less wide and less deep by the same."""
    less = part ** (1 / 3)
    heads = max(1, round(24 / less))
    small = {"num_attention_heads": heads, "ffn_dim": 16 * round(896 * heads / 24)}
    text = {"text_dim": 4096 if part == 1 else 512}
    return layout.SIZES | FULL | small | text | {"num_layers": max(1, round(30 / less))}


def write(kind: str, folder: Path, part: int) -> None:
    """A published folder of random bf16 weights, transformer and video VAE, tensor by tensor."""
    chosen = sizes(part)
    shapes = layout.shapes(chosen)
    if kind == "wovr":
        shapes = {n: s for n, s in shapes.items() if "text_embedder" not in n}
        shapes |= layout.action_shapes(chosen)
        shapes = {layout.authors_name(name): shape for name, shape in shapes.items()}
        stream(folder / "model-00001.safetensors", shapes)
    else:
        inner = folder / "transformer"
        inner.mkdir(parents=True)
        config = {"_class_name": "WanTransformer3DModel", **chosen}
        (inner / "config.json").write_text(json.dumps(config))
        write_shards(inner, shapes)
    write_vae(folder / "vae", part)


def write_shards(folder: Path, shapes: dict[str, list[int]]) -> None:
    """Files of at most SHARD bytes and their index."""
    parts: list[dict[str, list[int]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        size += 2 * math.prod(shape)
        if size > SHARD:
            parts.append({})
            size = 2 * math.prod(shape)
        parts[-1][name] = shape
    table = {}
    for i, tensors in enumerate(parts):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        stream(folder / file, tensors)
        table |= dict.fromkeys(tensors, file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))


def stream(path: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file of random bf16 tensors, a few MB of which are in memory at a time."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    pool, at_once = torch.randn(1 << 22), 1 << 22
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            count, scale = math.prod(shape), math.prod(shape[1:]) ** -0.5 if shape[1:] else 0.1
            rows = (pool * scale + (1 if ".norm" in name and "weight" in name else 0)).bfloat16()
            data = rows.view(torch.uint8).numpy()
            for begin in range(0, count, at_once):
                file.write(data[: 2 * min(at_once, count - begin)].tobytes())


def write_vae(folder: Path, part: int) -> None:
    """Wan 2.2's video VAE with random weights, in diffusers' layout."""
    from diffusers import AutoencoderKLWan

    from worldenv.models.vae_folder import WAN_2_2

    widths = VAE_2_2_WIDTHS
    if part > 1:
        widths = {name: max(8, 8 * round(width / part**0.5 / 8)) for name, width in widths.items()}
    torch.set_default_dtype(torch.bfloat16)
    AutoencoderKLWan(**WAN_2_2, **widths).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)


def load(kind: str, folder: Path) -> Callable[[], Tensor]:
    """What imagines one chunk, in one pass, with the model in the folder."""
    from worldenv.config import SimulatorConfig
    from worldenv.envs.libero.robot import embodiment
    from worldenv.models.wan_world import WanSimulator
    from worldenv.models.wovr import WoVR

    robot = embodiment(256)
    if kind == "wovr":
        robot = dataclasses.replace(robot, views=robot.views[:1])
    config = SimulatorConfig(
        kind=kind,
        folder=folder,
        tokenizer="wan-vae",
        tokenizer_folder=folder / "vae",
        tokenizer_precision="bfloat16",
        precision="bfloat16",
        patch=32,
        window=8,
    )
    model = {"wan": WanSimulator, "wovr": WoVR}[kind](config, robot).eval()
    state, rows = model.start(1), np.ones(1, bool)
    still = torch.zeros(1, 1, robot.chunk, robot.A)
    image = torch.randint(256, (1, 1, robot.V, 256, 256, 3), dtype=torch.uint8)
    context = (image, torch.zeros(1, 1, robot.P), still, torch.zeros(1, dtype=torch.int64))
    model.prefill(state, rows, *context)
    return lambda: model.step(state, still[:, 0], 1, rows)[0]
