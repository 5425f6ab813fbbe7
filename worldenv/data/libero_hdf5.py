"""LIBERO's HDF5 layout: one demonstration group to an Episode and back.

`libero_layout` declares the arrays, `conventions` measures what foreign files do not say (whether
`obs` was taken before or after each action, how images lie). Ours say so.

What we add to the layout: attributes `observations` and `worldenv` (JSON) on each demonstration,
`frame_steps` when frames are sparse, and a sibling group `final_obs` with the observation after the
last action. Episodes of other benchmarks have `images` and `proprio` in place of LIBERO's
observations. Liberty: LIBERO's `states` and `model_file` are not written, so simulator replay needs
its files.
"""

from __future__ import annotations

import json
from typing import Any

import h5py
import numpy as np
import scipy

from worldenv.data.conventions import CONVENTIONS, IMAGES, Conventions, check_units
from worldenv.data.episode import Episode, area_resize, check_episode, continuous_axis_angle
from worldenv.data.libero_layout import (
    CAMERAS,
    LAYOUT,
    Sizes,
    contents,
    member,
    read_array,
    read_text,
    readable,
    subgroup,
)
from worldenv.data.libero_tasks import instruction_of, locate_instruction, locate_task
from worldenv.runtime.errors import UserError

FORMAT = 1
LIBERO = "libero"  # the benchmark whose robot the layout is of
_KNOWN = {name.removeprefix("obs/") for name in LAYOUT if name.startswith("obs/")}
_FACTS = {  # what attribute `worldenv` holds, and of which type
    "id": str,
    "benchmark": str,
    "suite": str,
    "task": int,
    "instruction": str,
    "start": (int, type(None)),
    "seed": int,
    "source": str,
    "success": bool,
    "meta": dict,
}


def write_demo(group: h5py.Group, episode: Episode, identity: str) -> None:
    """Write an Episode into an empty `demo_i` group; `identity` is unique to the episode."""
    facts = facts_text(episode, identity, group.file.filename)
    steps = len(episode)
    inside = episode.frame_steps < steps
    group.attrs["observations"] = "before"
    group.attrs["worldenv"] = facts
    group.attrs["num_samples"] = steps
    group.create_dataset("actions", data=episode.actions.astype(np.float32))
    group.create_dataset("dones", data=episode.dones.astype(np.uint8))
    group.create_dataset("rewards", data=episode.dones.astype(np.uint8))
    if int(inside.sum()) == steps:
        if episode.benchmark == LIBERO:
            group.create_dataset("robot_states", data=_robot_states(episode.proprio[inside]))
    else:
        group.create_dataset("frame_steps", data=episode.frame_steps.astype(np.int64))
    _write_observations(group.create_group("obs"), episode, inside)
    if not inside.all():
        _write_observations(group.create_group("final_obs"), episode, ~inside)


