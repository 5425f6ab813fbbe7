"""One task of Meta-World in this process: the package's own physics, success and expert.

Nothing is rendered until asked for. Liberties: an episode begins from cleared physics and the model
as compiled, so that the same start gives the same bits whatever ran before (the package's `reset`
goes on from where it is, and draws twice); there is no limit of 500 steps; the goal is always
shown, to cameras by its marker and to the expert by its place, and is no part of proprio; the
first camera sees 40 degrees, not 60, for at 64 pixels things were specks; and pictures lack
shadows, reflections and sky, and multisampling, for they are averaged down: without a GPU they are
drawn ten times as fast.
"""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import mujoco
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP

from worldenv.data.episode import area_resize
from worldenv.envs.metaworld.tasks import CAMERAS, TASKS
from worldenv.envs.start import Start

_MODEL = ("body_pos", "body_quat", "site_pos", "geom_pos", "geom_quat", "geom_rgba", "site_rgba")
_FIELD = {"corner4": 40.0}  # degrees
_OMITTED = (
    mujoco.mjtRndFlag.mjRND_SHADOW,
    mujoco.mjtRndFlag.mjRND_REFLECTION,
    mujoco.mjtRndFlag.mjRND_SKYBOX,
)


class Sawyer:
    """An arm over a table. The GL context belongs to the thread that looks first."""

    def __init__(
        self, suite: str, task: int, image_size: int, render_size: int, views: int
    ) -> None:
        """Images are rendered at `render_size` pixels and averaged to `image_size`."""
        self.task, self.image_size, self.render_size = task, image_size, render_size
        self.cameras = CAMERAS[:views]
        name = f"{TASKS[suite][task]}-v3"
        np.random.seed(0)  # noqa: NPY002 - some of its constructors draw from the global generator
        env = ALL_V3_ENVIRONMENTS[name]()
        env._partially_observable = False
        del env.sawyer_observation_space  # computed anew, with the goal
        env._freeze_rand_vec, env.seeded_rand_vec = False, True
        env._set_task_called, env.max_path_length = True, np.inf
        env.model.vis.quality.offsamples = 0
        for camera, degrees in _FIELD.items():
            env.model.cam_fovy[env.model.camera(camera).id] = degrees
        self.env, self.policy = env, ENV_POLICY_MAP[name]()
        self._pristine = {k: getattr(env.model, k).copy() for k in _MODEL}
        known = {k: v for k, v in vars(env).items() if k not in ("model", "data")}
        self._facts = {k: copy.deepcopy(v) for k, v in known.items() if _plain(v)}
        self._renderer: Any = None

    def reset(self, start: Start) -> None:
        """A numbered start is drawn from its number, a fresh one from its seed."""
        env, fresh = self.env, start.index is None
        for name, value in self._pristine.items():
            getattr(env.model, name)[:] = value
        vars(env).update(copy.deepcopy(self._facts))
        mujoco.mj_resetData(env.model, env.data)
        seeds = np.random.SeedSequence([fresh, start.seed if fresh else start.index])
        seed = int(seeds.generate_state(1)[0])
        np.random.seed(seed)  # noqa: NPY002 - a few tasks draw from the global generator
        env.seed(seed)
        env.reset_model()
        mujoco.mj_forward(env.model, env.data)
        env._prev_obs = env._get_curr_obs_combined_no_goal()
        self._seen = env._get_obs()

    def step(self, action: np.ndarray) -> bool:
        """12.5 ms of a hand's motion (1 is a centimetre) and the fingers' force (1 closes)."""
        action = np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        self._seen, _, _, _, info = self.env.step(action)
        return bool(info["success"])

    def observe(self) -> dict[str, np.ndarray]:
        """Renders now: image [V, H, W, 3], proprio [4]: hand and opening of the fingers in m."""
        model, data = self.env.model, self.env.data
        if self._renderer is None:
            self._renderer = mujoco.Renderer(model, self.render_size, self.render_size)
            self._renderer.scene.flags[[int(flag) for flag in _OMITTED]] = 0
        sites = data.site_xpos.copy()
        for name, place in self.env._target_site_config:
            self.env._set_pos_site(name, place)
        views = []
        for camera in self.cameras:
            self._renderer.update_scene(data, camera=camera)
            views.append(self._renderer.render()[::-1, ::-1])
        data.site_xpos[:] = sites
        claws = (data.body(name).xpos for name in ("rightclaw", "leftclaw"))
        opening = np.linalg.norm(np.subtract(*claws))
        return {
            "image": area_resize(np.stack(views), self.image_size),
            "proprio": np.array([*data.body("hand").xpos, opening], np.float32),
            "objects": {"thing": np.float32(self.env._get_pos_objects()[:3])},
        }

    def expert(self, attempt: int) -> Iterator[np.ndarray]:
        """The package's script; it sees where things are."""
        while True:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it asks for more than an action can be
                action = self.policy.get_action(self._seen)
            yield np.clip(action, -1.0, 1.0).astype(np.float32)

    def close(self) -> None:
        """Frees the GL context."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


def _plain(value: Any) -> bool:
    """Whether a fact of the environment is its own, and can be put back."""
    return isinstance(value, (np.ndarray, bool, int, float, str, tuple, list, dict, type(None)))
