"""Where LeRobotDatasets lie. Needs no library of theirs, for most commands meet none."""

import os
from pathlib import Path

INFO = Path("meta", "info.json")


def is_dataset(folder: Path) -> bool:
    """Whether a folder is a LeRobotDataset."""
    return (folder / INFO).is_file()


def datasets_of(path: Path) -> list[Path]:
    """`path` itself, or the LeRobotDatasets under it, each once and links followed."""
    if not path.is_dir():
        return []
    found: dict[str, Path] = {}
    visited: set[str] = set()
    for place, folders, _ in os.walk(path, followlinks=True):
        folders.sort()
        real = os.path.realpath(place)
        if is_dataset(Path(place)):
            found.setdefault(real, Path(place))
        if real in visited or real in found:
            folders.clear()
        visited.add(real)
    return sorted(found.values())
