"""How many frames a run records, which of them are in memory, and what they take on the disk.

Of demonstrations that are named (--data) the metadata alone is read. Frames of folders that would
take more than `data.memory` stay on the disk (`data.disk`).
"""

from dataclasses import dataclass
from pathlib import Path

from worldenv.config import Config
from worldenv.runtime.device import GIB
from worldenv.stages import demonstrations
from worldenv.stages.estimate import LENGTH

EPISODE = 3 << 10  # bytes in memory of an episode whose frames are on the disk
WINDOW = 24  # and of each of its frames, as a window's weight and what that is made of
SMALL = 0.03  # of what frames take: arrays beside them, and their copies as columns of windows


@dataclass(frozen=True)
class Folder:
    """Episodes and frames that one folder of the run will hold, and of these its largest file."""

    episodes: int
    frames: int
    largest: int
    on_disk: bool


@dataclass(frozen=True)
class Data:
    """All of it: demonstrations first, then what each round explores."""

    folders: tuple[Folder, ...]

    @property
    def demonstrated(self) -> int:
        """Frames of demonstrations."""
        return self.folders[0].frames

    @property
    def explored(self) -> int:
        """Frames of the policy's own episodes, all rounds."""
        return sum(folder.frames for folder in self.folders[1:])

    @property
    def on_disk(self) -> bool:
        """Whether any frames stay there."""
        return any(folder.on_disk for folder in self.folders)

    def held(self, demonstrations: bool = False) -> int:
        """Frames in memory: of all episodes, or of demonstrations alone."""
        folders = self.folders[:1] if demonstrations else self.folders
        return sum(folder.frames for folder in folders if not folder.on_disk)

    def index(self, demonstrations: bool = False) -> dict[str, int]:
        """Bytes in memory of those on the disk."""
        folders = self.folders[:1] if demonstrations else self.folders
        size = sum(EPISODE * f.episodes + WINDOW * f.frames for f in folders if f.on_disk)
        return {"index of frames": size} if size else {}


_KNOWN: dict[tuple, Data] = {}  # advice asks for many configurations whose data are the same


def recorded(config: Config) -> Data:
    """What a configuration will record. UserError for demonstrations that are not there."""
    rounds = config.posttrain.rounds if config.learned else 0
    of = (config.env, config.data, config.collect, rounds)
    if of not in _KNOWN:
        _KNOWN[of] = _recorded(config, rounds)
    return _KNOWN[of]


def _recorded(config: Config, rounds: int) -> Data:
    each, steps = demonstrations.frame_bytes(config), LENGTH * config.env.max_steps
    collect, tasks = config.collect, len(config.env.tasks)

    def folder(sizes: list[tuple[int, int]]) -> Folder:
        episodes, frames = (sum(column) for column in zip(*sizes, strict=True))
        on_disk = frames * each > config.data.memory * GIB
        return Folder(episodes, frames, max(f for _, f in sizes), on_disk)

    if config.data.paths:
        shown = [*demonstrations.extent(config, demonstrations.survey(config)).values()]
    else:
        shown = [(collect.demonstrations, int(collect.demonstrations * steps))] * tasks
    found = [folder(shown)]
    for n in range(rounds):
        count = collect.refresh_episodes if n else collect.episodes
        found.append(folder([(count, int(count * steps / collect.record_every))] * tasks))
    return Data(tuple(found))


def disk(config: Config) -> tuple[int, int]:
    """Bytes that episodes of a run take on its disk, at most at once, and those that are free."""
    data, each = recorded(config), demonstrations.frame_bytes(config)
    sizes = [int(f.frames * each * (1 + SMALL)) for f in data.folders]
    twice = max(f.largest for f in data.folders) * each
    needed, free = demonstrations.room(Path(config.run_dir) / "data", sizes)
    return max(needed - max(sizes) + twice, 0), free
