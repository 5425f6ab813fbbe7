"""Choosing, writing and checking asset folders; configuring LIBERO; choosing a GL library."""

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from worldenv.envs.libero import assets
from worldenv.envs.libero.primitive_assets import STAMP_FILE, write_pack
from worldenv.runtime import places
from worldenv.runtime.errors import UserError

pytest.importorskip("libero", reason="hf-libero is not installed")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv(places.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(assets.ASSETS_VARIABLE, raising=False)


def test_primitive_pack_is_written_once_per_version(tmp_path, monkeypatch):
    first = assets.resolve_assets(None, "libero_spatial")
    assert first.kind == "primitive"
    assert first.path.parent == tmp_path / "cache"
    written = (first.path / STAMP_FILE).stat().st_mtime_ns
    assert assets.resolve_assets(None, "libero_spatial") == first
    assert (first.path / STAMP_FILE).stat().st_mtime_ns == written
    monkeypatch.setattr(assets, "pack_version", lambda: "another")
    assert not (tmp_path / "cache" / "primitive-another").exists()
    assert assets.resolve_assets(None, "libero_spatial").path != first.path


def test_concurrent_and_interrupted_writes_leave_one_whole_pack(tmp_path):
    cache = tmp_path / "cache"
    broken = cache / f"primitive-{assets.pack_version()}"
    broken.mkdir(parents=True)  # no stamp: as left by a copy that was cut off
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: assets.resolve_assets(None, "libero_spatial"), range(4)))
    assert {source.path for source in found} == {broken}
    assert assets.missing_files(broken, "libero_spatial") == []
    assert [path.name for path in cache.iterdir()] == [broken.name]


@pytest.mark.parametrize("moment", range(4))
@pytest.mark.parametrize("stands", ["broken", "other version", "file"])
def test_another_process_writes_the_pack_at_every_moment(tmp_path, monkeypatch, stands, moment):
    """Between any two renames of ours another process puts its pack in place of a broken one."""
    cache = tmp_path / "cache"
    target = cache / f"primitive-{assets.pack_version()}"
    theirs = tmp_path / "theirs"
    write_pack(theirs)
    if stands == "file":
        cache.mkdir()
        target.write_text("")
    else:
        write_pack(target)
        (target / STAMP_FILE).unlink() if stands == "broken" else (
            target / STAMP_FILE).write_text("0")  # fmt: skip
    rename, calls = Path.rename, []

    def renamed(path, goal):
        if len(calls) == moment and theirs.exists():
            if target.exists():
                rename(target, tmp_path / "theirs before")
            rename(theirs, target)
        calls.append(path)
        return rename(path, goal)

    monkeypatch.setattr(Path, "rename", renamed)
    assert assets.resolve_assets(None, "libero_spatial").path == target
    assert (target / STAMP_FILE).read_text() == assets.pack_version()
    assert assets.missing_files(target, "libero_spatial") == []
    assert [path.name for path in cache.iterdir()] == [target.name]
    assert len(calls) == (3 if moment else 1)


