"""Processes that are the ranks of one run, for tests."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.ranked import Ranks
from worldenv.runtime import ranks


class Group(Ranks):
    """Ranks that have met; what work(folder) of each returns is found in `<folder>/<rank>`."""

    def __init__(self, work: Callable[[Path], dict], folder: Path, count: int) -> None:
        def body(number: int) -> None:
            ranks.join(torch.device("cpu"))
            torch.save(work(folder), folder / str(number))

        super().__init__(body, folder, count)

    def found(self) -> list[dict]:
        """What every rank found."""
        return [self.of(number) for number in range(len(self.ranks))]

    def of(self, number: int, code: int = 0) -> dict:
        """What a rank found, once it has ended with this code."""
        self.ranks[number].join(120)
        assert self.ranks[number].exitcode == code, (self.folder / f"rank-{number}.log").read_text()
        path = self.folder / str(number)
        return torch.load(path, weights_only=True) if path.exists() else {}

    def wait_for_all(self) -> None:
        """Until every rank has begun."""
        while not all((self.folder / f"begun-{n}").exists() for n in range(len(self.ranks))):
            time.sleep(0.05)
