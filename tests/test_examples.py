"""The examples run, on models as published but tiny."""

import json
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from worldenv.layouts import openvla, tiny, vae, vlm, wan

    folder = tmp_path_factory.mktemp("models")
    openvla.write(folder / "policy")
    tiny._wan(folder / "wan")
    vlm.write(folder / "judge", "qwen2_5_vl")
    wan.write_wovr(folder / "wovr", in_channels=16, out_channels=16)
    vae.wan_vae_of_authors(folder / "wovr")
    vae.reward(folder / "wovr")
    return folder


@pytest.mark.parametrize(
    ("name", "model", "more", "words"),
    [
        ("openvla_oft", "policy", [], "scale of its Laplace"),
        ("wan_world", "wan", ["--size", "64", "--frames", "2"], "frame 2"),
        ("wovr_world", "wovr", ["--size", "64", "--patch", "16", "--chunks", "1"], "chunk 1"),
        ("image_text_judge", "judge", [], "after: "),
    ],
)
def test_an_example_runs(name, model, more, words, models, tmp_path, monkeypatch, capsys):
    out = ["--out", str(tmp_path / "a.mp4")] if name.endswith("world") else []
    vae = ["--vae", str(models / "wovr" / "Wan2.1_VAE.pth")] if name == "wovr_world" else []
    monkeypatch.setattr(sys, "argv", [name, str(models / model), *more, *out, *vae])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert words in capsys.readouterr().out
    assert not out or (tmp_path / "a.mp4").exists()


def test_a_stranger_s_benchmark_runs_through_every_stage(tmp_path, monkeypatch, capsys):
    """In as many lines as the page promises; smaller still than the smoke preset."""
    from worldenv import cli

    file = EXAMPLES / "own_benchmark.py"
    assert len(file.read_text().splitlines()) <= 120
    small = {
        "sft": {"steps": 2, "batch": 4},
        "simulator": {"steps": 2, "refresh-steps": 1, "width": 24},
        "reflector": {"steps": 1, "refresh-steps": 1},
        "policy": {"width": 16, "layers": 1, "heads": 2, "encoder-channels": 8},
        "posttrain": {"rounds": 1, "iterations": 1},
        "env": {"benchmark": str(file), "image-size": 32, "workers": 1},
    }
    words = [f"--{part}.{k}={v}" for part, own in small.items() for k, v in own.items()]
    words += ["--preset", "smoke", "--run-dir", str(tmp_path / "run"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["worldenv-train", *words])
    monkeypatch.setattr(cli.pipeline, "_announce", lambda run, marks: None)  # it takes seconds
    cli._train()
    assert "report.html" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["tasks"][0]["instruction"] == "put the red block on the pad"
    assert results["stages"]["demonstrations"]["successes"] == 2
    assert (results["benchmark"], results["suite"]) == ("rails", "blocks")
    assert {p.stem for p in (tmp_path / "run" / "media").glob("*.mp4")} >= {"before-0", "after-1"}


def test_every_example_is_run():
    named = {"openvla_oft", "wan_world", "wovr_world", "image_text_judge", "own_benchmark"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == named
