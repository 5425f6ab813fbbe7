"""The region of kernels: how many times as fast as each rival, of every machine measured."""

import re
from pathlib import Path
from typing import Any

from bench.results.defaults import NOT_YET
from bench.results.runs import processor, prose, read, table

_SHORT = {"float32": "f32", "bfloat16": "bf16"}


def kernels(results: Path) -> str:
    """A row for each case, a column for each machine and precision, a figure for each rival."""
    found = {}
    for path in sorted((results / "bench").glob("*.json")):
        content = read(path)
        if isinstance(content, dict) and "matmul_flops" in content:
            found[processor(content["machine"])] = content
    if not found:
        return NOT_YET
    ratios = {(name, *key): value for name, c in found.items() for key, value in _cases(c).items()}
    cases = dict.fromkeys(case for _, case, _ in ratios)
    columns = [(name, kind) for name in found for kind in _SHORT]
    columns = [c for c in columns if any((c[0], case, c[1]) in ratios for case in cases)]
    rows = []
    for case in cases:
        rivals = dict.fromkeys(r for key, row in ratios.items() if key[1] == case for r in row)
        cells = (_cell(ratios.get((name, case, kind)), rivals) for name, kind in columns)
        rows.append((f"`{case}`", "; ".join(rivals), *cells))
    head = ("case", "rivals", *(f"{name}, {_SHORT[kind]}" for name, kind in columns))
    commits = [
        f"{n} `{c['commit'][:7]}`" if "commit" in c else f"{n} unrecorded" for n, c in found.items()
    ]
    return "\n\n".join((table(head, rows), prose(f"One thread; commits: {', '.join(commits)}.")))


def _cases(content: dict[str, Any]) -> dict[tuple[str, str], dict[str, float]]:
    """Ratios by case without its precision, and precision."""
    found = {}
    for row in content["rows"]:
        case, kind = re.fullmatch(r"(.*) (float32|bfloat16)", row["case"]).groups()
        found[case, kind] = row["ratios"]
    return found


def _cell(ratios: dict[str, float] | None, rivals: dict[str, None]) -> str:
    """One figure for each rival, in their order; "-" where it was not measured."""
    if ratios is None:
        return ""
    figures = (
        f"{ratios[r]:.0f}" if ratios.get(r, 0) >= 20 else f"{ratios[r]:.1f}" if r in ratios else "-"
        for r in rivals
    )
    return "; ".join(figures)
