"""A LeRobotDataset's episodes as ours: one after the other, decoded as they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from worldenv.data.conventions import IMAGES, check_units
from worldenv.data.embodiment import Embodiment, check_fits
from worldenv.data.episode import Episode, area_resize, check_episode
from worldenv.data.lerobot import own
from worldenv.data.lerobot.detect import detect, is_libero, ours
from worldenv.data.lerobot.frames import Cameras
from worldenv.data.lerobot.layout import DataSet
from worldenv.data.lerobot.rows import Rows
from worldenv.data.lerobot.statistics import Stated
from worldenv.data.lerobot.tables import numbers, vectors
from worldenv.data.libero_hdf5 import LIBERO
from worldenv.data.libero_tasks import locate_instruction
from worldenv.runtime.errors import UserError
from worldenv.sources import DataConfig

SUCCESS = "next.success"


class Reader:
    """Episodes of a data set, as of one robot.

    notes: what is worth saying beside `how`, once each.
    """

    def __init__(
        self,
        dataset: DataSet,
        robot: Embodiment,
        part: DataConfig | None = None,
        episodes: Iterable[int] | None = None,
    ) -> None:
        """part: what is given of how it is to be read; episodes: places of those that are wanted.

        Raises:
            UserError: a file of theirs is not there, or what they are cannot be told.
        """
        self.dataset, self.robot = dataset, robot
        everything = range(len(dataset)) if episodes is None else episodes
        self.episodes = np.fromiter(everything, np.int64)
        self.notes: list[str] = []
        self._own = own.Reader(dataset)
        part = part or DataConfig()
        find = ours if self._own.there else detect
        self.reading = find(dataset, robot, part, self.episodes)
        self.judged = SUCCESS in dataset.features
        if not self.judged:
            self.notes.append(f"no {SUCCESS}: all taken for demonstrations that succeed")
        if self.reading.state != "observation.state" or self.reading.action != "action":
            self.notes.append(f"{self.reading.state} and {self.reading.action} read")

    @property
    def how(self) -> str:
        """How it is read, in a line."""
        return f"LeRobot {self.dataset.version}; {self.reading}"

    def read(
        self,
        image_size: int | None = None,
        given: dict[str, Any] | None = None,
        episodes: Iterable[int] | None = None,
    ) -> Iterator[Episode]:
        """The episodes wanted, in order, or those in these places. image_size: area-average
        pictures to this many pixels; given: facts (suite, task, instruction, source) that replace
        the data set's own.
        """
        data, how = self.dataset, self.reading
        columns = [how.action, how.state, *how.cameras, *([SUCCESS] * self.judged), own.SEEN]
        rows = Rows(data, columns)
        stated = Stated(data, (how.action, how.state))
        with Cameras(data, how.cameras) as cameras:
            for k in self.episodes.tolist() if episodes is None else episodes:
                table = rows.of(k)
                episode = self._episode(k, table, cameras.frames(k, table), image_size, given or {})
                for key in (how.action, how.state):
                    values = vectors(table, key, data.data_file(k))
                    if said := stated.differs(int(data.number[k]), key, values):
                        self._note(f"statistics disagree with the data ({said}); recomputed")
                yield episode

    def _note(self, text: str) -> None:
        kind = text.split("(")[0]
        if not any(note.startswith(kind) for note in self.notes):
            self.notes.append(text)

    def _episode(
        self, k: int, table: pa.Table, images: np.ndarray, size: int | None, given: dict[str, Any]
    ) -> Episode:
        data, how, path = self.dataset, self.reading, self.dataset.data_file(k)
        number = int(data.number[k])
        where = f"{path}: episode {number}"
        raw = vectors(table, how.action, path), vectors(table, how.state, path)
        for name, values in zip((how.action, how.state), raw, strict=True):
            finite = np.isfinite(values).all(1)
            if not finite.all():
                raise UserError(
                    f"{where}: {name}: expected finite numbers, got NaN or infinity in row "
                    f"{int(np.flatnonzero(~finite)[0])}. Leave the episode out, or record it again."
                )
        kept = self._own.of(number)
        if kept is None:
            actions, proprio = how.actions(raw[0], self.robot), how.proprio(raw[1], self.robot)
            self._check_units(actions, proprio, f"{where}: {how.action}")
        else:
            actions, proprio = raw
        dones = np.eye(len(table), dtype=bool)[-1]
        if self.judged:
            dones = numbers(table, SUCCESS, path, "b")
        steps = np.arange(len(table))
        if kept is not None:
            if own.SEEN in table.column_names:
                steps = np.flatnonzero(numbers(table, own.SEEN, path, "b"))
            if len(steps) < len(table):
                images, proprio = images[steps], proprio[steps]
            if kept.images is not None:
                images, proprio = self._own.joined(images, proprio, kept, number)
                steps = np.append(steps, len(table))
        way = IMAGES[how.conventions.images]
        if size is not None:
            images = area_resize(images, size, f"{where}: {how.cameras[0]}")
        if how.conventions.observations == "after":  # nobody saw what was before the first
            actions, dones = actions[1:], dones[1:]
        episode = Episode(
            **self._facts(k, kept, bool(dones.any()), given),
            actions=actions,
            dones=dones,
            frame_steps=steps,
            images=images[:, :, :: way[0], :: way[1]],
            proprio=proprio,
        )
        check_episode(episode, where)
        check_fits(episode, self.robot, where)
        return episode

    def _facts(
        self, k: int, kept: own.Own | None, success: bool, given: dict[str, Any]
    ) -> dict[str, Any]:
        """Suite, task and all else that is no array."""
        names = ("suite", "task", "instruction", "start", "seed", "source", "success", "meta",
                 "benchmark")  # fmt: skip
        text = self.dataset.texts[self.dataset.text[k]]
        if kept is not None:
            facts = {name: kept.facts[name] for name in names}
        else:
            suite, task = locate_instruction(text) or (self.dataset.folder.name, -1)
            facts = {"suite": suite, "task": task, "instruction": text, "start": None, "seed": 0,
                     "source": "demonstration", "success": success, "meta": {},
                     "benchmark": LIBERO}  # fmt: skip
        return {**facts, **given}

    def _check_units(self, actions: np.ndarray, proprio: np.ndarray, place: str) -> None:
        """UserError for commands in another unit than the robot's."""
        low, high = float(actions.min()), float(actions.max())
        if low < -1.0001 or high > 1.0001:
            raise UserError(
                f"{place}: expected commands within -1..1 of {self.robot.name}, got "
                f"{low:g}..{high:g}. Convert them, or name another column (--data.action KEY)."
            )
        if is_libero(self.robot):
            check_units(actions, proprio[:, self.robot.entries("position")], place)