def facts_text(episode: Episode, identity: str, where: str) -> str:
    """All of an episode that is no array, as JSON."""
    try:
        return json.dumps(
            {
                "format": FORMAT,
                "id": identity,
                **({} if episode.benchmark == LIBERO else {"benchmark": episode.benchmark}),
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
            f"{where}: meta: expected values that JSON can hold, got "
            f"{episode.meta!r} ({error}). Convert arrays with .tolist()."
        ) from error


def _write_observations(group: h5py.Group, episode: Episode, rows: np.ndarray) -> None:
    proprio = episode.proprio[rows].astype(np.float32)
    if episode.benchmark == LIBERO:
        raw = episode.images[rows][:, :, ::-1, ::-1]
        for view in range(raw.shape[1]):
            group.create_dataset(CAMERAS[view], data=np.ascontiguousarray(raw[:, view]))
        group.create_dataset("ee_states", data=proprio[:, :6])
        group.create_dataset("ee_pos", data=proprio[:, :3])
        group.create_dataset("ee_ori", data=proprio[:, 3:6])
        group.create_dataset("gripper_states", data=proprio[:, 6:])
    else:
        group.create_dataset("images", data=episode.images[rows])
        group.create_dataset("proprio", data=proprio)
    for name, values in episode.extras.items():
        group.create_dataset(name, data=np.asarray(values)[rows])


def _robot_states(proprio: np.ndarray) -> np.ndarray:
    """Proprio [T, 8] to LIBERO's robot state [T, 9]: gripper 2, position 3, quaternion xyzw 4."""
    rotation = scipy.spatial.transform.Rotation.from_rotvec(proprio[:, 3:6].astype(np.float64))
    parts = (proprio[:, 6:], proprio[:, :3], rotation.as_quat())
    return np.concatenate(parts, axis=1).astype(np.float32)


def own_facts(demo: h5py.Group, where: str) -> dict[str, Any] | None:
    """The facts of a demonstration that we wrote, checked; None of a foreign one."""
    text = read_text(demo, "worldenv", where)
    if text is None:
        return None
    return checked_facts(text, f"{where}: attribute `worldenv`")


def checked_facts(text: str, where: str) -> dict[str, Any]:
    """What `facts_text` wrote, checked."""
    facts = _json(text, where)
    if facts.get("format") != FORMAT:
        raise UserError(
            f"{where}: expected format {FORMAT}, got {facts.get('format')!r}. "
            "The file was written by another version of worldenv: read it with that one."
        )
    facts.setdefault("benchmark", LIBERO)
    for name, kind in _FACTS.items():
        value = facts.get(name, ...)
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not fits or (isinstance(value, int) and not -(2**63) <= value < 2**63):
            raise UserError(
                f"{where}: {name}: expected a value as worldenv writes it, got "
                f"{'none' if value is ... else repr(value)}. Record the episode again."
            )
    return facts


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: expected JSON, got {error}. Record or convert again.") from error
    if not isinstance(value, dict):
        raise UserError(
            f"{where}: expected a JSON object, got {type(value).__name__}. Record or convert again."
        )
    return value


def read_demo(
    demo: h5py.Group,
    where: str,
    *,
    conventions: Conventions,
    image_size: int | None,
    defaults: dict[str, Any],
) -> Episode:
    """One `demo_i` group as an Episode.

    `conventions` holds for demonstrations that do not state their own. `defaults` gives suite,
    task, instruction and source for files that do not hold them. In an "after" file nobody saw the
    state before the first action, so that action is left out.
    """
    facts = own_facts(demo, where)
    stated = read_text(demo, "observations", where)
    observations = stated or conventions.observations
    if observations not in CONVENTIONS:
        raise UserError(
            f"{where}: cannot tell whether `obs` rows were taken before or after each action: "
            "expected `states` and `obs/joint_states`, or gripper commands and "
            f"`obs/gripper_states`, that agree on it, got {stated or 'nothing that shows it'!r}. "
            "Say which: worldenv-train --data.observations after (observations='after') for "
            "LIBERO's own files, before for openvla's."
        )
    sizes: Sizes = {}
    names = contents(demo, where)
    other = facts is not None and facts["benchmark"] != LIBERO
    actions = read_array(demo, "actions", where, sizes, "other/actions" if other else None)
    dones = read_array(demo, "dones", where, sizes).astype(bool)
    if facts is None and not dones.any() and "rewards" in names:
        dones = read_array(demo, "rewards", where, sizes) > 0
    way = IMAGES["raw" if facts is not None else conventions.images]
    foreign = facts is None

    def observations_in(group: str, sizes: Sizes) -> tuple:
        if other:
            return _others_observations(demo, group, where, sizes, image_size)
        return _observations(demo, group, where, sizes, image_size, way, foreign)

    images, proprio, extras = observations_in("obs", sizes)
    if facts is None:
        check_units(actions, proprio[:, :3], f"{where}/actions")
    final = "final_obs" in names
    if final:
        last = observations_in("final_obs", {k: sizes[k] for k in ("H", "V", "P") if k in sizes})
        images = np.concatenate([images, last[0]])
        proprio = np.concatenate([proprio, last[1]])
        extras = _extended(extras, last[2])
    if "frame_steps" in names:
        frame_steps = read_array(demo, "frame_steps", where, sizes).astype(np.int64)
    else:
        frame_steps = _every_step(where, sizes, final)
    success = bool(dones.any()) if facts is None else facts["success"]
    if observations == "after":
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
        benchmark=facts.get("benchmark", LIBERO),
    )
    check_episode(episode, where)
    return episode


def _every_step(where: str, sizes: Sizes, final: bool) -> np.ndarray:
    """Steps of all frames, those of `obs` first and the final one last."""
    steps, rows = sizes["T"][0], sizes["F"][0]
    if rows != steps:
        raise UserError(
            f"{where}/obs: expected one row per action ({steps}) or a dataset `frame_steps`, got "
            f"{rows} rows. The demonstration was cut off: leave it out."
        )
    return np.arange(steps + final, dtype=np.int64)


