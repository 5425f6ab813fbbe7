"""One recorded episode in memory, and the checks every episode passes on its way in or out.

Frames are upright, sparse frames are allowed (`frame_steps` says where they lie), and the
observation after the last action belongs to the episode when it was recorded.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from worldenv.runtime.errors import UserError

NOOP_THRESHOLD = 1e-4


@dataclass
class Episode:
    """A recorded episode of T actions seen at F moments.

    Shapes: actions [T, A] float32, dones [T] bool (success holds after action t), frame_steps [F]
    int64 (frame f is the observation *before* action `frame_steps[f]`; the value T is the
    observation after the last action), images [F, V, H, W, 3] uint8 upright, proprio [F, P]
    float32; what A, V and P are, an `Embodiment` says (in LIBERO's files 7, 2 and 8: see
    `libero_layout`). `start` is the benchmark's numbered start, None for a freshly sampled one;
    `benchmark`: its name.
    `extras` holds further low-dimensional observations [F, ...] under LIBERO's names, such as
    `joint_states` [F, 7].
    """

    suite: str
    task: int
    instruction: str
    start: int | None
    seed: int
    source: str
    actions: np.ndarray
    dones: np.ndarray
    frame_steps: np.ndarray
    images: np.ndarray
    proprio: np.ndarray
    success: bool
    meta: dict = field(default_factory=dict)
    extras: dict[str, np.ndarray] = field(default_factory=dict)
    benchmark: str = "libero"

    def __len__(self) -> int:
        """Number of actions T."""
        return len(self.actions)

    def success_before(self, steps: np.ndarray) -> np.ndarray:
        """Whether any action before each step succeeded: steps [...] int -> [...] bool."""
        reached = np.concatenate([[False], np.cumsum(self.dones) > 0])
        return reached[steps]


def check_episode(episode: Episode, where: str) -> None:
    """Raise UserError naming `where` and the field when an episode breaks its own shapes or holds
    NaN.
    """

    def expect(ok: bool, name: str, expected: str, got: object, mend: str) -> None:
        if not ok:
            raise UserError(f"{where}: {name}: expected {expected}, got {got}. {mend}")

    actions, frames = episode.actions, episode.images
    record = "Record the episode again, or leave it out of the data."
    expect(
        actions.ndim == 2 and actions.size > 0,
        "actions",
        "shape [T, A] with T, A >= 1",
        list(actions.shape),
        record,
    )
    steps = len(actions)
    _check_finite("actions", actions, where)
    expect(
        episode.dones.shape == (steps,),
        "dones",
        f"shape [{steps}]",
        list(episode.dones.shape),
        record,
    )
    expect(
        frames.dtype == np.uint8,
        "images",
        "dtype uint8 (0..255)",
        frames.dtype,
        "Convert with (images * 255).round().astype('uint8') if they lie in 0..1.",
    )
    expect(
        frames.ndim == 5 and frames.shape[-1] == 3 and len(frames) > 0,
        "images",
        "shape [F, V, H, W, 3] with F >= 1",
        list(frames.shape),
        record,
    )
    index = episode.frame_steps
    expect(
        index.shape == (len(frames),)
        and bool((np.diff(index) > 0).all())
        and bool(((index >= 0) & (index <= steps)).all()),
        "frame_steps",
        f"{len(frames)} strictly increasing steps within 0..{steps}",
        index.tolist(),
        record,
    )
    expect(
        episode.proprio.ndim == 2 and len(episode.proprio) == len(frames),
        "proprio",
        f"shape [{len(frames)}, P]",
        list(episode.proprio.shape),
        record,
    )
    _check_finite("proprio", episode.proprio, where)
    for name, rows in episode.extras.items():
        expect(
            len(rows) == len(frames), f"extras[{name!r}]", f"{len(frames)} rows", len(rows), record
        )


def _check_finite(name: str, values: np.ndarray, where: str) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        row = int(np.argwhere(~finite)[0][0])
        raise UserError(
            f"{where}: {name}: expected finite numbers, got {int((~finite).sum())} NaN or infinite "
            f"value(s), the first in row {row}. Remove the episode or record it again."
        )


def continuous_axis_angle(rotation: np.ndarray) -> np.ndarray:
    """Axis-angle [..., 3] in rad, written without the jump at an angle of pi.

    The gripper looks down, a turn of about pi around +x or -x; the two differ by one sign. Vectors
    near -x are replaced by the same rotation written around +x (an angle slightly above pi).
    """
    rotation = np.asarray(rotation)
    angle = np.maximum(np.linalg.norm(rotation, axis=-1, keepdims=True), 1e-6)
    first = rotation[..., :1]
    flip = (first < 0) & (np.abs(np.abs(first) - np.pi) < 0.6)
    return np.where(flip, -rotation * (2 * np.pi - angle) / angle, rotation).astype(np.float32)


def area_resize(images: np.ndarray, size: int, where: str = "images") -> np.ndarray:
    """Area-average square images [..., H, H, 3] uint8 to `size` pixels, any ratio.

    Where `size` does not divide H a pixel counts by the share of it that is covered; enlarging
    repeats pixels and adds nothing. By hand: Pillow's `reduce` rounds blocks of 3, 5, 6 ... pixels
    to other bits, and its BOX takes a pixel whole or not at all.
    """
    height, width = images.shape[-3:-1]
    if height != width or size < 1:
        raise UserError(
            f"{where}: expected square images and a size of at least 1, got {height}x{width} and "
            f"{size}. Crop or record square images."
        )
    if height == size:
        return images
    if height % size == 0:
        block = height // size
        # In whole numbers, rows first: a mean over both axes at once takes twenty times as long.
        rows = images.reshape(*images.shape[:-3], size, block, height * 3)
        rows = rows.sum(axis=-2, dtype=np.uint32).reshape(*images.shape[:-3], size, size, block, 3)
        total = rows[..., 0, :].copy()
        for k in range(1, block):
            total += rows[..., k, :]
        return ((2 * total + block**2) // (2 * block**2)).astype(np.uint8)
    edges = np.linspace(0, height, size + 1)
    pixels = np.arange(height)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    weights = (np.maximum(covered, 0) * size / height).astype(np.float32)  # [size, H]
    flat = images.reshape(-1, height, height, 3)
    small = np.empty((len(flat), size, size, 3), np.uint8)
    for frame, out in zip(flat, small, strict=True):  # one at a time: no large copy in float
        rows = np.tensordot(weights, frame.astype(np.float32), 1)  # [size, H, 3]
        out[:] = np.einsum("oh,rhc->roc", weights, rows, optimize=True) + 0.5
    return small.reshape(*images.shape[:-3], size, size, 3)


def without_noops(episode: Episode, threshold: float = NOOP_THRESHOLD) -> Episode:
    """The episode without actions that ask for nothing, by openvla-oft's rule.

    An action is dropped when the norm of its first six entries is below `threshold` and its gripper
    command equals that of the last action kept. Frames before dropped actions go with them; success
    that appeared during a dropped action is credited to the action kept before it. Liberty:
    openvla-oft replays the rest in the simulator, we only cut, so a moving gripper may skip ahead.
    """
    keep = np.zeros(len(episode), bool)
    last = None
    for t, action in enumerate(episode.actions):
        still = np.linalg.norm(action[:-1]) < threshold and (last is None or action[-1] == last)
        if not still:
            keep[t], last = True, action[-1]
    if not keep.any() or keep.all():
        return episode
    before = np.concatenate([[0], np.cumsum(keep)])
    dones = np.zeros(int(keep.sum()), bool)
    for t in np.flatnonzero(episode.dones):
        dones[max(before[t + 1] - 1, 0)] = True
    steps = before[episode.frame_steps]
    # Several frames may now lie before the same action: the last one is what that action saw.
    rows = np.flatnonzero(np.append(np.diff(steps) > 0, True))
    return replace(
        episode,
        actions=episode.actions[keep],
        dones=dones,
        frame_steps=steps[rows],
        images=episode.images[rows],
        proprio=episode.proprio[rows],
        extras={name: values[rows] for name, values in episode.extras.items()},
    )
