"""The policy: OpenVLA-OFT's shape from toy to full size, with World-Env's Laplace scale head.

One token per camera, proprio and instruction tokens, then C action slots; a bidirectional
transformer; an MLP head reads mean and log-scale of a chunk `[C, A]` from the slots in parallel
(OpenVLA-OFT, arXiv 2502.19645; scale head: arXiv 2509.24948 section 3.5). Actions are in the
simulator's units, [-1, 1], proprio is normalised with the demonstrations' statistics.
Liberty: the small presets use convolutional encoders trained from scratch and hashed words where
the full-size ones use SigLIP, DINOv2 and Llama.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldenv.config import PolicyConfig
from worldenv.data.embodiment import Embodiment
from worldenv.models.layers import (
    ConvEncoder,
    TransformerBlock,
    WordEncoder,
    views_to_channels,
)


class Policy(nn.Module):
    """Observation to a Laplace distribution over a chunk of actions (`rl.policy.Policy`)."""

    distribution = "laplace"

    def __init__(self, config: PolicyConfig, embodiment: Embodiment) -> None:
        super().__init__()
        self.config, self.embodiment, self.chunk = config, embodiment, embodiment.chunk
        width = self.feature_width = config.width
        self.register_buffer("proprio_mean", torch.zeros(embodiment.P))
        self.register_buffer("proprio_std", torch.ones(embodiment.P))
        self.encoders = nn.ModuleList(
            ConvEncoder(embodiment.image_size, config.encoder_channels, width)
            for _ in embodiment.views
        )
        self.proprio_in = nn.Sequential(
            nn.Linear(embodiment.P, 64), nn.SiLU(), nn.Linear(64, width), nn.LayerNorm(width)
        )
        self.words = WordEncoder(width)
        self.kind = nn.Parameter(0.02 * torch.randn(embodiment.V + 2, width))
        self.slots = nn.Parameter(0.02 * torch.randn(self.chunk, width))
        self.blocks = nn.ModuleList(
            TransformerBlock(width, config.heads) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.mu = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, embodiment.A))
        self.log_scale = nn.Linear(width, embodiment.A)
        nn.init.zeros_(self.log_scale.weight)
        nn.init.constant_(self.log_scale.bias, -2.0)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Proprio normalisation `[P]`, from the demonstrations."""
        self.proprio_mean.copy_(mean)
        self.proprio_std.copy_(std + 1e-2)

    def forward(self, observation: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Observation (image `[B, V, H, W, 3]` uint8, proprio `[B, P]`, instruction: B strings).

        Returns mu and log-scale, each `[B, C, A]`.
        """
        return self.both(observation)[:2]

    def both(self, observation: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """As forward, and the features `[B, E]` of a value head."""
        return self._decode(
            views_to_channels(observation["image"]),
            observation["proprio"],
            self.words(observation["instruction"]),
        )

    def augmented(
        self,
        observation: Mapping[str, Any],
        generator: torch.Generator,
        shift: int,
        noise: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """As forward, with images shifted by up to `shift` pixels and recoloured, and proprio with
        normal noise of standard deviations `[P]`."""
        views = augment(views_to_channels(observation["image"]), shift, generator)
        proprio = observation["proprio"]
        jitter = torch.randn(proprio.shape, generator=generator).to(proprio.device) * noise
        words = self.words(observation["instruction"])
        return self._decode(views, proprio + jitter, words)[:2]

    def normalise(self, action: Tensor) -> Tensor:
        """Its units are the environment's."""
        return action

    def command(self, action: Tensor) -> Tensor:
        """Its units are the environment's."""
        return action

    def trainable_groups(self) -> dict[str, list[nn.Parameter]]:
        """All of it."""
        return {"all": list(self.parameters())}

    def _decode(
        self, views: Tensor, proprio: Tensor, words: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, log-scale and features, from float images `[V, B, 3, H, W]` and word tokens
        `[B, E]`."""
        q = ((proprio - self.proprio_mean) / self.proprio_std).clamp(-4, 4)
        tokens = [encoder(view) for encoder, view in zip(self.encoders, views, strict=True)]
        tokens = torch.stack([*tokens, self.proprio_in(q), words], 1) + self.kind
        slots = self.slots.expand(len(tokens), -1, -1)
        x = torch.cat([tokens, slots], 1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x[:, -self.chunk :])
        low = self.config.min_log_scale
        return self.mu(x), self.log_scale(x.detach()).clamp(low, 0.0), x.mean(1)


def random_shift(images: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """Shift each image `[N, 3, H, W]` by up to `pad` pixels, edges repeated."""
    n, _, h, w = images.shape
    padded = F.pad(images, (pad,) * 4, mode="replicate")
    dy, dx = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=generator).to(images.device)
    rows = dy + torch.arange(h, device=images.device)
    cols = dx + torch.arange(w, device=images.device)
    index = torch.arange(n, device=images.device)[:, None, None]
    # Advanced indices around the channel slice put channels last.
    return padded[index, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def augment(views: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """Random shift, contrast and colour cast for float images `[V, B, 3, H, W]`."""
    v, b = views.shape[:2]
    x = random_shift(views.flatten(0, 1), pad, generator).unflatten(0, (v, b)) if pad else views
    contrast = 1 + 0.1 * torch.randn(v, b, 1, 1, 1, generator=generator)
    cast = 0.05 * torch.randn(v, b, 3, 1, 1, generator=generator)
    return x * contrast.to(x.device) + cast.to(x.device)


class ValueHead(nn.Module):
    """The critic of PPO with GAE: the value of an observation, from the features that a policy has
    made of it anyway. A network of its own explains less and takes longer (results/critic)."""

    def __init__(self, width: int, hidden: int = 512) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1)
        )
        nn.init.zeros_(self.net[-1].weight)

    def forward(self, features: Tensor) -> Tensor:
        """Value `[B]` of features `[B, E]`."""
        return self.net(features.float())[:, 0]
