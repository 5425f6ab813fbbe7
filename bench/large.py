"""Frames on the disk beside frames in memory: windows drawn a second, memory by the number of
episodes, and the plan of 100,000. Writes results/bench/large-<machine>.json.

    python -m bench.large RUN    draws from a run folder: its demonstrations and first exploration

Three samplers of the same windows take turns, and give the same batches: all frames in one tensor
that is indexed (as it was before frames could be on the disk), in one tensor whose rows are copied,
and on the disk; by processor time, so that neighbours do not count. Memory is that of a process of
its own which opens episodes, cuts windows for imitation and for the simulator and draws from both:
anonymous bytes (RssAnon: without the pages of files, which are the system's to drop), when it has
done so, and at most. Its episodes are files of 1,000, one of them linked under ten names. The
planned data set is metadata alone: its videos and tables are there and empty, for a plan opens
none.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import h5py
import numpy as np
import torch

from bench.__main__ import RESULTS, machine_file, origin
from bench.lerobot import MANY, cameras, many
from worldenv.data import windows as cut
from worldenv.data.episode import Episode
from worldenv.data.episodes import read_episodes
from worldenv.data.libero_hdf5 import count_file, write_demo, write_file_facts
from worldenv.data.libero_tasks import SUITES, instruction_of
from worldenv.data.reading import on_disk
from worldenv.data.windows import ActionWindows, FrameWindows, chunk_sequences
from worldenv.runtime import parallel
from worldenv.runtime.seeds import generator
from worldenv.stages.run import open_run, write_json
from worldenv.stages.training import Batches

DEVICE_MS = 10
BATCHES, EPISODES, STEPS, SIZE, FILE = 400, (100, 1000, 10_000), 80, 64, 1000


def sampled(run: Path) -> dict[str, object]:
    """Windows a second of the three samplers, on a run's demonstrations and first exploration."""
    config = open_run(run).config
    size, chunk = config.env.image_size, config.env.chunk
    folders = [run / "data" / name for name in ("demonstrations", "explore-0")]
    held = [e for folder in folders for e in read_episodes(folder, size)]
    there = [e for folder in folders for e in on_disk(folder, size)]
    found: dict[str, object] = {"run": run.name, "episodes": len(held)}
    makes: dict[str, tuple[int, Callable]] = {
        "simulator": (
            config.simulator.batch // parallel.SHARDS,
            lambda e: FrameWindows(
                chunk_sequences(e, chunk), config.simulator.frames + 1, padded=False
            ),
        ),
        "imitation": (config.sft.batch // parallel.SHARDS, lambda e: ActionWindows(e, chunk)),
    }
    for name, (batch, make) in makes.items():
        memory, disk = make(held), make(there)
        seconds: dict[str, list[float]] = {"indexed": [], "memory": [], "disk": []}
        for k in range(BATCHES):
            first, *others = [
                timed(seconds[way], windows, way, k, batch)
                for way, windows in (("indexed", memory), ("memory", memory), ("disk", disk))
            ]
            for other in others:
                assert all(torch.equal(first[key], other[key]) for key in first), "other batches"
        ratios = {
            f"{way}_over_indexed": round(
                statistics.median(a / b for a, b in zip(seconds["indexed"], own, strict=True)), 2
            )
            for way, own in seconds.items()
            if way != "indexed"
        }
        rates = {
            f"{way}_windows_per_s": round(batch / statistics.median(s))
            for way, s in seconds.items()
        }
        found[name] = {"windows": len(memory), "batch": batch, **rates, **ratios}
        found[name] |= {"device_ms": DEVICE_MS, **ahead(disk, batch)}
    return found


def timed(seconds: list[float], windows: object, way: str, k: int, batch: int) -> dict:
    """A batch; how long it took joins seconds."""
    taken = (lambda table, index: table[index]) if way == "indexed" else cut.taken
    with mock.patch.object(cut, "taken", taken):
        g = generator("batch", k)
        began = time.thread_time()
        drawn = windows.sample(g, batch)
        seconds.append(time.thread_time() - began)
    return drawn


def ahead(windows: FrameWindows | ActionWindows, batch: int) -> dict[str, float]:
    """Milliseconds a step whose device is at work for DEVICE_MS while this thread waits for it:
    with a reader that is a step ahead, and if a batch is drawn when the device is done."""
    steps = 20
    found: dict[str, list[float]] = {"step_ahead_ms": [], "drawn_in_turn_ms": []}
    for k in range(6):
        batches = Batches(windows, batch, steps, "ahead", k)
        batches(0, 0)
        for name, draw in (("step_ahead_ms", batches), ("drawn_in_turn_ms", batches._draw)):
            for step in range(1, steps):
                began = time.perf_counter()
                draw(step, 0)
                time.sleep(DEVICE_MS / 1000)
                found[name].append(1000 * (time.perf_counter() - began))
    return {name: round(statistics.median(own), 2) for name, own in found.items()}


# ---------------------------------------------------------------- memory


def write(path: Path, count: int) -> None:
    """So many demonstrations of noise, in a file as our writer leaves it."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2 * STEPS, 2, SIZE, SIZE, 3), np.uint8)
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        for k in range(count):
            episode = Episode(
                suite="libero_spatial", task=8, instruction="pick up the bowl", start=None, seed=k,
                source="demonstration",
                actions=rng.uniform(-1, 1, (STEPS, 7)).astype(np.float32),
                dones=np.eye(STEPS, dtype=bool)[-1],
                frame_steps=np.arange(STEPS + 1),
                images=pictures[k % STEPS :][: STEPS + 1],
                proprio=rng.normal(0, 0.02, (STEPS + 1, 8)).astype(np.float32),
                success=True,
                meta={"mark": "0" * 32},
            )  # fmt: skip
            if not k:
                write_file_facts(data, episode)
            write_demo(data.create_group(f"demo_{k}"), episode, f"{k:032d}")
        count_file(data, [f"demo_{k}" for k in range(count)])


def anonymous() -> int:
    """Bytes of this process that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def draw_from(folder: Path) -> None:
    """Open a folder, cut windows, draw from them; prints what that took, in MiB."""
    torch.set_num_threads(1)
    before, most, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], anonymous())

    threading.Thread(target=watch, daemon=True).start()
    episodes = on_disk(folder, SIZE)
    opened = anonymous()
    sequences = chunk_sequences(episodes)
    weights = [1.0 + k % 3 for k in range(len(sequences))]
    for windows in (ActionWindows(episodes), FrameWindows(sequences, 9, weights, padded=False)):
        for k in range(20):
            windows.sample(generator(k), 16)
    done.set()
    found = {"begun": before, "opened": opened, "drawn": anonymous(), "most": most[0]}
    print(json.dumps({k: round(v / 2**20, 1) for k, v in found.items()}))


