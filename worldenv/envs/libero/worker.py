"""Real LIBERO inside one process: `LiberoSimulator`, a robosuite environment that is cheap to step.

The policy looks once per action chunk, so nothing is rendered or observed until asked for. Resets
are soft (the model is compiled once); what a soft reset of robosuite leaves behind is put back by
hand, so that the same `Start` and actions give the same bits whatever ran before.

Liberties against LIBERO's own wrapper:
- observations show the present state; robosuite's lag up to one control step, for it samples its
  sensors in the first substep;
- force and torque sensors are not evaluated;
- reflections are not drawn (half the rendering time; pixels change by 0.9/255 on average);
- fresh placements put objects relative to fixtures as a hard reset does; robosuite's soft reset
  adds the previous episode's fixture pose to them, which throws objects off the table;
- fresh placements are like the benchmark's init states: the arm's joints deviate as theirs do,
  objects were placed among another draw's fixtures (a cabinet up to two centimetres off: a bowl is
  beside its place in the drawer), and are let down slowly; LIBERO draws them above the table, and
  those that overlap would throw each other off it (one in twelve in libero_spatial's task 8).
"""

import atexit
import threading
import weakref
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from worldenv.data.episode import area_resize, continuous_axis_angle
from worldenv.data.libero_tasks import SUITES, instruction_of
from worldenv.envs.libero.assets import configure_libero, is_primitive, libero_root, robot_for
from worldenv.envs.libero.expert import plan
from worldenv.envs.libero.robot import CAMERAS
from worldenv.envs.start import Start
from worldenv.runtime.errors import UserError, unknown

SETTLING_STEPS = 10
SETTLING_ACTION = np.array([0, 0, 0, 0, 0, 0, -1], dtype=np.float64)
LETTING_DOWN = 250  # physics steps of 2 ms
SLOW = np.array([0.1, 0.1, 0.2, 1.0, 1.0, 1.0])  # m/s, rad/s
JOINT_NOISE = 0.02  # rad, standard deviation in the benchmark's init states


