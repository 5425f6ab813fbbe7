"""Demonstrations from files, in place of scripted ones: LIBERO's, openvla's regenerated, our own,
LeRobotDatasets.

An HDF5 file belongs to one task, found by its name, else by what it says of itself; a data set may
hold many, found by their text. What trains is copied into the run folder in our layout at the run's
image size, so that a run stands by itself. Demonstrations that failed are left out. Instructions
are the benchmark's own (task files say some of them in other words than the environment does).
"""

import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from worldenv.config import Config
from worldenv.data.conventions import Conventions
from worldenv.data.episode import Episode, without_noops
from worldenv.data.episodes import DatasetWriter
from worldenv.data.lerobot.find import datasets_of
from worldenv.data.reading import (
    bytes_of,
    conventions_of,
    data_files,
    each_episode,
    iterate,
    lengths,
    look_into,
    parts_of,
)
from worldenv.runtime import progress
from worldenv.runtime.device import GIB
from worldenv.runtime.errors import UserError
from worldenv.sources import DataConfig
from worldenv.stages.reality import benchmark
from worldenv.stages.run import Run

if TYPE_CHECKING:  # imported where a data set is met: pyarrow takes a while
    from worldenv.stages.recorded import Part


def require_expert(config: Config) -> None:
    """UserError, naming the flag that helps, for a suite that cannot be demonstrated by script."""
    found, suite = benchmark(config), config.env.suite
    if not found.demonstrates(suite):
        able = [name for name in found.suites if found.demonstrates(name)]
        solves = f"solves {' and '.join(able)} only" if able else "is missing"
        raise UserError(
            f"{suite}: expected demonstration files, got none: the scripted expert of {found.name} "
            f"{solves}. Name files or folders (worldenv-train --data PATH), such as LIBERO's own "
            "<suite>/<task>_demo.hdf5."
        )


def check(config: Config) -> None:
    """What a whole run needs and a later stage would miss: demonstrations of every task, assets."""
    if config.data.paths:
        survey(config)
    else:
        require_expert(config)
    used = benchmark(config).check(config.env)
    if used:
        print(f"assets: {used}", flush=True)


def identity(config: Config) -> tuple:
    """What the stage's result depends on: which files (by name, size and time) and how they are
    read.
    """
    part = config.data
    files = [f for path in part.paths for f in data_files(Path(path))]
    stats = [(f.name, f.stat()) for file in files for f in (file, *parts_of(file)) if f.exists()]
    listed = [(name, s.st_size, s.st_mtime_ns) for name, s in stats]
    known = (listed, part.episodes, part.no_ops, part.observations, part.images)
    folders = [folder for path in part.paths for folder in datasets_of(path)]
    if not folders:
        return known
    for folder in folders:
        inside = [(str(p.relative_to(folder)), p.stat()) for p in sorted(folder.rglob("*.*"))]
        listed += [(name, s.st_size, s.st_mtime_ns) for name, s in inside]
    given = (part.cameras, part.state, part.action, part.gripper, part.rotation, part.rate)
    return (*known, *given)


@dataclass
class _Group:
    """Files of one folder that are alike, for the line that is said of them."""

    files: int = 0
    tasks: set[int] = field(default_factory=set)
    taken: int = 0
    failed: int = 0
    actions: int = 0
    dropped: int = 0
    notes: list[str] = field(default_factory=list)

    def line(self, folder: Path, how: str, config: Config) -> str:
        """What was found and done."""
        source = f"from {self.files} file(s), {how}" if self.files else how
        text = f"data: {folder}: {self.taken} demonstrations of {len(self.tasks)} task(s) {source}"
        if self.failed:
            text += f"; {self.failed} failed, left out"
        if config.data.no_ops == "drop":
            text += f"; {self.dropped} of {self.actions} actions were no-ops, dropped"
        return "; ".join([text, *self.notes])


def _demonstrations(place: "Path | Part") -> int:
    return look_into(place).demos if isinstance(place, Path) else len(place)


