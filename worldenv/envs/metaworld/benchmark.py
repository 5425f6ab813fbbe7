"""Meta-World as a benchmark that a run can name: its tasks, its Sawyer arm, what it needs.

It has no sentences of its own: an instruction is the task's name in words. It numbers no starts
either: start k of a task is drawn from the seed k, as a fresh one is from its own.
"""

from importlib.util import find_spec
from typing import Any

from worldenv.data.embodiment import Embodiment, Entry
from worldenv.envs.benchmark import Benchmark
from worldenv.envs.metaworld.tasks import CAMERAS, TASKS
from worldenv.runtime.errors import UserError
from worldenv.sources import EnvConfig

RENDER_SIZES = (128, 256)  # pixels
INSTALL = "pip install --no-deps metaworld==3.1.1"
_WORDS = {suite: tuple(t.replace("-", " ") for t in tasks) for suite, tasks in TASKS.items()}
_DEFAULTS = {"max_steps": 200}


class MetaWorld(Benchmark):
    """Ten tasks, or all fifty."""

    name = "metaworld"
    suites, defaults = _WORDS, _DEFAULTS
    simulator = "worldenv.envs.metaworld.simulator:Sawyer"
    renders = True
    process_bytes = 375 << 20  # MuJoCo and Mesa (measured)

    def embodiment(self, env: EnvConfig) -> Embodiment:
        """A Sawyer arm whose hand keeps its orientation, at 80 Hz."""
        return Embodiment(
            name="metaworld-sawyer",
            views=CAMERAS[: env.views],
            proprio=(
                *(Entry(axis, "position", 0.01) for axis in "xyz"),
                Entry("opening", "gripper", 0.001),
            ),
            action=("translate", "translate", "translate", "grip"),
            image_size=env.image_size,
            render_size=_render_size(env.image_size),
            rotation=180,
            chunk=env.chunk,
            control_hz=80.0,
            gripper_closes=1,
            gripper_open=0.095,
        )

    def arguments(self, env: EnvConfig) -> dict[str, Any]:
        """Of the simulator."""
        size = env.image_size
        return {
            "suite": env.suite,
            "image_size": size,
            "render_size": _render_size(size),
            "views": env.views,
        }

    def demonstrates(self, suite: str) -> bool:
        """The package has a script for every task."""
        return True

    def check(self, env: EnvConfig) -> str:
        """UserError, naming the command, where the package is missing."""
        missing = [name for name in ("mujoco", "metaworld") if find_spec(name) is None]
        if missing:
            raise UserError(
                f"metaworld: expected its packages, got no {' and no '.join(missing)}. Run "
                f"`{INSTALL}` (it pins mujoco 3.3.0: any of worldenv's range will do) after "
                "`pip install 'worldenv[libero]'`."
            )
        return ""


def _render_size(size: int) -> int:
    return next((s for s in RENDER_SIZES if s >= size), size)


benchmark = MetaWorld()