class LiberoSimulator:
    """One task of a LIBERO suite in this process. Built at the first use, not at construction.

    The GL context belongs to the thread that builds it: use one simulator from one thread.
    """

    def __init__(
        self, suite: str, task: int, *, assets: Path, image_size: int = 64, render_size: int = 128
    ) -> None:
        """`assets` is a resolved folder (`assets.resolve_assets(...).path`).

        Images are rendered at `render_size` pixels and averaged to `image_size`, at most as many.
        Raises UserError for an unknown suite or task and for an image larger than rendered.
        """
        if suite not in SUITES:
            raise unknown("LIBERO suite", suite, SUITES)
        if not 0 <= task < len(SUITES[suite]):
            raise UserError(
                f"{suite} has tasks 0 to {len(SUITES[suite]) - 1}, got task {task}. "
                "Name one of these."
            )
        if not 1 <= image_size <= render_size:
            raise UserError(
                f"image_size must be from 1 to render_size {render_size}, got {image_size}."
            )
        self.suite, self.task = suite, task
        self.instruction = instruction_of(SUITES[suite][task])
        self.image_size, self.render_size = image_size, render_size
        self._assets = Path(assets)
        self._env: Any = None

    @property
    def env(self) -> Any:
        """The raw LIBERO environment (what LIBERO's own wrapper calls `.env`)."""
        if self._env is None:
            self._build()
        return self._env

    @property
    def sim(self) -> Any:
        """robosuite's `MjSim`: `.model`, `.data`."""
        return self.env.sim

    @property
    def goal_state(self) -> list[list[str]]:
        """The goal as predicates, such as `[["on", "akita_black_bowl_1", "plate_1"]]`."""
        return self.env.parsed_problem["goal_state"]

    def reset(self, start: Start, init_state: np.ndarray | None = None) -> None:
        """Begins the episode `start`: fixture poses from its seed, init state or sampled placement.

        Then lets the scene settle for 10 steps. `init_state` [1 + nq + nv]: that of `start.index`,
        if the caller has read it (`read_init_state`, which imports torch). Raises UserError for
        another task's start or an init state that does not exist.
        """
        if start.task != self.task:
            raise UserError(
                f"This simulator holds task {self.task}, got a start of task {start.task}."
            )
        if init_state is None:
            init_state = read_init_state(self.suite, start)
        env, sampled = self.env, init_state is None
        if sampled:
            self._reset_scene(placement_seed(start.seed))
            self._let_down()
            init_state = self.sim.get_state().flatten()
        self._reset_scene(start.seed)
        env.sim.set_state_from_flattened(init_state)
        if sampled:
            self._disturb_arm()
            self._let_down()
        env.sim.forward()
        env._check_success()  # reads switches (the stove's) here, which decide what is drawn
        env._post_process()
        for _ in range(SETTLING_STEPS):
            self.step(SETTLING_ACTION)

    def step(self, action: np.ndarray) -> bool:
        """One control step (50 ms) of `action` [7], clipped to [-1, 1]; True if the goal holds."""
        self._step(np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0))
        success = bool(self._env._check_success())
        self._env._post_process()
        return success

    def proprio(self) -> np.ndarray:
        """[8] float32: end-effector position (m), axis-angle (rad, no jump), gripper qpos (m)."""
        self._step.refresh()
        robot, data = self._env.robots[0], self._env.sim.data
        w, *xyz = data.get_body_xquat(robot.robot_model.eef_name)
        angle = 2.0 * np.arccos(np.clip(w, -1.0, 1.0))
        axis = np.array(xyz) / max(np.linalg.norm(xyz), 1e-12)
        return np.concatenate(
            [
                data.site_xpos[robot.eef_site_id],
                continuous_axis_angle(axis * angle),
                data.qpos[robot._ref_gripper_joint_pos_indexes],
            ]
        ).astype(np.float32)

    def observe(self) -> dict[str, np.ndarray]:
        """Renders now: image [V, H, W, 3] uint8 upright, proprio [8] float32; and `objects`."""
        proprio = self.proprio()
        size = self.render_size
        self._context.gl_ctx.make_current()
        # LIBERO's cameras look at the table upside down: half a turn makes the image upright.
        views = [
            self._env.sim.render(camera_name=name, width=size, height=size)[::-1, ::-1]
            for name in CAMERAS
        ]
        image = area_resize(np.stack(views), self.image_size)
        return {"image": image, "proprio": proprio, "objects": self.objects()}

    def objects(self) -> dict[str, np.ndarray]:
        """Where the things are that the goal names, [3] in m: what is moved comes first. As of the
        last `proprio`. For measuring only: nothing that learns or acts may see it."""
        env, data = self._env, self.sim.data._data
        names = dict.fromkeys(name for goal in self.goal_state for name in goal[1:])
        bodies = env.obj_body_id  # of things; regions are sites
        return {
            name: np.float32(data.xpos[bodies[name]] if name in bodies else data.site(name).xpos)
            for name in names
        }

    def expert(self, attempt: int) -> Iterator[np.ndarray]:
        """Clean actions [7] that solve the task from the present reset (`expert.plan`)."""
        return plan(self, attempt)

    def state(self) -> np.ndarray:
        """Everything the physics goes on from (time, qpos, qvel, warm start, controls), float64."""
        import mujoco

        model, data = self.sim.model._model, self.sim.data._data
        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        state = np.empty(mujoco.mj_stateSize(model, kind))
        mujoco.mj_getState(model, data, state, kind)
        return state

    def close(self) -> None:
        """Frees the simulator and its GL context. Safe to call twice; a later use rebuilds."""
        env, self._env = self._env, None
        if env is not None:
            self._context = self._step = None
            env.close()

    def _build(self) -> None:
        """Imports LIBERO and compiles the task's scene; seconds, and about a gigabyte."""
        configure_libero(self._assets)
        import mujoco
        import robosuite
        from libero.libero.envs import TASK_MAPPING
        from libero.libero.envs.bddl_utils import get_problem_info

        from worldenv.envs.libero.step import ControlStep

        name = SUITES[self.suite][self.task]
        file = libero_root() / "bddl_files" / self.suite / f"{name}.bddl"
        np.random.seed(0)  # noqa: NPY002 - robosuite draws from the global generator
        problem = TASK_MAPPING[get_problem_info(str(file))["problem_name"]]
        # Our pack's images are averaged afterwards; four samples a pixel would triple their cost.
        averaged = is_primitive(self._assets) and self.render_size > self.image_size
        env = _pristine(problem, samples=0 if averaged else 4)(
            str(file),
            robots=[robot_for(self._assets)],
            controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
            gripper_types="default",
            initialization_noise=None,
            use_camera_obs=False,
            has_renderer=False,
            has_offscreen_renderer=True,
            control_freq=20,
            hard_reset=False,
            camera_names=list(CAMERAS),
        )
        env._observables = {}  # each would be evaluated in every one of the 25 substeps
        self._env, self._step = env, ControlStep(env)
        # Nothing reads force sensors, which cost a fifth of what follows the controller.
        env.sim.model._model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_SENSOR)
        self._context = env.sim._render_context_offscreen
        self._context.scn.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        # Runs before EGL's own exit handler, registered earlier; freeing after it prints noise.
        alive = weakref.ref(self)
        atexit.register(lambda: alive() and alive().close())

    def _reset_scene(self, seed: int) -> None:
        """robosuite's soft reset from a known state: fixture poses depend on `seed` alone."""
        from robosuite.utils.errors import RandomizationError

        env = self._env
        model = env.sim.model
        np.random.seed(seed % 2**32)  # noqa: NPY002 - robosuite draws from the global generator
        while True:
            model.body_pos[:], model.body_quat[:], model.site_rgba[:] = env.pristine
            try:
                env.reset()
            except RandomizationError:  # no room for an object: LIBERO draws again
                continue
            break
        self._step.begin_episode()

    def _disturb_arm(self) -> None:
        arm = self.env.robots[0]._ref_joint_pos_indexes
        noise = np.random.standard_normal(len(arm))  # noqa: NPY002 - seeded by `_reset_scene`
        self.sim.data._data.qpos[arm] += JOINT_NOISE * noise

    def _let_down(self) -> None:
        """Sinks sampled objects to the table, pushing apart those that overlap; all else rests."""
        import mujoco

        model, data = self.sim.model._model, self.sim.data._data
        free = np.flatnonzero(model.jnt_type == mujoco.mjtJoint.mjJNT_FREE)
        speeds = model.jnt_dofadr[free][:, None] + np.arange(6)
        poses = model.jnt_qposadr[free][:, None] + np.arange(7)
        fixed = np.setdiff1d(np.arange(model.nq), poses)
        still, time = data.qpos[fixed].copy(), data.time
        for _ in range(LETTING_DOWN):
            mujoco.mj_step(model, data)
            slow = np.clip(data.qvel[speeds], -SLOW, SLOW)
            data.qvel[:] = 0
            data.qvel[speeds], data.qpos[fixed] = slow, still
        data.qvel[:], data.time = 0, time


