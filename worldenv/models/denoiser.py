"""The networks that a simulator denoises frames with: what they have in common, and the small one.

`models.simulator.World` generates and trains with any `Network`; `Denoiser` is the one that is
trained from nothing, `models.wan.WanNetwork` holds a published Wan transformer. Both predict the
proprio that a chunk of actions leads to, embed what is commanded, and modulate the frame with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from worldenv.config import SimulatorConfig
from worldenv.data.embodiment import Embodiment
from worldenv.models.action_map import ActionMap
from worldenv.models.heads import FrameHead, OpeningHead, zeroed
from worldenv.models.layers import DenoiserBlock, Rotary3D, sinusoidal
from worldenv.models.tokenizer import build_tokenizer


@dataclass
class Conditioning:
    """What modulates a stretch of frames, all `[B, F, ...]` and normalised."""

    action: Tensor  # [B, F, E'] embedded
    proprio: Tensor  # [B, F, P] predicted proprio of the frame itself
    columns: Tensor | None = None  # [B, F, S, M] beside the frame's latents: maps, features


class Network(nn.Module):
    """What `World` asks of a network. A subclass sets these attributes, `action_in` and `dynamics`,
    and defines `denoise` and `dtype`. Shapes: S tokens = views * grid**2, Z latent channels.
    """

    rotary: Rotary3D
    blocks: nn.ModuleList
    heads: int
    head_dim: int

    def __init__(
        self,
        config: SimulatorConfig,
        embodiment: Embodiment,
        shift: float,
        tokenizer: nn.Module | None = None,
    ) -> None:
        """shift: of the sampling schedule, where the config does not say. tokenizer: in place of
        the one the config names."""
        super().__init__()
        self.config, self.embodiment, self.views = config, embodiment, embodiment.V
        self.chunk, self.shift = (embodiment.chunk, embodiment.A), config.shift or shift
        self.tokenizer = tokenizer or build_tokenizer(config, embodiment.image_size)
        self.tokenizer.requires_grad_(False)
        self.tokens = self.views * self.tokenizer.grid**2
        self.register_buffer("proprio_mean", torch.zeros(embodiment.P))
        self.register_buffer("proprio_std", torch.ones(embodiment.P))
        grips = torch.tensor([kind == "grip" for kind in embodiment.action])
        self.register_buffer("grips", grips, persistent=False)  # [A] bool
        fingers = torch.tensor(embodiment.entries("gripper"))
        self.register_buffer("fingers", fingers, persistent=False)
        self.opening: OpeningHead | None = None
        self.told: Tensor | None = None
        self.drawing = True
        self.action_map: ActionMap | None = None
        if config.action_map:
            self.action_map = ActionMap(embodiment, self.tokenizer.grid, config.ray_maps)

    def denoise(
        self,
        noisy: Tensor,  # [B, F, S, Z]
        last: Tensor,  # [B, F, S, Z] the frame before each
        reference: Tensor,  # [B, S, Z] a real frame before all of them
        sigma: Tensor,  # [B, F] noise level in [0, 1]
        condition: Conditioning,
        rotary: Tensor,  # [B, F, S, D/2] complex
        attends: Sequence,  # per layer: (q, k, v) -> attention output
    ) -> tuple[Tensor, Tensor]:
        """One pass: the clean frame `[B, F, S, Z]` and its proprio `[B, F, P]` (normalised)."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Of the transformer blocks and of what they cache; everything else is float32."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where it and its worlds live."""
        return self.proprio_mean.device

    def sigmas(self, steps: int) -> list[float]:
        """Noise levels of sampling in `steps` passes, from 1 to 0, more of them high up where
        `shift` is above 1 (Wan: s' = shift s / (1 + (shift - 1) s))."""
        even = torch.linspace(1, 0, steps + 1).tolist()
        return [self.shift * s / (1 + (self.shift - 1) * s) for s in even]

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Proprio normalisation `[P]`, from the training data."""
        self.proprio_mean.copy_(mean)
        self.proprio_std.copy_(std)

    def condition(
        self,
        proprio: Tensor,
        previous: Tensor,
        led: Tensor,
        action: Tensor,
        opening: Tensor | None = None,
    ) -> Conditioning:
        """Predict the proprio a chunk leads to, and embed what leads there.

        proprio, previous `[B, F, P]` (raw, of the frame before and the one before that); led,
        action `[B, F, C, A]` as the policy commands them: the chunk that led to the frame before
        (how fast the arm still moves is in neither pose) and the one from there. opening `[B, F]`
        in m, if it is known: NaN where it is not.
        """
        known, predicted = self._dynamics(proprio, previous, led, action)
        if opening is not None:
            predicted = self._opened(predicted, opening)
        elif self.opening is not None:
            opening = proprio.new_full(proprio.shape[:2], torch.nan)
        embedded, columns = self.action_in(torch.cat([known, predicted.detach()], -1)), None
        if self.opening is not None:
            widths = opening, self.openings(proprio)
            embedded = embedded + self.opening_in(
                torch.cat([self.opening.smooth(width) for width in widths], -1)
            )
        if self.action_map is not None:
            reached = predicted.detach() * self.proprio_std + self.proprio_mean
            columns = self.action_map(reached, proprio)
        return Conditioning(embedded, predicted, columns)

    def _dynamics(
        self, proprio: Tensor, previous: Tensor, led: Tensor, action: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What is known of a chunk (see `condition`), and the proprio it leads to; normalised."""
        q1, q0 = self._normalise(proprio), self._normalise(previous)
        known = torch.cat([q1, q0, *(self._executed(a).flatten(-2) for a in (led, action))], -1)
        return known, q1 + self.dynamics(known)

    def _opened(self, predicted: Tensor, opening: Tensor) -> Tensor:
        """A predicted proprio with the fingers `opening` apart where that is a number."""
        places = self.fingers
        mean, std = self.proprio_mean[places], self.proprio_std[places]
        entries = (opening[..., None] / len(places) * mean.sign() - mean) / std
        entries = torch.where(entries.isnan(), predicted[..., places], entries)
        return predicted.index_copy(-1, places, entries.to(predicted.dtype))

    def openings(self, proprio: Tensor) -> Tensor:
        """Distance of the fingers `[...]` in m."""
        return proprio[..., self.fingers].abs().sum(-1)

    def closes(self, action: Tensor) -> Tensor:
        """Whether chunks `[..., C, A]` end with a command to close the gripper."""
        last = action[..., -1, self.grips].mean(-1)
        return (last > 0) if self.embodiment.gripper_closes > 0 else (last <= 0)

    def _executed(self, action: Tensor) -> Tensor:
        """What the robot does of a commanded chunk `[..., A]`: clipped, gripper open or closed."""
        a = action.clamp(-1, 1)
        return torch.where(self.grips, torch.where(a > 0, 1.0, -1.0), a)

    def _normalise(self, proprio: Tensor) -> Tensor:
        return (proprio - self.proprio_mean) / self.proprio_std


class Denoiser(Network):
    """The small one. A Wan-shaped transformer, trained from nothing."""

    def __init__(
        self, config: SimulatorConfig, embodiment: Embodiment, tokenizer: nn.Module | None = None
    ) -> None:
        super().__init__(config, embodiment, 1.0, tokenizer)
        e, z, proprio = config.width, self.tokenizer.channels, embodiment.P
        self.heads, self.head_dim = config.heads, e // config.heads
        self.patch_in = nn.Linear(3 * z, e)
        self.position = nn.Parameter(0.02 * torch.randn(self.tokens, e))
        self.rotary = Rotary3D(self.head_dim, self.views, self.tokenizer.grid)
        self.time_in = nn.Sequential(nn.Linear(256, e), nn.SiLU(), nn.Linear(e, e), nn.SiLU())
        self.time_out = nn.Linear(e, 6 * e)
        self.action_in = action_encoder(embodiment, e)
        self.dynamics = dynamics(embodiment)
        self.blocks = nn.ModuleList(
            DenoiserBlock(e, config.heads, config.mlp_ratio) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(e, eps=1e-6)
        if config.prediction == "sample":
            self.head = FrameHead(e, z, self.tokenizer.block)
        else:
            self.head = zeroed(nn.Linear(e, z))
        self.proprio_out = nn.Linear(e, proprio)
        for layer in (self.time_out, self.dynamics[-1], self.proprio_out):
            zeroed(layer)
        # Last, so that a model without one begins with the same numbers.
        if self.action_map is not None:
            self.columns_in = zeroed(nn.Linear(self.action_map.columns, e))
        if config.drawn_grasps:
            known = 2 * (embodiment.P + embodiment.chunk * embodiment.A)
            self.opening = OpeningHead(
                self.views, embodiment.image_size, known + 2 * OpeningHead.BINS
            )
            self.opening_in = nn.Linear(2 * OpeningHead.BINS, e, bias=False)

    def denoise(
        self,
        noisy: Tensor,
        last: Tensor,
        reference: Tensor,
        sigma: Tensor,
        condition: Conditioning,
        rotary: Tensor,
        attends: Sequence,
    ) -> tuple[Tensor, Tensor]:
        """See `Network.denoise`."""
        s, clean = sigma[..., None, None], self.config.prediction == "sample"
        # Pure noise says nothing about the clean frame; unscaled it shows as grain.
        seen = (1 - s) * noisy if clean else noisy
        reference = reference[:, None].expand_as(last)
        x = self.patch_in(torch.cat([seen, last, reference], -1)) + self.position
        if condition.columns is not None:
            x = x + self.columns_in(condition.columns)
        time = self.time_in(sinusoidal(1000 * sigma, 256))
        modulation = self.time_out(time).unflatten(-1, (6, -1))
        x, modulation, action = (y.to(self.dtype) for y in (x, modulation, condition.action))
        for block, attend in zip(self.blocks, attends, strict=True):
            x = block(x, modulation, action, rotary, attend)
        x = self.norm(x.float())
        refined = condition.proprio.detach() + self.proprio_out(x.mean(-2)).float()
        if clean:
            return self.head(x, last, reference), refined
        return noisy - s * self.head(x).float(), refined

    @property
    def dtype(self) -> torch.dtype:
        """Of the transformer blocks and of what they cache; everything else is float32."""
        return self.blocks[0].table.dtype


def action_encoder(embodiment: Embodiment, out: int) -> nn.Sequential:
    """Embeds what leads to a frame, three poses and two chunks, to `[out]`."""
    known = 3 * embodiment.P + 2 * embodiment.chunk * embodiment.A
    return nn.Sequential(nn.Linear(known, out), nn.SiLU(), nn.Linear(out, out), nn.SiLU())


def dynamics(embodiment: Embodiment) -> nn.Sequential:
    """Predicts how the proprio changes over a chunk, of two poses and two chunks."""
    proprio, h = embodiment.P, 256
    known = 2 * (proprio + embodiment.chunk * embodiment.A)
    return nn.Sequential(
        nn.Linear(known, h), nn.SiLU(), nn.Linear(h, h), nn.SiLU(), nn.Linear(h, proprio)
    )
