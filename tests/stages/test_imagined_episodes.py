"""Imagined episodes as a LeRobotDataset: the actions that were asked, the judge's verdicts."""

import numpy as np
import pyarrow.parquet as pq
import torch

from worldenv.data.episode import Episode
from worldenv.data.lerobot.layout import open_dataset
from worldenv.data.lerobot.reader import Reader
from worldenv.data.windows import FrameSequence
from worldenv.envs.libero.robot import embodiment
from worldenv.stages.export import kept
from worldenv.stages.imagine import _recorded


def test_imagined_episodes_come_back(tmp_path):
    real = Episode(
        "libero_spatial", 3, "pick up the bowl", 4, 9, "policy", np.zeros((19, 7), np.float32),
        np.zeros(19, bool), np.arange(1), np.zeros((1, 2, 16, 16, 3), np.uint8), np.zeros((1, 8)),
        False,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    steps = torch.tensor([8, 16, 19])  # began in mid-episode; the last chunk is padded
    sequence = FrameSequence(
        images=torch.from_numpy(rng.integers(0, 256, (3, 2, 16, 16, 3), dtype=np.uint8)),
        proprio=torch.from_numpy(rng.normal(0, 0.01, (3, 8)).astype(np.float32)),
        actions=torch.from_numpy(rng.uniform(-1, 1, (2, 8, 7)).astype(np.float32)),
        success=torch.zeros(3, dtype=torch.bool),
        steps=steps, episode=0, task=3, instruction=real.instruction,
    )  # fmt: skip
    verdict = np.array([0.1, 0.4, 0.9], np.float32)
    with kept(tmp_path / "set", embodiment(16)) as keep:
        for threshold in (0.8, 0.95):
            keep(*_recorded(real, sequence, verdict, threshold, "policy"))
    won, lost = Reader(open_dataset(tmp_path / "set"), embodiment(16)).read()
    asked = np.concatenate([sequence.actions[0], sequence.actions[1, :3]])
    for episode in (won, lost):
        assert np.array_equal(episode.actions, asked)
        assert episode.frame_steps.tolist() == [0, 8, 11]
        assert np.array_equal(episode.proprio, sequence.proprio)
        assert (episode.source, episode.start, episode.seed) == ("imagined", 4, 9)
        assert episode.meta["from_step"] == 8
    assert (won.success, lost.success) == (True, False)
    assert np.flatnonzero(won.dones).tolist() == [10]
    table = pq.read_table(tmp_path / "set/data/chunk-000/file-000.parquet").to_pydict()
    rewards = np.zeros(11, np.float32)
    rewards[[7, 10]] = verdict[1:]
    assert table["next.reward"] == rewards.tolist() * 2
    with kept(None, embodiment(16)) as keep:
        assert keep is None
