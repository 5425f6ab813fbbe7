"""The program of a LIBERO worker process: owns simulators, obeys the commands of `pool`.

Commands (kind, content) are answered one by one with ("ok", answer), ("user_error", text)
or ("error", traceback). ("building", None) and ("alive", None) in between tell the parent that work
goes on. The process ends when told to close, or by itself when its parent is gone.
"""

import json
import os
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from worldenv.data.episode import Episode
from worldenv.envs.libero.expert import run_expert
from worldenv.envs.libero.worker import LiberoSimulator
from worldenv.envs.start import Start
from worldenv.runtime.errors import UserError

# row, start, its init state (None for a sampled placement), past actions [n, 7], look at the end
Beginning = tuple[int, Start, np.ndarray | None, np.ndarray, bool]


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
    """A request for one scripted episode in the simulator of `row`; `seed` draws its noise."""

    row: int
    start: Start
    init_state: np.ndarray | None
    noise: float
    seed: int
    record_every: int
    max_steps: int
    attempts: int


class _Server:
    """The worker's side of a pool: one simulator per row it serves, of the task last asked for."""

    def __init__(self, connection: Connection, settings: dict[str, Any]) -> None:
        self._connection, self._settings = connection, settings
        self._simulators: dict[int, LiberoSimulator] = {}

    def serve(self) -> None:
        """Obeys commands until told to close or the parent is gone."""
        commands = {"reset": self._reset, "step": self._step, "demonstrate": self._demonstrate}
        try:
            while True:
                kind, content = self._connection.recv()
                if kind == "close":
                    return
                self._answer(commands[kind], content)
        except (EOFError, OSError):
            return  # the parent is gone
        finally:
            for simulator in self._simulators.values():
                simulator.close()

    def _answer(self, command: Callable[[Any], Any], content: Any) -> None:
        """Runs one command; its errors travel to the parent, which raises them."""
        try:
            answer = ("ok", command(content))
        except UserError as error:
            answer = ("user_error", str(error))
        except Exception:  # noqa: BLE001 - whatever it is, the parent raises it with its traceback
            answer = ("error", traceback.format_exc())
        self._connection.send(answer)

    def _simulator(self, row: int, task: int) -> LiberoSimulator:
        """The row's simulator, built anew if it holds another task."""
        held = self._simulators.get(row)
        if held is None or held.task != task:
            if held is not None:
                del self._simulators[row]
                held.close()
            self._connection.send(("building", None))
            simulator = LiberoSimulator(task=task, **self._settings)
            _ = simulator.env
            self._simulators[row] = simulator
            self._connection.send(("alive", None))
        return self._simulators[row]

    def _reset(self, rows: list[Beginning]) -> list[dict | None]:
        """Begins each row's episode, replays its actions so far, looks if asked."""
        views = []
        for row, start, init_state, past, look in rows:
            simulator = self._simulator(row, start.task)
            simulator.reset(start, init_state)
            for action in past:
                simulator.step(action)
            views.append(simulator.observe() if look else None)
        return views

    def _step(self, rows: list[tuple[int, np.ndarray, bool, frozenset[int]]]) -> list[Chunk]:
        """For each (row, actions [n, 7], stop at success, steps 1..n after which to look)."""
        chunks = []
        for row, actions, stop, looks in rows:
            simulator = self._simulators[row]
            dones: list[bool] = []
            views: list[tuple[int, dict]] = []
            for step, action in enumerate(actions, start=1):
                dones.append(simulator.step(action))
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
        result = run_expert(
            recorder,
            start,
            noise=request.noise,
            rng=np.random.default_rng(request.seed),
            max_steps=request.max_steps,
            attempts=request.attempts,
        )
        recorder.look()
        return Episode(
            suite=simulator.suite,
            task=start.task,
            instruction=simulator.instruction,
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
    """A LiberoSimulator that also keeps frames and successes of the episode it runs."""

    def __init__(
        self, simulator: LiberoSimulator, request: Demonstration, beat: Callable[[], None]
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
        self._simulator.reset(start, self._request.init_state)

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


def main(descriptor: str, settings: str) -> None:
    """The program of a worker process: serves the pool at the socket `descriptor`."""
    parent = os.getppid()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _Server(Connection(int(descriptor)), json.loads(settings)).serve()


def _end_with(parent: int) -> None:
    """Ends this process soon after its parent, even in the middle of a long command."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
