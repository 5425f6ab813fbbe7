"""What is fetched from a hub on loopback, what ends a fetch, and what stays when it has ended."""

import re
import time
from pathlib import Path

import pytest
from huggingface_hub import constants
from loopback_hub import TOKEN

from worldenv.runtime import hub as ours
from worldenv.runtime.errors import UserError

FILES = {"a.xml": b"<a/>", "big.stl": bytes(range(256)) * 64, "textures/b.png": b"png" * 100}


def whole(snapshot: ours.Snapshot, files: dict[str, bytes]) -> bool:
    return {k: (snapshot.folder / k).read_bytes() for k in files} == files


def leftovers(tmp_path: Path) -> list[str]:
    """Parts of files, anywhere below the cache."""
    return [p.name for p in (tmp_path / "hub").rglob("*incomplete*")]


def test_words_that_name_a_repository():
    assert ours.parse("user/name") == ("user/name", None)
    assert ours.parse("user/name.x@v1/a") == ("user/name.x", "v1/a")
    for word in ("name", "a/b/c", "/a/b", "./a/b", "../b", "~/b", "a/b@", "a b/c"):
        assert ours.parse(word) is None


def test_fetched_once_then_found(hub, tmp_path):
    sha = hub.add("user/set", FILES, "dataset")
    first = ours.fetch("user/set", kind="dataset")
    assert (first.commit, first.files) == (sha, 3)
    assert first.bytes == sum(map(len, FILES.values()))
    assert whole(first, FILES)
    hub.requests.clear()
    assert ours.fetch("user/set", kind="dataset") == first
    assert not hub.asked("GET", "/resolve/")
    newer = hub.add("user/set", FILES | {"a.xml": b"<b/>"}, "dataset")
    assert ours.fetch("user/set", kind="dataset").commit == newer
    assert len(hub.asked("GET", "/resolve/")) == 1  # of the file that changed
    assert ours.fetch("user/set", sha, kind="dataset") == first


def test_a_connection_that_breaks_is_resumed(hub, tmp_path):
    hub.add("user/set", FILES, "dataset")
    hub.faults["big.stl"] = ["cut", "cut"]
    assert whole(ours.fetch("user/set", kind="dataset"), FILES)
    half = len(FILES["big.stl"]) // 2
    assert hub.asked("GET", "big.stl") == [None, f"bytes={half}-", f"bytes={half + half // 2}-"]


def test_an_interrupted_fetch_goes_on(hub, tmp_path, impatient):
    hub.add("user/set", FILES, "dataset")
    hub.faults["big.stl"] = ["stall"] * 20
    begun = time.monotonic()
    with impatient(), pytest.raises(UserError, match=r"does not answer.*same command again"):
        ours.fetch("user/set", kind="dataset")
    assert time.monotonic() - begun < 10
    assert leftovers(tmp_path) == []
    hub.faults.clear()
    hub.requests.clear()
    assert whole(ours.fetch("user/set", kind="dataset"), FILES)
    assert len(hub.asked("GET", "/resolve/")) == 1  # the others had arrived


@pytest.mark.parametrize("part", ["/api/datasets/user/set", "/tree/"])
def test_a_hub_that_stalls_at_once_is_not_waited_for(hub, part, impatient):
    hub.add("user/set", FILES, "dataset")
    hub.faults[part] = ["stall"] * 20
    begun = time.monotonic()
    with impatient(), pytest.raises(UserError, match=rf"user/set: {hub.endpoint} does not answer"):
        ours.fetch("user/set", kind="dataset")
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("file", ["big.stl", "a.xml"])
def test_a_file_that_is_not_what_the_hub_says_is_removed(hub, tmp_path, file):
    hub.add("user/set", FILES, "dataset")
    hub.faults[file] = ["alter"]
    with pytest.raises(UserError, match=rf"{re.escape(file)} \(expected \w{{12}}, got"):
        ours.fetch("user/set", kind="dataset")
    held = {path.name for path in (tmp_path / "hub").rglob("*") if path.is_symlink()}
    assert held == {Path(name).name for name in FILES} - {file}
    assert whole(ours.fetch("user/set", kind="dataset"), FILES)


def test_unknown_names(hub):
    hub.add("user/set", FILES)
    with pytest.raises(UserError, match=r"user/nothing: .* knows no such model.*HF_TOKEN"):
        ours.fetch("user/nothing")
    with pytest.raises(UserError, match=r"user/set: .* knows no such data set"):
        ours.fetch("user/set", kind="dataset")
    with pytest.raises(UserError, match=r"user/set@v9: .* no such revision"):
        ours.fetch("user/set", "v9")
    hub.repositories["model", "user/set"].private = True
    with pytest.raises(UserError, match="if it is private"):
        ours.fetch("user/set")


def test_offline(hub, monkeypatch):
    hub.add("user/set", FILES)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="user/set: HF_HUB_OFFLINE is set, and the cache"):
        ours.fetch("user/set")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    first = ours.fetch("user/set")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert ours.fetch("user/set") == first == ours.fetch("user/set", first.commit)
    assert hub.requests == []
    (first.folder / "a.xml").unlink()
    with pytest.raises(UserError, match="does not hold it whole"):
        ours.fetch("user/set")


def test_pickles_are_not_fetched(hub):
    pickles = {"pytorch_model.bin": b"x", "head.pt": b"y"}
    hub.add("user/old", pickles)
    with pytest.raises(UserError, match=r"head\.pt, pytorch_model\.bin\), which are never opened"):
        ours.fetch("user/old", only=["model.safetensors"])
    hub.add("user/both", pickles | {"model.safetensors": b"z"})
    snapshot = ours.fetch("user/both", only=["model.safetensors", "config.json"])
    assert [path.name for path in snapshot.folder.iterdir()] == ["model.safetensors"]


def test_a_full_disk_is_named(hub, monkeypatch, tmp_path):
    hub.add("user/set", FILES)
    (tmp_path / "hub").write_text("")  # a file where the cache belongs
    with pytest.raises(UserError, match=r"could not be fetched into .*HF_HOME"):
        ours.fetch("user/set")


def test_push_then_fetch(hub, tmp_path, monkeypatch, impatient):
    for name, data in FILES.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(data)
    with pytest.raises(UserError, match=r"expected a token that may write, got none.*HF_TOKEN"):
        ours.push(tmp_path / "out", "user/new", "model", True, "first")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(UserError, match=r"refused: .*token that may write"):
        ours.push(tmp_path / "out", "user/new", "model", True, "first")
    assert hub.repositories == {}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    place = ours.push(tmp_path / "out", "user/new", "model", True, "first")
    assert place.startswith(f"{hub.endpoint}/user/new/commit/")
    assert hub.repositories["model", "user/new"].private
    assert whole(ours.fetch("user/new"), FILES)
    hub.faults["/commit/"] = ["stall"]
    (tmp_path / "out" / "a.xml").write_bytes(b"<c/>")
    with impatient(), pytest.raises(UserError, match="does not answer"):
        ours.push(tmp_path / "out", "user/new", "model", True, "second")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        ours.push(tmp_path / "out", "user/new", "model", True, "first")
