"""Published autoencoders (`diffusers`) as tokenizers: Wan's video VAE, Stable Diffusion's
`AutoencoderKL`, TAESD's `AutoencoderTiny`.

    tokenizer = load_tokenizer(SimulatorConfig(tokenizer="wan-vae", tokenizer_folder=...), 256)
    latents = tokenizer.encode(images)  # [..., V, H, W, 3] uint8 -> [..., S, Z], normalised
    images = tokenizer.decode(latents, views)

A token is a square of `side` x `side` latents, its Z = z * side**2 channels in the order (c, row,
column): what Wan's `patch_embedding` sees. Latents are the mode of the posterior, normalised as the
folder says: (latent - mean) * scale.

Every image stands by itself here, also for the video VAE, where it is a video of one frame and so
equals the first latent of any video: no state, any row at any time. The other form, four frames a
latent, is exact too: `WanVAE.encode_video` and `decode_video` of whole videos, and `WanVAE.stream`
of videos that come in pieces, with its state as an object of its own.

Liberty: diffusers' public `encode` and `decode` of the video VAE keep their caches on the model, so
that two threads would mix theirs; its parts are called here in their place (and pinned in tests).
This module costs seconds to import: only what chose a published tokenizer does.
"""

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self, get_args, get_origin

import diffusers
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLWan, AutoencoderTiny
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from torch import Tensor, nn

from worldenv.config import SimulatorConfig
from worldenv.models.pixels import to_bytes, to_unit
from worldenv.models.vae_folder import Published, find
from worldenv.models.weights import fill
from worldenv.runtime.errors import UserError

FRAMES = 4  # of a latent of Wan's video VAE, but for the first
LARGEST = 1 << 14  # whole number in a config
AT_ONCE = 8 * 256 * 256  # pixels in one pass: bounds the memory of activations


