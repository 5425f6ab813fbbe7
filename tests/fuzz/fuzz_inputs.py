"""Random damage to everything that is read from disk: nothing but a UserError may come of it.

    python tests/fuzz/fuzz_inputs.py 50000 [first mutation] [kind]

A mutation is determined by its number, so a failure is repeated by naming it. Kinds: config,
checkpoint, hdf5, log, record, outcomes, "wan config", "wan weights", "lerobot info", "lerobot
list", "lerobot table", "lerobot own", "lerobot video". pytest runs two thousand (test_fuzz.py).
"""

from __future__ import annotations

import faulthandler
import json
import random
import shutil
import struct
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

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
ODD = (
    *(None, True, False, 0, 1, -1, 2, 7, 1.5, -0.0, 1e308, float("nan"), float("inf"), 10**12),
    *(2**63, 10**400, "", "1", "é", "\ud800", "x\0y", "x" * 5000, [], {}, [1], [[]], [None]),
    *({"a": 1}, "libero_spatial", "policy", "before", [8, 8], [0.5] * 3),
)
WAN = ("config.json", "diffusion_pytorch_model.safetensors")
TINY = {"num_attention_heads": 1, "attention_head_dim": 12, "num_layers": 1, "ffn_dim": 8}
SHAPES = ((), (0,), (1,), (6,), (6, 7), (6, 3), (6, 2), (6, 16, 16, 3), (7, 8, 8, 4))
KINDS = (
    *("bool", "i1", "u1", "i8", "u8", "f2", "f4", "f8", "c8", "S3"),
    *("text", "object", "empty", "pair", "nan", "huge"),
)
Damage = Callable[[random.Random, Path], None]


@dataclass(frozen=True)
class Target:
    """A file: how to damage a whole one where it lies, and who reads it."""

    name: str
    whole: bytes
    damage: tuple[Damage, ...]
    read: Callable[[Path], Any]


# ------------------------------------------------------------------ bytes and JSON


def damage_bytes(rng: random.Random, path: Path) -> None:
    """Flip, cut, repeat, insert or blank."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        at = rng.randrange(len(data) + 1)
        span = rng.choice((1, 1, 4, 8, 100))
        kind = rng.randrange(6)
        if kind == 0:
            data[at : at + span] = rng.randbytes(len(data[at : at + span]))
        elif kind == 1 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[at : at + span] = b""
        elif kind == 3:
            data[at:at] = rng.choice((rng.randbytes(span), b"\xff" * span, b"[" * 3000, b"\n"))
        elif kind == 4:
            data[at : at + span] = rng.choice((b"\0", b"\xff")) * len(data[at : at + span])
        elif rng.random() < 0.2:
            del data[at:]
    path.write_bytes(data)


def damaged_json(rng: random.Random, value: Any) -> Any:
    """The value with one place in it replaced, removed, renamed or added to."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.randrange(8)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return {**value, rng.choice(("", key[:-1], key + "x", "\ud800")): rng.choice(ODD)}
        return {**value, key: damaged_json(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], damaged_json(rng, value[at]), *value[at + rng.randrange(2) :]]
    return rng.choice((*ODD, [value], [value, value], str(value), {"a": value}))


def json_bytes(rng: random.Random, value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def damage_json(rng: random.Random, path: Path) -> None:
    """Damage the value that a file holds."""
    value = json.loads(path.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 5))):
        value = damaged_json(rng, value)
    path.write_bytes(json_bytes(rng, value))


def damage_lines(rng: random.Random, path: Path) -> None:
    """Damage one line of JSON."""
    lines = path.read_bytes().split(b"\n")
    at = rng.randrange(len(lines) - 1)
    lines[at] = json_bytes(rng, damaged_json(rng, json.loads(lines[at])))
    path.write_bytes(b"\n".join(lines))


# ------------------------------------------------------------------ safetensors


