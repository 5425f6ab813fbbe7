"""Every benchmark runs once for correctness; gates name cases that exist; a wrong result stops a
timing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench.timing import Case, GateFailed, Limits, gate, measure  # noqa: E402


def test_every_case_agrees_with_its_reference():
    command = [sys.executable, "-m", "bench", "--once"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cases agree" in done.stdout


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("window", [None, 2])
def test_the_attention_cases_of_a_gpu_agree_here_too(train, window):
    from bench.cases import attention_case

    causal = window is not None
    gate(attention_case((1, 3, 8, 2, 32), window, causal, torch.float32, "cpu", train))


def test_gates_belong_to_cases():
    from bench.cases import action_loss_case, gae_case

    gates = json.loads((ROOT / "bench" / "gates.json").read_text())
    for names in (gates["cpu"], gates["amx"]):
        assert gae_case(64, 128, "cpu").name in names
        assert action_loss_case(256, False, "cpu").name in names


def test_the_simulator_of_the_gpu_suite_generates():
    from bench.gpu_suite import generate

    row = generate("3M", 2, 1e12, device="cpu", frames=1)
    assert row["parameters"] > 3e6
    assert row["video_frames_per_second"] > 0


def test_no_speed_is_reported_for_a_wrong_result():
    x = torch.randn(8)

    def case(ours):
        return Case("op", "8", "float32", ours, {"rival": lambda: x}, lambda: x, 1e-6)

    limits = Limits(1e9, 1e9)
    assert measure(case(lambda: x), limits, 0.01).ratios["rival"] > 0
    for wrong in (x + 1e-3, x * float("nan"), x[:4]):
        with pytest.raises(GateFailed, match="ours is off"):
            measure(case(lambda w=wrong: w), limits, 0.01)
