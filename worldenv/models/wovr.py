"""WoVR's released simulators (RLinf-Wan-LIBERO-*) as worlds to post-train a policy in.

Wan 2.2 TI2V 5B, fine-tuned so that thirteen frames are thirteen actions: five of context (the first
real frame, which stays, and the last four), eight to come. Four latent frames, two of them clean,
all of which see each other. Each action is a word of the cross-attention, in the place of a text,
and four of them are added to the time of their latent frame. Of the eight new frames the policy
sees the last; the last four are the next context, encoded anew.

Sources: RLinf (rlinf/envs/world_model/world_model_wan_env.py), its fork of DiffSynth-Studio.
Liberties: noise is seeded per row, where RLinf draws the same for all; frames are rounded to bytes,
not cut; a context of ours has frames a chunk apart, so its last one stands for the last four, at
rest. There is no proprio: poses stay those of the context. Nothing is trained here.
"""

import itertools
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from worldenv.config import SimulatorConfig
from worldenv.data.embodiment import Embodiment
from worldenv.models import wan_folder
from worldenv.models.denoiser import Network
from worldenv.models.layers import Rotary3D
from worldenv.models.wan import WanTransformer, full_attention
from worldenv.runtime.errors import UserError
from worldenv.runtime.seeds import counter_normal

CONTEXT, NEW = 5, 8  # frames
_CLEAN, _LATENTS = 2, 4  # latent frames: of the context, and in all
_GROUP = 4  # actions of a latent frame


@dataclass
class WoVRState:
    """B worlds in progress, on the device."""

    frames: Tensor  # [B, 5, V, H, W, 3] uint8: the context
    actions: Tensor  # [B, 5, A] that led to them
    proprio: Tensor  # [B, P]
    seeds: Tensor  # [B] int64
    step: Tensor  # [B] int64, chunks since the context


