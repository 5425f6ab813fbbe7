"""Processes that are the ranks of one start, forked so that nothing is imported again."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from worldenv.runtime import parallel


class Ranks:
    """`count` processes, in each of which torchrun's environment says which rank it is.

    body(number) is all that one does; what it prints is added to `<folder>/rank-<number>.log`. The
    store is kept here, as torchrun's agent keeps it: it outlives every rank. stated: more of the
    environment.
    """

    def __init__(
        self, body: Callable[[int], None], folder: Path, count: int, **stated: str
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder = folder
        self.store = torch.distributed.TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False
        )
        stated |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        stated |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        fork = multiprocessing.get_context("fork")
        self.ranks = [
            fork.Process(target=self._begin, args=(body, number, stated)) for number in range(count)
        ]
        for process in self.ranks:
            process.start()

    def _begin(self, body: Callable[[int], None], number: int, stated: dict[str, str]) -> None:
        os.environ.update(stated | {"RANK": str(number)})
        log = os.open(self.folder / f"rank-{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
        parallel._pool, parallel._count = None, 0  # its threads are the parent's
        body(number)
        sys.stdout.flush()
        os._exit(0)
