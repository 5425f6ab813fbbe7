"""Published autoencoders against diffusers itself: equal, with state and without."""

import copy
import inspect
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from diffusers.models.autoencoders import autoencoder_kl_wan
from safetensors.torch import load_file, save_file

from worldenv.config import SimulatorConfig
from worldenv.envs.libero.robot import embodiment
from worldenv.layouts import vae as published
from worldenv.models import vae
from worldenv.models.simulator import Simulator
from worldenv.models.tokenizer import build_tokenizer, to_bytes, to_unit
from worldenv.models.vae_folder import STEM, WAN_2_2
from worldenv.runtime.seeds import generator

VERSIONS = ("2.1", "2.2")
PATCH = {"2.1": 16, "2.2": 32}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Every layout once, by name."""
    root = tmp_path_factory.mktemp("vae")
    for version in VERSIONS:
        published.wan_vae(root / f"wan-{version}", version)
        published.wan_vae_of_authors(root / f"authors-{version}", version)
    published.kl_vae(root / "kl", scaling_factor=0.3)
    more = {"shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}
    published.kl_vae(root / "kl-shifted", latent_channels=6, scaling_factor=0.3611, **more)
    published.tiny_vae(root / "tiny")
    return root


def wan(folder: Path, version: str, size: int = 32, **changes) -> vae.WanVAE:
    config = SimulatorConfig(tokenizer="wan-vae", tokenizer_folder=folder, patch=PATCH[version])
    return build_tokenizer(replace(config, **changes), size)


def images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=generator("images"))


def videos(image: torch.Tensor) -> torch.Tensor:
    """`[B, T, 1, H, W, 3]` uint8 as diffusers takes it, `[B, 3, T, H, W]`."""
    return to_unit(image[:, :, 0]).permute(0, 4, 1, 2, 3).contiguous()


def in_tokens(latents: torch.Tensor, side: int) -> torch.Tensor:
    """Normalised latents `[N, z, h, w]` cut into tokens as Wan's patch embedding does."""
    n, _, h, w = latents.shape
    rows = [
        latents[:, :, r : r + side, c : c + side].reshape(n, -1)
        for r in range(0, h, side)
        for c in range(0, w, side)
    ]
    return torch.stack(rows, 1)


