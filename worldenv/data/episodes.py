"""Episodes on disk: an append-safe writer and a reader of LIBERO's HDF5 files.

HDF5 cannot be trusted when its writer is killed, so an open HDF5 file is never appended to. Each
finished episode becomes one small complete file in `<name>.hdf5.parts/`, put there by an atomic
rename after fsync. Closing the writer merges the parts into `<name>.hdf5` (a copy beside it, fsync,
atomic rename) and removes them. The reader reads both places, and recognises an episode found in
both by its identity, so a kill at any moment loses at most the episode being written. A writer
opened again carries on.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import uuid
from pathlib import Path

import h5py

from worldenv.data.conventions import OURS
from worldenv.data.episode import (
    Episode,
    area_resize,
    check_episode,
    continuous_axis_angle,
    without_noops,
)
from worldenv.data.libero_hdf5 import LIBERO, count_file, read_demo, write_demo, write_file_facts
from worldenv.data.libero_layout import CAMERAS
from worldenv.data.libero_tasks import SUITES
from worldenv.data.reading import (
    SUFFIXES,
    demo_names,
    identity,
    look_into,
    open_file,
    parts_folder,
    parts_of,
    read_episodes,
)
from worldenv.runtime.errors import UserError

__all__ = [
    "DatasetWriter",
    "Episode",
    "EpisodeWriter",
    "area_resize",
    "continuous_axis_angle",
    "episode_path",
    "read_episodes",
    "without_noops",
]


def episode_path(
    folder: Path | str, suite: str, task: int, instruction: str, benchmark: str = LIBERO
) -> Path:
    """Where LIBERO keeps a task's demonstrations: `<folder>/<suite>/<task>_demo.hdf5`; other
    benchmarks' sentences may not tell tasks apart: their files begin with the number."""
    names = SUITES.get(suite, ()) if benchmark == LIBERO else ()
    stem = re.sub(r"\W+", "_", instruction.strip())
    if benchmark != LIBERO:
        stem = f"{task}_{stem[:60]}"
    elif 0 <= task < len(names):
        stem = names[task]
    return Path(folder) / suite / f"{stem}_demo.hdf5"


class EpisodeWriter:
    """Appends episodes of one task to one `.hdf5` file in LIBERO's layout.

    Use as a context manager. Leaving it normally merges; leaving it by an exception keeps the parts
    as they are (they are read, and merged by the next writer). One writer per file at a time; but
    what is not `alone` only adds parts, which the one that is merges.
    """

    def __init__(self, path: Path | str, alone: bool = True) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() not in SUFFIXES:
            raise UserError(
                f"{self.path}: expected a file name ending in .hdf5, got {self.path.name!r}. "
                "Name a file, or use DatasetWriter for a folder of tasks."
            )
        self._parts = parts_folder(self.path)
        self._parts.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self._parts / "lock", self.path) if alone else None
        self._task: tuple[str, str, int] | None = None
        self._next = 1 + max((int(p.stem.split("-")[1]) for p in parts_of(self.path)), default=-1)
        for file in (self.path, *parts_of(self.path)[-1:]):
            if self._task is None and file.exists():
                facts = look_into(file)
                self._task = (facts.benchmark, facts.suite, facts.task)

    def append(self, episode: Episode) -> None:
        """Store one finished episode durably; it is readable from the moment this returns."""
        own = uuid.uuid4().hex
        check_episode(episode, f"{self.path}: new episode {self._next}")
        if episode.benchmark == LIBERO and episode.images.shape[1] != len(CAMERAS):
            raise UserError(
                f"{self.path}: images: expected {len(CAMERAS)} views, got "
                f"{episode.images.shape[1]}. LIBERO's layout has agentview and eye_in_hand."
            )
        task = (episode.benchmark, episode.suite, int(episode.task))
        if self._task not in (None, task):
            raise UserError(
                f"{self.path}: expected episodes of task {self._task}, got {task}. LIBERO keeps "
                "one file per task: use DatasetWriter(folder)."
            )
        self._task = task
        name = f"episode-{self._next:06d}-{own[:8]}.hdf5"
        with h5py.File(name, "w", driver="core", backing_store=False) as memory:
            data = memory.create_group("data")
            write_file_facts(data, episode)
            write_demo(data.create_group("demo_0"), episode, own)
            count_file(data, ["demo_0"])
            where = f"{self.path}: new episode {self._next}"
            # Nothing is stored that would not be read again.
            read_demo(data["demo_0"], where, conventions=OURS, image_size=None, defaults={})
            memory.flush()
            image = memory.id.get_file_image()
        _write_durably(self._parts / name, image)
        self._next += 1

    def close(self, merge: bool = True) -> None:
        """Merge the parts into the file and let go of it. Calling it twice does no harm."""
        if self._lock is None:
            return
        try:
            if merge:
                _merge(self.path)
                if not parts_of(self.path):
                    shutil.rmtree(self._parts, ignore_errors=True)
        finally:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> EpisodeWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(merge=kind is None)


