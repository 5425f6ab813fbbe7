"""A real benchmark as a gymnasium vector environment: rows of its episodes in worker processes.

One step executes one action chunk [C, A] in each row and looks once, at its end. A finished row
freezes: its observation and flags stay, further actions for it are ignored, until `reset` with its
bit of `reset_mask` set. Rows of a worker run in turn, workers in parallel. A worker that
dies or hangs is replaced and its rows are redone from their starts and actions: the same bits.

Liberties: `reset` takes starts and a mask through `options`, gymnasium's place for such things; a
call without starts draws numbered starts at random and keeps each row's task. `info` is a plain
dict of arrays, without gymnasium's `_key` masks: every row reports every time.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from worldenv.data.embodiment import Embodiment
from worldenv.data.episode import Episode
from worldenv.envs.actions import check_actions
from worldenv.envs.pool import Command, WorkerPool
from worldenv.envs.server import Chunk, Demonstration, Here, Simulator
from worldenv.envs.start import Start
from worldenv.runtime.errors import UserError, unknown
from worldenv.runtime.seeds import derive

_LETTERS = "abcdefghijklmnopqrstuvwxyz "


class WorkerVectorEnv(VectorEnv):
    """B rows of one suite, any task in any row. See the module's text for its conduct.

    Observation: image [B, V, H, W, 3] uint8 upright, proprio [B, P] float32, instruction (B str).
    Action: [B, C, A] float; what lies beyond [-1, 1] the simulator clips. Reward: 1 in the step in
    which success first holds. `info`: success [B] (ever), steps [B], success_step [B] (1-based, -1
    for none), and frames if recording.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012

    def __init__(
        self,
        simulator: Callable[..., Simulator] | str,
        robot: Embodiment,
        num_envs: int,
        *,
        benchmark: str,
        suite: str,
        instructions: Sequence[str],
        states: int = 50,
        arguments: dict[str, Any] | None = None,
        cameras: int | None = None,
        renders: bool = False,
        processes: bool = True,
        workers: int | None = None,
        max_steps: int = 220,
        terminate: Literal["success", "never"] = "success",
        record_every: int | None = None,
        timeout_s: float = 120.0,
    ) -> None:
        """Starts nothing yet: processes and simulators come with the first reset.

        simulator: a module's class or function, or its `module:name`; called in the workers with
        `task` and `arguments` (what JSON can hold). instructions: of the suite's tasks, in order.
        states: numbered starts of each. cameras: that it draws, where models see only the first
        `robot.V`. renders: whether it draws with MuJoCo. processes: False
        for one that costs next to nothing, and runs in the caller's.
        workers: processes, default one per row up to the number of cores. terminate: "never" runs
        every row to `max_steps` and only reports success. record_every: also render every k-th
        step, with all cameras, into `info["frames"]`. timeout_s: a worker silent for longer is
        replaced. Raises UserError for values that cannot work.
        """
        cores = len(os.sched_getaffinity(0))
        workers = min(num_envs, cores) if workers is None else workers
        for name, value in {
            "num_envs": num_envs,
            "workers": workers,
            "max_steps": max_steps,
            "record_every": 1 if record_every is None else record_every,
            "timeout_s": timeout_s,
        }.items():
            if value <= 0:
                raise UserError(f"{name} must be positive, got {value}.")
        if terminate not in ("success", "never"):
            raise unknown("termination", terminate, ("success", "never"))
        self.benchmark, self.suite, self.instructions = benchmark, suite, tuple(instructions)
        self.num_envs, self.states, self.embodiment = num_envs, states, robot
        self.max_steps, self.terminate, self.record_every = max_steps, terminate, record_every
        self.single_observation_space, self.single_action_space = spaces_of(
            robot, self.instructions
        )
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._workers = min(workers, num_envs)
        settings = {"simulator": simulator, "arguments": arguments or {}}
        if processes:
            settings |= _named(simulator)
            self._pool = WorkerPool(
                self._workers,
                settings,
                timeout_s=timeout_s,
                renders=renders,
                recover=self._recovery,
            )
        else:
            self._pool = Here(settings)
        self._rows = [_Row() for _ in range(num_envs)]
        self._generators = _row_generators(None, num_envs)
        size = robot.image_size
        self._image = np.zeros((num_envs, cameras or robot.V, size, size, 3), np.uint8)
        self._proprio = np.zeros(self.observation_space["proprio"].shape, np.float32)

    def given(self, start: Start) -> Any:
        """What a worker needs beside a start and would be slow to read, None for nothing."""
        return None

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begins new episodes in the rows of options["reset_mask"] [B] (default all).

        options["starts"]: B entries, a `Start` for each row to reset; None there draws one from
        `seed`'s generator: the row's last task (first: 0), a random init state, a random seed.
        """
        if self.closed:
            raise gymnasium.error.ClosedEnvironmentError("reset of a closed environment")
        options = options or {}
        surplus = set(options) - {"reset_mask", "starts"}
        if surplus:
            raise unknown("reset option", min(surplus), ("reset_mask", "starts"))
        if seed is not None:
            super().reset(seed=seed if isinstance(seed, int) else None)
            self._generators = _row_generators(seed, self.num_envs)
        mask = self._mask(options.get("reset_mask"))
        starts = options.get("starts") or [None] * self.num_envs
        if len(starts) != self.num_envs:
            raise UserError(
                f"starts must hold one entry for each of {self.num_envs} rows, got {len(starts)}."
            )
        chosen = {i: starts[i] or self._draw_start(i) for i in np.flatnonzero(mask).tolist()}
        self._check_starts(chosen)
        requests = {}
        for i, start in chosen.items():
            requests[i] = (start, self.given(start), np.zeros((0, self.embodiment.A)), True)
        for i in chosen:
            self._rows[i] = _Row(task=chosen[i].task)  # not to be redone if this is interrupted
        for i, view in self._ask("reset", requests).items():
            self._rows[i] = _Row(chosen[i], chosen[i].task)
            self._rows[i].objects[0] = view.get("objects", {})
            self._show(i, view)
        return self._observation(), self._info()

    def step(
        self, actions: np.ndarray
    ) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Executes actions [B, C, A]: observation, reward, terminated, truncated [B] and info.

        Raises UserError for a wrong shape, a dtype that is not floating, or NaN in a live row.
        """
        if self.closed:
            raise gymnasium.error.ClosedEnvironmentError("step of a closed environment")
        waiting = [i for i, row in enumerate(self._rows) if row.start is None]
        if waiting:
            raise gymnasium.error.ResetNeeded(f"Rows {waiting} have no episode: reset them first.")
        actions = np.asarray(actions)
        live = [i for i, row in enumerate(self._rows) if not row.finished]
        check_actions(actions, self.action_space.shape, live)
        requests = {}
        for i in live:
            row = self._rows[i]
            planned = actions[i, : self.max_steps - row.steps].astype(np.float64)
            requests[i] = (planned, self.terminate == "success", self._looks(row, len(planned)))
        chunks = self._ask("step", requests)
        reward = np.zeros(self.num_envs)
        frames = [_no_frames(self._image, self._proprio) for _ in self._rows]
        for i, chunk in chunks.items():
            row = self._rows[i]
            if self.record_every is not None:
                frames[i] = row.frames(chunk)
            reward[i] = row.advance(requests[i][0], chunk, self.max_steps, self.terminate)
            view = chunk.views[-1][1]
            self._show(i, view)
        terminated = np.array([row.terminated for row in self._rows])
        truncated = np.array([row.truncated for row in self._rows])
        info = self._info()
        if self.record_every is not None:
            info["frames"] = frames
        return self._observation(), reward, terminated, truncated, info

    def demonstrate(
        self,
        starts: Sequence[Start],
        *,
        noise: float,
        seed: int,
        record_every: int = 1,
        attempts: int = 1,
    ) -> list[Episode]:
        """Scripted episodes from `starts`, in their order, run in the workers.

        Frames before every `record_every`-th action and after the last. An episode depends on its
        start, `noise` and `seed` alone. Ends the rows' episodes: reset before stepping.
        """
        self._check_starts(dict(enumerate(starts)))
        self._rows = [_Row(task=row.task) for row in self._rows]
        queue = list(range(len(starts)))
        running: dict[int, int] = {}
        episodes: dict[int, Episode] = {}

        def give(worker: int) -> None:
            held = self._rows[worker].task  # of the simulator that this worker demonstrates with
            k = next((k for k in queue if starts[k].task == held), queue[0])
            queue.remove(k)
            running[worker] = k
            self._rows[worker] = _Row(task=starts[k].task)
            start = starts[k]
            facts = {
                "benchmark": self.benchmark,
                "suite": self.suite,
                "instruction": self.instructions[start.task],
            }
            request = Demonstration(
                row=worker,
                start=start,
                given=self.given(start),
                facts=facts,
                kinds=self.embodiment.action,
                noise=noise,
                seed=derive(seed, start.task, str(start.index), start.seed),
                record_every=record_every,
                max_steps=self.max_steps,
                attempts=attempts,
            )
            self._pool.submit(worker, ("demonstrate", request))

        for worker in range(min(self._workers, len(queue))):
            give(worker)
        failure: Exception | None = None
        while running:
            worker, answer = self._pool.next()
            k = running.pop(worker)
            if isinstance(answer, Exception):
                failure = failure or answer
            else:
                episodes[k] = answer
            if queue and failure is None:
                give(worker)
        if failure is not None:
            raise failure
        return [episodes[k] for k in range(len(starts))]

    def objects(self, row: int) -> dict[int, dict[str, np.ndarray]]:
        """Where the goal's things were in a row's episode, [3] in m by name, after each number of
        steps at which it was looked at. For measuring only: no observation holds it."""
        return self._rows[row].objects

    def close_extras(self, **kwargs: Any) -> None:
        """Ends the worker processes."""
        pool = getattr(self, "_pool", None)  # absent if the constructor refused its arguments
        if pool is not None:
            pool.close()

    def _ask(self, kind: str, requests: dict[int, tuple]) -> dict[int, Any]:
        """Sends each row's request to its worker, all at once, and gathers the answers by row."""
        shares: dict[int, list[int]] = {}
        for i in requests:
            shares.setdefault(i % self._workers, []).append(i)
        commands = {w: (kind, [(i, *requests[i]) for i in rows]) for w, rows in shares.items()}
        answers = self._pool.exchange(commands)
        return {
            i: answer
            for w, rows in shares.items()
            for i, answer in zip(rows, answers[w], strict=True)
        }

    def _recovery(self, worker: int) -> list[Command]:
        """The command that brings a fresh worker's live rows to where they stand."""
        rows = [
            (i, row.start, self.given(row.start), row.past(self.embodiment.A), False)
            for i, row in enumerate(self._rows)
            if i % self._workers == worker and row.start is not None and not row.finished
        ]
        return [("reset", rows)] if rows else []

    def _looks(self, row: "_Row", count: int) -> frozenset[int]:
        """Steps 1..count of the coming chunk after which a frame is due."""
        if self.record_every is None:
            return frozenset()
        return frozenset(k for k in range(1, count + 1) if (row.steps + k) % self.record_every == 0)

    def _mask(self, mask: Any) -> np.ndarray:
        if mask is None:
            return np.ones(self.num_envs, dtype=bool)
        mask = np.asarray(mask)
        if mask.shape != (self.num_envs,) or mask.dtype != bool:
            raise UserError(
                f"reset_mask must be bool [{self.num_envs}], got {mask.dtype} {list(mask.shape)}."
            )
        return mask

    def _draw_start(self, i: int) -> Start:
        draw = self._generators[i]
        index, seed = int(draw.integers(self.states)), int(draw.integers(2**31))
        return Start(self._rows[i].task, index, seed)

    def _check_starts(self, starts: dict[int, Start]) -> None:
        count = len(self.instructions)
        for i, start in starts.items():
            if not 0 <= start.task < count:
                raise UserError(
                    f"Start {i} names task {start.task}; {self.suite} has tasks 0 to {count - 1}."
                )

    def _show(self, row: int, view: dict[str, np.ndarray]) -> None:
        """Takes what a worker saw. UserError unless it is as the embodiment says."""
        for name, place, kind in (
            ("image", self._image, np.uint8),
            ("proprio", self._proprio, np.float32),
        ):
            seen = np.asarray(view[name]) if name in view else np.zeros(0)
            if seen.shape != place.shape[1:] or seen.dtype != kind:
                raise UserError(
                    f"{self.benchmark}: {name} of its simulator: expected {list(place.shape[1:])} "
                    f"{np.dtype(kind)}, as its embodiment {self.embodiment.name} says, got "
                    f"{list(seen.shape)} {seen.dtype}. Mend observe, or the embodiment."
                )
            place[row] = seen

    def _observation(self) -> dict[str, Any]:
        return {
            "image": self._image[:, : self.embodiment.V].copy(),
            "proprio": self._proprio.copy(),
            "instruction": tuple(self.instructions[row.task] for row in self._rows),
        }

    def _info(self) -> dict[str, Any]:
        return {
            "success": np.array([row.success_step > 0 for row in self._rows]),
            "steps": np.array([row.steps for row in self._rows]),
            "success_step": np.array([row.success_step for row in self._rows]),
        }


