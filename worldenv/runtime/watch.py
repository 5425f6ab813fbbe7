"""Ranks that notice when another one is gone: killed, hung, out of memory, or ended by an error.

Each tells the others every few seconds that it lives, and, when an error ends it, its last words,
through the store that torchrun keeps. A connection that breaks is noticed at once; a process that
stands still breaks none, and is noticed by its silence, and so is a network that does. Any of them
ends all ranks, and says whose fault it was; nothing but the work since the last checkpoint is lost.
Seconds are counted in beats of this rank's own, so that a group that was stopped as a whole, and
goes on, suspects nobody.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import psutil
import torch.distributed as dist

from worldenv.runtime import ranks
from worldenv.runtime.errors import UserError

BEAT = 2.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without one after which a rank is given up
_LATE = 4  # beats without one that explain a connection that broke
_TAIL = 3  # lines of a rank's log that stand for its last words


class Watch:
    """Of this rank over the others, from a thread of its own until `close`.

    logs: folder of `rank-<n>.log`.
    """

    voice: int | None = None
    """Where a rank speaks in place of rank 0, if that cannot: a file descriptor."""

    def __init__(self, logs: Path) -> None:
        self.logs, self.own, self.count = logs, dist.get_rank(), dist.get_world_size()
        self._store = dist.distributed_c10d._get_default_store()
        self._store.set(f"who/{self.own}", f"{os.getpid()} {_node()}")
        self._stop, self._waited = threading.Event(), 0
        self._silent = dict.fromkeys(self._others(), 0)  # beats of ours since its last one
        self._threads = [
            threading.Thread(target=work, name="watch", daemon=True)
            for work in (self._listen, self._mind)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the watch."""
        self._stop.set()
        for thread in self._threads:
            thread.join(BEAT)  # one may wait for a store that never answers

    def say(self, error: BaseException) -> None:
        """Leave this rank's last words for the others."""
        words = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(RuntimeError):  # the store is gone, and with it who would hear
            self._store.set(f"words/{self.own}", words[:2000])

    def explain(self) -> UserError | None:
        """Which rank is to blame for a connection that broke; None where all are well."""
        until = time.monotonic() + (_LATE + 2) * BEAT
        try:
            while time.monotonic() < until:  # last words may be on their way
                for rank in self._others():
                    if words := self._words(rank):
                        return _gone(rank, f"it ended with: {words}")
                    if self._dead(rank):
                        return self._aloud(rank, f"it was killed{self._tail(rank)}")
                    if self._silent[rank] >= _LATE:  # of another node
                        how = f"it was killed, or its node is cut off{self._tail(rank)}"
                        return self._aloud(rank, how)
                time.sleep(min(0.3, BEAT))
        except RuntimeError:  # the store is gone, and with it whoever keeps it
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and self.own:
                return self._aloud(0, f"it was killed{self._tail(0)}")  # rank 0 does
            return UserError(
                f"torchrun at {ranks.place()} has ended. The same command goes on from the last "
                "checkpoint."
            )
        return None

    def _listen(self) -> None:
        beat, heard = 0, dict.fromkeys(self._others(), 0)
        while not self._stop.wait(BEAT):
            beat += 1
            try:
                self._store.set(f"beat/{self.own}", str(beat))
                for rank, last in heard.items():
                    name = f"beat/{rank}"
                    heard[rank] = int(self._store.get(name)) if self._store.check([name]) else 0
                    self._silent[rank] = self._silent[rank] + 1 if heard[rank] == last else 0
                    if self._silent[rank] * BEAT > SILENCE:
                        self._give_up(rank)
                    # One that failed and cannot end breaks no connection: its words must do.
                    if self._silent[rank] > _LATE and (words := self._words(rank)):
                        _end(_gone(rank, f"it ended with: {words}"))
            except RuntimeError:  # torchrun has ended, and takes the store along
                self._stop.set()
                return
            self._waited = 0

    def _mind(self) -> None:
        """That the store answers: a node that is cut off hears nothing, not even an error."""
        while not self._stop.wait(BEAT):
            self._waited += 1
            if self._waited * BEAT > SILENCE:
                error = UserError(
                    f"no answer for {SILENCE:.0f} s from {ranks.place()}, where the ranks meet: "
                    "that node, or the network to it, is gone. The same command goes on from the "
                    "last checkpoint."
                )
                self._say_aloud(error)  # who is cut off has nobody to speak for it
                _end(error)

    def _give_up(self, rank: int) -> None:
        """End this process: its main thread may wait for that rank and never come back. That rank
        too, where it is on this node: it must not go on alone, and torchrun would wait for it."""
        error = self._aloud(rank, f"no sign of life for {SILENCE:.0f} s{self._tail(rank)}")
        if (pid := self._here(rank)) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _end(error)

    def _aloud(self, rank: int, how: str) -> UserError:
        """The error, which rank 1 says for all where it is rank 0 that is gone."""
        error = _gone(rank, how)
        if (rank, self.own) == (0, 1):
            self._say_aloud(error)
        return error

    def _say_aloud(self, error: UserError) -> None:
        if self.voice is not None:
            os.write(self.voice, f"\nerror: {error}\n".encode())

    def _others(self) -> list[int]:
        return [rank for rank in range(self.count) if rank != self.own]

    def _words(self, rank: int) -> str:
        name = f"words/{rank}"
        return self._store.get(name).decode() if self._store.check([name]) else ""

    def _here(self, rank: int) -> int | None:
        """Its process, where that is on this node."""
        if not self._store.check([f"who/{rank}"]):
            return None
        pid, _, node = self._store.get(f"who/{rank}").decode().partition(" ")
        return int(pid) if node == _node() else None

    def _dead(self, rank: int) -> bool:
        """Whether its process is gone, which is known on its own node only."""
        pid = self._here(rank)
        try:
            ended = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
            return pid is not None and psutil.Process(pid).status() in ended
        except psutil.NoSuchProcess:
            return True

    def _tail(self, rank: int) -> str:
        """The end of its log, as a part of a sentence."""
        path = self.logs / f"rank-{rank}.log"
        lines = path.read_text(errors="replace").splitlines()[-_TAIL:] if path.is_file() else []
        return f"; the last it said ({path}):\n  " + "\n  ".join(lines) if lines else ""


def _node() -> str:
    """Whose process numbers these are: containers may share a name, or a machine."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _gone(rank: int, how: str) -> UserError:
    return UserError(
        f"rank {rank} is gone: {how}\nAll ranks end. The same command goes on from the last "
        "checkpoint. Where memory ran out, the kernel's log says so: --plan says what is needed."
    )


def _end(error: UserError) -> None:
    print(f"\nerror: {error}", file=sys.stderr, flush=True)
    os._exit(2)
