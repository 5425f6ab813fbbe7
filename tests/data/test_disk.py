"""Frames that stay on the disk give what those in memory give, to the bit, and say what became of
their files."""

import os
import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from official_files import write_official

from worldenv.data import disk
from worldenv.data.disk import Frames, FramesFile, Table
from worldenv.data.episode import proprio_statistics
from worldenv.data.episodes import DatasetWriter, read_episodes
from worldenv.data.reading import on_disk
from worldenv.data.windows import ActionWindows, FrameWindows, chunk_sequences, from_first_step
from worldenv.envs.imagined import first_frames, middle_frames
from worldenv.runtime.errors import UserError
from worldenv.runtime.seeds import generator
from worldenv.stages.replay import padded

LIBERO = pytest.mark.parametrize("folder", ["libero"], indirect=True)
ARRAYS = ("actions", "dones", "frame_steps", "proprio", "images", "extras")


@pytest.fixture(params=["libero", "another"])
def folder(request, tmp_path, make_episode):
    """Episodes of two tasks: at every step and sparse, with and without a last frame."""
    ways = [(24, 1, True), (25, 4, True), (40, 8, False), (17, 1, False)]
    with DatasetWriter(tmp_path) as writer:
        for k, (steps, every, final) in enumerate(ways):
            episode = make_episode(
                steps, every, task=k % 2, seed=k, final=final, success_at=steps - 3
            )
            places = np.random.default_rng(k).normal(size=(len(episode.images), 3))
            episode.extras = {"object_bowl": places}
            writer.append(replace(episode, benchmark=request.param))
    return tmp_path


def both(folder):
    return read_episodes(folder, 16), on_disk(folder, 16)


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


def test_episodes_are_the_same(folder):
    for held, there in zip(*both(folder), strict=True):
        assert isinstance(there.images, Frames)
        assert there.images.shape == held.images.shape
        for key in (slice(None), 3, -1, np.array([4, 0, 4]), (slice(1, 4), 1), (2, 0, slice(3))):
            assert np.array_equal(there.images[key], held.images[key])
        assert np.array_equal(there.images.views(1)[:], held.images[:, :1])
        for name in ("actions", "dones", "frame_steps", "proprio"):
            a, b = getattr(held, name), getattr(there, name)
            assert a.dtype == b.dtype
            assert np.array_equal(a, b)
        assert held.extras.keys() == there.extras.keys() == {"object_bowl"}
        assert np.array_equal(held.extras["object_bowl"], there.extras["object_bowl"])
        assert replace(held, **dict.fromkeys(ARRAYS)) == replace(there, **dict.fromkeys(ARRAYS))


@pytest.mark.parametrize("mixed", [False, True])
def test_batches_are_the_same(folder, mixed):
    held, there = both(folder)
    if mixed:  # as of a run with one small folder and a large one
        there = [e if k % 3 else h for k, (h, e) in enumerate(zip(held, there, strict=True))]
    ours, theirs = chunk_sequences(held), chunk_sequences(there)
    assert len(ours) == len(theirs)
    weights = [float(k % 3) for k in range(len(ours))]
    for frames, some, pad in ((3, weights, False), (4, None, True), (1, weights, True)):
        a, b = (FrameWindows(s, frames, some, padded=pad) for s in (ours, theirs))
        assert len(a) == len(b)
        assert a.instructions == b.instructions
        for k in range(5):
            g, h = generator(k), generator(k)
            same(a.sample(g, 16), b.sample(h, 16))
            same(a.transitions(g, 16), b.transitions(h, 16))
            assert torch.equal(g.get_state(), h.get_state())
        every = torch.arange(len(a))
        same(a.batch(every), b.batch(every))
    a, b = ActionWindows(held, 8, [1.0, 2.0] * 2), ActionWindows(there, 8, [1.0, 2.0] * 2)
    same(a.batch(torch.arange(len(a))), b.batch(torch.arange(len(b))))
    same(a.sample(generator("x"), 16), b.sample(generator("x"), 16))


def test_no_frame_is_read_before_it_is_drawn(folder, monkeypatch):
    read = []
    monkeypatch.setattr(FramesFile, "read", lambda self, place, out: read.append(1))
    episodes = on_disk(folder, 16)
    sequences = chunk_sequences(episodes)
    windows = FrameWindows(sequences, 3, padded=False)
    actions = ActionWindows(episodes)
    proprio_statistics(episodes)
    contexts = [*first_frames(sequences), *middle_frames(sequences, 8)]
    padded(from_first_step(sequences), torch.device("cpu"))
    assert not read
    actions.sample(generator(0), 5)
    windows.sample(generator(0), 5)
    assert sum(read) == 2 * (5 + 5 * (3 + 1))  # two views; a window has a reference besides
    assert contexts[-1].image.shape == (2, 2, 16, 16, 3)
    assert sum(read) == 2 * (5 + 5 * (3 + 1)) + 2 * 2


