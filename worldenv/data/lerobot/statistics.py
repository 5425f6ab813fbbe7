"""Statistics of an episode's columns as LeRobot keeps them: computed, merged, and compared with
what a data set says of itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from worldenv.data.lerobot.layout import DataSet
from worldenv.data.lerobot.tables import numbers, read_lines, read_table, vectors
from worldenv.runtime.errors import UserError

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
NAMES = ("min", "max", "mean", "std", "count", *QUANTILES)
_SAMPLES = 8  # frames of an episode
_COMPARED = ("min", "max", "mean")

Statistics = dict[str, np.ndarray]


def of_numbers(values: np.ndarray) -> Statistics:
    """Of rows [T, D]: float64 [D] each, and count [1]."""
    values = values.astype(np.float64)
    return _of(values, 0, len(values))


def of_frames(frames: np.ndarray) -> Statistics:
    """Of pictures [F, H, W, 3] uint8, a few of them: [3, 1, 1] each in 0..1, and count [1]."""
    some = frames[np.linspace(0, len(frames) - 1, min(len(frames), _SAMPLES)).astype(int)]
    found = _of(some.reshape(-1, 3) / 255.0, 0, len(some))
    return {k: v if k == "count" else v.reshape(3, 1, 1) for k, v in found.items()}


def _of(values: np.ndarray, axis: int, count: int) -> Statistics:
    found = {name: getattr(values, name)(axis) for name in ("min", "max", "mean", "std")}
    for name, rows in zip(QUANTILES, np.quantile(values, [*QUANTILES.values()], axis), strict=True):
        found[name] = rows
    return {**found, "count": np.array([count])}


def merged(parts: Sequence[Statistics]) -> Statistics:
    """Of all episodes, from those of each: exact but for quantiles, which are averaged by count (as
    LeRobot does).
    """
    rows = {name: np.stack([part[name] for part in parts]) for name in NAMES}
    count = rows["count"].reshape(-1, *[1] * (rows["mean"].ndim - 1)).astype(np.float64)
    share = count / count.sum()
    mean = (rows["mean"] * share).sum(0)
    spread = (share * (rows["std"] ** 2 + (rows["mean"] - mean) ** 2)).sum(0)
    return {
        "min": rows["min"].min(0),
        "max": rows["max"].max(0),
        "mean": mean,
        "std": np.sqrt(spread),
        "count": rows["count"].sum(0),
        **{name: (rows[name] * share).sum(0) for name in QUANTILES},
    }


class Stated:
    """What a data set says of each episode's columns of numbers; of v2.0 nothing is known."""

    def __init__(self, dataset: DataSet, keys: tuple[str, ...]) -> None:
        read = {"v3.0": _new, "v2.1": _old}.get(dataset.version)
        self.rows = read(dataset, keys) if read else {}

    def differs(self, episode: int, key: str, values: np.ndarray) -> str:
        """How the rows [T, D] of episode number `episode` differ from what is said of them, if they
        do.
        """
        said = self.rows.get((episode, key))
        if said is None:
            return ""
        found = of_numbers(values)
        for name in _COMPARED:
            have = np.atleast_1d(said[name])
            if have.shape != found[name].shape:
                return f"{name} of {key}: {have.size} numbers said, {found[name].size} there"
            off = np.abs(have - found[name])
            wrong = ~(off <= 1e-4 + 1e-3 * np.abs(found[name]))
            if wrong.any():
                k = int(np.flatnonzero(wrong)[0])
                return f"{name} of {key}[{k}]: {have[k]:.4g} said, {found[name][k]:.4g} there"
        return ""


def _new(dataset: DataSet, keys: tuple[str, ...]) -> dict[tuple[int, str], Statistics]:
    found: dict[tuple[int, str], Statistics] = {}
    names = {key: {n: f"stats/{key}/{n}" for n in _COMPARED} for key in keys}
    wanted = ["episode_index", *(c for columns in names.values() for c in columns.values())]
    for path in sorted((dataset.folder / "meta/episodes").glob("*/*.parquet")):
        table = read_table(path, wanted)
        for key, columns in names.items():
            if not set(columns.values()) <= set(table.column_names):
                continue
            rows = {n: vectors(table, c, path, "f") for n, c in columns.items()}
            for k, episode in enumerate(numbers(table, "episode_index", path).tolist()):
                found[episode, key] = {n: values[k] for n, values in rows.items()}
    return found


def _old(dataset: DataSet, keys: tuple[str, ...]) -> dict[tuple[int, str], Statistics]:
    path, found = dataset.folder / "meta/episodes_stats.jsonl", {}
    if not path.is_file():
        return {}
    for line, row in enumerate(read_lines(path)):
        try:
            for key in keys:
                if key in row["stats"]:
                    said = {n: np.asarray(row["stats"][key][n], np.float64) for n in _COMPARED}
                    found[int(row["episode_index"]), key] = said
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{path}: line {line + 1}: expected an episode's statistics, got {error!r:.200}. "
                "Copy the file again, or remove it: nothing else needs it."
            ) from error
    return found
