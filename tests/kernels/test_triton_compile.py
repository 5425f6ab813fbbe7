"""Triton kernels compiled ahead of time, as production launches them, without a GPU."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench import compiled, launches, sass  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="compiles only outside the interpreter"
)


@pytest.fixture(scope="module")
def rows() -> list[compiled.Row]:
    """Every launch, compiled once for all tests."""
    return compiled.compile_all(list(launches.production()))


def test_no_kernel_spills_and_every_gate_is_met(rows):
    """attention_bwd_key spilled at head dim 128 while the tests, at other tile sizes, were
    green."""
    assert compiled.missed(rows) == []


def test_every_kernel_is_launched(rows):
    """A kernel that no case of `production()` launches would never be looked at."""
    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    defined = set(re.findall(r"^def (\w+)_kernel\(", sources, re.MULTILINE))
    assert len(defined) >= 11
    assert {row.name.split(" ")[0] for row in rows} == defined


def test_token_loss_calls_no_64_bit_division_around_which_triton_36_spilled():
    with launches.recorded(compiled.CAPABILITY) as recorded:
        launches.production()["(8, 7) f32"]()
    (launch,) = [x for x in recorded if x.kernel == "token_loss_fwd_kernel"]
    assert sass.inspect(launch.cubin).calls == 0


def test_a_spill_a_missing_wgmma_and_a_new_kernel_are_faults(rows):
    row = next(r for r in rows if r.name == "attention_bwd_key D128 bf16")
    for change, fault in (
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"wgmma": 0}, "no wgmma"),
        ({"async_copies": 0}, "no async_copies"),
        ({"resident_warps": 4}, "4 resident warps"),
        ({"name": "new_kernel D64 bf16"}, "has no gate"),
    ):
        (line,) = compiled.missed([dataclasses.replace(row, **change)])
        assert fault in line


def test_the_loop_of_a_tile_without_masks_is_the_one_that_is_counted(rows):
    """64 queries against 128 keys of 128 numbers: two products forward, to the operation."""
    row = next(r for r in rows if r.name == "attention_fwd D128 bf16")
    assert row.cycles["tensor"] == 4 * 128 * 64 * 128 / sass.TENSOR_FLOPS


def test_resident_programs_of_an_sm():
    assert sass.resident(registers=255, shared=0, warps=4) == 2
    assert sass.resident(registers=128, shared=0, warps=8) == 2
    assert sass.resident(registers=32, shared=100 << 10, warps=4) == 2
    assert sass.resident(registers=32, shared=0, warps=1) == 32
    assert sass.resident(registers=32, shared=228 << 10, warps=4) == 0


@pytest.mark.parametrize("case", ["D64 bf16", "D64 bf16 S64", "(8, 7) f32"])
def test_kernels_compile_for_an_a100(case):
    with launches.recorded(80) as recorded:
        launches.production()[case]()
    assert recorded
    for launch in recorded:
        assert sass.inspect(launch.cubin).wgmma == 0
        assert launch.shared <= 163 << 10


def test_an_unknown_launch_is_refused_before_anything_compiles():
    command = [sys.executable, "-m", "bench.compiled", "--only", "D65"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no launch has 'D65'" in done.stderr
