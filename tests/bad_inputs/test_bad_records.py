"""Records that a run keeps of itself, damaged: named, or taken for absent; never a traceback."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from table import Row, ends_in_a_named_error
from test_bad_files import SMALL

from worldenv.runtime.errors import UserError
from worldenv.stages import evaluate, store
from worldenv.stages.run import Run

TEXTS = {
    "empty": b"",
    "cut short": b'{"seconds": 1',
    "a list": b"[]",
    "a number": b"3",
    "text": b'"done"',
    "null": b"null",
    "an empty table": b"{}",
    "Latin-1": '{"fingerprint": "ü"}'.encode("latin-1"),
    "NUL bytes": bytes(40),
    "nested deep": b"[" * 100_000,
    "seconds as text": b'{"seconds": "3", "fingerprint": "a"}',
    "no seconds": b'{"fingerprint": "a"}',
    "seconds NaN": b'{"seconds": NaN, "fingerprint": "a"}',
    "a number for a fingerprint": b'{"seconds": 1, "fingerprint": 3}',
}


@pytest.fixture
def run(tmp_path):
    run = Run(replace(SMALL, run_dir=tmp_path / "run"))
    yield run
    run.close()


@pytest.mark.parametrize("name", TEXTS)
def test_a_damaged_record_is_named(name, run):
    path = run.path("stages", "sft.json")
    path.write_bytes(TEXTS[name])
    with pytest.raises(UserError, match="sft"):
        run.record("sft")


def test_a_folder_where_a_record_belongs_is_named(run):
    run.path("stages", "sft.json").mkdir()
    with pytest.raises(UserError, match=r"sft\.json is a folder where a file belongs"):
        run.record("sft")


EPISODE = {"task": 8, "start": 20, "seed": 1000, "success": True, "steps": 9}
OUTCOMES = {
    **{k: TEXTS[k] for k in ("empty", "cut short", "a list", "a number", "Latin-1", "NUL bytes")},
    "no episodes": b'{"mark": "m"}',
    "episodes that are a number": b'{"mark": "m", "episodes": 3}',
    "episodes that are a table": b'{"mark": "m", "episodes": {}}',
    "an episode that is a number": b'{"mark": "m", "episodes": [3]}',
    **{
        f"an episode without {key}": json.dumps(
            {"mark": "m", "episodes": [{k: v for k, v in EPISODE.items() if k != key}]}
        ).encode()
        for key in EPISODE
    },
    "success as text": json.dumps({"mark": "m", "episodes": [EPISODE | {"success": "y"}]}).encode(),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_damaged_outcomes_are_measured_anew_or_named(name, run, monkeypatch):
    last = run.config.posttrain.rounds - 1
    for file in ("policy-sft", f"policy-{last}", f"reflector-{last}"):
        kind = file.split("-")[0]
        path = run.path("checkpoints", f"{file}.safetensors")
        store.save(kind, store.build(kind, SMALL), path)
    run.path("evaluation", "sft.json").write_bytes(OUTCOMES[name])

    def outcomes(run, policy, starts, *rest, **more):
        return [
            EPISODE | {"task": s.task, "start": s.index, "seed": s.seed, "success": False}
            for s in starts
        ]

    monkeypatch.setattr(evaluate, "evaluate_policy", outcomes)
    try:
        measured = evaluate.run(run, "m")["outcomes"]["sft"]
    except UserError as error:
        named = str(error)
    else:
        named = ""
        wanted = {(s.index, s.seed) for s in evaluate.held_out_starts(run)}
        assert {(e["start"], e["seed"]) for e in measured} == wanted
        assert not any(e["success"] for e in measured)
    assert not named or "sft.json" in named


def metadata_rows():
    """Every fact of a checkpoint absent, of another type, and out of range."""
    faults = {
        "kind": [None, 3, "simulator", []],
        "config": [None, 3, [], "small", {"widht": 8}, {"width": 0}, {"width": "8"}, {"heads": 3}],
        "embodiment": [None, 3, [], "panda", {}, {"vews": []}],
        "embodiment.name": [None, 3, ""],
        "embodiment.views": [None, [], "front", [3], ["a", "a"]],
        "embodiment.proprio": [None, [], [3], [{}], [{"name": "x", "kind": "y"}]],
        "embodiment.action": [None, [], "grip", ["fly"]],
        "embodiment.image_size": [None, 0, -64, 1.5, "16", 10**12, True],
        "embodiment.render_size": [None, 0, 8, "128"],
        "embodiment.rotation": [None, 45, "180"],
        "embodiment.chunk": [None, 0, -1, "8", 10**12, 2.5],
        "embodiment.control_hz": [None, 0, -20, "20"],
        "embodiment.gripper_closes": [None, 0, "1", 0.5],
        "embodiment.gripper_open": [None, -1, "wide"],
        "embodiment.normalisation": [None, "none", 3],
    }
    for fact, values in faults.items():
        if fact != "embodiment.normalisation":  # which has a usual value
            yield Row(f"without {fact}", lambda f, k=fact: damaged(f, k), "policy.safetensors")
        for value in values:
            act = lambda f, k=fact, v=value: damaged(f, k, v)  # noqa: E731
            yield Row(f"{fact}: {json.dumps(value)}", act, "policy.safetensors")
    for text in ("", "{", "[]", "3", "null", "[" * 100_000):
        act = lambda f, t=text: with_header(f, t)  # noqa: E731
        yield Row(f"header {text[:4]!r}", act, "policy.safetensors")


def damaged(folder, fact: str, *value):
    store.save("policy", store.build("policy", SMALL), folder / "whole.safetensors")
    with safe_open(folder / "whole.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["worldenv"])
    *outer, name = fact.split(".")
    table = facts[outer[0]] if outer else facts
    table.pop(name)
    table.update({name: value[0]} if value else {})
    return with_header(folder, json.dumps(facts))


def with_header(folder, text: str):
    whole = folder / "whole.safetensors"
    if not whole.exists():
        store.save("policy", store.build("policy", SMALL), whole)
    path = folder / "policy.safetensors"
    save_file(load_file(whole), path, {"worldenv": text})
    return store.load("policy", path)


@pytest.mark.parametrize("row", list(metadata_rows()), ids=str)
def test_a_checkpoints_damaged_facts_are_named(row, tmp_path, capsys):
    ends_in_a_named_error(row, tmp_path, capsys)


def test_a_policy_whose_weights_are_nan_is_named(tmp_path):
    policy = store.build("policy", SMALL)
    with torch.no_grad():
        policy.norm.weight[0] = torch.nan
    store.save("policy", policy, tmp_path / "policy.safetensors")
    with pytest.raises(UserError, match=r"norm\.weight"):
        store.load("policy", tmp_path / "policy.safetensors")
