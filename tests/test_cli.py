"""The console scripts: help, errors with exit codes, and adopting another run's checkpoints."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from worldenv.config import Config
from worldenv.presets import preset
from worldenv.runtime.errors import UserError
from worldenv.stages import pipeline, store
from worldenv.stages.run import Run

SCRIPTS = ("train", "evaluate", "collect", "imagine")


def call(script: str, *arguments: str) -> subprocess.CompletedProcess:
    code = f"import sys; from worldenv.entry import {script}; sys.argv[0] = '{script}'; {script}()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_speaks_in_sentences(script):
    done = call(script, "--help")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    expected = {
        "train": "Learn a world from a few demonstrations",
        "evaluate": "success in the real benchmark",
        "collect": "LIBERO's HDF5 layout",
        "imagine": "in the real world and in the learned one",
    }
    assert expected[script] in text


def test_mistakes_are_named_without_a_traceback(tmp_path):
    for arguments, words in (
        (("--preset", "defualt"), "Did you mean 'default'"),
        (("--sft.stepz", "3"), "sft.steps"),
        (("posttrain", "--round", "7", "--run-dir", str(tmp_path)), "round 7"),
        (("reflector", "--run-dir", str(tmp_path)), "has not run"),
    ):
        done = call("train", *arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert words in done.stderr + done.stdout, (arguments, done.stderr)
        assert "Traceback" not in done.stderr
    done = call("evaluate", "--run-dir", str(tmp_path / "absent"))
    assert done.returncode == 2
    assert "config.json" in done.stderr


def test_a_wrong_asset_folder_is_named(tmp_path):
    done = call("collect", "expert", "--assets", str(tmp_path), "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def run(tmp_path):
    run = Run(replace(preset("smoke"), run_dir=tmp_path / "run"))
    yield run
    run.close()


def test_a_checkpoint_of_another_run_is_adopted(run, tmp_path):
    torch.manual_seed(0)
    simulator = store.build("simulator", run.config)
    path = tmp_path / "other.safetensors"
    store.save("simulator", simulator, run.config, path)
    pipeline.adopt(run, "simulator", path, 0)
    adopted = store.load("simulator", run.dir / "checkpoints" / "simulator-0.safetensors")
    assert torch.equal(adopted.patch_in.weight, simulator.patch_in.weight)
    assert run.record("simulator-0")["adopted"] == str(path)
    with pytest.raises(UserError, match="expected a policy checkpoint, got 'simulator'"):
        pipeline.adopt(run, "policy", path, 0)


def test_the_run_folder_holds_its_configuration(run):
    stored = json.loads((run.dir / "config.json").read_text())
    assert stored["preset"] == "smoke"
    assert Path(stored["run_dir"]) == run.dir
    assert Config().preset == "default"


@pytest.mark.libero
@pytest.mark.slow
def test_eval_runs_a_policy_and_prints_its_interval(run, tmp_path):
    path = run.dir / "checkpoints" / "policy-1.safetensors"
    store.save("policy", store.build("policy", run.config), run.config, path)
    out = tmp_path / "outcomes.json"
    done = call("evaluate", "--run-dir", str(run.dir), "--starts", "0", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "success 0/1 = 0.0% (95% interval 0.0% to 79.3%)" in done.stdout
    episodes = json.loads(out.read_text())["episodes"]
    assert [(e["start"], e["success"]) for e in episodes] == [(0, False)]
