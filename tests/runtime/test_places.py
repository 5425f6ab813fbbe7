"""Where libraries write, and what is said when they cannot."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from worldenv.runtime import places
from worldenv.runtime.errors import UserError

_PR_CAPBSET_DROP, _DAC_OVERRIDE, _DAC_READ_SEARCH = 24, 1, 2


def test_libraries_write_below_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(places.CACHE_VARIABLE, str(tmp_path / "cache"))
    base = {"PATH": "/bin", "TMPDIR": "/nowhere"}
    found = places.library_environment(base)
    assert found["PATH"] == "/bin"
    for name in ("NUMBA_CACHE_DIR", "MPLCONFIGDIR", "TMPDIR"):
        assert Path(found[name]).is_dir()
        assert Path(found[name]).is_relative_to(tmp_path / "cache")
    assert base["TMPDIR"] == "/nowhere"


def test_a_cache_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(places.CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(UserError, match=f"{tmp_path}/file.*{places.CACHE_VARIABLE}"):
        places.library_environment({})


DRAW = """
from worldenv.report.charts import Series, line_chart
assert "<svg" in line_chart("t", [Series("a", [0, 1, 2], [0, 1, 4])])
import matplotlib
assert matplotlib.get_cachedir().startswith(CACHE), matplotlib.get_cachedir()
"""
SIMULATE = """
from worldenv.envs.libero.env import LiberoVectorEnv
from worldenv.envs.start import Start
env = LiberoVectorEnv("libero_spatial", 1, workers=1, max_steps=11)
env.reset(options={"starts": [Start(3, 0, 0)]})
env.close()
"""


def _drop_rights():
    """A root without root's right to write anywhere; others have none anyway."""
    call = ctypes.CDLL(None, use_errno=True).prctl
    for right in (_DAC_OVERRIDE, _DAC_READ_SEARCH):
        if os.getuid() == 0 and call(_PR_CAPBSET_DROP, right, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


@pytest.mark.skipif(sys.platform != "linux", reason="rights are dropped by Linux's prctl")
@pytest.mark.parametrize("work", [DRAW, pytest.param(SIMULATE, marks=pytest.mark.libero)])
def test_nothing_is_written_outside_the_cache(tmp_path, work):
    """Home, temporary folder and where the command runs are read-only."""
    closed, cache = tmp_path / "closed", tmp_path / "cache"
    for folder, mode in ((closed, 0o555), (cache, 0o755)):
        folder.mkdir()
        folder.chmod(mode)
    compiled = places.cache_dir() / "libraries" / "numba"
    if compiled.is_dir():  # else half a minute: from elsewhere it could not be read either
        shutil.copytree(compiled, cache / "libraries" / "numba")
    shut = dict.fromkeys(
        ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR", "NUMBA_CACHE_DIR"),
        str(closed),
    )
    program = f"""
CACHE = {str(cache)!r}
try:
    open({str(closed / "x")!r}, "w")
except PermissionError:
    pass
else:
    raise SystemExit("the folder is not closed: this test would show nothing")
{work}"""
    environment = {**os.environ, **shut, places.CACHE_VARIABLE: str(cache)}
    run = subprocess.run([sys.executable, "-P", "-c", program], check=False, env=environment,
                         cwd=closed, capture_output=True, text=True,
                         preexec_fn=_drop_rights)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert list(closed.iterdir()) == []
