"""Recorded frames that stay on the disk, where they lie uncompressed in our own files, and are read
as they are drawn; and the little that is kept of each episode beside them.

Reads are `preadv` into memory of the reader's, not a mapping: a file that is cut short or replaced
while somebody trains is an error that names it, and not the end of the process, and what was read
is the system's cache, not this process's memory. Small arrays go to nameless files beside the
frames (columns of windows, what an episode holds beside its frames), mapped: those are nobody
else's to change, and end with the process.
"""

from __future__ import annotations

import os
import sys
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from worldenv.data.episode import Episode
from worldenv.runtime.errors import UserError


class FramesFile:
    """A file that frames are read from: opened once, and held against what it was then.

    turned: whether its pictures lie upside down and mirrored (LIBERO's layout).
    """

    def __init__(self, path: Path, turned: bool = False, file: BinaryIO | None = None) -> None:
        """file: a nameless one, which is still written to."""
        self.path, self.turned = path, turned
        self._file = os.dup(file.fileno()) if file else os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._facts = None if file else self._look()

    def _look(self) -> tuple[int, int]:
        facts = os.fstat(self._file)
        return facts.st_size, facts.st_mtime_ns

    def check(self) -> None:
        """UserError if the file is not what it was."""
        now = self._look()
        self._facts = self._facts or now
        if now != self._facts:
            raise self._changed(f"{now[0]}, changed since")

    def read(self, place: int, out: np.ndarray) -> None:
        """Fill out [bytes] uint8 from a place in the file. UserError if it cannot be read."""
        try:
            got = os.preadv(self._file, (out,), place)
        except OSError as error:
            raise UserError(
                f"{self.path}: expected frames that can be read, got {error}. Check the disk, and "
                "that the folder is still there."
            ) from error
        if got != len(out):
            raise self._changed(f"an end at {place + got}")

    def _changed(self, got: str) -> UserError:
        return UserError(
            f"{self.path}: expected the {self._facts[0]} bytes that were there when it was opened, "
            f"got {got}. Something writes to the run's data while frames are read from it: let it "
            "end, and run the same command again."
        )


@dataclass(frozen=True)
class Frames:
    """Frames [F, V, H, W, 3] uint8 of an episode, in place of an array: read when indexed.

    runs: stretches that lie evenly in the file; of each the number of frames, where the first one's
    views begin, and the bytes from one frame to the next.
    """

    file: FramesFile
    side: int
    runs: tuple[tuple[int, tuple[int, ...], int], ...]
    dtype = np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, ...]:
        """[F, V, H, W, 3]."""
        return (len(self), len(self.runs[0][1]), self.side, self.side, 3)

    @property
    def ndim(self) -> int:
        """Five."""
        return 5

    def __len__(self) -> int:
        return sum(count for count, _, _ in self.runs)

    def then(self, more: Frames) -> Frames:
        """These, and more of the same file after them."""
        return replace(self, runs=self.runs + more.runs)

    def views(self, count: int) -> Frames:
        """The first cameras' alone."""
        return replace(self, runs=tuple((n, first[:count], step) for n, first, step in self.runs))

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Where the views of frames `rows` [N] lie: [N, V]."""
        found = np.empty((len(rows), len(self.runs[0][1])), np.int64)
        begin = 0
        for count, first, step in self.runs:
            own = (rows >= begin) & (rows < begin + count)
            found[own] = np.array(first) + (rows[own, None] - begin) * step
            begin += count
        return found

    def __getitem__(self, key: Any) -> np.ndarray:
        """As of an array; whole frames are read, and then cut."""
        of, *rest = key if isinstance(key, tuple) else (key,)
        rows = np.arange(len(self))[of]
        found = gather([self.file], None, self.places(rows.reshape(-1)), self.side)
        return found.reshape(*rows.shape, *self.shape[1:])[(slice(None),) * rows.ndim + (*rest,)]


@dataclass(frozen=True)
class Rows:
    """Some frames of an episode, unread."""

    frames: Frames
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: slice) -> Rows:
        return Rows(self.frames, self.rows[key])

    def read(self) -> Tensor:
        """[N, V, H, W, 3] uint8."""
        return torch.from_numpy(self.frames[self.rows])


class Unread:
    """A dataclass's field that may be given as `Rows`: they are read whenever it is looked at.
    Elsewhere it is the tensor that was given."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, item: object, owner: type) -> Tensor:
        if item is None:
            raise AttributeError(self.name)  # the field has no default
        held = item.__dict__[self.name]
        return held.read() if isinstance(held, Rows) else held

    def __set__(self, item: object, value: Tensor | Rows) -> None:
        item.__dict__[self.name] = value


def gather(
    files: Sequence[FramesFile], of: np.ndarray | None, places: np.ndarray, side: int
) -> np.ndarray:
    """Frames [N, V, H, W, 3] uint8 from places [N, V] in files[of[N]], or in the only one."""
    flat = places.reshape(-1).tolist()
    found = np.empty((len(flat), 3 * side * side), np.uint8)
    numbers = [0] * len(flat) if of is None else np.repeat(of, places.shape[1]).tolist()
    own = [files[number] for number in numbers]
    for file in set(own):
        file.check()
    for file, place, row in zip(own, flat, found, strict=True):
        file.read(place, row)
    turned = [file.turned for file in own]
    if all(turned):
        found = _half_turn(found)
    elif any(turned):
        rows = np.flatnonzero(turned)
        found[rows] = _half_turn(found[rows])
    return found.reshape(*places.shape, side, side, 3)


