"""LIBERO as a benchmark that a run can name."""

from dataclasses import replace

from worldenv.data.embodiment import Embodiment
from worldenv.data.libero_tasks import SUITES, instruction_of
from worldenv.envs.benchmark import Benchmark
from worldenv.envs.libero import robot
from worldenv.envs.libero.assets import resolve_assets
from worldenv.envs.libero.cameras import of_tasks
from worldenv.envs.libero.env import INIT_STATES, LiberoVectorEnv
from worldenv.envs.libero.expert import EXPERT_SUITES
from worldenv.sources import EnvConfig

TUNING = 20  # init states 0-19 are for training and tuning


class Libero(Benchmark):
    """Its four suites of ten tasks, with fifty init states each."""

    name = "libero"
    suites = {suite: tuple(map(instruction_of, names)) for suite, names in SUITES.items()}  # noqa: RUF012
    states, tuning = INIT_STATES, TUNING
    process_bytes = 420 << 20  # MuJoCo and numba, shared pages counted in each (measured)

    def embodiment(self, env: EnvConfig) -> Embodiment:
        """A Panda arm."""
        cameras = of_tasks(env.suite, env.tasks)
        return robot.embodiment(env.image_size, env.chunk, cameras, env.views)

    def recorded(self, env: EnvConfig) -> Embodiment:
        """With both cameras, as its files are."""
        return self.embodiment(replace(env, views=len(robot.CAMERAS)))

    def make(self, env: EnvConfig, rows: int) -> LiberoVectorEnv:
        """B rows, a worker for each."""
        return LiberoVectorEnv(
            env.suite,
            rows,
            workers=rows,
            assets=env.assets,
            image_size=env.image_size,
            chunk=env.chunk,
            views=env.views,
            max_steps=env.max_steps,
        )

    def demonstrates(self, suite: str) -> bool:
        """The scripted expert puts one thing on or into another."""
        return suite in EXPERT_SUITES

    def check(self, env: EnvConfig) -> str:
        """UserError, naming the command, for assets that the suite needs and are not here."""
        return str(resolve_assets(env.assets, env.suite))


benchmark = Libero()
