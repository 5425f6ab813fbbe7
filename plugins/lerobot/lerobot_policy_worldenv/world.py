"""A run's learned world as the vector environment that LeRobot evaluates in.

LeRobot commands an action at a time, the world imagines a frame a chunk: the picture stays for C
actions, and reward and success come with the last of them. An action's reward is the reflector's
R in [0, 1] of the frame it closes, else 0; R above its threshold ends the episode as a success.
"""

from collections.abc import Sequence
from contextlib import closing

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from lerobot_policy_worldenv.skin import ACTION, IMAGES, features, shown
from worldenv.envs.imagined import Context, ImaginedVectorEnv
from worldenv.envs.start import Start
from worldenv.play.session import World, open_world
from worldenv.runtime.errors import UserError
from worldenv.runtime.seeds import derive
from worldenv.stages.run import open_run


def worlds(folder: str, number: int | None, device: str, rows: int) -> dict:
    """{suite: {task: environment}} of a run's tasks, which share a world and a judge. UserError
    where the run has none."""
    with closing(open_run(folder, device=device)) as run:
        world = open_world(run, number)
    begun: dict[int, list[Context]] = {}
    for origin in world.origins:
        context = world.contexts[origin.first]
        begun.setdefault(context.task, []).append(context)
    made = {task: WorldVectorEnv(world, own, rows) for task, own in sorted(begun.items())}
    return {world.config.env.suite: made}


class WorldVectorEnv(VectorEnv):
    """B imagined episodes of one task that begin as episodes of the run did.

    Actions `[B, A]`, observations as `skin.shown`. A finished row freezes until all are reset.
    """

    def __init__(self, world: World, contexts: Sequence[Context], num_envs: int) -> None:
        self.world, self.robot, self.num_envs = world, world.robot, num_envs
        self.contexts = list(contexts)
        self.task = self.task_description = self.contexts[0].instruction
        self._max_episode_steps = world.config.max_chunks * self.robot.chunk
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": round(self.robot.control_hz),
            "autoreset_mode": AutoresetMode.DISABLED,
        }
        self.render_mode = "rgb_array"
        self.rows = ImaginedVectorEnv(
            world.simulator,
            world.reflector,
            self.contexts,
            num_envs,
            max_chunks=world.config.max_chunks,
            sampling_steps=world.passes,
        )
        shapes = features(self.robot)
        pixels = {
            key.removeprefix(IMAGES): spaces.Box(0, 255, shape, np.uint8)
            for key, shape in shapes.items()
            if key.startswith(IMAGES)
        }
        pose = spaces.Box(-np.inf, np.inf, shapes["agent_pos"], np.float32)
        self.single_observation_space = spaces.Dict(
            {"pixels": spaces.Dict(pixels), "agent_pos": pose}
        )
        self.single_action_space = spaces.Box(-1.0, 1.0, shapes[ACTION], np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._held: list[np.ndarray] = []

    def start(self, seed: int) -> Start:
        """What an episode of this seed begins with: one of the contexts, and noise of its own."""
        key = (self.world.config.seed, "lerobot", self.contexts[0].task, seed)
        return Start(
            self.contexts[0].task, derive(*key, "context") % len(self.contexts), derive(*key)
        )

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict | None = None
    ) -> tuple[dict, dict]:
        """Begin B new episodes; seed: one for each row, or the first row's."""
        if options and "reset_mask" in options:
            raise UserError(
                "reset: expected to begin all rows at once, which share the rhythm of chunks, got "
                "a reset_mask. Leave it out."
            )
        if seed is None or isinstance(seed, int):
            super().reset(seed=seed)
            first = int(self.np_random.integers(2**31)) if seed is None else seed
            seed = [first + row for row in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise UserError(
                f"reset: expected {self.num_envs} seeds, one for each row, got {len(seed)}."
            )
        starts = [self.start(int(s)) for s in seed]
        self._seen, _ = self.rows.reset(options={"starts": starts})
        self._held, self._ended = [], [np.zeros(self.num_envs, bool)] * 3
        return shown(self.robot, self._seen), {"is_success": self._ended[2]}

    def step(self, actions: np.ndarray) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        """One action `[B, A]` in every row; each C-th is followed by a new frame."""
        given = np.asarray(actions, np.float32)
        if given.shape != self.action_space.shape or not np.isfinite(given).all():
            raise UserError(
                f"actions: expected {list(self.action_space.shape)} finite numbers, of "
                f"{self.robot.name}, got {list(given.shape)} "
                f"({np.count_nonzero(~np.isfinite(given))} not finite). Use a policy of this robot."
            )
        self._held.append(given)
        reward = np.zeros(self.num_envs, np.float32)
        if len(self._held) == self.robot.chunk:
            chunk = torch.from_numpy(np.stack(self._held, 1))
            self._held = []
            self._seen, judged, *flags, info = self.rows.step(chunk)
            reward = judged.float().cpu().numpy()
            self._ended = [*(flag.numpy() for flag in flags), info["success"]]
        terminated, truncated, won = self._ended
        return shown(self.robot, self._seen), reward, terminated, truncated, {"is_success": won}

    def render(self) -> tuple[np.ndarray, ...]:
        """Of each row the present views side by side `[H, V * W, 3]` uint8."""
        pixels = shown(self.robot, self._seen)["pixels"].values()
        return tuple(np.concatenate(views, 1) for views in zip(*pixels, strict=True))

    def call(self, name: str) -> tuple:
        """An attribute, or what a method gives, of every row."""
        found = getattr(self, name)
        return found() if callable(found) else (found,) * self.num_envs

    def get_attr(self, name: str) -> tuple:
        """An attribute of every row."""
        return self.call(name)
