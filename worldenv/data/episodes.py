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
import json
import os
import re
import shutil
import uuid
from pathlib import Path
from types import TracebackType

import h5py

from worldenv.data.episode import (
    Episode,
    area_resize,
    check_episode,
    continuous_axis_angle,
    without_noops,
)
from worldenv.data.libero_hdf5 import (
    CAMERAS,
    count_file,
    detect_convention,
    file_defaults,
    read_demo,
    write_demo,
    write_file_facts,
)
from worldenv.data.libero_tasks import SUITES
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


def episode_path(folder: Path | str, suite: str, task: int, instruction: str) -> Path:
    """Where LIBERO keeps a task's demonstrations: `<folder>/<suite>/<task>_demo.hdf5`."""
    names = SUITES.get(suite, ())
    stem = names[task] if 0 <= task < len(names) else re.sub(r"\W+", "_", instruction.strip())
    return Path(folder) / suite / f"{stem}_demo.hdf5"


class EpisodeWriter:
    """Appends episodes of one task to one `.hdf5` file in LIBERO's layout.

    Use as a context manager. Leaving it normally merges; leaving it by an exception keeps the parts
    as they are (they are read, and merged by the next writer). One writer per file at a time.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if self.path.suffix not in (".hdf5", ".h5"):
            raise UserError(
                f"{self.path}: expected a file name ending in .hdf5, got {self.path.name!r}. "
                "Name a file, or use DatasetWriter for a folder of tasks."
            )
        self._parts = _parts_folder(self.path)
        self._parts.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self._parts / "lock", self.path)
        self._task: tuple[str, int] | None = None
        self._next = 1 + max((int(p.stem.split("-")[1]) for p in _parts(self.path)), default=-1)
        for file in (self.path, *_parts(self.path)[-1:]):
            if self._task is None and file.exists():
                self._task = _task_of(file)

    def append(self, episode: Episode) -> None:
        """Store one finished episode durably; it is readable from the moment this returns."""
        identity = uuid.uuid4().hex
        check_episode(episode, f"{self.path}: new episode {self._next}")
        if episode.images.shape[1] > len(CAMERAS):
            raise UserError(
                f"{self.path}: images: expected at most {len(CAMERAS)} views, got "
                f"{episode.images.shape[1]}. LIBERO's layout names agentview and eye_in_hand only."
            )
        task = (episode.suite, int(episode.task))
        if self._task not in (None, task):
            raise UserError(
                f"{self.path}: expected episodes of task {self._task}, got {task}. LIBERO keeps "
                "one file per task: use DatasetWriter(folder)."
            )
        self._task = task
        name = f"episode-{self._next:06d}-{identity[:8]}.hdf5"
        with h5py.File(name, "w", driver="core", backing_store=False) as memory:
            data = memory.create_group("data")
            write_file_facts(data, episode)
            write_demo(data.create_group("demo_0"), episode, identity)
            count_file(data)
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
                if not _parts(self.path):
                    shutil.rmtree(self._parts, ignore_errors=True)
        finally:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> EpisodeWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(merge=kind is None)


class DatasetWriter:
    """Appends episodes of any tasks to `<folder>/<suite>/<task>_demo.hdf5`, one EpisodeWriter for
    each.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._writers: dict[Path, EpisodeWriter] = {}

    def append(self, episode: Episode) -> None:
        """Store one finished episode durably in its task's file."""
        path = episode_path(self.folder, episode.suite, episode.task, episode.instruction)
        if path not in self._writers:
            self._writers[path] = EpisodeWriter(path)
        self._writers[path].append(episode)

    def close(self, merge: bool = True) -> None:
        """Close every file."""
        while self._writers:
            self._writers.popitem()[1].close(merge)

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(merge=kind is None)


def read_episodes(
    path: Path | str,
    image_size: int | None = None,
    *,
    observations: str | None = None,
    drop_noops: bool = False,
    suite: str | None = None,
    task: int | None = None,
    limit: int | None = None,
) -> list[Episode]:
    """Episodes of a LIBERO file, or of every `.hdf5` under a folder, in numeric order (demo_10
    after demo_9).

    Ours, LIBERO's official files and openvla's regenerated ones are read alike. image_size:
    area-average the images to this many pixels. observations: "before" or "after" each action, for
    foreign files whose convention cannot be measured (libero_hdf5.py says how it is). drop_noops:
    leave out empty actions. suite, task: for foreign files whose name is not one of the
    benchmark's. limit: episodes per file. Official files give F = T frames at steps 0..T-1 of their
    own, less the first action where observations were taken after it. Raises UserError naming file,
    demonstration and field for anything unreadable.
    """
    if observations not in (None, "before", "after"):
        raise UserError(f"observations: expected 'before', 'after' or None, got {observations!r}.")
    path = Path(path)
    files = _data_files(path)
    if not files:
        raise UserError(
            f"{path}: expected a .hdf5 file or a folder that holds some, got "
            f"{'none in the folder' if path.is_dir() else 'no such file'}. "
            "Check the path, or collect data with worldenv-collect."
        )
    given = {k: v for k, v in (("suite", suite), ("task", task)) if v is not None}
    episodes: list[Episode] = []
    for file in files:
        seen: set[str] = set()
        count = 0
        for part in ([file] if file.exists() else []) + _parts(file):
            left = None if limit is None else limit - count
            found = _read_file(part, file, image_size, observations, given, left, seen)
            count += len(found)
            episodes.extend(found)
    return [without_noops(e) for e in episodes] if drop_noops else episodes