def _half_turn(pictures: np.ndarray) -> np.ndarray:
    """Pictures [N, bytes] with their pixels from the last to the first."""
    return torch.from_numpy(pictures).view(len(pictures), -1, 3).flip(1).flatten(1).numpy()


class Column:
    """Rows of one kind, put together part by part: in memory, or in a nameless file in `beside`."""

    def __init__(self, beside: Path | None) -> None:
        self._parts: list[Tensor] = []
        self._file = None if beside is None else spill(beside)

    def add(self, part: Tensor) -> None:
        """[N, ...] more rows."""
        if self._file is None:
            self._parts.append(part)
            return
        if not self._parts:
            self._parts, self._rows = [part[:0].clone()], 0
        _write(self._file, part.contiguous().numpy())
        self._rows += len(part)

    def whole(self) -> Tensor:
        """All rows."""
        if self._file is None:
            return torch.cat(self._parts)
        (like,) = self._parts
        flat = _mapped(self._file)
        return torch.from_numpy(flat).view(like.dtype).view(self._rows, *like.shape[1:])


class Table:
    """Frames of many sequences by one index, in place of a tensor [N, V, H, W, 3] uint8.

    parts: each sequence's, unread or (imagined, or of a folder that is in memory) tensors, which
    are written to a nameless file in `beside`.
    """

    device = torch.device("cpu")

    def __init__(self, parts: Iterable[Tensor | Rows], beside: Path) -> None:
        self._files: list[FramesFile] = []
        number: dict[int, int] = {}
        own, end, places = spill(beside), 0, Column(beside)
        rest = FramesFile(beside / "(nameless)", file=own)
        for part in parts:
            if isinstance(part, Rows):
                file, side, at = part.frames.file, part.frames.side, part.frames.places(part.rows)
            else:
                file, side, each = rest, part.shape[2], part[0, 0].numel()
                at = end + each * np.arange(part[..., 0, 0, 0].numel()).reshape(part.shape[:2])
                end += part.numel()
                _write(own, part.contiguous().numpy())
            if id(file) not in number:
                number[id(file)] = len(self._files)
                self._files.append(file)
            self._side = side
            places.add(torch.from_numpy(np.insert(at, 0, number[id(file)], axis=1)))
        _finish(own)
        self._places = places.whole().numpy()  # [N, 1 + V]: file, places in it

    def read(self, index: Tensor) -> Tensor:
        """Frames `[..., V, H, W, 3]` by index `[...]`, on the CPU."""
        rows = self._places[index.reshape(-1).numpy()]
        of = rows[:, 0] if len(self._files) > 1 else None
        found = torch.from_numpy(gather(self._files, of, rows[:, 1:], self._side))
        return found.view(*index.shape, *found.shape[1:])


def spill(beside: Path) -> BinaryIO:
    """A nameless file in a folder, which ends with the process."""
    try:
        return tempfile.TemporaryFile(dir=beside)
    except OSError as error:
        raise UserError(
            f"{beside}: expected to write beside the frames that are read from there, got {error}. "
            "Check the folder's rights, or hold frames in memory (--data.memory GIB)."
        ) from error


def _write(file: BinaryIO, values: np.ndarray) -> int:
    """Append an array; returns where it begins."""
    place = file.tell()
    try:
        file.write(np.ascontiguousarray(values).view(np.uint8).data if values.size else b"")
    except OSError as error:
        raise _full(error) from error
    return place


def _finish(file: BinaryIO) -> None:
    """Let go of a file that somebody else has open."""
    try:
        file.close()
    except OSError as error:
        raise _full(error) from error


def _full(error: OSError) -> UserError:
    return UserError(
        "expected room on the run's disk for what is kept beside recorded frames (about a "
        f"hundredth of what they take), got {error}. Free some, and run the same command again."
    )


def _mapped(file: BinaryIO) -> np.ndarray:
    """All bytes of a nameless file, which is written to no more."""
    size = file.tell()
    try:
        file.flush()
    except OSError as error:
        raise _full(error) from error
    # Writable, so that torch does not warn; nobody writes.
    flat = np.memmap(file, np.uint8, "r+", shape=(size,)) if size else np.empty(0, np.uint8)
    _finish(file)
    return flat


def kept(episodes: Iterable[Episode], beside: Path) -> list[Episode]:
    """Episodes whose arrays lie in a nameless file; of each some 2 KB stay in memory."""
    file, found, notes = spill(beside), [], []

    def put(values: np.ndarray) -> tuple[int, np.dtype, tuple[int, ...]]:
        _write(file, np.zeros(-file.tell() % 8, np.uint8))  # aligned
        return _write(file, values), values.dtype, values.shape

    for episode in episodes:
        names = ("actions", "dones", "frame_steps", "proprio")
        extras = {sys.intern(name): put(values) for name, values in episode.extras.items()}
        notes.append(({name: put(getattr(episode, name)) for name in names}, extras))
        texts = ("suite", "instruction", "source", "benchmark")
        short = {name: sys.intern(getattr(episode, name)) for name in texts}
        empty = dict.fromkeys(names, np.empty(0))
        found.append(replace(episode, **short, **empty, extras={}))
    flat = np.asarray(_mapped(file))

    def take(place: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        size = int(np.prod(shape)) * dtype.itemsize
        return flat[place : place + size].view(dtype).reshape(shape)

    for episode, (arrays, extras) in zip(found, notes, strict=True):
        for name, note in arrays.items():
            setattr(episode, name, take(*note))
        episode.extras = {name: take(*note) for name, note in extras.items()}
    return found
