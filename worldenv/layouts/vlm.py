"""Tiny random image-text models in the layout they are published in, five families.

Weights come from the library's own `save_pretrained` (which writes the published key names, here in
several shards), the rest is what published folders hold: preprocessor and processor settings, chat
template, tokenizer. The tokenizer knows bytes and special tokens only, so any text is known to it.
"""

import json
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = [
    *("<unk>", "<s>", "</s>", "<pad>", "<image>", "<fake_token_around_image>", "<global-img>"),
    *("<end_of_utterance>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]
ID = {token: number for number, token in enumerate(SPECIAL)}
SIDE = 56  # pixels of LLaVA's, Idefics3's and SmolVLM's square inputs
SIGHT = 20  # times the usual weights after the vision tower, so that pictures count beside words
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 4096,
}
VISION = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 2, "image_size": SIDE}
QWEN_TEXT = {
    **TEXT,
    "head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 3, 3],
    },
}
QWEN_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
QWEN_IDS = {
    "image_token_id": ID["<|image_pad|>"],
    "video_token_id": ID["<|video_pad|>"],
    "vision_start_token_id": ID["<|vision_start|>"],
    "vision_end_token_id": ID["<|vision_end|>"],
}
QWEN_NAMES = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}

_BODY = (
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}"
)


def _template(before: str, image: str, after: str, answer: str) -> str:
    turns = (
        "{% for m in messages %}" + before + _BODY.replace("IMAGE", image) + after + "{% endfor %}"
    )
    return turns + "{% if add_generation_prompt %}" + answer + "{% endif %}"


def _settings(name: str, mean: tuple, std: tuple, **more: object) -> dict:
    return {
        "processor_class": f"{name}Processor",
        "image_processor_type": f"{name}ImageProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "rescale_factor": 1 / 255,
        **more,
    }


def _llava() -> tuple:
    vision = {
        **VISION,
        "model_type": "clip_vision_model",
        "num_hidden_layers": 3,
        "patch_size": 14,
        "projection_dim": 16,
    }
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config={**TEXT, "model_type": "llama"},
        image_token_index=ID["<image>"],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=16,
    )
    square = {"height": SIDE, "width": SIDE}
    pre = _settings(
        "Llava",
        CLIP_MEAN,
        CLIP_STD,
        image_processor_type="CLIPImageProcessor",
        crop_size=square,
        size={"shortest_edge": SIDE},
        do_center_crop=True,
        resample=3,
    )
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
    }
    files = {"preprocessor_config.json": pre, "processor_config.json": processor}
    template = _template("USER: ", "<image>\n", "", " ASSISTANT:")
    return hf.LlavaForConditionalGeneration, config, files, template, {"image_token": "<image>"}


def _tiled(model: type, config: type, name: str) -> tuple:
    made = config(
        vision_config={**VISION, "num_hidden_layers": 2, "patch_size": 14},
        text_config={**TEXT, "model_type": "llama"},
        scale_factor=2,
        image_token_id=ID["<image>"],
        pad_token_id=ID["<pad>"],
    )
    pre = _settings(
        name,
        (0.5,) * 3,
        (0.5,) * 3,
        do_image_splitting=True,  # as published; the reflector turns it off
        do_pad=True,
        max_image_size={"longest_edge": SIDE},
        size={"longest_edge": SIDE},
        resample=1,
    )
    processor = {"processor_class": f"{name}Processor", "image_seq_len": 4}
    names = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    files = {"preprocessor_config.json": pre, "processor_config.json": processor}
    template = _template("<|im_start|>User:", "<image>", "<end_of_utterance>\n", "Assistant:")
    return model, made, files, template, names


def _qwen(model: type, config: type, name: str, vision: dict, mean: tuple, std: tuple) -> tuple:
    made = config(text_config=QWEN_TEXT, vision_config={**QWEN_VISION, **vision}, **QWEN_IDS)
    patch = vision["patch_size"]
    size = {"shortest_edge": (2 * patch) ** 2, "longest_edge": (4 * patch) ** 2}
    pre = _settings(
        name,
        mean,
        std,
        image_processor_type="Qwen2VLImageProcessorFast",
        size=size,
        merge_size=2,
        patch_size=patch,
        temporal_patch_size=2,
    )
    video = {**pre, "video_processor_type": f"{name.replace('_', '')}VideoProcessor"}
    files = {"preprocessor_config.json": pre, "video_preprocessor_config.json": video}
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    template = _template("<|im_start|>user\n", image, "<|im_end|>\n", "<|im_start|>assistant\n")
    return model, made, files, template, QWEN_NAMES


FAMILIES = {
    "llava": _llava,
    "idefics3": lambda: _tiled(hf.Idefics3ForConditionalGeneration, hf.Idefics3Config, "Idefics3"),
    "smolvlm": lambda: _tiled(hf.SmolVLMForConditionalGeneration, hf.SmolVLMConfig, "SmolVLM"),
    "qwen2_5_vl": lambda: _qwen(
        hf.Qwen2_5_VLForConditionalGeneration,
        hf.Qwen2_5_VLConfig,
        "Qwen2_5_VL",
        {"depth": 2, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]},
        CLIP_MEAN,
        CLIP_STD,
    ),
    "qwen3_vl": lambda: _qwen(
        hf.Qwen3VLForConditionalGeneration,
        hf.Qwen3VLConfig,
        "Qwen3VL",
        {
            "depth": 3,
            "patch_size": 16,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        (0.5,) * 3,
        (0.5,) * 3,
    ),
}


def write(folder: Path, family: str, seed: int = 0) -> Path:
    """A random model of a family (a key of FAMILIES) in `folder`; returns the folder."""
    model, config, files, template, names = FAMILIES[family]()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        made = model(config).eval()
    for name, weight in made.named_parameters():
        if any(word in name for word in ("projector", "connector", "merger")) and weight.ndim == 2:
            weight.data.mul_(SIGHT)
    hf.utils.logging.disable_progress_bar()
    made.save_pretrained(folder, max_shard_size="150KB")
    _tokenizer(names).save_pretrained(folder)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text(template)
    return folder


def _tokenizer(names: dict) -> hf.PreTrainedTokenizerFast:
    """Byte-level, without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate([*SPECIAL, *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens=names,
    )
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[4:]})
    return fast
