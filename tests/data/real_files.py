"""One scripted episode replayed in LIBERO's own environment, observables and all, and its file."""

import h5py
import numpy as np

from worldenv.data.libero_tasks import SUITES
from worldenv.envs.expert import demonstrate
from worldenv.envs.libero.assets import libero_root, resolve_assets, robot_for
from worldenv.envs.libero.robot import ACTION
from worldenv.envs.libero.worker import LiberoSimulator, read_init_state
from worldenv.envs.start import Start

NAMES = {  # in files: in robosuite's observations
    "agentview_rgb": "agentview_image",
    "eye_in_hand_rgb": "robot0_eye_in_hand_image",
    "ee_pos": "robot0_eef_pos",
    "ee_ori": "robot0_eef_quat",
    "gripper_states": "robot0_gripper_qpos",
    "joint_states": "robot0_joint_pos",
}


def record(suite: str, task: int) -> dict:
    """actions [T, 7], states [T, S] before them, and observations [T + 1, ...] (NAMES' keys)."""
    assets, start = resolve_assets(None, suite).path, Start(task, 0, 5)
    simulator = LiberoSimulator(suite, task, assets=assets)
    rng = np.random.default_rng(0)
    actions = demonstrate(simulator, start, simulator.expert, ACTION, noise=0.25, rng=rng).executed
    simulator.close()
    import robosuite.utils.transform_utils as transforms
    from libero.libero.envs.env_wrapper import ControlEnv

    file = libero_root() / "bddl_files" / suite / f"{SUITES[suite][task]}.bddl"
    np.random.seed(start.seed)  # noqa: NPY002 - robosuite draws from the global generator
    env = ControlEnv(str(file), robots=[robot_for(assets)], hard_reset=False, camera_heights=64,
                     camera_widths=64)  # fmt: skip
    env.reset()
    seen = env.set_init_state(read_init_state(suite, start))
    for _ in range(10):  # the scene settles
        seen, *_ = env.step([0] * 6 + [-1])
    moments, states = [seen], []
    for action in actions:
        states.append(env.get_sim_state())
        seen, *_ = env.step(action)
        moments.append(seen)
    env.close()
    found = {name: np.stack([m[key] for m in moments]) for name, key in NAMES.items()}
    found["ee_ori"] = np.stack([transforms.quat2axisangle(q) for q in found["ee_ori"]])
    return {"actions": actions, "states": np.stack(states), **found}


def write(path, moments: dict, convention: str, way: list[int], states: bool) -> None:
    """A file of that one demonstration; way: steps along rows and columns of stored images."""
    pick = slice(1, None) if convention == "after" else slice(0, -1)
    with h5py.File(path, "w") as file:
        demo = file.create_group("data/demo_0")
        demo["actions"] = moments["actions"]
        demo["dones"] = np.eye(len(moments["actions"]), dtype=np.uint8)[-1]
        if states:
            demo["states"] = moments["states"]
        for name in NAMES:
            values = moments[name]
            turned = values[:, :: way[0], :: way[1]] if name.endswith("rgb") else values
            demo[f"obs/{name}"] = turned[pick]