class _Row:
    """One row's episode as the parent knows it; enough to redo it."""

    def __init__(self, start: Start | None = None, task: int = 0) -> None:
        self.start, self.task = start, task
        self.actions: list[np.ndarray] = []
        self.objects: dict[int, dict[str, np.ndarray]] = {}
        self.steps = 0
        self.success_step = -1
        self.terminated = self.truncated = False

    @property
    def finished(self) -> bool:
        """True once terminated or truncated."""
        return self.terminated or self.truncated

    def past(self, width: int) -> np.ndarray:
        """The actions executed so far [steps, A]; width: A."""
        return np.concatenate([np.zeros((0, width)), *self.actions])

    def frames(self, chunk: Chunk) -> dict[str, np.ndarray]:
        """The frames of a chunk about to be counted; `success`: it has held by then."""
        steps = np.array([step for step, _ in chunk.views])
        held = np.cumsum(chunk.dones) > 0
        return {
            "steps": self.steps + steps,
            "image": np.stack([view["image"] for _, view in chunk.views]),
            "proprio": np.stack([view["proprio"] for _, view in chunk.views]),
            "success": held[steps - 1] | (self.success_step > 0),
            "dones": chunk.dones,
        }

    def advance(self, actions: np.ndarray, chunk: Chunk, max_steps: int, terminate: str) -> float:
        """Counts an executed chunk; the reward."""
        executed = len(chunk.dones)
        places = ((step, view.get("objects", {})) for step, view in chunk.views)
        self.objects |= {self.steps + step: seen for step, seen in places}
        first = self.success_step < 0 and bool(chunk.dones.any())
        if first:
            self.success_step = self.steps + int(np.argmax(chunk.dones)) + 1
        self.actions.append(actions[:executed])
        self.steps += executed
        self.terminated = terminate == "success" and self.success_step > 0
        self.truncated = not self.terminated and self.steps >= max_steps
        return float(first)


