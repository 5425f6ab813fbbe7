"""What a file can suffer: bytes, JSON, safetensors, HDF5 and Parquet, by a generator's choice."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ODD = (
    *(None, True, False, 0, 1, -1, 2, 7, 1.5, -0.0, 1e308, float("nan"), float("inf"), 10**12),
    *(2**63, 10**400, "", "1", "é", "\ud800", "x\0y", "x" * 5000, [], {}, [1], [[]], [None]),
    *({"a": 1}, "libero_spatial", "policy", "before", [8, 8], [0.5] * 3),
)
SHAPES = ((), (0,), (1,), (6,), (6, 7), (6, 3), (6, 2), (6, 16, 16, 3), (7, 8, 8, 4))
KINDS = (
    *("bool", "i1", "u1", "i8", "u8", "f2", "f4", "f8", "c8", "S3"),
    *("text", "object", "empty", "pair", "nan", "huge"),
)
Damage = Callable[[random.Random, Path], None]


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


# ------------------------------------------------------------------ Parquet


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