def _read_file(
    file: Path,
    named: Path,
    image_size: int | None,
    observations: str | None,
    given: dict,
    limit: int | None,
    seen: set[str],
) -> list[Episode]:
    """Episodes of one HDF5 file, leaving out identities in `seen` and adding its own to it."""
    found = []
    with _open(file) as handle:
        data = handle["data"]
        names = _demo_names(data)
        defaults = {
            **file_defaults(data, named.stem.removesuffix("_demo"), named.parent.name),
            **given,
        }
        foreign = [data[name] for name in names if "observations" not in data[name].attrs]
        if foreign and observations is None:
            observations = detect_convention(foreign[:8])
        for name in names:
            if limit is not None and len(found) >= limit:
                break
            identity = _identity(data[name])
            if identity is not None:
                if identity in seen:
                    continue
                seen.add(identity)
            where = f"{file}: {name}"
            try:
                episode = read_demo(
                    data[name],
                    where,
                    observations=observations,
                    image_size=image_size,
                    defaults=defaults,
                )
            except (OSError, KeyError, AttributeError) as error:
                raise UserError(
                    f"{where}: expected LIBERO's layout, got {type(error).__name__}: {error}. "
                    "The file is damaged or foreign: copy, convert or record it again."
                ) from error
            found.append(episode)
    return found


def _open(file: Path) -> h5py.File:
    """The file opened for reading, sure to hold a group `data` with demonstrations."""
    try:
        handle = h5py.File(file, "r", locking=False)
    except OSError as error:
        raise UserError(
            f"{file}: expected a complete HDF5 file, got {file.stat().st_size} bytes that HDF5 "
            f"refuses ({error}). It is truncated or of another format: copy or download it again."
        ) from error
    if "data" not in handle or not isinstance(handle["data"], h5py.Group):
        content = sorted(handle)
        handle.close()
        raise UserError(
            f"{file}: expected a group `data` of demonstrations, got {content}. "
            "This is not a LIBERO file: convert it to data/demo_i/{actions, dones, obs}."
        )
    return handle


def _demo_names(data: h5py.Group) -> list[str]:
    numbered = [(int(m[1]), m[0]) for m in (re.fullmatch(r"demo_(\d+)", k) for k in data) if m]
    if not numbered:
        raise UserError(
            f"{data.file.filename}: expected demonstrations named demo_0, demo_1, ..., got "
            f"{sorted(data)[:8]}. Rename the groups, or record the data again."
        )
    return [name for _, name in sorted(numbered)]


def _identity(demo: h5py.Group) -> str | None:
    """The identity of an episode we wrote; None for others, and where the record is unreadable."""
    try:
        return json.loads(demo.attrs.get("worldenv", "null") or "null")["id"]
    except (ValueError, TypeError, KeyError):
        return None  # read_demo says what is wrong with it


def _task_of(file: Path) -> tuple[str, int]:
    with _open(file) as handle:
        demo = handle["data"][_demo_names(handle["data"])[0]]
        if "worldenv" in demo.attrs:
            facts = json.loads(demo.attrs["worldenv"])
        else:
            facts = file_defaults(handle["data"], file.stem.removesuffix("_demo"), file.parent.name)
        return facts["suite"], facts["task"]


def _parts_folder(path: Path) -> Path:
    return path.with_name(path.name + ".parts")


def _parts(path: Path) -> list[Path]:
    """Finished parts in the order they were written."""
    return sorted(_parts_folder(path).glob("episode-*-*.hdf5"))


def _data_files(path: Path) -> list[Path]:
    """Files to read: `path` itself, or those under it; one with parts only counts under its final
    name.
    """
    if not path.is_dir():
        return [path] if path.exists() or _parts(path) else []
    files = {f for f in path.rglob("*.hdf5") if f.parent.suffix != ".parts"}
    files |= {f.parent.with_suffix("") for f in path.rglob("*.parts/episode-*-*.hdf5")}
    return sorted(files)


def _merge(path: Path) -> None:
    """Move all parts into `path`; a kill at any moment leaves every episode in one of the two
    places.
    """
    parts = _parts(path)
    if not parts:
        return
    # Inside the parts folder, so that a copy left by a kill is never taken for data.
    copy = _parts_folder(path) / "merging.tmp"
    try:
        if path.exists():
            shutil.copyfile(path, copy)
        else:
            copy.unlink(missing_ok=True)
        with h5py.File(copy, "a", locking=False) as target:
            data = target.require_group("data")
            seen = {_identity(data[name]) for name in data}
            number = 1 + max((int(name.split("_")[1]) for name in data), default=-1)
            for part in parts:
                with _open(part) as source:
                    for name, value in source["data"].attrs.items():
                        if name not in data.attrs:
                            data.attrs[name] = value
                    demo = source["data/demo_0"]
                    if _identity(demo) not in seen:
                        source.copy(demo, data, name=f"demo_{number}")
                        number += 1
            count_file(data)
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
