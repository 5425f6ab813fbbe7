"""Tokenizers: patches are lossless, the autoencoder learns."""

import sys

import pytest
import torch

from worldenv.config import SimulatorConfig, from_dict
from worldenv.models.tokenizer import AutoencoderTokenizer, PatchTokenizer, build_tokenizer
from worldenv.runtime.errors import UserError


def test_patches_are_lossless_and_ordered_by_squares():
    tokenizer = PatchTokenizer(32, 8)
    image = torch.randint(0, 256, (2, 3, 2, 32, 32, 3), dtype=torch.uint8)
    latents = tokenizer.encode(image)
    assert latents.shape == (2, 3, 32, 192)
    assert torch.equal(tokenizer.decode(latents, 2), image)
    patch = image[0, 0, 1, 8:16, 16:24].float() / 127.5 - 1  # view 1, row 1, column 2
    token = latents[0, 0, 16 + 6].view(2, 2, 4, 4, 3)  # squares of 4 x 4 pixels
    torch.testing.assert_close(token[1, 0], patch[4:, :4])
    assert tokenizer.block == 48


@pytest.mark.parametrize("patch", [1, 2, 4, 16])
def test_patches_of_any_size_are_lossless(patch):
    tokenizer = PatchTokenizer(16, patch)
    image = torch.randint(0, 256, (1, 2, 16, 16, 3), dtype=torch.uint8)
    assert torch.equal(tokenizer.decode(tokenizer.encode(image), 2), image)


def test_the_autoencoder_keeps_shapes_and_learns():
    torch.manual_seed(0)
    config = SimulatorConfig(tokenizer="autoencoder", patch=4, latent_channels=6)
    tokenizer = build_tokenizer(config, 16)
    image = torch.randint(0, 256, (4, 2, 16, 16, 3), dtype=torch.uint8)
    assert tokenizer.encode(image).shape == (4, 32, 6)
    assert tokenizer.decode(tokenizer.encode(image), 2).shape == image.shape
    optimizer = torch.optim.Adam(tokenizer.parameters(), 3e-3)
    losses = []
    for _ in range(50):
        loss = tokenizer.loss(image)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_patch_sides_must_be_powers_of_two_for_the_autoencoder():
    with pytest.raises(ValueError, match="power of two"):
        AutoencoderTokenizer(24, 6, 4)


def test_a_library_that_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "worldenv.models.vae", raising=False)
    config = SimulatorConfig(tokenizer="kl-vae", tokenizer_folder=tmp_path)
    with pytest.raises(UserError, match=r"expected the package diffusers.*pip install"):
        build_tokenizer(config, 16)


def test_a_published_tokenizer_has_a_folder_and_ours_has_none():
    for tokenizer, folder in (("wan-vae", None), ("patch", "somewhere")):
        with pytest.raises(UserError, match="tokenizer_folder: expected a folder for a published"):
            from_dict(SimulatorConfig, {"tokenizer": tokenizer, "tokenizer_folder": folder})


def test_clipping_keeps_latents_where_an_images_are():
    assert PatchTokenizer(16, 4).clip(torch.tensor([-3.0, 0.5, 2.0])).tolist() == [-1.0, 0.5, 1.0]
