"""A thousand mutations of all that is read from disk, with WORLDENV_SLOW=1 two and a half
thousand; fuzz_inputs.py runs as many as named."""

import os

import pytest
from fuzz_inputs import fuzz


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("config", 600),
        ("checkpoint", 400),
        ("hdf5", 600),
        ("log", 100),
        ("record", 150),
        ("outcomes", 150),
        ("lerobot info", 60),
        ("lerobot list", 40),
        ("lerobot table", 60),
        ("lerobot own", 40),
        ("lerobot video", 8),
        ("wan config", 150),
        ("wan weights", 200),
    ],
)
def test_damaged_inputs_end_in_a_named_error(kind, count):
    """A third of them, but no fewer than fifty."""
    few = count if os.environ.get("WORLDENV_SLOW") else max(count // 3, min(count, 50))
    assert fuzz(few, kind=kind) == {}
