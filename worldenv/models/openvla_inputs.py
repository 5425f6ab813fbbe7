"""What surrounds an OpenVLA policy: images, words and units in, actions out, as published.

Images: lanczos3 with antialiasing to the trained size, rounded; a crop of the centre, enlarged
again; two normalisations. Words: the published prompt, which ends in the empty token. Units: bounds
of the 1st and 99th percentile (BOUNDS_Q99), 255 bins between 256 edges for tokens.
Liberty: the published evaluation also sends images that it resizes through a JPEG, which is left
out, and TensorFlow's arithmetic is repeated to its rounding only.
Sources: openvla/openvla, moojink/openvla-oft (`openvla_utils.py`, `processing_prismatic.py`,
`action_tokenizer.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

EMPTY = "▁"  # the token between the prompt and the first action, 29871 in Llama-2's vocabulary
BINS = 256  # edges of the bins, and action tokens
_TINY = 1e-8  # added to every range, as published


@dataclass(frozen=True)
class Gripper:
    """Which dimensions of an action grip, and what they are where the actions are executed.

    trained_open, trained_closed: in the policy's own units; in all of OpenVLA's data 1 is open, 0
    closed, and no statistics are applied.
    """

    dims: tuple[int, ...]
    opened: float
    closed: float
    trained_open: float = 1.0
    trained_closed: float = 0.0


@dataclass(frozen=True)
class Range:
    """Two bounds per dimension, which become -1 and 1; where `mask` is false nothing changes.

    still: dimensions that never changed in the data; policies are trained on 0 there.
    """

    low: Sequence[float]
    high: Sequence[float]
    mask: Sequence[bool]
    still: Sequence[bool]


class Units(nn.Module):
    """Between the units of the policy and those of its surroundings. In float64: exact."""

    def __init__(self, action: Range, proprio: Range | None, gripper: Gripper) -> None:
        super().__init__()
        self.gripper = gripper
        for name, bounds in (("action", action), ("proprio", proprio)):
            for part in ("low", "high", "mask", "still") if bounds is not None else ():
                kind = torch.float64 if part in ("low", "high") else torch.bool
                value = torch.tensor(getattr(bounds, part), dtype=kind)
                self.register_buffer(f"{name}_{part}", value, persistent=False)
        edges = torch.linspace(-1, 1, BINS, dtype=torch.float64)
        self.register_buffer("edges", edges, persistent=False)

    def state(self, proprio: Tensor) -> Tensor:
        """Proprio `[B, P]` as it was measured, to the policy's units, in [-1, 1]."""
        span = self.proprio_high - self.proprio_low + _TINY
        scaled = 2 * (proprio.double() - self.proprio_low) / span - 1
        return torch.where(self.proprio_mask, scaled, proprio.double()).clamp(-1, 1).float()

    def command(self, action: Tensor) -> Tensor:
        """Actions `[..., A]` in the policy's units to those that are executed, float32.

        The gripper is opened or closed, whichever is nearer (exactly between the two: halfway).
        """
        x = action.double()
        span = self.action_high - self.action_low + _TINY
        unit = 0.5 * (action + 1)  # in its own precision, as published
        out = torch.where(self.action_mask, unit * span + self.action_low, x)
        g = self.gripper
        share = (x[..., g.dims] - g.trained_closed) / (g.trained_open - g.trained_closed)
        sign = (2 * share - 1).sign()
        out[..., g.dims] = ((g.opened + g.closed) + sign * (g.opened - g.closed)) / 2
        return out.float()

    def normalise(self, action: Tensor) -> Tensor:
        """Executed actions `[..., A]` to the policy's units, float32: `command` undone.

        As policies are trained: clipped to [-1, 1], and 0 in a dimension that never changed.
        """
        x = action.double()
        span = self.action_high - self.action_low + _TINY
        scaled = (2 * (x - self.action_low) / span - 1).clamp(-1, 1)
        out = torch.where(self.action_mask, scaled.masked_fill(self.action_still, 0.0), x)
        g = self.gripper
        share = ((x[..., g.dims] - g.closed) / (g.opened - g.closed)).clamp(0, 1)
        out[..., g.dims] = g.trained_closed + share * (g.trained_open - g.trained_closed)
        return out.float()

    def from_tokens(self, token: Tensor) -> Tensor:
        """Token indices `[..., A]` (0..255, by id: large actions first) to the policy's units."""
        centres = (self.edges[1:] + self.edges[:-1]) / 2
        return centres[(BINS - 1 - token).clamp(0, BINS - 2)]

    def to_tokens(self, action: Tensor) -> Tensor:
        """Actions `[..., A]` in the policy's units to token indices, int64."""
        above = torch.bucketize(action.double().clamp(-1, 1), self.edges, right=True)
        return BINS - above


