"""The probe finds a block, and says so when it is not there; known places on made-up pictures."""

import numpy as np
import pytest
import torch

from worldenv.data.camera import Camera
from worldenv.data.episode import Episode
from worldenv.runtime.seeds import generator
from worldenv.stages import probe


def pictures(count: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [N, 32, 32, 3] of a block on a speckled table, and its middle [N, 1, 2]."""
    table = torch.randint(90, 170, (32, 32, 3), generator=g)
    middle = torch.randint(5, 27, (count, 2), generator=g)
    at = torch.arange(32)
    inside = ((at - middle[:, :1]).abs() <= 3)[:, None] & ((at - middle[:, 1:]).abs() <= 3)[
        ..., None
    ]
    block = torch.tensor([30, 40, 60])
    images = torch.where(inside[..., None], block, table).byte()
    return images, middle[:, None].float() + 0.5


@pytest.fixture(scope="module")
def fitted():
    g = generator(0, "pictures")
    images, middle = pictures(240, g)
    made = probe.fit(images[:120], middle[:120], radius=5.0, g=generator(1), steps=120)
    return made, images[120:], middle[120:], images[:1]


def test_it_finds_what_is_there(fitted):
    made, images, middle, _ = fitted
    pixels, seen = made.find(images)
    assert float(seen.float().mean()) > 0.95
    assert float((pixels - middle).norm(dim=-1).median()) < 1.5


def test_it_misses_what_is_painted_over(fitted):
    made, images, middle, _ = fitted
    rows = torch.arange(len(images))
    shown, present = probe.painted(images, middle, rows, 5.0, generator(2))
    assert 30 < int((~present).sum()) < 90
    _, seen = made.find(shown)
    assert float((~seen[~present]).float().mean()) > 0.9
    assert float(seen[present].float().mean()) > 0.9


def test_what_is_painted_shows_nothing_and_only_there():
    images, middle = pictures(60, generator(3))
    shown, present = probe.painted(images, middle, torch.arange(60), 5.0, generator(4))
    for k in range(60):
        column, row = middle[k, 0].int().tolist()
        dark = shown[k].int().sum(-1) < 140  # the block's own colour
        assert bool(dark[row, column]) == bool(present[k])
        assert int(dark.sum()) in ((49,) if present[k] else (0,))


def test_places_are_the_cameras_pixels_and_centimetres():
    """A camera 1 m above the table that looks straight down, 90 degrees wide: 2 m are 64 pixels."""
    pose = (1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1)
    camera = Camera("above", 90.0, "world", tuple(map(float, pose)))
    steps = np.array([0, 4, 8])
    episode = Episode(
        "libero_spatial", 8, "carry", None, 0, "policy", np.zeros((8, 7), np.float32),
        np.zeros(8, bool), steps, np.zeros((3, 2, 64, 64, 3), np.uint8),
        np.zeros((3, 8), np.float32), False,
        extras={
            "object_1_plate": np.zeros((3, 3), np.float32),
            "object_0_bowl": np.array([[0, 0, 0], [9, 9, 9], [0.25, 0.5, 0]], np.float32),
        },
    )  # fmt: skip
    assert probe.names(episode) == ["object_0_bowl", "object_1_plate"]
    found = probe.truth(episode, [0, 8], camera, 64)
    assert found.pixels[:, 0].tolist() == [[32, 32], [40, 16]]
    assert found.scale[0, 0] == pytest.approx(200 / 64)
    assert found.gone(0, 1) == pytest.approx(100 * np.hypot(0.25, 0.5), abs=1e-3)
