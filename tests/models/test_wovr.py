"""WoVR's simulators against a plain transcription of what its authors compute."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from worldenv.config import SimulatorConfig
from worldenv.envs.libero.robot import embodiment
from worldenv.layouts import wan as fixture
from worldenv.models.wan import from_tokens
from worldenv.models.wovr import WoVR
from worldenv.runtime.errors import UserError
from worldenv.runtime.seeds import counter_normal, generator
from worldenv.stages import store

ALL = np.ones(2, bool)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("wovr")
    fixture.write_wovr(path / "wovr", torch.float32)
    torch.manual_seed(0)
    mean, std = torch.randn(4).tolist(), (0.5 + torch.rand(4)).tolist()
    sizes = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1}
    AutoencoderKLWan(**sizes, latents_mean=mean, latents_std=std).save_pretrained(path / "vae")
    return path


def robot(views=1, chunk=8):
    whole = embodiment(32, chunk)
    return dataclasses.replace(whole, views=whole.views[:views])


def world(folder, seen=None, **changes) -> WoVR:
    settings = {"kind": "wovr", "folder": folder / "wovr", "patch": 16, "tokenizer": "wan-vae"}
    config = SimulatorConfig(**settings | {"tokenizer_folder": folder / "vae"} | changes)
    return WoVR(config, seen or robot()).eval()


def contexts(n: int, frames: int = 1):
    g = generator("contexts")
    image = torch.randint(0, 255, (n, frames, 1, 32, 32, 3), dtype=torch.uint8, generator=g)
    action = torch.randn(n, frames, 8, 7, generator=g)
    action[:, 0] = 0
    return image, torch.randn(n, frames, 8, generator=g), action


def as_published(folder, z, actions, sigma):
    """The velocity of latents `[B, z, 4, h, w]`: diffusers' parts, joined as WoVR joins them."""
    tensors = fixture.write_wovr(folder / f"again-{sigma}", torch.float32)
    heads = {"num_attention_heads": 2, "attention_head_dim": 128, "num_layers": 2}
    wan = WanTransformer3DModel(**fixture.SIZES | heads)
    wan.load_state_dict(tensors, strict=False)
    t = {name: tensor for name, tensor in tensors.items() if name.startswith("action")}

    def layer(x, name):
        return F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])

    context = layer(F.gelu(layer(actions, "action_mlp1.0")), "action_mlp1.2")
    first = actions[:, :1].repeat(1, 3, 1)
    grouped = torch.cat([first, actions], 1).reshape(len(z), 4, 4 * 7)
    added = layer(F.silu(layer(grouped, "action_mlp2.0")), "action_mlp2.2")
    per_frame = z.shape[3] * z.shape[4] // 4
    time = torch.tensor([0.0, 0.0, sigma, sigma]).mul(1000).repeat_interleave(per_frame)
    embedder = wan.condition_embedder
    temb = embedder.time_embedder(embedder.timesteps_proj(time))[None].repeat(len(z), 1, 1)
    temb = temb + added.unsqueeze(2).repeat(1, 1, per_frame, 1).flatten(1, 2)
    modulation = embedder.time_proj(F.silu(temb)).unflatten(2, (6, -1))
    x, rotary = wan.patch_embedding(z).flatten(2).transpose(1, 2), wan.rope(z)
    for block in wan.blocks:
        x = block(x, context, modulation, rotary)
    shift, scale = (wan.scale_shift_table[None] + temb.unsqueeze(2)).chunk(2, 2)
    x = wan.proj_out(wan.norm_out(x) * (1 + scale.squeeze(2)) + shift.squeeze(2))
    x = x.unflatten(1, (4, z.shape[3] // 2, z.shape[4] // 2)).unflatten(-1, (2, 2, -1))
    return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)


@torch.no_grad()
def test_actions_enter_as_its_authors_let_them(folder):
    model = world(folder)
    g = torch.Generator().manual_seed(3)
    tokens, actions = torch.randn(2, 4, 4, 16, generator=g), torch.randn(2, 13, 7, generator=g)
    expected = z = from_tokens(tokens, 4, 4)
    sigmas = [5 * s / (1 + 4 * s) for s in (1.0, 0.5, 0.0)]
    for now, after in itertools.pairwise(sigmas):
        velocity = as_published(folder, expected, actions, now)
        expected = torch.cat([z[:, :, :2], (expected + (after - now) * velocity)[:, :, 2:]], 2)
    got = from_tokens(model.generate(tokens, actions, 2), 4, 4)
    error = (got - expected).abs().max() / expected.abs().max()
    print(f"relative {error:.2e}")
    assert error < 2e-6
    still = from_tokens(model.generate(tokens, 0 * actions, 2), 4, 4)
    assert (got - still).abs().max() > 1e-2 * got.abs().max()
    assert torch.equal(got[:, :, :2], z[:, :, :2])  # the context stays as it was


@torch.no_grad()
def test_chunks_follow_on_each_other(folder):
    """The first real frame and the last four are the context of the next eight."""
    model = world(folder)
    image, proprio, action = contexts(2)
    state = model.start(2)
    model.prefill(state, ALL, image, proprio, action, torch.tensor([5, 6]))
    chunks = torch.randn(2, 2, 8, 7, generator=generator("chunks"))
    frames, led = image.expand(-1, 5, -1, -1, -1, -1), model.still.expand(2, 5, 7)
    for t, chunk in enumerate(chunks):
        actions = torch.cat([led, model._executed(chunk)], 1)
        clean = model.tokenizer.stream(2, 1).encode(frames)
        noise = counter_normal(torch.tensor([5, 6]), torch.full((2,), t), (2, 4, 16))
        latents = model.generate(torch.cat([clean, noise], 1), actions, 3)
        video = model.tokenizer.stream(2, 1).decode(latents)
        assert video.shape == (2, 13, 1, 32, 32, 3)
        seen, pose = model.step(state, chunk, 3, ALL)
        assert torch.equal(seen, video[:, -1])
        assert torch.equal(pose, proprio[:, 0])
        frames = torch.cat([image, video[:, -4:]], 1)
        led = torch.cat([model.still.expand(2, 1, 7), actions[:, -4:]], 1)
        assert torch.equal(state.frames, frames)
        assert torch.equal(state.actions, led)
    assert model.still.tolist() == [0, 0, 0, 0, 0, 0, -1]


@torch.no_grad()
def test_a_row_does_not_depend_on_its_company_and_rests_when_told(folder):
    model = world(folder)
    image, proprio, action = contexts(2, 2)
    chunk = torch.randn(2, 8, 7, generator=generator("chunks"))
    alone = model.start(1)
    model.prefill(alone, ALL[:1], image[1:], proprio[1:], action[1:], torch.tensor([9]))
    expected, _ = model.step(alone, chunk[1:], 2, ALL[:1])
    state = model.start(2)
    model.prefill(state, ALL, image, proprio, action, torch.tensor([8, 8]))
    other, _ = model.step(state, chunk, 2, np.array([True, False]))
    assert torch.equal(other[1], image[1, -1])
    model.prefill(
        state, np.array([False, True]), image[1:], proprio[1:], action[1:], torch.tensor([9])
    )
    assert torch.equal(state.frames[0, -1], other[0])
    got, _ = model.step(state, chunk, 2, np.array([False, True]))
    assert torch.equal(got[0], other[0])
    assert (got[1].int() - expected[0].int()).abs().max() <= 1
    told = action[1, -1, -1, -1].sign()
    assert state.actions.shape == (2, 5, 7)
    model.prefill(
        state, np.array([False, True]), image[1:], proprio[1:], action[1:], torch.tensor([9])
    )
    assert state.actions[1, :, -1].tolist() == [-1, *[told] * 4]


def test_it_is_in_no_checkpoint_and_computes_as_told(folder, tmp_path):
    model = world(folder, precision="bfloat16").for_generation()
    assert model.dtype == torch.bfloat16
    assert set(model.state_dict()) == {"proprio_mean", "proprio_std"}
    assert not list(model.parameters())
    store.save("simulator", model, tmp_path / "simulator-0.safetensors")
    again = store.load("simulator", tmp_path / "simulator-0.safetensors")
    assert isinstance(again, WoVR)
    assert again.embodiment == model.embodiment
    weights = again.wan.state_dict()
    assert all(torch.equal(weights[n], t) for n, t in model.wan.state_dict().items())


@pytest.mark.parametrize(
    ("seen", "changes", "message"),
    [
        (robot(views=2), {}, "cameras: expected 1, as WoVR was trained, got 2"),
        (robot(chunk=4), {}, "actions a chunk: expected 8, as WoVR was trained, got 4"),
        (robot(), {"tokenizer": "patch", "tokenizer_folder": None}, "tokenizer: expected wan-vae"),
    ],
)
def test_what_does_not_fit_is_said(folder, seen, changes, message):
    with pytest.raises(UserError, match=message):
        world(folder, seen, **changes)
