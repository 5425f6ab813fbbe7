"""Demonstration files in LIBERO's official layout, of a robot simple enough to be known exactly."""

from pathlib import Path

import h5py
import numpy as np


def moments(steps: int, size: int, seed: int = 0, still: bool = False) -> dict[str, np.ndarray]:
    """`steps` actions, the states before them, and what was to see before each and at the end.

    The hand circles and rises, a bright square in the pictures; the fingers close at two thirds.
    Pictures are raw: a hand that goes along +y moves right, one that rises moves down.
    """
    rng = np.random.default_rng(seed)
    turn = np.linspace(0, 2 * np.pi, steps + 1) + seed
    hand = np.stack([-0.05 * np.cos(turn), 0.15 * np.sin(turn), 1.1 + 0.1 * np.cos(turn)], 1)
    hand = hand * (not still) + [0, 0, still]
    close = 2 * steps // 3
    closing = np.clip(np.arange(steps + 1) - close - 1, -1, 5) * 0.004 + 0.0004
    fingers = 0.04 - np.where(np.arange(steps + 1) > close, closing, 0) * (not still)
    joints = np.cumsum(rng.normal(size=(steps + 1, 7)) * 0.05 * (not still), axis=0)
    actions = np.zeros((steps, 7))
    actions[:, :3] = np.diff(hand, axis=0) / 0.05
    actions[:, 3:6] = rng.uniform(-0.1, 0.1, (steps, 3)) * (not still)
    actions[:, 6] = np.where((np.arange(steps) >= close) & (not still), 1, -1)
    shade = np.arange(size, dtype=np.uint8)[None, :, None] // 2
    images = np.broadcast_to(shade, (steps + 1, 2, size, size, 3)).copy()
    images[:, :, : size // 4, : size // 8] += 60  # tells up from down and left from right
    place = np.stack([hand[:, 2] - hand[:, 0] - 1.1, hand[:, 1]], 1) * 1.5 + 0.5
    corner = (place * (size - size // 8)).astype(int).clip(0, size - size // 8)
    for t, (row, column) in enumerate(corner):
        images[t, :, row : row + size // 8, column : column + size // 8] = 230
    return {
        "actions": actions,
        "states": np.concatenate(
            [np.arange(steps)[:, None], joints[:-1], rng.normal(size=(steps, 20))], 1
        ),
        "agentview_rgb": images[:, 0],
        "eye_in_hand_rgb": images[:, 1],
        "ee_pos": hand,
        "ee_ori": rng.normal(size=(steps + 1, 3)) * 0.05 + [np.pi, 0, 0],
        "gripper_states": np.stack([fingers, -fingers], 1),
        "joint_states": joints,
    }


def write_official(
    path: Path,
    convention: str = "after",
    *,
    demos: int = 1,
    steps: int = 24,
    size: int = 16,
    attributes: bool = True,
    still: bool = False,
    way: tuple[int, int] = (1, 1),
) -> list[dict[str, np.ndarray]]:
    """A file as LIBERO ("after") or openvla ("before") writes it; returns the moments it was cut
    from. way: steps along rows and columns in which raw pictures are stored.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        if attributes:
            data.attrs["problem_info"] = '{"language_instruction": "do the task"}'
        for number in range(demos):
            seen = moments(steps, size, number, still)
            pick = slice(1, None) if convention == "after" else slice(0, steps)
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = steps
            demo["dones"] = demo["rewards"] = np.eye(steps, dtype=np.uint8)[-1]
            for name, values in seen.items():
                if name in ("actions", "states"):
                    demo[name] = values
                else:
                    turned = values[:, :: way[0], :: way[1]] if name.endswith("rgb") else values
                    demo[f"obs/{name}"] = turned[pick]
            written.append(seen)
    return written
