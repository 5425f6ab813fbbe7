"""The instant reflector: reward and termination from what has been seen so far.

World-Env section 3.4 (arXiv 2509.24948): R(o_{1:t}, g) = sigmoid(head(h_t)), trained by binary
cross-entropy on per-frame success labels; R > eta ends the episode and R at the end is its reward.
eta travels with the weights, for it is calibrated after training; real frames have one of their own
(stages/thresholds.py).
h_t joins the features of frame t with those of frame 1, so that it can tell what has changed, and
with the instruction. Liberties: of o_{1:t} only the ends are used; the small presets train a
convolutional encoder per camera where the paper freezes a VLM.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldenv.config import ReflectorConfig
from worldenv.data.embodiment import Embodiment
from worldenv.models.layers import ConvEncoder, WordEncoder, views_to_channels

NOT_CALIBRATED = -1.0
"""A reflector's `real_threshold` before there is one."""


def thresholds(config: ReflectorConfig) -> dict[str, Tensor]:
    """The two buffers that every reflector has: above which reward an imagined episode has
    succeeded, and above which a real one. What is not to be calibrated serves both."""
    real = NOT_CALIBRATED if config.calibrate else config.threshold
    return {"threshold": torch.tensor(config.threshold), "real_threshold": torch.tensor(real)}


class Reflector(nn.Module):
    """Frames, proprio and instruction to a success logit per frame."""

    frozen = False
    """Its encoder is trained with its head (of `models.vlm_reflector` it is not)."""

    def __init__(self, config: ReflectorConfig, embodiment: Embodiment) -> None:
        super().__init__()
        self.config, self.embodiment = config, embodiment
        features = 64
        for name, eta in thresholds(config).items():
            self.register_buffer(name, eta)
        self.register_buffer("proprio_mean", torch.zeros(embodiment.P))
        self.register_buffer("proprio_std", torch.ones(embodiment.P))
        self.encoders = nn.ModuleList(
            ConvEncoder(embodiment.image_size, config.encoder_channels, features)
            for _ in embodiment.views
        )
        self.size = embodiment.V * features + embodiment.P
        self.words = WordEncoder(features)
        self.hidden = nn.Linear(2 * self.size + features, config.width)
        self.out = nn.Linear(config.width, 1)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Proprio normalisation `[P]`, from the training data."""
        self.proprio_mean.copy_(mean)
        self.proprio_std.copy_(std)

    def onlooker(self, batch: int) -> "Judge":
        """A judge of B episodes from their beginnings."""
        return Judge(self, batch)

    def features(self, views: Tensor, proprio: Tensor) -> Tensor:
        """Float images `[V, N, 3, H, W]` and proprio `[N, P]` to features `[N, size]`."""
        seen = [encoder(view) for encoder, view in zip(self.encoders, views, strict=True)]
        q = ((proprio - self.proprio_mean) / self.proprio_std).clamp(-3, 3)
        return torch.cat([*seen, q], -1)

    def judge(
        self, features: Tensor, first: Tensor, words: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """Logit `[...]` from the features of frame t and of frame 1, and the words.

        keep: in training, which of the head's hidden numbers `[..., width]` are not dropped.
        """
        hidden = F.silu(self.hidden(torch.cat([features, first, words], -1)))
        if keep is not None:
            hidden = hidden * keep * (keep.numel() / keep.sum())
        return self.out(hidden)[..., 0]

    def forward(self, image: Tensor, proprio: Tensor, instruction: Sequence[str]) -> Tensor:
        """Logits `[B, F]` of whole sequences: image `[B, F, V, H, W, 3]` uint8, proprio
        `[B, F, P]`.
        """
        batch, frames = image.shape[:2]
        features = self.features(views_to_channels(image.flatten(0, 1)), proprio.flatten(0, 1))
        features = features.unflatten(0, (batch, frames))
        words = self.words(instruction)[:, None].expand(-1, frames, -1)
        return self.judge(features, features[:, :1].expand_as(features), words)


class Judge:
    """A reflector watching B episodes at once, frame by frame, on the device."""

    def __init__(self, reflector: Reflector, batch: int) -> None:
        device = reflector.proprio_mean.device
        self.reflector = reflector
        self.first = torch.zeros(batch, reflector.size, device=device)
        self.fresh = torch.ones(batch, 1, dtype=torch.bool, device=device)

    def reset(self, rows: Tensor) -> None:
        """Forget what rows (bool [B]) have seen: their next frame is their first."""
        self.fresh = self.fresh | rows.to(self.fresh.device)[:, None]

    @torch.no_grad()
    def watch(
        self, image: Tensor, proprio: Tensor, instruction: Sequence[str], rows: Tensor
    ) -> Tensor:
        """Reward R `[B]` in [0, 1] after one more frame `[B, V, H, W, 3]`; other rows' memories
        keep.
        """
        features = self.reflector.features(views_to_channels(image), proprio)
        begins = self.fresh & rows.to(features.device)[:, None]
        self.first = torch.where(begins, features, self.first)
        self.fresh = self.fresh & ~begins
        words = self.reflector.words(instruction)
        return torch.sigmoid(self.reflector.judge(features, self.first, words))
