"""Everything that needs a GPU, in one call of under ten minutes: build, tests, roofline,
benchmarks, generation.

    python -m bench.gpu_suite --out $OUT            all parts
    python -m bench.gpu_suite --parts generation    one of: build tests bench generation

Each part writes its own JSON as soon as it is done, so that a call cut short still leaves what it
had.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bench.timing import clock, limits
from worldenv.config import SimulatorConfig
from worldenv.envs.libero.robot import embodiment
from worldenv.models.simulator import Simulator

ROOT = Path(__file__).parents[1]
PARTS = ("build", "tests", "bench", "generation")
# As Wan's transformers of those sizes: layers, width, heads, hidden width of the MLP. 64 tokens are
# 256x256 pixels through a VAE of stride 16 and patches of 2, and stand for four frames of video.
SIZES = {
    "3M": (8, 192, 3, 768),
    "150M": (12, 1024, 16, 4096),
    "1.3B": (30, 1536, 12, 8960),
    "5B": (30, 3072, 24, 14336),
}
PAST, STEPS, VIDEO_FRAMES_PER_LATENT = 8, 4, 4


def run(command: list[str], seconds: int) -> dict[str, object]:
    """Run a command in the repository; what it said last and how it ended."""
    began = time.time()
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {"command": command, "exit": None, "seconds": seconds, "tail": "timed out"}
    tail = (done.stdout + done.stderr)[-4000:]
    return {
        "command": command,
        "exit": done.returncode,
        "seconds": time.time() - began,
        "tail": tail,
    }


def build() -> dict[str, object]:
    return run([sys.executable, "setup.py", "build_ext", "--inplace"], 200)


def tests() -> dict[str, object]:
    paths = ["tests/kernels/test_on_gpu.py", "tests/kernels/test_cuda_sources.py", "tests/ops"]
    return run([sys.executable, "-m", "pytest", "-q", "-rfEs", *paths], 300)


def bench() -> dict[str, object]:
    return run([sys.executable, "-m", "bench", "--seconds", "1"], 300)


@torch.no_grad()
def generate(
    name: str, batch: int, flops: float, device: str = "cuda", frames: int = 10
) -> dict[str, float]:
    """Frames per second of the simulator with random weights in bf16, ring full: N steps and a
    cache pass per latent frame. On a GPU a frame is one CUDA graph."""
    layers, width, heads, hidden = SIZES[name]
    config = SimulatorConfig(
        patch=32, width=width, layers=layers, heads=heads, mlp_ratio=hidden / width, window=PAST,
        prediction="velocity", precision="bfloat16",
    )  # fmt: skip
    with torch.device(device):
        robot = replace(embodiment(256), views=("agentview",))
        model = Simulator(config, robot).eval().for_generation()
        state, rows = model.start(batch), np.ones(batch, dtype=bool)
        image = torch.randint(256, (batch, 1, 1, 256, 256, 3), dtype=torch.uint8)
        still, action = torch.zeros(batch, 1, 8, 7), torch.randn(batch, 8, 7)
        model.prefill(state, rows, image, torch.zeros(batch, 1, 8), still, torch.arange(batch))
    for _ in range(PAST):
        model.step(state, action, STEPS, rows)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = min(clock(lambda: model.step(state, action, STEPS, rows), frames) for _ in range(3))
    per_frame = ("action", "time", "dynamics", "proprio", "tokenizer")  # not once per token
    parameters = {n: p.numel() for n, p in model.named_parameters()}
    per_token = sum(k for n, k in parameters.items() if not any(x in n for x in per_frame))
    attention = 4.0 * layers * model.tokens**2 * (PAST + 1) * width
    work = (STEPS + 1) * batch * (2.0 * model.tokens * per_token + attention)
    return {
        "parameters": sum(parameters.values()),
        "batch": batch,
        "video_frames_per_second": batch * VIDEO_FRAMES_PER_LATENT / seconds,
        "milliseconds_per_latent_frame": 1e3 * seconds,
        "of_matmul_rate": work / seconds / flops,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else 0,
    }


def generation() -> dict[str, object]:
    """Every size at batch 1 and 16, beside the measured matmul rate and copy bandwidth."""
    reach = limits("cuda", torch.bfloat16, 8192)
    rows: dict[str, object] = {"matmul_flops": reach.flops, "copy_bytes": reach.bytes_per_second}
    for name in SIZES:
        for batch in (1, 16):
            rows[f"{name} batch {batch}"] = generate(name, batch, reach.flops)
            print(name, batch, rows[f"{name} batch {batch}"], flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench" / "gpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.gpu_suite: no CUDA device was found; run it on a GPU machine", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    functions = {"build": build, "tests": tests, "bench": bench, "generation": generation}
    failed = 0
    for part in options.parts:
        result = {"device": torch.cuda.get_device_name(), part: functions[part]()}
        (options.out / f"{part}.json").write_text(json.dumps(result, indent=1) + "\n")
        code = result[part].get("exit", 0)
        failed += code != 0
        print(f"{part}: {'ok' if code == 0 else 'failed'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
