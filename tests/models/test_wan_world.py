"""A published Wan as a world: what is added leaves it as it is, and its cache is exact."""

import dataclasses

import numpy as np
import pytest
import torch

from worldenv.config import SimulatorConfig
from worldenv.envs.libero.cameras import of_tasks
from worldenv.envs.libero.robot import embodiment
from worldenv.fields import from_dict
from worldenv.layouts import wan as fixture
from worldenv.models.wan import from_tokens, full_attention
from worldenv.models.wan_world import WanSimulator
from worldenv.ops import spatiotemporal_attention
from worldenv.runtime.errors import UserError
from worldenv.runtime.seeds import counter_normal, generator
from worldenv.stages import store

ALL = np.ones(3, bool)
ROBOT = embodiment(16, cameras=of_tasks("libero_spatial", (8,)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("wan")
    fixture.write(path / "wan", in_channels=12, out_channels=12, num_layers=2)
    fixture.write_prompt(path / "prompt.safetensors", 4)
    return path


def world(folder, moved=True, columns=0, **changes) -> WanSimulator:
    """moved: away from the zeros that what is added begins with."""
    torch.manual_seed(0)
    settings = {"kind": "wan", "folder": folder / "wan", "patch": 4, "window": 2, "frames": 2}
    config = SimulatorConfig(**(settings | changes))
    model = WanSimulator(config, ROBOT, columns).eval()
    if moved:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn(p.shape).to(p.dtype))
    return model


def contexts(n: int, frames: int = 1):
    g = generator("contexts")
    image = torch.randint(0, 255, (n, frames, 2, 16, 16, 3), dtype=torch.uint8, generator=g)
    action = torch.randn(n, frames, 8, 7, generator=g)
    action[:, 0] = 0
    return image, torch.randn(n, frames, 8, generator=g), action


def draws(frames: int = 3):
    g = generator("draws")
    noisy, last = (torch.randn(2, frames, 32, 48, generator=g) for _ in range(2))
    sigma = torch.rand(2, frames, generator=g)
    proprio, action = torch.randn(2, frames, 8, generator=g), torch.randn(2, frames, 8, 7)
    return noisy, last, last[:, 0], sigma, (proprio, proprio, action, action)


@torch.no_grad()
def test_what_is_added_leaves_step_zero_as_published(folder):
    model = world(folder, moved=False, columns=5)
    noisy, last, reference, sigma, known = draws()
    condition = model.condition(*known)
    condition.columns = torch.randn(2, 3, 32, 5)
    rotary = model.rotary(torch.arange(3)[None])
    attends = [full_attention] * 2
    frame, proprio = model.denoise(noisy, last, reference, sigma, condition, rotary, attends)
    latents = from_tokens(noisy, 16, 8)  # two views of 8 x 8 latents, on rows
    video = model.wan.video(latents, 1000 * sigma)
    expected = latents - sigma[:, None, :, None, None] * video
    assert torch.equal(from_tokens(frame, 16, 8), expected)
    assert torch.equal(proprio, condition.proprio)
    assert torch.equal(proprio, model._normalise(known[0]))


@torch.no_grad()
def test_every_addition_matters_once_it_is_not_zero(folder):
    model = world(folder, columns=5)
    noisy, last, reference, sigma, known = draws()
    rotary, attends = model.rotary(torch.arange(3)[None]), [full_attention] * 2
    condition = model.condition(*known)
    condition.columns = torch.randn(2, 3, 32, 5)

    def frame(condition=condition, last=last, reference=reference):
        return model.denoise(noisy, last, reference, sigma, condition, rotary, attends)[0]

    for other in (
        frame(dataclasses.replace(condition, action=0 * condition.action)),
        frame(dataclasses.replace(condition, columns=0 * condition.columns)),
        frame(last=0 * last),
        frame(reference=0 * reference),
    ):
        assert (other - frame()).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("moved", [False, True])
def test_the_action_map_enters_at_zero(folder, moved):
    model = world(folder, moved=moved, action_map=True, columns=2)
    noisy, last, reference, sigma, known = draws()
    condition = model.condition(*known)
    assert condition.columns.shape == (2, 3, 32, 48)
    assert condition.columns.any()
    condition.columns = torch.cat([condition.columns, torch.randn(2, 3, 32, 2)], -1)
    rotary, attends = model.rotary(torch.arange(3)[None]), [full_attention] * 2
    with_map, without = (
        model.denoise(noisy, last, reference, sigma, c, rotary, attends)[0]
        for c in (condition, dataclasses.replace(condition, columns=0 * condition.columns))
    )
    assert torch.equal(with_map, without) != moved


@torch.no_grad()
@pytest.mark.parametrize("text", ["constant", "words"])
@pytest.mark.parametrize(("precision", "close"), [("float32", 2e-4), ("bfloat16", 5e-2)])
def test_cached_frames_are_those_of_the_whole_window(folder, precision, close, text):
    """Each generated frame again, without a cache: clean frames at level 0 before a noisy one."""
    prompt = folder / "prompt.safetensors" if text == "words" else None
    model = world(folder, precision=precision, text=text, prompt=prompt).for_generation()
    image, proprio, action = contexts(3)
    state, seeds = model.start(3), torch.arange(3)
    model.prefill(state, ALL, image, proprio, action, seeds)
    actions = torch.randn(4, 3, 8, 7, generator=generator("actions"))
    latents, poses = [state.latents], [proprio[:, 0]]
    led = torch.cat([action, actions.transpose(0, 1)], 1)

    def attend(q, k, v):
        return spatiotemporal_attention(q, k, v, window=3)

    for t, chunk in enumerate(actions):  # four frames wrap the ring of two
        model.step(state, chunk, 1, ALL)
        n = t + 2
        noise = counter_normal(seeds, torch.full((3,), t), latents[0].shape[1:])
        past = torch.stack([latents[0], *latents], 1)  # [B, n, ...] the frame before each
        before = torch.stack([poses[0], *poses], 1)
        earlier = torch.stack([poses[0], poses[0], *poses], 1)[:, :n]
        chunks = torch.cat([torch.zeros_like(led[:, :1]), led], 1)
        condition = model.condition(before, earlier, chunks[:, :n], led[:, :n])
        level = torch.zeros(3, n)
        level[:, -1] = 1
        noisy, rotary = torch.stack([*latents, noise], 1), model.rotary(torch.arange(n)[None])
        frames, refined = model.denoise(
            noisy, past, latents[0], level, condition, rotary, [attend] * 2
        )
        pose = refined[:, -1] * model.proprio_std + model.proprio_mean
        torch.testing.assert_close(state.latents, frames[:, -1].clamp(-1, 1), rtol=0, atol=close)
        torch.testing.assert_close(state.proprio, pose, rtol=0, atol=close)
        latents.append(state.latents)
        poses.append(state.proprio)


def test_a_prompt_says_something_and_nothing_once_forgotten(folder):
    said = world(folder, text="words", prompt=folder / "prompt.safetensors")
    mute = world(folder)
    image, proprio, action = contexts(3)
    frames = []
    for model in (said, mute):
        state = model.start(3)
        model.prefill(state, ALL, image, proprio, action, torch.arange(3))
        model.step(state, action[:, 0], 2, ALL)
        frames.append(state.latents)
    assert (frames[0] - frames[1]).abs().max() > 1e-3
    assert not any(".attn2.to_k" in name for name in mute.state_dict())


@pytest.mark.parametrize("bounded", [False, True])
def test_training_lowers_the_loss_and_reaches_every_parameter(folder, bounded):
    published = (folder / "wan" / "diffusion_pytorch_model.safetensors").read_bytes()
    model = world(folder, text="words", prompt=folder / "prompt.safetensors").train()
    model.tokenizer.bounded = bounded
    image, proprio, action = contexts(4, 3)
    batch = {"image": image, "reference": image[:, 0], "proprio": proprio, "action": action}
    batch |= {"previous_proprio": proprio[:, 0], "previous_action": action[:, 0]}
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for step in range(24):
        loss, metrics = model.loss(batch, generator("loss", step % 3), self_history=step % 2 == 1)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
            assert not dead
        optimizer.step()
        losses.append(float(metrics["loss"]))
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    # Weights were mapped from the file; what is learned stays in memory.
    assert (folder / "wan" / "diffusion_pytorch_model.safetensors").read_bytes() == published


@pytest.mark.parametrize("text", ["constant", "words"])
def test_a_trained_one_is_stored_and_read_again(folder, tmp_path, text):
    prompt = folder / "prompt.safetensors" if text == "words" else None
    model = world(folder, text=text, prompt=prompt, precision="bfloat16")
    store.save("simulator", model, tmp_path / "simulator-0.safetensors")
    again = store.load("simulator", tmp_path / "simulator-0.safetensors")
    own, other = model.state_dict(), again.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert {n: t.dtype for n, t in own.items()} == {n: t.dtype for n, t in other.items()}


def test_the_schedule_is_shifted(folder):
    model = world(folder, shift=None)
    assert model.sigmas(4) == pytest.approx([1.0, 0.9375, 5 / 6, 0.625, 0.0])
    assert world(folder, shift=3.0).sigmas(2) == pytest.approx([1.0, 0.75, 0.0])


def test_positions_end(folder):
    model = world(folder)
    state = model.start(3)
    state.cache.positions[1] = 1024
    with pytest.raises(UserError, match="positions end after 1024 frames"):
        model.step(state, torch.zeros(3, 8, 7), 1, ALL)


def test_tokens_must_be_those_it_was_trained_with(folder):
    with pytest.raises(UserError, match=r"latents of 12 channels, 48 numbers, got 192"):
        world(folder, patch=8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "wan", "window": 2}, "folder: expected the folder of a published wan"),
        ({"kind": "wan", "folder": "there"}, "window: expected at least 1 for a Wan"),
        ({"text": "words"}, "prompt: expected the file of the text"),
        ({"shift": 0}, "shift: expected"),
    ],
)
def test_a_config_says_which_and_where(fields, message):
    with pytest.raises(UserError, match=message):
        from_dict(SimulatorConfig, fields)
