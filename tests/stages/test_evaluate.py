"""What an interrupted evaluation goes on from."""

import json
from dataclasses import replace

import pytest

from worldenv.presets import preset
from worldenv.stages import evaluate, store
from worldenv.stages.run import Run


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """(run, rolled): every episode succeeds; `rolled` counts those of each label."""
    rolled: dict[str, int] = {}

    def evaluate_policy(run, policy, starts, label, reflector, keep):
        rolled[label] = len(starts)
        done = [{"task": s.task, "start": s.index, "seed": s.seed, "success": True} for s in starts]
        keep(done)
        return done

    monkeypatch.setattr(evaluate, "evaluate_policy", evaluate_policy)
    monkeypatch.setattr(store, "load", lambda *a: None)
    run = Run(replace(preset("smoke"), run_dir=tmp_path, device="cpu"))
    yield run, rolled
    run.close()


def test_finished_episodes_are_not_repeated(scripted):
    run, rolled = scripted
    first = evaluate.run(run, "mark")
    assert rolled == {"evaluate sft": 2, "evaluate posttrained": 2}
    assert evaluate.run(run, "mark") == first
    assert rolled == {"evaluate sft": 0, "evaluate posttrained": 0}
    assert evaluate.run(run, "of other settings") == first
    assert rolled == {"evaluate sft": 2, "evaluate posttrained": 2}


@pytest.mark.parametrize("damage", ["cut", "list", "no episodes", "no success", "number"])
def test_damaged_outcomes_are_measured_again(scripted, damage):
    run, rolled = scripted
    first = evaluate.run(run, "mark")
    path = run.dir / "evaluation" / "sft.json"
    record = json.loads(path.read_text())
    if damage == "no success":
        del record["episodes"][0]["success"]
    elif damage == "no episodes":
        del record["episodes"]
    content = {"list": [record], "number": 3}.get(damage, record)
    text = json.dumps(content)
    path.write_text(text[:40] if damage == "cut" else text)
    assert evaluate.run(run, "mark") == first
    assert rolled == {"evaluate sft": 2, "evaluate posttrained": 0}
