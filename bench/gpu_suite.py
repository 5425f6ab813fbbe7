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
import math
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.timing import limits

ROOT = Path(__file__).parents[1]
PARTS = ("build", "tests", "bench", "generation")
# Wan-shaped: layers, width, heads. 64 tokens are 256x256 pixels through a VAE of stride 16 and
# patches of 2.
SIZES = {
    "3M": (8, 192, 3),
    "150M": (12, 1024, 16),
    "1.3B": (30, 1536, 12),
    "5B": (30, 3072, 24),
}
TOKENS, PAST, STEPS, VIDEO_FRAMES_PER_LATENT = 64, 8, 4, 4


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
def generate(name: str, batch: int, flops: float) -> dict[str, float]:
    """Frames per second of the denoiser with random weights: N steps and a cache pass per latent
    frame.

    One step is captured in a CUDA graph; the ring is full, so every frame costs the same.
    """
    from bench.denoiser import Denoiser
    from worldenv.ops import FrameCache

    layers, width, heads = SIZES[name]
    with torch.device("cuda"):
        model = Denoiser(layers, width, heads, math.isqrt(TOKENS))
    rotary = model.rotary(torch.tensor(PAST, device="cuda"))
    model = model.bfloat16()
    parameters = sum(p.numel() for p in model.parameters())
    cache = FrameCache(
        layers, batch, PAST, TOKENS, heads, width // heads, dtype=torch.bfloat16, device="cuda"
    )
    x = torch.randn(batch, TOKENS, width, device="cuda", dtype=torch.bfloat16)
    for _ in range(PAST + 1):
        model.step(x, rotary, cache, append=True)
        cache.advance()
    torch.cuda.synchronize()
    graphs = {}
    for append in (False, True):
        graphs[append] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[append]):
            model.step(x, rotary, cache, append=append)

    def frame() -> None:
        for _ in range(STEPS):
            graphs[False].replay()
        graphs[True].replay()
        cache.advance()

    frame()
    torch.cuda.synchronize()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    count = 10
    start.record()
    for _ in range(count):
        frame()
    stop.record()
    torch.cuda.synchronize()
    seconds = start.elapsed_time(stop) / 1e3 / count
    attention = 4.0 * layers * TOKENS**2 * (PAST + 1) * width
    work = (STEPS + 1) * batch * (2.0 * TOKENS * parameters + attention)
    return {
        "parameters": parameters,
        "batch": batch,
        "video_frames_per_second": batch * VIDEO_FRAMES_PER_LATENT / seconds,
        "milliseconds_per_latent_frame": 1e3 * seconds,
        "of_matmul_rate": work / seconds / flops,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
    }


def generation() -> dict[str, object]:
    """Every size at batch 1 and 16, beside the measured matmul rate and copy bandwidth."""
    reach = limits("cuda", torch.bfloat16, 8192)
    rows: dict[str, object] = {"matmul_flops": reach.flops, "copy_bytes": reach.bytes_per_second}
    for name in SIZES:
        for batch in (1, 16):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
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
