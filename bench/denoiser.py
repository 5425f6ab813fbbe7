"""A denoiser of Wan's block structure, stripped to what costs time, with every way of handling past
frames.

One definition serves all variants: the ops with the cache, SDPA with a preallocated cache, and
recomputing the whole window at each step. Weights are random: only the arithmetic matters here.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from bench.timing import Case
from worldenv.config import SimulatorConfig
from worldenv.envs.libero.robot import embodiment
from worldenv.models.layers import Rotary3D
from worldenv.models.simulator import Simulator, SimulatorState
from worldenv.ops import (
    FrameCache,
    frame_attention,
    gelu,
    modulated_norm,
    norm_rotary,
    spatiotemporal_attention,
)


class Block(nn.Module):
    """Wan's self-attention and feed-forward under a fixed modulation.

    plain: the pointwise ops as torch runs them, instead of ours.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q, self.norm_k = nn.RMSNorm(width), nn.RMSNorm(width)
        self.project = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.modulation = nn.Parameter(torch.randn(4, width) * 0.1)

    def heads_of(self, x: Tensor, rotary: Tensor, plain: bool) -> tuple[Tensor, ...]:
        backend = "reference" if plain else "auto"
        y = modulated_norm(x, self.modulation[0], self.modulation[1])
        q, k, v = self.qkv(y).chunk(3, -1)
        q = norm_rotary(q, self.norm_q.weight, rotary, backend=backend)
        k = norm_rotary(k, self.norm_k.weight, rotary, backend=backend)
        return q, k, v.unflatten(-1, (self.heads, -1))

    def finish(self, x: Tensor, attended: Tensor, plain: bool) -> Tensor:
        x = x + self.project(attended.flatten(-2))
        y = modulated_norm(x, self.modulation[2], self.modulation[3])
        return x + self.down(gelu(self.up(y), backend="reference" if plain else "auto"))


