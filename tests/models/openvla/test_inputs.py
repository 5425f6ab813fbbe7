"""Images, words and units, against plain transcriptions of the published formulas."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from published import openvla as published
from published.openvla_policy import policy

from worldenv.models.openvla_inputs import Gripper, Pixels, Range, Units

GRIPPER = Gripper((6,), opened=-1.0, closed=1.0)
STATS = published.statistics()[published.KEY]
ACTION, PROPRIO = STATS["action"], STATS["proprio"]


def units(gripper: Gripper = GRIPPER) -> Units:
    action = Range(ACTION["q01"], ACTION["q99"], ACTION["mask"], [False] * 7)
    return Units(action, Range(PROPRIO["q01"], PROPRIO["q99"], [True] * 8, [False] * 8), gripper)


def test_a_command_is_what_the_published_evaluation_executes():
    x = np.random.default_rng(0).normal(0, 1, (5, 8, 7)).astype(np.float32)
    high, low = np.array(ACTION["q99"]), np.array(ACTION["q01"])
    want = np.where(ACTION["mask"], 0.5 * (x + 1) * (high - low + 1e-8) + low, x)
    want[..., -1] = -np.sign(2 * (want[..., -1] - 0.0) / (1.0 - 0.0) - 1)
    got = units().command(torch.from_numpy(x))
    assert got.dtype == torch.float32
    assert np.array_equal(got.numpy(), want.astype(np.float32))
    assert set(np.unique(got[..., 6].numpy())) == {-1.0, 1.0}


def test_the_gripper_follows_the_convention_that_is_named():
    x = torch.zeros(3, 7)
    x[:, 6] = torch.tensor([0.9, 0.1, 0.5])
    assert units().command(x)[:, 6].tolist() == [-1.0, 1.0, 0.0]
    other = Gripper((6,), opened=0.04, closed=0.0, trained_open=-1.0, trained_closed=1.0)
    x[:, 6] = torch.tensor([-0.9, 0.1, 0.0])
    assert units(other).command(x)[:, 6] == pytest.approx([0.04, 0.0, 0.02])


def test_proprio_is_scaled_and_clipped_as_published():
    q = np.random.default_rng(1).normal(0.3, 1, (6, 8)).astype(np.float32)
    high, low = np.array(PROPRIO["q99"]), np.array(PROPRIO["q01"])
    want = np.clip(2 * (q - low) / (high - low + 1e-8) - 1, -1, 1)
    got = units().state(torch.from_numpy(q))
    assert np.array_equal(got.numpy(), want.astype(np.float32))
    assert (got.abs() == 1).any()


def test_normalising_undoes_a_command_and_clips():
    x = torch.rand(4, 8, 7) * 2 - 1
    x[..., 6] = (x[..., 6] > 0).float()
    back = units().normalise(units().command(x))
    assert (back - x).abs().max() < 1e-6
    far = units().normalise(torch.full((7,), 50.0))
    assert far.tolist() == [1.0] * 6 + [0.0]  # closed beyond closed


def test_a_dimension_that_never_changed_is_trained_at_zero():
    still = Range(ACTION["q01"], ACTION["q99"], ACTION["mask"], [True] + [False] * 6)
    assert Units(still, None, GRIPPER).normalise(torch.full((7,), 0.7))[0] == 0


def test_tokens_are_the_published_bins():
    """Measured: -1 and -0.999 are id 31999, which is read as -0.99608; 31744 + k is index k."""
    bins = np.linspace(-1, 1, 256)
    centres = (bins[:-1] + bins[1:]) / 2
    values = np.concatenate([[-1.0, -0.999, 0.0, 0.5, 1.0, 3.0, -9.0], np.linspace(-1, 1, 999)])
    ids = 32000 - np.digitize(np.clip(values, -1, 1), bins)
    index = units().to_tokens(torch.from_numpy(values))
    assert index.dtype == torch.int64
    assert np.array_equal(index.numpy() + 31744, ids)
    assert ids[:2].tolist() == [31999, 31999]
    every = torch.arange(256)
    want = centres[np.clip(32000 - (every.numpy() + 31744) - 1, 0, 254)]
    assert np.abs(units().from_tokens(every).numpy() - want).max() < 1e-15
    assert float(units().from_tokens(torch.tensor(255))) == pytest.approx(-0.99608, abs=1e-5)
    assert units().from_tokens(every[0]) == units().from_tokens(every[1])


def test_the_crop_is_the_published_one():
    """tf.image.crop_and_resize of the centre's 0.9, as the same points of grid_sample."""
    size = 56
    image = torch.randint(0, 256, (2, 1, size, size, 3), dtype=torch.uint8)
    first = (1 - math.sqrt(0.9)) / 2
    at = torch.linspace(2 * first - 1, 1 - 2 * first, size)
    grid = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1).expand(2, -1, -1, -1)
    x = image[:, 0].permute(0, 3, 1, 2).float() / 255
    x = F.grid_sample(x, grid, mode="bilinear", align_corners=True).clamp(0, 1)
    want = torch.floor(x * 255.5).clamp(max=255)
    got = Pixels(size, 0.9, [([0.0] * 3, [1.0] * 3)] * 2)(image)[0] * 255
    assert (got - want).abs().max() <= 1.001  # one level, where rounding falls either way
    assert ((got - want).abs() > 0.5).float().mean() < 1e-3
    whole = Pixels(size, 1.0, [([0.0] * 3, [1.0] * 3)] * 2)(image)[1] * 255
    assert torch.equal(whole.round(), image[:, 0].permute(0, 3, 1, 2).float())