class PublishedTokenizer(nn.Module):
    """One frozen autoencoder of diffusers; see the module's docstring and `models.tokenizer`.

    Its weights stay where they are published: they are in no checkpoint and in no list of
    parameters, and copies of a model share them. `to` moves them.
    """

    published: type[nn.Module]
    """The class of diffusers."""
    bounded = False

    def __init__(self, vae: nn.Module, image_size: int, patch: int) -> None:
        super().__init__()
        self._held = (vae.requires_grad_(False).eval(),)  # a tuple: no submodule
        self.size, pixels = image_size, self.pixels(vae.config)
        self.side, self.grid = patch // pixels, image_size // patch
        if patch != self.side * pixels or image_size != self.grid * patch:
            raise UserError(
                f"config simulator.patch: expected a multiple of {pixels}, the pixels of a latent "
                f"of {type(vae).__name__}, that divides env.image_size {image_size}, got {patch}"
            )
        mean, scale = self.statistics(vae.config)
        self.channels = self.block = len(mean) * self.side**2
        self.register_buffer("mean", mean[:, None, None], persistent=False)
        self.register_buffer("scale", scale[:, None, None], persistent=False)

    @property
    def vae(self) -> nn.Module:
        """The autoencoder, as diffusers has it."""
        return self._held[0]

    def __deepcopy__(self, memo: dict) -> Self:
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.vae._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @staticmethod
    def pixels(config: Mapping[str, Any]) -> int:
        """Pixels on a side of a latent."""
        raise NotImplementedError

    @staticmethod
    def statistics(config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Mean and scale `[z]` of the latents; normalised they are (latent - mean) * scale."""
        shift, factor = config.get("shift_factor") or 0.0, config["scaling_factor"]
        mean, std = config.get("latents_mean"), config.get("latents_std")
        z = config["latent_channels"]
        mean = torch.full((z,), shift) if mean is None else torch.tensor(mean)
        return mean, torch.full((z,), factor) if std is None else factor / torch.tensor(std)

    def _encode(self, images: Tensor) -> Tensor:
        """`[N, 3, H, W]` in [-1, 1] to raw latents `[N, z, h, w]`."""
        return self.vae.encode(images).latent_dist.mode()

    def _decode(self, latents: Tensor) -> Tensor:
        """Raw latents `[N, z, h, w]` to images `[N, 3, H, W]` in about [-1, 1]."""
        return self.vae.decode(latents).sample

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        *lead, views, _, _, _ = images.shape
        pieces = images.flatten(0, -4).split(self._rows())
        z = torch.cat([self.tokens(self._encode(self._unit(piece))) for piece in pieces])
        return z.reshape(*lead, views * self.grid**2, self.channels)

    @torch.no_grad()
    def decode(self, latents: Tensor, views: int) -> Tensor:
        lead = latents.shape[:-2]
        pieces = latents.reshape(-1, self.grid**2, self.channels).split(self._rows())
        images = torch.cat([to_bytes(self._decode(self.latents(piece))) for piece in pieces])
        return images.permute(0, 2, 3, 1).reshape(*lead, views, self.size, self.size, 3)

    def clip(self, latents: Tensor) -> Tensor:
        return latents

    def tokens(self, latents: Tensor) -> Tensor:
        """Raw latents `[N, z, h, w]` to normalised tokens `[N, grid**2, Z]`, float32."""
        z = (latents.float() - self.mean) * self.scale
        return F.pixel_unshuffle(z, self.side).flatten(2).transpose(1, 2)

    def latents(self, tokens: Tensor) -> Tensor:
        """Tokens `[N, grid**2, Z]` to raw latents `[N, z, h, w]` in the autoencoder's precision."""
        z = tokens.float().transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return (F.pixel_shuffle(z, self.side) / self.scale + self.mean).to(self.vae.dtype)

    def _unit(self, images: Tensor) -> Tensor:
        """`[N, ..., H, W, 3]` uint8 to `[N, 3, ..., H, W]` in [-1, 1], in the autoencoder's
        precision."""
        # Contiguous: convolutions of other layouts sum in another order.
        return to_unit(images).to(self.vae.dtype).movedim(-1, 1).contiguous()

    def _rows(self, frames: int = 1) -> int:
        """Rows to compute at once."""
        return max(1, AT_ONCE // (frames * self.size**2))


class KLVAE(PublishedTokenizer):
    """`AutoencoderKL`: Stable Diffusion's, FLUX's (with `shift_factor`) and kin."""

    published = AutoencoderKL

    @staticmethod
    def pixels(config: Mapping[str, Any]) -> int:
        return 2 ** (len(config["block_out_channels"]) - 1)


class TinyVAE(PublishedTokenizer):
    """`AutoencoderTiny` (TAESD), which has no posterior. Its own range of images, [0, 1], is within
    diffusers' class, and its latents come normalised (`scaling_factor` 1)."""

    published = AutoencoderTiny

    @staticmethod
    def pixels(config: Mapping[str, Any]) -> int:
        return 2 ** (len(config["num_encoder_blocks"]) - 1)

    def _encode(self, images: Tensor) -> Tensor:
        return self.vae.encode(images).latents


class WanVAE(PublishedTokenizer):
    """`AutoencoderKLWan`, 2.1 (z 16, 8 pixels a latent) and 2.2 (z 48, 16 pixels)."""

    published = AutoencoderKLWan

    @staticmethod
    def pixels(config: Mapping[str, Any]) -> int:
        return 2 ** (len(config["dim_mult"]) - 1) * (config["patch_size"] or 1)

    @staticmethod
    def statistics(config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        return torch.tensor(config["latents_mean"]), 1 / torch.tensor(config["latents_std"])

    def _encode(self, images: Tensor) -> Tensor:
        return self.encode_frames(images[:, :, None])[:, :, 0]

    def _decode(self, latents: Tensor) -> Tensor:
        return self.decode_latent(latents[:, :, None])[:, :, 0]

    def stream(self, batch: int, views: int) -> "VideoStream":
        """The beginning of B videos of V views."""
        return VideoStream(self, batch, views)

    def encode_video(self, images: Tensor) -> Tensor:
        """Whole videos `[B, T, V, H, W, 3]` uint8, T = 1 + 4 (F - 1), to latents `[B, F, S, Z]`.

        A few videos at a time: what their states take is bounded too.
        """
        views = images.shape[2]
        pieces = images.split(max(1, self._rows(FRAMES) // views))
        return torch.cat([self.stream(len(piece), views).encode(piece) for piece in pieces])

    def decode_video(self, latents: Tensor, views: int) -> Tensor:
        """Latents `[B, F, S, Z]` of whole videos to images `[B, T, V, H, W, 3]` uint8."""
        pieces = latents.split(max(1, self._rows(FRAMES) // views))
        return torch.cat([self.stream(len(piece), views).decode(piece) for piece in pieces])

    def encode_frames(self, frames: Tensor, maps: list | None = None) -> Tensor:
        """The next 1 (first) or 4 frames `[N, 3, T, H, W]` to a raw latent `[N, z, 1, h, w]`.

        maps: what the encoder remembers of the frames before, changed in place; None: nothing.
        """
        patch = self.vae.config.patch_size
        x = patchify(frames, patch) if patch else frames
        x = self.vae.encoder(x, feat_cache=maps, feat_idx=[0])
        return self.vae.quant_conv(x).chunk(2, 1)[0]  # the mode: what follows is its variance

    def decode_latent(self, latent: Tensor, maps: list | None = None, first: bool = True) -> Tensor:
        """The next raw latent `[N, z, 1, h, w]` to its 1 (first) or 4 frames `[N, 3, T, H, W]`.

        maps: what the decoder remembers of the latents before, changed in place; None: nothing.
        """
        patch, x = self.vae.config.patch_size, self.vae.post_quant_conv(latent)
        x = self.vae.decoder(x, feat_cache=maps, feat_idx=[0], first_chunk=first)
        return unpatchify(x, patch) if patch else x


class VideoStream:
    """B videos of V views on their way through Wan's VAE, in lockstep: 1 frame and then 4 a latent.

    Exact: pieces of a video give what the whole gives. All rows begin together, for the caches of
    a later one would not exist yet; a row cannot be begun anew. `bytes` is what it keeps.
    """

    def __init__(self, tokenizer: WanVAE, batch: int, views: int) -> None:
        self.tokenizer, self.batch, self.views = tokenizer, batch, views
        counts = tokenizer.vae._cached_conv_counts
        rows, at_once = batch * views, tokenizer._rows(FRAMES)
        self._rows = [slice(i, min(i + at_once, rows)) for i in range(0, rows, at_once)]
        self._encoder = [[None] * counts["encoder"] for _ in self._rows]
        self._decoder = [[None] * counts["decoder"] for _ in self._rows]
        self._encoded = self._decoded = False

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The next images `[B, T, V, H, W, 3]` uint8 to latents `[B, F, S, Z]`: T = 1 + 4 (F - 1)
        in the first call, 4 F later."""
        first = 0 if self._encoded else 1
        frames = images.shape[1]
        if frames < 1 or (frames - first) % FRAMES:
            expected = "1 frame and then a multiple of 4" if first else "a multiple of 4 frames"
            raise ValueError(f"stream: expected {expected}, got {frames}")
        self._encoded = True
        ends = [first] * first + list(range(first + FRAMES, frames + 1, FRAMES))
        x = images.transpose(1, 2).flatten(0, 1)  # [B * V, T, H, W, 3]
        z = [
            self._encode_rows(x[rows], ends, maps)
            for rows, maps in zip(self._rows, self._encoder, strict=True)
        ]
        # [B * V, F, grid**2, Z]
        by_view = torch.cat(z).unflatten(0, (self.batch, self.views))
        return by_view.transpose(1, 2).flatten(2, 3)

    def _encode_rows(self, x: Tensor, ends: list[int], maps: list) -> Tensor:
        own, begin, z = self.tokenizer, 0, []
        for end in ends:
            z.append(own.tokens(own.encode_frames(own._unit(x[:, begin:end]), maps)[:, :, 0]))
            begin = end
        return torch.stack(z, 1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The next latents `[B, F, S, Z]` to images `[B, T, V, H, W, 3]` uint8: T = 1 + 4 (F - 1)
        in the first call, 4 F later."""
        z = latents.unflatten(2, (self.views, -1)).transpose(1, 2).flatten(0, 1)
        begins, self._decoded = not self._decoded, True
        images = torch.cat(
            [
                torch.cat(list(self._decode_rows(z[rows], maps, begins)), 1)
                for rows, maps in zip(self._rows, self._decoder, strict=True)
            ]
        )  # [B * V, T, H, W, 3]
        return images.unflatten(0, (self.batch, self.views)).transpose(1, 2)

    def _decode_rows(self, z: Tensor, maps: list, begins: bool) -> Iterator[Tensor]:
        own = self.tokenizer
        for f in range(z.shape[1]):
            latent = own.latents(z[:, f])[:, :, None]
            frames = own.decode_latent(latent, maps, first=begins and f == 0)
            yield to_bytes(frames).permute(0, 2, 3, 4, 1)

    @property
    def bytes(self) -> "StateBytes":
        """What the state takes now."""
        return StateBytes(*(_bytes(maps) for maps in (self._encoder, self._decoder)))


class StateBytes(NamedTuple):
    """Bytes of the state of a `VideoStream`, by direction."""

    encoder: int
    decoder: int


def _bytes(maps: list[list]) -> int:
    return sum(m.nbytes for part in maps for m in part if isinstance(m, Tensor))


def state_bytes(config: Mapping[str, Any], size: int, dtype: torch.dtype) -> StateBytes:
    """Of one video of one view of `size` x `size` pixels, for Wan's VAE of this `config` (that of
    its folder, `published_config`) in `dtype`. Computed without weights or memory.
    """
    vae = _on_meta(AutoencoderKLWan, config, "the config")
    nn.Module.to(vae, dtype)  # diffusers' own `to` warns
    stream = WanVAE(vae, size, WanVAE.pixels(vae.config)).to("meta").stream(1, 1)
    images = torch.empty(1, 1 + FRAMES, 1, size, size, 3, dtype=torch.uint8, device="meta")
    stream.decode(stream.encode(images))
    return stream.bytes


KINDS: dict[str, type[PublishedTokenizer]] = {
    "wan-vae": WanVAE,
    "kl-vae": KLVAE,
    "tiny-vae": TinyVAE,
}


def published_config(kind: str, folder: Path | None) -> dict[str, Any]:
    """The autoencoder's config, as published, of a tokenizer's kind and folder. UserError as
    `load_tokenizer`'s."""
    return _find(kind, folder).config


def load_tokenizer(config: SimulatorConfig, image_size: int) -> PublishedTokenizer:
    """The published tokenizer that a config names, in `config.tokenizer_precision`.

    UserError, naming file and key, for a folder that is not of the kind the config says, for an
    incomplete or damaged one, and for a patch that its latents do not fill.
    """
    kind, found = KINDS[config.tokenizer], _find(config.tokenizer, config.tokenizer_folder)
    vae = _on_meta(kind.published, found.config, found.told)
    fill(vae, found.tensors(), found.source, getattr(torch, config.tokenizer_precision))
    return kind(vae, image_size, config.patch)


def blank(config: SimulatorConfig, image_size: int, said: Mapping[str, Any]) -> PublishedTokenizer:
    """The tokenizer that a config names, of an autoencoder of the config `said`, without weights:
    on `meta`."""
    kind = KINDS[config.tokenizer]
    vae = _on_meta(kind.published, said, "the config")
    nn.Module.to(vae, getattr(torch, config.tokenizer_precision))  # diffusers' own `to` warns
    return kind(vae, image_size, config.patch).to("meta")


def _find(kind: str, folder: Path | None) -> Published:
    names = {k.published.__name__: name for name, k in KINDS.items()}
    return find(folder, KINDS[kind].published.__name__, names)


def _on_meta(published: type, config: Mapping[str, Any], told: Path | str) -> Any:
    """An autoencoder of this config without weights. UserError naming `told` and the key for what
    it cannot be built from."""
    known = inspect.signature(published.__init__, eval_str=True).parameters
    # What AutoencoderTiny's class itself adds to its config.
    given = {k: v for k, v in config.items() if k != "block_out_channels" or k in known}
    for key, value in given.items():
        if key not in known:
            raise UserError(
                f"{told}: unknown key {key!r}: {published.__name__} of diffusers "
                f"{diffusers.__version__} has none. Remove it if the model does not need it, or "
                "update diffusers."
            )
        hint = known[key].annotation
        flag = isinstance(value, bool) and isinstance(known[key].default, bool)
        if not (flag or _fits(hint, value)):
            kind = hint.__name__ if isinstance(hint, type) else str(hint)
            raise UserError(
                f"{told}: {key}: expected {kind} of at most {LARGEST}, got {str(value)[:80]!r}."
            )
    try:
        with torch.device("meta"):
            vae = published(**given)
    except (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError, NameError) as error:
        raise UserError(
            f"{told}: {published.__name__} cannot be built from it: {error}. Restore the published "
            "config."
        ) from error
    for key, holds, expected in _rules(vae.config):
        if not holds:
            raise UserError(f"{told}: {key}: expected {expected}, got {str(vae.config[key])[:80]}.")
    return vae


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value from JSON is what an annotation of diffusers says."""
    if get_origin(hint) in (list, tuple):
        return isinstance(value, list) and all(_fits(get_args(hint)[0], v) for v in value)
    if get_args(hint):  # a union
        return any(_fits(inner, value) for inner in get_args(hint))
    if hint is float:
        return type(value) in (int, float) and abs(value) < 1e30
    # A damaged count would have modules built for ever.
    return type(value) is hint and (hint is not int or abs(value) <= LARGEST)


def _rules(config: Mapping[str, Any]) -> Iterator[tuple[str, bool, str]]:
    """What the values of a config require of each other: (key, whether it holds, expected)."""
    z, patch = config.get("z_dim") or config["latent_channels"], config.get("patch_size")
    yield "patch_size", patch is None or patch > 0, "a positive number"
    for key in ("in_channels", "out_channels"):
        colours = 3 * (patch or 1) ** 2
        yield key, config[key] == colours, f"{colours}, the colours of a pixel (or of its patch)"
    for key in ("latents_mean", "latents_std"):
        values = config.get(key)
        yield key, values is None or len(values) == z, f"{z} numbers, one for each channel"
    yield "latents_std", all(v > 0 for v in config.get("latents_std") or ()), "positive numbers"
    yield "scaling_factor", config.get("scaling_factor", 1) > 0, "a positive number"
