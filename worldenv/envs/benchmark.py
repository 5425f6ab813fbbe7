"""What a run asks of a benchmark: the protocol, and where benchmarks are found.

    worldenv-train --env.benchmark libero                        by its entry point's name
    worldenv-train --env.benchmark my_package.arm:benchmark      module:name
    worldenv-train --env.benchmark path/to/arm.py                a file's `benchmark`

A package registers one under the entry point group `worldenv.benchmarks`. Suites, tasks, starts and
cameras are the benchmark's knowledge: a configuration is held to it by `check`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from gymnasium.vector import VectorEnv

from worldenv.config import Config
from worldenv.data.embodiment import Embodiment
from worldenv.envs.server import Simulator
from worldenv.envs.workers import WorkerVectorEnv
from worldenv.runtime import plugins
from worldenv.runtime.errors import UserError, unknown
from worldenv.sources import EnvConfig

GROUP = "worldenv.benchmarks"
BUILT_IN = {
    "libero": "worldenv.envs.libero.benchmark:benchmark",
    "metaworld": "worldenv.envs.metaworld.benchmark:benchmark",
}


class Benchmark(ABC):
    """Where success is real. A subclass says what its tasks are and what its robot is, and names a
    `Simulator`; or makes a VectorEnv of its own in `make`.
    """

    name: str
    """Artifacts carry it, with the suite; those of another are refused."""
    suites: Mapping[str, Sequence[str]]
    """By name, the instructions of its tasks in their order; the first is the default."""
    states: int = 50
    """Numbered starts of each task; demonstrations begin at 0, 1, ..."""
    tuning: int = 20
    """Of these, the first so many are for tuning: held-out evaluation takes others."""
    defaults: Mapping[str, Any] = {}
    """Of EnvConfig, where nobody says otherwise: such as max_steps or views."""
    simulator: Callable[..., Simulator] | str
    """Or its `module:name`. Called in worker processes with `task` and what `arguments` gives."""
    renders: bool = False
    """Whether it draws with MuJoCo."""
    processes: bool = True
    """Whether it gets processes of its own, whose crash costs nothing; False where it costs less
    than they do."""
    process_bytes: int = 300 << 20
    """Resident bytes of a worker process, about: for plans."""

    @abstractmethod
    def embodiment(self, env: EnvConfig) -> Embodiment:
        """The robot in images of `env.image_size`, commanded `env.chunk` actions at a time, seen by
        the first `env.views` of its cameras."""

    def recorded(self, env: EnvConfig) -> Embodiment:
        """The robot with all cameras that episodes are recorded by, however many models see."""
        return self.embodiment(env)

    def arguments(self, env: EnvConfig) -> dict[str, Any]:
        """Of the simulator beside its task: what JSON can hold."""
        return {}

    def make(self, env: EnvConfig, rows: int) -> VectorEnv:
        """B rows of the suite; docs/adding-a-benchmark.md says what is asked of one."""
        return WorkerVectorEnv(
            self.simulator,
            self.embodiment(env),
            rows,
            benchmark=self.name,
            suite=env.suite,
            instructions=self.suites[env.suite],
            states=self.states,
            arguments=self.arguments(env),
            renders=self.renders,
            processes=self.processes,
            workers=rows,
            max_steps=env.max_steps,
        )

    def demonstrates(self, suite: str) -> bool:
        """Whether a script solves the suite's tasks: its environment's `demonstrate`."""
        return hasattr(self.simulator, "expert")

    def check(self, env: EnvConfig) -> str:
        """UserError for what is missing here to run the suite: assets, packages. Returns in words
        which assets it uses, where there is a choice."""
        return ""


_NEEDED = ("name", "suites", "embodiment", "make", "demonstrates", "check")


@cache
def find(spec: str) -> Benchmark:
    """The benchmark called `spec`: a registered name, `module:name`, or a file's path (its
    `benchmark`). UserError for what is none, and for what lacks a part of the protocol."""
    known = {point.name: point.value for point in entry_points(group=GROUP)} | BUILT_IN
    if spec not in known and ":" not in spec and not spec.endswith(".py"):
        raise UserError(
            f"{unknown('benchmark', spec, known)} Install the package that registers it under "
            f"{GROUP}, or name it: --env.benchmark module:name, or path/to/file.py."
        )
    found = plugins.load(known.get(spec, spec), "benchmark", "config env.benchmark")
    if isinstance(found, type):
        got = f"the class {found.__name__}"
    else:
        got = f"{type(found).__name__} without {', '.join(_lacking(found))}"
    if isinstance(found, type) or _lacking(found):
        raise UserError(
            f"config env.benchmark {spec!r}: expected an instance of a subclass of "
            f"worldenv.envs.benchmark.Benchmark, got {got}. docs/adding-a-benchmark.md shows one."
        )
    return found


def registered() -> list[str]:
    """Names of all that are installed here."""
    return sorted({*BUILT_IN, *(point.name for point in entry_points(group=GROUP))})


def begun(env: EnvConfig, spec: str) -> EnvConfig:
    """An environment's settings with `spec` for the benchmark, and its defaults for what hangs on
    it: the first suite and task, and what it says itself."""
    found = find(spec)
    own = {"suite": next(iter(found.suites)), "tasks": (0,), **found.defaults}
    return replace(env, benchmark=spec, **own)


def check(config: Config) -> Benchmark:
    """The benchmark of a configuration. UserError where that asks for what it has not: a suite, a
    task, a camera, a start."""
    env, found = config.env, find(config.env.benchmark)
    if env.suite not in found.suites:
        raise UserError(
            f"config env.suite: {unknown(f'{found.name} suite', env.suite, found.suites)}"
        )
    last = len(found.suites[env.suite]) - 1
    beyond = [task for task in env.tasks if task > last]
    if beyond:
        raise UserError(
            f"config env.tasks: expected whole numbers from 0 to {last}, the tasks of {env.suite}, "
            f"got {', '.join(map(str, beyond))}. Choose others (worldenv-train "
            "--env.tasks, worldenv-collect --tasks)."
        )
    robot = found.embodiment(env)
    for name, asked, made in (
        ("views", env.views, robot.V),
        ("image_size", env.image_size, robot.image_size),
        ("chunk", env.chunk, robot.chunk),
    ):
        if asked != made:
            raise UserError(
                f"config env.{name}: expected {made}, as {robot.name} of {found.name} has it, got "
                f"{asked}. Set --env.{name.replace('_', '-')} {made}."
            )
    for name, asked in (
        ("collect.demonstrations", config.collect.demonstrations),
        ("evaluate.starts", config.evaluate.starts[1]),
    ):
        if asked > found.states:
            raise UserError(
                f"config {name}: expected at most {found.states}, the numbered starts that "
                f"{found.name} has of a task, got {asked}."
            )
    return found


def check_spaces(env: VectorEnv, robot: Embodiment, name: str) -> None:
    """UserError unless an environment declares the images, proprio and actions that the embodiment
    describes."""
    asked = {
        "image": (robot.V, robot.image_size, robot.image_size, 3),
        "proprio": (robot.P,),
        "action": (robot.chunk, robot.A),
    }
    seen = getattr(getattr(env, "single_observation_space", None), "spaces", {})
    spaces = {**seen, "action": getattr(env, "single_action_space", None)}
    for kind, shape in asked.items():
        got = getattr(spaces.get(kind), "shape", None)
        if got != shape:
            raise UserError(
                f"{name}: {kind} space of one row of its environment: expected {list(shape)}, as "
                f"its embodiment {robot.name} says, got {'none' if got is None else list(got)}. "
                "Mend the environment, or the embodiment."
            )


def _lacking(found: Any) -> list[str]:
    return [name for name in _NEEDED if not hasattr(found, name)] or (
        [] if isinstance(found, Benchmark) else ["the base class"]
    )