class DatasetWriter:
    """Appends episodes of any tasks to `<folder>/<suite>/<task>_demo.hdf5`, one EpisodeWriter for
    each.
    """

    def __init__(self, folder: Path | str, alone: bool = True) -> None:
        self.folder, self.alone = Path(folder), alone
        self._writers: dict[Path, EpisodeWriter] = {}

    def append(self, episode: Episode) -> None:
        """Store one finished episode durably in its task's file."""
        of = (episode.suite, episode.task, episode.instruction, episode.benchmark)
        path = episode_path(self.folder, *of)
        self.open(path)
        self._writers[path].append(episode)

    @property
    def files(self) -> list[Path]:
        """Those that it has open."""
        return [*self._writers]

    def open(self, *paths: Path) -> None:
        """Have files open: what others added to them is merged too, when they are closed."""
        for path in paths:
            if path not in self._writers:
                self._writers[path] = EpisodeWriter(path, self.alone)

    def close(self, merge: bool = True) -> None:
        """Close every file."""
        while self._writers:
            self._writers.popitem()[1].close(merge)

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(merge=kind is None)


def _merge(path: Path) -> None:
    """Move all parts into `path`; a kill at any moment leaves every episode in one of the two
    places.
    """
    parts = parts_of(path)
    if not parts:
        return
    # Inside the parts folder, so that a copy left by a kill is never taken for data.
    copy = parts_folder(path) / "merging.tmp"
    try:
        if path.exists():
            shutil.copyfile(path, copy)
        else:
            copy.unlink(missing_ok=True)
        with h5py.File(copy, "a", locking=False) as target:
            data = target.require_group("data")
            demos = demo_names(data) if any(name.startswith("demo_") for name in data) else []
            seen = {identity(data[name]) for name in demos}
            number = 1 + max((int(name.split("_")[1]) for name in demos), default=-1)
            for part in parts:
                with open_file(part) as source:
                    for name, value in source["data"].attrs.items():
                        if name not in data.attrs:
                            data.attrs[name] = value
                    demo = source["data/demo_0"]
                    if identity(demo) not in seen:
                        source.copy(demo, data, name=f"demo_{number}")
                        number += 1
            count_file(data, demo_names(data))
        _sync(copy)
        os.replace(copy, path)
        _sync(path.parent)
    except OSError as error:
        raise _disk_error(error, path) from error
    for part in parts:
        part.unlink()


def _write_durably(path: Path, content: bytes) -> None:
    """Write a file that is either absent or complete, whatever happens."""
    draft = path.with_suffix(".tmp")
    try:
        with open(draft, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        _sync(path.parent)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise _disk_error(error, path) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_error(error: OSError, path: Path) -> UserError:
    if error.errno == errno.ENOSPC or "No space left" in str(error):
        return UserError(
            f"{path}: expected room on the disk, got none. Episodes already finished are safe: "
            "free some space and run the same command again."
        )
    return UserError(f"{path}: expected to write the file, got {error}. Check its folder's rights.")


def _lock(file: Path, path: Path) -> int:
    """Hold an advisory lock, released by the system when this process ends in whatever way."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise UserError(
            f"{path}: expected to be its only writer, got another one at work on it. "
            "Wait for it to end, or write to another file."
        ) from error
    return descriptor
