"""Checkpoints named on the command line stand in for a stage, and are never written over."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from toy import NAMES, Toy

from worldenv.envs.libero import cameras
from worldenv.presets import preset
from worldenv.runtime import checkpoint
from worldenv.runtime.errors import UserError
from worldenv.stages import store

BASE = preset("smoke")
KINDS = {"policy": "sft", "simulator": "simulator-0", "reflector": "reflector-0"}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    return Toy(tmp_path / "run", monkeypatch)


@pytest.fixture
def files(tmp_path):
    """One checkpoint of each kind, of another run."""
    torch.manual_seed(0)
    paths = {kind: tmp_path / f"{kind}.safetensors" for kind in KINDS}
    for kind, path in paths.items():
        model = store.build(kind, BASE)
        if kind == "reflector":
            model.real_threshold.fill_(0.5)
        store.save(kind, model, path)
    return paths


def test_a_reflector_without_a_threshold_for_real_frames_is_refused_at_once(toy, files):
    store.save("reflector", store.build("reflector", BASE), files["reflector"])
    with pytest.raises(UserError, match="calibrated on real frames, got none"):
        toy.run(files={"reflector": files["reflector"]})
    assert not (toy.folder / "config.json").exists()


def artifact(toy: Toy, kind: str):
    return toy.folder / toy.steps()[KINDS[kind]].makes[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_named_checkpoint_is_used_by_all_and_by_its_own_stage(toy, files, kind, capsys):
    stage = KINDS[kind].removesuffix("-0")
    done = toy.run(files={kind: files[kind]})
    assert done == [name for name in NAMES if name != KINDS[kind]]
    assert artifact(toy, kind).read_bytes() == files[kind].read_bytes()
    assert f"{KINDS[kind]}: adopted from {files[kind]}, skipped" in capsys.readouterr().out
    for again in ({"files": {kind: files[kind]}}, {}):
        assert toy.run(**again) == []
        assert toy.run(stage, **again) == []
        assert artifact(toy, kind).read_bytes() == files[kind].read_bytes()


def test_posttraining_with_a_named_simulator_in_a_finished_folder(toy, files):
    toy.run()
    before = toy.state()
    done = toy.run("posttrain", files={"simulator": files["simulator"]})
    assert done == ["reflector-0", "fidelity-0", "posttrain-0"]  # what follows from it
    # The one that was trained here has moved aside, and comes back when it is named no longer.
    (toy.folder / "stages/simulator-0.json").unlink()
    assert toy.run() == []
    assert toy.state() == before
    assert list(toy.folder.glob("aside/simulator-0-changed-*/checkpoints/simulator-0.safetensors"))


def test_posttraining_in_a_fresh_folder_makes_what_it_needs(toy, files):
    assert toy.run("posttrain", files=files) == [
        "demonstrations",
        "explore-0",
        "fidelity-0",
        "posttrain-0",
    ]
    assert toy.run("posttrain", files=files) == []


def test_named_checkpoints_do_not_excuse_other_settings(toy, files):
    toy.run()
    before = toy.everything()
    with pytest.raises(UserError, match=r"demonstrations \(was made with other settings\)"):
        toy.run("posttrain", files={"simulator": files["simulator"]}, seed=5)
    assert toy.everything() == before


def test_an_interrupted_run_with_a_named_checkpoint_goes_on(toy, files):
    named = {"reflector": files["reflector"]}
    toy.interrupt("posttrain-0", "posttrain", 0, files=named)
    assert toy.run("posttrain", files=named) == ["posttrain-0"]


def test_the_second_rounds_simulator_can_be_named(toy, files):
    toy.run()
    done = toy.run("posttrain", 1, files={"simulator": files["simulator"]})
    assert done == ["reflector-1", "fidelity-1", "posttrain-1"]


def test_a_runs_own_checkpoint_named_again_changes_nothing(toy, monkeypatch):
    toy.run()
    toys = SimpleNamespace(config=BASE)  # are no checkpoints
    monkeypatch.setattr(store, "load", lambda *a, **k: toys)
    own = toy.folder / "checkpoints/simulator-0.safetensors"
    assert toy.run("posttrain", files={"simulator": own}) == []
    assert toy.run() == []
    # The policy of a later stage is a checkpoint like any other, also when that stage is redone.
    last = toy.folder / "checkpoints/policy-1.safetensors"
    content = last.read_bytes()
    assert "sft" not in toy.run(files={"policy": last})
    assert (toy.folder / "checkpoints/policy-sft.safetensors").read_bytes() == content


def test_a_damaged_adopted_checkpoint_is_not_trained_silently(toy, files):
    toy.run(files={"simulator": files["simulator"]})
    copy = artifact(toy, "simulator")
    copy.write_bytes(copy.read_bytes()[:100])
    with pytest.raises(UserError, match=r"adopted from .* is gone or changed.*--simulator FILE"):
        toy.run()
    assert toy.run(files={"simulator": files["simulator"]}) == []
    assert copy.read_bytes() == files["simulator"].read_bytes()
    with pytest.raises(
        UserError,
        match=r"adopted from .*, trained with env.chunk 8, got 4.*Name a checkpoint again",
    ):
        toy.run(env__chunk=4)


@pytest.mark.parametrize("drawn", [True, False])
def test_an_adopted_simulator_that_draws_is_of_the_same_cameras(toy, tmp_path, monkeypatch, drawn):
    path = tmp_path / "drawing.safetensors"
    config = replace(BASE, simulator=replace(BASE.simulator, action_map=drawn))
    store.save("simulator", store.build("simulator", config), path)
    toy.run(files={"simulator": path})
    monkeypatch.setitem(cameras.AGENTVIEW, "table", cameras.AGENTVIEW["floor"])
    if drawn:
        with pytest.raises(UserError, match=r"adopted from .* do not all stand where those did"):
            toy.run()
    else:
        assert toy.run() == []


@pytest.mark.parametrize("kind", ["simulator", "reflector"])
def test_an_adopted_world_or_judge_is_of_the_same_suite(toy, files, kind):
    model = store.load(kind, files[kind])
    store.save(kind, model, files[kind], BASE.env)
    toy.run(files={kind: files[kind]})
    other = replace(BASE.env, suite="libero_goal")
    for named in ({"files": {kind: files[kind]}}, {}):
        with pytest.raises(UserError, match="tasks 8 of libero_spatial, got tasks 8 of"):
            toy.run("posttrain", env=other, **named)
    assert toy.run() == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_such_checkpoint_is_refused_before_anything_is_written(
    toy, files, kind, tmp_path
):
    toy.run()
    before = toy.everything()
    bad = tmp_path / "bad.safetensors"
    wrong = files["reflector" if kind == "policy" else "policy"]
    tensors, metadata = checkpoint.load(files[kind])
    name = next(name for name, tensor in tensors.items() if tensor.numel() > 1)

    def refused(words: str, path=bad) -> None:
        with pytest.raises(UserError, match=words) as raised:
            toy.run(files={kind: path})
        assert str(path) in str(raised.value)
        assert "elete" not in str(raised.value)  # it is the user's
        assert toy.everything() == before

    refused("No checkpoint at", tmp_path / "none")
    refused(f"expected a {kind} checkpoint, got", wrong)
    torch.save(tensors, tmp_path / "model.pt")
    refused("pickles, which are not opened", tmp_path / "model.pt")
    save_file(tensors, bad)
    refused("not one of worldenv's")
    with torch.no_grad():
        checkpoint.save(bad, {**tensors, name: tensors[name] * float("nan")}, metadata)
    refused(f"{name} .*expected finite weights, got {tensors[name].numel()} NaN")
    checkpoint.save(bad, {**tensors, name: tensors[name].int()}, metadata)
    refused(f"{name}: expected .* got .* int32")
    for key, value, words in (
        ("config", None, "metadata 'config': expected dict, got none"),
        ("config", 3, "metadata 'config': expected dict, got 3"),
        ("config", {"size": 3}, "unknown key 'size'"),
        ("embodiment", None, "metadata 'embodiment': expected dict, got none"),
        ("embodiment.image_size", "64", "embodiment image_size: expected a whole number"),
        ("embodiment.image_size", 32, r"with env.image_size 32, got 64.*--env.image-size 32"),
        ("embodiment.chunk", True, "embodiment chunk: expected a whole number"),
        ("embodiment.chunk", 4, r"trained with env.chunk 4, got 8"),
        ("embodiment.image_size", 100, "image_size: expected"),
    ):
        changed = {k: v for k, v in metadata.items() if k != key}
        if value is not None:
            part, _, field = key.partition(".")
            changed[part] = {**metadata[part], field: value} if field else value
        checkpoint.save(bad, tensors, changed)
        refused(words)
    for text, words in (("{", "expected JSON"), ("[1]", "expected a JSON object, got list")):
        save_file(tensors, bad, metadata={"worldenv": text})
        refused(words)


def test_a_policy_of_other_sizes_is_saved_with_its_own(tmp_path):
    """Post-training an adopted policy wrote the run's sizes beside the policy's weights."""
    small = replace(BASE, policy=replace(BASE.policy, width=32, layers=1))
    store.save("policy", store.build("policy", small), tmp_path / "small")
    policy = store.load("policy", tmp_path / "small", fits=BASE)
    store.save("policy", policy, tmp_path / "again")
    again = store.load("policy", tmp_path / "again")
    assert again.config == small.policy
    assert store.digest(again) == store.digest(policy)
    with safe_open(tmp_path / "again", framework="pt") as file:
        assert '"width": 32' in file.metadata()["worldenv"]
