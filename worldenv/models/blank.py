"""The models of a configuration without weights, on `meta`: as they will be built, for nothing.

Sizes come from the folders, their configs and the headers of their tensors; where a folder is not
there yet, from the published architecture (`published_sizes`). Published models import libraries
that take seconds.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from worldenv.config import PolicyConfig, ReflectorConfig, SimulatorConfig
from worldenv.data.embodiment import Embodiment
from worldenv.models import published_sizes as published
from worldenv.models.policy import Policy
from worldenv.models.reflector import Reflector
from worldenv.models.simulator import Simulator
from worldenv.models.wovr_reward import ImageNet, WoVRReward

Made = tuple[nn.Module, str]
"""A model, and where its sizes come from."""


def policy(config: PolicyConfig, robot: Embodiment, widened: bool) -> Made:
    """widened: whether frozen bfloat16 layers multiply in float32 (see `models.widened`)."""
    if config.kind == "small":
        return _on_meta(lambda: Policy(config, robot)), "config"
    from worldenv.models import openvla_adapter, openvla_folder
    from worldenv.models.openvla import OpenVLA
    from worldenv.models.openvla_inputs import Gripper, Pixels, Range, Units
    from worldenv.models.widened import widen

    sizes, source = _openvla_sizes(config)
    with torch.device("meta"):
        model = OpenVLA(replace(config, adapter="merged"), robot, sizes)
        model.to(getattr(torch, config.precision))
        if config.lora_rank:
            openvla_adapter.attach(model)
        bounds = (_some(Range, robot.A), _some(Range, robot.P))
        closed = float(robot.gripper_closes)
        grip = Gripper(robot.actions("grip"), opened=-closed, closed=closed)
        model.units = Units(*bounds, grip)
    # Made of numbers, which are no weights: where numbers are.
    model.pixels = Pixels(sizes.towers[0][1], config.crop, [([0.5] * 3, [0.5] * 3)] * 2).to("meta")
    there = config.folder.is_dir()
    model.words = openvla_folder.words(config.folder, sizes) if there else _Words()
    model.requires_grad_(False)
    model.freeze()
    if widened:
        widen(model)
    return model, source


def simulator(config: SimulatorConfig, robot: Embodiment) -> Made:
    """It trains and generates."""
    tokenizer, source = None, "config"
    if config.tokenizer.endswith("-vae"):
        tokenizer, source = _tokenizer(config, robot)
    if config.kind == "small":
        return _on_meta(lambda: Simulator(config, robot, tokenizer=tokenizer)), source
    from worldenv.models import wan_folder
    from worldenv.models.wan_world import WanSimulator
    from worldenv.models.wovr import WoVR

    name, sizes = published.WAN_BY_PATCH.get(config.patch, published.WAN_BY_PATCH[32])
    if config.kind == "wovr":
        name, sizes = "WoVR 5B", published.WOVR
    source = _absent(name, config.folder)
    if config.folder.is_dir():
        sizes, source = wan_folder.sizes(config.folder, config.kind), str(config.folder)
    constant = config.kind == "wan" and config.text == "constant"
    wan = wan_folder.blank(sizes, constant, config.precision)
    kind = {"wan": WanSimulator, "wovr": WoVR}[config.kind]
    return _on_meta(lambda: kind(config, robot, wan=wan, tokenizer=tokenizer)), source


def reflector(config: ReflectorConfig, robot: Embodiment) -> Made:
    """The small one, or WoVR's network; of an image-text model, see `models.vlm_cost`."""
    if config.kind == "wovr":
        return _on_meta(lambda: WoVRReward(ImageNet())), "WoVR's reward network, as published"
    return _on_meta(lambda: Reflector(config, robot)), "config"


def _on_meta(build: object) -> nn.Module:
    with torch.device("meta"):
        return build().to("meta")


def _absent(name: str, folder: object) -> str:
    return f"{name} as published; {folder} is not there"


def _openvla_sizes(config: PolicyConfig) -> tuple[object, str]:
    from transformers import LlamaConfig

    from worldenv.models import openvla_folder, vit
    from worldenv.models.openvla import Sizes

    if config.folder.is_dir():
        return openvla_folder.sizes(config.folder), str(config.folder)
    own = published.OPENVLA
    dino, siglip = vit.KINDS.values()
    towers = (
        (dino, own.image, own.dino, 4 * own.dino),
        (siglip, own.image, own.siglip, own.siglip_hidden),
    )
    llama = LlamaConfig(
        hidden_size=own.width,
        num_hidden_layers=own.layers,
        num_attention_heads=own.heads,
        intermediate_size=own.hidden,
        vocab_size=own.vocabulary,
    )
    sizes = Sizes(towers, llama, own.vocabulary - own.padding)
    return sizes, _absent("OpenVLA 7B", config.folder)


def _tokenizer(config: SimulatorConfig, robot: Embodiment) -> Made:
    from worldenv.models import vae, vae_folder

    folder = config.tokenizer_folder
    if folder.exists():
        said, source = vae.published_config(config.tokenizer, folder), str(folder)
    else:
        newer = {**vae_folder.WAN_2_2, **published.VAE_2_2_WIDTHS} if config.patch == 32 else {}
        said = {"wan-vae": newer, "kl-vae": published.KL_VAE, "tiny-vae": {}}[config.tokenizer]
        source = _absent(config.tokenizer, folder)
    return vae.blank(config, robot.image_size, said), source


def _some(kind: type, count: int) -> object:
    """Bounds of so many numbers."""
    return kind([0.0] * count, [1.0] * count, [True] * count, [False] * count)


class _Words:
    """As many token ids as an instruction will have, about: Llama-2 has one for a common word."""

    first, last = 1, 2

    def __deepcopy__(self, memo: dict) -> "_Words":
        return self

    def batch(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See `models.openvla_inputs.Words`."""
        asked = "In: What action should the robot take to ?\nOut:"
        longest = max(len(re.findall(r"\w+|[^\w\s]", asked + " " + i)) for i in instructions) + 2
        shape = (len(instructions), longest)
        return torch.ones(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.bool)
