"""Worker processes of the real environment, seen from the parent: start, command, replace, stop.

A worker is a plain child process that runs `server.main` and answers commands on a socket,
one at a time. It is not started by `multiprocessing`, whose spawn would import the caller's main
module (and torch with it) into each worker. Observations travel through the socket: pickling and
copying the 24 KB of a look takes 0.1 ms beside the tens of ms of the chunk itself, so shared
memory would only add ways to leak.

Liberty: a worker that stops in the middle of sending an answer blocks the parent; one that stops at
any other point is noticed after `timeout_s`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any

import worldenv
from worldenv.runtime import graphics, places
from worldenv.runtime.errors import UserError

Command = tuple[str, Any]

BUILD_TIMEOUT_S = 600.0  # importing and compiling a scene, on a busy machine with cold caches
CLOSE_TIMEOUT_S = 10.0
MAX_ATTEMPTS = 3
_PROGRAM = "import sys; from worldenv.envs.server import main; main(sys.argv[1], sys.argv[2])"
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


class WorkerError(RuntimeError):
    """A worker failed in a way that starting it again does not mend."""


@dataclass
class _Worker:
    """One process and the commands it has yet to answer; it works on the first."""

    process: subprocess.Popen
    connection: Connection
    errors: IO[bytes]
    commands: deque[Command] = field(default_factory=deque)
    deadline: float = 0.0
    attempts: int = 0
    ready: bool = False  # has sent its first message

    def stop(self) -> None:
        """Ends the process at once and frees what the parent holds for it."""
        self.process.kill()
        self.process.wait()
        self.connection.close()
        self.errors.close()

    def last_words(self) -> str:
        """The end of what the process wrote to stderr."""
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace").strip()[-1500:]


class WorkerPool:
    """`count` processes started when first needed; `settings`: what `server.main` is told, as JSON
    can hold it. renders: whether they draw with MuJoCo, and need a GL library.

    `recover(worker)` gives the commands that bring a fresh process to where that worker stands now;
    they run before its first command, whether it is new, was stopped or takes a lost one's place.
    """

    def __init__(
        self,
        count: int,
        settings: dict[str, Any],
        *,
        timeout_s: float,
        renders: bool,
        recover: Callable[[int], list[Command]],
    ) -> None:
        self.count, self.timeout_s = count, timeout_s
        self._settings, self._renders, self._recover = settings, renders, recover
        self._workers: dict[int, _Worker] = {}
        self._finalizer = weakref.finalize(self, _stop_all, self._workers)

    @property
    def pids(self) -> dict[int, int]:
        """Process ids of the workers that run, by worker number."""
        return {number: worker.process.pid for number, worker in self._workers.items()}

    @property
    def pending(self) -> bool:
        """True while some command has not been answered."""
        return any(worker.commands for worker in self._workers.values())

    def exchange(self, commands: dict[int, Command]) -> dict[int, Any]:
        """Sends one command to each named worker, then gathers their answers.

        Raises the first error answered once every worker has answered. If interrupted, the workers
        are stopped: their state is lost, later commands start new ones.
        """
        for worker, command in commands.items():
            self.submit(worker, command)
        answers = dict(self.next() for _ in commands)
        for answer in answers.values():
            if isinstance(answer, Exception):
                raise answer
        return answers

    def submit(self, number: int, command: Command) -> None:
        """Sends `command`; its answer comes from `next`."""
        try:
            if number not in self._workers:
                self._workers[number] = self._start()
                self._workers[number].commands.extend(self._recover(number))
            worker = self._workers[number]
            worker.attempts = 0
            worker.commands.append(command)
            self._send(number)
        except BaseException:
            self.stop()
            raise

    def next(self) -> tuple[int, Any]:
        """Waits for any answer: (worker, answer), the latter an exception if the command failed."""
        try:
            while True:
                busy = {w.connection: n for n, w in self._workers.items() if w.commands}
                deadline = min(self._workers[n].deadline for n in busy.values())
                for connection in wait(list(busy), max(0.0, deadline - time.monotonic())):
                    outcome = self._receive(busy[connection])
                    if outcome is not None:
                        return busy[connection], outcome[0]
                for number in busy.values():
                    if time.monotonic() > self._workers[number].deadline:
                        self._replace(number, f"did not answer within {self.timeout_s:g} s")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kills every worker at once. The next command starts new ones."""
        _stop_all(self._workers)

    def close(self) -> None:
        """Lets idle workers free their GL contexts and end; kills those that do not."""
        for worker in self._workers.values():
            if not worker.commands:
                try:
                    worker.connection.send(("close", None))
                except OSError:
                    continue  # already gone
        limit = time.monotonic() + CLOSE_TIMEOUT_S
        for worker in self._workers.values():
            if not worker.commands:
                try:
                    worker.process.wait(max(0.0, limit - time.monotonic()))
                except subprocess.TimeoutExpired:
                    continue  # killed below
        self.stop()

    def _start(self) -> _Worker:
        chosen = dict(os.environ)
        if self._renders:
            chosen = graphics.environment(graphics.choose(), os.environ)
        environment = places.library_environment(chosen) | dict.fromkeys(_THREADS, "1")
        ours, theirs = Pipe()
        package = str(Path(worldenv.__file__).parents[1])
        inherited = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
        environment["PYTHONPATH"] = os.pathsep.join(
            [os.path.abspath(path) for path in (package, *inherited)]  # for it starts elsewhere
        )
        scratch = environment["TMPDIR"]
        errors = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - lives as long as the worker
        process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-c",
                _PROGRAM,
                str(theirs.fileno()),
                json.dumps(self._settings),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=[theirs.fileno()],
            env=environment,
            cwd=scratch,  # MuJoCo writes MUJOCO_LOG.TXT where it runs
            start_new_session=True,  # Ctrl-C reaches the parent, which ends its workers in order
        )
        theirs.close()
        return _Worker(process, ours, errors)

    def _send(self, number: int) -> None:
        """Sends the worker its first command and sets its deadline."""
        worker = self._workers[number]
        worker.deadline = time.monotonic() + self._allowance(building=not worker.ready)
        try:
            worker.connection.send(worker.commands[0])
        except OSError:  # it died while idle
            self._replace(number, "died")

    def _receive(self, number: int) -> tuple[Any] | None:
        """Reads one message; the answer in a 1-tuple if it completes the worker's last command."""
        worker = self._workers[number]
        try:
            kind, content = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.wait()
            self._replace(number, f"died (exit status {worker.process.returncode})")
            return None
        worker.ready = True
        if kind in ("alive", "building"):
            worker.deadline = time.monotonic() + self._allowance(building=kind == "building")
            return None
        worker.commands.popleft()
        if kind == "user_error":
            worker.commands.clear()
            return (UserError(content),)
        if kind == "error":
            worker.commands.clear()
            return (WorkerError(f"A worker of the benchmark failed:\n{content}"),)
        if worker.commands:
            self._send(number)
            return None
        return (content,)

    def _allowance(self, *, building: bool) -> float:
        """Seconds until the next message is overdue; `building` covers imports and compilation."""
        return max(self.timeout_s, BUILD_TIMEOUT_S) if building else self.timeout_s

    def _replace(self, number: int, reason: str) -> None:
        """Starts the worker anew, brings it to where it stood and sends its lost command again."""
        lost = self._workers.pop(number)
        words = lost.last_words()
        lost.stop()
        detail = f" It last wrote:\n{words}" if words else ""
        if lost.attempts + 1 >= MAX_ATTEMPTS:
            raise WorkerError(
                f"Benchmark worker {number} {reason}, {MAX_ATTEMPTS} times in a row. If memory ran "
                f"out, use fewer environments; if it is slow, raise timeout_s.{detail}"
            )
        warnings.warn(
            f"Benchmark worker {number} {reason}; it is started again and its episodes are redone."
            + detail,
            RuntimeWarning,
            stacklevel=2,
        )
        fresh = self._start()
        fresh.attempts = lost.attempts + 1
        fresh.commands.extend([*self._recover(number), lost.commands[-1]])
        self._workers[number] = fresh
        self._send(number)


def _stop_all(workers: dict[int, _Worker]) -> None:
    """Kills the processes and forgets them."""
    while workers:
        workers.popitem()[1].stop()
