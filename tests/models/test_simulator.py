"""The simulator's generation against recomputation, its noise, and its training."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from worldenv.config import SimulatorConfig
from worldenv.envs.libero.robot import embodiment
from worldenv.models.heads import FrameHead, zeroed
from worldenv.models.simulator import Simulator
from worldenv.ops import spatiotemporal_attention
from worldenv.runtime.seeds import generator

TINY = SimulatorConfig(width=48, layers=2, heads=2, patch=8, window=2, frames=2)
ALL = np.ones(3, bool)


def simulator(**changes) -> Simulator:
    torch.manual_seed(0)
    config = SimulatorConfig(**{**TINY.__dict__, **changes})
    model = Simulator(config, embodiment(16)).eval()
    with torch.no_grad():  # zero-initialised layers would hide mistakes
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def contexts(n: int, frames: int = 1):
    g = generator("contexts")
    image = torch.randint(0, 255, (n, frames, 2, 16, 16, 3), dtype=torch.uint8, generator=g)
    action = torch.randn(n, frames, 8, 7, generator=g)
    action[:, 0] = 0
    return image, torch.randn(n, frames, 8, generator=g), action


def generate(model, state, actions, steps=2, active=ALL):
    """Step through actions [T, B, C, A]; the frames and proprio after each."""
    seen = []
    for a in actions:
        model.step(state, a, steps, active)
        seen.append((state.latents.clone(), state.proprio.clone()))
    return seen


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("frames", [1, 3])
def test_cache_holds_what_recomputing_the_window_gives(frames, precision):
    model = simulator(precision=precision).for_generation()
    close = {"rtol": 1e-4, "atol": 1e-5} if precision == "float32" else {"rtol": 0, "atol": 3e-2}
    image, proprio, action = contexts(3, frames)
    state = model.start(3)
    model.prefill(state, ALL, image, proprio, action, torch.arange(3))
    actions = torch.randn(5, 3, 8, 7, generator=generator("actions"))
    seen = generate(model, state, actions)  # five frames wrap the ring of two
    latents = torch.cat([model.tokenizer.encode(image), torch.stack([f for f, _ in seen], 1)], 1)
    states = torch.cat([proprio, torch.stack([q for _, q in seen], 1)], 1)
    led = torch.cat([action, actions.transpose(0, 1)], 1)
    position = torch.arange(latents.shape[1]).expand(3, -1)
    with torch.no_grad():
        stored = model._history(latents, latents[:, 0], states, led, position)
    for layer, (k, v) in enumerate(stored):
        keys, values, valid = state.cache.gather(layer)
        assert valid.all()
        assert keys.dtype == values.dtype == getattr(torch, precision)
        torch.testing.assert_close(keys, k[:, -2:], **close)
        torch.testing.assert_close(values, v[:, -2:], **close)


def test_half_the_precision_imagines_nearly_the_same():
    image, proprio, action = contexts(3)
    actions = torch.randn(4, 3, 8, 7, generator=generator("actions"))
    seen = {}
    for precision in ("float32", "bfloat16"):
        model = simulator(precision=precision)
        low = model.for_generation()
        assert (low is model) == (precision == "float32")
        assert model.dtype == torch.float32  # what trains is left as it is
        state = low.start(3)
        low.prefill(state, ALL, image, proprio, action, torch.arange(3))
        seen[precision] = generate(low, state, actions)
    for (a, p), (b, q) in zip(*seen.values(), strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert 0 < (a - b).abs().mean() < 0.02 * a.abs().mean()
        assert (p - q).abs().mean() < 0.02 * p.abs().mean()


def test_a_row_does_not_depend_on_its_company_or_history():
    model = simulator()
    image, proprio, action = contexts(3)
    actions = torch.randn(4, 3, 8, 7, generator=generator("actions"))
    alone = model.start(1)
    model.prefill(alone, ALL[:1], image[1:2], proprio[1:2], action[1:2], torch.tensor([7]))
    expected = generate(model, alone, actions[:2, 1:2], active=ALL[:1])
    state = model.start(3)
    model.prefill(state, ALL, image, proprio, action, torch.tensor([1, 2, 3]))
    generate(model, state, actions[2:])
    kept = state.latents.clone()
    refilled = np.array([False, True, False])
    model.prefill(state, refilled, image[1:2], proprio[1:2], action[1:2], torch.tensor([7]))
    assert torch.equal(state.latents[[0, 2]], kept[[0, 2]])
    got = generate(model, state, actions[:2])
    for (a, p), (b, q) in zip(expected, got, strict=True):
        torch.testing.assert_close(a[0], b[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(p[0], q[1], rtol=1e-4, atol=1e-5)


def test_frozen_rows_keep_their_frame_and_their_memory():
    model = simulator()
    image, proprio, action = contexts(3)
    state = model.start(3)
    model.prefill(state, ALL, image, proprio, action, torch.arange(3))
    before = state.latents.clone(), state.cache.positions.copy()
    active = np.array([True, False, True])
    generate(model, state, torch.randn(2, 3, 8, 7), active=active)
    assert torch.equal(state.latents[1], before[0][1])
    assert state.cache.positions.tolist() == [3, 1, 3]
    assert not torch.equal(state.latents[0], before[0][0])


def test_a_chunk_is_judged_by_the_pose_and_by_the_chunk_before():
    model = simulator()
    zeroed(model.proprio_out)
    image, proprio, action = contexts(3, 2)
    state = model.start(3)
    model.prefill(state, ALL, image, proprio, action, torch.arange(3))
    actions = torch.randn(3, 3, 8, 7, generator=generator("actions"))
    seen = [q for _, q in generate(model, state, actions)]
    poses, chunks = [*proprio.unbind(1), *seen], [action[:, 1], *actions]
    for k, reached in enumerate(seen):
        known = (poses[k + 1], poses[k], chunks[k], chunks[k + 1])
        with torch.no_grad():
            expected = model.condition(*(x[:, None] for x in known)).proprio[:, 0]
        torch.testing.assert_close(reached, expected, rtol=1e-4, atol=1e-5)


def test_without_a_window_nothing_is_cached():
    model = simulator(window=0)
    image, proprio, action = contexts(3)
    state = model.start(3)
    model.prefill(state, ALL, image, proprio, action, torch.arange(3))
    assert state.cache is None
    picture, _ = model.step(state, torch.randn(3, 8, 7), 1, ALL)
    assert picture.shape == (3, 2, 16, 16, 3)
    assert picture.dtype == torch.uint8


@pytest.mark.parametrize("prediction", ["sample", "velocity"])
def test_training_lowers_the_loss_and_reaches_every_parameter(prediction):
    model = simulator(prediction=prediction).train()
    image, proprio, action = contexts(4, 3)
    before = {"previous_proprio": proprio[:, 0], "previous_action": action[:, 0]}
    batch = {"image": image, "reference": image[:, 0], "proprio": proprio, "action": action}
    batch |= before
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for step in range(60):
        loss, metrics = model.loss(batch, generator("loss", step), self_history=step % 2 == 1)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            dead = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
            assert not dead
        optimizer.step()
        losses.append(float(metrics["loss"]))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def targets(model, frames=4):
    """Arguments of `_targets` for so many frames after as many."""
    g = generator("targets")
    clean = torch.randn(2, frames + 1, model.tokens, model.tokenizer.channels, generator=g)
    noisy = torch.randn(clean[:, 1:].shape, generator=g)
    sigma = torch.rand(2, frames, generator=g)
    proprio = torch.randn(2, frames, 8, generator=g)
    action = torch.randn(2, frames + 1, 8, 7, generator=g)
    before = (proprio[:, 0], action[:, 0])
    return noisy, sigma, clean[:, :-1], clean[:, 0], proprio, action, before


def gradients(model, frames):
    """Of a scalar made of predicted frames, by parameter."""
    weight = torch.randn(frames.shape, generator=generator("weight"))
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((frames * weight).mean(), parameters.values(), allow_unused=True)
    return {n: g for n, g in zip(parameters, found, strict=True) if g is not None}


def all_close(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        bound = 1e-5 * float(value.abs().max()) + 1e-8
        torch.testing.assert_close(
            got[name], value, rtol=1e-4, atol=bound, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("window", [1, 2, 9])
def test_training_over_a_window_is_one_frame_after_the_other(window, monkeypatch):
    model = simulator(window=window)
    frames, states, _ = model._targets(*targets(model))
    got = gradients(model, frames)

    def by_the_frame(q, k, v, window, history=None):
        if history is None:
            return spatiotemporal_attention(q, k, v, window=window, backend="reference")
        assert not any(x.requires_grad for x in history)
        out = []
        for f in range(q.shape[1]):
            past = slice(max(0, f + 2 - window), f + 1)
            keys, values = (
                torch.cat([old[:, past].flatten(1, 2), x[:, f]], 1).transpose(1, 2)
                for old, x in zip(history, (k, v), strict=True)
            )
            out.append(scaled_dot_product_attention(q[:, f].transpose(1, 2), keys, values))
        return torch.stack(out, 1).transpose(2, 3)

    monkeypatch.setattr("worldenv.models.simulator.spatiotemporal_attention", by_the_frame)
    want = model._targets(*targets(model))
    torch.testing.assert_close(frames, want[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states, want[1], rtol=1e-4, atol=1e-5)
    all_close(got, gradients(model, want[0]))


def test_gradients_into_history_are_those_of_one_pass_over_clean_and_noisy_frames(monkeypatch):
    model, without = simulator(history_gradient=True), simulator()
    passes, denoise = [], model.denoise
    monkeypatch.setattr(model, "denoise", lambda *x: (passes.append(x), denoise(*x))[1])
    frames, _, _ = model._targets(*targets(model))
    got, constant = gradients(model, frames), without._targets(*targets(without))[0]
    torch.testing.assert_close(frames, constant)
    less = gradients(without, constant)["blocks.0.qkv.weight"]
    assert (got["blocks.0.qkv.weight"] - less).abs().max() > 0.01 * less.abs().max()

    def attend(q, k, v):
        (past_k, k), (past_v, v) = k.chunk(2, 1), v.chunk(2, 1)
        return spatiotemporal_attention(q, k, v, window=3, history=(past_k, past_v))

    model._targets(*targets(model))
    (noisy, last, reference, sigma, condition, rotary, _), now = passes[-2:]
    both = [torch.cat(pair, 1) for pair in ((noisy, now[0]), (last, now[1]), (sigma, now[3]))]
    action = torch.cat((condition.action, now[4].action), 1)
    proprio = torch.cat((condition.proprio, now[4].proprio), 1)
    condition = replace(condition, action=action, proprio=proprio)
    rotary = torch.cat((rotary, now[5]), 1)
    joint = denoise(*both[:2], reference, both[2], condition, rotary, [attend] * 2)[0][:, 4:]
    torch.testing.assert_close(joint, frames, rtol=1e-4, atol=1e-5)
    all_close(gradients(model, joint), got)


def test_executed_actions_are_clipped_and_the_gripper_is_binary():
    command = torch.tensor([[2.0, -3.0, 0.5, 0.0, 0.0, 0.0, 0.1]])
    assert simulator()._executed(command)[0].tolist() == [1.0, -1.0, 0.5, 0.0, 0.0, 0.0, 1.0]


def test_the_head_keeps_recalls_or_redraws_each_block():
    head = FrameHead(width=8, channels=12, block=4)
    x, last, real = torch.randn(2, 3, 8), torch.randn(2, 3, 12), torch.randn(2, 3, 12)
    share = torch.sigmoid(torch.tensor(4.0))
    torch.testing.assert_close(head(x, last, real), (last + real) / 2 * share)
    for bias, expected in (
        ([50.0, -50.0, 0.0, 0.0, 0.0, 0.0], last),
        ([50.0, 50.0, 0.0, 0.0, 0.0, 0.0], real),
        ([-50.0, 0.0, 0.5, 0.5, 0.5, 0.5], torch.full_like(last, 0.5)),
    ):
        with torch.no_grad():
            head.redraw[-1].bias.copy_(torch.tensor(bias))
        torch.testing.assert_close(head(x, last, real), expected)


def test_one_step_draws_the_mean_and_several_steps_a_sample():
    model = simulator()
    image, proprio, action = contexts(3)
    image, proprio, action = (x[:1].expand(3, *x.shape[1:]) for x in (image, proprio, action))
    frames = []
    for steps in (1, 2):
        state = model.start(3)
        model.prefill(state, ALL, image, proprio, action, torch.arange(3))
        model.step(state, torch.zeros(3, 8, 7), steps, ALL)
        frames.append(state.latents)
    torch.testing.assert_close(frames[0][0], frames[0][1])
    assert (frames[1][0] - frames[1][1]).abs().mean() > 1e-3