def lying_in(path: Path) -> tuple[list[Path], list[Path]]:
    """HDF5 files and LeRobotDatasets that `path` is or holds. UserError where there is neither."""
    files, folders = data_files(path), datasets_of(path)
    if not files and not folders:
        raise UserError(
            f"--data {path}: expected a .hdf5 file, a LeRobotDataset (meta/info.json) or a folder "
            f"that holds some, got {'none in the folder' if path.is_dir() else 'no such file'}. "
            "Check the path."
        )
    return files, folders


def conventions(file: Path, part: DataConfig) -> Conventions:
    """How a file is to be read: as given, or detected."""
    said = {"observations": part.observations, "images": part.images}
    return conventions_of(file, **{k: v for k, v in said.items() if v != "detect"})


def survey(config: Config) -> "dict[int, list[Path | Part]]":
    """The files of each of the run's tasks, and the episodes of data sets. UserError naming tasks
    that have none.
    """
    suite, wanted = config.env.suite, config.env.tasks
    own = benchmark(config)
    found: dict[tuple[str, int], list[Path | Part]] = defaultdict(list)
    unknown: list[str] = []
    for path in map(Path, config.data.paths):
        files, folders = lying_in(path)
        for file in files:
            facts = look_into(file)
            of = facts.suite if facts.benchmark == own.name else f"{facts.benchmark} {facts.suite}"
            if file not in found[of, facts.task]:
                found[of, facts.task].append(file)
        for folder in folders:
            from worldenv.stages.recorded import parts_of_folder

            parts, others = parts_of_folder(folder, config)
            unknown += others
            for key, part in parts.items():
                found[key].append(part)
    missing = [task for task in wanted if (suite, task) not in found]
    if missing:
        names = ", ".join(f"{task} ({own.suites[suite][task]})" for task in missing[:3])
        names += f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        have = [
            f"{len(files)} of {other if task < 0 else f'{other} task {task}'}"
            for (other, task), files in sorted(found.items())
        ]
        have += [f"episodes that say {text!r:.80}" for text in unknown]
        raise UserError(
            f"--data: expected demonstrations of every task of the run, got none of {suite} task "
            f"{names}. Found files: {', '.join(have[:12])}. Files are told by their names "
            "(<task>_demo.hdf5), `bddl_file_name` or `problem_info`, episodes of a LeRobotDataset "
            "by their task's text; name more files, or choose --env.suite and --env.tasks."
        )
    return {task: found[suite, task] for task in wanted}


def extent(config: Config, found: "dict[int, list[Path | Part]]") -> dict[int, tuple[int, int]]:
    """Episodes and frames of each task that `survey` found, failures among them, and with --data
    .episodes the first ones'; by metadata alone."""
    sizes = {}
    for task, places in found.items():
        each = [n for place in places for n in _lengths(place)][: config.data.episodes]
        sizes[task] = len(each), sum(each) + len(each)
    return sizes


def _lengths(place: "Path | Part") -> list[int]:
    if isinstance(place, Path):
        return lengths(place)
    return place.source.dataset.length[place.source.places[place.key]].tolist()


def frame_bytes(config: Config) -> int:
    """What a recorded frame takes, of all cameras that are recorded."""
    robot = benchmark(config).recorded(config.env)
    return robot.V * config.env.image_size**2 * 3


def room(folder: Path, sizes: list[int]) -> tuple[int, int]:
    """Bytes that files of these sizes need in a folder, what it holds of them being there already
    (one that is put together is there twice), and those that are free."""
    needed = sum(sizes) + max(sizes, default=0) - (bytes_of(folder) if folder.exists() else 0)
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return max(needed, 0), shutil.disk_usage(there).free


def _check_room(config: Config, folder: Path, found: "dict[int, list[Path | Part]]") -> None:
    """UserError where the disk has no room for copies of what was found."""
    sizes = extent(config, found)
    each = frame_bytes(config)
    needed, free = room(folder, [frames * each for _, frames in sizes.values()])
    if needed > free:
        raise UserError(
            f"{folder}: expected {needed / GIB:.1f} GiB of room for "
            f"{sum(n for n, _ in sizes.values())} demonstrations (frames lie there uncompressed, "
            f"and a task's file twice while it is put together), got {free / GIB:.1f}. Free some, "
            "choose a run_dir on a larger disk, fewer demonstrations (--data.episodes) or smaller "
            "pictures (--env.image-size)."
        )


