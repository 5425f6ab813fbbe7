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


@pytest.mark.parametrize("halves", [1, 2])
def test_teacher_forcing_agrees_with_its_rivals(halves):
    from bench.attention import teacher_forcing_case

    gate(teacher_forcing_case((1, 3, 8, 2, 32), 3, halves, torch.float32, "cpu"))


def test_gates_belong_to_cases():
    from bench.cases import action_loss_case, gae_case

    gates = json.loads((ROOT / "bench" / "gates.json").read_text())
    for names in (gates["cpu"], gates["amx"]):
        assert gae_case(64, 128, "cpu").name in names
        assert action_loss_case(256, False, "cpu").name in names


def test_an_unknown_case_names_the_nearest_and_measures_nothing(monkeypatch, capsys):
    from bench import __main__ as program

    monkeypatch.setattr(sys, "argv", ["bench", "--once", "--only", "gea"])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert "Did you mean 'gae'?" in told.err
    assert "agree" not in told.out


def test_a_check_times_what_a_gate_needs_and_no_more():
    from bench.__main__ import check, gated

    calls = []
    x = torch.ones(2)

    def run(name):
        return lambda: (calls.append(name), x)[1]

    rivals = {"first": run("first"), "second": run("second")}
    case = Case("op", "2", "float32", run("ours"), rivals, lambda: x, 1e-6)
    row = measure(gated(case), Limits(1e9, 1e9), 0.01)
    assert set(calls) == {"ours", "first"}
    assert check([row], {case.name: 0.0}) == 0
    assert check([row], {case.name: 1e9}) == 1
    assert check([], {case.name: 0.0}) == 1


def test_a_long_variant_is_run_once(monkeypatch):
    monkeypatch.setattr("bench.timing.LONG", 0.0)
    x, calls = torch.ones(2), []

    def long():
        calls.append(1)
        return x

    case = Case(
        "op", "2", "float32", lambda: x, {"rival": long}, lambda: x, 1e-6, unlike=("rival",)
    )
    assert measure(case, Limits(1e9, 1e9), 10.0).ratios["rival"] > 0
    assert len(calls) == 1


def test_a_part_of_a_result_is_compared_where_the_truth_is_a_part():
    whole = torch.arange(6.0).reshape(3, 2)

    def case(ours):
        return Case(
            "op", "", "float32", lambda: ours, {}, lambda: whole[:1], 1e-6, part=lambda x: x[:1]
        )

    gate(case(whole))
    with pytest.raises(GateFailed, match="ours is off"):
        gate(case(whole + 1))


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
