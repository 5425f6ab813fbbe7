"""A published Wan as a world: generated frame by frame against a cache, and trained, like ours.

What a world needs and Wan has not, commands, poses, the last frame and the reference beside the
noisy one, enters through weights that begin at zero, so that before training it imagines what the
published model does. Frames are images of their own (one latent a chunk), not four at a time.

Liberty: the published model saw a whole clip at once. Generating against a cache each frame sees
those before it alone, which has to be learned back (`results/`).
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldenv.config import SimulatorConfig
from worldenv.data.embodiment import Embodiment
from worldenv.models import wan_folder
from worldenv.models.denoiser import Conditioning, Network, action_encoder, dynamics
from worldenv.models.heads import zeroed
from worldenv.models.layers import Attend, Rotary3D, Words
from worldenv.models.simulator import SimulatorState, World
from worldenv.models.wan import WanTransformer
from worldenv.runtime.errors import UserError

POSITIONS = 1024  # frames that its rotary positions reach
_ACTION_WIDTH = 128  # of the embedded commands that modulate each block


class WanNetwork(Network):
    """A published Wan as a simulator's network, with what a simulator needs beside it."""

    def __init__(
        self,
        config: SimulatorConfig,
        embodiment: Embodiment,
        columns: int = 0,
        wan: WanTransformer | None = None,
        tokenizer: nn.Module | None = None,
    ) -> None:
        """columns: how many of `Conditioning.columns` there are beside those of the action map.
        wan, tokenizer: in place of those in the folders. UserError where the folder does not fit.
        """
        super().__init__(config, embodiment, 5.0, tokenizer)
        self.wan = wan or wan_folder.load(
            config.folder, "wan", config.text == "constant", config.precision
        )
        sizes, z = self.wan.sizes, self.tokenizer.channels
        if z != 4 * sizes.channels:
            raise UserError(
                f"{config.folder}: expected tokens of 2 x 2 latents of {sizes.channels} channels, "
                f"{4 * sizes.channels} numbers, got {z} of the tokenizer {config.tokenizer!r}. "
                "Name the tokenizer that this Wan was trained with."
            )
        self.heads, self.head_dim = sizes.heads, sizes.head_dim
        e = sizes.width
        self.rotary = Rotary3D(self.head_dim, self.views, self.tokenizer.grid, exact=True)
        text = None
        if config.text == "words":
            text = wan_folder.read_prompt(config.prompt, sizes.text_dim)
        self.register_buffer("prompt", text)  # [n, 4096]
        self._said: list[Words] | None = None
        self.action_in = action_encoder(embodiment, _ACTION_WIDTH)
        self.dynamics = dynamics(embodiment)
        zeroed(self.dynamics[-1])
        columns += self.action_map.columns if self.action_map is not None else 0
        # All that follows begins at zero, beside what is published.
        self.position = nn.Parameter(torch.zeros(self.tokens, e))
        self.columns_in = zeroed(nn.Linear(2 * z + columns, e))
        self.proprio_out = zeroed(nn.Linear(e, embodiment.P))
        for block in self.blocks:
            block.action = zeroed(nn.utils.skip_init(nn.Linear, _ACTION_WIDTH, 6 * e))

    def denoise(
        self,
        noisy: Tensor,
        last: Tensor,
        reference: Tensor,
        sigma: Tensor,
        condition: Conditioning,
        rotary: Tensor,
        attends: Sequence[Attend],
    ) -> tuple[Tensor, Tensor]:
        """See `Network.denoise`."""
        columns = [last, reference[:, None].expand_as(last)]
        if condition.columns is not None:
            columns.append(condition.columns)
        added = self.columns_in(torch.cat(columns, -1)) + self.position
        said, action = self._words(), condition.action
        velocity, x = self.wan(noisy, 1000 * sigma, rotary, attends, said, action, added)
        pooled = F.layer_norm(x, x.shape[-1:], eps=1e-6).mean(-2)
        refined = condition.proprio.detach() + self.proprio_out(pooled)
        return noisy - sigma[..., None, None] * velocity, refined

    @property
    def blocks(self) -> nn.ModuleList:
        """Wan's."""
        return self.wan.blocks

    @property
    def dtype(self) -> torch.dtype:
        """Of the transformer blocks and of what they cache."""
        return self.wan.dtype

    def train(self, mode: bool = True) -> "WanNetwork":
        """As `nn.Module.train`; the prompt is read anew, for weights may have changed."""
        self._said = None
        return super().train(mode)

    def _words(self) -> list[Words] | None:
        """Per layer, what the prompt says; once, where nothing is trained."""
        if self.prompt is None:
            return None
        if self.training or torch.is_grad_enabled():
            return self.wan.read(self.prompt[None])
        if self._said is None or self._said[0].keys.device != self.device:
            self._said = self.wan.read(self.prompt[None])
        return self._said


class WanSimulator(WanNetwork, World):
    """`models.simulator.Simulator` over a published Wan: frame by frame, against a cache."""

    @torch.no_grad()
    def step(
        self, state: SimulatorState, action: Tensor, steps: int, active: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """See `World.step`."""
        if state.cache is not None and state.cache.positions.max(initial=0) >= POSITIONS:
            raise UserError(
                f"Wan's positions end after {POSITIONS} frames; an episode has gone on for longer. "
                "Lower env.max_steps."
            )
        return super().step(state, action, steps, active)
