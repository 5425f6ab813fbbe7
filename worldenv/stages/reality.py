"""Policies in the real benchmark: `env.workers` episodes at a time, each by itself.

Every episode has an environment of one row, hence a simulator process and a policy pass of its own:
what happens in it depends on its start and its seed, not on how many workers there are nor on which
episodes run beside it. While one worker moves its robot, another's policy thinks.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from worldenv.config import Config
from worldenv.data.embodiment import Embodiment
from worldenv.envs.benchmark import Benchmark, check, check_spaces
from worldenv.envs.start import Start
from worldenv.rl.noise import Noise
from worldenv.rl.rollout import Actor, Stop, Trajectories, rollout
from worldenv.runtime import ranks

TIMED = 10  # chunks


def _lanes(count: int) -> ThreadPoolExecutor:
    """A thread for each of so many environments."""
    return ThreadPoolExecutor(max(count, 1), "reality", torch.set_num_threads, (1,))


def benchmark(config: Config) -> Benchmark:
    """The one that a configuration names. UserError where it has not what is asked of it."""
    return check(config)


def embodiment(config: Config) -> Embodiment:
    """The robot of the benchmark that a configuration names, as its models see it."""
    return benchmark(config).embodiment(config.env)


def make_env(config: Config, rows: int = 1) -> VectorEnv:
    """The real benchmark as a run's configuration describes it."""
    found = benchmark(config)
    env = found.make(config.env, rows)
    check_spaces(env, found.embodiment(config.env), found.name)
    return env


class Watcher:
    """Sees the episodes of one environment as they happen; `episode` is a place in `starts`."""

    stop: Stop | None = None

    def step(self, episode: int, before: dict, action: Any, after: dict, info: dict) -> None:
        """After every chunk; what is given has one row."""

    def finish(self, episode: int, info: dict) -> None:
        """After the last chunk. Never called by two threads at once."""


class Reality:
    """Real environments of a run. They start when first needed and then wait for more to do."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._envs: list[VectorEnv] = []
        self._held: list[int | None] = []  # the task whose scene each has

    @property
    def assets(self) -> dict[str, str]:
        """What scenes are drawn from, as {"assets": ...}: empty where it is not known (yet)."""
        return {k: v for env in self._envs[:1] for k, v in env.metadata.items() if k == "assets"}

    def pace(self, policy: Actor) -> float:
        """Seconds for a chunk of real episodes, all environments at work: of two, half of what
        either takes. The first scene of each is built before."""
        part, count = self.config.env, self.config.env.workers
        chunks = min(TIMED, self.config.max_chunks)
        self._grow(count)
        self._held[:count] = [part.tasks[k % len(part.tasks)] for k in range(count)]

        def lane(number: int) -> None:
            rollout(
                self._envs[number],
                policy,
                [Start(self._held[number], 0, number)],
                seeds=[0],
                noise=None,
                stop=lambda _, info, live: info["steps"] >= chunks * part.chunk,
                images=False,
            )

        with _lanes(count) as pool:
            for _ in range(2):
                begun = time.perf_counter()
                list(pool.map(lane, range(count)))
        return (time.perf_counter() - begun) / (chunks * count)

    def roll_out(
        self,
        policy: Actor,
        starts: Sequence[Start],
        watch: Callable[[VectorEnv], Watcher],
        *,
        seeds: Sequence[int],
        noise: Noise | None,
        terminate: str,
        record_every: int | None = None,
        images: bool = False,
        features: bool = False,
    ) -> list[Trajectories]:
        """One episode from each of `starts`, in their order; `watch` makes the watcher of an
        environment.

        seeds, noise, images, features: as of `rl.rollout.rollout`. terminate, record_every: as of
        `WorkerVectorEnv`. After an error or an interruption no episode is begun; those in progress
        are finished first.
        """
        claims = ranks.Claims(len(starts))
        waiting, turn = claims.order, threading.Lock()
        done: dict[int, Trajectories] = {}
        count = min(self.config.env.workers, len(starts))
        self._grow(count)

        def take(number: int) -> int | None:
            """The next episode: of the task whose scene this environment has, else of one that no
            other has. Scenes take seconds to build."""
            with turn:
                while waiting:
                    held = self._held[number]
                    others = {task for i, task in enumerate(self._held[:count]) if i != number}
                    same = (k for k in waiting if starts[k].task == held)
                    free = (k for k in waiting if starts[k].task not in others)
                    chosen = next(same, next(free, waiting[0]))
                    waiting.remove(chosen)
                    if claims.taken(chosen):
                        self._held[number] = starts[chosen].task
                        return chosen
                return None

        def lane(number: int) -> None:
            env = self._envs[number]
            env.terminate, env.record_every = terminate, record_every
            watcher = watch(env)
            while (k := take(number)) is not None:

                def finish(_: int, info: dict, k: int = k) -> None:
                    with turn:
                        watcher.finish(k, info)

                def step(rows: np.ndarray, *seen: Any, k: int = k) -> None:
                    watcher.step(k, *seen)

                done[k] = rollout(
                    env,
                    policy,
                    [starts[k]],
                    seeds=[seeds[k]],
                    noise=noise,
                    stop=watcher.stop,
                    on_finish=finish,
                    on_step=step,
                    images=images,
                    features=features,
                )

        with _lanes(count) as pool:
            lanes = [pool.submit(lane, number) for number in range(count)]
            try:
                for ended in lanes:
                    ended.result()
            except BaseException:
                with turn:
                    waiting.clear()
                raise
        return ranks.merge(done)

    def _grow(self, count: int) -> None:
        """Have so many environments, or more."""
        self._envs += [make_env(self.config) for _ in range(count - len(self._envs))]
        self._held += [None] * (len(self._envs) - len(self._held))

    def close(self) -> None:
        """End the simulators' processes."""
        for env in self._envs:
            env.close()
        self._envs, self._held = [], []
