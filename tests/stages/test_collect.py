"""What collecting does to episodes that are already there."""

import numpy as np
import pytest

from worldenv.data.episode import Episode
from worldenv.data.episodes import DatasetWriter, read_episodes
from worldenv.envs.start import Start
from worldenv.runtime.errors import UserError
from worldenv.stages.collect import _missing

STARTS = [Start(3, 0, 7), Start(3, 1, 7)]


def store(folder, **meta) -> None:
    episode = Episode(
        suite="libero_spatial",
        task=3,
        instruction="lift the cup",
        start=0,
        seed=7,
        source="policy",
        actions=np.zeros((2, 7), np.float32),
        dones=np.zeros(2, bool),
        frame_steps=np.arange(3),
        images=np.zeros((3, 2, 16, 16, 3), np.uint8),
        proprio=np.zeros((3, 8), np.float32),
        success=False,
        meta=meta,
    )
    with DatasetWriter(folder) as writer:
        writer.append(episode)


@pytest.mark.parametrize("meta", [{}, {"mark": "of a run"}])
def test_a_users_folder_is_only_added_to(tmp_path, meta):
    store(tmp_path, **meta)
    assert _missing(tmp_path, "", STARTS) == STARTS[1:]
    assert len(read_episodes(tmp_path)) == 1


def test_a_run_replaces_its_own_data_and_refuses_the_users(tmp_path):
    store(tmp_path / "own", mark="old")
    assert _missing(tmp_path / "own", "old", STARTS) == STARTS[1:]
    assert _missing(tmp_path / "own", "new", STARTS) == STARTS
    assert not (tmp_path / "own").exists()
    store(tmp_path / "users")
    with pytest.raises(UserError, match="no run recorded"):
        _missing(tmp_path / "users", "new", STARTS)
    assert len(read_episodes(tmp_path / "users")) == 1
