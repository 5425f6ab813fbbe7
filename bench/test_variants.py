"""The same cases under pytest-benchmark, grouped by case: `pytest bench --benchmark-enable`.

Each variant is checked against the truth before it is timed. Ratios and gates come from `python -m
bench`, which interleaves the variants; these tables show the spread of each on its own.
"""

from __future__ import annotations

import pytest
import torch

from bench.cases import cpu_cases, gpu_cases
from bench.timing import Case, gate

CASES = list(gpu_cases() if torch.cuda.is_available() else cpu_cases(compiled=False))
VARIANTS = [(case, name) for case in CASES for name in ("ours", *case.rivals)]


@pytest.mark.parametrize(("case", "variant"), VARIANTS, ids=lambda x: getattr(x, "name", x))
def test_variant(benchmark, case: Case, variant: str) -> None:
    gate(case)
    benchmark.group = case.name
    run = case.ours if variant == "ours" else case.rivals[variant]

    def finished() -> None:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    benchmark(finished)
