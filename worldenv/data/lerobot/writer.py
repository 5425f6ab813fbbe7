"""Episodes as a LeRobotDataset v3.0.

Everything is written into a folder beside the one that is asked for, which gets its name when all
is there: nothing half-written stays. Frames go straight to one encoder for each camera, rows of an
episode into one row group, so that memory does not grow with the data. An episode's frames are
those before its actions; where they are sparse the last one is carried over, which
`worldenv.seen` says (`own.py` keeps the rest).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from worldenv.data.embodiment import Embodiment, check_fits
from worldenv.data.episode import Episode, check_episode
from worldenv.data.lerobot import own
from worldenv.data.lerobot.statistics import Statistics, merged, of_frames, of_numbers
from worldenv.runtime.errors import UserError, write_error

DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = DATA_PATH.replace("data/", "meta/episodes/", 1)
DATA_MB, VIDEO_MB, CHUNK = 100, 200, 1000
_GROUP = 1000  # episodes of a row group of the list
_NAMES = {"agentview": "image", "robot0_eye_in_hand": "image2"}  # as published LIBERO sets have it
CODECS = {  # LeRobot's own settings; the other for players and machines without AV1
    "av1": ("-c:v", "libsvtav1", "-preset", "8", "-crf", "30", "-g", "2"),
    "h264": ("-c:v", "libx264", "-preset", "veryfast", "-crf", "18", "-g", "2"),
}


def camera_key(view: str) -> str:
    """The key of a robot's view."""
    return f"observation.images.{_NAMES.get(view, view)}"


class Encoder:
    """One video, frame by frame."""

    def __init__(self, path: Path, side: tuple[int, int], fps: float, codec: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.count = path, 0
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - as long as ffmpeg
        command = [
            *(imageio_ffmpeg.get_ffmpeg_exe(), "-nostats", "-v", "error", "-f", "rawvideo"),
            *("-pix_fmt", "rgb24", "-s", f"{side[1]}x{side[0]}", "-r", f"{fps:g}", "-i", "-"),
            *(*CODECS[codec], "-pix_fmt", "yuv420p", "-f", "mp4", str(path.absolute())),
        ]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._said,
            env={**os.environ, "SVT_LOG": "1"},
        )  # fmt: skip

    def write(self, frames: np.ndarray) -> None:
        """Add frames [F, H, W, 3] uint8."""
        try:
            self._process.stdin.write(np.ascontiguousarray(frames).data)
        except BrokenPipeError as error:
            raise self._failed() from error
        self.count += len(frames)

    def close(self) -> None:
        """Finish the video."""
        try:
            self._process.stdin.close()
        except BrokenPipeError as error:
            raise self._failed() from error
        if self._process.wait():
            raise self._failed()
        self._said.close()

    def abandon(self) -> None:
        """Stop, whatever becomes of the video."""
        self._process.kill()
        self._process.wait()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._said.close()

    def _failed(self) -> UserError:
        code = self._process.wait()
        said = os.pread(self._said.fileno(), 1 << 16, 0).decode(errors="replace").split("\n")
        self._said.close()
        lines = [line.strip() for line in said if line.strip()]
        return UserError(
            f"{self.path}: ffmpeg could not write the video (code {code}: "
            f"{lines[-1] if lines else 'it said nothing'}). It takes free space, and a working "
            "ffmpeg, which `pip install --force-reinstall imageio-ffmpeg` brings; one without AV1 "
            "still has h264 (--codec h264)."
        )


