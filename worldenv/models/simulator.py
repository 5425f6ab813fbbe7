"""The world simulator: a causal video denoiser that generates the next frame against a cache.

World-Env section 3.3 (arXiv 2509.24948): o_t, a_t, s_{t+1} -> o_{t+1}. A Wan-shaped transformer is
trained by flow matching, z = (1 - sigma) x + sigma noise, on one target frame per chunk of actions.
Past frames reach it on the channels, beside the noisy one (as in Wan's image-to-video model): the
last one, and the one the imagination began with, which is real and says for good what stands where.
The last `window` ones also reach it through the keys and values they left in the cache. The next
proprio is predicted from proprio and actions, conditions the frame, and is refined from the
denoised tokens.

Liberties: the next pose conditions by modulation, and by the paper's image-plane map only if asked
(`action_map.py`); in training the cached keys and values carry no gradient (as in Transformer-XL)
unless the config asks for it; either way a training step sees exactly what generation sees.
"""

import copy
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from worldenv.models.denoiser import Conditioning, Denoiser, Network
from worldenv.models.layers import Attend, views_to_channels
from worldenv.ops import FrameCache, frame_attention, spatiotemporal_attention
from worldenv.runtime.graphs import Captured
from worldenv.runtime.seeds import counter_normal


@dataclass
class SimulatorState:
    """B worlds in progress. Everything but the cache's positions lives on the device."""

    latents: Tensor  # [B, S, Z] last frame
    reference: Tensor  # [B, S, Z] the real frame each began with
    proprio: Tensor  # [B, P]
    previous_proprio: Tensor  # [B, P]
    previous_action: Tensor  # [B, C, A] the chunk that led to the last frame
    seeds: Tensor  # [B] int64, of the noise
    step: Tensor  # [B] int64, frames generated since the context
    cache: FrameCache | None
    captured: dict[int, Captured]  # by sampling steps; on a GPU

    def inputs(self, action: Tensor, active: np.ndarray) -> tuple[Tensor, ...]:
        """What the next frame is made of; see `World._next`."""
        device = self.latents.device
        keep = torch.as_tensor(active).to(device, non_blocking=True)
        position = self.step if self.cache is None else torch.as_tensor(self.cache.positions)
        return (
            *(self.latents, self.reference),
            *(self.proprio, self.previous_proprio, self.previous_action),
            *(self.seeds, self.step, position.to(device, non_blocking=True), action, keep),
        )

    def move(self, after: Sequence[Tensor], active: np.ndarray) -> None:
        """To what `World._next` returned."""
        self.latents, self.proprio, self.previous_proprio, self.previous_action, self.step = after
        if self.cache is not None:
            self.cache.advance(active)


@dataclass(frozen=True)
class Given:
    """All that F frames are denoised from but their noisy selves; see `World.given`."""

    last: Tensor  # [B, F, S, Z] the frame before each
    reference: Tensor  # [B, S, Z]
    condition: Conditioning
    rotary: Tensor
    attends: Sequence[Attend]  # per layer; what was kept of the past is in them


