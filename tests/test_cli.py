"""The console scripts: help, errors with exit codes, and checkpoints that do not fit."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from worldenv import cli
from worldenv.play.session import open_world
from worldenv.presets import preset
from worldenv.runtime.errors import UserError
from worldenv.stages import store
from worldenv.stages.run import Run

SCRIPTS = ("train", "evaluate", "collect", "imagine", "export", "play", "push")


@pytest.fixture
def call(capsys, monkeypatch):
    """Runs a console script in this process: importing torch anew for each takes seconds."""

    def call(script: str, *arguments: str) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            getattr(cli, script)()
        return subprocess.CompletedProcess(arguments, ended.value.code or 0, *capsys.readouterr())

    return call


def test_a_script_of_its_own_process_ends_with_a_message_and_its_code():
    code = "import sys; from worldenv.entry import train; sys.argv[0] = 'train'; train()"
    command = [sys.executable, "-c", code, "--preset", "defualt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "Did you mean 'default'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_speaks_in_sentences(call, script):
    done = call(script, "--help")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    expected = {
        "train": "Learn a world from a few demonstrations",
        "evaluate": "success in the real benchmark",
        "collect": "LIBERO's HDF5 layout",
        "imagine": "in the real world and in the learned one",
        "export": "LeRobotDataset v3.0",
        "push": "on the hub, with a card of their figures",
        "play": "Drive a run's learned world by hand",
    }
    assert expected[script] in text


def test_mistakes_are_named(call, tmp_path):
    for arguments, words in (
        (("--preset", "defualt"), "Did you mean 'default'"),
        (("--sft.stepz", "3"), "sft.steps"),
        (("posttrain", "--round", "7", "--run-dir", str(tmp_path / "new")), "round 7"),
        (("reflector", "--run-dir", str(tmp_path)), "has not run"),
    ):
        done = call("train", *arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert words in done.stderr + done.stdout, (arguments, done.stderr)
    assert not (tmp_path / "new").exists()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    done = call("evaluate", "--run-dir", str(tmp_path / "absent"))
    assert done.returncode == 2
    assert "config.json" in done.stderr


def test_a_wrong_asset_folder_is_named(call, tmp_path):
    done = call("collect", "expert", "--assets", str(tmp_path), "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr


@pytest.fixture
def run(tmp_path):
    run = Run(replace(preset("smoke"), run_dir=tmp_path / "run"))
    run.save_config()
    yield run
    run.close()


@pytest.mark.libero
@pytest.mark.slow
def test_eval_runs_a_policy_and_prints_its_interval(call, run, tmp_path):
    path = run.dir / "checkpoints" / "policy-1.safetensors"
    store.save("policy", store.build("policy", run.config), path)
    out = tmp_path / "outcomes.json"
    words = ["--run-dir", str(run.dir), "--starts", "0", "1", "--out", str(out)]
    done = call("evaluate", *words)
    assert done.returncode == 2
    assert "posttrain-1 in" in done.stderr
    assert "has not run" in done.stderr
    done = call("evaluate", *words, "--policy", str(path))
    assert done.returncode == 0, done.stderr
    assert "success 0/1 = 0.0% (95% interval 0.0% to 79.3%)" in done.stdout
    episodes = json.loads(out.read_text())["episodes"]
    assert [(e["start"], e["success"]) for e in episodes] == [(0, False)]


def test_eval_refuses_a_policy_of_another_chunk_or_image_size(call, run):
    path = run.dir / "checkpoints" / "policy-1.safetensors"
    store.save("policy", store.build("policy", run.config), path)
    config = json.loads((run.dir / "config.json").read_text())
    for name, value in (("chunk", 4), ("image_size", 32)):
        env = {**config["env"], name: value}
        (run.dir / "config.json").write_text(json.dumps({**config, "env": env}))
        done = call("evaluate", "--run-dir", str(run.dir), "--policy", str(path))
        assert done.returncode == 2, done.stderr
        assert f"this policy was trained with env.{name} {config['env'][name]}" in done.stderr


def test_a_run_without_a_world_cannot_be_played_in(call, run):
    done = call("play", str(run.dir), "--port", "0", "--no-browser")
    assert done.returncode == 2
    assert f"stage 'simulator-0' has not run in {run.dir}" in done.stderr
    with pytest.raises(UserError, match=r"round 9: expected 0\.\.1"):
        open_world(run, 9)
    rounds = replace(run.config.posttrain, world="real", rounds=1)
    run.config = replace(run.config, posttrain=rounds)
    with pytest.raises(UserError, match="expected a run with a learned world"):
        open_world(run)
