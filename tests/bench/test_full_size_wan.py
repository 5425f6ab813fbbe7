"""The folders that the full-size benchmark writes are such as are published, at any size."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench import full_size_wan as bench
from worldenv.models import wan_folder


@pytest.mark.parametrize("kind", bench.KINDS)
def test_what_is_written_is_read(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(bench, "SHARD", 1 << 20)
    bench.write(kind, tmp_path / kind, 5000)
    model = wan_folder.load(tmp_path / kind, kind, kind == "wan", "bfloat16")
    assert model.sizes.width == 128
    assert (tmp_path / kind / "vae" / "config.json").exists()
    shards = list((tmp_path / kind).glob("transformer/*.safetensors"))
    assert (len(shards) > 1) == (kind == "wan")


def test_a_whole_is_as_large_as_published():
    names = bench.layout.shapes(bench.sizes(1))
    assert len(names) == 825
    assert sum(bench.math.prod(shape) for shape in names.values()) == 4_999_787_712
