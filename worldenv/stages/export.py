"""Recorded and imagined episodes as a LeRobotDataset v3.0, for other programs."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from worldenv.data.embodiment import Embodiment
from worldenv.data.episode import Episode, without_noops
from worldenv.data.reading import iterate, look_into
from worldenv.envs.benchmark import begun, find
from worldenv.runtime import progress
from worldenv.runtime.errors import UserError
from worldenv.sources import DataConfig, EnvConfig
from worldenv.stages import demonstrations, store


def export(part: DataConfig, to: Path, codec: str = "av1", image_size: int | None = None) -> str:
    """Write what `part` names to the folder `to`; returns a line about it. UserError for what
    cannot be read.

    codec: of `data.lerobot.writer.CODECS`. image_size: average pictures to this many pixels.
    """
    from worldenv.data.lerobot.writer import LeRobotWriter  # pyarrow takes a while

    found = sources(part, image_size)
    count: Counter[str] = Counter()
    with ExitStack() as stack:
        bar = stack.enter_context(progress.bar(sum(n for n, _ in found), "episodes"))
        writer = None
        for episode in _chosen(found, part):
            if writer is None:
                writer = LeRobotWriter(to, _robot(episode), codec)
                stack.enter_context(writer)
            writer.append(episode)
            count.update(episodes=1, successes=episode.success, rows=len(episode))
            bar.advance()
    return (
        f"{to}: LeRobotDataset v3.0 of {count['episodes']} episodes "
        f"({count['successes']} succeeded), {count['rows']} rows"
    )


def _robot(episode: Episode) -> Embodiment:
    """Of the benchmark that an episode is of, seen as it was recorded."""
    env = begun(EnvConfig(), episode.benchmark)
    size, views = episode.images.shape[2], episode.images.shape[1]
    return find(episode.benchmark).embodiment(replace(env, image_size=size, views=views))


Source = tuple[int, Iterator[Episode]]


def _chosen(found: list[Source], part: DataConfig) -> Iterator[Episode]:
    """So many of each task, without idle actions where those are not wanted."""
    taken: Counter[tuple[str, int, str]] = Counter()
    for _, episodes in found:
        for episode in episodes:
            key = episode.suite, episode.task, episode.instruction
            if part.episodes is None or taken[key] < part.episodes:
                taken[key] += 1
                yield without_noops(episode) if part.no_ops == "drop" else episode


def sources(part: DataConfig, image_size: int | None) -> list[Source]:
    """HDF5 files and LeRobotDatasets in the order they are named: how many episodes each has, and
    these. What is said of each is printed.
    """
    found: list[Source] = []
    if not part.paths:
        raise UserError("--data: expected files or folders to read, got none. Name some.")
    for path in (store.locate("data", named) for named in part.paths):
        files, folders = demonstrations.lying_in(path)
        found += [_of_file(file, part, image_size) for file in files]
        found += [_of_dataset(folder, part, image_size) for folder in folders]
    return found


def _of_file(file: Path, part: DataConfig, image_size: int | None) -> Source:
    how = demonstrations.conventions(file, part)
    print(f"data: {file}: {how}")
    return look_into(file).demos, iterate(file, how, image_size)


def _of_dataset(folder: Path, part: DataConfig, image_size: int | None) -> Source:
    from worldenv.data.lerobot.layout import open_dataset
    from worldenv.data.lerobot.reader import Reader

    dataset = open_dataset(folder)
    side = next((dataset.features[key].shape[0] for key in dataset.cameras), 1)
    env = EnvConfig(image_size=image_size or side)
    reader = Reader(dataset, find(env.benchmark).recorded(env), part)
    print(f"data: {folder}: {'; '.join([reader.how, *reader.notes])}")
    return len(dataset), reader.read(image_size)


@contextmanager
def kept(
    folder: Path | None, robot: Embodiment
) -> Iterator[Callable[[Episode, np.ndarray], None] | None]:
    """Something to give episodes and their rewards to, which makes `folder` of them; nothing
    without a folder.
    """
    if folder is None:
        yield None
        return
    from worldenv.data.lerobot.writer import LeRobotWriter

    with LeRobotWriter(folder, robot) as writer:
        yield writer.append