def test_explicit_folder_comes_before_the_variable(tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    write_pack(one)
    write_pack(two)
    monkeypatch.setenv(assets.ASSETS_VARIABLE, str(two))
    assert assets.resolve_assets(None, "libero_spatial").path == two
    assert assets.resolve_assets(one, "libero_spatial").path == one
    (one / STAMP_FILE).unlink()
    assert assets.resolve_assets(one, "libero_spatial").kind == "official"


def test_missing_files_are_named(tmp_path):
    write_pack(tmp_path / "pack")
    (tmp_path / "pack" / "textures" / "light-gray-plaster.png").unlink()
    (tmp_path / "pack" / "stable_scanned_objects" / "plate" / "plate.xml").unlink()
    with pytest.raises(UserError, match=r"textures/light-gray-plaster\.png") as error:
        assets.resolve_assets(tmp_path / "pack", "libero_spatial")
    assert "plate/plate.xml" in str(error.value)
    assert "libero_spatial" in str(error.value)
    with pytest.raises(UserError, match=r"articulated_objects/flat_stove\.xml"):
        assets.resolve_assets(tmp_path, "libero_spatial")
    with pytest.raises(UserError, match="not a folder"):
        assets.resolve_assets(tmp_path / "absent", "libero_spatial")


def test_damaged_xml_is_named(tmp_path):
    write_pack(tmp_path)
    file = tmp_path / "stable_hope_objects" / "cookies" / "cookies.xml"
    file.write_text(file.read_text()[:100])
    with pytest.raises(UserError, match=r"cookies\.xml is not readable"):
        assets.resolve_assets(tmp_path, "libero_spatial")


def test_other_suites_need_official_assets():
    with pytest.raises(UserError, match=f"libero_object needs .* {assets.ASSETS_VARIABLE}"):
        assets.resolve_assets(None, "libero_object")
    with pytest.raises(UserError, match="libero_spatial"):
        assets.resolve_assets(None, "libero_spacial")


def test_unwritable_cache_is_explained(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(places.CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(UserError, match=places.CACHE_VARIABLE):
        assets.resolve_assets(None, "libero_spatial")


def test_absent_libero_names_the_commands(monkeypatch):
    def absent(name):
        raise assets.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(assets.importlib.metadata, "distribution", absent)
    with pytest.raises(UserError, match=r"pip install --no-deps hf-libero==0\.1\.4"):
        assets.libero_root()


@pytest.mark.libero
def test_a_foreign_libero_earlier_on_the_path_is_not_used(tmp_path):
    foreign = tmp_path / "libero"
    (foreign / "libero" / "bddl_files").mkdir(parents=True)
    for folder in (foreign, foreign / "libero"):
        (folder / "__init__.py").write_text("_assets_path_cache = 'theirs'\n")
    source = """
        import sys
        from worldenv.envs.libero.assets import configure_libero, libero_root, resolve_assets
        assert "theirs" not in str(libero_root())
        path = resolve_assets(None, "libero_spatial").path
        if LOADED:
            import libero
        configure_libero(path)
        import libero.libero as found
        import libero.libero.benchmark
        assert found.__file__.startswith(str(libero_root())), found.__file__
        assert found.get_assets_path() == str(path)
    """
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for loaded in (False, True):
        program = textwrap.dedent(source).replace("LOADED", str(loaded))
        run = subprocess.run([sys.executable, "-c", program], env=environment, check=False,
                             capture_output=True, text=True)  # fmt: skip
        if loaded:
            assert "UserError" in run.stderr
            assert str(foreign) in run.stderr
            assert str(assets.libero_root().parent) in run.stderr
        else:
            assert run.returncode == 0, run.stderr


@pytest.mark.libero
def test_robosuite_opens_no_log_in_a_temporary_folder_of_everybody(tmp_path):
    program = textwrap.dedent("""
        import logging
        opened = []
        logging.FileHandler = lambda name, *rest: opened.append(name)
        from worldenv.envs.libero.assets import configure_libero, resolve_assets
        configure_libero(resolve_assets(None, "libero_spatial").path)
        import libero.libero.envs, robosuite.macros, os
        assert opened == [], opened
        assert robosuite.macros.FILE_LOGGING_LEVEL is None
        for name in ("NUMBA_CACHE_DIR", "MPLCONFIGDIR", "TMPDIR"):
            assert os.environ[name].startswith(os.environ["WORLDENV_CACHE"]), name
    """)
    run = subprocess.run([sys.executable, "-c", program], check=False, cwd=tmp_path,
                         env={**os.environ, "PYTHONPATH": os.getcwd()},
                         capture_output=True, text=True)  # fmt: skip
    assert run.returncode == 0, run.stderr


def test_configure_asks_nothing_and_leaves_home_alone(tmp_path):
    """In a process of its own, with no terminal and an empty home."""
    home = tmp_path / "home"
    home.mkdir()
    program = textwrap.dedent(f"""
        from pathlib import Path
        from worldenv.envs.libero.assets import configure_libero, resolve_assets
        from worldenv.envs.libero.primitive_assets import write_pack
        path = resolve_assets(None, "libero_spatial").path
        configure_libero(path)
        configure_libero(path)
        from libero.libero import get_assets_path, get_libero_path
        assert get_assets_path() == str(path), get_assets_path()
        assert Path(get_libero_path("bddl_files"), "libero_spatial").is_dir()
        other = Path({str(tmp_path)!r}) / "it's another"
        write_pack(other)
        configure_libero(other)
        assert get_assets_path() == str(other) == get_libero_path("assets")
    """)
    environment = {**os.environ, "HOME": str(home)}
    environment.pop("LIBERO_CONFIG_PATH", None)
    run = subprocess.run([sys.executable, "-c", program], env=environment, check=False,
                         stdin=subprocess.DEVNULL, capture_output=True, text=True)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert list(home.iterdir()) == []
