"""LIBERO's HDF5 layout: one demonstration group to an Episode and back.

Two conventions are in use for `obs`. Files of LIBERO's own writer hold the observation *after*
action t in row t; openvla's regenerated files, and ours, hold the one *before* it. Ours say so in
an attribute. For others the convention is *measured*: `states` holds the simulator state before
action t (time, then joint positions, the arm's seven first), so comparing its arm joints with
`obs/joint_states` settles it. Where that comparison cannot decide, reading stops and asks for the
argument.

What we add to the layout: attributes `observations` and `worldenv` (JSON) on each demonstration,
`frame_steps` when frames are sparse, and a sibling group `final_obs` with the observation after the
last action. Liberty: LIBERO's `states` and `model_file` are not written, so simulator replay needs
its files.
"""

from __future__ import annotations

import json
from typing import Any

import h5py
import numpy as np

from worldenv.data.episode import (
    ACTION_DIMS,
    Episode,
    area_resize,
    check_episode,
    continuous_axis_angle,
)
from worldenv.data.libero_tasks import instruction_of, locate_task
from worldenv.runtime.errors import UserError

FORMAT = 1
CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")
_LOW_DIM = ("ee_pos", "ee_ori", "ee_states", "gripper_states")
_CONVENTIONS = ("before", "after")


def write_demo(group: h5py.Group, episode: Episode, identity: str) -> None:
    """Write an Episode into an empty `demo_i` group; `identity` is unique to the episode."""
    try:
        facts = json.dumps(
            {
                "format": FORMAT,
                "id": identity,
                "suite": episode.suite,
                "task": int(episode.task),
                "instruction": episode.instruction,
                "start": None if episode.start is None else int(episode.start),
                "seed": int(episode.seed),
                "source": episode.source,
                "success": bool(episode.success),
                "meta": episode.meta,
            }
        )
    except TypeError as error:
        raise UserError(
            f"{group.file.filename}: meta: expected values that JSON can hold, got "
            f"{episode.meta!r} ({error}). Convert arrays with .tolist()."
        ) from error
    steps = len(episode)
    inside = episode.frame_steps < steps
    group.attrs["observations"] = "before"
    group.attrs["worldenv"] = facts
    group.attrs["num_samples"] = steps
    group.create_dataset("actions", data=episode.actions.astype(np.float32))
    group.create_dataset("dones", data=episode.dones.astype(np.uint8))
    group.create_dataset("rewards", data=episode.dones.astype(np.uint8))
    if int(inside.sum()) == steps:
        group.create_dataset("robot_states", data=_robot_states(episode.proprio[inside]))
    else:
        group.create_dataset("frame_steps", data=episode.frame_steps.astype(np.int64))
    _write_observations(group.create_group("obs"), episode, inside)
    if not inside.all():
        _write_observations(group.create_group("final_obs"), episode, ~inside)


def _write_observations(group: h5py.Group, episode: Episode, rows: np.ndarray) -> None:
    raw = episode.images[rows][:, :, ::-1, ::-1]
    for view in range(raw.shape[1]):
        group.create_dataset(CAMERAS[view], data=np.ascontiguousarray(raw[:, view]))
    proprio = episode.proprio[rows].astype(np.float32)
    group.create_dataset("ee_states", data=proprio[:, :6])
    group.create_dataset("ee_pos", data=proprio[:, :3])
    group.create_dataset("ee_ori", data=proprio[:, 3:6])
    group.create_dataset("gripper_states", data=proprio[:, 6:])
    for name, values in episode.extras.items():
        group.create_dataset(name, data=np.asarray(values)[rows])


def _robot_states(proprio: np.ndarray) -> np.ndarray:
    """Proprio [T, 8] to LIBERO's robot state [T, 9]: gripper 2, position 3, quaternion xyzw 4."""
    rotation = proprio[:, 3:6].astype(np.float64)
    angle = np.linalg.norm(rotation, axis=1, keepdims=True)
    axis = rotation / np.maximum(angle, 1e-9)
    quaternion = np.concatenate([axis * np.sin(angle / 2), np.cos(angle / 2)], axis=1)
    return np.concatenate([proprio[:, 6:], proprio[:, :3], quaternion], axis=1).astype(np.float32)


