"""LeRobotDatasets that are damaged, incomplete or another robot's: refused by file and key."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_files import CAMERAS, copied, edit_column, edit_info, encode, write_lerobot
from table import Row, ends_in_a_named_error

from worldenv.data.lerobot.layout import open_dataset
from worldenv.data.lerobot.reader import Reader
from worldenv.envs.libero.robot import embodiment

ROBOT = embodiment(32)
TABLE = {"v2.1": "data/chunk-000/episode_000001.parquet", "v3.0": "data/chunk-000/file-000.parquet"}
VIDEO = {"v2.1": f"videos/chunk-000/{CAMERAS[1]}/episode_000001.mp4",
         "v3.0": f"videos/{CAMERAS[1]}/chunk-000/file-000.mp4"}  # fmt: skip
LIST = {"v2.1": "meta/episodes.jsonl", "v3.0": "meta/episodes/chunk-000/file-000.parquet"}
BOTH = ("v2.1", "v3.0")


@pytest.fixture(scope="module", params=BOTH)
def whole(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "set"
    write_lerobot(folder, request.param, lengths=(24, 26, 20), size=16)
    return request.param, folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pointer(path: Path) -> None:
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def text(path: Path) -> None:
    path.write_text("<html>not found</html>")


def other_rate(folder: Path, name: str) -> None:
    encode(folder / name, np.zeros((90, 16, 16, 3), np.uint8), 30)


def other_size(folder: Path, name: str) -> None:
    encode(folder / name, np.zeros((90, 32, 32, 3), np.uint8), 10)


def fewer(folder: Path, name: str) -> None:
    encode(folder / name, np.zeros((9, 16, 16, 3), np.uint8), 10)


def shift(name: str, by: float = 1):
    def damage(folder: Path, version: str) -> None:
        edit_column(folder / TABLE[version], name, lambda rows: [row + by for row in rows])

    return damage


def feature(key: str, **changes):
    def damage(folder: Path, version: str) -> None:
        features = json.loads((folder / "meta/info.json").read_text())["features"]
        edit_info(folder, features={**features, key: {**features[key], **changes}})

    return damage


def without(key: str):
    def damage(folder: Path, version: str) -> None:
        info = json.loads((folder / "meta/info.json").read_text())
        del info[key]
        (folder / "meta/info.json").write_text(json.dumps(info))

    return damage


def no_column(folder: Path, version: str) -> None:
    table = pq.read_table(folder / TABLE[version])
    pq.write_table(table.drop_columns(["action"]), folder / TABLE[version])


def nan(folder: Path, version: str) -> None:
    edit_column(folder / TABLE[version], "action", lambda r: [*r[:-1], [float("nan"), *r[-1][1:]]])


def metres(folder: Path, version: str) -> None:
    for path in folder.glob("data/*/*.parquet"):
        edit_column(path, "action", lambda rows: [[9 * x for x in row] for row in rows])


def ragged(folder: Path, version: str) -> None:
    table = pq.read_table(folder / TABLE[version])
    rows = table["action"].to_pylist()
    rows[0], rows[1] = rows[0][:-1], [*rows[1], 0.0]
    at = table.column_names.index("action")
    values = pa.array(rows, pa.list_(pa.float32()))
    pq.write_table(table.set_column(at, "action", values), folder / TABLE[version])


def unlisted(folder: Path, version: str) -> None:
    path = folder / LIST[version]
    if version == "v2.1":
        path.write_text(path.read_text().rsplit("\n", 1)[0])
    else:
        pq.write_table(pq.read_table(path).slice(0, 2), path)


DAMAGE = {
    "no video": (lambda f, v: (f / VIDEO[v]).unlink(), "mp4: expected the video of observ"),
    "no table": (lambda f, v: (f / TABLE[v]).unlink(), "parquet: expected the data of episode"),
    "no list": (lambda f, v: (f / LIST[v]).unlink(), "meta/episodes"),
    "a video cut short": (lambda f, v: cut(f / VIDEO[v]), "mp4: expected"),
    "a table cut short": (lambda f, v: cut(f / TABLE[v]), "expected a complete Parquet file"),
    "a list cut short": (lambda f, v: cut(f / LIST[v]), "meta/episodes"),
    "a page for a video": (lambda f, v: text(f / VIDEO[v]), "ffmpeg ended with"),
    "a page for a table": (lambda f, v: text(f / TABLE[v]), "Copy or download it again"),
    "a page for info": (lambda f, v: text(f / "meta/info.json"), "info.json: expected JSON"),
    "Git LFS's note": (lambda f, v: pointer(f / TABLE[v]), "Run `git lfs pull`"),
    "Git LFS's note for a video": (lambda f, v: pointer(f / VIDEO[v]), "Run `git lfs pull`"),
    "a video at another rate": (lambda f, v: other_rate(f, VIDEO[v]), "of a video at 30"),
    "a video of another size": (lambda f, v: other_size(f, VIDEO[v]), "pictures of 16x16"),
    "a video of too few frames": (lambda f, v: fewer(f, VIDEO[v]), "the video is over"),
    "another rate in info": (lambda f, v: edit_info(f, fps=20), "download"),
    "no rate": (without("fps"), "info.json: fps: expected a number, got none"),
    "index": (shift("index"), "index: expected"),
    "frame_index": (shift("frame_index"), "frame_index: expected 0 in row 0"),
    "episode_index": (shift("episode_index"), "episode_index: expected"),
    "task_index": (shift("task_index", 7), "task_index: expected"),
    "timestamp": (shift("timestamp", 0.5), "timestamp: expected 0.0000 s in row 0"),
    "more frames than listed": (lambda f, v: edit_info(f, total_frames=99), "total_frames: expec"),
    "an episode that is not listed": (unlisted, "total_episodes: expected 3"),
    "other action dims": (feature("action", shape=[4]), "features.action: expected 7 numbers"),
    "another robot's state": (feature("observation.state", shape=[14]), "--data.state KEY"),
    "no column": (no_column, "action: expected such a column"),
    "NaN": (nan, "action: expected finite numbers, got NaN or infinity in row"),
    "ragged rows": (ragged, "action: expected as many numbers in every row"),
    "other units": (metres, "action: expected commands within -1..1"),
    "depth for a camera": (feature(CAMERAS[1], shape=[16, 16, 1]), "--data.cameras KEY"),
    "two cameras alike": (
        lambda f, v: edit_info(f, features=renamed(f)), "observation.images.side"),
    "a later version": (lambda f, v: edit_info(f, codebase_version="v4.0"), "codebase_version"),
    "a path that leaves": (lambda f, v: edit_info(f, data_path="../{file_index}"), "data_path"),
    "a path of attributes": (
        lambda f, v: edit_info(f, data_path="data/{file_index.real}"), "data_path"),
    "text that is not UTF-8": (lambda f, v: (f / "meta/info.json").write_bytes(b'{"a": "\xff"}'),
                               "info.json: expected UTF-8"),
}  # fmt: skip


def renamed(folder: Path) -> dict:
    features = json.loads((folder / "meta/info.json").read_text())["features"]
    return {{CAMERAS[1]: "observation.images.side"}.get(k, k): v for k, v in features.items()}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name, whole, tmp_path, capsys):
    version, folder = whole
    damage, words = DAMAGE[name]

    def act(empty):
        damaged = copied(folder, empty / "set")
        damage(damaged, version)
        return list(Reader(open_dataset(damaged), ROBOT).read())

    ends_in_a_named_error(Row(name, act, words), tmp_path, capsys)
