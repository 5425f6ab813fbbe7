"""LIBERO as a gymnasium vector environment: `envs.workers` on its simulator, with its init states.

Actions are [C, 7], an OSC_POSE delta and a gripper command (-1 open, +1 close).
"""

from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np

from worldenv.data.libero_tasks import SUITES, instruction_of
from worldenv.envs.libero.assets import resolve_assets
from worldenv.envs.libero.robot import CAMERAS, RENDER_SIZES, embodiment
from worldenv.envs.libero.worker import read_init_state
from worldenv.envs.start import Start
from worldenv.envs.workers import WorkerVectorEnv
from worldenv.runtime.errors import UserError, unknown

INIT_STATES = 50


class LiberoVectorEnv(WorkerVectorEnv):
    """B rows of a LIBERO suite, any task in any row; observations and conduct: `WorkerVectorEnv`.

    Image [B, V=2, H, W, 3], proprio [B, 8], action [B, C, 7].
    """

    def __init__(
        self,
        suite: str,
        num_envs: int,
        *,
        workers: int | None = None,
        assets: Path | None = None,
        image_size: int = 64,
        chunk: int = 8,
        views: int = len(CAMERAS),
        max_steps: int = 220,
        terminate: Literal["success", "never"] = "success",
        record_every: int | None = None,
        timeout_s: float = 120.0,
    ) -> None:
        """Starts nothing yet: processes and simulators come with the first reset.

        views: of the cameras, how many are observed; all are recorded. The others: as of
        `WorkerVectorEnv`. Raises UserError for values that cannot work and for assets the suite
        lacks.
        """
        if suite not in SUITES:
            raise unknown("LIBERO suite", suite, SUITES)
        for name, value in {"image_size": image_size, "chunk": chunk, "views": views}.items():
            if value <= 0:
                raise UserError(f"{name} must be positive, got {value}.")
        if image_size > RENDER_SIZES[-1]:
            raise UserError(f"image_size must be at most {RENDER_SIZES[-1]}, got {image_size}.")
        self.assets = resolve_assets(assets, suite, None)
        robot = embodiment(image_size, chunk, views=views)
        super().__init__(
            "worldenv.envs.libero.worker:built",
            robot,
            num_envs,
            benchmark="libero",
            suite=suite,
            instructions=[instruction_of(name) for name in SUITES[suite]],
            states=INIT_STATES,
            arguments={
                "suite": suite,
                "assets": str(self.assets.path),
                "image_size": image_size,
                "render_size": robot.render_size,
            },
            cameras=len(CAMERAS),
            renders=True,
            workers=workers,
            max_steps=max_steps,
            terminate=terminate,
            record_every=record_every,
            timeout_s=timeout_s,
        )
        self.metadata = {**self.metadata, "assets": str(self.assets)}

    def given(self, start: Start) -> np.ndarray | None:
        """Its init state: reading it imports torch, which no worker needs."""
        return read_init_state(self.suite, start)


class LiberoEnv(gymnasium.Env):
    """One row of `LiberoVectorEnv` as a plain gymnasium environment; takes its arguments.

    Observation: image [V, H, W, 3], proprio [8], instruction. Action: [C, 7]. `reset` takes
    options={"start": Start}.
    """

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, suite: str, **arguments: Any) -> None:
        self.rows = LiberoVectorEnv(suite, 1, **arguments)
        self.observation_space = self.rows.single_observation_space
        self.action_space = self.rows.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begins an episode: options["start"], or one drawn from `seed`."""
        super().reset(seed=seed)
        start = (options or {}).get("start")
        return self._single(*self.rows.reset(seed=seed, options={"starts": [start]}))

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Executes one chunk [C, 7]."""
        observation, reward, terminated, truncated, info = self.rows.step(np.asarray(action)[None])
        view, info = self._single(observation, info)
        return view, float(reward[0]), bool(terminated[0]), bool(truncated[0]), info

    def close(self) -> None:
        """Ends the worker process."""
        self.rows.close()

    @staticmethod
    def _single(
        observation: dict[str, Any], info: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        return (
            {name: value[0] for name, value in observation.items()},
            {name: value[0] for name, value in info.items()},
        )