class World(Network):
    """Generation and training, over any network. See the module's docstring."""

    # ---------------------------------------------------------------- training

    def loss(
        self, batch: dict[str, Tensor], generator: torch.Generator, self_history: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Flow-matching loss on windows `[B, F, ...]` of `data.windows.FrameWindows.sample`.

        self_history: history frames are the simulator's own one-step predictions, so that it
        learns to continue from its own errors. Returns (loss, metrics of 0-d tensors).
        """
        clean = self.tokenizer.encode(batch["image"])
        reference = self.tokenizer.encode(batch["reference"])
        proprio, action = batch["proprio"], batch["action"]
        history, q = clean[:, :-1], proprio[:, :-1]
        before = batch["previous_proprio"], batch["previous_action"]
        opening = None
        if self.opening is not None:  # as it was, and about as exactly as it will be drawn
            blur = torch.randn(action.shape[0], action.shape[1] - 1, generator=generator)
            opening = self.openings(proprio[:, 1:]) * (1 + 0.03 * blur.to(proprio.device))
            opening = torch.where(self.closes(action[:, 1:]), opening, torch.nan)
        if self_history:
            with torch.no_grad():
                ones = torch.ones(clean.shape[0], clean.shape[1] - 1, device=clean.device)
                z = self._noise(clean[:, 1:], generator)
                frames, states, _ = self._targets(
                    z, ones, history, reference, q, action, before, opening
                )
                history = torch.cat([clean[:, :1], self.tokenizer.clip(frames[:, :-1])], 1)
                states = states * self.proprio_std + self.proprio_mean
                q = torch.cat([proprio[:, :1], states[:, :-1]], 1)
        if self.tokenizer.bounded:  # as much noise as pixels bear
            amount = 0.1 * torch.rand(history.shape[0], 1, 1, 1, generator=generator)
            history = history + amount.to(clean.device) * self._noise(history, generator)
        target = clean[:, 1:]
        sigma = self.sample_sigma(target.shape[:2], generator).to(clean.device)
        s = sigma[..., None, None]
        z = (1 - s) * target + s * self._noise(target, generator)
        frames, states, predicted = self._targets(
            z, sigma, history, reference, q, action, before, opening
        )
        error = frames - target
        if self.tokenizer.bounded:
            moved = moving(target, clean[:, :-1])
            weight = moved / s.clamp_min(0.25).square()
            image = (weight * error.square()).mean() + 0.1 * (moved * error.abs()).mean()
        else:  # Wan's: the error of the velocity
            image = (error / s).square().mean()
        truth = self._normalise(proprio[:, 1:])
        dynamics = self.dynamics_error(predicted, truth)
        refined = F.smooth_l1_loss(states, truth, beta=0.1)
        loss = image + 0.3 * (dynamics + refined)
        mse = error.detach().square().mean()
        return loss, {
            "loss": loss.detach(),
            "psnr": -10 * torch.log10(mse / 4),
            "proprio_error": refined.detach(),
        }

    def dynamics_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Error of the predicted proprio alone, on transitions of `FrameWindows.transitions`.

        It costs next to nothing, so it can see many more transitions than frames are drawn.
        """
        names = ("proprio", "previous_proprio", "previous_action", "action")
        _, predicted = self._dynamics(*(batch[name] for name in names))
        return self.dynamics_error(predicted, self._normalise(batch["next_proprio"]))

    def dynamics_error(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """Of proprio `[..., P]` as an action alone foretells it; both normalised."""
        return F.smooth_l1_loss(predicted, truth, beta=self.config.dynamics_beta)

    def _targets(
        self,
        noisy: Tensor,
        sigma: Tensor,
        history: Tensor,
        reference: Tensor,
        proprio: Tensor,
        action: Tensor,
        before: tuple[Tensor, Tensor],  # proprio [B, P] and action [B, C, A] before all of them
        opening: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Denoise frames 1..F-1 given frames 0..F-2: (frames, proprio, predicted proprio)."""
        given = self.given(history, reference, proprio, action, before, opening=opening)
        return *self.denoised(noisy, sigma, given), given.condition.proprio

    def given(
        self,
        history: Tensor,  # [B, F-1, S, Z] clean frames 0..F-2
        reference: Tensor,  # [B, S, Z]
        proprio: Tensor,  # [B, F-1, P] theirs
        action: Tensor,  # [B, F, C, A]; action[:, f] leads to frame f
        before: tuple[Tensor, Tensor],  # proprio [B, P] and action [B, C, A] before all of them
        clip: bool = False,
        opening: Tensor | None = None,
    ) -> Given:
        """What frames 1..F-1 are denoised from, once for as many passes as there are.

        clip: as one clip that grows from frame 0, each frame seeing all of them (a bidirectional
        model's way); otherwise each sees itself and what the cache would hold of those before it.
        """
        count = history.shape[1]
        position = torch.arange(count + 1, device=history.device).expand(len(history), -1)
        previous = torch.cat([before[0][:, None], proprio[:, :-1]], 1)
        led = torch.cat([before[1][:, None], action[:, 1:-1]], 1)
        condition = self.condition(proprio, previous, led, action[:, 1:], opening)
        attends: list[Attend] = [spatial_attention] * len(self.blocks)
        if clip:
            history = history[:, :1].expand_as(history)
            whole = functools.partial(spatiotemporal_attention, causal=False)
            attends = [whole] * len(self.blocks)
        elif self.config.window:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.history_gradient):
                past = self._history(history, reference, proprio, action[:, :-1], position[:, :-1])
            attend = functools.partial(spatiotemporal_attention, window=self.config.window + 1)
            attends = [functools.partial(attend, history=kept) for kept in past]
        return Given(history, reference, condition, self.rotary(position[:, 1:]), attends)

    def denoised(self, noisy: Tensor, sigma: Tensor, given: Given) -> tuple[Tensor, Tensor]:
        """One pass over frames `[B, F, S, Z]` at levels `[B, F]`; see `Network.denoise`."""
        said = given.condition, given.rotary, given.attends
        return self.denoise(noisy, given.last, given.reference, sigma, *said)

    def _history(
        self, frames: Tensor, reference: Tensor, proprio: Tensor, action: Tensor, position: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Keys and values per layer of clean frames `[B, F, S, Z]` (what prefill would cache)."""
        stored: list[tuple[Tensor, Tensor]] = []

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            stored.append((k, v))
            return spatiotemporal_attention(q, k, v, window=self.config.window + 1)

        before = torch.cat([frames[:, :1], frames[:, :-1]], 1)
        q1 = torch.cat([proprio[:, :1], proprio[:, :-1]], 1)
        q0 = torch.cat([q1[:, :1], q1[:, :-1]], 1)
        zeros = torch.zeros(frames.shape[:2], device=frames.device)
        led = torch.cat([torch.zeros_like(action[:, :1]), action[:, :-1]], 1)
        condition = self.condition(q1, q0, led, action)
        attends = [attend] * len(self.blocks)
        rotary = self.rotary(position)
        self.denoise(frames, before, reference, zeros, condition, rotary, attends)
        return stored

    def sample_sigma(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Logit-normal noise levels, a fraction of them pure noise (for one-step sampling)."""
        sigma = torch.sigmoid(0.6 + torch.randn(*shape, generator=generator))
        pure = torch.rand(*shape, generator=generator) < self.config.pure_noise
        return sigma.masked_fill(pure, 1.0)

    def _noise(self, like: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like.device)

    # ---------------------------------------------------------------- generation

    def for_generation(self) -> "World":
        """What generates: itself, or a copy whose blocks have `config.precision`."""
        dtype = getattr(torch, self.config.precision)
        if dtype == self.dtype:
            return self
        copied = copy.deepcopy(self)
        copied.blocks.to(dtype)
        return copied

    @torch.no_grad()
    def start(self, batch: int) -> SimulatorState:
        """B empty worlds; give them contexts with `prefill`."""
        device, window = self.device, self.config.window
        cache = None
        if window:
            sizes = (len(self.blocks), batch, window, self.tokens, self.heads, self.head_dim)
            cache = FrameCache(*sizes, dtype=self.dtype, device=device)
        proprio = torch.zeros(batch, len(self.proprio_mean), device=device)
        count = torch.zeros(batch, dtype=torch.int64, device=device)
        latents = torch.zeros(batch, self.tokens, self.tokenizer.channels, device=device)
        action = torch.zeros(batch, *self.chunk, device=device)
        pairs = (latents, latents.clone(), proprio, proprio.clone(), action, count, count.clone())
        return SimulatorState(*pairs, cache, {})

    @torch.no_grad()
    def prefill(
        self,
        state: SimulatorState,
        rows: np.ndarray,  # bool [B], host
        image: Tensor,  # [n, K, V, H, W, 3] uint8, K context frames of the n chosen rows
        proprio: Tensor,  # [n, K, P]
        action: Tensor,  # [n, K, C, A]; action[:, f] led to frame f, zeros for the first
        seeds: Tensor,  # [n] int64
    ) -> None:
        """Begin new worlds in `rows` without touching the others."""
        index = torch.as_tensor(np.flatnonzero(rows)).to(state.latents.device)
        latents = self.tokenizer.encode(image).float()
        state.latents[index], state.reference[index] = latents[:, -1], latents[:, 0]
        state.proprio[index] = proprio[:, -1]
        state.previous_proprio[index] = proprio[:, max(proprio.shape[1] - 2, 0)]
        state.previous_action[index] = action[:, -1]
        state.seeds[index] = seeds
        state.step[index] = 0
        cache = state.cache
        if cache is None:
            return
        cache.reset(rows)
        count = latents.shape[1]
        position = torch.arange(count, device=latents.device).expand(len(latents), -1)
        stored = self._history(latents, latents[:, 0], proprio, action, position)
        for f in range(count):
            for layer, (k, v) in enumerate(stored):
                # Rows that do not advance lose nothing: their slot in progress is rewritten.
                full = k.new_zeros(2, len(rows), *k.shape[2:])
                full[0, index], full[1, index] = k[:, f], v[:, f]
                cache.append(layer, full[0], full[1])
            cache.advance(rows)

    @torch.no_grad()
    def step(
        self, state: SimulatorState, action: Tensor, steps: int, active: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """Generate the frame that a chunk of actions `[B, C, A]` leads to, in `steps` passes.

        Rows where active (bool [B], host) is False keep their frame. Returns image
        `[B, V, H, W, 3]` uint8 and proprio `[B, P]`; nothing is read back from the device. On a
        GPU the whole frame is one CUDA graph, recorded at the first call.
        """
        cache, device = state.cache, state.latents.device
        inputs = state.inputs(action, active)
        frame = functools.partial(self._frame, cache, steps)
        if device.type == "cuda" and (cache is None or cache.capturable):
            if steps not in state.captured:
                state.captured[steps] = Captured(frame, inputs)
            frame = state.captured[steps]
        image, *after = frame(*inputs)
        state.move(after, active)
        return image, state.proprio

    @torch.no_grad()
    def roll_out(
        self, batch: dict[str, Tensor], seeds: Tensor, steps: int
    ) -> tuple[Tensor, Tensor]:
        """Its own frames in place of a window's but the first, by its actions, as `step` generates
        them against the cache: frames 0..F-2 `[B, F-1, S, Z]` of a batch of `FrameWindows.sample`,
        and their proprio. seeds: [B] int64; frame f > 0 is made of `counter_normal(seeds, f - 1)`.
        """
        action, everyone = batch["action"], np.ones(len(seeds), bool)
        state = self.start(len(seeds))
        first = (batch[name][:, :1] for name in ("image", "proprio", "action"))
        self.prefill(state, everyone, *first, seeds)
        frames, poses = [state.latents], [state.proprio]
        for f in range(1, action.shape[1] - 1):
            after = self._next(state.cache, steps, *state.inputs(action[:, f], everyone))
            state.move(after, everyone)
            frames.append(state.latents)
            poses.append(state.proprio)
        return torch.stack(frames, 1), torch.stack(poses, 1)

    def _frame(self, cache: FrameCache | None, steps: int, *state: Tensor) -> tuple[Tensor, ...]:
        """The next frame's image, and the state after it; see `_next`."""
        after = self._next(cache, steps, *state)
        return self.tokenizer.decode(after[0], self.views), *after

    def _next(
        self,
        cache: FrameCache | None,
        steps: int,
        latents: Tensor,  # [B, S, Z] and the rest of a state
        reference: Tensor,
        proprio: Tensor,
        previous: Tensor,
        led: Tensor,
        seeds: Tensor,
        count: Tensor,
        position: Tensor,  # [B] int64, of the new frame
        action: Tensor,  # [B, C, A]
        keep: Tensor,  # [B] bool, rows that move on
    ) -> tuple[Tensor, ...]:
        """The state after the next frame. On the device alone, so that it can be captured; the
        cache gets the frame's keys and values but does not advance."""
        last = latents[:, None]
        z = counter_normal(seeds, count, last.shape[2:])[:, None]
        opening = self.told
        if opening is None and self.opening is not None and self.drawing:
            opening = self._drawn_opening(latents, proprio, previous, led, action, z[:, 0, 0, 0])
        if opening is not None:
            opening = opening[:, None]
        known = (x[:, None] for x in (proprio, previous, led, action))
        condition = self.condition(*known, opening)
        rotary = self.rotary(position[:, None])
        layers = range(len(self.blocks))
        attends = [spatial_attention if cache is None else _over_cache(cache, i) for i in layers]
        for now, after in itertools.pairwise(self.sigmas(steps)):
            level = z.new_full(z.shape[:2], now)
            frame, refined = self.denoise(z, last, reference, level, condition, rotary, attends)
            z = frame + (after / now) * (z - frame)
        frame = self.tokenizer.clip(frame)
        if cache is not None:
            attends = [_over_cache(cache, i, remember=True) for i in layers]
            clean = torch.zeros_like(level)
            self.denoise(frame, last, reference, clean, condition, rotary, attends)
        refined = refined[:, 0]
        if opening is not None:
            refined = self._opened(refined, opening[:, 0])
        reached = refined * self.proprio_std + self.proprio_mean
        previous = torch.where(keep[:, None], proprio, previous)
        led = torch.where(keep[:, None, None], action, led)
        proprio = torch.where(keep[:, None], reached, proprio)
        latents = torch.where(keep[:, None, None], frame[:, 0], latents)
        return latents, proprio, previous, led, count + keep


    def known(self, proprio: Tensor, previous: Tensor, led: Tensor, action: Tensor) -> Tensor:
        """What the opening is drawn by besides the frame."""
        known, _ = self._dynamics(proprio, previous, led, action)
        widths = (self.opening.smooth(self.openings(q)) for q in (proprio, previous))
        return torch.cat([known, *widths], -1)

    def settled(self, proprio: Tensor, previous: Tensor) -> Tensor:
        """Whether fingers have closed and stand still: they stay where they are."""
        now, before = self.openings(proprio), self.openings(previous)
        return (now < 0.5 * self.embodiment.gripper_open) & ((now - before).abs() < 0.001)

    def _drawn_opening(
        self,
        latents: Tensor,
        proprio: Tensor,
        previous: Tensor,
        led: Tensor,
        action: Tensor,
        normal: Tensor,
    ) -> Tensor:
        """Of the fingers after a chunk `[B]` in m; NaN where it does not close them."""
        views = views_to_channels(self.tokenizer.decode(latents, self.views))
        logits = self.opening(views, self.known(proprio, previous, led, action))
        opening = self.opening.draw(logits, torch.special.ndtr(normal))
        opening = torch.where(self.settled(proprio, previous), self.openings(proprio), opening)
        return torch.where(self.closes(action), opening, torch.nan)


class Simulator(Denoiser, World):
    """The small one: trained from nothing, in minutes."""


def moving(target: Tensor, last: Tensor) -> Tensor:
    """Weight of each colour: those that move matter most and are few (prototype: five times)."""
    return 1 + 4 * ((target - last).abs() > 0.15).float()


def spatial_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Within each frame only: `[B, F, S, H, D]`."""
    return spatiotemporal_attention(q, k, v, window=1)


def _over_cache(cache: FrameCache, layer: int, remember: bool = False):
    """Of one frame, to the cached ones and itself; remember: its keys and values are cached."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = frame_attention(q[:, 0], k[:, 0], v[:, 0], cache, layer)[:, None]
        if remember:
            cache.append(layer, k[:, 0], v[:, 0])
        return y

    return attend
