"""What files do not say is measured: when observations were taken, and how images lie."""

import math

import h5py
import numpy as np
import pytest

from worldenv.data.conventions import IMAGES
from worldenv.data.episode import area_resize
from worldenv.data.episodes import EpisodeWriter, read_episodes
from worldenv.data.libero_tasks import SUITES, locate_instruction
from worldenv.data.reading import conventions_of, data_files
from worldenv.runtime.errors import UserError


@pytest.mark.parametrize("convention", ["before", "after"])
@pytest.mark.parametrize("way", sorted(IMAGES))
@pytest.mark.parametrize("states", [True, False], ids=["states", "gripper"])
def test_moment_and_orientation_are_measured(tmp_path, make_foreign, convention, way, states):
    path = tmp_path / "x_demo.hdf5"
    turn = [-step for step in IMAGES[way]]  # from raw to how they are stored
    moments = make_foreign(path, convention, demos=2, size=64, steps=40, way=turn)
    if not states:
        with h5py.File(path, "a") as file:
            for demo in file["data"].values():
                del demo["states"]
    found = conventions_of(path)
    assert (found.observations, found.images) == (convention, way)
    assert found.observations_by == f"measured by {'states' if states else 'gripper'}"
    assert found.images_by == "measured by motion"
    first = 1 if convention == "after" else 0
    for moment, episode in zip(moments, read_episodes(path), strict=True):
        upright = moment["agentview_rgb"][first:, ::-1, ::-1]
        assert np.array_equal(episode.images[:, 0], upright[: len(episode.images)])


def test_what_is_given_is_not_measured(tmp_path, make_foreign):
    path = tmp_path / "x_demo.hdf5"
    make_foreign(path, "after", size=64, steps=40)
    found = conventions_of(path, "before", "upright")
    assert str(found) == "obs before each action (as given), images upright (as given)"
    assert len(read_episodes(path, observations="before")[0]) == 40
    with pytest.raises(UserError, match=r"Unknown way images lie 'uprihgt'.*'upright'"):
        read_episodes(path, images="uprihgt")


def test_a_still_robot_shows_neither(tmp_path, make_foreign):
    path = tmp_path / "x_demo.hdf5"
    make_foreign(path, still=True, size=64, steps=40)
    found = conventions_of(path)
    assert found.observations is None
    assert (found.images, "too little motion" in found.images_by) == ("raw", True)


@pytest.mark.libero
@pytest.mark.slow
def test_files_written_by_the_benchmark_itself_are_measured(tmp_path):
    """A scripted episode replayed in LIBERO's own environment, stored in both ways."""
    from real_files import record, write

    moments = record("libero_spatial", 8)
    for convention in ("before", "after"):
        for way, steps in IMAGES.items():
            path = tmp_path / f"{convention}-{way}_demo.hdf5"
            for states in (True, False):
                write(path, moments, convention, [-s for s in steps], states)
                found = conventions_of(path)
                assert (found.observations, found.images) == (convention, way), found
                assert ("states" in found.observations_by) == states
                assert found.images_by == "measured by motion"


def test_any_square_size_is_averaged():
    rng = np.random.default_rng(0)
    for side, size in ((224, 64), (84, 64), (100, 7), (64, 128), (5, 3)):
        images = rng.integers(0, 256, (2, side, side, 3), dtype=np.uint8)
        fine = math.lcm(side, size)  # pixels a side that both grids are made of
        one, block = fine // side, fine // size
        pixels = np.repeat(np.repeat(images, one, 1), one, 2).astype(float)
        exact = pixels.reshape(2, size, block, size, block, 3).mean(axis=(2, 4))
        small = area_resize(images, size)
        assert small.shape == (2, size, size, 3)
        assert np.abs(small - exact).max() <= 0.5 + 1e-3
    with pytest.raises(UserError, match="square images and a size of at least 1, got 16x20 and 8"):
        area_resize(np.zeros((1, 16, 20, 3), np.uint8), 8)


@pytest.mark.parametrize(("side", "size"), [(128, 64), (96, 32), (70, 10), (224, 2), (128, 1)])
def test_whole_ratios_average_to_the_same_bits_as_ever(side, size):
    rng, block = np.random.default_rng(0), side // size
    for low, high in ((0, 256), (127, 129)):
        images = rng.integers(low, high, (9, side, side, 3), dtype=np.uint8)
        blocks = images.reshape(9, size, block, size, block, 3)
        expected = (blocks.mean(axis=(2, 4), dtype=np.float32) + 0.5).astype(np.uint8)
        assert np.array_equal(area_resize(images, size), expected)


def test_files_of_any_suffix_and_linked_folders_are_found(tmp_path, make_foreign):
    for name in ("a/one_demo.hdf5", "a/two_demo.h5", "a/b/three_demo.HDF5", "a/._four.hdf5"):
        make_foreign(tmp_path / "real" / name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "suite").symlink_to(tmp_path / "real" / "a")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "real" / "a" / "b")
    (tmp_path / "real" / "a" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "five_demo.hdf5").symlink_to(tmp_path / "real" / "a" / "one_demo.hdf5")
    found = data_files(tmp_path / "data")
    assert {f.resolve().name for f in found} == {"one_demo.hdf5", "two_demo.h5", "three_demo.HDF5"}
    assert len(found) == 3  # each once
    assert len(read_episodes(tmp_path / "data")) == 3


@pytest.mark.parametrize("name", ["x_demo.hdf5", "x_demo.H5", "libero_goal"])
def test_a_folder_of_dangling_links_is_not_empty(tmp_path, name):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / name).symlink_to(tmp_path / "gone" / name)
    for path in (folder, folder / name):
        with pytest.raises(UserError, match=rf"1 to nothing: .*{name} -> .*gone/{name}"):
            read_episodes(path)


def test_upper_case_suffixes_can_be_written(tmp_path, make_episode):
    with EpisodeWriter(tmp_path / "x_demo.HDF5") as writer:
        writer.append(make_episode(4))
    assert len(read_episodes(tmp_path)) == 1


@pytest.mark.libero
def test_tasks_are_found_by_the_words_of_liberos_own_task_files():
    import re

    from worldenv.envs.libero.assets import libero_root

    for suite, names in SUITES.items():
        for task, name in enumerate(names):
            text = (libero_root() / "bddl_files" / suite / f"{name}.bddl").read_text()
            spoken = re.search(r":language (.*?)\)", text)[1]
            assert locate_instruction(spoken) == (suite, task)
