"""Sizes of the published models, in one place: what is planned with where a folder is not there,
and what random folders of the full size are written with.

Sources: the models' config.json as published, and the shapes of their tensors.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from worldenv.models.wan import WanSizes


@dataclass(frozen=True)
class OpenVLASizes:
    """Widths and hidden widths of the towers and of the language model, and its vocabulary."""

    image: int = 224
    dino: int = 1024
    siglip: int = 1152
    siglip_hidden: int = 4304
    width: int = 4096
    layers: int = 32
    heads: int = 32
    hidden: int = 11008
    vocabulary: int = 32064
    padding: int = 64  # of these no token is


OPENVLA = OpenVLASizes()

WAN_2_1_1B = WanSizes(heads=12, head_dim=128, layers=30, ffn=8960, channels=16, text_dim=4096)
WAN_2_2_5B = WanSizes(heads=24, head_dim=128, layers=30, ffn=14336, channels=48, text_dim=4096)
WOVR = replace(WAN_2_2_5B, text_dim=0, actions=7)
WAN_BY_PATCH = {16: ("Wan 2.1 T2V 1.3B", WAN_2_1_1B), 32: ("Wan 2.2 TI2V 5B", WAN_2_2_5B)}
"""By the pixels of a token, which their VAEs decide: 2 x 2 latents of 8 or of 16 pixels."""
VAE_2_2_WIDTHS = {"base_dim": 160, "decoder_base_dim": 256}
KL_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
"""Stable Diffusion's."""


@dataclass(frozen=True)
class ImageTextSizes:
    """An image-text model: its name, the kind of its configuration, and what that holds."""

    name: str
    model_type: str
    text: dict[str, Any]
    vision: dict[str, Any]
    tokens: int  # of a picture
    patches: int  # of a picture, in the vision tower
    more: tuple[tuple[str, Any], ...] = ()  # of the configuration itself


PROMPT = 60  # tokens of the default prompt, an instruction and the chat's own, about

LLAVA_1_5_7B = ImageTextSizes(
    "LLaVA-1.5-7B",
    "llava",
    {"model_type": "llama", "vocab_size": 32064},
    {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
    tokens=576,
    patches=576,
)
QWEN2_5_VL_3B = ImageTextSizes(
    "Qwen2.5-VL-3B",
    "qwen2_5_vl",
    {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    tokens=81,
    patches=324,
    more=(("tie_word_embeddings", True),),
)
SMOLVLM2_2B = ImageTextSizes(
    "SmolVLM2-2.2B",
    "smolvlm",
    {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 49280,
    },
    {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
    tokens=81,
    patches=729,
    more=(("scale_factor", 3),),
)
_BY_NAME = {"qwen": QWEN2_5_VL_3B, "smol": SMOLVLM2_2B}


def image_text(folder: Path) -> ImageTextSizes:
    """The one that a folder's name speaks of; LLaVA-1.5-7B, the paper's, where it says nothing."""
    name = folder.name.lower()
    return next((sizes for word, sizes in _BY_NAME.items() if word in name), LLAVA_1_5_7B)
