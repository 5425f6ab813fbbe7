"""`python -m bench.lerobot`: how fast a LeRobotDataset is read, beside the decoder alone.

A v3.0 data set of synthetic robot-like pictures (256 px, two cameras, both codecs) is written, and
read by the reader: frames a second of both cameras, checks of every timestamp included. Beside it
ffmpeg alone on the same two videos at once, one thread each, decoding to RGB and keeping nothing:
the limit. Rounds of the two take turns, the median counts, and what the reader gives is compared
with ffmpeg's bytes first. Then: seconds to open the metadata of 100,000 episodes, v2.1 and v3.0.
Writes results/bench/lerobot-<machine>.json.

    python -m bench.lerobot --episodes 4     fewer episodes of 200 rows, for a try
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.__main__ import RESULTS, machine_file, origin
from worldenv.data.episode import Episode
from worldenv.data.lerobot.layout import DataSet, open_dataset
from worldenv.data.lerobot.reader import Reader
from worldenv.data.lerobot.writer import DATA_PATH, VIDEO_PATH, LeRobotWriter, camera_key
from worldenv.envs.libero.robot import embodiment
from worldenv.stages.run import write_json

SIZE, ROWS, ROUNDS, MANY = 256, 200, 5, 100_000
ROBOT = embodiment(SIZE)
SAID = tuple(f"task {k}" for k in range(40))


def episode(number: int) -> Episode:
    """A square that wanders over a textured table, in both views, with a camera's noise."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[:SIZE, :SIZE]
    table = (np.sin(x / 17) + np.cos(y / 23))[..., None] * [50, 40, 30] + 120
    images = np.empty((ROWS, 2, SIZE, SIZE, 3), np.uint8)
    for t in range(ROWS):
        for view in range(2):
            noise = rng.normal(0, 2, (SIZE, SIZE, 1))
            images[t, view] = (table + noise).clip(0, 255)
            row, column = (100 + 90 * np.array([np.sin(t / 30 + view), np.cos(t / 41)])).astype(int)
            images[t, view, row : row + 40, column : column + 40] = (200, 40, 30)
    return Episode(
        suite="libero_spatial",
        task=8,
        instruction="pick up the bowl",
        start=None,
        seed=number,
        source="demonstration",
        actions=rng.uniform(-1, 1, (ROWS, 7)).astype(np.float32),
        dones=np.eye(ROWS, dtype=bool)[-1],
        frame_steps=np.arange(ROWS),
        images=images,
        proprio=rng.normal(0, 0.02, (ROWS, 8)).astype(np.float32),
        success=True,
    )


def bare(dataset: DataSet, keep: bool = False) -> list[bytes]:
    """ffmpeg on both cameras' videos at once; returns its bytes if they are to be kept."""
    program, started = imageio_ffmpeg.get_ffmpeg_exe(), []
    for camera in dataset.cameras:
        command = [program, "-v", "error", "-nostdin", "-y", "-threads", "1", "-i",
                   str(dataset.video_file(camera, 0)), "-f", "rawvideo", "-pix_fmt", "rgb24",
                   "-" if keep else "/dev/null"]  # fmt: skip
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE))
    return [process.communicate()[0] for process in started]


def read(dataset: DataSet) -> int:
    """Frames that the reader gives, one episode after the other."""
    return sum(e.images.shape[0] * e.images.shape[1] for e in Reader(dataset, ROBOT).read())


def check(dataset: DataSet) -> None:
    """What the reader gives is what ffmpeg decodes, bit for bit."""
    whole = np.stack([np.frombuffer(b, np.uint8) for b in bare(dataset, keep=True)])
    whole = whole.reshape(2, -1, SIZE, SIZE, 3).swapaxes(0, 1)
    place = 0
    for found in Reader(dataset, ROBOT).read():
        assert np.array_equal(found.images, whole[place : place + ROWS]), "other frames"
        place += ROWS
    assert place == len(whole), f"{place} of {len(whole)} frames"


def timed(work, *arguments: object) -> float:
    """Seconds."""
    began = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - began


