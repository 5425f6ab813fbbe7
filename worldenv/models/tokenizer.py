"""Video tokenizers: images to a grid of latent vectors and back.

The denoiser sees only `[..., S, Z]` latents, so a tokenizer can be exchanged without touching it:
pixel patches (exact, nothing to train), a small convolutional autoencoder, or a published one
(`models.vae`).
"""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldenv.config import SimulatorConfig
from worldenv.models.pixels import to_bytes, to_unit
from worldenv.runtime.errors import UserError


class Tokenizer(Protocol):
    """Maps images `[..., V, H, W, 3]` uint8 to latents `[..., S, Z]` (S = V * grid * grid)."""

    grid: int  # tokens per image side
    channels: int  # Z
    block: int  # consecutive channels that belong together: one small square of the image

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor, views: int) -> Tensor: ...

    def clip(self, latents: Tensor) -> Tensor:
        """Latents brought back to where an image's can be."""

    bounded: bool
    """Whether that is [-1, 1], as for pixels; otherwise each channel has a deviation of about 1."""


class PatchTokenizer(nn.Module):
    """Latents are the pixels of a `patch` x `patch` square, scaled to [-1, 1]. Lossless.

    Within a token the pixels are ordered by squares of 4 x 4, each a block of 48 channels.
    """

    def __init__(self, image_size: int, patch: int) -> None:
        super().__init__()
        self.patch, self.grid, self.channels = patch, image_size // patch, 3 * patch * patch
        self.side, self.bounded = math.gcd(patch, 4), True
        self.block = 3 * self.side**2

    def encode(self, images: Tensor) -> Tensor:
        *lead, views, _, _, _ = images.shape
        g, b, n = self.grid, self.side, self.patch // self.side
        x = to_unit(images).reshape(-1, g, n, b, g, n, b, 3).permute(0, 1, 4, 2, 5, 3, 6, 7)
        return x.reshape(*lead, views * g * g, self.channels)

    def decode(self, latents: Tensor, views: int) -> Tensor:
        lead = latents.shape[:-2]
        g, b, n = self.grid, self.side, self.patch // self.side
        x = latents.float().reshape(-1, g, g, n, n, b, b, 3).permute(0, 1, 3, 5, 2, 4, 6, 7)
        return to_bytes(x.reshape(*lead, views, g * self.patch, g * self.patch, 3))

    def clip(self, latents: Tensor) -> Tensor:
        return latents.clamp(-1, 1)


class AutoencoderTokenizer(nn.Module):
    """A small convolutional autoencoder, one latent vector per `patch` x `patch` square.

    Trained with an L1 + MSE reconstruction loss by `stages.simulator` and frozen afterwards.
    """

    def __init__(self, image_size: int, patch: int, channels: int, width: int = 48) -> None:
        super().__init__()
        self.patch, self.grid, self.channels = patch, image_size // patch, channels
        self.block, self.bounded = channels, True
        halvings = patch.bit_length() - 1
        if 2**halvings != patch:
            raise ValueError(f"autoencoder tokenizer: patch must be a power of two, got {patch}")
        down: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1)]
        up: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
        for _ in range(halvings):
            down += [nn.SiLU(), nn.Conv2d(width, width, 4, 2, 1)]
            up += [nn.SiLU(), nn.ConvTranspose2d(width, width, 4, 2, 1)]
        self.down = nn.Sequential(*down, nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1))
        self.up = nn.Sequential(*up, nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))

    def encode(self, images: Tensor) -> Tensor:
        *lead, views, size, _, _ = images.shape
        x = to_unit(images).reshape(-1, size, size, 3).permute(0, 3, 1, 2)
        z = torch.tanh(self.down(x)).flatten(2).transpose(1, 2)
        return z.reshape(*lead, views * self.grid**2, self.channels)

    def reconstruct(self, latents: Tensor, views: int) -> Tensor:
        """Latents to float images `[..., V, H, W, 3]` in about [-1, 1] (differentiable)."""
        lead = latents.shape[:-2]
        z = latents.reshape(-1, self.grid, self.grid, self.channels).permute(0, 3, 1, 2)
        size = self.grid * self.patch
        return self.up(z).permute(0, 2, 3, 1).reshape(*lead, views, size, size, 3)

    def decode(self, latents: Tensor, views: int) -> Tensor:
        return to_bytes(self.reconstruct(latents, views))

    def clip(self, latents: Tensor) -> Tensor:
        return latents.clamp(-1, 1)

    def loss(self, images: Tensor) -> Tensor:
        """Reconstruction loss of images `[B, V, H, W, 3]` uint8."""
        recon = self.reconstruct(self.encode(images), images.shape[-4])
        target = to_unit(images)
        return F.l1_loss(recon, target) + F.mse_loss(recon, target)


def build_tokenizer(config: SimulatorConfig, image_size: int) -> nn.Module:
    """The tokenizer a config names; a published one is read from its folder (UserError if bad)."""
    if config.tokenizer == "patch":
        return PatchTokenizer(image_size, config.patch)
    if config.tokenizer == "autoencoder":
        return AutoencoderTokenizer(image_size, config.patch, config.latent_channels)
    # Here, because diffusers takes seconds to import and is no dependency of the small models.
    try:
        from worldenv.models.vae import load_tokenizer
    except ModuleNotFoundError as error:
        raise UserError(
            f"config simulator.tokenizer {config.tokenizer!r}: expected the package {error.name}, "
            "which is not installed. Install the models' libraries: pip install 'worldenv[models]'."
        ) from error
    return load_tokenizer(config, image_size)