def memory(folder: Path) -> dict[str, object]:
    """MiB by the number of episodes."""
    found: dict[str, object] = {"steps": STEPS, "pixels": SIZE, "anonymous_mib": {}}
    for count in EPISODES:
        first = folder / str(count) / "0" / "t_demo.hdf5"
        if count > FILE:
            whole = folder / str(FILE) / "0" / "t_demo.hdf5"
            for k in range(count // FILE):
                link = folder / str(count) / str(k) / "t_demo.hdf5"
                link.parent.mkdir(parents=True)
                os.link(whole, link)
        else:
            write(first, count)
        command = [sys.executable, "-m", "bench.large", "--draw-from", str(folder / str(count))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        took = json.loads(said.splitlines()[-1])
        took["frames"] = round(count * (STEPS + 1) * 2 * SIZE * SIZE * 3 / 2**20)
        found["anonymous_mib"][str(count)] = took
        print(count, took, flush=True)
    return found


def planned(folder: Path) -> dict[str, object]:
    """The plan of MANY episodes: how long it takes, and what it says."""
    folder.mkdir()
    many(folder, "v3.0", tuple(instruction_of(name) for name in SUITES["libero_spatial"]))
    for path in ("data", *(f"videos/{c}" for c in cameras())):
        ending = "parquet" if path == "data" else "mp4"
        file = folder / path / "chunk-000" / f"file-000.{ending}"
        file.parent.mkdir(parents=True)
        file.touch()
    tasks = [str(k) for k in range(10)]
    command = [sys.executable, "-c", "from worldenv.cli import train; train()", "--plan",
               "--data", str(folder), "--env.tasks", *tasks, "--device", "cpu",
               "--run-dir", str(folder / "run")]  # fmt: skip
    began = time.perf_counter()
    out = subprocess.run(command, capture_output=True, text=True)
    assert "Disk:" in out.stdout, out.stderr
    said = " ".join(out.stdout[out.stdout.index("Disk:") :].split())
    return {"episodes": MANY, "seconds": round(time.perf_counter() - began, 1), "said": said}


def main() -> None:
    """Measures, prints and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--draw-from", type=Path, help="(what the measured process does)")
    parser.add_argument("--folder", type=Path, help="for the episodes (default: a temporary one)")
    arguments = parser.parse_args()
    if arguments.draw_from:
        draw_from(arguments.draw_from)
        return
    parallel.use_threads(1)
    found = {**origin("bench.large"), "sampled": sampled(arguments.run)}
    print(found["sampled"], flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        found["planned"] = planned(Path(name) / "many")
        print(found["planned"], flush=True)
        found["memory"] = memory(Path(name))
    write_json(RESULTS / f"large-{machine_file()}", found)


if __name__ == "__main__":
    main()