def speeds(folder: Path, codec: str, episodes: int) -> dict[str, float]:
    """Frames a second of reader and bare decoder, and what writing takes."""
    began = time.perf_counter()
    drawing = 0.0
    with LeRobotWriter(folder, ROBOT, codec) as writer:
        for number in range(episodes):
            start = time.perf_counter()
            new = episode(number)
            drawing += time.perf_counter() - start
            writer.append(new)
    frames = episodes * ROWS * 2
    written = frames / (time.perf_counter() - began - drawing)
    dataset = open_dataset(folder)
    check(dataset)
    rounds = [(timed(bare, dataset), timed(read, dataset)) for _ in range(ROUNDS)]
    alone, ours = (frames / float(np.median(times)) for times in zip(*rounds, strict=True))
    return {
        "reader_frames_per_s": round(ours),
        "bare_decoder_frames_per_s": round(alone),
        "ratio": round(float(np.median([a / b for a, b in rounds])), 3),
        "writer_frames_per_s": round(written),
    }


def many(folder: Path, version: str, said: tuple[str, ...] = SAID) -> None:
    """The metadata alone of MANY episodes of 150 rows, statistics as LeRobot keeps them; said: what
    there is to do in them, in turn."""
    length, features = 150, {c: {"dtype": "video", "shape": [SIZE, SIZE, 3]} for c in cameras()}
    for name, count in (("observation.state", 8), ("action", 7)):
        features[name] = {"dtype": "float32", "shape": [count]}
    info = {"codebase_version": version, "fps": 20, "chunks_size": 1000, "features": features,
            "total_episodes": MANY, "total_frames": MANY * length,
            "data_path": DATA_PATH, "video_path": VIDEO_PATH}  # fmt: skip
    (folder / "meta/episodes/chunk-000").mkdir(parents=True)
    text = [said[k % len(said)] for k in range(MANY)]
    if version == "v2.1":
        rows = ({"episode_index": k, "tasks": [text[k]], "length": length} for k in range(MANY))
        (folder / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, rows)))
        tasks = ({"task_index": k, "task": text} for k, text in enumerate(said))
        (folder / "meta/tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
        info["data_path"] = "data/{episode_index}.parquet"
        info["video_path"] = "videos/{video_key}/{episode_index}.mp4"
    else:
        index = np.arange(MANY)
        columns = {"episode_index": index, "tasks": pa.array([[t] for t in text]),
                   "length": np.full(MANY, length), "dataset_from_index": index * length,
                   "dataset_to_index": (index + 1) * length}  # fmt: skip
        for place in ("data", *(f"videos/{c}" for c in cameras())):
            columns[f"{place}/chunk_index"] = columns[f"{place}/file_index"] = index * 0
        for camera in cameras():
            columns[f"videos/{camera}/from_timestamp"] = index * length / 20
            columns[f"videos/{camera}/to_timestamp"] = (index + 1) * length / 20
        rng = np.random.default_rng(0)
        for name, feature in features.items():
            wide = 3 if name in cameras() else feature["shape"][0]
            for kind in ("min", "max", "mean", "std", "q01", "q10", "q50", "q90", "q99"):
                flat = pa.array(rng.normal(size=MANY * wide))
                columns[f"stats/{name}/{kind}"] = pa.FixedSizeListArray.from_arrays(flat, wide)
        table = pa.table(columns)
        pq.write_table(table, folder / "meta/episodes/chunk-000/file-000.parquet")
        tasks = pa.table({"task_index": np.arange(len(said)), "task": said})
        pq.write_table(tasks, folder / "meta/tasks.parquet")
    (folder / "meta/info.json").write_text(json.dumps(info))


def cameras() -> list[str]:
    """Keys of the robot's cameras."""
    return [camera_key(view) for view in ROBOT.views]


def opening(folder: Path, version: str) -> float:
    """Seconds to open MANY episodes' metadata, the median of three."""
    many(folder, version)
    assert len(open_dataset(folder)) == MANY
    return round(float(np.median([timed(open_dataset, folder) for _ in range(3)])), 2)


def main() -> None:
    """Measures, prints and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--episodes", type=int, default=16, help="of 200 rows each")
    arguments = parser.parse_args()
    found = {**origin("bench.lerobot"), "pixels": SIZE, "cameras": 2}
    found |= {"episodes": arguments.episodes, "rows": ROWS, "pyarrow": pa.__version__}
    with tempfile.TemporaryDirectory() as name:
        for codec in ("av1", "h264"):
            found[codec] = speeds(Path(name) / codec, codec, arguments.episodes)
            print(codec, found[codec], flush=True)
        for version in ("v2.1", "v3.0"):
            found[f"open_{MANY}_{version}_s"] = opening(Path(name) / version, version)
            print(f"{MANY} episodes of {version}: {found[f'open_{MANY}_{version}_s']} s")
    write_json(RESULTS / f"lerobot-{machine_file()}", found)


if __name__ == "__main__":
    main()
