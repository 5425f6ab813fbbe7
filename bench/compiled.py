"""`python -m bench.compiled`: every Triton kernel compiled for an H100 as production launches it.

    python -m bench.compiled             the table, and results/bench/compiled-sm90-triton38.json,
                                         named by the version of Triton that compiled
    python -m bench.compiled --check     exit 1 on a spill, or where wgmma, asynchronous copies or
                                         resident warps are missing (bench/compiled_gates.json)
    python -m bench.compiled --only D128 launches whose name contains "D128"

No GPU is needed. Beside what the compiler says stands an arithmetic of one tile (bench/sass.py):
cycles against each limit of one SM, which of them binds, and the share of the tensor cores' peak
that it leaves; a bound on what can be reached, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

from bench import launches, sass
from worldenv.runtime.progress import bar
from worldenv.runtime.revision import commit

ROOT = Path(__file__).parents[1]
VERSION = "".join(triton.__version__.split(".")[:2])
RESULTS = ROOT / "results" / "bench" / f"compiled-sm90-triton{VERSION}.json"
GATES = Path(__file__).with_name("compiled_gates.json")
CAPABILITY = 90


@dataclass(frozen=True)
class Row:
    """One kernel at one launch. Bytes of spill are per thread, of shared memory per program."""

    name: str
    tile: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    resident_warps: int
    wgmma: int
    async_copies: int
    tma: int
    instructions: int
    cycles: dict[str, float]

    @property
    def binds(self) -> str:
        return max(self.cycles, key=self.cycles.__getitem__)

    @property
    def of_peak(self) -> float:
        return self.cycles["tensor"] / self.cycles[self.binds]


def compile_case(case: str, capability: int = CAPABILITY) -> list[Row]:
    """Compile one of `production()` and read the code; runs in a process of its own."""
    with launches.recorded(capability) as recorded:
        launches.production()[case]()
    rows = []
    for launch in recorded:
        machine = sass.inspect(launch.cubin)
        programs = sass.resident(machine.registers, launch.shared, launch.warps)
        sizes = [f"{v}" for n, v in launch.options.items() if n in ("BLOCK_M", "BLOCK_N", "BLOCK")]
        kind = " gaussian" if launch.options.get("GAUSSIAN") else ""
        rows.append(
            Row(
                name=f"{launch.kernel.removesuffix('_kernel')} {case}{kind}",
                tile=f"{'x'.join(sizes)}, {launch.warps} warps",
                registers=machine.registers,
                spill_bytes=machine.spill_bytes,
                shared_bytes=launch.shared,
                resident_warps=programs * launch.warps,
                wgmma=machine.wgmma,
                async_copies=machine.async_copies,
                tma=machine.tma,
                instructions=machine.loop.instructions,
                cycles=sass.cycles(machine.loop, launch.warps, max(programs, 1)),
            )
        )
    return rows


def compile_all(names: list[str], workers: int = 2) -> list[Row]:
    """Rows of these cases of `production()`, in order, compiled in `workers` processes."""
    done: dict[str, list[Row]] = {}
    spawn = multiprocessing.get_context("spawn")
    with (
        bar(len(names), "compiling for sm_90") as shown,
        ProcessPoolExecutor(workers, mp_context=spawn) as pool,
    ):
        running = {pool.submit(compile_case, name): name for name in names}
        for future in as_completed(running):
            done[running[future]] = future.result()
            shown.advance()
    return sorted((row for name in names for row in done[name]), key=lambda row: row.name)


def print_table(rows: list[Row]) -> None:
    print(
        f"{'kernel':52s} {'tile':16s} regs spill  shared warps wgmma cp.async  code"
        "  cycles of a tile: limit that binds, share of the tensor peak"
    )
    for row in rows:
        others = ", ".join(f"{n} {c:.0f}" for n, c in row.cycles.items() if n != row.binds and c)
        share = f"{row.of_peak:4.0%}" if row.wgmma else "   -"
        print(
            f"{row.name:52s} {row.tile:16s} {row.registers:4d} {row.spill_bytes:5d} "
            f"{row.shared_bytes:7d} {row.resident_warps:5d} {row.wgmma:5d} {row.async_copies:8d} "
            f"{row.instructions:5d}  {row.binds} {row.cycles[row.binds]:.0f} {share} ({others})"
        )


def missed(rows: list[Row]) -> list[str]:
    """What is not as it should be, one line each; the first gate whose start fits a name counts."""
    gates = json.loads(GATES.read_text())
    found = []
    for row in rows:
        if row.spill_bytes:
            found.append(f"{row.name}: spills {row.spill_bytes} bytes per thread")
        gate = next((g for start, g in gates.items() if row.name.startswith(start)), None)
        if gate is None:
            found.append(f"{row.name}: has no gate in {GATES.name}")
            continue
        half = " f32" not in row.name
        for name in ("wgmma", "async_copies"):
            if half and gate.get(name) and not getattr(row, name):
                found.append(f"{row.name}: no {name} in its code")
        if row.resident_warps < gate["resident_warps"]:
            least = gate["resident_warps"]
            found.append(
                f"{row.name}: {row.resident_warps} resident warps, at least {least} wanted"
            )
    return found


def save(rows: list[Row], path: Path) -> None:
    report = {
        "command": " ".join(["python", "-m", "bench.compiled", *sys.argv[1:]]),
        "commit": commit(),
        "target": f"sm_{CAPABILITY}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        },
        "rows": [asdict(row) | {"binds": row.binds, "of_peak": row.of_peak} for row in rows],
    }
    path.write_text(json.dumps(report, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compiled", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--check", action="store_true", help="exit 1 where a gate is missed")
    parser.add_argument("--only", help="launches whose name contains this")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to write")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 runs kernels in Python and compiles none: unset it")
    known = launches.production()
    names = [name for name in known if options.only is None or options.only in name]
    if not names:
        parser.error(f"--only: no launch has {options.only!r} in its name: {', '.join(known)}")
    rows = compile_all(names)
    print_table(rows)
    if options.only is None:  # a part would overwrite the whole
        save(rows, options.out)
    if not options.check:
        return 0
    faults = missed(rows)
    print("\n".join(faults) or f"{len(rows)} kernels: no spill, every gate met")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
