"""What a LeRobotDataset folder says of itself: features, tasks, episodes and where they lie.

v2.1 keeps one Parquet file and one video of each camera for every episode, v3.0 many episodes in
each and their places in `meta/episodes`. Both become the same columns here, one entry an episode,
and nothing of the data is opened. Whatever disagrees with itself is refused, by file and key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from worldenv.data.lerobot.find import INFO
from worldenv.data.lerobot.tables import (
    AGAIN,
    numbers,
    read_json,
    read_lines,
    read_table,
    texts,
    unreadable,
)
from worldenv.runtime.errors import UserError

VERSIONS = ("v2.0", "v2.1", "v3.0")
LONGEST = 100_000  # rows of an episode; more is a damaged file
_PLACES = ("chunk_index", "file_index")
_SPAN = ("from_timestamp", "to_timestamp")
_NAMES = re.compile(r"\{(\w+)(?::0(\d)d)?\}")


@dataclass(frozen=True)
class Feature:
    """What `info.json` says of one column or camera; shape as in memory, [H, W, 3] of a camera."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def camera(self) -> bool:
        """Whether it holds colour pictures (depth is none)."""
        return self.dtype in ("image", "video") and len(self.shape) == 3 and self.shape[2] == 3


@dataclass(frozen=True)
class DataSet:
    """A data set of N episodes, opened.

    texts: what there is to do; text [N] which of them. number, length, first [N]: episode_index,
    rows, `index` of its first row. start: of each camera on video the seconds [N] at which episodes
    begin in their file.
    """

    folder: Path
    version: str
    fps: float
    features: dict[str, Feature]
    texts: tuple[str, ...]
    text: np.ndarray
    number: np.ndarray
    length: np.ndarray
    first: np.ndarray
    start: dict[str, np.ndarray]
    tasks: dict[int, str]
    _paths: dict[str, str]
    _places: dict[str, np.ndarray]

    def __len__(self) -> int:
        """Number of episodes N."""
        return len(self.number)

    @property
    def cameras(self) -> tuple[str, ...]:
        """Keys of what holds pictures."""
        return tuple(name for name, feature in self.features.items() if feature.camera)

    def data_file(self, episode: int) -> Path:
        """The Parquet file of the episode in place `episode`."""
        return self._file("", episode)

    def video_file(self, camera: str, episode: int) -> Path:
        """The video of a camera in which the episode in place `episode` lies."""
        return self._file(camera, episode)

    @cached_property
    def rows_before(self) -> np.ndarray:
        """[N] rows of each episode's Parquet file that belong to episodes before it."""
        files, of = np.unique(self._places[""], axis=0, return_inverse=True)
        begin = np.full(len(files), self.first.max(initial=0))
        np.minimum.at(begin, of.reshape(-1), self.first)
        return self.first - begin[of.reshape(-1)]

    def _file(self, camera: str, episode: int) -> Path:
        chunk, file = self._places[camera][episode].tolist()
        values = {"chunk_index": chunk, "file_index": file, "video_key": camera,
                  "episode_chunk": chunk, "episode_index": file}  # fmt: skip
        template = self._paths["video_path" if camera else "data_path"]

        def said(match: re.Match) -> str:
            value = values[match[1]]
            return f"{value:0{match[2]}d}" if match[2] else str(value)

        return self.folder / _NAMES.sub(said, template)

    def check_files(self, episodes: np.ndarray, cameras: tuple[str, ...]) -> None:
        """UserError for the first file that episodes in these places need and that is not there."""
        for camera in ("", *(c for c in cameras if self.features[c].dtype == "video")):
            _, firsts = np.unique(self._places[camera][episodes], axis=0, return_index=True)
            for episode in episodes[firsts].tolist():
                path = self._file(camera, episode)
                if not path.is_file():
                    what = f"the video of {camera}" if camera else "the data"
                    raise UserError(
                        f"{path}: expected {what} of episode {self.number[episode]}, got no such "
                        "file. Download the data set whole (`huggingface-cli download --repo-type "
                        "dataset`), or leave its folder out of --data."
                    )


