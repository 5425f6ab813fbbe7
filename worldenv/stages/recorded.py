"""Demonstrations from LeRobotDatasets: which of a data set's episodes are of a run's tasks."""

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from worldenv.config import Config
from worldenv.data.lerobot import own
from worldenv.data.lerobot.detect import keys
from worldenv.data.lerobot.layout import open_dataset
from worldenv.data.lerobot.reader import Reader
from worldenv.data.libero_hdf5 import LIBERO
from worldenv.data.libero_tasks import locate_instruction
from worldenv.stages.reality import benchmark


class Recorded:
    """A folder, and which of its episodes are of the run's tasks, told by their text (or, in
    folders of ours, by what we kept of them).

    UserError for metadata that is damaged, of another robot, or whose files are not there.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.config = folder, config
        found_by, suite = benchmark(config), config.env.suite
        self.robot = found_by.recorded(config.env)
        self.dataset = open_dataset(folder)
        self.others: list[str] = []  # of no task that is known
        suits = {text.lower(): task for task, text in enumerate(found_by.suites[suite])}
        known = own.Reader(self.dataset).tasks(found_by.name)
        by_text: list[tuple[str, int] | None] = []
        for text in self.dataset.texts:
            said = " ".join(text.lower().split())
            located = locate_instruction(text) if found_by.name == LIBERO else None
            by_text.append((suite, suits[said]) if said in suits else located)
        found: dict[tuple[str, int], list[int]] = defaultdict(list)
        for place, (number, text) in enumerate(
            zip(self.dataset.number.tolist(), self.dataset.text.tolist(), strict=True)
        ):
            key = known.get(number, by_text[text])
            if key is not None:
                found[key].append(place)
            elif self.dataset.texts[text] not in self.others:
                self.others.append(self.dataset.texts[text])
        self.places = {key: np.array(places) for key, places in found.items()}
        keys(self.dataset, self.robot, config.data, self.wanted)

    @property
    def wanted(self) -> np.ndarray:
        """Places of the episodes that are of the run's tasks."""
        suite, tasks = self.config.env.suite, self.config.env.tasks
        parts = [self.places[suite, task] for task in tasks if (suite, task) in self.places]
        return np.sort(np.concatenate(parts)) if parts else np.empty(0, np.int64)

    @cached_property
    def reader(self) -> Reader:
        """Reads what is wanted; how, is found out once for all tasks."""
        return Reader(self.dataset, self.robot, self.config.data, self.wanted)


@dataclass(frozen=True)
class Part:
    """Episodes of one task in a LeRobotDataset."""

    source: Recorded
    key: tuple[str, int]

    def __len__(self) -> int:
        return len(self.source.places[self.key])

    def __str__(self) -> str:
        return str(self.source.folder)


def parts_of_folder(folder: Path, config: Config) -> tuple[dict[tuple[str, int], Part], list[str]]:
    """Episodes by (suite, task), and the texts of those that are of none."""
    source = Recorded(folder, config)
    return {key: Part(source, key) for key in source.places}, source.others