def from_files(run: Run, mark: str) -> dict:
    """Stage `demonstrations` with --data: copies them into data/demonstrations."""
    config = run.config
    folder = run.path("data", "demonstrations")
    files = survey(config)
    _check_room(config, folder, files)
    done = _copied(folder, mark)
    groups: dict[tuple[Path, str], _Group] = defaultdict(_Group)
    counts = Counter(episodes=0, successes=0, steps=0)
    limit = config.data.episodes
    total = sum(min(sum(map(_demonstrations, own)), limit or 10**9) for own in files.values())
    with DatasetWriter(folder) as writer, progress.bar(total, "demonstrations") as bar:
        for task, own in files.items():
            before = counts["episodes"]
            for k, episode in enumerate(islice(_of_task(config, task, own, groups), limit)):
                if k >= done[task]:  # an interrupted copy goes on
                    episode.meta["mark"] = mark
                    writer.append(episode)
                counts.update(episodes=1, successes=1, steps=len(episode))
                bar.advance()
            if counts["episodes"] == before:
                raise UserError(
                    f"--data: expected demonstrations of {config.env.suite} task {task} that "
                    f"succeed, got none in {', '.join(map(str, own[:3]))}: neither `dones` nor "
                    "`rewards` (next.success) says so. Mark the last action of each as done, or "
                    "name other files."
                )
    for (place, how), group in groups.items():
        print(group.line(place, how, config))
    return dict(counts)


def _copied(folder: Path, mark: str) -> Counter[int]:
    """How many episodes of each task an interrupted copy has left. UserError for other episodes."""
    have, foreign = Counter(), 0
    for e in each_episode(folder):
        have[e.task] += 1
        foreign += e.meta.get("mark") != mark
    if foreign:
        raise UserError(
            f"{folder} holds {foreign} episodes of another configuration. Move them elsewhere, or "
            "choose another run_dir."
        )
    return have


def _of_task(
    config: Config,
    task: int,
    places: "list[Path | Part]",
    groups: dict[tuple[Path, str], _Group],
) -> Iterator[Episode]:
    """Successful demonstrations of a task at the run's size; what is said of them is in groups."""
    part, suite = config.data, config.env.suite
    given = {"suite": suite, "task": task}
    for place in places:
        opened = _of_file if isinstance(place, Path) else _of_dataset
        group, episodes = opened(config, place, groups, given)
        group.tasks.add(task)
        for episode in episodes:
            if not episode.success:
                group.failed += 1
                continue
            group.taken += 1
            group.actions += len(episode)
            if part.no_ops == "drop":
                short = without_noops(episode)
                group.dropped += len(episode) - len(short)
                episode = short
            name = benchmark(config).suites[suite][task]
            yield replace(episode, instruction=name, source="demonstration")


_Opened = tuple[_Group, Iterator[Episode]]


def _of_file(config: Config, file: Path, groups: dict, given: dict) -> _Opened:
    how, size = conventions(file, config.data), config.env.image_size
    group = groups[file.parent, f"{_pixels(look_into(file).side, size)}; {how}"]
    group.files += 1
    return group, iterate(file, how, size, given)


def _of_dataset(config: Config, part: "Part", groups: dict, given: dict) -> _Opened:
    reader, size = part.source.reader, config.env.image_size
    side = reader.dataset.features[reader.reading.cameras[0]].shape[0]
    group = groups[part.source.folder, f"{_pixels(side, size)}; {reader.how}"]
    group.notes = reader.notes
    given = {**given, "benchmark": benchmark(config).name}
    return group, reader.read(size, given, part.source.places[part.key].tolist())


def _pixels(side: int, size: int) -> str:
    return f"{side} px" + (f" averaged to {size}" if side != size else "")