class WoVR(Network):
    """A `WorldModel` of `envs.imagined`; see the module's docstring."""

    def __init__(
        self,
        config: SimulatorConfig,
        embodiment: Embodiment,
        wan: WanTransformer | None = None,
        tokenizer: nn.Module | None = None,
    ) -> None:
        """wan, tokenizer: in place of those in the folders. UserError where folder, tokenizer and
        robot do not fit each other."""
        super().__init__(config, embodiment, 5.0, tokenizer)
        wan = wan or wan_folder.load(config.folder, "wovr", False, config.precision)
        self._held = (wan.requires_grad_(False).eval(),)  # a tuple: no submodule
        sizes, z = self.wan.sizes, self.tokenizer.channels
        for what, expected, got in (
            ("tokenizer", "wan-vae", config.tokenizer),
            ("numbers of a token", 4 * sizes.channels, z),
            ("cameras", 1, self.views),
            ("actions a chunk", NEW, self.chunk[0]),
            ("numbers of an action", sizes.actions, self.chunk[1]),
        ):
            if expected != got:
                raise UserError(
                    f"{config.folder}: {what}: expected {expected}, as WoVR was trained, got {got}."
                )
        self.rotary = Rotary3D(sizes.head_dim, 1, self.tokenizer.grid, exact=True)
        # What leads nowhere: a hand at rest, the gripper open.
        still = -embodiment.gripper_closes * self.grips.float()
        self.register_buffer("still", still, persistent=False)  # [A]

    @property
    def wan(self) -> WanTransformer:
        """The transformer. Frozen, it stays where it is published: it is in no checkpoint."""
        return self._held[0]

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.wan._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @property
    def dtype(self) -> torch.dtype:
        """What the transformer computes in."""
        return self.wan.dtype

    def for_generation(self) -> Self:
        """Itself."""
        return self

    @torch.no_grad()
    def start(self, batch: int) -> WoVRState:
        """B empty worlds; give them contexts with `prefill`."""
        size, device = self.embodiment.image_size, self.device
        shape = (batch, CONTEXT, self.views, size, size, 3)
        return WoVRState(
            torch.zeros(shape, dtype=torch.uint8, device=device),
            self.still.expand(batch, CONTEXT, -1).clone(),
            torch.zeros(batch, self.embodiment.P, device=device),
            *(torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2)),
        )

    @torch.no_grad()
    def prefill(
        self,
        state: WoVRState,
        rows: np.ndarray,  # bool [B], host
        image: Tensor,  # [n, K, V, H, W, 3] uint8
        proprio: Tensor,  # [n, K, P]
        action: Tensor,  # [n, K, C, A]; action[:, f] led to frame f, zeros for the first
        seeds: Tensor,  # [n] int64
    ) -> None:
        """Begin new worlds in `rows` without touching the others."""
        index = torch.as_tensor(np.flatnonzero(rows)).to(self.device)
        state.frames[index] = image[:, [0] + [-1] * (CONTEXT - 1)]
        still = self.still.expand(len(index), CONTEXT, -1).clone()
        if image.shape[1] > 1:  # the gripper as it was told last
            told = self._executed(action[:, -1, -1:])
            still[:, 1:] = torch.where(self.grips, told, still[:, 1:])
        state.actions[index] = still
        state.proprio[index] = proprio[:, -1]
        state.seeds[index], state.step[index] = seeds, 0

    @torch.no_grad()
    def step(
        self, state: WoVRState, action: Tensor, steps: int, active: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """The frame after a chunk of actions `[B, 8, A]`, in `steps` passes (5 as published)."""
        keep = torch.as_tensor(active).to(self.device, non_blocking=True)
        actions = torch.cat([state.actions, self._executed(action)], 1)
        clean = self.tokenizer.encode_video(state.frames)
        noise = counter_normal(state.seeds, state.step, (_LATENTS - _CLEAN, *clean.shape[2:]))
        latents = self.generate(torch.cat([clean, noise], 1), actions, steps)
        frames = self.tokenizer.decode_video(latents, self.views)
        # [B, 5, ...]: the first frame for good, and the last four
        after = torch.cat([state.frames[:, :1], frames[:, 1 - CONTEXT :]], 1)
        led = torch.cat([state.actions[:, :1], actions[:, 1 - CONTEXT :]], 1)
        state.frames = torch.where(keep.view(-1, 1, 1, 1, 1, 1), after, state.frames)
        state.actions = torch.where(keep.view(-1, 1, 1), led, state.actions)
        state.step = state.step + keep
        return state.frames[:, -1], state.proprio

    def generate(self, latents: Tensor, actions: Tensor, steps: int) -> Tensor:
        """Latents `[B, 4, S, Z]`, the last two of them noise, denoised; actions `[B, 13, A]`."""
        wan = self.wan
        words, more = embed(wan, actions)
        position = torch.arange(_LATENTS, device=latents.device)
        rotary = self.rotary(position[None])
        attends = [full_attention] * len(wan.blocks)
        noisy = (position >= _CLEAN).float().expand(len(latents), -1)  # [B, F]
        for now, after in itertools.pairwise(self.sigmas(steps)):
            level = 1000 * now * noisy
            velocity, _ = wan(latents, level, rotary, attends, words, more=more)
            latents = latents + (after - now) * noisy[..., None, None] * velocity
        return latents


def embed(wan: WanTransformer, actions: Tensor) -> tuple[list, Tensor]:
    """What actions `[B, 13, A]` say: words per layer, and `[B, 4, E]` to add to the frames' times.

    The first latent frame is one image: its action counts four times.
    """
    actions = actions.to(wan.dtype)
    words = wan.look_up(wan.action_mlp1(actions))
    grouped = torch.cat([actions[:, :1].expand(-1, _GROUP - 1, -1), actions], 1)
    return words, wan.action_mlp2(grouped.unflatten(1, (-1, _GROUP)).flatten(2))
