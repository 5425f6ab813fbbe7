"""Synthetic episodes and foreign LIBERO files for the tests of worldenv.data."""

import h5py
import numpy as np
import pytest

from worldenv.data.episodes import Episode


def build_episode(
    steps=20, every=1, *, task=3, seed=0, final=True, size=16, views=2, success_at=None, start=5
) -> Episode:
    rng = np.random.default_rng(seed)
    frame_steps = np.array([*range(0, steps, every), *([steps] if final else [])])
    frames = len(frame_steps)
    dones = np.zeros(steps, bool)
    if success_at is not None:
        dones[success_at:] = True
    return Episode(
        suite="libero_spatial",
        task=task,
        instruction="pick up the black bowl on the cookie box and place it on the plate",
        start=start,
        seed=seed,
        source="policy",
        actions=rng.uniform(-1, 1, (steps, 7)).astype(np.float32),
        dones=dones,
        frame_steps=frame_steps,
        images=rng.integers(0, 256, (frames, views, size, size, 3), dtype=np.uint8),
        proprio=rng.normal(size=(frames, 8)).astype(np.float32),
        success=bool(dones.any()),
        meta={"noise": 0.25},
    )


def write_foreign(path, convention, *, demos=1, steps=12, size=16, attributes=True, still=False):
    """A file as LIBERO ("after") or openvla ("before") writes it; returns the moments it was cut
    from.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    moments = []
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        if attributes:
            data.attrs["problem_info"] = '{"language_instruction": "do the task"}'
        for number in range(demos):
            rng = np.random.default_rng(number)
            pick = slice(1, None) if convention == "after" else slice(0, steps)
            joints = np.cumsum(rng.normal(size=(steps + 1, 7)) * (not still), axis=0)
            states = np.concatenate(
                [np.arange(steps)[:, None], joints[:-1], rng.normal(size=(steps, 20))], 1
            )
            seen = {
                "agentview_rgb": rng.integers(0, 256, (steps + 1, size, size, 3), dtype=np.uint8),
                "eye_in_hand_rgb": rng.integers(0, 256, (steps + 1, size, size, 3), dtype=np.uint8),
                "ee_pos": rng.normal(size=(steps + 1, 3)),
                "ee_ori": rng.normal(size=(steps + 1, 3)) * 0.1 + [np.pi, 0, 0],
                "gripper_states": rng.normal(size=(steps + 1, 2)),
                "joint_states": joints,
            }
            demo = data.create_group(f"demo_{number}")
            actions = rng.uniform(-1, 1, (steps, 7))
            demo["actions"], demo["states"] = actions, states
            demo["dones"] = demo["rewards"] = np.eye(steps, dtype=np.uint8)[-1]
            for name, values in seen.items():
                demo[f"obs/{name}"] = values[pick]
            moments.append({"actions": actions, **seen})
    return moments


@pytest.fixture
def make_episode():
    return build_episode


@pytest.fixture
def make_foreign():
    return write_foreign
