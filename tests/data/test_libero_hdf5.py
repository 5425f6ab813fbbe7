"""Reading LIBERO's official and openvla's regenerated files, and refusing what is neither."""

import h5py
import numpy as np
import pytest

from worldenv.data.episode import continuous_axis_angle, without_noops
from worldenv.data.episodes import EpisodeWriter, read_episodes
from worldenv.data.libero_tasks import SUITES, instruction_of, locate_task
from worldenv.runtime.errors import UserError

TASK = "pick_up_the_black_bowl_on_the_stove_and_place_it_on_the_plate"


@pytest.mark.parametrize("convention", ["after", "before"])
def test_both_conventions_are_measured(tmp_path, make_foreign, convention):
    path = tmp_path / "libero_spatial" / f"{TASK}_demo.hdf5"
    moments = make_foreign(path, convention, demos=11)
    found = read_episodes(path)
    for moment, episode in zip(moments, found, strict=True):  # demo_10 comes after demo_9
        first = 1 if convention == "after" else 0
        assert np.array_equal(episode.actions, moment["actions"][first:].astype(np.float32))
        assert episode.frame_steps.tolist() == list(range(24))
        assert len(episode) == (23 if convention == "after" else 24)
        for frame in (0, 5, 11):
            at = frame + first
            assert np.array_equal(
                episode.images[frame, 1], moment["eye_in_hand_rgb"][at, ::-1, ::-1]
            )
            assert np.allclose(episode.proprio[frame, :3], moment["ee_pos"][at])
            assert np.allclose(episode.proprio[frame, 6:], moment["gripper_states"][at])
        assert (episode.suite, episode.task) == ("libero_spatial", 7)
        assert episode.instruction == "do the task"
        assert episode.source == "demonstration"
        assert episode.success
        assert episode.dones[-1]
        assert not episode.dones[:-1].any()


def test_undecidable_convention_must_be_told(tmp_path, make_foreign):
    path = tmp_path / "suite" / "unheard_of_demo.hdf5"
    make_foreign(path, "after", attributes=False, still=True)
    with pytest.raises(UserError, match=r"demo_0: cannot tell .* --data.observations after"):
        read_episodes(path)
    assert len(read_episodes(path, observations="after")[0]) == 23
    episode = read_episodes(path, observations="before", task=2, suite="mine")[0]
    assert (episode.suite, episode.task, len(episode)) == ("mine", 2, 24)
    assert episode.instruction == "unheard of"
    with pytest.raises(UserError, match="'before', 'after' or None"):
        read_episodes(path, observations="during")


def test_ours_can_be_appended_to_a_foreign_file(tmp_path, make_foreign, make_episode):
    path = tmp_path / "libero_spatial" / f"{TASK}_demo.hdf5"
    make_foreign(path, "after")
    with EpisodeWriter(path) as writer:
        writer.append(make_episode(9, task=7))
    assert [len(e) for e in read_episodes(path)] == [23, 9]


def test_bad_files_are_named(tmp_path, make_foreign):
    path = tmp_path / "x_demo.hdf5"
    make_foreign(path, "after", demos=3)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        UserError, match=r"x_demo.hdf5: expected a complete HDF5 file, got \d+ bytes"
    ):
        read_episodes(path)
    path.write_text("not HDF5")
    with pytest.raises(UserError, match="complete HDF5 file"):
        read_episodes(path)
    with h5py.File(path, "w") as file:
        file["observations"] = 1
    with pytest.raises(UserError, match="expected a group `data`"):
        read_episodes(path)
    with h5py.File(path, "w") as file:
        file.create_group("data/trajectory_0")
    with pytest.raises(UserError, match="demo_0, demo_1"):
        read_episodes(path)
    with pytest.raises(UserError, match="no such file"):
        read_episodes(tmp_path / "absent.hdf5")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="none in the folder"):
        read_episodes(tmp_path / "empty")


def rotation_matrix(vector):
    angle = np.linalg.norm(vector)
    x, y, z = vector / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def test_axis_angle_is_continuous_and_the_same_rotation():
    rng = np.random.default_rng(0)
    near = rng.normal(size=(64, 3)) * 0.1 + [-3.1, 0, 0]
    far = rng.normal(size=(64, 3))
    for vectors in (near, far):
        for before, after in zip(vectors, continuous_axis_angle(vectors), strict=True):
            assert np.allclose(rotation_matrix(before), rotation_matrix(after), atol=1e-5)
    assert (continuous_axis_angle(near)[:, 0] > 2.5).all()


def test_noops_are_dropped_by_openvlas_rule(make_episode):
    episode = make_episode(10, success_at=8)
    episode.actions[[0, 3, 4, 8], :6] = 0
    episode.actions[:, 6] = [-1, -1, -1, -1, 1, 1, 1, 1, 1, 1]
    short = without_noops(episode)
    # 0 and 3 and 8 do nothing; 4 closes the gripper.
    kept = [1, 2, 4, 5, 6, 7, 9]
    assert np.array_equal(short.actions, episode.actions[kept])
    assert short.frame_steps.tolist() == list(range(8))
    assert np.array_equal(short.images, episode.images[[*kept, 10]])
    assert short.dones.tolist() == [False] * 5 + [True, True]


def test_reader_can_drop_noops(tmp_path, make_episode):
    path = tmp_path / "x_demo.hdf5"
    episode = make_episode(10)
    episode.actions[4] = [0, 0, 0, 0, 0, 0, episode.actions[3, 6]]
    with EpisodeWriter(path) as writer:
        writer.append(episode)
    assert len(read_episodes(path)[0]) == 10
    assert len(read_episodes(path, drop_noops=True)[0]) == 9


def test_task_table():
    assert [len(names) for names in SUITES.values()] == [10] * 4
    assert len({name for names in SUITES.values() for name in names}) == 40
    assert locate_task("turn_on_the_stove") == ("libero_goal", 7)
    assert locate_task("dance") is None
    name = SUITES["libero_10"][2]
    assert instruction_of(name) == "turn on the stove and put the moka pot on it"
