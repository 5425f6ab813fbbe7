"""What LeRobot has no place for, in a table of our own beside its files.

Suite, task, start, seed, source and the rest of an episode that is no array, and what was seen
after its last action. LeRobot's tools pass it by; a folder without it is read like anybody's.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from worldenv.data.episode import Episode
from worldenv.data.lerobot.layout import DataSet
from worldenv.data.lerobot.tables import numbers, parquet, unreadable
from worldenv.data.libero_hdf5 import checked_facts, facts_text
from worldenv.runtime.errors import UserError

PLACE = Path("worldenv", "episodes.parquet")
SEEN = "worldenv.seen"  # of a row: whether its picture and state were recorded, not carried over
_SCHEMA = pa.schema(
    {
        "episode_index": pa.int64(),
        "facts": pa.string(),
        "final_state": pa.list_(pa.float32()),
        "final_images": pa.list_(pa.binary()),
    }
)
_GROUP = 64  # episodes of a row group


class Writer:
    """Writes the table, an episode a row."""

    def __init__(self, folder: Path) -> None:
        path = folder / PLACE
        path.parent.mkdir(parents=True)
        self._file, self._rows = pq.ParquetWriter(path, _SCHEMA), []

    def append(self, number: int, episode: Episode, where: str) -> None:
        """Add the episode that has this number in the data set."""
        last = bool(episode.frame_steps[-1] == len(episode))
        images = [_png(view) for view in episode.images[-1]] if last else []
        self._rows.append(
            {
                "episode_index": number,
                "facts": facts_text(episode, f"episode-{number}", where),
                "final_state": episode.proprio[-1].tolist() if last else [],
                "final_images": images,
            }
        )
        if len(self._rows) >= _GROUP:
            self._flush()

    def close(self) -> None:
        """Finish the file."""
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        if self._rows:
            self._file.write_table(pa.Table.from_pylist(self._rows, _SCHEMA))
            self._rows = []


@dataclass(frozen=True)
class Own:
    """Of one episode: its facts, and proprio [P] and images [V, H, W, 3] after the last action
    where they were recorded.
    """

    facts: dict[str, Any]
    proprio: np.ndarray | None
    images: np.ndarray | None


class Reader:
    """Reads the table where a data set has one."""

    def __init__(self, dataset: DataSet) -> None:
        self.path = dataset.folder / PLACE
        self.there = self.path.is_file()
        self._group = -1
        if self.there:
            with parquet(self.path):
                self._file = pq.ParquetFile(self.path)
                index = self._file.read(["episode_index"], use_threads=False)
                meta = self._file.metadata
                sizes = [meta.row_group(k).num_rows for k in range(meta.num_row_groups)]
            self._ends = np.cumsum(np.array(sizes, np.int64))
            rows = numbers(index, "episode_index", self.path).tolist() if len(index) else []
            self._row = {number: row for row, number in enumerate(rows)}

    def of(self, number: int) -> Own | None:
        """What is kept of the episode with this number, if anything is."""
        if not self.there or number not in self._row:
            return None
        row = self._row[number]
        where = f"{self.path}: episode {number}"
        with parquet(self.path):
            group = int(np.searchsorted(self._ends, row, side="right"))
            if group != self._group:
                self._rows = self._file.read_row_group(group, use_threads=False).to_pylist()
                self._group = group
            found = self._rows[row - int(self._ends[group - 1]) * bool(group)]
            facts = checked_facts(str(found["facts"]), where)
            state, pictures = found["final_state"], found["final_images"]
            if not state or not pictures:
                return Own(facts, None, None)
            images = np.stack([_picture(self.path, content) for content in pictures])
            return Own(facts, np.array(state, np.float32).reshape(-1), images)

    def tasks(self, benchmark: str) -> dict[int, tuple[str, int]]:
        """Suite and task of every episode that is kept, by its number; the suite of one of another
        benchmark begins with that one's name.
        """
        if not self.there:
            return {}
        with parquet(self.path):
            texts = self._file.read(["facts"], use_threads=False)["facts"].to_pylist()
            facts = {
                number: checked_facts(str(texts[row]), f"{self.path}: episode {number}")
                for number, row in self._row.items()
            }
        return {
            number: (
                f["suite"] if f["benchmark"] == benchmark else f"{f['benchmark']} {f['suite']}",
                f["task"],
            )
            for number, f in facts.items()
        }

    def joined(
        self, images: np.ndarray, proprio: np.ndarray, kept: Own, number: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images [F, V, H, W, 3] and proprio [F, P] with what was kept of the end."""
        if kept.images.shape != images.shape[1:] or len(kept.proprio) != proprio.shape[1]:
            raise UserError(
                f"{self.path}: episode {number}: expected a final state of {proprio.shape[1]} and "
                f"pictures {list(images.shape[1:])}, got {len(kept.proprio)} and "
                f"{list(kept.images.shape)}. The table is of another data set: remove it, and the "
                "folder is read like anybody's."
            )
        pairs = (images, kept.images), (proprio, kept.proprio)
        return tuple(np.concatenate([rows, last[None]]) for rows, last in pairs)


def _png(view: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(view).save(content, "PNG")
    return content.getvalue()


def _picture(path: Path, content: bytes) -> np.ndarray:
    try:
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
        raise unreadable(path, "final pictures as PNG", str(error)) from error
