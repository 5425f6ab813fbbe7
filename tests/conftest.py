"""Settings every test shares: one thread, no network, and printed reasons for what is skipped."""

from __future__ import annotations

import os

# Before torch and MuJoCo are imported: two threads on a busy machine are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import importlib.util
import resource
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch._dynamo  # brings Triton's LLVM, which after Mesa's, in one process, crashes

from worldenv.runtime import graphics
from worldenv.runtime.errors import UserError

torch.set_num_threads(1)

# Files that take longest, in seconds of one core: they start first, so that none is left over at
# the end for one core while others idle. Those that simulate come apart: on a fresh machine the
# first one compiles robosuite's arithmetic for half a minute, and the second finds it compiled.
_LONGEST = (
    "stages/test_resume.py",
    "stages/test_plan.py",
    "envs/libero/test_env.py",
    "bench/test_bench.py",
    "stages/test_ranks_end_to_end.py",
    "test_examples.py",
    "envs/metaworld/test_metaworld.py",
    "stages/test_published.py",
    "stages/test_records.py",
    "stages/test_files_end_to_end.py",
    "stages/test_distill.py",
    "runtime/test_signals.py",
    "envs/libero/test_assets.py",
    "bad_inputs/test_bad_values.py",
    "kernels/test_triton_interpreter.py",
    "kernels/test_triton_compile.py",
)
_LIBERO_PACKAGES = ("libero", "robosuite", "mujoco", "bddl")
_gl_failure: str | None = None
_gl_tried = False


def gl_failure() -> str | None:
    """Why MuJoCo cannot render here, or None; tried once a session."""
    global _gl_failure, _gl_tried
    if not _gl_tried:
        _gl_tried = True
        try:
            graphics.adopt()
        except UserError as error:
            _gl_failure = str(error)
    return _gl_failure


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; `--no-loadscope-reorder` has pytest-xdist keep the order."""
    here = Path(__file__).parent
    order = {here / name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine lacks, saying what and how to get it."""
    if item.get_closest_marker("exhaustive") and not os.environ.get("WORLDENV_SLOW"):
        pytest.skip("takes minutes: set WORLDENV_SLOW=1")
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if item.get_closest_marker("assets") and not os.environ.get("WORLDENV_LIBERO_ASSETS"):
        pytest.skip("official LIBERO assets: set WORLDENV_LIBERO_ASSETS to their folder")
    if item.get_closest_marker("libero"):
        missing = [name for name in _LIBERO_PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            pytest.skip(f"{', '.join(missing)} not installed: run make, which installs LIBERO")
        if gl_failure():
            pytest.skip(gl_failure())


@pytest.fixture
def largest_file():
    """A context manager: no file can grow beyond so many bytes, as on a disk that fills."""

    @contextmanager
    def limited(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on loopback in place of huggingface.co, an empty cache and no token."""
    from huggingface_hub import constants, file_download
    from loopback_hub import Hub

    from worldenv.runtime import hub as ours

    with Hub() as running:
        url = running.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": running.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": url,
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,  # a service of its own, which is not asked here
            "DOWNLOAD_CHUNK_SIZE": 1 << 10,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        for module in (file_download, ours._library().utils._http):  # between attempts
            monkeypatch.setattr(module, "time", _Hasty)
        yield running


@pytest.fixture
def impatient(hub, monkeypatch):
    """A context manager: nobody waits for that hub for longer than half a second."""
    from worldenv.runtime import hub as ours

    @contextmanager
    def impatient():
        with monkeypatch.context() as patch:
            patch.setattr(ours, "TIMEOUT", 0.5)
            yield

    return impatient


class _Hasty:
    """`time` of a library that would wait for seconds before it tries again."""

    time, monotonic = time.time, time.monotonic

    @staticmethod
    def sleep(seconds: float) -> None:
        time.sleep(min(seconds, 0.01))
