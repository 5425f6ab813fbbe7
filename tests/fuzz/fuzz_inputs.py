"""Random damage to everything that is read from disk: nothing but a UserError may come of it.

    python tests/fuzz/fuzz_inputs.py 50000 [first mutation] [kind]

A mutation is determined by its number, so a failure is repeated by naming it. Kinds: config,
checkpoint, hdf5, log, record, outcomes, "wan config", "wan weights", "lerobot info", "lerobot
list", "lerobot table", "lerobot own", "lerobot video". pytest runs a thousand, with
WORLDENV_SLOW=1 two and a half thousand (test_fuzz.py).
"""

from __future__ import annotations

import faulthandler
import json
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from damage import (
    Damage,
    damage_bytes,
    damage_header,
    damage_json,
    damage_lines,
    damage_table,
    damage_tree,
    damage_weights,
)
from lerobot_files import CAMERAS, write_lerobot

from worldenv.config import Config, EnvConfig, PolicyConfig, load
from worldenv.data.episodes import Episode, EpisodeWriter, read_episodes
from worldenv.data.lerobot import own
from worldenv.data.lerobot.layout import open_dataset
from worldenv.data.lerobot.reader import Reader
from worldenv.envs.libero.robot import embodiment
from worldenv.fields import to_dict
from worldenv.layouts import wan as published
from worldenv.models import wan_folder
from worldenv.runtime.errors import UserError
from worldenv.runtime.logging import read_metrics
from worldenv.stages import evaluate, store
from worldenv.stages.run import Run

SMALL = replace(
    Config(env=EnvConfig(image_size=16)),
    simulator=replace(Config().simulator, patch=8),
    policy=PolicyConfig(width=8, layers=1, heads=1, encoder_channels=8),
)
WAN = ("config.json", "diffusion_pytorch_model.safetensors")
TINY = {"num_attention_heads": 1, "attention_head_dim": 12, "num_layers": 1, "ffn_dim": 8}


@dataclass(frozen=True)
class Target:
    """A file: how to damage a whole one where it lies, and who reads it."""

    name: str
    whole: bytes
    damage: tuple[Damage, ...]
    read: Callable[[Path], Any]


def poses(rng: np.random.Generator, count: int) -> np.ndarray:
    """Proprio [count, 8] of a hand over a table that looks down."""
    where = rng.uniform(-0.3, 0.3, (count, 3))
    return np.c_[where, [[np.pi, 0, 0]] * count, [[0.03, -0.03]] * count].astype(np.float32)


def own_episodes(path: Path) -> None:
    """Two episodes as worldenv writes them, one of sparse frames."""
    with EpisodeWriter(path) as writer:
        for every in (1, 4):
            writer.append(recorded(8, every, 16))


def recorded(count: int, every: int, size: int) -> Episode:
    """An episode of `count` actions, with a frame before every so many and one at the end."""
    steps = np.array([*range(0, count, every), count])
    rng = np.random.default_rng(every)
    return Episode(
        suite="libero_spatial",
        task=8,
        instruction="pick up the bowl",
        start=3,
        seed=every,
        source="policy",
        actions=rng.uniform(-1, 1, (count, 7)).astype(np.float32),
        dones=np.eye(count, dtype=bool)[-1],
        frame_steps=steps,
        images=rng.integers(0, 256, (len(steps), 2, size, size, 3), dtype=np.uint8),
        proprio=poses(rng, len(steps)),
        success=True,
    )


