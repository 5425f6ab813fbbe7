"""The gate: which worlds it lets pass, what it says of others, and how one goes on regardless."""

import copy
import json
import sys
from dataclasses import replace

import pytest
from toy import Toy

from worldenv import cli
from worldenv.config import CollectConfig, Config, EnvConfig, load
from worldenv.fields import to_dict
from worldenv.gate import GateConfig
from worldenv.presets import NAMES, preset
from worldenv.report import gate as drawn
from worldenv.runtime.errors import UserError
from worldenv.stages import gate, posttrain, store
from worldenv.stages.run import Run, read_record, write_record

DEFAULT = GateConfig()


def figure(value: float, half: float = 0.1, n: int = 20) -> dict:
    return {"value": value, "low": value - half, "high": value + half, "n": n}


GOOD = {
    "episodes": 20,
    "psnr": {"gain": {"front": {"1": figure(7.0)}, "wrist": {"1": figure(6.0), "8": figure(-9.0)}}},
    "hand_error_cm": {"1": figure(0.2), "8": figure(0.6)},
    "reflector": {"successes": 8, "episode_auc": 0.95},
    "false_stops": figure(0.03, 0.02, 160),
}
SPOILED = {
    "held_out": ("episodes", 15),
    "gain_db": ("psnr.gain.front.1", figure(1.0)),
    "hand_cm": ("hand_error_cm.8", figure(5.0)),
    "judge_auc": ("reflector.episode_auc", 0.6),
    "false_stops": ("false_stops", figure(0.2, 0.06, 160)),
}


def spoiled(*names: str, record: dict = GOOD) -> dict:
    """The good world's record but for these measures."""
    record = copy.deepcopy(record)
    for name in names:
        path, value = SPOILED[name]
        *outer, last = path.split(".")
        inner = record
        for key in outer:
            inner = inner[key]
        inner[last] = value
    return record


def failed(record: dict, part: GateConfig = DEFAULT) -> list[str]:
    return [row["measure"] for row in gate.judged(record, part) if not row["passed"]]


def test_a_good_world_passes_and_each_measure_fails_alone():
    assert failed(GOOD) == []
    assert [m.limit for m in gate.MEASURES] == list(SPOILED)
    for name in SPOILED:
        assert failed(spoiled(name)) == [name]


def test_the_bound_that_speaks_against_the_world_decides():
    wide = copy.deepcopy(GOOD)
    wide["hand_error_cm"]["8"] = figure(0.6, half=9.0)
    assert failed(wide) == ["hand_cm"]
    wide["psnr"]["gain"]["wrist"]["1"] = figure(6.0, half=9.0)  # of the views the worse one
    assert failed(wide) == ["gain_db", "hand_cm"]
    few = copy.deepcopy(GOOD)
    few["reflector"]["successes"] = 1  # the same area, of one success among twenty
    assert failed(few) == ["judge_auc"]


def test_what_cannot_be_measured_has_not_been_shown():
    none = copy.deepcopy(GOOD)
    none["reflector"]["episode_auc"] = None
    none["hand_error_cm"].pop("8")
    none["psnr"]["gain"] = {"front": {}, "wrist": {}}
    assert failed(none) == list(SPOILED)[1:-1]
    text = gate.refusal(0, [r for r in gate.judged(none, DEFAULT) if not r["passed"]])
    assert text.count("got no figure with an interval") == 3


def test_a_refusal_says_what_failed_by_how_much_and_what_mends_it():
    rows = gate.judged(spoiled("hand_cm", "gain_db"), DEFAULT)
    text = gate.refusal(1, [row for row in rows if not row["passed"]])
    gain, hand = (getattr(DEFAULT, name) for name in ("gain_db", "hand_cm"))
    for words in (
        "the world of round 1 is not fit to train in (stages/fidelity-1.json)",
        f"1 chunk ahead: expected at least {gain:g} dB, got 1 dB (95% 0.9 to 1.1, n = 20): "
        f"{gain - 0.9:.4g} dB too little",
        f"8 chunks ahead: expected at most {hand:g} cm, got 5 cm (95% 4.9 to 5.1, n = 20): "
        f"{5.1 - hand:.4g} cm too much",
        "simulator.steps",
        "collect.episodes",
        "gate.*",
        "--force",
    ):
        assert words in text


