"""The doctor's table on this machine, and what it says where something is missing."""

import io
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from worldenv import doctor
from worldenv.doctor import Finding
from worldenv.envs.libero import assets
from worldenv.runtime import device, graphics
from worldenv.runtime.errors import UserError


@pytest.mark.libero
def test_this_machine_has_what_the_tests_need(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    code = doctor.main(["--folder", str(tmp_path / "runs")])
    text = capsys.readouterr().out
    for name in ("torch", "extension", "CPU features", "GL backend", "LIBERO", "assets", "memory"):
        assert name in text
    assert code == 0, text


def test_missing_things_come_with_a_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    for check in (doctor.check_libero, doctor.check_graphics):
        finding = check()
        assert finding.state == "missing"
        assert "--no-deps hf-libero==0.1.4" in finding.mend
    assert doctor.check_triton().mend == 'pip install "triton>=3.6,<3.9"'
    assert doctor.check_optional().state == "note"


def test_no_gl_and_no_extension(monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise UserError("nothing renders")

    monkeypatch.setattr(graphics, "choose", broken)
    monkeypatch.setattr(device, "cpu_features", broken)
    assert doctor.check_cpu().mend == device.BUILD_COMMAND
    if doctor._version("mujoco"):
        assert doctor.check_graphics().mend == graphics.INSTALL_COMMAND


def test_libero_that_does_not_import(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_LIBERO_VERSIONS", {})
    failed = subprocess.CompletedProcess([], 1, "", "Traceback ...\nImportError: no bddl\n")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: failed)
    finding = doctor.check_libero()
    assert finding.state == "missing"
    assert "ImportError: no bddl" in finding.found


def test_assets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv(assets.ASSETS_VARIABLE, raising=False)
    assert "primitive pack" in doctor.check_assets().found
    monkeypatch.setenv(assets.ASSETS_VARIABLE, str(tmp_path / "nowhere"))
    finding = doctor.check_assets()
    assert finding.state == "missing"
    assert "nowhere" in finding.found


def test_another_package_s_benchmark(monkeypatch: pytest.MonkeyPatch):
    own = str(Path(__file__).parents[1] / "examples" / "own_benchmark.py")
    assert doctor.check_benchmark(own).found == "benchmark with suites blocks"

    def lacking(env: object) -> None:
        raise UserError("no meshes here")

    monkeypatch.setattr(doctor.find(own), "check", lacking)
    finding = doctor.check_benchmark(own)
    assert (finding.state, finding.found) == ("note", "no meshes here")
    monkeypatch.setattr(doctor, "registered", lambda: ["libero", "no-such"])
    monkeypatch.setattr(doctor, "check_benchmark", lambda name: Finding(name, "note", "seen"))
    assert [check().name for check in doctor.listed()] == ["no-such"]


def test_disk_and_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert str(tmp_path.resolve()) in doctor.check_disk(tmp_path / "not" / "yet").found
    monkeypatch.setattr(doctor, "NEEDED_DISK", 1 << 60)
    monkeypatch.setattr(doctor, "NEEDED_MEMORY", 1 << 60)
    assert doctor.check_disk(tmp_path).state == "missing"
    assert doctor.check_memory().state == "note"


def test_exit_code_and_copyable_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    found = [Finding("a", "ok", "1 [x]"), Finding("b", "missing", "no", "pip install '.[b]' " * 9)]
    monkeypatch.setattr(doctor, "examine", lambda folder: found)
    assert doctor.main([]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "Missing: b."
    screen = io.StringIO()
    doctor.render(found, Console(file=screen, width=60))
    assert "1 [x]" in screen.getvalue()
    assert ("pip install '.[b]' " * 9).strip() in screen.getvalue()
    monkeypatch.setattr(doctor, "examine", lambda folder: found[:1])
    assert doctor.main([]) == 0
