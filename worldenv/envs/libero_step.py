"""One control step of LIBERO's robosuite environment, bit-identical to the original and several times cheaper.

robosuite 1.4.0 runs 25 physics substeps per control step and in each of them evaluates the whole
forward dynamics three times (before the controller, inside it, inside mj_step), four Jacobians of the
same site and every observable. The controller only needs what depends on position and velocity, so
mj_step1, controller, mj_step2 gives the same numbers from one evaluation. Nothing else is changed:
the controller's own arithmetic is called as it is, on arrays of the same values and layout, and
tests/envs/test_libero.py compares whole trajectories bit for bit.

Liberties: observables, rewards, the step counter and the horizon of the original are not kept up;
`LiberoSimulator` reads the state itself.
"""

from typing import Any

import mujoco
import numpy as np


class ControlStep:
    """Steps `env`, a LIBERO environment of one Panda arm under an OSC controller.

    Call `begin_episode` after every `env.reset()` (which builds a new controller), then the object
    itself once per action.
    """

    def __init__(self, env: Any) -> None:
        self.env = env
        self.robot = env.robots[0]
        self.model = env.sim.model._model
        self.data = env.sim.data._data
        self.substeps = int(env.control_timestep / env.model_timestep)
        gripper = self.robot.gripper
        self._site = self.robot.eef_site_id
        self._arm = np.array(self.robot._ref_joint_actuator_indexes)
        self._fingers = np.array(self.robot._ref_joint_gripper_actuator_indexes)
        self._torque_low, self._torque_high = (np.array(x) for x in self.robot.torque_limits)
        finger_range = self.model.actuator_ctrlrange[self._fingers]
        self._finger_bias = 0.5 * (finger_range[:, 1] + finger_range[:, 0])
        self._finger_weight = 0.5 * (finger_range[:, 1] - finger_range[:, 0])
        self._initial_finger_action = np.zeros(gripper.dof)
        nv = self.model.nv
        self._jacp, self._jacr = np.zeros((3, nv)), np.zeros((3, nv))
        self._mass = np.zeros((nv, nv))
        self._geoms: dict[str, frozenset[int]] = {}
        env.check_contact = self.in_contact

    def begin_episode(self) -> None:
        """Takes over the new controller; clears the gripper's ramp, which a soft reset leaves behind."""
        self.robot.gripper.current_action = self._initial_finger_action.copy()
        self.controller = self.robot.controller
        self.controller.update = self._update_controller
        self._joints = self.controller.qvel_index
        self._joint_positions = self.controller.qpos_index

    def __call__(self, action: np.ndarray) -> None:
        """Applies `action` [7] (OSC_POSE delta 6, gripper 1; clipped by robosuite to [-1, 1])."""
        gripper, ctrl = self.robot.gripper, self.data.ctrl
        arm_action, finger_action = action[:6], action[6:]
        for substep in range(self.substeps):
            mujoco.mj_step1(self.model, self.data)
            if substep == 0:
                self.controller.set_goal(arm_action)
            torques = self.controller.run_controller()
            fingers = gripper.format_action(finger_action)
            ctrl[self._fingers] = self._finger_bias + self._finger_weight * fingers
            ctrl[self._arm] = np.clip(torques, self._torque_low, self._torque_high)
            mujoco.mj_step2(self.model, self.data)

    def refresh(self) -> None:
        """Brings body, site, camera and light poses up to the present qpos; the physics is unmoved.

        After a step they are one substep (2 ms) old.
        """
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_comPos(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)

    def _update_controller(self, force: bool = False) -> None:
        """`Controller.update` without its forward pass; each Jacobian is computed once, not twice."""
        controller, data = self.controller, self.data
        if not (controller.new_update or force):
            return
        joints = self._joints
        controller.ee_pos = np.array(data.site_xpos[self._site])
        controller.ee_ori_mat = np.array(data.site_xmat[self._site].reshape(3, 3))
        mujoco.mj_jacSite(self.model, data, self._jacp, self._jacr, self._site)
        controller.ee_pos_vel = np.dot(self._jacp, data.qvel)
        controller.ee_ori_vel = np.dot(self._jacr, data.qvel)
        controller.joint_pos = data.qpos[self._joint_positions]
        controller.joint_vel = data.qvel[joints]
        controller.J_pos = np.array(self._jacp[:, joints])
        controller.J_ori = np.array(self._jacr[:, joints])
        controller.J_full = np.vstack([controller.J_pos, controller.J_ori])
        mujoco.mj_fullM(self.model, self._mass, data.qM)
        controller.mass_matrix = self._mass[joints, :][:, joints]
        controller.new_update = False

    def in_contact(self, geoms_1: Any, geoms_2: Any = None) -> bool:
        """`MujocoEnv.check_contact` on arrays: True if any of `geoms_1` touches any of `geoms_2`.

        Both are a geom name, a list of names, or a robosuite model; None stands for any geom.
        """
        pairs = self.data.contact.geom[: self.data.ncon]
        first = np.isin(pairs, self._geom_ids(geoms_1))
        if geoms_2 is None:
            return bool(first.any())
        second = np.isin(pairs, self._geom_ids(geoms_2))
        return bool((first & second[:, ::-1]).any())

    def _geom_ids(self, geoms: Any) -> np.ndarray:
        """Ids [n] of the named geoms; a model's are looked up once."""
        if isinstance(geoms, str | list | tuple | set):
            names = [geoms] if isinstance(geoms, str) else geoms
            return np.array([self.env.sim.model.geom_name2id(name) for name in names])
        if geoms.name not in self._geoms:
            self._geoms[geoms.name] = self._geom_ids(list(geoms.contact_geoms))
        return self._geoms[geoms.name]