def at_gate(folder, record: dict, *, on: bool = True, force: bool = False) -> Run:
    config = replace(preset("smoke"), gate=GateConfig(on=on, held_out=1), run_dir=folder)
    run = Run(config, force=force)
    write_record(run.path("stages", "fidelity-0.json"), record)
    return run


@pytest.mark.parametrize(
    ("record", "on", "force", "verdict"),
    [
        (GOOD, True, False, "passed"),
        (GOOD, True, True, "passed"),  # there was nothing to force
        (spoiled("hand_cm"), True, True, "forced"),
        (spoiled("hand_cm"), False, False, "off"),
        (GOOD, False, False, "passed"),
    ],
)
def test_who_goes_on_how(tmp_path, capsys, record, on, force, verdict):
    run = at_gate(tmp_path, record, on=on, force=force)
    found = gate.check(run, 0)
    run.close()
    assert found["verdict"] == verdict
    assert (f"goes on ({verdict}) in a world that fails: hand_cm" in capsys.readouterr().out) == (
        verdict != "passed"
    )


def test_tasks_of_which_the_world_is_wrong_are_left_out(tmp_path, capsys):
    run = at_gate(tmp_path, {**spoiled("hand_cm"), "trained_in": GOOD})
    run.config = replace(run.config, env=replace(run.config.env, tasks=(2, 7, 8)))
    rates = {
        "2": {"real": {"value": 0.5}, "imagined": {"value": 0.4}},
        "7": {"real": {"value": 0.5}, "imagined": {"value": 0.9}},
    }  # of task 8 nothing is known

    def asked(limit: float) -> tuple[int, ...]:
        part = replace(run.config.posttrain, task_gap=limit)
        run.config = replace(run.config, posttrain=part)
        return gate.tasks(run, 0)

    path = run.path("stages", "reflector-0.json")
    write_record(path, {})
    assert asked(0.25) == (2, 7, 8)
    write_record(path, {"success_by_task": rates})
    assert (asked(0.0), asked(0.25), asked(0.5)) == ((8,), (2, 8), (2, 7, 8))
    with pytest.raises(UserError, match="end-effector error"):
        gate.check(run, 0)  # all three: the whole record
    asked(0.25)
    found = gate.check(run, 0)
    assert (found["verdict"], found["tasks"]) == ("passed", [2, 8])
    assert "tasks 7 are left out" in capsys.readouterr().out
    write_record(path, {"success_by_task": {**rates, "8": rates["7"]}})
    asked(0.0)
    with pytest.raises(UserError, match=r"right about none of the tasks.*posttrain\.task_gap"):
        gate.check(run, 0)
    run.close()


