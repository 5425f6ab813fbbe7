"""One control step of LIBERO's robosuite environment: bit-identical to the original, and cheaper.

robosuite 1.4.0 runs 25 physics substeps per control step. In each it evaluates the whole forward
dynamics three times (before the controller, inside it, inside mj_step), four Jacobians of the same
site and every observable. The controller only needs what depends on position and velocity, so
mj_step1, controller, mj_step2 gives the same numbers from one evaluation. The controller's
arithmetic is robosuite's, operation by operation and on arrays of the same layout;
tests/envs/test_libero.py compares whole trajectories bit for bit.

Liberties: observables, rewards, the step counter and the horizon of the original are not kept up;
`LiberoSimulator` reads the state itself.
"""

from typing import Any

import mujoco
import numba
import numpy as np
from robosuite.utils.control_utils import (
    nullspace_torques,
    opspace_matrices,
    orientation_error,
)


@numba.njit(cache=True)
def _operational_space(
    mass, jacp, jacr, joints, joint_positions, qpos, qvel, initial_joint,
    ee_pos, ee_ori, goal_pos, goal_ori, pos_vel, ori_vel, kp, kd,
):  # fmt: skip
    """Force and torque [3], their lambdas [3, 3], the Jacobian [7, 6] and nullspace torques [7].

    One call for what robosuite does in three calls and twenty numpy operations, in its order.
    """
    n = len(joints)
    j_full, m = np.empty((n, 6)).T, np.empty((n, n)).T  # columns first, as indexing by columns does
    j_pos, j_ori = np.empty((n, 3)).T, np.empty((n, 3)).T
    joint_pos, joint_vel = np.empty(n), np.empty(n)
    for k in range(n):
        joint_pos[k], joint_vel[k] = qpos[joint_positions[k]], qvel[joints[k]]
        for i in range(3):
            j_pos[i, k] = j_full[i, k] = jacp[i, joints[k]]
            j_ori[i, k] = j_full[i + 3, k] = jacr[i, joints[k]]
        for i in range(n):
            m[i, k] = mass[joints[i], joints[k]]
    force = (goal_pos - ee_pos) * kp[:3] + -pos_vel * kd[:3]
    turn = orientation_error(goal_ori, ee_ori)
    torque = turn * kp[3:6] + -ori_vel * kd[3:6]
    _, lambda_pos, lambda_ori, nullspace = opspace_matrices(m, j_full, j_pos, j_ori)
    rest = nullspace_torques(m, nullspace, initial_joint, joint_pos, joint_vel)
    return force, torque, lambda_pos, lambda_ori, j_full.T, rest


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
        self._site = self.robot.eef_site_id
        self._arm = np.array(self.robot._ref_joint_actuator_indexes)
        self._fingers = np.array(self.robot._ref_joint_gripper_actuator_indexes)
        self._torque_low, self._torque_high = (np.array(x) for x in self.robot.torque_limits)
        finger_range = self.model.actuator_ctrlrange[self._fingers]
        self._finger_bias = 0.5 * (finger_range[:, 1] + finger_range[:, 0])
        self._finger_weight = 0.5 * (finger_range[:, 1] - finger_range[:, 0])
        nv = self.model.nv
        self._jacp, self._jacr = np.zeros((3, nv)), np.zeros((3, nv))
        self._mass, self._wrench = np.zeros((nv, nv)), np.zeros(6)
        self._qpos, self._qvel, self._bias = self.data.qpos, self.data.qvel, self.data.qfrc_bias
        self._xpos = self.data.site_xpos[self._site]
        self._xmat = self.data.site_xmat[self._site].reshape(3, 3)
        self._geoms: dict[str, np.ndarray] = {}
        env.check_contact = self.in_contact

    def begin_episode(self) -> None:
        """Takes over the new controller; clears the gripper ramp that soft resets leave behind."""
        gripper = self.robot.gripper
        gripper.current_action = np.zeros(2)  # one for each finger
        self.controller = self.robot.controller
        self.controller.update = self._update_controller
        self._joints = np.array(self.controller.qvel_index)
        self._joint_positions = np.array(self.controller.qpos_index)

    def __call__(self, action: np.ndarray) -> None:
        """Applies `action` [7] (OSC_POSE delta 6, gripper 1), whose entries lie in [-1, 1]."""
        model, data, controller = self.model, self.data, self.controller
        ctrl, arm, fingers = data.ctrl, self._arm, self._fingers
        grips = self._grips(float(np.sign(action[6])))
        for substep in range(self.substeps):
            mujoco.mj_step1(model, data)
            if substep == 0:  # robosuite's own, which after a reset goes by the state it had then
                controller.set_goal(action[:6])
                torques = controller.run_controller()
            else:
                torques = self._torques()
            ctrl[fingers] = grips[substep]
            ctrl[arm] = np.minimum(np.maximum(torques, self._torque_low), self._torque_high)
            mujoco.mj_step2(model, data)

    def _grips(self, sign: float) -> np.ndarray:
        """The fingers' controls [substeps, 2] on robosuite's ramp to open (-1) or closed (1)."""
        gripper = self.robot.gripper
        left, right = gripper.current_action.tolist()
        ramp = gripper.speed * sign
        moved = []
        for _ in range(self.substeps):
            left = min(max(left - ramp, -1.0), 1.0)
            right = min(max(right + ramp, -1.0), 1.0)
            moved.append((left, right))
        gripper.current_action = np.array(moved[-1])
        return self._finger_bias + self._finger_weight * np.array(moved)

    def _torques(self) -> np.ndarray:
        """robosuite's `run_controller` of OSC_POSE: fixed impedance, no interpolators.

        The products that robosuite leaves to numpy stay numpy's, for numba's BLAS is another.
        """
        c, qvel = self.controller, self._qvel
        mujoco.mj_jacSite(self.model, self.data, self._jacp, self._jacr, self._site)
        mujoco.mj_fullM(self.model, self._mass, self.data.qM)
        force, torque, lambda_pos, lambda_ori, j_full_t, rest = _operational_space(
            self._mass, self._jacp, self._jacr, self._joints, self._joint_positions,
            self._qpos, qvel, c.initial_joint, self._xpos, self._xmat, c.goal_pos, c.goal_ori,
            np.dot(self._jacp, qvel), np.dot(self._jacr, qvel), c.kp, c.kd,
        )  # fmt: skip
        self._wrench[:3] = np.dot(lambda_pos, force)
        self._wrench[3:] = np.dot(lambda_ori, torque)
        torques = np.dot(j_full_t, self._wrench) + self._bias[self._joints]
        torques += rest
        return torques

    def refresh(self) -> None:
        """Brings body, site, camera and light poses up to the present qpos; the physics is unmoved.

        After a step they are one substep (2 ms) old.
        """
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_comPos(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)

    def _update_controller(self, force: bool = False) -> None:
        """`Controller.update` without its forward pass, and with each Jacobian computed once."""
        c, data, joints = self.controller, self.data, self._joints
        if not (c.new_update or force):
            return
        qvel = data.qvel
        c.ee_pos = data.site_xpos[self._site].copy()
        c.ee_ori_mat = data.site_xmat[self._site].reshape(3, 3).copy()
        mujoco.mj_jacSite(self.model, data, self._jacp, self._jacr, self._site)
        c.ee_pos_vel = np.dot(self._jacp, qvel)
        c.ee_ori_vel = np.dot(self._jacr, qvel)
        c.joint_pos = data.qpos[self._joint_positions]
        c.joint_vel = qvel[joints]
        c.J_pos = self._jacp[:, joints]
        c.J_ori = self._jacr[:, joints]
        c.J_full = np.concatenate([c.J_pos, c.J_ori])
        mujoco.mj_fullM(self.model, self._mass, data.qM)
        c.mass_matrix = self._mass[joints, :][:, joints]
        c.new_update = False

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
