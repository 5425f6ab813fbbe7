"""What collecting does to episodes that are already there."""

import numpy as np
import pytest
import torch

from worldenv.config import Config
from worldenv.data.episode import Episode
from worldenv.data.episodes import DatasetWriter, read_episodes
from worldenv.envs.start import Start
from worldenv.runtime.errors import UserError
from worldenv.stages.collect import EpisodeRecorder, _missing

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


def view(step: int) -> dict:
    """What a row shows after `step` steps, and the proprio that says so."""
    return {"image": np.full((2, 4, 4, 3), step, np.uint8), "proprio": np.full(8, step, np.float32)}


def test_an_episode_keeps_every_recorded_frame():
    kept = []
    recorder = EpisodeRecorder(Config(), [Start(8, None, 5)], kept.append, hold=8)
    commands = torch.arange(16).repeat(7, 1).T.reshape(1, 16, 7).float()
    for begin, end in ((0, 8), (8, 14)):  # the second chunk is cut short
        steps = [s for s in (begin + 4, begin + 8) if s < end] + [end]
        frames = {k: np.stack([view(s)[k] for s in steps]) for k in ("image", "proprio")}
        frames |= {"steps": np.array(steps), "dones": np.arange(begin, end) == 13}
        before = {k: torch.from_numpy(v)[None] for k, v in view(begin).items()}
        info = {"steps": np.array([end]), "success": np.array([True]), "frames": [frames]}
        before["instruction"] = ("lift the cup",)
        recorder.step(0, before, commands[:, begin : begin + 8], {}, info)
    recorder.finish(0, {"success": True})
    (episode,) = kept
    assert episode.frame_steps.tolist() == [0, 4, 8, 12, 14]
    assert episode.actions[:, 0].tolist() == list(range(14))
    assert (episode.images[:, 0, 0, 0, 0] == episode.frame_steps).all()
    assert (episode.proprio[:, 3] == episode.frame_steps).all()
    assert np.flatnonzero(episode.dones).tolist() == [13]