def test_contexts_and_padded_sequences_are_the_same(folder):
    ours, theirs = (chunk_sequences(e) for e in both(folder))
    for make in (first_frames, lambda s: middle_frames(s, 8)):
        for a, b in zip(make(ours), make(theirs), strict=True):
            assert torch.equal(a.image, b.image)
            assert torch.equal(a.action, b.action)
    imagined = [replace(s, images=s.images.flip(0)) for s in from_first_step(ours)]
    a = padded([*ours, *imagined], torch.device("cpu"))
    b = padded([*theirs, *imagined], torch.device("cpu"))
    rows, frames = a["valid"].nonzero().T
    key = rows[:, None], frames[:, None]
    assert torch.equal(a["images"][key], b["images"][key])
    for name in ("proprio", "success", "valid"):
        assert torch.equal(a[name], b[name])


def test_statistics_are_those_of_all_frames_at_once_to_the_bit(make_episode):
    episodes = [make_episode(200, 1, seed=i, size=2) for i in range(5)]
    for episode in episodes:
        episode.proprio[:, 4] = 2.5
    proprio = np.concatenate([e.proprio for e in episodes]).astype(np.float64)
    mean, std = proprio_statistics(episodes)
    assert np.array_equal(mean, proprio.mean(0).astype(np.float32))
    assert np.array_equal(std, np.maximum(proprio.std(0), 1e-3).astype(np.float32))
    assert std[4] == np.float32(1e-3)
    with pytest.raises(UserError, match="at least one episode"):
        proprio_statistics([])


# ---------------------------------------------------------------- what becomes of the files


def drawn(folder):
    windows = ActionWindows(on_disk(folder, 16))
    windows.sample(generator(0), 4)
    return windows, sorted(folder.rglob("*.hdf5"))


@LIBERO
def test_a_file_that_is_cut_short_or_written_to_while_frames_are_drawn(folder):
    windows, files = drawn(folder)
    for file in files:
        os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match=rf"{folder}.*expected the \d+ bytes.*changed since"):
        windows.sample(generator(1), 64)


@LIBERO
def test_a_read_beyond_the_end(folder):
    path = next(folder.rglob("*.hdf5"))
    file = FramesFile(path)
    file.check()
    with pytest.raises(UserError, match="got an end at"):
        file.read(path.stat().st_size - 5, np.empty(12, np.uint8))


@LIBERO
def test_a_file_that_is_replaced_or_removed_is_still_the_one_that_was_opened(folder):
    windows, files = drawn(folder)
    before = windows.batch(torch.arange(len(windows)))
    for file in files:
        shutil.copy(file, f"{file}.new")
        os.replace(f"{file}.new", file)
    files[0].unlink()
    same(before, windows.batch(torch.arange(len(windows))))


@LIBERO
def test_a_truncated_file_is_not_opened(folder):
    file = next(folder.rglob("*.hdf5"))
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match="complete HDF5 file"):
        on_disk(folder, 16)


def test_pictures_of_another_size_or_not_in_one_piece(folder):
    with pytest.raises(UserError, match=r"expected pictures of 8 px, got 16.*--data\.memory"):
        on_disk(folder, 8)
    file = next(folder.rglob("*.hdf5"))
    with h5py.File(file, "a") as handle:
        obs = handle["data/demo_0/obs"]
        name = "images" if "images" in obs else "agentview_rgb"
        values = obs[name][()]
        del obs[name]
        obs.create_dataset(name, data=values, compression="gzip")
    with pytest.raises(UserError, match=r"one uncompressed piece.*--data\.memory"):
        on_disk(folder, 16)


def test_a_foreign_file(tmp_path):
    write_official(tmp_path / "some_demo.hdf5")
    with pytest.raises(UserError, match="expected an episode of ours, got a foreign one"):
        on_disk(tmp_path, None)


@LIBERO
def test_a_full_disk_and_a_folder_that_cannot_be_written_to(folder, monkeypatch):
    episodes = on_disk(folder, 16)
    with pytest.raises(UserError, match=r"expected to write beside the frames.*--data\.memory"):
        Table([torch.zeros(1, 2, 4, 4, 3, dtype=torch.uint8)], folder / "gone")
    monkeypatch.setattr(disk, "spill", lambda beside: open("/dev/full", "w+b"))  # noqa: SIM115
    with pytest.raises(UserError, match="room on the run's disk"):
        ActionWindows(episodes)
    with pytest.raises(UserError, match="room on the run's disk"):
        on_disk(folder, 16)


@LIBERO
def test_nothing_is_left_beside_the_frames(folder):
    before = sorted(folder.rglob("*"))
    drawn(folder)
    assert sorted(folder.rglob("*")) == before