def official_episodes(path: Path) -> None:
    """Two demonstrations in LIBERO's own layout."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = '{"language_instruction": "do the task"}'
        for number in range(2):
            demo = data.create_group(f"demo_{number}")
            joints = np.cumsum(rng.uniform(-0.5, 0.5, (7, 7)), axis=0)
            demo["actions"] = rng.uniform(-1, 1, (6, 7))
            demo["states"] = np.concatenate([np.arange(6)[:, None], joints[:-1]], 1)
            demo["dones"] = demo["rewards"] = np.eye(6, dtype=np.uint8)[-1]
            demo["robot_states"] = rng.normal(size=(6, 9))
            for camera in ("agentview_rgb", "eye_in_hand_rgb"):
                demo[f"obs/{camera}"] = rng.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
            proprio = poses(rng, 6)
            demo["obs/ee_pos"], demo["obs/ee_ori"] = proprio[:, :3], proprio[:, 3:6]
            demo["obs/ee_states"], demo["obs/gripper_states"] = proprio[:, :6], proprio[:, 6:]
            demo["obs/joint_states"] = joints[1:]


# ------------------------------------------------------------------ what is read


def outcomes_of(path: Path) -> Any:
    """An interrupted evaluation's outcomes, as a stage that goes on reads them."""
    run = Run(replace(SMALL, run_dir=path.parents[1]))
    usual, evaluate.evaluate_policy = evaluate.evaluate_policy, lambda *a, **k: []
    loading, store.load = store.load, lambda *a, **k: None
    try:
        return evaluate.run(run, "m")
    finally:
        evaluate.evaluate_policy, store.load = usual, loading
        run.close()


def record_of(path: Path) -> Any:
    """A stage's record, as the stages after it read it."""
    run = Run(replace(SMALL, run_dir=path.parents[1]))
    try:
        return run.record("sft")
    finally:
        run.close()


def targets(folder: Path) -> list[Target]:
    """Everything that is read from disk, whole, with the ways to damage it."""
    torch.manual_seed(0)
    store.save("policy", store.build("policy", SMALL), folder / "policy.safetensors")
    own_episodes(folder / "own.hdf5")
    official_episodes(folder / "official.hdf5")
    config = json.dumps(to_dict(SMALL)).encode()
    row = b'{"stage": "a", "step": %d, "time": 1.5, "loss": 0.1}\n'
    lines = b"".join(row % step for step in range(4))
    record = b'{"seconds": 3.2, "fingerprint": "abc", "episodes": 4, "artifacts": {"a": "b"}}'
    done = [{"task": 8, "start": s, "seed": 1000, "success": True, "steps": 9} for s in (20, 21)]
    outcomes = json.dumps({"mark": "m", "episodes": done}).encode()
    weights = (folder / "policy.safetensors").read_bytes()
    published.write(folder / "wan", **TINY, dtype=torch.bfloat16)
    wan = {name: (folder / "wan" / name).read_bytes() for name in WAN}
    own, official = ((folder / f"{n}.hdf5").read_bytes() for n in ("own", "official"))
    hdf5 = (damage_bytes, damage_tree, damage_tree, damage_tree)
    text = (damage_bytes, damage_json, damage_json)
    return [
        Target("config", config, text, load),
        Target(
            "checkpoint",
            weights,
            (damage_bytes, damage_header, damage_header, damage_weights),
            lambda p: store.load("policy", p),
        ),
        Target("hdf5", own, hdf5, read_episodes),
        Target("hdf5", official, hdf5, lambda p: read_episodes(p, 8)),
        Target("log", lines, (damage_bytes, damage_lines), lambda p: read_metrics(p.parent)),
        Target("record", record, text, record_of),
        Target("outcomes", outcomes, text, outcomes_of),
        Target("wan config", wan[WAN[0]], text, beside(WAN[1], wan[WAN[1]])),
        Target(
            "wan weights",
            wan[WAN[1]],
            (damage_bytes, damage_header, damage_header, damage_weights),
            beside(WAN[0], wan[WAN[0]]),
        ),
        *lerobot_targets(folder / "lerobot"),
    ]


