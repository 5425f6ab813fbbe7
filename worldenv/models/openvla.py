"""OpenVLA-OFT and token OpenVLA, under the published module paths.

    [first] [256 x images] [proprio] [prompt .. empty] [C * A zero vectors] [last]

DINOv2 and SigLIP features side by side, a projector, and a Llama that looks both ways over all of
it. What it says one place before each slot is the action: the L1 head (OpenVLA-OFT, arXiv
2502.19645) and World-Env's Laplace scale (arXiv 2509.24948 section 3.5), or logits of 256 action
tokens. Token policies of SimpleVLA-RL and RLinf leave out the last token; the first OpenVLA (arXiv
2406.09246) writes token after token, causally.
Liberties: shorter prompts are padded before them, with positions that count what is kept, which
changes nothing else. No scale head is published: ours is one linear map, which does not train the
backbone.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, LlamaConfig, LlamaModel

from worldenv.config import PolicyConfig
from worldenv.data.embodiment import Embodiment
from worldenv.models.openvla_inputs import BINS, Pixels, Units, Words
from worldenv.models.vit import Vit, VitKind
from worldenv.runtime.errors import UserError

TOWERS = ("vision_backbone.featurizer", "vision_backbone.fused_featurizer")
HEADS = ("action_head", "proprio_projector", "scale_head")
# Named otherwise before transformers 5.24.
_CACHE = "cache"
if _CACHE not in inspect.signature(LlamaModel.forward).parameters:
    _CACHE = "past_key_values"


@dataclass(frozen=True)
class Sizes:
    """What the folder says of a policy's shape."""

    towers: tuple[tuple[VitKind, int, int, int], ...]  # kind, image size, width, hidden width
    llama: LlamaConfig
    tokens: int  # of the vocabulary, the action tokens at its end

    @property
    def width(self) -> int:
        """E of the language model."""
        return self.llama.hidden_size


