"""What a run made, pushed to a hub on loopback and fetched again: the same bytes, its figures."""

import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants
from loopback_hub import TOKEN

from worldenv import cli, push
from worldenv.presets import preset
from worldenv.runtime.errors import UserError
from worldenv.stages import pipeline, publish, records, results, store
from worldenv.stages.run import Run, write_json

KINDS = ("policy", "simulator", "reflector")


@pytest.fixture(scope="module")
def models():
    return {kind: store.build(kind, preset("smoke")) for kind in KINDS}


@pytest.fixture
def run(tmp_path, models):
    """A run of two rounds, as if it had been: new models, one demonstration, four episodes."""
    run = Run(replace(preset("smoke"), run_dir=tmp_path / "run", device="cpu"))
    run.save_config()
    outcomes = {
        label: [
            {"task": 8, "start": n, "seed": 1, "success": n < wins, "steps": 9} for n in range(4)
        ]
        for label, wins in (("sft", 1), ("posttrained", 3))
    }
    told = {
        "demonstrations": {"episodes": 2, "successes": 1},
        "evaluate": {"outcomes": outcomes, "assets": "a pack"},
        "fidelity-1": {"eef_cm": 0.25, "reflector": {"auc": 0.75}},
    }
    steps = pipeline.steps(run.config)
    for step in steps.values():
        for made in map(run.dir.joinpath, step.makes):
            kind = made.name.split("-")[0]
            if made.suffix == ".safetensors":
                store.save(kind, models[kind], made)
            if made.parent.name == "data":
                (made / "suite").mkdir(parents=True)
                (made / "suite" / "a_demo.hdf5").write_bytes(made.name.encode())
        mark = pipeline._marks(run, {})[step.name]
        records.finish(run, step, mark, told.get(step.name, {}), 0.0)
    write_json(
        run.dir / "results.json",
        {
            "seed": 7,
            "commit": "abc",
            "command": "worldenv-train",
            "machine": {"cpu": "a CPU"},
            "real_episodes_used": 12,
            "stages": {"fidelity-1": {"eef_cm": 0.25}, "evaluate": {"assets": "a pack"}},
            "reflector": told["fidelity-1"]["reflector"],
            "evaluation": outcomes,
            **results.successes(outcomes),
        },
    )
    yield run
    run.close()


def said(monkeypatch, script, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["worldenv", *map(str, words)])
    script()


@pytest.fixture
def pushes(hub, run, monkeypatch):
    """Push something of the run; returns the repository."""

    def pushes(what: str, *more: str) -> str:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        words = (what, f"user/{what}", "--run-dir", run.dir, *more)
        said(monkeypatch, push.main, *words)
        return f"user/{what}"

    return pushes


@pytest.mark.parametrize("kind", KINDS)
def test_pushed_then_fetched_into_an_empty_cache_it_is_the_same(kind, pushes, run, models, hub):
    found = store.locate(kind, Path(pushes(kind)))
    assert records.sha256(found) == records.sha256(
        run.dir / "checkpoints" / f"{kind}-1.safetensors"
    )
    loaded = store.load(kind, found, fits=run.config)
    assert store.digest(loaded) == store.digest(models[kind])
    files = hub.repositories["model", f"user/{kind}"]
    held = files.commits[files.main]
    assert set(held) == {
        ".gitattributes", "README.md", "config.json", "model.safetensors", "results.json",
    }  # fmt: skip
    assert json.loads(held["config.json"])["model_type"] == f"worldenv-{kind}"
    assert store.locate(kind, Path(f"user/{kind}@{files.main}")) == found


def test_a_revision_is_what_it_was(pushes, hub, run):
    pushes("policy")
    first = hub.repositories["model", "user/policy"].main
    pushes("policy", "--name", "policy-sft")
    assert hub.repositories["model", "user/policy"].main != first
    found = store.locate("policy", Path(f"user/policy@{first}"))
    assert "policy-1" in (found.parent / "README.md").read_text()
    with pytest.raises(
        UserError, match=r"no user/policy@v2 here\. On the hub: .* no such revision"
    ):
        store.locate("policy", Path("user/policy@v2"))


def test_the_card_has_the_runs_figures(run, tmp_path):
    for kind, name, words in (
        ("policy", "policy-1", "3 of 4, 75.0%"),
        ("policy", "policy-sft", "1 of 4, 25.0%"),
        ("policy", "policy-0", "has not measured"),
        ("simulator", "simulator-1", "| eef_cm | 0.25 |"),
        ("reflector", "reflector-1", "| auc | 0.75 |"),
        ("data", "demonstrations", "2 episodes, of which 1 succeeded"),
    ):
        publish.write(run, publish.find(run, kind, name), tmp_path / name, "user/x", "mit")
        card = ModelCard.load(tmp_path / name / "README.md")
        assert words in card.text
        assert card.data.license == "mit"
        assert "user/x" in card.text
    card = ModelCard.load(tmp_path / "policy-1" / "README.md")
    assert card.data.eval_results[0].metric_value == 0.75
    assert "paired difference +50.0 points" in card.text
    assert "- assets: a pack" in card.text


