"""Folders of autoencoders that are not what they should be: each is named, before any work."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from published.damage import RAN, Payload
from safetensors.torch import load_file, save_file

from worldenv.config import SimulatorConfig
from worldenv.layouts import vae as published
from worldenv.models import vae
from worldenv.models.tokenizer import build_tokenizer
from worldenv.models.vae_folder import STEM
from worldenv.runtime.errors import UserError

WEIGHTS = f"{STEM}.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("vae")
    published.wan_vae(root / "wan")
    published.wan_vae_of_authors(root / "authors")
    return root


def load(folder: Path | None, patch: int = 16) -> vae.PublishedTokenizer:
    config = SimulatorConfig(tokenizer="wan-vae", tokenizer_folder=folder, patch=patch)
    return build_tokenizer(config, 32)


def spoil_config(**entries):
    return lambda folder: published.extend(folder / "vae", **entries)


def without(key):
    def spoil(folder):
        path = folder / "vae" / "config.json"
        config = json.loads(path.read_text())
        config.pop(key)
        path.write_text(json.dumps(config))

    return spoil


def spoil_weights(change):
    def spoil(folder):
        path = folder / "vae" / WEIGHTS
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        path.unlink()
        save_file(tensors, path)

    return spoil


def nan(tensors):
    tensors["quant_conv.bias"][3] = float("nan")


BAD = {
    "no folder": (shutil.rmtree, "no such folder"),
    "an empty one": (lambda f: shutil.rmtree(f) or f.mkdir(), "got nothing"),
    "two": (lambda f: published.wan_vae_of_authors(f), "got vae/config.json, Wan2.1_VAE.pth"),
    "no weights": (lambda f: (f / "vae" / WEIGHTS).unlink(), f"or {WEIGHTS}; got config.json"),
    "cut weights": (
        lambda f: (f / "vae" / WEIGHTS).write_bytes(b"1234567" * 99),
        "is cut short or no safetensors",
    ),
    "no JSON": (lambda f: (f / "vae" / "config.json").write_text("{"), "is not valid JSON"),
    "a list": (
        lambda f: (f / "vae" / "config.json").write_text("[]"),
        "a table, got list",
    ),
    "another class": (
        spoil_config(_class_name="AutoencoderTiny"),
        "_class_name: expected 'AutoencoderKLWan', got 'AutoencoderTiny'. That is "
        "simulator.tokenizer 'tiny-vae'",
    ),
    "no class": (without("_class_name"), "expected 'AutoencoderKLWan', got None"),
    "a new key": (spoil_config(sparse=1), "unknown key 'sparse'"),
    "other widths": (
        spoil_config(base_dim=6),
        "encoder.conv_in.weight: expected [6, 3, 3, 3, 3], got [4, 3, 3, 3, 3]",
    ),
    "text for a number": (spoil_config(base_dim="4"), "base_dim: expected int of at most"),
    "endless": (spoil_config(num_res_blocks=10**12), "num_res_blocks: expected int of at most"),
    "no stages": (spoil_config(dim_mult=[]), "AutoencoderKLWan cannot be built from it"),
    "patches of a 2.2": (spoil_config(patch_size=2), "in_channels: expected 12, the colours"),
    "few statistics": (spoil_config(latents_mean=[0.0]), "latents_mean: expected 16 numbers"),
    "no deviation": (
        spoil_config(latents_std=[0.0] * 16),
        "latents_std: expected positive numbers",
    ),
    "a missing tensor": (
        spoil_weights(lambda t: t.pop("quant_conv.bias")),
        "missing quant_conv.bias",
    ),
    "one too many": (spoil_weights(lambda t: t.update(x=torch.ones(1))), "unexpected x"),
    "NaN": (spoil_weights(nan), "quant_conv.bias [32]: expected finite weights, got 1 NaN"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_named(folders, tmp_path, name):
    spoil, words = BAD[name]
    folder = tmp_path / "model"
    shutil.copytree(folders / "wan", folder)
    spoil(folder)
    with pytest.raises(UserError) as caught:
        load(folder)
    assert words in str(caught.value)
    assert str(folder) in str(caught.value)


BAD_FILES = {
    "a payload": ({"conv1.weight": Payload()}, "expected tensors alone, got a pickle"),
    "no tensors": ([1, 2], "expected a table of tensors, got a list"),
    "nothing": ({}, "expected a table of tensors, got an empty table"),
    "numbers": ({"conv1.weight": 3}, "'conv1.weight': expected a tensor, got a int"),
    "another model": ({"fc.weight": torch.ones(2)}, "got none called 'encoder.conv1.weight'"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_of_the_authors_are_named(tmp_path, capsys, name):
    held, words = BAD_FILES[name]
    path = tmp_path / "Wan2.1_VAE.pth"
    torch.save(held, path)
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert RAN not in capsys.readouterr().out


def test_a_file_cut_short_and_a_vae_of_other_channels_are_named(folders, tmp_path):
    whole = folders / "authors" / "Wan2.1_VAE.pth"
    path = tmp_path / "Wan2.1_VAE.pth"
    path.write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"Wan2\.1_VAE\.pth"):
        load(tmp_path)
    tensors = torch.load(whole, weights_only=True)
    torch.save({**tensors, "conv2.weight": torch.zeros(4, 4, 1, 1, 1)}, path)
    with pytest.raises(UserError, match=r"conv2\.weight: expected 16 latent channels"):
        load(tmp_path)


def test_what_the_config_must_say(folders):
    with pytest.raises(UserError, match=r"simulator\.patch: expected a multiple of 8"):
        load(folders / "wan", patch=4)
    with pytest.raises(UserError, match="tokenizer_folder: expected the folder"):
        load(None)
