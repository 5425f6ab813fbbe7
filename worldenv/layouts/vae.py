"""Random autoencoders and reward networks, small, in the layouts they are published in."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, AutoencoderTiny
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock, WanUpBlock
from torch import nn

from worldenv.models.vae_folder import WAN_2_2
from worldenv.models.wovr_reward import ImageNet, TaskNet

WAN_SIZES = {
    "2.1": {"base_dim": 4},
    "2.2": {**WAN_2_2, "base_dim": 4, "decoder_base_dim": 6},
}
TASKS = ("close the drawer", "lift the cup", "open the drawer")


def shaken(module: nn.Module, seed: int) -> nn.Module:
    """Weights and statistics away from what they begin as, so that none can be mistaken."""
    g = torch.Generator().manual_seed(seed)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.add_(0.05 * torch.rand(tensor.shape, generator=g))
    return module.eval().requires_grad_(False)


def extend(folder: Path, **entries: object) -> None:
    """Put further entries into a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def wan_vae(folder: Path, version: str = "2.1", seed: int = 0) -> AutoencoderKLWan:
    """A pipeline's folder, with `vae` in it."""
    vae = _random(AutoencoderKLWan, seed, **WAN_SIZES[version])
    vae.save_pretrained(folder / "vae")
    extend(folder / "vae", clip_output=False)
    return vae


def wan_vae_of_authors(folder: Path, version: str = "2.1", seed: int = 0) -> AutoencoderKLWan:
    """A folder with Wan2.x_VAE.pth, as WoVR's have it."""
    vae = _random(AutoencoderKLWan, seed, **WAN_SIZES[version])
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(dict(of_authors(vae)), folder / f"Wan{version}_VAE.pth")
    return vae


def kl_vae(folder: Path, seed: int = 0, **config: object) -> AutoencoderKL:
    """A `vae` folder: two pixels a latent, four channels."""
    sizes = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [8, 8],
        "norm_num_groups": 4,
        "latent_channels": 4,
    }
    vae = _random(AutoencoderKL, seed, **{**sizes, **config})
    vae.save_pretrained(folder)
    return vae


def tiny_vae(folder: Path, seed: int = 0) -> AutoencoderTiny:
    """A `vae` folder of TAESD's kind: two pixels a latent, four channels."""
    sizes = {f"{part}_block_out_channels": [8, 8] for part in ("encoder", "decoder")}
    sizes |= {f"num_{part}_blocks": [1, 1] for part in ("encoder", "decoder")}
    vae = _random(AutoencoderTiny, seed, **sizes)
    vae.save_pretrained(folder)
    return vae


def reward(folder: Path, by_task: bool = False, seed: int = 0) -> ImageNet | TaskNet:
    """A folder with resnet_rm.pth or taskemb_resnet_rm.pth (for `TASKS`)."""
    torch.manual_seed(seed)
    made = TaskNet(4, len(TASKS), 6, 8) if by_task else ImageNet(4)
    shaken(made, seed)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(made.state_dict(), folder / f"{'taskemb_' * by_task}resnet_rm.pth")
    return made


def _random(kind: type, seed: int, **config: object) -> nn.Module:
    torch.manual_seed(seed)
    return shaken(kind(**config), seed)


def of_authors(vae: AutoencoderKLWan) -> Iterator[tuple[str, torch.Tensor]]:
    """A Wan VAE's tensors under its authors' names, by walking its modules as theirs are built."""
    for name, module in _walk(vae):
        for key, tensor in module.state_dict().items():
            yield f"{name}.{key}", tensor


def _walk(vae: AutoencoderKLWan) -> Iterator[tuple[str, nn.Module]]:
    yield from (("conv1", vae.quant_conv), ("conv2", vae.post_quant_conv))
    for name, coder in (("encoder", vae.encoder), ("decoder", vae.decoder)):
        middle = coder.mid_block
        yield from ((f"{name}.conv1", coder.conv_in), (f"{name}.head.2", coder.conv_out))
        yield f"{name}.head.0", coder.norm_out
        yield from _residual(f"{name}.middle.0", middle.resnets[0])
        yield f"{name}.middle.1", middle.attentions[0]
        yield from _residual(f"{name}.middle.2", middle.resnets[1])
    count = 0
    for i, block in enumerate(vae.encoder.down_blocks):
        if vae.config.is_residual:
            for j, inner in enumerate((*block.resnets, block.downsampler)):
                yield from _layer(f"encoder.downsamples.{i}.downsamples.{j}", inner)
        else:
            yield from _layer(f"encoder.downsamples.{i}", block)
    for i, block in enumerate(vae.decoder.up_blocks):
        flat = isinstance(block, WanUpBlock)
        last = (block.upsamplers or [None])[0] if flat else block.upsampler
        for j, inner in enumerate((*block.resnets, last)):
            at = f"decoder.upsamples.{count}" if flat else f"decoder.upsamples.{i}.upsamples.{j}"
            yield from _layer(at, inner)
            count += 1


def _layer(name: str, layer: nn.Module | None) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(layer, WanResidualBlock):
        yield from _residual(name, layer)
    elif layer is not None:
        yield name, layer  # resampling: its names are the same


def _residual(name: str, block: WanResidualBlock) -> Iterator[tuple[str, nn.Module]]:
    places = ((0, block.norm1), (2, block.conv1), (3, block.norm2), (6, block.conv2))
    yield from ((f"{name}.residual.{at}", module) for at, module in places)
    yield f"{name}.shortcut", block.conv_shortcut
