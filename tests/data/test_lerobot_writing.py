"""Episodes written as a LeRobotDataset v3.0: what stands in the files, and what is read again."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from official_files import write_official

from worldenv.data.episodes import read_episodes
from worldenv.data.lerobot import writer as writing
from worldenv.data.lerobot.layout import open_dataset
from worldenv.data.lerobot.reader import Reader
from worldenv.data.lerobot.statistics import merged, of_numbers
from worldenv.data.lerobot.writer import LeRobotWriter
from worldenv.data.windows import ActionWindows, FrameWindows, chunk_sequences
from worldenv.envs.libero.robot import embodiment
from worldenv.runtime.errors import UserError

# Grey levels, mean over a frame. Grey pictures lose nothing to the halved colours, so that 8-bit
# YUV (16..235: a step of 1.16) costs under 0.5, and the encoder's quantiser (CRF) the rest; what
# moves shows the frame before or after by more.
MEAN_ERROR = {"av1": 1.5, "h264": 1.0}


def written(folder, episodes, size, codec="av1", rewards=None):
    with LeRobotWriter(folder, embodiment(size), codec) as writer:
        for episode in episodes:
            writer.append(episode, rewards)
    return folder


def read(folder, size):
    return list(Reader(open_dataset(folder), embodiment(size)).read())


def same_but_for_pictures(a, b):
    for name in ("actions", "proprio", "dones", "frame_steps"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    for name in ("suite", "task", "instruction", "start", "seed", "source", "success", "meta"):
        assert getattr(a, name) == getattr(b, name), name


@pytest.mark.parametrize("codec", writing.CODECS)
def test_libero_files_come_back_equal(tmp_path, codec):
    """HDF5 -> LeRobot v3.0 -> training windows: equal but for the codec."""
    name = "turn_on_the_stove"
    write_official(tmp_path / f"libero_goal/{name}_demo.hdf5", "before", demos=3, size=32, steps=40)
    episodes = read_episodes(tmp_path / "libero_goal")
    found = read(written(tmp_path / "set", episodes, 32, codec), 32)
    for a, b in zip(episodes, found, strict=True):
        same_but_for_pictures(a, b)
        error = np.abs(a.images.astype(int) - b.images)
        late = np.abs(a.images[1:].astype(int) - b.images[:-1])
        assert error.mean() < MEAN_ERROR[codec]
        assert error.mean() < late.mean() / 2
    for cut in (lambda e: FrameWindows(chunk_sequences(e), 4), ActionWindows):
        seed = torch.Generator().manual_seed
        one, other = (cut(some).sample(seed(0), 16) for some in (episodes, found))
        assert one.keys() == other.keys()
        for key, values in one.items():
            if values.dtype != torch.uint8:
                assert torch.equal(values, other[key]), key
            else:
                error = (values.int() - other[key].int()).abs().float().mean()
                assert 0 < error < MEAN_ERROR[codec]


def test_sparse_frames_and_the_last_one_come_back(tmp_path, make_episode):
    episodes = [
        make_episode(30, 4, seed=1, success_at=25),
        make_episode(21, 1, seed=2),
        make_episode(9, 2, seed=3, final=False, start=None),
    ]
    episodes[2].instruction = "öffne die Schublade 抽屉"
    found = read(written(tmp_path / "set", episodes, 16), 16)
    for a, b in zip(episodes, found, strict=True):
        same_but_for_pictures(a, b)
    assert np.array_equal(found[0].images[-1], episodes[0].images[-1])  # kept as PNG
    table = pq.read_table(tmp_path / "set/data/chunk-000/file-000.parquet")
    seen = np.array(table["worldenv.seen"].to_pylist())
    assert np.flatnonzero(seen[:30]).tolist() == list(range(0, 30, 4))
    shutil.rmtree(tmp_path / "set/worldenv")
    others = read(tmp_path / "set", 16)  # as anybody's
    assert [len(e.images) for e in others] == [30, 21, 9]
    assert others[2].instruction == episodes[2].instruction


def test_the_files_are_as_lerobot_has_them(tmp_path, make_episode):
    episodes = [make_episode(12, seed=1, success_at=9), make_episode(10, seed=2, final=False)]
    rewards = np.linspace(0, 1, 12, dtype=np.float32)
    with LeRobotWriter(tmp_path / "set", embodiment(16)) as writer:
        writer.append(episodes[0], rewards)
        writer.append(episodes[1])
    info = json.loads((tmp_path / "set/meta/info.json").read_text())
    assert (info["codebase_version"], info["fps"], info["total_frames"]) == ("v3.0", 20, 22)
    file = pq.ParquetFile(tmp_path / "set/data/chunk-000/file-000.parquet")
    assert [file.metadata.row_group(k).num_rows for k in range(2)] == [12, 10]
    table = file.read().to_pydict()
    assert str(file.schema_arrow.field("action").type) == "fixed_size_list<element: float>[7]"
    assert set(table) == {k for k, f in info["features"].items() if f["dtype"] != "video"}
    assert table["next.reward"][:12] == rewards.tolist()
    assert table["next.reward"][12:] == [0.0] * 10
    assert table["next.success"][:12] == [False] * 9 + [True] * 3
    assert [k for k, done in enumerate(table["next.done"]) if done] == [11, 21]
    assert table["timestamp"][12:14] == [0.0, pytest.approx(0.05)]
    assert table["index"] == list(range(22))
    tasks = pq.read_table(tmp_path / "set/meta/tasks.parquet")
    assert b'"index_columns": ["task"]' in tasks.schema.metadata[b"pandas"]
    (row, _) = pq.read_table(tmp_path / "set/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert row["videos/observation.images.image2/to_timestamp"] == pytest.approx(12 / 20)
    assert row["stats/action/mean"] == pytest.approx(episodes[0].actions.astype(float).mean(0))
    stats = json.loads((tmp_path / "set/meta/stats.json").read_text())
    rows = np.concatenate([e.actions for e in episodes]).astype(float)
    assert stats["action"]["std"] == pytest.approx(rows.std(0))
    assert np.shape(stats["observation.images.image"]["mean"]) == (3, 1, 1)


def test_files_are_begun_anew_when_they_are_large(tmp_path, make_episode, monkeypatch):
    monkeypatch.setattr(writing, "DATA_MB", 0)
    monkeypatch.setattr(writing, "VIDEO_MB", 0)
    monkeypatch.setattr(writing, "CHUNK", 2)
    monkeypatch.setattr(writing, "_GROUP", 2)
    episodes = [make_episode(40, seed=k, final=False) for k in range(4)]
    written(tmp_path / "set", episodes, 16, "h264")
    names = {str(p.relative_to(tmp_path / "set/data")) for p in tmp_path.glob("set/data/*/*")}
    assert names == {f"chunk-00{c}/file-00{f}.parquet" for c in (0, 1) for f in (0, 1)}
    for a, b in zip(episodes, read(tmp_path / "set", 16), strict=True):
        same_but_for_pictures(a, b)


def test_nothing_half_written_stays(tmp_path, make_episode, monkeypatch):
    def interrupted():
        yield make_episode(8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "set", interrupted(), 16)
    with pytest.raises(UserError, match="at least one episode"):
        written(tmp_path / "set", [], 16)
    with pytest.raises(UserError, match=r"one even size \(16x16\), got 8x8.*--image-size"):
        written(tmp_path / "set", [make_episode(8), make_episode(8, size=8)], 16)
    late = make_episode(8)
    for name in ("frame_steps", "images", "proprio"):
        setattr(late, name, getattr(late, name)[1:])
    with pytest.raises(UserError, match="frame before the first action"):
        written(tmp_path / "set", [late], 16)
    monkeypatch.setitem(writing.CODECS, "av1", ("-c:v", "nosuchcodec"))
    with pytest.raises(UserError, match=r"mp4: ffmpeg could not write the video.*--codec h264"):
        written(tmp_path / "set", [make_episode(8)], 16)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "set").mkdir()
    (tmp_path / "set/mine").touch()
    with pytest.raises(UserError, match="expected a folder that is not there yet"):
        LeRobotWriter(tmp_path / "set", embodiment(16))
    assert [p.name for p in tmp_path.rglob("*")] == ["set", "mine"]


def test_statistics_of_episodes_add_up():
    parts = [np.random.default_rng(k).normal(k, 1 + k, (50 + k, 3)) for k in range(3)]
    found = merged([of_numbers(part) for part in parts])
    whole = of_numbers(np.concatenate(parts))
    for name in ("min", "max", "mean", "std", "count"):
        assert np.allclose(found[name], whole[name]), name