class OpenVLA(nn.Module):
    """Observation to a distribution over a chunk of actions.

    Built by `openvla_folder.load`. distribution: "laplace" or "categorical"; `own` units are those
    of the policy, executed ones those of its surroundings (`command`, `normalise`).
    """

    units: Units
    pixels: Pixels
    words: Words

    def __init__(self, config: PolicyConfig, embodiment: Embodiment, sizes: Sizes) -> None:
        super().__init__()
        self.config, self.embodiment, self.sizes = config, embodiment, sizes
        self.chunk, self.actions = embodiment.chunk, embodiment.A
        self.feature_width = sizes.width
        self.images = config.images or (embodiment.V if config.kind == "openvla-oft" else 1)
        self.distribution = config.distribution
        self.vision_backbone = nn.Module()
        first, second = (Vit(*tower) for tower in sizes.towers)
        self.vision_backbone.featurizer, self.vision_backbone.fused_featurizer = first, second
        self.projector = Projector(sum(width for *_, width, _ in sizes.towers), sizes.width)
        self.language_model = nn.Module()
        self.language_model.model = LlamaModel(sizes.llama)
        if self.distribution == "categorical":
            vocabulary = sizes.llama.vocab_size
            self.language_model.lm_head = nn.Linear(sizes.width, vocabulary, bias=False)
        else:
            self.action_head = ActionHead(self.actions, sizes.width)
            self.scale_head = nn.Linear(self.actions * sizes.width, self.actions)
            if config.proprio:
                self.proprio_projector = ProprioProjector(embodiment.P, sizes.width)
        blocks = [*first.blocks, *second.blocks, *self.language_model.model.layers]
        for block in blocks if config.checkpointing else ():
            block.forward = partial(_recomputed, block)

    def forward(self, observation: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Observation (image `[B, V, H, W, 3]` uint8, proprio `[B, P]`, instruction: B strings).

        Returns mu and log-scale `[B, C, A]`, or logits `[B, C, A, 256]` by token index and None.
        """
        return self.heads(self.slots(observation))

    def features(self, observation: Mapping[str, Any]) -> Tensor:
        """For a value head `[B, E]` float32: the mean of what is said at the slots."""
        return self.slots(observation).float().mean(1)

    def both(self, observation: Mapping[str, Any]) -> tuple[Tensor, Tensor | None, Tensor]:
        """`forward` and `features` in one pass."""
        said = self.slots(observation)
        return *self.heads(said), said.float().mean(1)

    def heads(self, said: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is said at the slots `[B, C * A, E]` to the distribution of `forward`."""
        if self.distribution == "categorical":
            return self._logits(said).unflatten(1, (self.chunk, self.actions)), None
        said = said.unflatten(1, (self.chunk, self.actions)).flatten(-2)
        mu = self.action_head(said.to(self.action_head.dtype)).float()
        log_scale = self.scale_head(said.detach().to(self.scale_head.weight.dtype)).float()
        return mu, log_scale.clamp(self.config.min_log_scale, 0.0)

    def augmented(
        self,
        observation: Mapping[str, Any],
        generator: torch.Generator,
        shift: int,
        noise: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """`forward` for imitation: images cropped anywhere and lit otherwise, as published policies
        are trained (`shift` is not needed then), proprio with noise of deviations `[P]`.
        """
        proprio = observation["proprio"]
        jitter = torch.randn(proprio.shape, generator=generator).to(proprio.device) * noise
        return self.heads(self.slots({**observation, "proprio": proprio + jitter}, generator))

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Of demonstrations: not taken, for its weights belong to the statistics it came with."""

    def slots(
        self, observation: Mapping[str, Any], generator: torch.Generator | None = None
    ) -> Tensor:
        """What the language model says one place before each slot `[B, C * A, E]`.

        generator: see `Pixels`.
        """
        before, keep = self.prefix(observation, generator)
        if self.config.decode == "autoregressive":
            return self._one_by_one(before, keep)
        rows, _, width = before.shape
        count = self.chunk * self.actions
        after = [before.new_zeros(rows, count, width)]
        if self.distribution == "laplace":
            after.append(self._embedded(self.words.last).expand(rows, 1, -1))
        x = torch.cat([before, *after], 1)
        keep = F.pad(keep, (0, x.shape[1] - before.shape[1]), value=True)
        # A mask of numbers: the stock class takes it as it is, and looks both ways.
        hidden = torch.zeros(keep.shape, dtype=x.dtype, device=x.device)
        hidden = hidden.masked_fill(~keep, torch.finfo(x.dtype).min)
        said = self.language_model.model(
            inputs_embeds=x,
            attention_mask=hidden[:, None, None].expand(-1, 1, x.shape[1], -1),
            position_ids=_positions(keep),
            use_cache=False,
        ).last_hidden_state
        start = before.shape[1] - 1
        return said[:, start : start + count]

    def prefix(
        self, observation: Mapping[str, Any], generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """All that precedes the slots `[B, N, E]`, and which of it is no padding, bool `[B, N]`."""
        images = observation["image"]
        if images.shape[1] < self.images:
            raise UserError(
                f"The policy of {self.config.folder} sees {self.images} cameras, got "
                f"{images.shape[1]}. Give it as many, or set policy.images."
            )
        rows, device = len(images), self.units.edges.device
        seen = self._seen(images[:, : self.images].to(device), generator)
        seen = seen.reshape(rows, -1, self.sizes.width)
        ids, keep = (x.to(device) for x in self.words.batch(observation["instruction"]))
        parts = [self._embedded(self.words.first).expand(rows, 1, -1), seen]
        if self.distribution == "laplace" and self.config.proprio:
            state = self.units.state(observation["proprio"].to(device))
            state = state.to(self.proprio_projector.fc1.weight.dtype)
            parts.append(self.proprio_projector(state)[:, None].to(seen.dtype))
        parts.append(self.language_model.model.embed_tokens(ids))
        x = torch.cat(parts, 1)
        return x, F.pad(keep, (x.shape[1] - keep.shape[1], 0), value=True)

    def _seen(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """Images `[B, V, H, W, 3]` to tokens `[B * V, S, E]`, DINOv2's channels first."""
        towers = (self.vision_backbone.featurizer, self.vision_backbone.fused_featurizer)
        pixels = self.pixels(images, generator)
        seen = [t(x.to(t.pos_embed.dtype)) for t, x in zip(towers, pixels, strict=True)]
        return self.projector(torch.cat(seen, -1))

    def _embedded(self, token: int) -> Tensor:
        return self.language_model.model.embed_tokens.weight[token]

    def _logits(self, said: Tensor) -> Tensor:
        """`[..., E]` to float32 logits `[..., 256]` of the action tokens, by id."""
        head = self.language_model.lm_head
        last = self.sizes.tokens
        return head(said.to(head.weight.dtype))[..., last - BINS : last].float()

    def _one_by_one(self, x: Tensor, keep: Tensor) -> Tensor:
        """As `slots`, causally: each slot after the likeliest token of the slot before it."""
        said, cache, steps = [], DynamicCache(), self.chunk * self.actions
        positions = _positions(keep)
        for step in range(steps):
            out = self.language_model.model(
                inputs_embeds=x,
                attention_mask=keep,
                position_ids=positions,
                use_cache=True,
                **{_CACHE: cache},
            )
            said.append(out.last_hidden_state[:, -1])
            if step + 1 < steps:
                token = self._logits(said[-1]).argmax(-1) + self.sizes.tokens - BINS
                x = self.language_model.model.embed_tokens(token)[:, None]
                keep, positions = F.pad(keep, (0, 1), value=True), positions[:, -1:] + 1
        return torch.stack(said, 1)

    def command(self, action: Tensor) -> Tensor:
        """What was drawn (own units, or token indices) to what is executed `[B, C, A]` float32.

        Token index k stands for id 31744 + k, so that 255 is the smallest action and 0 and 1 both
        are the largest.
        """
        tokens = self.distribution == "categorical"
        return self.units.command(self.units.from_tokens(action) if tokens else action)

    def normalise(self, action: Tensor) -> Tensor:
        """Executed actions `[B, C, A]` to targets of imitation: own units, or token indices."""
        own = self.units.normalise(action)
        return self.units.to_tokens(own) if self.distribution == "categorical" else own

    def trainable_groups(self) -> dict[str, list[nn.Parameter]]:
        """What is trained: "adapter", low-rank additions to the backbone, and "heads", in full."""
        if self.config.decode == "autoregressive":
            raise UserError(
                "policy.decode autoregressive: expected parallel for training, since such a policy "
                "scores a token by those that were drawn before it. It can be evaluated."
            )
        groups: dict[str, list[nn.Parameter]] = {"adapter": [], "heads": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups["adapter" if ".lora_" in name else "heads"].append(parameter)
        return groups

    def freeze(self) -> None:
        """Train nothing but the heads (float32, where they were not) and adapters."""
        self.requires_grad_(False)
        heads = [getattr(self, name) for name in HEADS if hasattr(self, name)]
        if self.distribution == "categorical":
            heads.append(self.language_model.lm_head)
        for head in heads:
            head.float().requires_grad_(True)
        for name, parameter in self.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(self.config.lora_rank > 0)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The backbone as it was published, heads as they are."""
        layers = [m for m in self.modules() if hasattr(m, "lora_A")]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)


def _recomputed(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What a block says; its activations are made again when the gradient needs them."""
    run = partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return run(*args, **kwargs)
    return checkpoint(run, *args, use_reentrant=False, **kwargs)


def linears(model: OpenVLA) -> list[str]:
    """Names of the backbone's linear layers, which adapters are trained on."""
    outside = (*HEADS, "language_model.lm_head")
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(outside)
    ]


def _positions(keep: Tensor) -> Tensor:
    """Of each token among those that are no padding."""
    return (keep.long().cumsum(1) - 1).clamp_min(0)


class Projector(nn.Module):
    """Vision features `[..., E]` to tokens of the language model."""

    def __init__(self, seen: int, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(seen, 4 * seen), nn.Linear(4 * seen, width)
        self.fc3 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))


class ProprioProjector(nn.Module):
    """Normalised proprio `[B, P]` to a token."""

    def __init__(self, proprio: int, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(proprio, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class ActionHead(nn.Module):
    """Hidden states of a step `[..., A * E]` to its action `[..., A]`, not squashed."""

    def __init__(self, actions: int, width: int) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layer_norm1 = nn.LayerNorm(actions * width)
        self.model.fc1 = nn.Linear(actions * width, width)
        self.model.mlp_resnet_blocks = nn.ModuleList(_Residual(width) for _ in range(2))
        self.model.layer_norm2 = nn.LayerNorm(width)
        self.model.fc2 = nn.Linear(width, actions)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.model.fc1.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.model.fc1(self.model.layer_norm1(x)))
        for block in self.model.mlp_resnet_blocks:
            x = block(x)
        return self.model.fc2(self.model.layer_norm2(x))