class LeRobotWriter:
    """Writes episodes of one robot to a new folder. Use as a context manager: leaving it by an
    exception leaves nothing.
    """

    def __init__(self, folder: Path | str, robot: Embodiment, codec: str = "av1") -> None:
        self.folder, self.robot, self.codec = Path(folder), robot, codec
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(
                f"{self.folder}: expected a folder that is not there yet, got one that is. A data "
                "set is written whole: choose another name, or remove it first."
            )
        try:
            self.folder.absolute().parent.mkdir(parents=True, exist_ok=True)
            self._draft = Path(
                tempfile.mkdtemp(
                    prefix=f".{self.folder.name}.part-", dir=self.folder.absolute().parent
                )
            )
        except OSError as error:
            raise write_error(self.folder, error) from error
        self._tasks: dict[str, int] = {}
        self._rows: list[dict[str, Any]] = []
        self._stats: dict[str, Statistics] = {}
        self._videos: dict[str, Encoder] = {}
        self._places: dict[str, int] = {}
        self._data: pq.ParquetWriter | None = None
        self._list: pq.ParquetWriter | None = None
        self._side: tuple[int, int] | None = None
        self._total = self._count = 0
        self._own = own.Writer(self._draft)

    def append(self, episode: Episode, rewards: np.ndarray | None = None) -> None:
        """Add an episode. rewards [T] float32: of each action, by default 1 where the task is
        solved after it and else 0.
        """
        where = f"{self.folder}: new episode {self._count}"
        check_episode(episode, where)
        check_fits(episode, self.robot, where)
        side = episode.images.shape[2:4]
        self._side = self._side or side
        if side != self._side or side[0] % 2 or side[1] % 2 or episode.frame_steps[0] != 0:
            raise UserError(
                f"{where}: expected a frame before the first action, and pictures of one even size "
                f"({self._side[0]}x{self._side[1]}), got {side[0]}x{side[1]} from step "
                f"{episode.frame_steps[0]} on. Average them to one size: --image-size N."
            )
        try:
            self._append(episode, rewards, where)
        except OSError as error:
            raise write_error(self.folder, error) from error

    def _append(self, episode: Episode, rewards: np.ndarray | None, where: str) -> None:
        steps = len(episode)
        inside = episode.frame_steps < steps
        seen = np.zeros(steps, bool)
        seen[episode.frame_steps[inside]] = True
        row_of = np.cumsum(seen) - 1  # frame of each step: the last one recorded
        rewards = episode.dones if rewards is None else rewards
        task = self._tasks.setdefault(episode.instruction, len(self._tasks))
        columns = {
            "observation.state": episode.proprio[row_of].astype(np.float32),
            "action": episode.actions.astype(np.float32),
            "next.reward": rewards.astype(np.float32)[:, None],
            "next.success": episode.dones[:, None],
            "next.done": (np.arange(steps) == steps - 1)[:, None],
            own.SEEN: seen[:, None],
            "timestamp": (np.arange(steps) / self.robot.control_hz).astype(np.float32)[:, None],
            "frame_index": np.arange(steps)[:, None],
            "episode_index": np.full((steps, 1), self._count),
            "index": self._total + np.arange(steps)[:, None],
            "task_index": np.full((steps, 1), task),
        }
        row = {
            "episode_index": self._count, "tasks": [episode.instruction], "length": steps,
            "dataset_from_index": self._total, "dataset_to_index": self._total + steps,
            **self._write_rows(columns), **self._write_frames(episode.images, row_of),
            "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0,
        }  # fmt: skip
        stats = {name: of_numbers(values) for name, values in columns.items()}
        for view, name in enumerate(self.robot.views):
            stats[camera_key(name)] = of_frames(episode.images[inside][:, view])
        for name, found in stats.items():
            before = self._stats.get(name)
            self._stats[name] = found if before is None else merged([before, found])
            row |= {f"stats/{name}/{k}": v.tolist() for k, v in found.items()}
        self._own.append(self._count, episode, where)
        self._rows.append(row)
        self._count, self._total = self._count + 1, self._total + steps
        if len(self._rows) >= _GROUP:
            self._write_list()

    def _write_rows(self, columns: dict[str, np.ndarray]) -> dict[str, int]:
        table = pa.table({name: _column(values) for name, values in columns.items()})
        chunk, file = divmod(self._places.setdefault("", 0), CHUNK)
        path = self._draft / DATA_PATH.format(chunk_index=chunk, file_index=file)
        if self._data is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._data = pq.ParquetWriter(path, table.schema)
        self._data.write_table(table)
        if path.stat().st_size > DATA_MB << 20:
            self._data = self._data.close()
            self._places[""] += 1
        return {"data/chunk_index": chunk, "data/file_index": file}

    def _write_frames(self, images: np.ndarray, row_of: np.ndarray) -> dict[str, Any]:
        places, fps = {}, self.robot.control_hz
        for view, name in enumerate(self.robot.views):
            key = camera_key(name)
            chunk, file = divmod(self._places.setdefault(key, 0), CHUNK)
            path = VIDEO_PATH.format(video_key=key, chunk_index=chunk, file_index=file)
            if key not in self._videos:
                self._videos[key] = Encoder(self._draft / path, self._side, fps, self.codec)
            video = self._videos[key]
            begin = video.count / fps
            for rows in np.array_split(row_of, max(1, len(row_of) // 64)):
                video.write(images[rows, view])
            found = {"chunk_index": chunk, "file_index": file, "from_timestamp": begin,
                     "to_timestamp": video.count / fps}  # fmt: skip
            places |= {f"videos/{key}/{k}": v for k, v in found.items()}
            if video.path.exists() and video.path.stat().st_size > VIDEO_MB << 20:
                self._videos.pop(key).close()
                self._places[key] += 1
        return places

    def _write_list(self) -> None:
        table = pa.Table.from_pylist(self._rows)
        if self._list is None:
            path = self._draft / EPISODES_PATH.format(chunk_index=0, file_index=0)
            path.parent.mkdir(parents=True)
            self._list = pq.ParquetWriter(path, table.schema)
        self._list.write_table(table.cast(self._list.schema))
        self._rows = []

    def _features(self) -> dict[str, Any]:
        robot, fps = self.robot, self.robot.control_hz
        height, width = self._side
        info = {"video.fps": fps, "video.height": height, "video.width": width,
                "video.channels": 3, "video.codec": self.codec, "video.pix_fmt": "yuv420p",
                "video.is_depth_map": False, "has_audio": False}  # fmt: skip
        shape, names = [height, width, 3], ["height", "width", "channels"]
        picture = {"dtype": "video", "shape": shape, "names": names, "info": info}

        def column(dtype: str, names: list[str] | None = None) -> dict[str, Any]:
            return {"dtype": dtype, "shape": [len(names or [1])], "names": names}

        grips = ["gripper"] * len(robot.actions("grip"))
        moves = [f"{k}_{i}" for i, k in enumerate(robot.action) if k != "grip"]
        return {
            **{camera_key(view): picture for view in robot.views},
            "observation.state": column("float32", [e.name for e in robot.proprio]),
            "action": column("float32", [*moves, *grips]),
            "next.reward": column("float32"), "next.success": column("bool"),
            "next.done": column("bool"), own.SEEN: column("bool"),
            "timestamp": column("float32"),
            **{k: column("int64") for k in ("frame_index", "episode_index", "index", "task_index")},
        }  # fmt: skip

    def close(self) -> None:
        """Finish every file and give the folder its name. UserError where nothing was written."""
        if not self._count:
            raise UserError(f"{self.folder}: expected at least one episode to write, got none.")
        while self._videos:
            self._videos.popitem()[1].close()
        if self._rows:
            self._write_list()
        for writer in (self._data, self._list, self._own):
            if writer is not None:
                writer.close()
        meta, fps = self._draft / "meta", self.robot.control_hz
        tasks = pa.table({"task_index": pa.array(self._tasks.values(), pa.int64()),
                          "task": pa.array(self._tasks, pa.string())})  # fmt: skip
        pq.write_table(tasks.replace_schema_metadata(_PANDAS), meta / "tasks.parquet")
        stats = {k: {n: v.tolist() for n, v in found.items()} for k, found in self._stats.items()}
        info = {
            "codebase_version": "v3.0", "robot_type": self.robot.name,
            "total_episodes": self._count, "total_frames": self._total,
            "total_tasks": len(self._tasks), "chunks_size": CHUNK,
            "data_files_size_in_mb": DATA_MB, "video_files_size_in_mb": VIDEO_MB,
            "fps": int(fps) if fps == int(fps) else fps, "splits": {"train": f"0:{self._count}"},
            "data_path": DATA_PATH, "video_path": VIDEO_PATH, "features": self._features(),
        }  # fmt: skip
        for name, content in (("stats.json", stats), ("info.json", info)):
            (meta / name).write_text(json.dumps(content, indent=1, ensure_ascii=False), "utf-8")
        self._draft.chmod(0o755)
        os.replace(self._draft, self.folder)

    def __enter__(self) -> LeRobotWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        except OSError as failed:
            raise write_error(self.folder, failed) from failed
        finally:
            for video in self._videos.values():
                video.abandon()
            for file in (self._data, self._list, self._own):
                if file is not None:
                    file.close()
            shutil.rmtree(self._draft, ignore_errors=True)


def _column(values: np.ndarray) -> pa.Array:
    """[T, D] as a list of D numbers a row, [T, 1] as one."""
    flat = pa.array(values.reshape(-1))
    wide = values.shape[1]
    return flat if wide == 1 else pa.FixedSizeListArray.from_arrays(flat, wide)


_PANDAS = {  # pandas takes `task` for the table's index
    "pandas": json.dumps(
        {
            "index_columns": ["task"],
            "column_indexes": [],
            "columns": [
                {"name": "task_index", "field_name": "task_index", "pandas_type": "int64",
                 "numpy_type": "int64", "metadata": None},
                {"name": "task", "field_name": "task", "pandas_type": "unicode",
                 "numpy_type": "object", "metadata": None},
            ],
            "creator": {"library": "pyarrow", "version": pa.__version__},
            "pandas_version": "2.3.3",
        }
    )
}  # fmt: skip
