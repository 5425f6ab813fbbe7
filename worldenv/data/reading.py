"""Reading demonstration files: finding them, opening them, one Episode after the other.

A file is read with its parts (`episodes.py` says what they are); an episode found in both places
counts once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import h5py

from worldenv.data.conventions import CONVENTIONS, IMAGES, OURS, Conventions, measure
from worldenv.data.disk import FramesFile, kept
from worldenv.data.episode import Episode, without_noops
from worldenv.data.libero_hdf5 import LIBERO, file_defaults, own_facts, read_demo
from worldenv.data.libero_layout import CAMERAS, array_shape, contents, readable, subgroup
from worldenv.runtime.errors import UserError, unknown

SUFFIXES = (".hdf5", ".h5")  # in any case


def read_episodes(
    path: Path | str,
    image_size: int | None = None,
    *,
    observations: str | None = None,
    images: str | None = None,
    drop_noops: bool = False,
    suite: str | None = None,
    task: int | None = None,
    limit: int | None = None,
) -> list[Episode]:
    """Episodes of a LIBERO file, or of every HDF5 file under a folder, in numeric order (demo_10
    after demo_9).

    Ours, LIBERO's official files and openvla's regenerated ones are read alike. image_size:
    area-average the images to this many pixels. observations ("before" or "after" each action) and
    images ("raw", "upright", "flipped", "mirrored"): for foreign files whose convention cannot be
    measured (conventions.py says how it is). drop_noops: leave out empty actions. suite, task: for
    foreign files whose name is not one of the benchmark's. limit: episodes per file. Official files
    give F = T frames at steps 0..T-1 of their own, less the first action where observations were
    taken after it. Raises UserError naming file, demonstration and field for anything unreadable.
    """
    path = Path(path)
    files = data_files(path)
    if not files:
        raise UserError(
            f"{path}: expected a .hdf5 file or a folder that holds some, got "
            f"{'none in the folder' if path.is_dir() else 'no such file'}. "
            "Check the path, or collect data with worldenv-collect."
        )
    given = {k: v for k, v in (("suite", suite), ("task", task)) if v is not None}
    episodes: list[Episode] = []
    for file in files:
        conventions = conventions_of(file, observations, images)
        episodes.extend(islice(iterate(file, conventions, image_size, given), limit))
    return [without_noops(e) for e in episodes] if drop_noops else episodes


def each_episode(path: Path) -> Iterator[Episode]:
    """Our episodes in a folder that may not be there, one after the other."""
    for file in data_files(path):
        yield from iterate(file, conventions_of(file))


def on_disk(path: Path, image_size: int) -> list[Episode]:
    """Our episodes in a folder, whose frames stay where they lie and are read when they are indexed
    (`data.disk`). UserError if any are not ours, or of another size."""
    found = (e for file in data_files(path) for e in iterate(file, OURS, image_size, on_disk=True))
    return kept(found, path)


def turned_in(demo: h5py.Group, where: str) -> bool:
    """Whether a demonstration's pictures lie as LIBERO's do. UserError for one that is not ours."""
    facts = own_facts(demo, where)
    if facts is None:
        raise UserError(
            f"{where}: expected an episode of ours, got a foreign one. Its frames cannot stay on "
            "the disk: copy it with worldenv-train --data, or hold them in memory (--data.memory)."
        )
    return facts["benchmark"] == LIBERO


def conventions_of(
    file: Path, observations: str | None = None, images: str | None = None
) -> Conventions:
    """How a file's foreign demonstrations are to be read; OURS where it holds none."""
    if observations not in (None, *CONVENTIONS):
        raise UserError(f"observations: expected 'before', 'after' or None, got {observations!r}.")
    if images not in (None, *IMAGES):
        raise unknown("way images lie", str(images), IMAGES)
    if not file.exists():
        return OURS
    with open_file(file) as handle:
        data = handle["data"]
        demos = [(f"{file}: {n}", subgroup(data, n, str(file))) for n in demo_names(data)]
        with readable(str(file)):
            foreign = [(where, demo) for where, demo in demos if "worldenv" not in demo.attrs]
            stated = any("observations" in demo.attrs for _, demo in foreign)
        if not foreign:
            return OURS
        return measure(foreign, observations or ("before" if stated else None), images)


def iterate(
    file: Path,
    conventions: Conventions,
    image_size: int | None = None,
    given: dict[str, Any] | None = None,
    on_disk: bool = False,
) -> Iterator[Episode]:
    """Episodes of one file and its parts, in order; given: facts that replace the file's own.
    on_disk: of ours, leave the pictures where they lie."""
    seen: set[str] = set()
    for part in places_of(file):
        frames: FramesFile | None = None
        with open_file(part) as handle:
            data = handle["data"]
            facts = {**defaults_of(data, file), **(given or {})}
            for name in demo_names(data):
                where = f"{part}: {name}"
                demo = subgroup(data, name, str(part))
                known = identity(demo)
                if known is not None and known in seen:
                    continue
                seen.add(known or "")
                if on_disk and frames is None:
                    frames = FramesFile(part, turned_in(demo, where))
                yield read_demo(
                    demo,
                    where,
                    conventions=conventions,
                    image_size=image_size,
                    defaults=facts,
                    frames=frames,
                )


def defaults_of(data: h5py.Group, file: Path) -> dict[str, Any]:
    """What a file's name and attributes say about its foreign demonstrations."""
    stem = file.name[: -len(file.suffix)] if file.suffix else file.name
    return file_defaults(data, str(file), stem.removesuffix("_demo"), file.parent.name)


