"""Demonstrations from files, in place of scripted ones: LIBERO's, openvla's regenerated, our own.

Each file belongs to one task, found by its name, else by what it says of itself. What trains is
copied into the run folder in our layout at the run's image size, so that a run stands by itself.
Demonstrations that failed are left out. Instructions are the benchmark's own (task files say some
of them in other words than the environment does).
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from worldenv.config import Config
from worldenv.data.episode import Episode, without_noops
from worldenv.data.episodes import DatasetWriter, read_episodes
from worldenv.data.reading import (
    conventions_of,
    data_files,
    iterate,
    look_into,
    parts_of,
)
from worldenv.runtime import progress
from worldenv.runtime.errors import UserError
from worldenv.stages.reality import benchmark
from worldenv.stages.run import Run


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
    return (listed, part.episodes, part.no_ops, part.observations, part.images)


@dataclass
class _Group:
    """Files of one folder that are alike, for the line that is said of them."""

    files: int = 0
    tasks: set[int] = field(default_factory=set)
    taken: int = 0
    failed: int = 0
    actions: int = 0
    dropped: int = 0

    def line(self, folder: Path, how: str, config: Config) -> str:
        """What was found and done."""
        text = (
            f"data: {folder}: {self.taken} demonstrations of {len(self.tasks)} task(s) from "
            f"{self.files} file(s), {how}"
        )
        if self.failed:
            text += f"; {self.failed} failed, left out"
        if config.data.no_ops == "drop":
            text += f"; {self.dropped} of {self.actions} actions were no-ops, dropped"
        return text


def survey(config: Config) -> dict[int, list[Path]]:
    """The files of each of the run's tasks. UserError naming tasks that have none."""
    suite, wanted, own = config.env.suite, config.env.tasks, benchmark(config)
    found: dict[tuple[str, int], list[Path]] = defaultdict(list)
    for path in map(Path, config.data.paths):
        files = data_files(path)
        if not files:
            raise UserError(
                f"--data {path}: expected a .hdf5 file or a folder that holds some, got "
                f"{'none in the folder' if path.is_dir() else 'no such file'}. Check the path."
            )
        for file in files:
            facts = look_into(file)
            of = facts.suite if facts.benchmark == own.name else f"{facts.benchmark} {facts.suite}"
            if file not in found[of, facts.task]:
                found[of, facts.task].append(file)
    missing = [task for task in wanted if (suite, task) not in found]
    if missing:
        names = ", ".join(f"{task} ({own.suites[suite][task]})" for task in missing[:3])
        names += f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        have = [
            f"{len(files)} of {other if task < 0 else f'{other} task {task}'}"
            for (other, task), files in sorted(found.items())
        ]
        raise UserError(
            f"--data: expected demonstrations of every task of the run, got none of {suite} task "
            f"{names}. Found files: {', '.join(have[:12])}. Files are told by their names "
            "(<task>_demo.hdf5), `bddl_file_name` or `problem_info`; name more files, or choose "
            "--env.suite and --env.tasks."
        )
    return {task: found[suite, task] for task in wanted}


def from_files(run: Run, mark: str) -> dict:
    """Stage `demonstrations` with --data: copies them into data/demonstrations."""
    config = run.config
    folder = run.path("data", "demonstrations")
    files = survey(config)
    done = _copied(folder, mark)
    groups: dict[tuple[Path, str], _Group] = defaultdict(_Group)
    counts = Counter(episodes=0, successes=0, steps=0)
    limit = config.data.episodes
    total = sum(min(sum(look_into(f).demos for f in own), limit or 10**9) for own in files.values())
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
                    "`rewards` says so. Mark the last action of each as done, or name other files."
                )
    for (place, how), group in groups.items():
        print(group.line(place, how, config))
    return dict(counts)


def _copied(folder: Path, mark: str) -> Counter[int]:
    """How many episodes of each task an interrupted copy has left. UserError for other episodes."""
    have = read_episodes(folder) if any(folder.rglob("*.hdf5")) else []
    foreign = sum(e.meta.get("mark") != mark for e in have)
    if foreign:
        raise UserError(
            f"{folder} holds {foreign} episodes of another configuration. Move them elsewhere, or "
            "choose another run_dir."
        )
    return Counter(e.task for e in have)


def _of_task(
    config: Config, task: int, files: list[Path], groups: dict[tuple[Path, str], _Group]
) -> Iterator[Episode]:
    """Successful demonstrations of a task at the run's size; what is said of them is in groups."""
    part, suite, size = config.data, config.env.suite, config.env.image_size
    given = {"observations": part.observations, "images": part.images}
    for file in files:
        conventions = conventions_of(file, **{k: v for k, v in given.items() if v != "detect"})
        side = look_into(file).side
        pixels = f"{side} px" + (f" averaged to {size}" if side != size else "")
        group = groups[file.parent, f"{pixels}; {conventions}"]
        group.files += 1
        group.tasks.add(task)
        for episode in iterate(file, conventions, size, {"suite": suite, "task": task}):
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
