"""`python -m bench`: measure every case, print the table, write results/bench/<machine>.json.

    python -m bench               the table
    python -m bench --check       only what has a gate, against that rival alone; fail where a ratio
                                  is under its gate
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
from dataclasses import asdict, replace
from pathlib import Path

import torch

from bench import cases, denoiser
from bench.timing import Case, Limits, Row, gate, limits, measure
from worldenv.ops import backend as backends
from worldenv.runtime.errors import UserError, unknown
from worldenv.runtime.progress import track
from worldenv.runtime.revision import commit

GATES = Path(__file__).with_name("gates.json")
RESULTS = Path(__file__).parents[1] / "results" / "bench"
AMX = 4  # as csrc/cpu/isa.h numbers it


def all_cases(compiled: bool, only: str | None, once: bool = False) -> list[Case]:
    """The cases of this device whose name contains `only`.

    Raises:
        UserError: there is none; the message names the nearest.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = [*(cases.gpu_cases() if device == "cuda" else cases.cpu_cases(compiled))]
    found += denoiser.cases(device, once)
    wanted = [case for case in found if only is None or only in case.name]
    if not wanted:
        raise unknown("case", only, {case.op for case in found})
    return wanted


def gates() -> dict[str, float]:
    """Least ratio to the first rival, by case, of machines like this one."""
    device = "cuda" if torch.cuda.is_available() else "amx" if machine()["isa"] == AMX else "cpu"
    return json.loads(GATES.read_text())[device]


def gated(case: Case) -> Case:
    """The case as a gate needs it: against its first rival alone."""
    return replace(case, rivals=dict(list(case.rivals.items())[:1]))


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


def origin(module: str, **facts: object) -> dict[str, object]:
    """What a result is to be repeated by: the command that `module` was run with, without places of
    this machine, the commit, and the machine; facts: of the latter."""
    arguments = (Path(a).name if a.startswith("/") else a for a in sys.argv[1:])
    return {
        "command": " ".join(["python", "-m", module, *arguments]),
        "commit": commit(),
        "machine": {**machine(), **facts},
    }


def machine_file() -> str:
    """Name of the file that holds this machine's results."""
    return re.sub(r"[^A-Za-z0-9]+", "-", str(machine()["processor"])).strip("-").lower() + ".json"


def print_row(row: Row) -> None:
    share = "" if row.of_limit is None else f"  {row.of_limit:4.0%} of limit"
    print(f"{row.case:56s} {row.seconds * 1e3:10.3f} ms{share}")
    for name, ratio in row.ratios.items():
        print(f"    x{ratio:6.2f}  over {name} ({row.rivals[name] * 1e3:.3f} ms)", flush=True)


def check(rows: list[Row], least: dict[str, float]) -> int:
    """Number of gates missed; a gate whose case was not measured counts as well."""
    measured = {row.case: next(iter(row.ratios.values())) for row in rows if row.rivals}
    missed = 0
    for name, ratio in least.items():
        got = measured.get(name)
        if got is None or got < ratio:
            missed += 1
            print(f"under its gate: {name}: {'not measured' if got is None else got} < {ratio}")
    print(f"{len(least) - missed} of {len(least)} gates met")
    return missed


def save(rows: list[Row], reach: dict[str, Limits]) -> Path:
    """results/bench/<processor>.json: the machine, its limits and every row."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    report = {
        **origin("bench"),
        "matmul_flops": {dtype: limit.flops for dtype, limit in reach.items()},
        "copy_bytes_per_second": reach["float32"].bytes_per_second,
        "rows": [asdict(row) | {"ratios": row.ratios} for row in rows],
    }
    path = RESULTS / machine_file()
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
    try:
        return run(options)
    except UserError as error:
        parser.error(str(error))


def run(options: argparse.Namespace) -> int:
    """Measure, or only check, what the options ask for; the exit status."""
    torch.manual_seed(torch.seed() if not options.once else 0)
    torch.set_num_threads(1)
    compiled = not (options.no_compile or options.once or options.check)
    found = all_cases(compiled, options.only, options.once)
    if options.once:
        for case in found:
            gate(case)
        print(f"{len(found)} cases agree with their references")
        return 0
    least = {}
    if options.check:
        least = {n: x for n, x in gates().items() if options.only is None or options.only in n}
        found = [gated(case) for case in found if case.name in least]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024
    reach = {str(x)[6:]: limits(device, x, size) for x in (torch.float32, torch.bfloat16)}
    print(machine())
    for dtype, limit in reach.items():
        print(f"matmul {dtype} {limit.flops / 1e9:.0f} GFLOP/s")
    print(f"copy {reach['float32'].bytes_per_second / 1e9:.1f} GB/s")
    rows = []
    for case in track(found, "bench"):
        rows.append(measure(case, reach[case.dtype], options.seconds))
        print_row(rows[-1])
    if options.check:
        return 1 if check(rows, least) else 0
    if options.only is None:  # a part would overwrite the whole
        print(save(rows, reach))
    return 0


if __name__ == "__main__":
    sys.exit(main())
