"""The vision towers against transformers' SigLIP and DINOv2 with registers."""

import pytest
import torch
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from worldenv.models.vit import KINDS, Vit, VitKind, unused

WIDTH, HIDDEN, SIZE = 32, 100, 42


def random_vit(kind: VitKind, hidden: int) -> Vit:
    torch.manual_seed(0)
    vit = Vit(kind, SIZE, WIDTH, hidden).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return vit


def renamed(tensors: dict, start: str, names: dict, qkv: tuple) -> dict:
    """Blocks under transformers' names."""
    out = {}
    for name, tensor in tensors.items():
        if not name.startswith("blocks."):
            continue
        _, number, part = name.split(".", 2)
        part, kind = part.rsplit(".", 1)
        at = f"{start}.{number}."
        if part == "attn.qkv":
            out |= {f"{at}{n}.{kind}": t for n, t in zip(qkv, tensor.chunk(3), strict=True)}
        elif kind == "scale_factor":
            out[f"{at}{names[part]}.lambda1"] = tensor
        else:
            out[f"{at}{names[part]}.{kind}"] = tensor
    return out


def test_siglip_is_transformers_siglip():
    kind = VitKind(14, 5, 4)
    vit = random_vit(kind, HIDDEN)
    tensors = vit.state_dict()
    other = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=HIDDEN,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=14,
            hidden_act="gelu",
            vision_use_head=False,
        )
    ).eval()
    names = {
        "attn.proj": "self_attn.out_proj",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    qkv = tuple(f"self_attn.{n}_proj" for n in "qkv")
    theirs = renamed(tensors, "encoder.layers", names, qkv)
    for kind_ in ("weight", "bias"):
        theirs[f"embeddings.patch_embedding.{kind_}"] = tensors[f"patch_embed.proj.{kind_}"]
    theirs["embeddings.position_embedding.weight"] = tensors["pos_embed"][0]
    left = other.load_state_dict(theirs, strict=False)
    assert left.unexpected_keys == []
    assert {k.split(".")[0] for k in left.missing_keys} <= {"post_layernorm"}
    compare(vit, other, 0)


def test_dinov2_is_transformers_dinov2_with_registers():
    kind = VitKind(14, 5, 4, registers=4, layer_scale=True)
    vit = random_vit(kind, 4 * WIDTH)
    tensors = vit.state_dict()
    other = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            hidden_size=WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=14,
            mlp_ratio=4,
        )
    ).eval()
    names = {
        "attn.proj": "attention.o_proj",
        "norm1": "norm1",
        "norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "ls1": "layer_scale1",
        "ls2": "layer_scale2",
    }
    qkv = tuple(f"attention.{n}_proj" for n in "qkv")
    theirs = renamed(tensors, "encoder.layer", names, qkv)
    for kind_ in ("weight", "bias"):
        patch = f"embeddings.patch_embeddings.projection.{kind_}"
        theirs[patch] = tensors[f"patch_embed.proj.{kind_}"]
    theirs["embeddings.cls_token"] = tensors["cls_token"]
    theirs["embeddings.register_tokens"] = tensors["reg_token"]
    where = tensors["pos_embed"]
    theirs["embeddings.position_embeddings"] = torch.cat([torch.zeros_like(where[:, :1]), where], 1)
    left = other.load_state_dict(theirs, strict=False)
    assert left.unexpected_keys == []
    assert set(left.missing_keys) <= {
        "embeddings.mask_token",
        "layernorm.weight",
        "layernorm.bias",
    }
    compare(vit, other, 5)


@torch.no_grad()
def compare(vit: Vit, other: torch.nn.Module, prefix: int) -> None:
    images = torch.randn(2, 3, SIZE, SIZE)
    theirs = other(images, output_hidden_states=True).hidden_states[-1][:, prefix:]
    ours = vit(images)
    assert ours.shape == (2, 9, WIDTH)
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


@pytest.mark.parametrize(("name", "count"), zip(KINDS, (16, 27), strict=True))
def test_the_last_block_and_what_follows_is_unused(name, count):
    from published.openvla import shapes

    tower = "fused_featurizer" if "siglip" in name else "featurizer"
    start = f"vision_backbone.{tower}."
    own = {n.removeprefix(start) for n in shapes() if n.startswith(start)}
    spare = {n for n in own if unused(KINDS[name]).fullmatch(n)}
    assert len(spare) == count
    with torch.device("meta"):
        assert own - spare == set(Vit(KINDS[name], 28, 32, 128).state_dict())