def _observations(
    demo: h5py.Group,
    name: str,
    where: str,
    sizes: Sizes,
    image_size: int | None,
    way: tuple[int, int],
    ranged: bool,
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Images [F, V, H, W, 3] uint8 upright, proprio [F, 8] float32 and further low-dimensional
    rows. way: steps along rows and columns that make images upright; ranged: as in
    `read_array`.
    """
    group, where = subgroup(demo, name, where), f"{where}/{name}"
    names = contents(group, where)

    def read(array: str) -> np.ndarray:
        return read_array(group, array, where, sizes, f"obs/{array}", ranged)

    views = [read(camera) for camera in CAMERAS]
    if image_size is not None:
        views = [area_resize(v, image_size, f"{where}/{CAMERAS[0]}") for v in views]
    if "ee_pos" not in names and "ee_states" in names:
        pose = read("ee_states")
    else:
        pose = np.concatenate([read("ee_pos"), read("ee_ori")], axis=-1)
    rotation = continuous_axis_angle(pose[:, 3:])
    proprio = np.concatenate([pose[:, :3], rotation, read("gripper_states")], axis=1)
    extras = {"joint_states": read("joint_states")} if "joint_states" in names else {}
    extras |= _further(group, sorted(set(names) - _KNOWN), where, sizes)
    images = np.stack([view[:, :: way[0], :: way[1]] for view in views], axis=1)
    return images, proprio.astype(np.float32), extras


def _others_observations(
    demo: h5py.Group, name: str, where: str, sizes: Sizes, image_size: int | None
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """What `_observations` returns, of another benchmark's episode."""
    group, where = subgroup(demo, name, where), f"{where}/{name}"
    images = read_array(group, "images", where, sizes, "other/images")
    proprio = read_array(group, "proprio", where, sizes, "other/proprio")
    if image_size is not None:
        images = area_resize(images, image_size, f"{where}/images")
    more = sorted({*contents(group, where)} - {"images", "proprio"})
    return images, proprio.astype(np.float32), _further(group, more, where, sizes)


def _further(
    group: h5py.Group, names: list[str], where: str, sizes: Sizes
) -> dict[str, np.ndarray]:
    """Those arrays of `names` that are low-dimensional rows of numbers, one for each frame."""
    found = {}
    for name in names:
        rows = member(group, name, where)
        with readable(f"{where}/{name}"):
            plain = isinstance(rows, h5py.Dataset) and rows.dtype.kind in "fiub"
            if plain and 1 <= len(rows.shape or ()) <= 2 and len(rows) == sizes["F"][0]:
                found[name] = rows[()]
    return found


def _extended(extras: dict[str, np.ndarray], last: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Further rows of `obs` and `final_obs` together, where both have them."""
    alike = [k for k, v in extras.items() if k in last and last[k].shape[1:] == v.shape[1:]]
    return {k: np.concatenate([extras[k], last[k]]) for k in alike}


def file_defaults(data: h5py.Group, where: str, stem: str, folder: str) -> dict[str, Any]:
    """Suite, task id, instruction and source of a file that is not ours.

    Found by `stem`, the file name without `_demo`, else by the attributes `bddl_file_name` and
    `problem_info`. Tasks outside the four ten-task suites get id -1; the suite is then the
    folder's name.
    """
    bddl = read_text(data, "bddl_file_name", where)
    other = bddl.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".bddl") if bddl else ""
    named, written = locate_task(stem), locate_task(other)
    if named and written and named != written:
        raise UserError(
            f"{where}: expected one task, got {stem!r} by the file's name and {other!r} by its "
            "attribute `bddl_file_name`. Give the file its task's name again."
        )
    text = read_text(data, "problem_info", where)
    spoken = "" if text is None else _spoken(text, f"{where}: attribute `problem_info`")
    # A scene's name in front is of another suite, which says many of the same sentences.
    foreign = bddl is not None or instruction_of(stem) != stem.replace("_", " ")
    located = named or written or (None if foreign else locate_instruction(spoken))
    suite, task = located or (folder, -1)
    instruction = spoken or instruction_of(other if written and not named else stem)
    return {"suite": suite, "task": task, "instruction": instruction, "source": "demonstration"}


def _spoken(problem: str, where: str) -> str:
    """The language instruction in a file's problem description, "" where it holds none."""
    spoken = _json(problem, where).get("language_instruction", "")
    if isinstance(spoken, list) and all(isinstance(part, str) for part in spoken):
        # A list of words, or of letters.
        spoken = (" " if any(len(part) > 1 for part in spoken) else "").join(spoken)
    if not isinstance(spoken, str):
        raise UserError(
            f"{where}: language_instruction: expected text, got {spoken!r}. Write the instruction "
            "as text."
        )
    return spoken.strip().strip('"')


def write_file_facts(data: h5py.Group, episode: Episode) -> None:
    """The attributes that LIBERO's and robomimic's readers look for on the `data` group."""
    problem = {"problem_name": episode.suite, "language_instruction": episode.instruction}
    data.attrs["problem_info"] = json.dumps(problem)
    data.attrs["env_args"] = json.dumps(
        {"type": 1, "env_name": episode.suite, "problem_name": episode.suite, "env_kwargs": {}}
    )
    data.attrs["env_name"] = episode.suite
    data.attrs["tag"] = "worldenv"


def count_file(data: h5py.Group, demos: list[str]) -> None:
    """Bring `num_demos` and `total` up to date; other members (robomimic's `mask`) do not count."""
    data.attrs["num_demos"] = len(demos)
    data.attrs["total"] = sum(len(data[name]["actions"]) for name in demos)