def test_posttraining_is_refused_before_anything_is_read(tmp_path):
    run = at_gate(tmp_path, spoiled("judge_auc"))
    with pytest.raises(UserError, match=r"reflector\.steps"):
        posttrain.STAGE.work(run, "mark", 0)
    run.close()
    assert not (tmp_path / "checkpoints").exists()


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A run whose worlds have the hand lead astray, and whose post-training stops at the gate."""
    usual = Toy._work

    def work(self, run, step, mark):
        passed = {"gate": gate.check(run, step.number)} if step.stage.name == "posttrain" else {}
        record = spoiled("hand_cm") if step.stage.name == "fidelity" else {}
        return {**usual(self, run, step, mark), **record, **passed}

    monkeypatch.setattr(Toy, "_work", work)
    return Toy(tmp_path / "run", monkeypatch)


def test_what_the_gate_refused_goes_on_by_force_and_is_not_measured_again(toy, monkeypatch):
    command = ["worldenv-train", "--preset", "smoke", "--gate.on", "--gate.held-out", "1"]
    command += ["--run-dir", str(toy.folder), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(UserError, match="end-effector error, 8 chunks ahead: expected at most"):
        cli._train()
    assert toy.done[-1] == "fidelity-0"
    toy.done = []
    with pytest.raises(UserError, match="round 0 is not fit"):  # nor is it without force
        cli._train()
    assert toy.done == []
    monkeypatch.setattr(sys, "argv", [*command, "--force"])
    cli._train()
    assert toy.done[0] == "posttrain-0"
    assert toy.done[-1] == "evaluate"
    records = [read_record(toy.folder / "stages" / f"posttrain-{n}.json") for n in (0, 1)]
    assert [record["gate"]["verdict"] for record in records] == ["forced", "forced"]
    # What was made by force stays made, whatever the limits are now.
    toy.done = []
    monkeypatch.setattr(sys, "argv", [*command, "--gate.hand-cm", "1.5"])
    cli._train()
    assert toy.done == []


def test_a_report_says_what_was_asked_and_what_was_forced():
    rows = gate.judged(spoiled("hand_cm"), DEFAULT)
    stages = {"posttrain-0": {"gate": {"verdict": "forced", "measures": rows}}, "sft": 3}
    page = drawn.section({"stages": stages})
    assert page.count("<td>passes</td>") == len(rows) - 1
    assert page.count("<td>fails</td>") == 1
    assert "<td>at most 2 cm</td><td>5 cm <small>4.9 to 5.1, n = 20</small></td>" in page
    assert "Round 0 failed, and was trained in with --force" in drawn.warning({"stages": stages})
    stages["posttrain-0"]["gate"]["verdict"] = "passed"
    assert drawn.warning({"stages": stages}) == ""
    assert "has not run" in drawn.section(
        {"stages": {"posttrain-0": {"seconds": 3}}}
    )  # an older run


def test_presets_say_openly_where_the_gate_is_off():
    assert {n for n in NAMES if not preset(n).gate.on} == {"smoke", "published-tiny"}


def test_too_few_held_out_episodes_are_refused_before_anything_is_trained():
    few = {"collect": CollectConfig(episodes=120)}
    with pytest.raises(UserError, match=r"collect.held_out: expected enough to hold out 16 of the"):
        Config(**few)
    assert Config(**few, gate=GateConfig(on=False)).collect.episodes == 120
    assert Config(**few, env=EnvConfig(tasks=(7, 8))).collect.episodes == 120  # of each task


def test_a_config_of_before_the_gate_is_read(tmp_path):
    values = to_dict(Config())
    values["posttrain"]["require_fidelity"] = True
    values["posttrain"]["value"] = "network"
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    assert load(path) == Config()


@pytest.mark.parametrize("kind", ["simulator", "reflector"])
def test_a_world_is_used_for_tasks_it_has_seen(tmp_path, kind):
    config, path = preset("smoke"), tmp_path / "model.safetensors"
    model = store.build(kind, config)
    store.save(kind, model, path, EnvConfig(tasks=(3, 8)))
    assert store.load(kind, path, fits=config).config == model.config
    for env, words in (
        (EnvConfig(suite="libero_goal"), "tasks 8 of libero_goal"),
        (EnvConfig(tasks=(8, 9)), "tasks 8, 9 of libero_spatial"),
    ):
        with pytest.raises(
            UserError, match=f"trained on tasks 3, 8 of libero_spatial, got {words}"
        ):
            store.load(kind, path, fits=replace(config, env=env))
    store.save(kind, model, path)  # as before checkpoints said so
    store.load(kind, path, fits=replace(config, env=EnvConfig(suite="libero_goal")))
