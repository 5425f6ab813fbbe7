"""What collecting does to episodes that are already there."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from worldenv.config import Config, PolicyConfig
from worldenv.data.episode import Episode
from worldenv.data.episodes import DatasetWriter, read_episodes
from worldenv.envs.libero.robot import embodiment
from worldenv.envs.start import Start
from worldenv.models.policy import Policy
from worldenv.presets import preset
from worldenv.runtime.errors import UserError
from worldenv.stages import collect
from worldenv.stages.collect import EpisodeRecorder, left_to_record, record_policy
from worldenv.stages.reality import Reality

STARTS = [Start(3, 0, 7), Start(3, 1, 7)]


def write(folder, start: Start = STARTS[0], success: bool = False, **meta) -> None:
    episode = Episode(
        suite="libero_spatial",
        task=start.task,
        instruction="lift the cup",
        start=start.index,
        seed=start.seed,
        source="policy",
        actions=np.zeros((2, 7), np.float32),
        dones=np.zeros(2, bool),
        frame_steps=np.arange(3),
        images=np.zeros((3, 2, 16, 16, 3), np.uint8),
        proprio=np.zeros((3, 8), np.float32),
        success=success,
        meta=meta,
    )
    with DatasetWriter(folder) as writer:
        writer.append(episode)


def test_an_episode_is_who_acted_and_how(tmp_path):
    assert left_to_record(tmp_path, "A", STARTS, alone=True) == STARTS
    write(tmp_path, mark="A")
    assert left_to_record(tmp_path, "A", STARTS, alone=False) == STARTS[1:]
    assert left_to_record(tmp_path, "B", STARTS, alone=False) == STARTS
    assert len(read_episodes(tmp_path)) == 1


@pytest.mark.parametrize("meta", [{}, {"mark": "of another run"}])
def test_a_run_trains_on_no_episodes_but_its_own(tmp_path, meta):
    write(tmp_path, **meta)
    with pytest.raises(UserError, match="1 episodes that no run recorded"):
        left_to_record(tmp_path, "mark", STARTS, alone=True)
    assert len(read_episodes(tmp_path)) == 1


def test_another_policys_episodes_are_not_reported_for_this_one(tmp_path, monkeypatch):
    """The same for other noise, pushes or images; what is there stays."""
    rolled: list[str] = []

    def roll_out(reality, policy, starts, folder, mark, number):
        rolled.append(mark)
        for start in starts:
            write(folder, start, mark=mark, success=len(rolled) == 1)

    monkeypatch.setattr(collect, "_roll_out", roll_out)
    base = preset("smoke")
    first, second = (Policy(PolicyConfig(16, 1, 1, 8), embodiment(64)) for _ in range(2))
    other = {
        "push": replace(base, collect=replace(base.collect, push=0.1)),
        "image size": replace(base, env=replace(base.env, image_size=32)),
        "chunk": replace(base, env=replace(base.env, chunk=4)),
        "frames": replace(base, collect=replace(base.collect, record_every=2)),
    }
    assert record_policy(Reality(base), first, 2, tmp_path)["successes"] == 2
    assert record_policy(Reality(base), first, 2, tmp_path)["successes"] == 2
    assert len(rolled) == 1  # the same policy's are not rolled out again
    found = record_policy(Reality(base), second, 2, tmp_path)
    assert (found["episodes"], found["successes"], len(rolled)) == (2, 0, 2)
    for config in other.values():
        assert record_policy(Reality(config), first, 2, tmp_path)["successes"] == 0
    assert len(set(rolled)) == 6
    assert len(read_episodes(tmp_path)) == 12
    assert record_policy(Reality(base), first, 2, tmp_path)["successes"] == 2
    assert len(rolled) == 6


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