class Denoiser(nn.Module):
    """L blocks of width E over S = side**2 tokens per frame."""

    def __init__(self, layers: int, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.heads, self.head_dim = heads, width // heads
        self.rotary = Rotary3D(self.head_dim, 1, side)

    def step(
        self,
        x: Tensor,
        rotary: Tensor,
        cache: FrameCache,
        backend: str = "auto",
        plain: bool = False,
        append: bool = False,
    ) -> Tensor:
        """One pass over the frame in progress, x [B, S, E], against the cache; rotary [S, D/2] of
        its position."""
        for layer, block in enumerate(self.blocks):
            q, k, v = block.heads_of(x, rotary, plain)
            attended = frame_attention(q, k, v, cache, layer, backend=backend)
            if append:
                cache.append(layer, k, v)
            x = block.finish(x, attended, plain)
        return x

    def window(self, x: Tensor, rotary: Tensor, plain: bool = False) -> Tensor:
        """One pass over all frames, x [B, F, S, E], rotary [F, S, D/2]."""
        for block in self.blocks:
            attended = spatiotemporal_attention(*block.heads_of(x, rotary, plain))
            x = block.finish(x, attended, plain)
        return x


def step_case(
    layers: int,
    width: int,
    heads: int,
    batch: int,
    tokens: int,
    past: int,
    dtype: torch.dtype,
    device: str,
) -> Case:
    """One denoising step of one frame: cached with our ops, with SDPA, and by recomputing the
    window, with our pointwise ops and without."""
    model = Denoiser(layers, width, heads, math.isqrt(tokens)).to(device)
    rotary = model.rotary(torch.arange(past + 1, device=device))
    model = model.to(dtype)
    exact = copy.deepcopy(model).float()
    frames = torch.randn(batch, past + 1, tokens, width, device=device).to(dtype)

    @functools.cache  # filled when first used: it takes seconds
    def filled(layout: str) -> FrameCache:
        cache = FrameCache(
            layers, batch, past, tokens, heads, width // heads,
            dtype=dtype, device=device, layout=layout,
        )  # fmt: skip
        for f in range(past):
            model.step(frames[:, f], rotary[f], cache, "sdpa", append=True)
            cache.advance()
        return cache

    last, turns = frames[:, past], rotary[past]
    count = sum(p.numel() for p in model.parameters())
    work = 2.0 * batch * tokens * count + 4.0 * layers * batch * tokens**2 * (past + 1) * width
    return Case(
        "denoiser step",
        f"{count / 1e6:.1f}M B{batch} S{tokens} past {past}",
        str(dtype)[6:],
        torch.no_grad()(lambda: model.step(last, turns, filled("auto"))),
        {
            "sdpa, preallocated cache": torch.no_grad()(
                lambda: model.step(last, turns, filled("plain"), "sdpa", plain=True)
            ),
            "recomputing the window": torch.no_grad()(
                lambda: model.window(frames, rotary)[:, past]
            ),
            "recomputing in plain torch": torch.no_grad()(
                lambda: model.window(frames, rotary, plain=True)[:, past]
            ),
        },
        torch.no_grad()(lambda: exact.window(frames.float(), rotary, plain=True)[:, past]),
        1e-4 if dtype == torch.float32 else 6e-2,
        work,
    )


def episode_case(
    layers: int, heads: int, head_dim: int, side: int, batch: int, frames: int, steps: int,
    device: str, once: bool = False,
) -> Case:  # fmt: skip
    """A whole imagined episode: every frame denoised in `steps` passes, then remembered.

    The rival has no cache and runs the whole video at each pass: diffusers' Wan transformer of
    equal size, with weights of its own. The truth is our own model run that way, for the first and
    last row: rows know nothing of each other, and all of them would take minutes.
    """
    tokens, width = side * side, heads * head_dim
    model = Denoiser(layers, width, heads, side).to(device)
    rotary = model.rotary(torch.arange(frames, device=device))
    noise = torch.randn(frames, batch, tokens, width, device=device)
    rows = [0, batch - 1]

    def cached() -> Tensor:
        cache = FrameCache(layers, batch, frames, tokens, heads, head_dim, device=device)
        for f in range(frames):
            x = noise[f]
            for _ in range(steps):
                x = model.step(x, rotary[f], cache)
            model.step(x, rotary[f], cache, append=True)
            cache.advance()
        return x

    def recomputed() -> Tensor:
        video = noise.new_empty(len(rows), 0, tokens, width)
        for f in range(frames):
            x = noise[f, rows]
            for _ in range(steps):
                x = model.window(torch.cat((video, x[:, None]), 1), rotary[: f + 1], True)[:, -1]
            video = torch.cat((video, x[:, None]), 1)
        return x

    rivals = {}
    if not once and importlib.util.find_spec("diffusers") is not None:  # it is not compared
        rivals["diffusers' Wan, recomputing"] = torch.no_grad()(_wan_episode(model, noise, steps))
    return Case(
        "imagined episode",
        f"{layers} layers of {width}, B{batch} S{tokens}, {frames} frames, {steps} steps",
        "float32",
        torch.no_grad()(cached),
        rivals,
        torch.no_grad()(recomputed),
        1e-3,
        unlike=tuple(rivals),
        part=lambda x: x[rows],
    )


def _wan_episode(model: Denoiser, noise: Tensor, steps: int) -> Callable[[], Tensor]:
    """diffusers' Wan transformer at our model's size: one token per latent pixel of 16 channels,
    the text reduced to one token."""
    from diffusers import WanTransformer3DModel

    heads, dim = model.heads, model.head_dim
    batch, tokens = noise.shape[1:3]
    side = math.isqrt(tokens)
    wan = WanTransformer3DModel(
        patch_size=(1, 1, 1), num_attention_heads=heads, attention_head_dim=dim, in_channels=16,
        out_channels=16, text_dim=64, freq_dim=64, ffn_dim=4 * heads * dim,
        num_layers=len(model.blocks),
    ).to(noise.device).eval()  # fmt: skip
    latents = noise[..., :16].unflatten(2, (side, side)).permute(0, 1, 4, 2, 3).unsqueeze(3)
    text, time = noise.new_zeros(batch, 1, 64), noise.new_zeros(batch)

    def run() -> Tensor:
        video = latents[0][:, :, :0]
        for new in latents:
            for _ in range(steps):
                whole = torch.cat((video, new), 2)
                new = wan(whole, time, text, return_dict=False)[0][:, :, -1:]
            video = torch.cat((video, new), 2)
        return video

    return run


def frame_case(batch: int, device: str) -> Case:
    """A frame of the default simulator, blocks in bf16, against itself in f32."""
    config = SimulatorConfig(precision="bfloat16")
    model = Simulator(config, embodiment(64)).to(device).eval()
    rows = np.ones(batch, dtype=bool)
    image = torch.randint(256, (batch, 1, 2, 64, 64, 3), dtype=torch.uint8, device=device)
    proprio, action = torch.randn(batch, 1, 8), torch.randn(batch, 8, 7)
    with torch.no_grad():
        for parameter in model.parameters():  # layers that begin at zero would hide mistakes
            parameter.add_(0.02 * torch.randn_like(parameter))

    def draws(simulator: Simulator) -> Callable[[], Tensor]:
        @functools.cache
        def start() -> SimulatorState:
            state = simulator.start(batch)
            context = (image, proprio, torch.zeros(batch, 1, 8, 7), torch.arange(batch))
            simulator.prefill(state, rows, *(x.to(device) for x in context))
            return state

        def run() -> Tensor:
            state = dataclasses.replace(start())
            simulator.step(state, action.to(device), 1, rows)
            return state.latents

        return run

    exact = draws(model)
    return Case(
        "simulator frame",
        f"default, B{batch}",
        "bfloat16",
        draws(model.for_generation()),
        {"float32": exact},
        exact,
        6e-2,
    )


def cases(device: str, once: bool = False) -> Iterator[Case]:
    """once: few rows and a small episode, to be checked in seconds."""
    if device == "cpu":
        for dtype in (torch.float32, torch.bfloat16):
            yield step_case(8, 256, 8, 2 if once else 8, 64, 8, dtype, device)
        yield frame_case(4 if once else 32, device)
        yield (
            episode_case(2, 4, 32, 4, 2, 3, 2, device, once)
            if once
            else episode_case(8, 8, 32, 8, 16, 16, 4, device)
        )
        return
    for layers, width, heads in ((8, 256, 4), (12, 1024, 16), (30, 1536, 12)):
        yield step_case(layers, width, heads, 16, 64, 8, torch.bfloat16, device)
    yield frame_case(32, device)
    yield episode_case(8, 8, 32, 8, 16, 16, 4, device)