def detect_convention(demos: list[h5py.Group]) -> str | None:
    """The convention ("before" or "after") by comparing `states` with `obs/joint_states`; None when
    it does not show.
    """
    votes = set()
    for demo in demos:
        if "states" not in demo or "obs/joint_states" not in demo:
            continue
        states, joints = demo["states"][()], demo["obs/joint_states"][()]
        if len(states) != len(joints) or len(states) < 2 or states.shape[1] < 8:
            continue
        arm = states[1:, 1:8]
        same = np.abs(joints[1:] - arm).mean()
        ahead = np.abs(joints[:-1] - arm).mean()
        # A robot at rest satisfies both; one must explain the motion clearly better.
        if same < ahead / 3:
            votes.add("before")
        elif ahead < same / 3:
            votes.add("after")
    return votes.pop() if len(votes) == 1 else None


def read_demo(
    demo: h5py.Group,
    where: str,
    *,
    observations: str | None,
    image_size: int | None,
    defaults: dict[str, Any],
) -> Episode:
    """One `demo_i` group as an Episode.

    `observations` ("before" or "after") is used for demonstrations that do not state their own.
    `defaults` gives suite, task, instruction and source for files that do not hold them. In an
    "after" file nobody saw the state before the first action, so that action is left out.
    """
    try:
        facts = json.loads(demo.attrs["worldenv"]) if "worldenv" in demo.attrs else None
    except ValueError as error:
        raise UserError(
            f"{where}: attribute `worldenv`: expected JSON, got {error}. Record the episode again."
        ) from error
    if facts is not None and facts.get("format") != FORMAT:
        raise UserError(
            f"{where}: expected format {FORMAT}, got {facts.get('format')!r}. "
            "The file was written by another version of worldenv: read it with that one."
        )
    convention = demo.attrs.get("observations", observations)
    if convention not in _CONVENTIONS:
        raise UserError(
            f"{where}: cannot tell whether `obs` rows were taken before or after each action: "
            "expected `states` and `obs/joint_states` that agree on it, or an attribute "
            f"`observations`, got {convention!r}. "
            "Pass observations='after' for LIBERO's own files, 'before' for openvla's."
        )
    actions = _array(demo, "actions", where)
    if actions.ndim != 2 or actions.shape[1] != ACTION_DIMS:
        raise UserError(
            f"{where}: actions: expected shape [T, {ACTION_DIMS}], got {list(actions.shape)}. "
            "Convert the actions to OSC_POSE deltas and one gripper command."
        )
    dones = _array(demo, "dones", where).astype(bool)
    images, proprio, extras = _observations(demo, "obs", where, image_size)
    frame_steps = _frame_steps(demo, where, len(actions), len(proprio))
    if "final_obs" in demo:
        last = _observations(demo, "final_obs", where, image_size)
        images = np.concatenate([images, last[0]])
        proprio = np.concatenate([proprio, last[1]])
        extras = {k: np.concatenate([v, last[2][k]]) for k, v in extras.items() if k in last[2]}
    success = bool(dones.any()) if facts is None else bool(facts["success"])
    if convention == "after":
        actions, dones = actions[1:], dones[1:]
    facts = facts or {"start": None, "seed": 0, "meta": {}, **defaults}
    episode = Episode(
        suite=facts["suite"],
        task=facts["task"],
        instruction=facts["instruction"],
        start=facts["start"],
        seed=facts["seed"],
        source=facts["source"],
        actions=actions.astype(np.float32),
        dones=dones,
        frame_steps=frame_steps,
        images=images,
        proprio=proprio,
        success=success,
        meta=facts["meta"],
        extras=extras,
    )
    check_episode(episode, where)
    return episode


def _array(group: h5py.Group, name: str, where: str) -> np.ndarray:
    if name not in group or not isinstance(group[name], h5py.Dataset):
        raise UserError(
            f"{where}: expected a dataset `{name}`, got only {sorted(group)}. "
            "The file does not follow LIBERO's layout: convert it, or point to another file."
        )
    try:
        return group[name][()]
    except OSError as error:
        raise UserError(
            f"{where}: {name}: expected readable data, got {error}. "
            "The file is damaged: copy or record it again."
        ) from error


