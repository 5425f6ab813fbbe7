"""Writing episodes: exact round trips, LIBERO's layout on disk, and survival of a killed writer."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

import h5py
import numpy as np
import pytest

from worldenv.data import episodes as module
from worldenv.data.episodes import DatasetWriter, EpisodeWriter, episode_path, read_episodes
from worldenv.runtime.errors import UserError


def assert_same(a, b):
    for field in fields(a):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, np.ndarray):
            assert np.array_equal(left, right), field.name
        elif field.name != "extras":
            assert left == right, field.name
    assert a.extras.keys() == b.extras.keys()


@pytest.mark.parametrize("every", [1, 8])
@pytest.mark.parametrize("final", [True, False])
def test_round_trip(tmp_path, make_episode, every, final):
    path = tmp_path / "task_demo.hdf5"
    written = [
        make_episode(19 + i, every, seed=i, final=final, success_at=10 if i else None)
        for i in range(3)
    ]
    written[1].start = None
    written[2].extras = {"joint_states": np.ones((len(written[2].images), 7))}
    with EpisodeWriter(path) as writer:
        for number, episode in enumerate(written):
            writer.append(episode)
            assert len(read_episodes(path)) == number + 1  # readable while the writer is open
    assert [p.name for p in tmp_path.iterdir()] == ["task_demo.hdf5"]
    for a, b in zip(written, read_episodes(path), strict=True):
        assert_same(a, b)
    assert np.array_equal(
        read_episodes(path)[2].extras["joint_states"], written[2].extras["joint_states"]
    )


def test_layout_is_liberos(tmp_path, make_episode):
    path = tmp_path / "task_demo.hdf5"
    episode = make_episode(10, success_at=9)
    with EpisodeWriter(path) as writer:
        writer.append(episode)
    with h5py.File(path) as file:
        data, demo = file["data"], file["data/demo_0"]
        assert data.attrs["num_demos"] == 1
        assert data.attrs["total"] == demo.attrs["num_samples"] == 10
        assert json.loads(data.attrs["env_args"])["type"] == 1
        assert json.loads(data.attrs["problem_info"])["language_instruction"] == episode.instruction
        shapes = {name: demo[f"obs/{name}"].shape for name in demo["obs"]}
        assert shapes == {
            "agentview_rgb": (10, 16, 16, 3),
            "eye_in_hand_rgb": (10, 16, 16, 3),
            "ee_states": (10, 6),
            "ee_pos": (10, 3),
            "ee_ori": (10, 3),
            "gripper_states": (10, 2),
        }
        turn = episode.proprio[4, 3:6].astype(float)
        half = np.linalg.norm(turn) / 2
        quaternion = np.array([*turn / (2 * half) * np.sin(half), np.cos(half)], np.float32)
        assert demo["robot_states"].shape == (10, 9)
        assert np.array_equal(demo["robot_states"][4, 5:], quaternion)
        # Raw on disk: upside down and mirrored, as the renderer gives it.
        assert np.array_equal(demo["obs/agentview_rgb"][4], episode.images[4, 0, ::-1, ::-1])
        assert np.array_equal(demo["final_obs/ee_pos"][0], episode.proprio[10, :3])
        assert demo["dones"][()].tolist() == demo["rewards"][()].tolist() == [0] * 9 + [1]


def test_appending_later_keeps_numeric_order(tmp_path, make_episode):
    path = tmp_path / "task_demo.hdf5"
    for begin in (0, 7):
        with EpisodeWriter(path) as writer:
            for seed in range(begin, begin + 7):
                writer.append(make_episode(4, seed=seed))
    assert [e.seed for e in read_episodes(path)] == list(range(14))
    assert [e.seed for e in read_episodes(path, limit=11)] == list(range(11))


def test_image_size_is_an_area_average(tmp_path, make_episode):
    path = tmp_path / "task_demo.hdf5"
    episode = make_episode(4)
    with EpisodeWriter(path) as writer:
        writer.append(episode)
    small = read_episodes(path, 8)[0].images
    expected = episode.images.reshape(5, 2, 8, 2, 8, 2, 3).mean(axis=(3, 5))
    assert small.shape == (5, 2, 8, 8, 3)
    assert np.abs(small - expected).max() <= 0.5
    assert read_episodes(path, 5)[0].images.shape == (5, 2, 5, 5, 3)


def test_dataset_writer_keeps_one_file_per_task(tmp_path, make_episode):
    with DatasetWriter(tmp_path) as writer:
        for task in (3, 0, 3):
            writer.append(make_episode(5, task=task))
    name = "pick_up_the_black_bowl_on_the_cookie_box_and_place_it_on_the_plate_demo.hdf5"
    assert episode_path(tmp_path, "libero_spatial", 3, "") == tmp_path / "libero_spatial" / name
    assert sorted(e.task for e in read_episodes(tmp_path)) == [0, 3, 3]
    assert len(read_episodes(tmp_path / "libero_spatial" / name)) == 2


def test_writer_refuses(tmp_path, make_episode):
    path = tmp_path / "task_demo.hdf5"
    with EpisodeWriter(path) as writer:
        writer.append(make_episode(4))
        with pytest.raises(UserError, match="one file per task"):
            writer.append(make_episode(4, task=4))
        with pytest.raises(UserError, match="only writer"):
            EpisodeWriter(path)
        bad = make_episode(4)
        bad.actions[2, 1] = np.nan
        with pytest.raises(UserError, match=r"actions: expected finite .* row 2"):
            writer.append(bad)
        bad = make_episode(4)
        bad.images = bad.images.astype(np.float32) / 255
        with pytest.raises(UserError, match="dtype uint8"):
            writer.append(bad)
        with pytest.raises(UserError, match="images: expected 2 views, got 1"):
            writer.append(make_episode(4, views=1))
        bad = make_episode(4)
        bad.meta = {"array": np.zeros(2)}
        with pytest.raises(UserError, match="JSON"):
            writer.append(bad)
    with pytest.raises(UserError, match=r"ending in \.hdf5"):
        EpisodeWriter(tmp_path / "folder")
    assert len(read_episodes(path)) == 1


def test_full_disk_keeps_finished_episodes(tmp_path, make_episode, monkeypatch):
    path = tmp_path / "task_demo.hdf5"
    writer = EpisodeWriter(path)
    writer.append(make_episode(4))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", full)
        with pytest.raises(UserError, match="free some space"):
            writer.append(make_episode(4))
        with pytest.raises(UserError, match="free some space"):
            writer.close()
    assert len(read_episodes(path)) == 1
    EpisodeWriter(path).close()
    assert len(read_episodes(path)) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["task_demo.hdf5"]


@pytest.mark.parametrize("moment", ["before rename", "after rename", "between removals"])
def test_killed_merge_neither_loses_nor_doubles(tmp_path, make_episode, monkeypatch, moment):
    path = tmp_path / "task_demo.hdf5"
    writer = EpisodeWriter(path)
    for seed in range(4):
        writer.append(make_episode(4, seed=seed))

    class Killed(BaseException):
        pass

    def replace(source, target):
        if moment == "before rename":
            raise Killed
        real_replace(source, target)
        if moment == "after rename":
            raise Killed

    def unlink(self, missing_ok=False):
        real_unlink(self, missing_ok)
        if self.parent.suffix == ".parts" and moment == "between removals" and "-0000" in self.name:
            raise Killed

    real_replace, real_unlink = os.replace, Path.unlink
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", replace)
        patch.setattr(module.Path, "unlink", unlink)
        with pytest.raises(Killed):
            writer.close()
    assert sorted(e.seed for e in read_episodes(path)) == [0, 1, 2, 3]
    with EpisodeWriter(path) as again:
        again.append(make_episode(4, seed=4))
    assert [e.seed for e in read_episodes(path)] == [0, 1, 2, 3, 4]
    assert [p.name for p in tmp_path.iterdir()] == ["task_demo.hdf5"]


def test_sigkill_while_writing(tmp_path):
    path = tmp_path / "task_demo.hdf5"
    script = f"""
        import sys
        sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
        from conftest import build_episode
        from worldenv.data.episodes import EpisodeWriter
        for start in range(0, 10**6, 5):
            with EpisodeWriter({str(path)!r}) as writer:
                for seed in range(start, start + 5):
                    writer.append(build_episode(16, 8, seed=seed, size=64))
                    print(seed, flush=True)
    """
    kept = 0
    # Killed at arbitrary moments of appending and merging; each writer goes on where the last fell.
    for lines in (1, 8):
        command = [sys.executable, "-c", textwrap.dedent(script)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            finished = [int(process.stdout.readline()) for _ in range(lines)]
            process.send_signal(signal.SIGKILL)
            finished += [int(line) for line in process.stdout]
        new = [e.seed for e in read_episodes(path)][kept:]
        assert new[: len(finished)] == finished
        assert len(new) <= len(finished) + 1  # one may have been stored but not yet announced
        kept += len(new)