def as_pipelines_do(model: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Normalised, as diffusers' Wan pipelines write it."""
    mean, std = statistics(model)
    return (latents - mean) * std


def back_as_pipelines_do(model: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    mean, std = statistics(model)
    return latents / std + mean


def statistics(model: AutoencoderKLWan) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (1, model.config.z_dim, 1, 1, 1)
    mean = torch.tensor(model.config.latents_mean).view(shape)
    return mean, 1.0 / torch.tensor(model.config.latents_std).view(shape)


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_an_image_by_itself_is_the_first_latent_of_any_video(folders, version):
    tokenizer, video = wan(folders / f"wan-{version}", version), images(2, 5, 1, 32, 32)
    model = tokenizer.vae
    latents = as_pipelines_do(model, model.encode(videos(video)).latent_dist.mode())
    got = tokenizer.encode(video[:, 0])
    assert torch.equal(got, in_tokens(latents[:, :, 0], tokenizer.side))
    assert got.shape == (2, tokenizer.grid**2, tokenizer.channels)
    assert tokenizer.channels == tokenizer.block == 4 * model.config.z_dim
    image = model.decode(back_as_pipelines_do(model, latents[:, :, :1])).sample[:, :, 0]
    assert torch.equal(tokenizer.decode(got, 1)[:, 0], to_bytes(image).permute(0, 2, 3, 1))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("rows", [2, 1])
@torch.no_grad()
def test_pieces_of_a_video_give_what_the_whole_gives(folders, version, rows, monkeypatch):
    tokenizer, video = wan(folders / f"wan-{version}", version), images(2, 13, 1, 32, 32)
    model = tokenizer.vae
    # A convolution over two rows rounds otherwise than over one: as many here as there. On some
    # processors over two frames too: equal to rounding, and bytes to one.
    monkeypatch.setattr(vae, "AT_ONCE", rows * 4 * 32 * 32)
    split = [model.encode(x).latent_dist.mode() for x in videos(video).split(rows)]
    normalised = as_pipelines_do(model, torch.cat(split))
    expected = [in_tokens(normalised[:, :, f], tokenizer.side) for f in range(4)]
    stream = tokenizer.stream(2, 1)
    parts = [stream.encode(video[:, a:b]) for a, b in ((0, 1), (1, 5), (5, 13))]
    assert [part.shape[1] for part in parts] == [1, 1, 2]
    got = torch.cat(parts, 1)
    torch.testing.assert_close(got, torch.stack(expected, 1))
    seen = [stream.decode(got[:, a:b]) for a, b in ((0, 1), (1, 2), (2, 4))]
    assert [part.shape[1] for part in seen] == [1, 4, 8]
    split = back_as_pipelines_do(model, normalised).split(rows)
    frames = torch.cat([model.decode(z).sample for z in split])
    bytes_off = torch.cat(seen, 1)[:, :, 0].int() - to_bytes(frames).permute(0, 2, 3, 4, 1)
    assert bytes_off.abs().max() <= 1
    # The numbers behind the bytes too.
    maps = [None] * model._cached_conv_counts["decoder"]
    raw = [tokenizer.decode_latent(split[0][:, :, f : f + 1], maps, f == 0) for f in range(4)]
    torch.testing.assert_close(torch.cat(raw, 2).clamp(-1, 1), frames[:rows])
    with pytest.raises(ValueError, match="expected a multiple of 4 frames, got 2"):
        stream.encode(video[:, :2])
    with pytest.raises(ValueError, match="expected 1 frame and then a multiple of 4, got 4"):
        tokenizer.stream(2, 1).encode(video[:, :4])


@torch.no_grad()
def test_views_and_batches_in_a_stream_are_where_they_are_without(folders):
    tokenizer, video = wan(folders / "wan-2.1", "2.1"), images(2, 5, 3, 32, 32)
    stream, alone = tokenizer.stream(2, 3), tokenizer.stream(1, 1)
    latents = stream.encode(video)
    assert torch.equal(latents[:, 0], tokenizer.encode(video[:, 0]))
    each = tokenizer.grid**2
    row = alone.encode(video[1:, :, 2:])
    torch.testing.assert_close(row, latents[1:, :, 2 * each :], rtol=1e-5, atol=1e-5)
    seen = stream.decode(latents)
    assert seen.shape == video.shape
    assert (seen[1:, :, 2:].int() - alone.decode(row).int()).abs().max() <= 1
    assert torch.equal(seen[:, 0], tokenizer.decode(latents[:, 0], 3))


@torch.no_grad()
def test_whole_videos_are_cut_into_bounded_batches(folders, monkeypatch):
    tokenizer, video = wan(folders / "wan-2.1", "2.1"), images(3, 5, 2, 32, 32)
    streams = []
    monkeypatch.setattr(
        tokenizer,
        "stream",
        lambda *sizes: streams.append(sizes) or vae.VideoStream(tokenizer, *sizes),
    )
    monkeypatch.setattr(vae, "AT_ONCE", 4 * 4 * 32 * 32)
    latents = tokenizer.encode_video(video)
    expected = torch.cat([vae.VideoStream(tokenizer, len(v), 2).encode(v) for v in video.split(2)])
    assert torch.equal(latents, expected)
    seen = tokenizer.decode_video(latents, 2)
    expected = [vae.VideoStream(tokenizer, len(z), 2).decode(z) for z in latents.split(2)]
    assert torch.equal(seen, torch.cat(expected))
    assert seen.shape == video.shape
    assert streams == [(2, 2), (1, 2)] * 2


@pytest.mark.parametrize("version", VERSIONS)
def test_the_authors_file_is_the_same_autoencoder(folders, version):
    theirs = wan(folders / f"authors-{version}", version)
    ours = wan(folders / f"wan-{version}", version).vae.state_dict()
    assert len(ours) == {"2.1": 194, "2.2": 196}[version]
    state = theirs.vae.state_dict()
    assert ours.keys() == state.keys()
    assert all(torch.equal(ours[name], state[name]) for name in ours)
    by_file = folders / f"authors-{version}" / f"Wan{version}_VAE.pth"
    assert wan(by_file, version).vae.config == theirs.vae.config
    assert theirs.vae.config.latents_mean[0] == {"2.1": -0.7571, "2.2": -0.2289}[version]
    assert all(theirs.vae.config[key] == value for key, value in WAN_2_2.items()) == (
        version == "2.2"
    )


def test_the_fixture_names_tensors_as_diffusers_converter_expects(folders):
    """Its converter knows 2.1 only; 2.2's names were held against the authors' module."""
    own = wan(folders / "wan-2.1", "2.1").vae
    converted = convert_wan_vae_to_diffusers(dict(published.of_authors(own)))
    assert converted.keys() == own.state_dict().keys()
    assert all(converted[name].shape == t.shape for name, t in own.state_dict().items())


def test_normalisation_there_and_back(folders):
    tokenizer = wan(folders / "wan-2.2", "2.2", size=64)
    raw = torch.randn(3, 48, 4, 4, generator=generator("raw"))
    there = tokenizer.tokens(raw)
    assert there.shape == (3, 4, 192)
    torch.testing.assert_close(tokenizer.latents(there), raw, rtol=1e-6, atol=1e-6)
    mean, std = WAN_2_2["latents_mean"][7], WAN_2_2["latents_std"][7]
    # Token (row 1, column 0), channel 7, its second row and first column.
    torch.testing.assert_close(there[2, 2, 7 * 4 + 2], (raw[2, 7, 3, 0] - mean) / std)


def test_what_streaming_relies_on_inside_diffusers():
    """Where this fails diffusers has changed: read its encoder and decoder again, then `vae.py`."""
    model = AutoencoderKLWan(**published.WAN_SIZES["2.2"]).requires_grad_(False)
    encode, decode = (inspect.signature(m.forward) for m in (model.encoder, model.decoder))
    assert list(encode.parameters) == ["x", "feat_cache", "feat_idx"]
    assert list(decode.parameters) == ["x", "feat_cache", "feat_idx", "first_chunk"]
    assert autoencoder_kl_wan.CACHE_T == 2
    counts = model._cached_conv_counts
    assert counts == {"encoder": 26, "decoder": 34}
    for size, coder, channels, first in ((32, "encoder", 12, {}), (4, "decoder", 48, {"x": 1})):
        maps, index = [None] * counts[coder], [0]
        further = {"first_chunk": True} if first else {}
        part = getattr(model, coder)
        part(torch.zeros(1, channels, 1, size, size), feat_cache=maps, feat_idx=index, **further)
        assert index == [sum(m is not None for m in maps)], coder
        rep = [m for m in maps if isinstance(m, str)]
        assert rep == (["Rep"] * 2 if coder == "decoder" else []), coder


def test_two_threads_do_not_mix_their_caches(folders):
    """diffusers' `decode` makes its caches before this convolution and looks them up after it."""
    tokenizer = wan(folders / "wan-2.2", "2.2")
    latents = [tokenizer.encode(image[None]) for image in images(2, 1, 32, 32)]
    expected = [tokenizer.decode(z, 1) for z in latents]
    meeting = Barrier(2, timeout=60)

    def meet(*_):
        meeting.wait()

    tokenizer.vae.post_quant_conv.register_forward_hook(meet)
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(lambda z: tokenizer.decode(z, 1), latents))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", ["kl", "kl-shifted", "tiny"])
@pytest.mark.parametrize("patch", [2, 4])
@torch.no_grad()
def test_image_autoencoders_equal_diffusers(folders, name, patch):
    kind = "tiny-vae" if name == "tiny" else "kl-vae"
    config = SimulatorConfig(tokenizer=kind, tokenizer_folder=folders / name, patch=patch)
    tokenizer, image = build_tokenizer(config, 16), images(3, 2, 16, 16)
    model, factor = tokenizer.vae, tokenizer.vae.config.scaling_factor
    shift = model.config.shift_factor or 0.0
    x = to_unit(image.flatten(0, 1)).permute(0, 3, 1, 2).contiguous()
    raw = model.encode(x).latents if name == "tiny" else model.encode(x).latent_dist.mode()
    normalised = (raw - shift) * factor
    got = tokenizer.encode(image)
    assert torch.equal(got, in_tokens(normalised, patch // 2).reshape(got.shape))
    assert got.shape == (3, 2 * (16 // patch) ** 2, tokenizer.channels)
    seen = to_bytes(model.decode(normalised / factor + shift).sample)
    assert torch.equal(tokenizer.decode(got, 2), seen.permute(0, 2, 3, 1).reshape(image.shape))


def test_old_names_of_attention_are_read(folders, tmp_path):
    shutil.copytree(folders / "kl", tmp_path / "old")
    tensors = load_file(folders / "kl" / f"{STEM}.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    named = {}
    for name, tensor in tensors.items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        named[name] = tensor
    assert len(named.keys() - tensors.keys()) == 16
    save_file(named, tmp_path / "old" / f"{STEM}.safetensors")
    config = SimulatorConfig(tokenizer="kl-vae", tokenizer_folder=tmp_path / "old", patch=2)
    state = build_tokenizer(config, 16).vae.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def test_precision_is_the_configs(folders):
    exact = wan(folders / "wan-2.1", "2.1")
    half = wan(folders / "wan-2.1", "2.1", tokenizer_precision="bfloat16")
    assert {p.dtype for p in half.vae.parameters()} == {torch.bfloat16}
    image = images(2, 1, 32, 32)
    latents = half.encode(image)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, exact.encode(image), rtol=0.05, atol=0.05)
    assert half.decode(latents, 1).dtype == torch.uint8


def test_weights_are_in_no_checkpoint_shared_by_copies_and_moved(folders):
    small = SimulatorConfig(width=16, layers=1, heads=2, window=1, precision="bfloat16")
    named = {"tokenizer": "kl-vae", "tokenizer_folder": folders / "kl", "patch": 4}
    config = replace(small, prediction="velocity", **named)
    torch.manual_seed(0)
    simulator = Simulator(config, embodiment(16))
    assert not [name for name in simulator.state_dict() if name.startswith("tokenizer.")]
    assert not list(simulator.tokenizer.parameters())
    assert simulator.for_generation().tokenizer is simulator.tokenizer
    state = simulator.start(2)
    everyone = torch.ones(2, dtype=torch.bool).numpy()
    past = torch.zeros(2, 1, 8, 7)
    frames = images(2, 1, 2, 16, 16)
    simulator.prefill(state, everyone, frames, torch.zeros(2, 1, 8), past, torch.arange(2))
    image, _ = simulator.step(state, past[:, 0], 2, everyone)
    assert image.shape == (2, 2, 16, 16, 3)
    assert state.latents.abs().max() > 1  # normalised latents are not held to [-1, 1]
    assert next(simulator.to("meta").tokenizer.vae.parameters()).is_meta
    assert simulator.tokenizer.mean.is_meta
    assert copy.deepcopy(simulator).tokenizer is simulator.tokenizer


def test_batches_are_bounded(folders, monkeypatch):
    tokenizer, image = wan(folders / "wan-2.1", "2.1"), images(5, 1, 32, 32)
    rows = []
    inner = tokenizer.vae.encoder.forward
    monkeypatch.setattr(
        tokenizer.vae.encoder, "forward", lambda x, **kw: rows.append(len(x)) or inner(x, **kw)
    )
    whole = tokenizer.encode(image)
    monkeypatch.setattr(vae, "AT_ONCE", 2 * 32 * 32)
    torch.testing.assert_close(tokenizer.encode(image), whole, rtol=1e-5, atol=1e-5)
    assert rows == [5, 2, 2, 1]


FULL = {
    "2.1": ({}, 176, 296),
    "2.2": ({**WAN_2_2, "base_dim": 160, "decoder_base_dim": 256}, 74, 223),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_bytes_of_the_state_as_measured(folders, version):
    config, encoder, decoder = FULL[version]
    got = vae.state_bytes(config, 256, torch.bfloat16)
    assert [round(b / 2**20) for b in got] == [encoder, decoder]
    folder = folders / f"wan-{version}"
    small = vae.state_bytes(vae.published_config("wan-vae", folder), 32, torch.float32)
    stream = wan(folder, version).stream(3, 2)
    stream.decode(stream.encode(images(3, 9, 2, 32, 32)))
    assert stream.bytes == vae.StateBytes(6 * small.encoder, 6 * small.decoder)
