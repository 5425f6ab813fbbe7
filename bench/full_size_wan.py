"""Published world simulators at their full size on a plain machine: random Wan 2.2 TI2V 5B and WoVR
folders, loaded memory-mapped and run once.

    python -m bench.full_size_wan wan /scratch           writes a folder (11 GB), loads it, a frame
    python -m bench.full_size_wan wovr /scratch --of 50  at a fiftieth of the parameters

Writing is streamed; loading and running happen in a fresh process, which prints one JSON object:
seconds, peak memory over the weights' bytes, share of the machine's matmul rate. Weights are
random, so nothing is said of the pictures; `tests/models/test_wan*.py` say that they are right.
"""

import argparse
import dataclasses
import json
import math
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from worldenv.layouts import wan as layout  # noqa: E402

KINDS = ("wan", "wovr")
SHARD = 5 << 30  # bytes
FULL = {
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "in_channels": 48,
    "out_channels": 48,
    "text_dim": 4096,
    "ffn_dim": 14336,
    "num_layers": 30,
}


def sizes(part: int) -> dict[str, object]:
    """Of TI2V 5B, with about 1 / part of its parameters: less wide and less deep by the same."""
    less = part ** (1 / 3)
    heads = max(1, round(24 / less))
    small = {"num_attention_heads": heads, "ffn_dim": 16 * round(896 * heads / 24)}
    text = {"text_dim": 4096 if part == 1 else 512}
    return layout.SIZES | FULL | small | text | {"num_layers": max(1, round(30 / less))}


def write(kind: str, folder: Path, part: int = 1) -> None:
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

    widths = {"base_dim": 160, "decoder_base_dim": 256}
    if part > 1:
        widths = {name: max(8, 8 * round(width / part**0.5 / 8)) for name, width in widths.items()}
    torch.set_default_dtype(torch.bfloat16)
    AutoencoderKLWan(**WAN_2_2, **widths).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)


def measure(kind: str, folder: Path) -> dict[str, object]:
    """Load the folder and imagine one chunk, in this process."""
    from torch.utils.flop_counter import FlopCounterMode

    from bench.timing import limits
    from worldenv.config import SimulatorConfig
    from worldenv.envs.libero.robot import embodiment
    from worldenv.models import vae  # noqa: F401  (its imports are not the model's)
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
    before, seconds = peak(), {}
    model = timed(
        seconds, "load", lambda: (WoVR if kind == "wovr" else WanSimulator)(config, robot)
    )
    model, loaded, rows = model.eval(), peak(), np.ones(1, bool)
    state, still = model.start(1), torch.zeros(1, 1, robot.chunk, robot.A)
    image = torch.randint(256, (1, 1, robot.V, 256, 256, 3), dtype=torch.uint8)
    context = (image, torch.zeros(1, 1, robot.P), still, torch.zeros(1, dtype=torch.int64))
    timed(seconds, "prefill", lambda: model.prefill(state, rows, *context))
    with FlopCounterMode(display=False) as counter:
        frame, _ = timed(seconds, "chunk", lambda: model.step(state, still[:, 0], 1, rows))
    weights = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    rate = limits("cpu", torch.bfloat16, 2048).flops
    return {
        "model": kind,
        "parameters": sum(p.numel() for p in model.wan.parameters()),
        "weights_bytes": weights,
        "seconds": seconds,
        "peak_bytes": {"imports": before, "loaded": loaded, "in all": peak()},
        "loaded_over_weights": (loaded - before) / weights,
        "peak_over_weights": (peak() - before) / weights,
        "chunk_flops": counter.get_total_flops(),
        "of_matmul_rate": counter.get_total_flops() / seconds["chunk"] / rate,
        "matmul_flops_per_second": rate,
        "threads": torch.get_num_threads(),
        "frame": list(frame.shape),
    }


def timed(seconds: dict[str, float], name: str, work: Callable[[], object]) -> object:
    began = time.perf_counter()
    result = work()
    seconds[name] = time.perf_counter() - began
    return result


def peak() -> int:
    """Most memory that this process has had, mapped weights included; bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(kind: str, scratch: Path, part: int = 1) -> dict[str, object]:
    """Write a folder below `scratch`, measure it in a fresh process, remove it."""
    folder = scratch / f"random-{kind}"
    try:
        command = [sys.executable, "-m", "bench.full_size_wan", kind, str(folder)]
        for step in (["--write", "--of", str(part)], ["--measure"]):
            done = subprocess.run(
                [*command, *step], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
            )
        return json.loads(done.stdout.splitlines()[-1]) | {"of": part}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("scratch", type=Path, help="folder with room for 13 GB")
    parser.add_argument("--of", type=int, default=1, help="of how many parts of the parameters one")
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.write:
        write(given.kind, given.scratch, given.of)
    elif given.measure:
        print(json.dumps(measure(given.kind, given.scratch)))
    else:
        print(json.dumps(run(given.kind, given.scratch, given.of), indent=2))


if __name__ == "__main__":
    main()
