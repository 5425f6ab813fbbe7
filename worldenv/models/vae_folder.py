"""Where published autoencoders lie, and what their tensors are called there.

Three layouts: a `vae` folder of diffusers (config.json + diffusion_pytorch_model.safetensors), a
whole pipeline's folder, which has one in it, and the file that Wan's authors publish and WoVR's
folders hold (`Wan2.1_VAE.pth`, `Wan2.2_VAE.pth`). That has no config and names of its own: sizes
are read off its tensors, the statistics of the latents are known by their number, and the names
become diffusers'. Its layout was checked against the authors' own modules (github Wan-Video/Wan2.1,
Wan2.2), as were the statistics.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from worldenv.models.folder import listed, read_json
from worldenv.models.weights import Shards, read_pth
from worldenv.runtime.errors import UserError

STEM = "diffusion_pytorch_model"
ORIGINAL = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth")
WAN = "AutoencoderKLWan"

# Wan 2.2's config as published (diffusers' defaults are 2.1's).
WAN_2_2: dict[str, Any] = {
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [
        *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
        *(-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825),
        *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
        *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230),
        *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748),
        *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
    ],
    "latents_std": [
        *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013),
        *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
        *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
        *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
        *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
        *(0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
    ],
}

# From the authors' names to diffusers', in this order.
_RENAMES = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"coder\.conv1\.", "coder.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
    # 2.2: stages of blocks, the last of which may resample. 2.1: blocks in one row.
    (
        r"\.(down|up)samples\.(\d+)\.\1samples\.\d+\.(resample|time_conv)\.",
        r".\1_blocks.\2.\1sampler.\3.",
    ),
    (r"\.(down|up)(samples\.\d+)\.\1samples\.", r".\1\2.resnets."),
    (r"\.(down|up)samples\.(?=\d+\.(resnets|\1sampler)\.)", r".\1_blocks."),
    (r"\.downsamples\.", ".down_blocks."),
)
# Stable Diffusion's first folders call the attention of AutoencoderKL this.
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Published:
    """An autoencoder on the disk: its config, without what only describes the file, and weights."""

    config: dict[str, Any]
    told: Path
    """What the config was read from."""
    held: Shards | dict[str, Tensor]
    """A folder's tensors, or those of the authors' file under diffusers' names."""

    @property
    def source(self) -> Path:
        """Where the weights are."""
        return self.held.folder if isinstance(self.held, Shards) else self.told

    def tensors(self) -> dict[str, Tensor]:
        """Its weights under diffusers' names, memory-mapped."""
        if isinstance(self.held, dict):
            return self.held
        return {_attention(k): v for k, v in self.held.read(self.held.shapes).items()}


def find(folder: Path | None, kind: str, names: Mapping[str, str]) -> Published:
    """The autoencoder of class `kind` in a folder, or in the file named in its place.

    names: from diffusers' classes to what config.simulator.tokenizer calls them. UserError if there
    is none, more than one, one of another class, or a config that is none.
    """
    if folder is None:
        raise UserError(
            f"config simulator.tokenizer_folder: expected the folder of an {kind}, got none. Name "
            "where you downloaded it."
        )
    original = [folder] if folder.is_file() else [folder / name for name in ORIGINAL]
    places = [p for p in (folder / "config.json", folder / "vae" / "config.json") if p.is_file()]
    places += [p for p in original if p.is_file() and kind == WAN]
    if len(places) != 1:
        wanted = f"config.json (or vae/config.json) with {STEM}.safetensors"
        got = ", ".join(str(p.relative_to(folder)) for p in places) or listed(folder)
        wanted += f", or one of {', '.join(ORIGINAL)}" if kind == WAN else ""
        raise UserError(
            f"{folder}: expected one {kind}: {wanted}; got {got}. Name the "
            "folder or file of one autoencoder as config simulator.tokenizer_folder."
        )
    if places[0].suffix == ".json":
        return _of_diffusers(places[0], kind, names)
    return _of_authors(places[0])


def _of_diffusers(path: Path, kind: str, names: Mapping[str, str]) -> Published:
    config = read_json(path)
    named = config.get("_class_name")
    if named != kind:
        other = names.get(named) if isinstance(named, str) else None
        hint = f" That is simulator.tokenizer {other!r}." if other else ""
        raise UserError(
            f"{path}: _class_name: expected {kind!r}, got {repr(named)[:80]}.{hint} Name the vae "
            f"folder of a model that has an {kind}."
        )
    # clip_output: Wan's folders have it. Images leave as bytes, and are clipped then.
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k != "clip_output"}
    return Published(kept, path, Shards(path.parent, STEM))


def _of_authors(path: Path) -> Published:
    tensors = read_pth(path)
    try:
        config, group = _sizes(tensors)
    except (KeyError, IndexError) as error:
        raise UserError(
            f"{path}: expected the tensors of Wan's VAE, got none called {error}. Name "
            f"{' or '.join(ORIGINAL)}, as Wan's authors publish them."
        ) from error
    z, known = config["z_dim"], len(config.get("latents_mean", range(16)))
    if z != known:
        raise UserError(
            f"{path}: conv2.weight: expected {known} latent channels, whose statistics are known, "
            f"got {z}. Name a diffusers folder, whose config has them."
        )
    renamed = {wan_name(name, group): tensor for name, tensor in tensors.items()}
    return Published(config, path, renamed)


def _sizes(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], int]:
    """Config of the authors' tensors, and how many of 2.1's blocks in a row are one of diffusers'.
    KeyError for a missing one."""
    staged = "encoder.downsamples.0.downsamples.0.residual.2.weight" in tensors
    last = "downsamples.0.downsamples.{}" if staged else "downsamples.{}"
    count = 0
    while f"encoder.{last.format(count)}.residual.2.weight" in tensors:
        count += 1
    sizes = {
        "base_dim": tensors["encoder.conv1.weight"].shape[0],
        "decoder_base_dim": tensors["decoder.head.0.gamma"].shape[0],
        "z_dim": tensors["conv2.weight"].shape[0],
        "num_res_blocks": count,
    }
    return {**(WAN_2_2 if staged else {}), **sizes}, count + 2


def wan_name(name: str, group: int) -> str:
    """Diffusers' name of the authors' tensor `name`; group: see `_sizes`."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)

    def place(found: re.Match) -> str:
        block, at = divmod(int(found[1]), group)
        return f".up_blocks.{block}." + (f"resnets.{at}." if at < group - 1 else "upsamplers.0.")

    return re.sub(r"\.upsamples\.(\d+)\.", place, name)


def _attention(name: str) -> str:
    """Today's name of a tensor that may have an old one."""
    found = re.fullmatch(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(.*)", name)
    return f"{found[1]}.{_ATTENTION[found[2]]}.{found[3]}" if found else name
