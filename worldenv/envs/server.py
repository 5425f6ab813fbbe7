"""The program of a worker process: owns simulators, obeys the commands of `pool`.

Commands (kind, content) are answered one by one with ("ok", answer), ("user_error", text)
or ("error", traceback). ("building", None) and ("alive", None) in between tell the parent that work
goes on. The process ends when told to close, or by itself when its parent is gone.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np

from worldenv.data.episode import Episode
from worldenv.envs.expert import demonstrate
from worldenv.envs.start import Start
from worldenv.runtime import plugins
from worldenv.runtime.errors import UserError

# row, start, what the parent gives along (None: nothing), past actions [n, A], look at the end
Beginning = tuple[int, Start, Any, np.ndarray, bool]


class Simulator(Protocol):
    """One task of a benchmark, an episode at a time, in one process and thread.

    The same start and actions give the same bits, whatever ran before. Nothing is rendered but in
    `observe`, which changes nothing. `envs.workers.WorkerVectorEnv` makes the seam of it.
    """

    task: int

    def reset(self, start: Start) -> None:
        """Begins the episode `start`: a numbered one, or where its index is None a fresh one drawn
        from its seed."""

    def step(self, action: np.ndarray) -> bool:
        """One action [A] in [-1, 1]; True while the task is solved."""

    def observe(self) -> dict[str, np.ndarray]:
        """image [V, H, W, 3] uint8 upright, proprio [P] float32; and, for measuring worlds by,
        `objects`: places [3] in m by name."""

    def expert(self, attempt: int) -> Iterator[np.ndarray]:
        """Optional: clean actions [A] that solve the task from the present reset, each yielded for
        the state it is to be executed in."""

    def close(self) -> None:
        """Frees what it holds."""


@dataclass(frozen=True)
class Chunk:
    """What a worker reports of one row's chunk.

    dones [n] bool: the goal held after each of the n steps executed; views: (step 1..n,
    observation) of the moments looked at, the last being the end of the chunk.
    """

    dones: np.ndarray
    views: list[tuple[int, dict[str, np.ndarray]]]


@dataclass(frozen=True)
class Demonstration:
    """A request for one scripted episode in the simulator of `row`; `seed` draws its noise.

    facts: `Episode`'s benchmark, suite and instruction. kinds: `Embodiment.action`.
    """

    row: int
    start: Start
    given: Any
    facts: dict[str, str]
    kinds: tuple[str, ...]
    noise: float
    seed: int
    record_every: int
    max_steps: int
    attempts: int


class _Server:
    """The worker's side of a pool: one simulator per row it serves, of the task last asked for."""

    def __init__(self, connection: "Connection | _Nobody", settings: dict[str, Any]) -> None:
        self._connection, self._settings = connection, settings
        self._simulators: dict[int, Simulator] = {}

    def serve(self) -> None:
        """Obeys commands until told to close or the parent is gone."""
        try:
            while True:
                kind, content = self._connection.recv()
                if kind == "close":
                    return
                self._answer(kind, content)
        except (EOFError, OSError):
            return  # the parent is gone
        finally:
            self.close()

    def obey(self, kind: str, content: Any) -> Any:
        """The answer to one command."""
        commands = {"reset": self._reset, "step": self._step, "demonstrate": self._demonstrate}
        return commands[kind](content)

    def close(self) -> None:
        """Frees the simulators."""
        while self._simulators:
            self._simulators.popitem()[1].close()

    def _answer(self, kind: str, content: Any) -> None:
        """Runs one command; its errors travel to the parent, which raises them."""
        try:
            answer = ("ok", self.obey(kind, content))
        except UserError as error:
            answer = ("user_error", str(error))
        except Exception:  # noqa: BLE001 - whatever it is, the parent raises it with its traceback
            answer = ("error", traceback.format_exc())
        self._connection.send(answer)

    def _simulator(self, row: int, task: int) -> Simulator:
        """The row's simulator, built anew if it holds another task."""
        held = self._simulators.get(row)
        if held is None or held.task != task:
            if held is not None:
                del self._simulators[row]
                held.close()
            self._connection.send(("building", None))
            make = self._settings["simulator"]
            if isinstance(make, str):
                make = plugins.load(make, what="simulator")
            self._simulators[row] = make(task=task, **self._settings["arguments"])
            self._connection.send(("alive", None))
        return self._simulators[row]

    def _reset(self, rows: list[Beginning]) -> list[dict | None]:
        """Begins each row's episode, replays its actions so far, looks if asked."""
        views = []
        for row, start, given, past, look in rows:
            simulator = self._simulator(row, start.task)
            _reset(simulator, start, given)
            for action in past:
                simulator.step(action)
            views.append(simulator.observe() if look else None)
        return views

    def _step(self, rows: list[tuple[int, np.ndarray, bool, frozenset[int]]]) -> list[Chunk]:
        """For each (row, actions [n, A], stop at success, steps 1..n after which to look)."""
        chunks = []
        for row, actions, stop, looks in rows:
            simulator = self._simulators[row]
            dones: list[bool] = []
            views: list[tuple[int, dict]] = []
            for step, action in enumerate(actions, start=1):
                dones.append(bool(simulator.step(action)))
                last = step == len(actions) or (stop and dones[-1])
                if last or step in looks:
                    views.append((step, simulator.observe()))
                if last:
                    break
            chunks.append(Chunk(np.array(dones, dtype=bool), views))
        return chunks

    def _demonstrate(self, request: Demonstration) -> Episode:
        """Runs the scripted expert and keeps every `record_every`-th frame, and the last one."""
        start = request.start
        simulator = self._simulator(request.row, start.task)
        recorder = _Recorder(simulator, request, self._beat)
        result = demonstrate(
            recorder,
            start,
            simulator.expert,
            request.kinds,
            noise=request.noise,
            rng=np.random.default_rng(request.seed),
            max_steps=request.max_steps,
            attempts=request.attempts,
        )
        recorder.look()
        return Episode(
            **request.facts,
            task=start.task,
            start=start.index,
            seed=start.seed,
            source="demonstration",
            actions=np.asarray(result.actions, dtype=np.float32),
            dones=np.array(recorder.dones, dtype=bool),
            frame_steps=np.array(recorder.steps, dtype=np.int64),
            images=np.stack([view["image"] for view in recorder.views]),
            proprio=np.stack([view["proprio"] for view in recorder.views]),
            success=bool(result.success),
            meta={"noise": request.noise, "expert_seed": request.seed},
        )

    def _beat(self) -> None:
        """Tells the parent that a long command is still making progress."""
        self._connection.send(("alive", None))


