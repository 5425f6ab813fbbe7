"""`python -m bench`: measure every case, print the table, write results/bench/<machine>.json.

    python -m bench               the table
    python -m bench --check       fail where a ratio is under its gate
    python -m bench --once        correctness only
    python -m bench --only gae    cases whose name contains "gae"
    python -m bench --no-compile  without torch.compile among the rivals

Gates are ratios to the first rival of a case, in bench/gates.json: 0.8 of what was measured, 0.6
for cases of a few microseconds, which a busy machine disturbs most. A CPU with AMX has gates of its
own. Absolute times are never gated.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from bench import cases, denoiser
from bench.timing import Case, Limits, Row, gate, limits, measure
from worldenv.ops import backend as backends
from worldenv.runtime.revision import commit

GATES = Path(__file__).with_name("gates.json")
RESULTS = Path(__file__).parents[1] / "results" / "bench"
AMX = 4  # as csrc/cpu/isa.h numbers it


def all_cases(compiled: bool, only: str | None, once: bool = False) -> Iterator[Case]:
    on_gpu = torch.cuda.is_available()
    found = cases.gpu_cases() if on_gpu else cases.cpu_cases(compiled)
    yield from (c for c in found if only is None or only in c.name)
    for case in denoiser.cases("cuda" if on_gpu else "cpu", once):
        if only is None or only in case.name:
            yield case


def machine() -> dict[str, object]:
    """What the figures were taken on."""
    if torch.cuda.is_available():
        processor = torch.cuda.get_device_name()
    else:
        text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        match = re.search(r"model name\s*:\s*(.+)", text)
        processor = match.group(1) if match else platform.processor()
    isa = None if backends.NO_CPP else int(torch.ops.worldenv.best_isa())
    return {
        "processor": processor,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "isa": isa,
        "python": platform.python_version(),
    }


def machine_file(about: dict[str, object]) -> str:
    """Name of the file that holds a machine's results."""
    return re.sub(r"[^A-Za-z0-9]+", "-", str(about["processor"])).strip("-").lower() + ".json"


def print_row(row: Row) -> None:
    share = "" if row.of_limit is None else f"  {row.of_limit:4.0%} of limit"
    print(f"{row.case:56s} {row.seconds * 1e3:10.3f} ms{share}")
    for name, ratio in row.ratios.items():
        print(f"    x{ratio:6.2f}  over {name} ({row.rivals[name] * 1e3:.3f} ms)", flush=True)


def check(rows: list[Row], only: str | None) -> int:
    """Number of gates missed; a gate whose case was not measured counts as well."""
    device = "cuda" if torch.cuda.is_available() else "amx" if machine()["isa"] == AMX else "cpu"
    gates = json.loads(GATES.read_text())[device]
    gates = {name: least for name, least in gates.items() if only is None or only in name}
    measured = {row.case: next(iter(row.ratios.values())) for row in rows if row.rivals}
    missed = 0
    for name, least in gates.items():
        ratio = measured.get(name)
        if ratio is None or ratio < least:
            missed += 1
            print(f"under its gate: {name}: {ratio if ratio else 'not measured'} < {least}")
    print(f"{len(gates) - missed} of {len(gates)} gates met")
    return missed


def save(rows: list[Row], reach: dict[str, Limits]) -> Path:
    """results/bench/<processor>.json: the machine, its limits and every row."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    report = {
        "command": " ".join(["python", "-m", "bench", *sys.argv[1:]]),
        "commit": commit(),
        "machine": machine(),
        "matmul_flops": {dtype: limit.flops for dtype, limit in reach.items()},
        "copy_bytes_per_second": reach["float32"].bytes_per_second,
        "rows": [asdict(row) | {"ratios": row.ratios} for row in rows],
    }
    path = RESULTS / machine_file(machine())
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail where a ratio is under its gate")
    parser.add_argument("--once", action="store_true", help="run each case once, for correctness")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes minutes"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="time per case")
    options = parser.parse_args()
    torch.manual_seed(torch.seed() if not options.once else 0)
    torch.set_num_threads(1)
    if options.once:
        count = 0
        for case in all_cases(False, options.only, once=True):
            gate(case)
            count += 1
        print(f"{count} cases agree with their references")
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024
    reach = {str(x)[6:]: limits(device, x, size) for x in (torch.float32, torch.bfloat16)}
    print(machine())
    for dtype, limit in reach.items():
        print(f"matmul {dtype} {limit.flops / 1e9:.0f} GFLOP/s")
    print(f"copy {reach['float32'].bytes_per_second / 1e9:.1f} GB/s")
    rows = []
    for case in all_cases(not options.no_compile, options.only):
        rows.append(measure(case, reach[case.dtype], options.seconds))
        print_row(rows[-1])
    if options.only is None:  # a part would overwrite the whole
        print(save(rows, reach))
    return 1 if options.check and check(rows, options.only) else 0


if __name__ == "__main__":
    sys.exit(main())