def built(**arguments: Any) -> LiberoSimulator:
    """A simulator whose scene is compiled: what a worker process makes."""
    simulator = LiberoSimulator(**arguments)
    _ = simulator.env
    return simulator


def _pristine(problem: type, samples: int) -> type:
    """`problem` with an attribute `pristine`: the model fields a reset changes, as compiled.

    samples: per pixel when rendering, 4 is MuJoCo's default; fixed once its GL context exists.
    """

    def initialize(self: Any, xml_string: str | None = None) -> None:
        problem._initialize_sim(self, xml_string)
        model = self.sim.model
        model.vis.quality.offsamples = samples
        self.pristine = (model.body_pos.copy(), model.body_quat.copy(), model.site_rgba.copy())

    # LIBERO compares the class's name with the problem's, so it is kept.
    return type(problem)(problem.__name__, (problem,), {"_initialize_sim": initialize})


def placement_seed(seed: int) -> int:
    """Seed of a sampled placement's objects in the episode whose fixtures `seed` draws."""
    return int(np.random.SeedSequence(seed % 2**32).generate_state(1)[0])


def read_init_state(suite: str, start: Start) -> np.ndarray | None:
    """The benchmark's init state [1 + nq + nv] of a start, None for a sampled placement.

    Raises UserError if the benchmark has no such state.
    """
    if start.index is None:
        return None
    states = _init_states(suite, start.task)
    if not 0 <= start.index < len(states):
        raise UserError(
            f"{suite} task {start.task} has init states 0 to {len(states) - 1}, got {start.index}. "
            "Use one of these, or None for a sampled placement."
        )
    return states[start.index]


_READING = threading.Lock()


@cache
def _init_states(suite: str, task: int) -> np.ndarray:
    """All init states [50, 1 + nq + nv] of a task, read without running pickled code."""
    import torch

    path = libero_root() / "init_files" / suite / f"{SUITES[suite][task]}.pruned_init"
    rebuild = np.zeros(0).__reduce__()[0]
    allowed = [
        (rebuild, "numpy.core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        np.dtypes.Float64DType,
    ]
    try:
        # What is allowed is the process's, not the thread's: another's end would end ours.
        with _READING, torch.serialization.safe_globals(allowed):
            return np.asarray(torch.load(path, weights_only=True))
    except FileNotFoundError as error:
        raise UserError(
            f"LIBERO's init states are missing: expected {path}. Reinstall hf-libero==0.1.4."
        ) from error