@dataclass(frozen=True)
class FileFacts:
    """What a file is seen to hold without reading its demonstrations; side: of images, pixels."""

    benchmark: str
    suite: str
    task: int
    demos: int
    side: int


def look_into(file: Path) -> FileFacts:
    """The task of a file (by its first demonstration, if ours) and how much it holds."""
    places = places_of(file)
    with open_file(places[0]) as handle:
        data = handle["data"]
        names = demo_names(data)
        where = f"{places[0]}: {names[0]}"
        demo = subgroup(data, names[0], str(places[0]))
        facts = own_facts(demo, where) or defaults_of(data, file)
        obs = subgroup(demo, "obs", where)
        benchmark = facts.get("benchmark", LIBERO)
        if benchmark == LIBERO:
            shape = array_shape(obs, CAMERAS[0], f"{where}/obs", "obs/agentview_rgb")
        else:
            shape = array_shape(obs, "images", f"{where}/obs", "other/images")
    count = len(names) + len(places) - 1
    return FileFacts(benchmark, facts["suite"], facts["task"], count, shape[-2])


def lengths(file: Path) -> list[int]:
    """How many actions each demonstration of a file and its parts has; nothing else is read."""
    found = []
    for place in places_of(file):
        with open_file(place) as handle:
            data = handle["data"]
            for name in demo_names(data):
                where = f"{place}: {name}"
                found.append(array_shape(subgroup(data, name, str(place)), "actions", where)[0])
    return found


def open_file(file: Path) -> h5py.File:
    """The file opened for reading, sure to hold a group `data` with demonstrations."""
    try:
        handle = h5py.File(file, "r", locking=False)
    except OSError as error:
        size = file.stat().st_size if file.exists() else 0
        raise UserError(
            f"{file}: expected a complete HDF5 file, got {size} bytes that HDF5 "
            f"refuses ({error}). It is truncated or of another format: copy or download it again."
        ) from error
    with readable(str(file)):
        data = handle.get("data")
    if not isinstance(data, h5py.Group):
        content = contents(handle, str(file))[:12]
        handle.close()
        raise UserError(
            f"{file}: expected a group `data` of demonstrations, got {content}. "
            "This is not a LIBERO file: convert it to data/demo_i/{actions, dones, obs}."
        )
    return handle


def demo_names(data: h5py.Group) -> list[str]:
    """Names of the demonstrations in numeric order; other members (robomimic's `mask`) are none."""
    names = contents(data, data.file.filename)
    numbered = [(int(m[1]), m[0]) for m in (re.fullmatch(r"demo_(\d{1,9})", n) for n in names) if m]
    if not numbered:
        raise UserError(
            f"{data.file.filename}: expected demonstrations named demo_0, demo_1, ..., got "
            f"{names[:8]}. Rename the groups, or record the data again."
        )
    return [name for _, name in sorted(numbered)]


def identity(demo: h5py.Group) -> str | None:
    """The identity of an episode we wrote; None for others, and where the record is unreadable."""
    try:
        found = json.loads(demo.attrs.get("worldenv", "null") or "null")["id"]
    except (ValueError, TypeError, KeyError, OSError, RecursionError):
        return None  # read_demo says what is wrong with it
    return found if isinstance(found, str) else None


def parts_folder(path: Path) -> Path:
    """Where episodes of `path` lie until they are merged into it."""
    return path.with_name(path.name + ".parts")


def parts_of(path: Path) -> list[Path]:
    """Finished parts in the order they were written."""
    return sorted(parts_folder(path).glob("episode-*-*.hdf5"))


def places_of(file: Path) -> list[Path]:
    """A file, if it is there, and its parts."""
    return ([file] if file.exists() else []) + parts_of(file)


def bytes_of(path: Path) -> int:
    """What the episodes under a folder take on the disk: ours hold frames uncompressed."""
    return sum(f.stat().st_size for file in data_files(path) for f in places_of(file))


def data_files(path: Path) -> list[Path]:
    """Files to read: `path` itself, or those under it, each once and links followed; one with parts
    only counts under its final name. UserError naming links to nothing.
    """
    if path.is_symlink() and not path.exists():
        raise _dangling([path])
    if not path.is_dir():
        return [path] if path.exists() or parts_of(path) else []
    files: dict[str, Path] = {}
    dangling: list[Path] = []
    visited: set[str] = set()

    def refused(error: OSError) -> None:
        raise UserError(f"{path}: expected folders that can be listed, got {error}.") from error

    for place, folders, names in os.walk(path, followlinks=True, onerror=refused):
        here, real = Path(place), os.path.realpath(place)
        folders.sort()
        if real in visited or here.suffix == ".parts":
            folders.clear()
            if here.suffix == ".parts" and any(here.glob("episode-*-*.hdf5")):
                files.setdefault(real.removesuffix(".parts"), here.with_suffix(""))
            continue
        visited.add(real)
        for file in (here / name for name in sorted(names) if not name.startswith(".")):
            wanted = file.suffix.lower() in SUFFIXES
            if file.is_symlink() and not file.exists() and (wanted or not file.suffix):
                dangling.append(file)
            elif wanted:
                files.setdefault(os.path.realpath(file), file)
    if dangling:
        raise _dangling(dangling)
    return sorted(files.values())


def _dangling(links: list[Path]) -> UserError:
    shown = ", ".join(f"{link} -> {os.readlink(link)}" for link in sorted(links)[:3])
    more = f" and {len(links) - 3} more" if len(links) > 3 else ""
    return UserError(
        f"expected links to files or folders, got {len(links)} to nothing: {shown}{more}. "
        "Restore what they point to, or remove them."
    )