class Pixels(nn.Module):
    """Images `[B, V, H, W, 3]` uint8 to one tensor `[B * V, 3, size, size]` per vision tower."""

    def __init__(
        self, size: int, crop: float, normalisations: Sequence[tuple[Sequence[float], ...]]
    ) -> None:
        super().__init__()
        self.size, self.side = size, math.sqrt(crop)
        middle = torch.tensor((1 - self.side) / 2, dtype=torch.float64)
        view = _window(size, self.side, middle) if crop < 1 else None
        self.register_buffer("view", view, persistent=False)
        stats = torch.tensor(normalisations)[..., None, None]  # [towers, mean and std, 3, 1, 1]
        self.register_buffer("normalisations", stats, persistent=False)
        self.resizing: dict[tuple, Tensor] = {}

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        """generator: disturb each image as `_disturbed` says, in place of the crop's centre."""
        x = images.flatten(0, 1).permute(0, 3, 1, 2).to(self.normalisations.dtype)
        height, width = x.shape[-2:]
        if (height, width) != (self.size, self.size):
            x = self._matrix(height, x.device) @ x @ self._matrix(width, x.device).mT
            x = x.round().clamp(0, 255)
        if generator is not None:
            x = (255 * self._disturbed(x / 255, generator)).round()
        elif self.view is not None:
            x = self.view @ (x * (1 / 255)) @ self.view.mT
            x = (
                (x.clamp(0, 1) * 255.5).floor().clamp(max=255)
            )  # as TensorFlow's convert_image_dtype
        return [(x / 255 - mean) / std for mean, std in self.normalisations]

    def _disturbed(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Cropped anywhere, brighter or darker, of more or less contrast: `[N, 3, H, W]` in 0..1.

        As policies are trained, without their changes of saturation and hue.
        """
        draws = torch.rand(4, len(x), 1, 1, 1, generator=generator, dtype=torch.float64)
        starts = ((1 - self.side) * draws[:2, :, :, 0, 0]).unbind()
        rows, columns = (_window(self.size, self.side, s).to(x.device) for s in starts)
        light, contrast = (0.4 * draws[2:] - 0.2).to(x).unbind()
        x = rows @ x @ columns.mT + light
        mean = x.mean((-2, -1), keepdim=True)
        return torch.lerp(mean, x, 1 + contrast).clamp(0, 1)

    def _matrix(self, size: int, device: torch.device) -> Tensor:
        key = (size, device)
        if key not in self.resizing:
            self.resizing[key] = _lanczos3(size, self.size).to(device)
        return self.resizing[key]


def _lanczos3(size: int, to: int) -> Tensor:
    """Weights `[to, size]` of a row of pixels resized with lanczos3, antialiased."""
    scale = max(size / to, 1.0)
    centre = (torch.arange(to, dtype=torch.float64) + 0.5) * (size / to)
    x = (torch.arange(size, dtype=torch.float64) + 0.5 - centre[:, None]) / scale
    weight = torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0.0)
    return (weight / weight.sum(1, keepdim=True)).float()


def _window(size: int, side: float, start: Tensor) -> Tensor:
    """Weights `[..., size, size]` that cut a part of a row and enlarge it, bilinear, ends on ends.

    side: of the part; start `[...]`: where it begins; both as a share of the row.
    """
    at = (start[..., None] + side * torch.linspace(0, 1, size, dtype=torch.float64)) * (size - 1)
    distance = (torch.arange(size, dtype=torch.float64) - at[..., None]).abs()
    return (1 - distance).clamp_min(0).float()


class Words:
    """Instructions to the token ids of the published prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.first, self.last = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.empty = tokenizer.convert_tokens_to_ids(EMPTY)
        self.known: dict[str, list[int]] = {}

    def __deepcopy__(self, memo: dict) -> "Words":
        return self  # nothing in it is trained

    def ids(self, instruction: str) -> list[int]:
        """From the first token to the empty one, after which the actions are written."""
        if instruction not in self.known:
            text = f"In: What action should the robot take to {instruction.lower()}?\nOut:"
            ids = self.tokenizer(text).input_ids
            self.known[instruction] = [*ids, *([self.empty] if ids[-1] != self.empty else [])]
        return self.known[instruction]

    def batch(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids `[B, L]` without the first token, shorter ones padded on the left, and which are no
        padding, bool `[B, L]`."""
        rows = [self.ids(text)[1:] for text in instructions]
        longest = max(map(len, rows))
        ids = torch.tensor([[self.empty] * (longest - len(row)) + row for row in rows])
        start = torch.tensor([longest - len(row) for row in rows])
        return ids, torch.arange(longest) >= start[:, None]