def _frame_steps(demo: h5py.Group, where: str, steps: int, rows: int) -> np.ndarray:
    """Steps of all frames, those of `obs` first and the final one last."""
    if "frame_steps" in demo:
        return demo["frame_steps"][()].astype(np.int64)
    if rows != steps:
        raise UserError(
            f"{where}: obs: expected one row per action ({steps}) or a dataset `frame_steps`, got "
            f"{rows} rows. The demonstration was cut off: leave it out."
        )
    return np.arange(steps + ("final_obs" in demo), dtype=np.int64)


def _observations(
    demo: h5py.Group, name: str, where: str, image_size: int | None
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Images [F, V, H, W, 3] uint8 upright, proprio [F, 8] float32 and further low-dimensional
    rows.
    """
    if name not in demo:
        raise UserError(
            f"{where}: expected a group `{name}`, got only {sorted(demo)}. The file holds no "
            "observations: create them from it with LIBERO's create_dataset.py."
        )
    group, where = demo[name], f"{where}/{name}"
    views = []
    for camera in CAMERAS:
        if camera != CAMERAS[0] and camera not in group:
            continue
        raw = _array(group, camera, where)
        if raw.dtype != np.uint8 or raw.ndim != 4 or raw.shape[-1] != 3:
            raise UserError(
                f"{where}/{camera}: expected uint8 [T, H, W, 3], got {raw.dtype} "
                f"{list(raw.shape)}. Store images as 8-bit RGB in 0..255."
            )
        if image_size is not None:
            raw = area_resize(raw, image_size, f"{where}/{camera}")
        views.append(raw[:, ::-1, ::-1])
    if "ee_pos" not in group and "ee_states" in group:
        pose = _array(group, "ee_states", where)
    else:
        pose = np.concatenate([_array(group, k, where) for k in ("ee_pos", "ee_ori")], axis=-1)
    gripper = _array(group, "gripper_states", where)
    lengths = {len(view) for view in views} | {len(pose), len(gripper)}
    if len(lengths) > 1 or len({view.shape for view in views}) > 1:
        shapes = [list(v.shape) for v in (*views, pose, gripper)]
        raise UserError(
            f"{where}: expected equally many rows and equal image sizes, got shapes {shapes}. "
            "The demonstration was cut off: leave it out."
        )
    rotation = continuous_axis_angle(pose[:, 3:6])
    proprio = np.concatenate([pose[:, :3], rotation, gripper], axis=1).astype(np.float32)
    known = (*CAMERAS, *_LOW_DIM)
    extras = {k: group[k][()] for k in sorted(group) if k not in known and group[k].ndim <= 2}
    return np.stack(views, axis=1), proprio, extras


def file_defaults(data: h5py.Group, stem: str, folder: str) -> dict[str, Any]:
    """Suite, task id, instruction and source of a file that is not ours.

    `stem` is the file name without `_demo.hdf5`. Tasks outside the four ten-task suites get id -1;
    the suite is then the folder's name.
    """
    located = locate_task(stem)
    instruction = instruction_of(stem)
    if "problem_info" in data.attrs:
        try:
            stated = json.loads(data.attrs["problem_info"]).get("language_instruction", "")
        except (ValueError, AttributeError) as error:
            raise UserError(
                f"{data.file.filename}: attribute `problem_info`: expected a JSON object, got "
                f"{data.attrs['problem_info']!r} ({error}). Download or convert the file again."
            ) from error
        instruction = "".join(stated).strip().strip('"') or instruction
    suite, task = located if located is not None else (folder, -1)
    return {"suite": suite, "task": task, "instruction": instruction, "source": "demonstration"}


def write_file_facts(data: h5py.Group, episode: Episode) -> None:
    """The attributes that LIBERO's and robomimic's readers look for on the `data` group."""
    problem = {"problem_name": episode.suite, "language_instruction": episode.instruction}
    data.attrs["problem_info"] = json.dumps(problem)
    data.attrs["env_args"] = json.dumps(
        {"type": 1, "env_name": episode.suite, "problem_name": episode.suite, "env_kwargs": {}}
    )
    data.attrs["env_name"] = episode.suite
    data.attrs["tag"] = "worldenv"


def count_file(data: h5py.Group) -> None:
    """Bring `num_demos` and `total` up to date."""
    data.attrs["num_demos"] = len(data)
    data.attrs["total"] = int(
        sum(int(d.attrs.get("num_samples", len(d["actions"]))) for d in data.values())
    )