def lerobot_targets(folder: Path) -> list[Target]:
    """Files of LeRobotDatasets: pictures in tables where the file is no video."""
    options = {"lengths": (12, 14), "size": 8}
    write_lerobot(folder / "old", "v2.1", images=True, **options)
    write_lerobot(folder / "new", "v3.0", images=True, **options)
    write_lerobot(folder / "videos", "v3.0", **options)
    kept = own.Writer(folder / "new")
    for number in range(2):
        kept.append(number, recorded(12 + 2 * number, 1, 8), "whole")
    kept.close()
    text, lines = (damage_bytes, damage_json, damage_json), (damage_bytes, damage_lines)
    table = (damage_bytes, damage_table, damage_table)
    named = {
        "info": ("old", text), "list": ("old", lines), "table": ("new", table),
        "own": ("new", table), "video": ("videos", (damage_bytes,)),
    }  # fmt: skip
    found = []
    for name, (which, damage) in named.items():
        file = PLACES[f"lerobot {name}"].removeprefix("set/")
        whole = (folder / which / file).read_bytes()
        found.append(Target(f"lerobot {name}", whole, damage, within(folder / which, file)))
    return found


def within(whole: Path, file: str) -> Callable[[Path], Any]:
    """Reads a data set whose other files are whole."""

    def read(path: Path) -> Any:
        folder = path.parents[len(Path(file).parts) - 1]
        for other in (p for p in whole.rglob("*") if p.is_file()):
            name = other.relative_to(whole)
            if name != Path(file):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(other, folder / name)
        for stray in [p for p in folder.rglob("*") if p.is_file()]:
            if not (whole / stray.relative_to(folder)).exists():
                stray.unlink()  # another target's
        return list(Reader(open_dataset(folder), embodiment(8)).read())

    return read


def beside(name: str, whole: bytes) -> Callable[[Path], Any]:
    """Reads a published Wan's folder, in which the file `name` is whole."""

    def read(path: Path) -> Any:
        (path.parent / name).write_bytes(whole)
        return wan_folder.load(path.parent, "wan", True, "float32")

    return read


PLACES = {
    "config": "config.json",
    "checkpoint": "policy.safetensors",
    "hdf5": "task_demo.hdf5",
    "log": "metrics.jsonl",
    "record": "stages/sft.json",
    "outcomes": "evaluation/sft.json",
    "lerobot info": "set/meta/info.json",
    "lerobot list": "set/meta/episodes.jsonl",
    "lerobot table": "set/data/chunk-000/file-000.parquet",
    "lerobot own": "set/worldenv/episodes.parquet",
    "lerobot video": f"set/videos/{CAMERAS[0]}/chunk-000/file-000.mp4",
    "wan config": f"wan/{WAN[0]}",
    "wan weights": f"wan/{WAN[1]}",
}


def run_mutation(chosen: list[Target], number: int, folder: Path) -> str:
    """One mutation: where and how it failed, or nothing."""
    rng = random.Random(number)
    target = rng.choice(chosen)
    path = folder / PLACES[target.name]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(target.whole)
    rng.choice(target.damage)(rng, path)
    try:
        target.read(path)
    except UserError:
        pass
    except BaseException as error:  # noqa: BLE001 - any other exception is what is looked for
        place = traceback.extract_tb(error.__traceback__)
        ours = [f for f in place if "worldenv" in f.filename and "fuzz" not in f.filename]
        at = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        return f"{target.name}: {type(error).__name__} at {at}"
    return ""


def fuzz(count: int, first: int = 0, kind: str = "", report: bool = False) -> dict[str, list[int]]:
    """Failures of `count` mutations, and the numbers of those that show each."""
    failures: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = Path(name) / "whole"
        whole.mkdir()
        chosen = [t for t in targets(whole) if kind in ("", t.name)]
        for number in range(first, first + count):
            failure = run_mutation(chosen, number, Path(name) / "damaged")
            if failure:
                failures.setdefault(failure, []).append(number)
            if report and (number - first + 1) % 1000 == 0:
                print(f"{number - first + 1} mutations, {len(failures)} failures", flush=True)
    return failures


def main(count: str = "2000", first: str = "0", kind: str = "") -> int:
    """Print what was found; 1 if anything was."""
    faulthandler.enable()
    failures = fuzz(int(count), int(first), kind, report=True)
    for failure, numbers in sorted(failures.items()):
        print(f"{failure}  [{len(numbers)}x, such as {numbers[0]}]")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