def spaces_of(robot: Embodiment, words: Sequence[str]) -> tuple[spaces.Dict, spaces.Box]:
    """One row's observation and action spaces; words: all that instructions say."""
    letters = frozenset(_LETTERS).union(*words)
    shape = (robot.V, robot.image_size, robot.image_size, 3)
    observation = spaces.Dict(
        {
            "image": spaces.Box(0, 255, shape, np.uint8),
            "proprio": spaces.Box(-np.inf, np.inf, (robot.P,), np.float32),
            "instruction": spaces.Text(max_length=max([200, *map(len, words)]), charset=letters),
        }
    )
    return observation, spaces.Box(-1.0, 1.0, (robot.chunk, robot.A), np.float32)


def _named(simulator: Callable[..., Simulator] | str) -> dict[str, Any]:
    """What a worker finds it by, and the folders where it looks."""
    if isinstance(simulator, str):
        return {"simulator": simulator, "path": sys.path}
    module = sys.modules[simulator.__module__]
    file, depth = Path(module.__file__).resolve(), module.__name__.count(".")
    # A program's own module has another name there.
    place = str(file) if module.__name__ == "__main__" else module.__name__
    name = f"{place}:{simulator.__qualname__}"
    return {"simulator": name, "path": [*sys.path, str(file.parents[depth])]}


def _row_generators(
    seed: int | Sequence[int | None] | None, count: int
) -> list[np.random.Generator]:
    """One generator per row: seed + row for an int (gymnasium's habit), else the row's own."""
    if seed is None or isinstance(seed, int | np.integer):
        seed = [None if seed is None else int(seed) + i for i in range(count)]
    if len(seed) != count:
        raise UserError(f"seed must be one int or {count} of them, got {len(seed)}.")
    return [np.random.default_rng(value) for value in seed]


def _no_frames(image: np.ndarray, proprio: np.ndarray) -> dict[str, np.ndarray]:
    """The frames of a row that did not move."""
    return {
        "steps": np.zeros(0, dtype=np.int64),
        "image": np.zeros((0, *image.shape[1:]), np.uint8),
        "proprio": np.zeros((0, *proprio.shape[1:]), np.float32),
        "success": np.zeros(0, dtype=bool),
        "dones": np.zeros(0, dtype=bool),
    }
