"""What a judgement through an image-text model costs, before anything of it is loaded.

Counted from the folder's configuration and processor: the modules are laid out on `meta`, and the
processor is asked how many patches and tokens a picture becomes. Multiplications and additions
count as two; attention is counted in full, as the library computes it. Element-wise work is left
out (a few per cent of it in models of millions of parameters, nothing in those of billions).
"""

from dataclasses import dataclass

import torch
import transformers as hf
from PIL import Image
from torch import nn
from transformers.vision_utils import get_vision_window_index

from worldenv.config import ReflectorConfig
from worldenv.data.embodiment import Embodiment
from worldenv.models.published_sizes import PROMPT, image_text
from worldenv.models.vlm import ImageText
from worldenv.models.vlm_files import load_config
from worldenv.runtime.costs import measure

_AT_TOKENS = ("merger", "projector", "connector")  # modules that see merged patches: tokens
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Cost:
    """Of one judgement, of one row."""

    parameters: int
    weight_bytes: int
    tokens: int  # S of the whole prompt
    kept_tokens: int  # of them before o_t's pictures; 0 where they are encoded anew
    flops: int  # of a judgement; of each but an episode's first where o_1 is kept
    flops_first: int  # of an episode's first look at o_1; 0 where it is encoded anew
    row_bytes: int  # of keys and values that each row of a rollout keeps
    feature_bytes: int  # of one feature on the disk
    layers: int  # of the language model
    width: int  # of a feature
    pass_bytes: int  # alive at most while the language model reads one row


def cost(config: ReflectorConfig, embodiment: Embodiment, instruction: str) -> Cost:
    """Of judging a robot's frames under an instruction. UserError for a folder without a
    configuration or a processor; weights are not needed. Where there is no folder yet, of the
    published model that its name speaks of.
    """
    shown = 1 if config.views == "first" else embodiment.V
    if not config.folder.is_dir():
        own = image_text(config.folder)
        settings = hf.AutoConfig.for_model(
            own.model_type, text_config=own.text, vision_config=own.vision, **dict(own.more)
        )
        with torch.device("meta"):
            model = hf.AutoModelForImageTextToText.from_config(settings)
        kept = shown * own.tokens + PROMPT // 4 if config.keep_first else 0
        patches = _Patches(own.patches, (own.patches,))
        tokens = PROMPT + 2 * shown * own.tokens
        return _counted(config, model, patches, shown, own.tokens, tokens, kept)
    with torch.device("meta"):
        model = hf.AutoModelForImageTextToText.from_config(load_config(config.folder))
    seer = ImageText.on(config, model)
    side = embodiment.image_size
    layout = seer.layout(instruction, shown, side, side)
    patches, per_picture = _patches(seer, side), layout.pictures[0] // shown
    kept = 0 if seer.why_anew else layout.split
    return _counted(config, model, patches, shown, per_picture, len(layout), kept)


def _counted(
    config: ReflectorConfig,
    model: nn.Module,
    patches: "_Patches",
    shown: int,  # pictures of a frame
    per_picture: int,  # tokens
    tokens: int,
    kept: int,
) -> Cost:
    text = model.config.get_text_config()
    layers, heads = text.num_hidden_layers, text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    groups = getattr(text, "num_key_value_heads", None) or heads

    def read(new: int, before: int) -> int:
        """Of the language model on `new` tokens that attend to `before` ones too."""
        return new * 2 * _weights(model, "text") + 4 * layers * heads * dim * new * (new + before)

    seen = patches.flops(model) + per_picture * 2 * _weights(model, "merged")
    answer = 2 * model.get_output_embeddings().weight.numel() if config.kind == "prompted" else 0
    parameters = sum(p.numel() for p in model.parameters())
    size = _BYTES[config.precision]
    return Cost(
        parameters=parameters,
        weight_bytes=size * parameters,
        tokens=tokens,
        kept_tokens=kept,
        flops=read(tokens - kept, kept) + answer + (1 if kept else 2) * shown * seen,
        flops_first=read(kept, 0) + shown * seen if kept else 0,
        row_bytes=2 * layers * groups * dim * size * kept,
        feature_bytes=size * text.hidden_size,
        layers=layers,
        width=text.hidden_size,
        pass_bytes=_pass(model, config, tokens),
    )


def _pass(model: nn.Module, config: ReflectorConfig, tokens: int) -> int:
    """Bytes alive at most in the language model on one row, without what is kept."""
    made = {"device": "meta", "dtype": getattr(torch, config.precision)}
    reads = model.base_model.get_decoder().to(made["dtype"])
    x = torch.empty(1, tokens, model.config.get_text_config().hidden_size, **made)
    # A mask of numbers, which the library takes as it is: it would look into another.
    mask = torch.zeros(1, 1, tokens, tokens, **made)

    def work() -> torch.Tensor:
        positions = torch.arange(tokens, device="meta")[None]
        given = {"inputs_embeds": x, "attention_mask": mask, "position_ids": positions}
        return reads(**given, use_cache=False).last_hidden_state

    with torch.no_grad():
        return measure(work).peak


@dataclass(frozen=True)
class _Patches:
    """How the vision tower cuts one picture up."""

    count: int
    windows: tuple[int, ...]  # patches in each window of its windowed layers

    def flops(self, model: nn.Module) -> int:
        """Of the tower on one picture, without what comes after patches are merged."""
        vision = model.config.vision_config
        layers = getattr(vision, "depth", None) or vision.num_hidden_layers
        whole = getattr(vision, "fullatt_block_indexes", range(layers))
        tower = [name for name, _ in model.named_parameters() if _place(name) == "vision"]
        count = self.count + any(name.endswith("class_embedding") for name in tower)
        embedding = 2 * self.count * _weights(model, "patch")
        spans = [(count,) if i in whole else self.windows for i in range(layers)]
        attention = 4 * vision.hidden_size * sum(n * n for span in spans for n in span)
        return embedding + 2 * count * _weights(model, "vision") + attention


def _patches(seer: ImageText, side: int) -> _Patches:
    """What the processor makes of a picture of `side` pixels."""
    vision = seer.model.config.vision_config
    given = seer.processor.image_processor([[Image.new("RGB", (side, side))]], return_tensors="pt")
    if "image_grid_thw" not in given:
        height, width = given["pixel_values"].shape[-2:]
        return _Patches((height // vision.patch_size) * (width // vision.patch_size), ())
    grid = given["image_grid_thw"]
    windows: tuple[int, ...] = ()
    if hasattr(vision, "window_size"):
        sizes = (vision.spatial_merge_size, vision.window_size, vision.patch_size)
        windows = tuple(get_vision_window_index(grid, *sizes)[1].diff().tolist())
    return _Patches(int(grid.prod(-1).sum()), windows)


def _place(name: str) -> str:
    """Where a module of a family works: on patches, on merged ones, or on the prompt's tokens."""
    if any(word in name for word in _AT_TOKENS):
        return "merged"
    return "vision" if "vision" in name or "visual" in name else "text"


def _weights(model: nn.Module, place: str) -> int:
    """Numbers in the matrices of a place; "patch": in the convolution that cuts the picture."""
    total = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and place == "patch":
            total += module.weight.numel()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            total += module.weight.numel() if _place(name) == place else 0
    return total
