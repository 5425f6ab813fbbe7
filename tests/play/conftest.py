"""The small world, as a fixture."""

import pytest
from small_world import small_world


@pytest.fixture
def world(tmp_path):
    """See `small_world.small_world`."""
    return small_world(tmp_path)