class _Recorder:
    """A simulator that also keeps frames and successes of the episode it runs."""

    def __init__(
        self, simulator: Simulator, request: Demonstration, beat: Callable[[], None]
    ) -> None:
        self._simulator, self._request, self._beat = simulator, request, beat
        self.dones: list[bool] = []
        self.steps: list[int] = []
        self.views: list[dict[str, np.ndarray]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._simulator, name)

    def reset(self, start: Start) -> None:
        """Begins anew: an expert's failed attempt is not kept."""
        self.dones, self.steps, self.views = [], [], []
        self._beat()
        _reset(self._simulator, start, self._request.given)

    def step(self, action: np.ndarray) -> bool:
        """Looks if a frame is due, then steps."""
        if len(self.dones) % self._request.record_every == 0:
            self.look()
        self.dones.append(self._simulator.step(action))
        return self.dones[-1]

    def look(self) -> None:
        """Keeps the present frame; one frame for each moment."""
        if not self.steps or self.steps[-1] != len(self.dones):
            self.steps.append(len(self.dones))
            self.views.append(self._simulator.observe())
            self._beat()


class Here:
    """`pool.WorkerPool`'s interface in the caller's own process, for simulators that cost next to
    nothing: whatever goes wrong in one is the caller's."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._server = _Server(_Nobody(), settings)
        self._answers: deque[tuple[int, Any]] = deque()

    def exchange(self, commands: dict[int, tuple[str, Any]]) -> dict[int, Any]:
        """Obeys one command for each worker."""
        return {number: self._server.obey(*command) for number, command in commands.items()}

    def submit(self, number: int, command: tuple[str, Any]) -> None:
        """Obeys `command`; its answer comes from `next`."""
        self._answers.append((number, self._server.obey(*command)))

    def next(self) -> tuple[int, Any]:
        """(worker, answer) of the first command not yet answered."""
        return self._answers.popleft()

    def close(self) -> None:
        """Frees the simulators."""
        self._server.close()


class _Nobody:
    """In the place of a connection: nobody waits at its other end."""

    def send(self, message: tuple[str, Any]) -> None:
        pass


def _reset(simulator: Simulator, start: Start, given: Any) -> None:
    simulator.reset(start) if given is None else simulator.reset(start, given)


def main(descriptor: str, settings: str) -> None:
    """The program of a worker process: serves the pool at the socket `descriptor`.

    settings: JSON of `simulator` (`module:name` of what makes a Simulator of a task), `arguments`
    (beside the task) and `path` (folders where modules are looked for, too).
    """
    parent = os.getppid()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    told = json.loads(settings)
    sys.path += [folder for folder in told["path"] if folder not in sys.path]
    _Server(Connection(int(descriptor)), told).serve()


def _end_with(parent: int) -> None:
    """Ends this process soon after its parent, even in the middle of a long command."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