def damage_header(rng: random.Random, path: Path) -> None:
    """Damage a safetensors header or, more often, the facts that worldenv keeps in it."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, content = json.loads(data[8 : 8 + length]), data[8 + length :]
    if "worldenv" in header["__metadata__"] and rng.random() < 0.8:
        facts = damaged_json(rng, json.loads(header["__metadata__"]["worldenv"]))
        header["__metadata__"]["worldenv"] = json_bytes(rng, facts).decode("utf-8", "surrogatepass")
    else:
        header = damaged_json(rng, header)
    text = json_bytes(rng, header)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)


def damage_weights(rng: random.Random, path: Path) -> None:
    """Not a number among the weights, or bytes of another."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data) // 2, len(data) - 4)
    data[at : at + 4] = rng.choice((struct.pack("<f", float("nan")), rng.randbytes(4)))
    path.write_bytes(data)


# ------------------------------------------------------------------ HDF5


def odd_array(rng: random.Random) -> Any:
    """An array of some type and shape, or something that HDF5 takes for one."""
    shape = rng.choice(SHAPES)
    kind = rng.choice(KINDS)
    if kind == "empty":
        return h5py.Empty(rng.choice(("f4", "S1")))
    if kind == "text":
        return rng.choice(("", "before", "after", "x\u00e9", "[1]", "{}", "null", '{"format": 1}'))
    if kind == "object":
        return np.full(shape, "text", dtype=h5py.string_dtype())
    if kind == "pair":
        return np.zeros(shape, [("a", "f4"), ("b", "i4")])
    if kind in ("nan", "huge"):
        return np.full(shape, np.nan if kind == "nan" else 1e300)
    return (np.arange(np.prod(shape, dtype=int)).reshape(shape) % 3).astype(kind)


def damage_tree(rng: random.Random, path: Path) -> None:
    """Damage groups, datasets, links and attributes of a valid HDF5 file."""
    with h5py.File(path, "r+") as file:
        for _ in range(rng.choice((1, 1, 2, 4))):
            names: list[str] = []
            file.visit(names.append)
            # What HDF5 itself refuses to write no file can hold.
            with suppress(OSError, KeyError, RuntimeError, ValueError):
                _tamper(rng, file, rng.choice(names or ["data"]))


def _tamper(rng: random.Random, file: h5py.File, name: str) -> None:
    kind = rng.randrange(9)
    if name in file and kind < 6:
        del file[name]
    if kind < 3:
        file[name] = odd_array(rng)
    elif kind == 4:
        file.create_group(name)
    elif kind == 5:
        other = rng.choice(("/gone", "/", "/data", "/data/demo_0"))
        file[name] = rng.choice((h5py.SoftLink(other), h5py.ExternalLink("no.h5", other)))
    elif kind == 6:
        file[f"{name}_{rng.randrange(9)}"] = odd_array(rng)
    elif kind > 6 and name in file:
        _damage_attributes(rng, file[name])


def _damage_attributes(rng: random.Random, node: Any) -> None:
    known = [*node.attrs, "observations", "worldenv", "num_samples", "problem_info"]
    name = rng.choice(known)
    if name in node.attrs and rng.random() < 0.3:
        del node.attrs[name]
    elif name in node.attrs and isinstance(node.attrs[name], str) and rng.random() < 0.6:
        try:
            value = damaged_json(rng, json.loads(node.attrs[name]))
        except ValueError:  # a plain word
            value = rng.choice(("before", "after", "", "Before"))
        text = value if isinstance(value, str) else json.dumps(value)
        node.attrs[name] = text.encode("utf-8", "replace").decode().replace("\0", "")
    else:
        node.attrs[name] = odd_array(rng)


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


def damage_table(rng: random.Random, path: Path) -> None:
    """Other values, another type or another length in a column of a Parquet file."""
    table = pq.read_table(path)
    at = rng.randrange(table.num_columns)
    name, rows = table.column_names[at], table.column(at).to_pylist()
    kind = rng.randrange(5)
    if kind == 0:
        table = table.drop_columns([name])
    elif kind == 1:
        table = table.slice(rng.randrange(3), rng.randrange(30))
    else:
        k = rng.randrange(len(rows))
        odd = rng.choice((None, -1, 2**40, "x", 0.5, [], [1.0] * 9, {"bytes": b"x"}, b"y", True))
        rows = [odd if kind == 2 or j == k else row for j, row in enumerate(rows)]
        with suppress(pa.ArrowException, ValueError, TypeError, OverflowError):
            table = table.set_column(at, name, pa.array(rows))
    pq.write_table(table, path)


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