def open_dataset(folder: Path | str) -> DataSet:
    """Read a folder's metadata, of v2.0, v2.1 or v3.0.

    Raises:
        UserError: names the file and the key that is absent, damaged or disagrees with another.
    """
    folder = Path(folder)
    path = folder / INFO
    info = read_json(path)
    version = _want(info, "codebase_version", str, path)
    if version not in VERSIONS:
        raise UserError(
            f"{path}: codebase_version: expected {', '.join(VERSIONS)}, got {version!r}. Convert "
            "the data set with LeRobot's own scripts (v1 to v2.1, or a later one to v3.0)."
        )
    fps = _want(info, "fps", (int, float), path)
    if not 0 < fps <= 1000:
        got = repr(fps)[:40]
        raise UserError(f"{path}: fps: expected frames a second above 0, got {got}. {AGAIN}")
    fps = float(fps)
    features = _features(_want(info, "features", dict, path), path)
    cameras = [k for k, feature in features.items() if feature.camera and feature.dtype == "video"]
    paths = {"data_path": _template(info, "data_path", path)}
    if cameras:
        paths["video_path"] = _template(info, "video_path", path)
    columns = (_new if version == "v3.0" else _old)(folder, info, cameras, fps)
    columns["length"] = _checked(columns["length"], columns["number"], info, path)
    said = columns.pop("said")
    kinds = tuple(dict.fromkeys(said))
    place = {text: k for k, text in enumerate(kinds)}
    return DataSet(
        folder=folder, version=version, fps=fps, features=features, texts=kinds,
        text=np.array([place[text] for text in said], np.int64), _paths=paths, **columns,
    )  # fmt: skip


def _want(table: dict[str, Any], key: str, kind: type | tuple[type, ...], path: Path) -> Any:
    value = table.get(key)
    if not isinstance(value, kind) or isinstance(value, bool) or value == "":
        words = {str: "text", int: "a whole number", dict: "an object"}.get(kind, "a number")
        got = repr(value)[:80] if key in table else f"none (keys: {', '.join(table)[:200]})"
        raise UserError(f"{path}: {key}: expected {words}, got {got}. {AGAIN}")
    return value


def _features(found: dict[str, Any], path: Path) -> dict[str, Feature]:
    features = {}
    for name, value in found.items():
        where = f"features.{name}"
        if not isinstance(value, dict):
            raise UserError(f"{path}: {where}: expected an object, got {value!r:.80}. {AGAIN}")
        dtype, shape = value.get("dtype"), value.get("shape")
        whole = isinstance(shape, list) and all(type(n) is int and 0 < n < 10**6 for n in shape)
        if not isinstance(dtype, str) or not whole:
            raise UserError(
                f"{path}: {where}: expected a dtype and a shape of whole numbers, got "
                f"{dtype!r:.80} and {shape!r:.80}. {AGAIN}"
            )
        if dtype in ("image", "video") and len(shape) == 3 and shape[0] == 3 != shape[2]:
            shape = [*shape[1:], 3]  # the colours stand first
        features[name] = Feature(dtype, tuple(shape))
    return features


def _template(info: dict[str, Any], key: str, path: Path) -> str:
    text = _want(info, key, str, path)
    known = {"chunk_index", "file_index", "video_key", "episode_chunk", "episode_index"}
    names = {match[1] for match in _NAMES.finditer(text)}
    left = _NAMES.sub("", text)
    if (
        len(text) > 200
        or not names <= known
        or set("{}\0") & set(left)
        or ".." in text
        or text[0] == "/"
    ):
        raise UserError(
            f"{path}: {key}: expected a path inside the folder with {', '.join(sorted(known))} in "
            f"braces, got {text!r:.200}. {AGAIN}"
        )
    return text


def _checked(length: np.ndarray, number: np.ndarray, info: dict[str, Any], path: Path) -> Any:
    """Lengths, where they are as many and as long as info.json says."""
    if len(length) and not 1 <= length.min() <= length.max() <= LONGEST:
        raise UserError(
            f"{path.parent}: episodes: length: expected 1 to {LONGEST} rows, got "
            f"{length.min()} to {length.max()}. {AGAIN}"
        )
    if len(np.unique(number)) != len(number) or (len(number) and number.min() < 0):
        raise UserError(
            f"{path.parent}: episodes: episode_index: expected each once, from 0 on, got some "
            f"twice or below 0. {AGAIN}"
        )
    for key, got in (("total_episodes", len(length)), ("total_frames", int(length.sum()))):
        said = _want(info, key, int, path)
        if said != got or not got:
            raise UserError(
                f"{path}: {key}: expected {said or 'at least 1'} as it says, got {got} by the list "
                f"of episodes. The two are not of one data set: download it again, whole."
            )
    return length


