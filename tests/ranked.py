"""Processes that are the ranks of one run, for tests."""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from worldenv.runtime import parallel, ranks


class Group:
    """Processes that are ranks, forked so that nothing is imported again; work(folder) of each
    is found in `<folder>/<rank>`, what it printed in `<folder>/rank-<rank>.log`."""

    def __init__(self, work: Callable[[Path], dict], folder: Path, count: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # As torchrun's agent keeps it: it outlives every rank.
        self.store = torch.distributed.TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False
        )
        self.folder = folder
        stated = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        stated |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        fork = multiprocessing.get_context("fork")
        self.ranks = [
            fork.Process(target=_rank, args=(work, folder, stated | {"RANK": str(number)}))
            for number in range(count)
        ]
        for process in self.ranks:
            process.start()

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


def _rank(work: Callable[[Path], dict], folder: Path, stated: dict[str, str]) -> None:
    os.environ.update(stated)
    log = os.open(folder / f"rank-{stated['RANK']}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
    parallel._pool, parallel._count = None, 0  # its threads are the parent's
    ranks.join(torch.device("cpu"))
    torch.save(work(folder), folder / stated["RANK"])
    sys.stdout.flush()
    os._exit(0)
