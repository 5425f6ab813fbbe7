"""Published models at their full size: do they load, in which memory, and how fast do they run?

    python -m bench.full_size --scratch DIR              every case (tens of GB and minutes each)
    python -m bench.full_size openvla-oft --scratch DIR  one of them
    python -m bench.full_size --small --scratch DIR      at about a fiftieth of the size

A case writes a random folder in the published layout into the scratch folder, piece by piece, and
uses it once in a fresh process: load, and one decision or frame. Each case's JSON is printed, and
written to results/bench/full-size-<case>-<machine>.json unless small: seconds, peak memory over the
bytes of the weights, and the share of this machine's own rate of multiplying matrices that was
reached. The folder is removed afterwards (--keep leaves it, and uses one that is there).
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.__main__ import RESULTS, machine_file, origin
from worldenv.runtime.errors import UserError
from worldenv.stages.run import write_json

ROOT = Path(__file__).parents[1]
GIB = 1 << 30


@dataclass(frozen=True)
class Case:
    """A published model. What needs its library is imported by the functions, as each case runs in
    a process of its own."""

    gigabytes: float  # on disk, at full size
    write: Callable[[Path, bool], None]  # the folder; whether small
    load: Callable[[Path], Callable[[], object]]  # what to do once with the model


def openvla_layout(small: bool) -> object:
    """Sizes of the published OpenVLA, or an eighth of its widths."""
    from worldenv.layouts import openvla

    width = {"dino": 128, "siglip": 144, "siglip_hidden": 538, "width": 512, "hidden": 1376}
    return replace(openvla.FULL, **width, heads=4) if small else openvla.FULL


def write_openvla(folder: Path, small: bool) -> None:
    """An OpenVLA-OFT folder of four bf16 shards."""
    from worldenv.layouts import openvla

    openvla.write(folder, openvla_layout(small))


def load_openvla(folder: Path) -> Callable[[], object]:
    """One decision for the benchmark's robot, two cameras of 256 pixels and proprio."""
    from worldenv.config import PolicyConfig
    from worldenv.envs.libero.robot import embodiment
    from worldenv.models import openvla_folder

    robot = embodiment(256)
    config = PolicyConfig(kind="openvla-oft", folder=folder)
    policy = openvla_folder.load(config, robot, train=False)
    generator = torch.Generator().manual_seed(0)
    observation = {
        "image": torch.randint(
            0, 256, (1, robot.V, *[robot.image_size] * 2, 3), dtype=torch.uint8, generator=generator
        ),
        "proprio": 0.3 * torch.randn(1, robot.P, generator=generator),
        "instruction": ["pick up the black bowl and place it on the plate"],
    }
    return lambda: policy.command(policy(observation)[0])


def world(kind: str) -> Case:
    """A world simulator of the size of Wan 2.2 TI2V 5B: one chunk."""

    def write(folder: Path, small: bool) -> None:
        from bench import full_size_wan

        full_size_wan.write(kind, folder, 50 if small else 1)

    def load(folder: Path) -> Callable[[], object]:
        from bench import full_size_wan

        return full_size_wan.load(kind, folder)

    return Case(11.6, write, load)


CASES = {
    "openvla-oft": Case(15.5, write_openvla, load_openvla),
    "wan": world("wan"),
    "wovr": world("wovr"),
}


def multiplication(dtype: torch.dtype) -> float:
    """FLOP/s of this machine at its best of five products of square matrices."""
    side = 2048
    a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begun)
    return 2 * side**3 / best


def peak() -> int:
    """Most bytes of memory this process has held, mapped files included."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024


def weights(folder: Path) -> int:
    """Bytes of the folder's tensors."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.suffix in (".safetensors", ".pt"))


@torch.inference_mode()
def use(case: Case, folder: Path) -> dict[str, object]:
    """What a fresh process measures."""
    before = peak()
    begun = time.perf_counter()
    act = case.load(folder)
    loaded, held = time.perf_counter(), peak()
    with FlopCounterMode(display=False) as counter:
        out = act()
    spent, most = time.perf_counter() - loaded, peak()
    if not isinstance(out, torch.Tensor) or not out.isfinite().all():
        raise RuntimeError(f"expected finite numbers, got {out}")
    flops, size = counter.get_total_flops(), weights(folder)
    rates = {str(d)[6:]: multiplication(d) for d in (torch.bfloat16, torch.float32)}
    return {
        "weight_bytes": size,
        "load_seconds": loaded - begun,
        "use_seconds": spent,
        "peak_bytes_before": before,
        "peak_bytes_loaded": held,
        "peak_bytes": most,
        "peak_over_weights": most / size,
        "flops": flops,
        "flops_per_second": flops / spent,
        "matmul_flops_per_second": rates,
        "share_of_matmul": {name: flops / spent / rate for name, rate in rates.items()},
    }


def run(name: str, scratch: Path, small: bool, keep: bool) -> dict[str, object]:
    """Write, use in a fresh process, remove."""
    folder = scratch / (f"{name}-small" if small else name)
    wanted = CASES[name].gigabytes * 1e9 / (50 if small else 1)
    done = folder / ".written"
    row: dict[str, object] = {"case": name, "small": small}
    if not (keep and done.exists()):
        shutil.rmtree(folder, ignore_errors=True)
        scratch.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(scratch).free
        if free < 1.1 * wanted:
            raise UserError(
                f"--scratch {scratch}: expected {1.1 * wanted / GIB:.1f} GiB of room for {name}, "
                f"got {free / GIB:.1f}. Name another folder."
            )
        begun = time.perf_counter()
        CASES[name].write(folder, small)
        done.touch()
        row["write_seconds"] = time.perf_counter() - begun
    try:
        command = [sys.executable, "-m", "bench.full_size", "--use", name, "--scratch", str(folder)]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise RuntimeError(f"{name}: {ended.stderr[-4000:]}")
        return row | json.loads(ended.stdout.splitlines()[-1])
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Parses the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--scratch", type=Path, required=True, help="where folders are written")
    parser.add_argument("--small", action="store_true", help="at a fiftieth of the size")
    parser.add_argument("--keep", action="store_true", help="leave the folders, use those there")
    parser.add_argument("--use", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.use:
        print(json.dumps(use(CASES[arguments.use], arguments.scratch)))
        return 0
    unknown = [name for name in arguments.cases if name not in CASES]
    if unknown:
        parser.error(f"unknown case {unknown[0]!r}; known: {', '.join(CASES)}")
    for name in arguments.cases or CASES:
        try:
            row = run(name, arguments.scratch, arguments.small, arguments.keep)
        except UserError as error:
            parser.error(str(error))
        report = origin("bench.full_size") | row
        print(json.dumps(report, indent=2), flush=True)
        if not arguments.small:
            write_json(RESULTS / f"full-size-{name}-{machine_file()}", report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
