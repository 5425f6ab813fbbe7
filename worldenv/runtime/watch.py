"""Ranks that notice when another one is gone: killed, hung, out of memory, or ended by an error.

Each tells the others every few seconds that it lives, and, when an error ends it, its last words,
through the store that torchrun keeps. A connection that breaks is noticed at once; a process that
stands still breaks none, and is noticed by its silence. Either ends all ranks, and says whose fault
it was; nothing but the work since the last checkpoint is lost.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from pathlib import Path

import psutil
import torch.distributed as dist

from worldenv.runtime.errors import UserError

BEAT = 2.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without one after which a rank is given up
_TAIL = 3  # lines of a rank's log that stand for its last words


class Watch:
    """Of this rank over the others, from a thread of its own until `close`.

    logs: folder of `rank-<n>.log`.
    """

    def __init__(self, logs: Path) -> None:
        self.logs, self.own, self.count = logs, dist.get_rank(), dist.get_world_size()
        self._store = dist.distributed_c10d._get_default_store()
        self._store.set(f"who/{self.own}", f"{os.getpid()} {socket.gethostname()}")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the watch."""
        self._stop.set()
        self._thread.join()

    def say(self, error: BaseException) -> None:
        """Leave this rank's last words for the others."""
        words = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(RuntimeError):  # the store is gone, and with it who would hear
            self._store.set(f"words/{self.own}", words[:2000])

    def explain(self) -> UserError | None:
        """Which rank is to blame for a connection that broke; None where all are well."""
        try:
            for _ in range(10):  # its last words may be on their way
                for rank in self._others():
                    if words := self._words(rank):
                        return _gone(rank, f"it ended with: {words}")
                    if self._dead(rank):
                        return _gone(rank, f"it was killed{self._tail(rank)}")
                time.sleep(0.3)
        except RuntimeError:  # the store is gone: whoever keeps it, torchrun, has ended
            return UserError(
                "torchrun has ended. The same command goes on from the last checkpoint."
            )
        return None

    def _listen(self) -> None:
        beat, heard = 0, {rank: (-1, time.monotonic()) for rank in self._others()}
        while not self._stop.wait(BEAT):
            beat += 1
            try:
                self._store.set(f"beat/{self.own}", str(beat))
                for rank, (last, since) in heard.items():
                    name = f"beat/{rank}"
                    found = int(self._store.get(name)) if self._store.check([name]) else 0
                    if found != last:
                        heard[rank] = (found, time.monotonic())
                    elif time.monotonic() - since > SILENCE:
                        self._give_up(rank)
            except RuntimeError:  # torchrun has ended, and takes the store along
                return

    def _give_up(self, rank: int) -> None:
        """End this process: its main thread may wait for that rank and never come back."""
        error = _gone(rank, f"no sign of life for {SILENCE:.0f} s{self._tail(rank)}")
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        os._exit(2)

    def _others(self) -> list[int]:
        return [rank for rank in range(self.count) if rank != self.own]

    def _words(self, rank: int) -> str:
        name = f"words/{rank}"
        return self._store.get(name).decode() if self._store.check([name]) else ""

    def _dead(self, rank: int) -> bool:
        """Whether its process is gone, which is known on its own node only."""
        if not self._store.check([f"who/{rank}"]):
            return False
        pid, _, host = self._store.get(f"who/{rank}").decode().partition(" ")
        if host != socket.gethostname():
            return False
        try:
            return psutil.Process(int(pid)).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        except psutil.NoSuchProcess:
            return True

    def _tail(self, rank: int) -> str:
        """The end of its log, as a part of a sentence."""
        path = self.logs / f"rank-{rank}.log"
        lines = path.read_text(errors="replace").splitlines()[-_TAIL:] if path.is_file() else []
        return f"; the last it said ({path}):\n  " + "\n  ".join(lines) if lines else ""


def _gone(rank: int, how: str) -> UserError:
    return UserError(
        f"rank {rank} is gone: {how}\nAll ranks end. The same command goes on from the last "
        "checkpoint. Where memory ran out, the kernel's log says so: --plan says what is needed."
    )
