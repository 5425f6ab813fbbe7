"""The arms have the same budget, and their table says what came of them."""

import io
import json
from dataclasses import replace

import pytest
import tyro
from rich.console import Console

from bench import arms
from worldenv.cli import TrainArguments
from worldenv.config import Config
from worldenv.presets import preset
from worldenv.stages import pipeline


def config(arm: str) -> Config:
    words = arms.arguments(arm, 3, "runs/x", ["--env.workers", "1"])
    default = TrainArguments(config=preset(arms.PRESET))
    return tyro.cli(TrainArguments, args=words, default=default).config


def real(config: Config) -> int:
    """Real episodes that a run trains on."""
    collect, rl = config.collect, config.posttrain
    if not config.learned:
        return rl.iterations * rl.contexts * rl.group
    each = collect.episodes + (rl.rounds - 1) * collect.refresh_episodes
    return each * len(config.env.tasks)


@pytest.mark.parametrize("arm", arms.ARMS)
def test_arms_use_as_many_real_episodes(arm):
    found = config(arm)
    assert (found.seed, found.env.workers) == (3, 1)
    assert real(found) == real(preset(arms.PRESET)) == 500
    assert not found.posttrain.real_check_every
    assert found.evaluate == preset(arms.PRESET).evaluate


def test_arms_differ_in_what_they_are_called_by():
    full = config("full")
    assert config("no-explored") == replace(full, simulator=replace(full.simulator, explored=False))
    judge = replace(full.reflector, explored=False, calibrate=False)
    assert config("untrained-judge") == replace(full, reflector=judge)
    names = pipeline.steps(config("real"))
    assert [*names] == ["demonstrations", "sft", "posttrain-0", "evaluate"]


def outcomes(*won: bool) -> list[dict]:
    return [{"task": 8, "start": k, "seed": 1, "success": w} for k, w in enumerate(won)]


def test_the_table_has_a_row_for_every_kept_run(tmp_path):
    counts = [{"successes": n, "episodes": 4} for n in (3, 1)]
    success = dict(zip(("sft", "posttrained"), counts, strict=True))
    success["paired_difference"] = {"mean": -0.5, "low": -0.9, "high": -0.1}
    evaluation = {"sft": outcomes(*[True] * 9, False), "posttrained": outcomes(*[False] * 10)}
    results = {
        **success,
        "no_oracle": success,
        "sampled": {**success, "no_oracle": success},
        "real_episodes": {"demonstrations": 50, "explored": 500, "checks": 0, "rl": 0},
        "evaluation": evaluation,
        "total_seconds": 600.0,
    }
    alone = {k: v for k, v in results.items() if k not in ("no_oracle", "sampled")}
    (tmp_path / "seed-0.json").write_text(json.dumps(results))
    (tmp_path / "seed-0-real.json").write_text(json.dumps(alone))
    found = {p.stem: json.loads(p.read_text()) for p in tmp_path.glob("*.json")}
    rows = {row[0]: row[1:] for row in arms.rows(found)}
    said = "3 -> 1 of 4\n-50.0 (-90.0 to -10.0)"
    used = "50 demonstrations\n500 explored"
    assert rows == {
        "seed-0": (used, said, said, said, said, "8", "10"),
        "seed-0-real": (used, said, "-", "-", "-", "8", "10"),
    }
    written = io.StringIO()
    arms.show(tmp_path, Console(width=200, file=written))
    assert "seed-0-real" in written.getvalue()


@pytest.mark.parametrize(
    ("arm", "explored", "simulated"),
    [("neither", True, False), ("untrained-judge", True, True), ("real", False, False)],
)
def test_what_arms_have_in_common_is_made_once(tmp_path, monkeypatch, arm, explored, simulated):
    whole, less = tmp_path / "seed-0-full", tmp_path / "seed-0-no-explored"
    imitated, _, simulator = sorted(arms.common("full", "untrained-judge"), key=len)
    for folder, names in ((whole, (*simulator, "stages/reflector-0.json")), (less, imitated)):
        for name in names:
            file = name.endswith((".json", "tensors"))
            path = folder / name if file else folder / name / "a.hdf5"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(folder.name)
    target, ran = tmp_path / f"seed-0-{arm}", []

    def train(command, check):
        ran.append(command[3:])
        (target / "results.json").write_text("{}")

    monkeypatch.setattr(arms.subprocess, "run", train)
    monkeypatch.setattr(arms, "KEPT", tmp_path / "kept")
    arms.run(arm, 0, tmp_path, ["--threads", "1"])
    assert ran == [arms.arguments(arm, 0, target, ["--threads", "1"])]
    assert all((target / name).exists() for name in arms.STARTED)
    assert (target / "data" / "explore-0").exists() == explored
    assert (target / "stages" / "explore-0.json").exists() == explored
    for name in (*arms.WORLD, "stages/simulator-0.json"):
        assert (target / name).exists() == simulated
    assert not (target / "stages" / "reflector-0.json").exists()
    assert (tmp_path / "kept" / f"seed-0-{arm}.json").exists()