def _old(folder: Path, info: dict[str, Any], cameras: list[str], fps: float) -> dict[str, Any]:
    """Columns of v2.0 and v2.1: JSON lines, and every episode in files of its own."""
    path, tasks = folder / "meta/episodes.jsonl", folder / "meta/tasks.jsonl"
    rows = sorted(read_lines(path), key=lambda row: _index(row, "episode_index", path))
    said = [_first_text(row, path) for row in rows]
    number = np.array([row["episode_index"] for row in rows], np.int64)
    length = np.array([_index(row, "length", path) for row in rows], np.int64)
    size = _want(info, "chunks_size", int, folder / INFO)
    if not 1 <= size < 2**40:
        raise UserError(
            f"{folder / INFO}: chunks_size: expected 1 or more, got {size!s:.40}. {AGAIN}"
        )
    place = np.stack([number // size, number], 1).reshape(-1, 2)
    known = {
        _index(row, "task_index", tasks): _want(row, "task", str, tasks)
        for row in read_lines(tasks)
    }
    return {
        "said": said, "number": number, "length": length, "first": np.cumsum(length) - length,
        "start": {camera: np.zeros(len(rows)) for camera in cameras},
        "_places": dict.fromkeys(("", *cameras), place), "tasks": known,
    }  # fmt: skip


def _first_text(row: dict[str, Any], path: Path) -> str:
    """What is to be done in an episode: the first of its `tasks`."""
    tasks = row.get("tasks")
    return _want(
        {"tasks": tasks[0] if isinstance(tasks, list) and tasks else tasks}, "tasks", str, path
    )


def _index(row: dict[str, Any], key: str, path: Path) -> int:
    value = _want(row, key, int, path)
    if not 0 <= value < 2**40:
        raise UserError(f"{path}: {key}: expected a whole number from 0 on, got {value}. {AGAIN}")
    return value


def _new(folder: Path, info: dict[str, Any], cameras: list[str], fps: float) -> dict[str, Any]:
    """Columns of v3.0, from `meta/episodes`; its statistics are not read."""
    place = folder / "meta/episodes"
    files = sorted(place.glob("*/*.parquet"))
    if not files:
        raise unreadable(place / "chunk-000/file-000.parquet", "the list of episodes", "")
    of_video = [f"videos/{c}/{k}" for c in cameras for k in (*_PLACES, *_SPAN)]
    wanted = ["episode_index", "length", "tasks", "dataset_from_index", "dataset_to_index",
              *(f"data/{k}" for k in _PLACES), *of_video]  # fmt: skip
    parts: dict[str, list] = {name: [] for name in wanted}
    for path in files:
        table = read_table(path, wanted)
        for name in wanted:
            seconds = name.endswith("_timestamp")
            read = texts if name == "tasks" else numbers
            parts[name].append(read(table, name, path, *["f"] * seconds))
    said = [text for part in parts.pop("tasks") for text in part]
    found = {name: np.concatenate(part) for name, part in parts.items()}
    order = np.argsort(found["episode_index"], kind="stable")
    found = {name: values[order] for name, values in found.items()}
    length, first = found["length"], found["dataset_from_index"]
    _agree(place, "dataset_to_index", found["dataset_to_index"] - first, length, 0, found)
    places = {"": np.stack([found[f"data/{k}"] for k in _PLACES], 1)}
    for camera in cameras:
        begin, end = (found[f"videos/{camera}/{k}_timestamp"] for k in ("from", "to"))
        key = f"videos/{camera}/to_timestamp (fps {fps:g})"
        _agree(place, key, (end - begin) * fps, length, 0.5, found)
        places[camera] = np.stack([found[f"videos/{camera}/{k}"] for k in _PLACES], 1)
    if min(int(p.min()) for p in (*places.values(), first, length)) < 0:
        raise UserError(f"{place}: expected places and lengths from 0 on, got some below. {AGAIN}")
    return {
        "said": [said[k] for k in order], "number": found["episode_index"], "length": length,
        "first": first, "_places": places, "tasks": _tasks(folder / "meta/tasks.parquet"),
        "start": {c: found[f"videos/{c}/from_timestamp"] for c in cameras},
    }  # fmt: skip


def _agree(
    place: Path, key: str, rows: np.ndarray, length: np.ndarray, by: float, found: dict
) -> None:
    """UserError unless the rows of every episode are its length."""
    wrong = np.flatnonzero(~(np.abs(rows - length) <= by))
    if len(wrong):
        k = int(wrong[0])
        raise UserError(
            f"{place}: {key}: expected {length[k]} rows of episode {found['episode_index'][k]}, as "
            f"its length says, got {rows[k]:g}. The frame rate or the index is of another version "
            "of the data: download the data set again, whole."
        )


def _tasks(path: Path) -> dict[int, str]:
    """task_index: text. The text is pandas' index, named `task` or not at all."""
    table = read_table(path)
    name = next((n for n in ("task", "__index_level_0__") if n in table.column_names), "task")
    keys = numbers(table, "task_index", path).tolist()
    return dict(zip(keys, texts(table, name, path), strict=True))
