"""Reflectors that see through a frozen image-text model (World-Env section 3.4).

Two kinds. "vlm": a light head on the hidden state of (o_1, o_t, instruction), trained as the small
reflector is. "prompted": the model's own answer to the prompt, R = softmax over the logits of the
two answers, nothing trained: the paper's arm without a reward head. Either keeps the manners of
`models.reflector.Reflector`; the image-text model belongs to no state dict, only which one it was.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldenv.config import ReflectorConfig
from worldenv.data.embodiment import Embodiment
from worldenv.models.reflector import thresholds
from worldenv.models.vlm import Begun, ImageText


class ImageTextReflector(nn.Module):
    """Frames, proprio and instruction to a success logit per frame, by a frozen encoder."""

    frozen = True
    """Features of a frame do not change in training: they are computed once."""

    def __init__(
        self,
        config: ReflectorConfig,
        embodiment: Embodiment,
        encoder: ImageText | None = None,
    ) -> None:
        """encoder: in place of the folder's. UserError for a folder that holds no whole image-text
        model."""
        super().__init__()
        self.config, self.embodiment = config, embodiment
        self.encoder = encoder or _seeing(config, embodiment)
        for name, eta in thresholds(config).items():
            self.register_buffer(name, eta)
        self.register_buffer("proprio_mean", torch.zeros(embodiment.P))
        self.register_buffer("proprio_std", torch.ones(embodiment.P))
        self.answers = self.encoder.answers() if config.kind == "prompted" else None
        if self.answers is None:
            size = self.encoder.size
            seen = size + (embodiment.P if config.use_proprio else 0)
            self.norm = nn.LayerNorm(size)
            self.hidden = nn.Linear(seen, config.width)
            self.out = nn.Linear(config.width, 1)
        if self.encoder.why_anew:
            print(f"reflector: o_1 is encoded anew with every frame: {self.encoder.why_anew}")

    @property
    def feature_digest(self) -> str:
        """Of all that features depend on, but the frames and the instruction."""
        config = self.config
        asked = (config.prompt, config.views, config.precision, str(bool(self.encoder.why_anew)))
        return "\n".join((self.encoder.digest, *asked))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ImageTextReflector":
        """Wherever the head goes (`to`, `cpu`, `cuda`), the image-text model goes too."""
        self.encoder.model._apply(fn)
        return super()._apply(fn, recurse)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Proprio normalisation `[P]`, from the training data."""
        self.proprio_mean.copy_(mean)
        self.proprio_std.copy_(std)

    def onlooker(self, batch: int) -> "ImageTextJudge":
        """A judge of B episodes from their beginnings."""
        return ImageTextJudge(self, batch)

    def encode(self, image: Tensor, instruction: str) -> Tensor:
        """Features `[F, E]` of one sequence `[F, V, H, W, 3]` uint8, seen from its first frame."""
        (begun,) = self.encoder.begin(image[:1], [instruction])
        return self.encoder.go_on([begun] * len(image), image)

    def judge(self, features: Tensor, proprio: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logit `[N]` from features `[N, E]` and proprio `[N, P]`.

        keep: in training, which of the head's hidden numbers `[N, width]` are not dropped.
        """
        if self.answers is not None:
            return self.encoder.odds(features, self.answers)
        seen = self.norm(features.float())
        if self.config.use_proprio:
            q = ((proprio - self.proprio_mean) / self.proprio_std).clamp(-3, 3)
            seen = torch.cat([seen, q], -1)
        hidden = F.silu(self.hidden(seen))
        if keep is not None:
            hidden = hidden * keep * (keep.numel() / keep.sum())
        return self.out(hidden)[..., 0]

    def forward(self, image: Tensor, proprio: Tensor, instruction: Sequence[str]) -> Tensor:
        """Logits `[B, F]` of whole sequences: image `[B, F, V, H, W, 3]` uint8, proprio
        `[B, F, P]`.
        """
        logits = [
            self.judge(self.encode(frames, words), q)
            for frames, q, words in zip(image, proprio, instruction, strict=True)
        ]
        return torch.stack(logits)


def _seeing(config: ReflectorConfig, embodiment: Embodiment) -> ImageText:
    """The folder's model, whose processor is known to show it the frames of this robot."""
    encoder, side = ImageText(config), embodiment.image_size
    encoder.layout("", 1 if config.views == "first" else embodiment.V, side, side)
    return encoder


class ImageTextJudge:
    """A reflector watching B episodes at once, frame by frame. What it has seen of their first
    frames lies on the image-text model's device."""

    def __init__(self, reflector: ImageTextReflector, batch: int) -> None:
        self.reflector = reflector
        self.begun: list[Begun | None] = [None] * batch

    def reset(self, rows: Tensor) -> None:
        """Forget what rows (bool [B]) have seen: their next frame is their first."""
        for i in rows.nonzero()[:, 0].tolist():
            self.begun[i] = None

    @torch.no_grad()
    def watch(
        self, image: Tensor, proprio: Tensor, instruction: Sequence[str], rows: Tensor
    ) -> Tensor:
        """Reward R `[B]` in [0, 1] after one more frame `[B, V, H, W, 3]`; 0 for other rows, at
        which it does not look.
        """
        device = self.reflector.proprio_mean.device
        reward = torch.zeros(len(self.begun), device=device)
        live = rows.nonzero()[:, 0].tolist()
        fresh = [i for i in live if self.begun[i] is None]
        if fresh:
            begun = self.reflector.encoder.begin(image[fresh], [instruction[i] for i in fresh])
            for i, one in zip(fresh, begun, strict=True):
                self.begun[i] = one
        if live:
            features = self.reflector.encoder.go_on([self.begun[i] for i in live], image[live])
            logits = self.reflector.judge(features, proprio[live].to(device))
            reward[live] = torch.sigmoid(logits)
        return reward