def test_training_crops_anywhere_and_changes_the_light():
    ramp = torch.arange(56, dtype=torch.uint8) * 4
    image = ramp.expand(64, 1, 56, 56)[..., None].repeat(1, 1, 1, 1, 3)
    pixels = Pixels(56, 0.9, [([0.0] * 3, [1.0] * 3)] * 2)
    g = torch.Generator().manual_seed(0)
    x = pixels(image, g)[0]
    assert torch.equal(x, pixels(image, torch.Generator().manual_seed(0))[0])
    assert x.min() >= 0
    assert 0.9 < x.max() <= 1
    # A ramp stays one; how steep it is says the contrast, on a side of sqrt 0.9.
    middle = x[:, 0, 28]
    slope = (middle[:, 30] - middle[:, 20]) / (10 * 4 / 255) / math.sqrt(0.9)
    assert 0.78 < slope.min() < 0.9
    assert 1.1 < slope.max() < 1.22
    assert x.mean((1, 2, 3)).std() > 0.05


@pytest.mark.parametrize("size", [256, 100, 300])
def test_images_are_resized_with_lanczos(size):
    """Pillow's, which rounds between rows and columns unless its pixels are floats."""
    smooth = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(smooth, size=(size, size), mode="bicubic").clamp(0, 1)
    image = (255 * smooth).to(torch.uint8).permute(0, 2, 3, 1)
    channels = [Image.fromarray(image[0, ..., c].float().numpy()) for c in range(3)]
    resized = [np.array(c.resize((224, 224), Image.Resampling.LANCZOS)) for c in channels]
    want = torch.from_numpy(np.stack(resized)).round().clamp(0, 255)
    got = Pixels(224, 1.0, [([0.0] * 3, [1.0] * 3)] * 2)(image[None])[0][0] * 255
    off = (got - want).abs()
    assert off.max() <= 1.001
    assert (off > 0.5).float().mean() < 1e-3


def test_each_tower_has_its_normalisation(oft):
    image = torch.full((1, 1, 28, 28, 3), 51, dtype=torch.uint8)
    first, second = policy(oft).pixels(image)
    want = (0.2 - torch.tensor([0.484375, 0.455078125, 0.40625])) / torch.tensor(
        [0.228515625, 0.2236328125, 0.224609375]
    )
    assert torch.allclose(first[0, :, 3, 3], want, atol=1e-6)
    assert torch.allclose(second[0, :, 3, 3], torch.full((3,), -0.6), atol=1e-6)


def test_the_prompt_ends_in_the_empty_token(oft):
    words = policy(oft).words
    ids = words.ids("Pick UP the bowl")
    assert (ids[0], ids[-1], words.last) == (1, 29871, 2)
    said = words.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert said == "In: What action should the robot take to pick up the bowl?\nOut:"
    spaced = words.tokenizer("In: What action should the robot take to go?\nOut: ").input_ids
    assert words.ids("go") == spaced
    batch, keep = words.batch(["go", "go away"])
    assert batch[0, keep[0]].tolist() == words.ids("go")[1:]
    assert keep.sum(1).tolist() == [len(words.ids(t)) - 1 for t in ("go", "go away")]
    assert keep[:, -1].all()
