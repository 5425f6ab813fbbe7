"""LeRobotDatasets of others: what their metadata says, and what has to be found out."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from lerobot_files import CAMERAS, column, copied, edit_column, edit_info, write_lerobot
from scipy.spatial.transform import Rotation

from worldenv.data.lerobot.find import datasets_of
from worldenv.data.lerobot.layout import open_dataset
from worldenv.data.lerobot.reader import Reader
from worldenv.envs.libero.robot import embodiment
from worldenv.runtime.errors import UserError
from worldenv.sources import DataConfig

ROBOT = embodiment(32)
# Grey levels by which a picture may differ: 8 bits to YUV with a quarter of the colours and AV1 at
# CRF 30. The frame before or after differs by more, where the hand moves.
MEAN_ERROR = 2.0


def opened(folder, **given) -> Reader:
    return Reader(open_dataset(folder), ROBOT, DataConfig(**given))


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old") / "set"
    return folder, write_lerobot(folder, "v2.1")


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    folder = tmp_path_factory.mktemp("new") / "set"
    return folder, write_lerobot(folder, "v3.0", gripper="unit", turned=-1)


@pytest.mark.parametrize("which", ["old", "new"])
def test_both_versions_give_what_was_put_in(which, request):
    folder, written = request.getfixturevalue(which)
    reader = opened(folder)
    found = list(reader.read())
    assert [(e.suite, e.task) for e in found] == [("libero_goal", t) for t in (7, 1, 7)]
    for put, episode in zip(written, found, strict=True):
        assert np.array_equal(episode.actions, put["action"])  # the gripper's sign as LIBERO's
        assert np.array_equal(episode.proprio, put["observation.state"])
        assert episode.frame_steps.tolist() == list(range(len(put["action"])))
        assert episode.success
        assert np.flatnonzero(episode.dones).tolist() == [len(episode) - 1]
        for view, camera in enumerate(CAMERAS):
            error = np.abs(episode.images[:, view].astype(int) - put[camera])
            assert error.mean() < MEAN_ERROR
            late = np.abs(episode.images[1:, view].astype(int) - put[camera][:-1])
            assert error.mean() < late.mean()
    assert "measured by fingers" in reader.how
    assert f"images {'raw' if which == 'new' else 'upright'} (measured by motion)" in reader.how
    assert f"gripper {'1 open, 0' if which == 'new' else '-1 open, +1'} closed" in reader.how
    assert "labelled 10 frames a second, taken for commands at 20 Hz" in reader.how
    assert reader.notes == ["no next.success: all taken for demonstrations that succeed"]


def test_any_episode_can_be_read_first(new):
    reader = opened(new[0])
    whole = list(reader.read())
    for k, episode in zip((2, 0, 1), reader.read(episodes=(2, 0, 1)), strict=True):
        assert np.array_equal(episode.images, whole[k].images)
        assert np.array_equal(episode.actions, whole[k].actions)
    (small,) = reader.read(16, episodes=(1,))
    assert small.images.shape[2:] == (16, 16, 3)


def test_pictures_in_tables_and_other_keys(tmp_path):
    names = dict(zip((*CAMERAS, "action", "observation.state"),
                     ("image", "wrist_image", "actions", "state"), strict=True))  # fmt: skip
    written = write_lerobot(tmp_path / "set", "v2.1", images=True, names=names, lengths=(40, 30))
    reader = opened(tmp_path / "set")
    for put, episode in zip(written, reader.read(), strict=True):
        assert np.array_equal(episode.images, np.stack([put[c] for c in CAMERAS], 1))
        assert np.array_equal(episode.actions, put["action"])
    assert "cameras image, wrist_image (by name)" in reader.how
    swapped = opened(tmp_path / "set", cameras=("wrist_image", "image"))
    assert "cameras wrist_image, image (as given)" in swapped.how
    (first,) = swapped.read(episodes=[0])
    assert np.array_equal(first.images[:, 0], written[0][CAMERAS[1]])


def test_what_is_given_is_not_measured(new):
    reader = opened(new[0], gripper="one-closes", images="upright", observations="after",
                    rotation="euler", rate="steps")  # fmt: skip
    (episode,) = reader.read(episodes=[0])
    put = new[1][0]
    assert np.array_equal(episode.actions[:, 6], -put["action"][1:, 6])
    assert len(episode) == 39
    assert episode.frame_steps[-1] == 39  # after the last action
    turn = Rotation.from_euler("xyz", put["observation.state"][:, 3:6])
    same = Rotation.from_rotvec(episode.proprio[:, 3:6]) * turn.inv()
    assert same.magnitude().max() < 1e-5
    assert reader.how.count("as given") == 5


@pytest.mark.parametrize("kind", ["quaternion-xyzw", "quaternion-wxyz", "euler"])
def test_the_hands_turn_is_measured(tmp_path, kind):
    folder = tmp_path / "set"
    (put,) = write_lerobot(folder, "v2.1", images=True, lengths=(60,))
    turn = Rotation.from_rotvec(put["observation.state"][:, 3:6])
    values = turn.as_euler("xyz") if kind == "euler" else turn.as_quat()
    values = values[:, [3, 0, 1, 2]] if kind.endswith("wxyz") else values
    state = np.concatenate(
        [put["observation.state"][:, :3], values, put["observation.state"][:, 6:]], 1
    )
    path = folder / "data/chunk-000/episode_000000.parquet"
    widen(path, folder, state)
    reader = opened(folder)
    (episode,) = reader.read()
    assert f"turned as {kind} (measured by turns)" in reader.how
    same = Rotation.from_rotvec(episode.proprio[:, 3:6]) * turn.inv()
    assert same.magnitude().max() < 1e-5


def widen(path, folder, state) -> None:
    """Another state, of as many numbers as it has."""
    table = pq.read_table(path)
    at = table.column_names.index("observation.state")
    pq.write_table(table.set_column(at, "observation.state", column(state)), path)
    features = json.loads((folder / "meta/info.json").read_text())["features"]
    features["observation.state"]["shape"] = [state.shape[1]]
    edit_info(folder, features=features)
    (folder / "meta/episodes_stats.jsonl").unlink()


def test_success_is_taken_where_it_is_told(tmp_path):
    won = iter((True, False))

    def success(n):
        return np.eye(n, dtype=bool)[-1] & next(won)

    write_lerobot(tmp_path / "set", "v3.0", images=True, lengths=(40, 30),
                  extra={"next.success": success})  # fmt: skip
    reader = opened(tmp_path / "set")
    assert [e.success for e in reader.read()] == [True, False]
    assert reader.notes == []


def test_statistics_that_disagree_are_said(old, tmp_path):
    folder = copied(old[0], tmp_path / "set")
    path = folder / "data/chunk-000/episode_000001.parquet"
    edit_column(path, "action", lambda rows: [[r[0] / 2, *r[1:]] for r in rows])
    reader = opened(folder)
    assert len(list(reader.read())) == 3
    assert len(reader.notes) == 2
    assert "statistics disagree with the data (m" in reader.notes[1]
    assert "of action[0]" in reader.notes[1]


def test_text_that_is_not_ascii(tmp_path):
    text = "öffne die Schublade 抽屉"
    for version in ("v2.1", "v3.0"):
        folder = tmp_path / version / "дата"
        write_lerobot(folder, version, images=True, lengths=(40,), texts=(text,))
        (episode,) = opened(folder).read()
        assert (episode.instruction, episode.task, episode.suite) == (text, -1, "дата")


def test_a_rate_that_is_no_label_is_refused_unless_given(tmp_path):
    write_lerobot(tmp_path / "set", "v2.1", images=True, lengths=(40,), fps=5)
    with pytest.raises(UserError, match=r"fps: expected 20, .*got 5.*--data.rate steps"):
        opened(tmp_path / "set")
    assert "5 frames a second" in opened(tmp_path / "set", rate="steps").how


def test_data_sets_are_found_under_a_folder(old, tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/set").symlink_to(old[0])
    assert datasets_of(tmp_path / "a") == [tmp_path / "a/b/set"]
    assert datasets_of(old[0]) == [old[0]]
    assert datasets_of(tmp_path / "gone") == []


def test_another_robots_rotation_is_left_alone(old):
    robot = replace(ROBOT, name="other", proprio=ROBOT.proprio[:3] * 2 + ROBOT.proprio[6:])
    reader = Reader(open_dataset(old[0]), robot, DataConfig(rate="steps"), [0])
    (episode,) = reader.read()
    assert np.array_equal(episode.proprio, old[1][0]["observation.state"])
    assert "images upright (as in LeRobot's sets" in reader.how
