"""LeRobotDataset folders as others write them, of the robot of `official_files`; and damage."""

import io
import json
import shutil
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from official_files import moments
from PIL import Image
from scipy.spatial.transform import Rotation

CAMERAS = ("observation.images.image", "observation.images.wrist_image")
TEXTS = ("turn on the stove", "Put the bowl on the stove")  # libero_goal 7 and 1
PLACES = {"chunk_index": 0, "file_index": 0}


def encode(path: Path, frames: np.ndarray, fps: float) -> None:
    """A video as ffmpeg's AV1 encoder makes it with LeRobot's settings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    command = [
        *(imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", "-f", "rawvideo", "-pix_fmt"),
        *("rgb24", "-s", size, "-r", str(fps), "-i", "-", "-c:v", "libsvtav1", "-preset", "10"),
        *("-crf", "30", "-g", "2", "-pix_fmt", "yuv420p", str(path)),
    ]
    subprocess.run(command, input=frames.tobytes(), check=True, capture_output=True)


def robot_rows(seed: int, steps: int, size: int) -> dict[str, np.ndarray]:
    """One demonstration's actions [T, 7], state [T, 8] and upright pictures of both cameras, all
    before each action."""
    seen = moments(steps, size, seed)
    turn, commanded = Rotation.from_rotvec([2.2, -2.1, 0.3]), seen["actions"][:, 3:6]
    turns = [turn]
    for asked in commanded[:-1]:  # the hand turns as it is told
        turn = Rotation.from_rotvec(0.5 * asked) * turn
        turns.append(turn)
    state = [
        seen["ee_pos"][:-1],
        np.stack([t.as_rotvec() for t in turns]),
        seen["gripper_states"][:-1],
    ]
    return {
        "action": seen["actions"].astype(np.float32),
        "observation.state": np.concatenate(state, 1).astype(np.float32),
        CAMERAS[0]: seen["agentview_rgb"][:-1, ::-1, ::-1],
        CAMERAS[1]: seen["eye_in_hand_rgb"][:-1, ::-1, ::-1],
    }


def column(values: np.ndarray) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def png(frame: np.ndarray) -> dict:
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(frame)).save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


def write_lerobot(
    folder: Path,
    version: str = "v2.1",
    *,
    lengths: tuple[int, ...] = (40, 36, 44),
    texts: tuple[str, ...] = TEXTS,
    fps: float = 10,
    size: int = 32,
    gripper: str = "raw",
    images: bool = False,
    turned: int = 1,
    names: dict[str, str] | None = None,
    extra: dict | None = None,
) -> list[dict[str, np.ndarray]]:
    """A folder of the version; returns its episodes as they were put in (raw gripper, upright).

    gripper: "raw" -1 open, +1 closed, or "unit" 1 open, 0 closed. images: PNG in the tables, not
    video. turned: the step along rows and columns of stored pictures. names: other keys. extra:
    columns beside, by their values [rows of the episode]."""
    episodes = [robot_rows(k, n, size) for k, n in enumerate(lengths)]
    keys = {key: (names or {}).get(key, key) for key in (*CAMERAS, "action", "observation.state")}
    tables, stats, first = [], [], 0
    for k, (rows, n) in enumerate(zip(episodes, lengths, strict=True)):
        numbers = {keys[key]: rows[key].copy() for key in ("action", "observation.state")}
        if gripper == "unit":
            numbers[keys["action"]][:, 6] = (1 - rows["action"][:, 6]) / 2
        stats.append({name: _stats(values) for name, values in numbers.items()})
        numbers |= {
            "timestamp": (np.arange(n) / fps).astype(np.float32),
            "frame_index": np.arange(n),
            "episode_index": np.full(n, k),
            "index": first + np.arange(n),
            "task_index": np.full(n, k % len(texts)),
            **{name: make(n) for name, make in (extra or {}).items()},
        }
        columns = {name: column(values) for name, values in numbers.items()}
        if images:
            for camera in CAMERAS:
                pictures = [png(frame) for frame in rows[camera][:, ::turned, ::turned]]
                columns[keys[camera]] = pa.array(pictures)
        tables.append(pa.table(columns))
        first += n
    kind = "image" if images else "video"
    features = {keys[c]: {"dtype": kind, "shape": [size, size, 3]} for c in CAMERAS}
    for name, values in numbers.items():
        features[name] = {"dtype": str(values.dtype), "shape": [*values.shape[1:]] or [1]}
    info = {
        "codebase_version": version,
        "robot_type": "panda",
        "total_episodes": len(lengths),
        "total_frames": first,
        "total_tasks": len(texts),
        "chunks_size": 2,
        "fps": fps,
        "features": features,
    }
    write = _old if version < "v3" else _new
    write(folder, info, tables, stats, [texts[k % len(texts)] for k in range(len(lengths))])
    if not images:
        _videos(folder, info, episodes, keys, turned)
    return episodes


def _stats(values: np.ndarray) -> dict:
    return {name: getattr(values, name)(0).tolist() for name in ("min", "max", "mean")}


def _json(path: Path, *rows: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")


def _old(folder: Path, info: dict, tables: list, stats: list, said: list[str]) -> None:
    at, file = "chunk-{episode_chunk:03d}", "episode_{episode_index:06d}"
    info["data_path"] = f"data/{at}/{file}.parquet"
    info["video_path"] = f"videos/{at}/{{video_key}}/{file}.mp4"
    _json(folder / "meta/info.json", info)
    known = list(dict.fromkeys(said))
    _json(folder / "meta/tasks.jsonl", *({"task_index": k, "task": t} for k, t in enumerate(known)))
    own = [{"episode_index": k, "stats": found} for k, found in enumerate(stats)]
    if info["codebase_version"] == "v2.1":
        _json(folder / "meta/episodes_stats.jsonl", *own)
    lines = [
        {"episode_index": k, "tasks": [said[k]], "length": len(table)}
        for k, table in enumerate(tables)
    ]
    _json(folder / "meta/episodes.jsonl", *lines)
    for k, table in enumerate(tables):
        path = folder / info["data_path"].format(episode_chunk=k // 2, episode_index=k)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)


def _new(folder: Path, info: dict, tables: list, stats: list, said: list[str]) -> None:
    place = "chunk-{chunk_index:03d}/file-{file_index:03d}"
    info["data_path"] = f"data/{place}.parquet"
    info["video_path"] = f"videos/{{video_key}}/{place}.mp4"
    _json(folder / "meta/info.json", info)
    known = list(dict.fromkeys(said))
    index = pa.table({"task_index": np.arange(len(known)), "__index_level_0__": known})
    pq.write_table(index, folder / "meta/tasks.parquet")
    cameras = [k for k, f in info["features"].items() if f["dtype"] == "video"]
    rows, first = [], 0
    for k, table in enumerate(tables):
        n, fps = len(table), info["fps"]
        spans = {"from_timestamp": first / fps, "to_timestamp": (first + n) / fps}
        row = {
            "episode_index": k,
            "tasks": [said[k]],
            "length": n,
            "dataset_from_index": first,
            "dataset_to_index": first + n,
        }
        row |= {f"data/{name}": value for name, value in PLACES.items()}
        for camera in cameras:
            row |= {f"videos/{camera}/{name}": v for name, v in {**PLACES, **spans}.items()}
        for key, found in stats[k].items():
            row |= {f"stats/{key}/{name}": value for name, value in found.items()}
        rows.append(row)
        first += n
    for path in ("meta/episodes", "data"):
        (folder / path / "chunk-000").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "meta/episodes/chunk-000/file-000.parquet")
    # One row group for all: converted sets have such.
    pq.write_table(pa.concat_tables(tables), folder / "data/chunk-000/file-000.parquet")


def _videos(folder: Path, info: dict, episodes: list, keys: dict, turned: int) -> None:
    for camera in CAMERAS:
        clips = [rows[camera][:, ::turned, ::turned] for rows in episodes]
        if info["codebase_version"] >= "v3":
            path = info["video_path"].format(video_key=keys[camera], **PLACES)
            encode(folder / path, np.ascontiguousarray(np.concatenate(clips)), info["fps"])
            continue
        for k, clip in enumerate(clips):
            path = info["video_path"].format(
                video_key=keys[camera], episode_chunk=k // 2, episode_index=k
            )
            encode(folder / path, np.ascontiguousarray(clip), info["fps"])


def edit_info(folder: Path, **changes: object) -> None:
    """Other values in info.json."""
    path = folder / "meta/info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_column(path: Path, name: str, change) -> None:
    """A column of a Parquet file replaced by `change(its values)`."""
    table = pq.read_table(path)
    values = pa.array(change(table[name].to_pylist()), table.schema.field(name).type)
    pq.write_table(table.set_column(table.column_names.index(name), name, values), path)


def copied(folder: Path, to: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(folder, to))
