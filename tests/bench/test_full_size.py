"""The full-size benchmark's way through a folder, on a tiny one."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench import full_size  # noqa: E402
from tests.published import openvla  # noqa: E402
from worldenv.runtime.errors import UserError  # noqa: E402


def test_a_folder_is_loaded_and_used(tmp_path, monkeypatch):
    monkeypatch.setattr(full_size, "multiplication", lambda dtype: 1e9)
    folder = openvla.write(tmp_path / "openvla")
    row = full_size.use(full_size.CASES["openvla-oft"], folder)
    assert row["weight_bytes"] == full_size.weights(folder) > 3_000_000
    assert row["flops"] > 1e6
    assert row["share_of_matmul"]["float32"] == row["flops_per_second"] / 1e9
    assert row["peak_bytes"] >= row["peak_bytes_loaded"] >= row["peak_bytes_before"]


def test_the_small_one_is_about_a_fiftieth_and_the_full_one_as_published():
    from math import prod

    small, full = (
        sum(map(prod, openvla.shapes(layout).values()))
        for layout in (full_size.openvla_layout(True), full_size.openvla_layout(False))
    )
    assert full == 7_541_237_184
    assert 40 < full / small < 60


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    room = SimpleNamespace(free=1 << 30)
    monkeypatch.setattr(full_size.shutil, "disk_usage", lambda path: room)
    with pytest.raises(UserError, match=r"expected 15.9 GiB of room for openvla-oft, got 1.0"):
        full_size.run("openvla-oft", tmp_path, small=False, keep=False)
    assert list(tmp_path.iterdir()) == []