def test_figures_of_something_else_are_refused(run, tmp_path, capsys):
    chosen = publish.find(run, "policy", None)
    outcomes = json.loads((run.dir / "results.json").read_text())
    outcomes["evaluation"]["sft"][0]["steps"] = 10
    write_json(run.dir / "results.json", outcomes)
    with pytest.raises(UserError, match=r"results\.json: expected what the run's evaluation found"):
        publish.write(run, chosen, tmp_path / "out" / "x", "user/x")
    assert not (tmp_path / "out").exists()
    (run.dir / "stages" / "evaluate.json").unlink()
    publish.write(run, chosen, tmp_path / "x", "user/x")
    assert "without figures: evaluate" in capsys.readouterr().out
    assert "has not measured" in (tmp_path / "x" / "README.md").read_text()
    (run.dir / "checkpoints" / "policy-1.safetensors").write_bytes(b"another")
    with pytest.raises(UserError, match="gone or changed"):
        publish.find(run, "policy", None)


def test_a_dry_run_writes_the_folder_and_sends_nothing(hub, run, tmp_path, monkeypatch, models):
    words = ("policy", "--dry-run", "--run-dir", run.dir, "--out", tmp_path / "out")
    said(monkeypatch, push.main, *words)
    assert hub.requests == []
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["policy-1"]
    found = store.locate("policy", tmp_path / "out" / "policy-1")
    assert store.digest(store.load("policy", found)) == store.digest(models["policy"])
    with pytest.raises(UserError, match="expected no such folder yet"):
        said(monkeypatch, push.main, *words)


def test_nothing_half_written_stays(run, tmp_path, monkeypatch, largest_file):
    chosen = publish.find(run, "policy", None)
    with largest_file(100_000), pytest.raises(UserError, match="Cannot write"):
        publish.write(run, chosen, tmp_path / "out" / "policy-1", "user/x")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_cannot_be_pushed(hub, run, monkeypatch):
    for words, message in (
        (["policy"], "expected user/name, got none"),
        (["policy", "user"], "expected user/name, got user"),
        (["policy", "user/x@main"], "expected user/name, got user/x@main"),
        (["policy", "user/x", "--name", "policy-2"], r"policy of .* 'policy-2'.*policy-sft"),
        (["data", "user/x", "--name", "explore-9"], "explore-1"),
        (["policy", "user/x"], "expected a token that may write, got none"),
    ):
        with pytest.raises(UserError, match=message):
            said(monkeypatch, push.main, *words, "--run-dir", run.dir)
    assert hub.repositories == {}


def test_every_flag_that_takes_a_policy_takes_a_repository(pushes, run, monkeypatch, tmp_path):
    for kind in (*KINDS, "data"):
        pushes(kind)
    seen: dict[str, object] = {}

    def run_all(own: Run, files: dict, number: int) -> dict:
        seen.update(files, data=own.config.data.paths)
        return {}

    monkeypatch.setattr(pipeline, "run_all", run_all)
    named = [word for kind in KINDS for word in (f"--{kind}", f"user/{kind}@main")]
    words = ["--preset", "smoke", "--run-dir", tmp_path / "new", *named, "--data", "user/data"]
    said(monkeypatch, cli._train, *words)
    assert {kind: seen[kind].name for kind in KINDS} == dict.fromkeys(KINDS, "model.safetensors")
    (data,) = seen["data"]
    assert (data / "data" / "suite" / "a_demo.hdf5").read_bytes() == b"demonstrations"
    policy = cli._policy(run, Path("user/policy"))
    assert store.digest(policy) == store.digest(store.load("policy", seen["policy"]))


def test_names_that_lead_nowhere(hub, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no user/none here\. On the hub: .* knows no such model"):
        store.locate("policy", Path("user/none"))
    with pytest.raises(UserError, match="knows no such data set"):
        store.locate("data", Path("user/none"))
    for word in ("absent", "runs/policy.safetensors", "/absent/policy"):  # these are paths
        assert store.locate("policy", Path(word)) == Path(word)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"no user/none here\. On the hub: .*HF_HUB_OFFLINE is set"):
        store.locate("policy", Path("user/none"))


class _Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


def test_pickles_are_refused_by_name(hub, tmp_path):
    bomb = pickle.dumps(_Bomb())
    hub.add("user/old", {"pytorch_model.bin": bomb, "config.json": b"{}"})
    with pytest.raises(
        UserError, match=r"user/old: .*pytorch_model\.bin\), which are never opened"
    ):
        store.locate("policy", Path("user/old"))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "policy.pt").write_bytes(bomb)
    with pytest.raises(UserError, match=r"old: .*policy\.pt\), which are never opened"):
        store.locate("policy", tmp_path / "old")
    hub.add("user/false", {"model.safetensors": bomb})
    with pytest.raises(UserError, match="truncated or no safetensors file"):
        store.load("policy", store.locate("policy", Path("user/false")))
