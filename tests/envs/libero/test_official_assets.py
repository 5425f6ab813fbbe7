"""LIBERO's official assets: fetched by one command or after a question, and found from then on.

Files of our own pack stand in for them: they are what libero_spatial loads.
"""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from worldenv import doctor
from worldenv.envs.libero import assets, official_assets
from worldenv.envs.libero.primitive_assets import STAMP_FILE, write_pack
from worldenv.runtime import places
from worldenv.runtime.errors import UserError

pytest.importorskip("libero", reason="hf-libero is not installed")
SUITE = "libero_spatial"


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv(places.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(assets.ASSETS_VARIABLE, raising=False)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(official_assets, "_declined", False)


@pytest.fixture
def files(tmp_path) -> dict[str, bytes]:
    """What the repository holds."""
    pack = tmp_path / "pack"
    write_pack(pack)
    (pack / STAMP_FILE).unlink()
    return {str(p.relative_to(pack)): p.read_bytes() for p in pack.rglob("*") if p.is_file()}


@pytest.fixture
def needy(monkeypatch):
    """As if the suite were one that has no pack of ours."""
    monkeypatch.setattr(assets, "PRIMITIVE_SUITES", ())


def terminal(monkeypatch, answer: str) -> None:
    """A person at a terminal who answers so."""
    for name, text in (("stdin", answer), ("stdout", "")):
        stream = io.StringIO(text)
        stream.isatty = lambda: True
        monkeypatch.setattr(sys, name, stream)


def test_the_repository_is_the_one_that_hf_libero_names():
    text = (assets.libero_root() / "utils" / "download_utils.py").read_text()
    assert f'HF_ASSETS_REPO_ID = "{official_assets.REPOSITORY}"' in text


def test_the_command_fetches_and_they_are_found(hub, files, needy, monkeypatch, capsys):
    with pytest.raises(UserError, match=r"not been fetched\. Fetch them with `worldenv-doctor --f"):
        assets.resolve_assets(None, SUITE)
    commit = hub.add(official_assets.REPOSITORY, files, "dataset")
    monkeypatch.setattr(doctor, "examine", lambda folder: [doctor.check_assets()])
    assert doctor.main(["--fetch-assets"]) == 0
    said = capsys.readouterr().out
    assert f"{official_assets.REPOSITORY}@{commit[:12]}, {len(files)} files" in said
    hub.requests.clear()
    source = assets.resolve_assets(None, SUITE)
    assert (source.kind, source.path.name) == ("official", commit)
    assert source == assets.resolve_assets(Path("official"), SUITE)
    assert f"LIBERO's official files, {official_assets.REPOSITORY}@{commit[:12]}" in str(source)
    assert hub.requests == []
    assert doctor.check_assets().state == "ok"


def test_the_pack_stays_the_default_where_there_is_one(hub, files, monkeypatch):
    hub.add(official_assets.REPOSITORY, files, "dataset")
    official_assets.fetch()
    source = assets.resolve_assets(None, SUITE)
    assert source.kind == "primitive"
    assert "primitive pack" in str(source)
    monkeypatch.setenv(assets.ASSETS_VARIABLE, "official")
    assert assets.resolve_assets(None, SUITE).kind == "official"
    assert "primitive pack" not in doctor.check_assets().found


def test_a_fetch_that_fails_leaves_nothing_to_be_found(hub, files, tmp_path, impatient):
    large = max(files, key=lambda name: len(files[name]))
    hub.add(official_assets.REPOSITORY, files, "dataset")
    for fault, message in (("stall", "does not answer"), ("alter", "not what the hub says")):
        hub.faults[large] = [fault] * (20 if fault == "stall" else 1)
        with impatient(), pytest.raises(UserError, match=message):
            official_assets.fetch()
        hub.faults.clear()
        assert official_assets.at_hand() is None
        assert not list((tmp_path / "cache").glob("*.json"))
    hub.requests.clear()
    assert Path(official_assets.fetch().folder, large).read_bytes() == files[large]
    assert len(hub.asked("GET", "/resolve/")) == 1


def test_what_was_removed_is_not_found(hub, files, needy, tmp_path):
    hub.add(official_assets.REPOSITORY, files, "dataset")
    fetched = official_assets.fetch()
    (Path(fetched.folder) / "scenes" / "libero_tabletop_base_style.xml").unlink()
    with pytest.raises(UserError, match=r"lacks scenes/.*base_style\.xml .*--fetch-assets"):
        assets.resolve_assets(None, SUITE)
    assert official_assets.fetch() == fetched
    assert assets.resolve_assets(None, SUITE).kind == "official"
    stamp = tmp_path / "cache" / "libero-assets.json"
    for text in ("{", "[]", "{}", json.dumps(fetched.__dict__ | {"folder": "/nowhere"})):
        stamp.write_text(text)
        assert official_assets.at_hand() is None


def test_a_person_is_asked_once(hub, files, needy, monkeypatch):
    hub.add(official_assets.REPOSITORY, files, "dataset")
    terminal(monkeypatch, "n\ny\n")
    for _ in range(2):
        with pytest.raises(UserError, match="not been fetched"):
            assets.resolve_assets(None, SUITE)
    assert sys.stdout.getvalue().count("[y/N]") == 1
    assert hub.requests == []
    monkeypatch.setattr(official_assets, "_declined", False)
    terminal(monkeypatch, "y\n")
    assert assets.resolve_assets(None, SUITE).kind == "official"


@pytest.mark.parametrize("why", ["no terminal", "CI", "offline"])
def test_nobody_is_asked(hub, files, needy, monkeypatch, why):
    hub.add(official_assets.REPOSITORY, files, "dataset")
    if why != "no terminal":
        terminal(monkeypatch, "y\n")
    if why == "CI":
        monkeypatch.setenv("CI", "true")
    if why == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="not been fetched"):
        assets.resolve_assets(None, SUITE)
    assert hub.requests == []


def test_the_script_says_why_it_fails(hub, tmp_path):
    """By HF_ENDPOINT, as a user would name another hub; no such repository is there."""
    code = "from worldenv import entry; entry.doctor()"
    result = subprocess.run(
        [sys.executable, "-c", code, "--fetch-assets"],
        env={"PATH": "", "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"),
             places.CACHE_VARIABLE: str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert f"{official_assets.REPOSITORY}: {hub.endpoint} knows no such data set" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "cache" / "libero-assets.json").exists()
