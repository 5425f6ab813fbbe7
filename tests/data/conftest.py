"""Synthetic episodes and foreign LIBERO files for the tests of worldenv.data."""

import numpy as np
import pytest
from official_files import write_official

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
        proprio=(rng.normal(size=(frames, 8)) * 0.02).astype(np.float32),
        success=bool(dones.any()),
        meta={"noise": 0.25},
    )


@pytest.fixture
def make_episode():
    return build_episode


@pytest.fixture
def make_foreign():
    return write_official
