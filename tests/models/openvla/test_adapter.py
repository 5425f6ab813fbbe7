"""Adapters: the published one applied exactly, our own written as peft writes them."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from published.openvla_policy import SHALLOW, copied, look, policy
from safetensors.torch import load_file, save_file

from worldenv.layouts import openvla as published
from worldenv.models.openvla_adapter import export, save_adapter, save_heads
from worldenv.runtime.errors import UserError


@torch.no_grad()
def test_a_published_adapter_is_applied_exactly(shallow):
    base, model = policy(shallow), policy(shallow, adapter="apply")
    assert model.trainable_groups()["adapter"] == []  # of rank 0: applied, not trained
    delta = load_file(shallow / "lora_adapter/adapter_model.safetensors")
    names = [
        "vision_backbone.featurizer.blocks.1.attn.qkv",
        "vision_backbone.fused_featurizer.blocks.2.mlp.fc2",
        "projector.fc2",
        "language_model.model.layers.1.mlp.down_proj",
    ]
    for name in names:
        a, b = (delta[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        own = model.get_submodule(name).get_delta_weight("default")
        assert (own - (2 / 4) * b @ a).abs().max() <= 1e-6
    for name, layer in base.named_modules():
        key = f"base_model.model.{name}.lora_A.weight"
        if key in delta:
            layer.weight += 0.5 * delta[key.replace("lora_A", "lora_B")] @ delta[key]
    merged, live = base(look())[0], model(look())[0]
    assert (merged - live).abs().max() < 1e-5 * live.abs().max()
    plain = policy(shallow)(look())[0]
    assert (plain - live).abs().max() > 1e-2
    with model.without_adapter():
        assert torch.equal(model(look())[0], plain)
    assert torch.equal(model(look())[0], live)
    # Merged by peft itself, layer by layer.
    for layer in model.modules():
        if hasattr(layer, "get_delta_weight"):
            layer.merge()
    assert (model(look())[0] - live).abs().max() < 1e-5 * live.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["openvla-token", "openvla-oft"])
def test_adapters_of_convolutions_and_of_the_vocabulary_are_applied(shallow, tmp_path, kind):
    """RLinf's; under OpenVLA-OFT's head the vocabulary's is not used."""
    folder = bare(shallow, tmp_path / "more")
    if kind == "openvla-token":
        for path in folder.glob("*.pt"):
            path.unlink()
    published.write_adapter(folder, SHALLOW, rank=3, alpha=6, more=True)
    # In float64: so strong an adapter magnifies what is rounded.
    base = policy(folder, kind).double()
    live = policy(folder, kind, adapter="apply").double()
    delta = load_file(folder / "lora_adapter/adapter_model.safetensors")
    for name, layer in base.named_modules():
        key = f"base_model.model.{name}.lora_A.weight"
        if key in delta:
            a, b = delta[key].double(), delta[key.replace("lora_A", "lora_B")].double()
            layer.weight += 2 * (b.flatten(1) @ a.flatten(1)).view_as(layer.weight)
    want, got = base(look(2))[0], live(look(2))[0]
    assert (want - got).abs().max() < 1e-6 * want.abs().max()
    if kind == "openvla-token":
        live.trainable_groups()  # all are listed once, the head's own weight among the heads


def bare(folder, to):
    """A copy without the adapter."""
    shutil.rmtree(copied(folder, to) / "lora_adapter")
    return to


@torch.no_grad()
def test_merged_shards_are_not_adapted_again(shallow, tmp_path):
    without = policy(bare(shallow, tmp_path / "bare"))
    assert torch.equal(policy(shallow)(look(1))[0], without(look(1))[0])


@torch.no_grad()
def test_a_new_adapter_changes_nothing_and_is_read_back(shallow, tmp_path):
    torch.manual_seed(0)
    model = policy(shallow, lora_rank=20)
    assert torch.equal(model(look())[0], policy(shallow)(look())[0])
    for parameter in model.trainable_groups()["adapter"]:
        parameter.add_(0.05 * torch.randn_like(parameter))
    trained = model(look())[0]
    folder = bare(shallow, tmp_path / "own")
    save_adapter(model, folder / "lora_adapter")
    described = json.loads((folder / "lora_adapter/adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"], described["peft_type"]) == (20, 16, "LORA")
    again = policy(folder, adapter="apply", lora_rank=20)
    assert torch.equal(again(look())[0], trained)
    assert len(again.trainable_groups()["adapter"]) == len(model.trainable_groups()["adapter"])
    # peft itself reads it onto a bare model, and writes the same.
    wrapped = PeftModel.from_pretrained(policy(shallow), folder / "lora_adapter")
    assert torch.equal(wrapped(look())[0], trained)
    wrapped.save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        load_file(path / "adapter_model.safetensors")
        for path in (folder / "lora_adapter", tmp_path / "theirs")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_adapters_are_float32_beside_a_backbone_in_bfloat16(shallow):
    model = policy(shallow, lora_rank=2, precision="bfloat16")
    groups = model.trainable_groups()
    assert {p.dtype for p in [*groups["adapter"], *groups["heads"]]} == {torch.float32}
    model(look(1))[0].square().sum().backward()
    assert all(p.grad is not None for p in groups["adapter"])


@torch.no_grad()
def test_heads_are_written_as_the_published_loader_finds_them(shallow, tmp_path):
    model = policy(shallow)
    for head in model.trainable_groups()["heads"]:
        head.add_(0.1)
    folder = copied(shallow, tmp_path / "own")
    for path in folder.glob("*.pt"):
        path.unlink()
    save_heads(model, folder, 7)
    assert {p.name for p in folder.glob("*.pt")} == {
        "action_head--7_checkpoint.pt",
        "proprio_projector--7_checkpoint.pt",
        "scale_head--7_checkpoint.pt",
    }
    again, observation = policy(folder), look()
    for ours, theirs in zip(model(observation), again(observation), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "adapter_config.json: use_dora: expected False"),
        ({"peft_type": "IA3"}, "peft_type: expected 'LORA'"),
        ({"r": "many"}, "expected r and lora_alpha"),
        ({"rank_pattern": {"a": 2}}, "one rank for all layers"),
    ],
)
def test_other_adapters_are_refused(shallow, tmp_path, change, message):
    folder = copied(shallow, tmp_path / "copy")
    path = folder / "lora_adapter/adapter_config.json"
    described = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps({**described, **change}))
    with pytest.raises(UserError, match=message):
        policy(folder, adapter="apply")


def test_an_adapter_of_another_model_or_rank_is_refused(shallow, tmp_path):
    with pytest.raises(UserError, match=r"expected the adapter's rank 4 .*got 8"):
        policy(shallow, adapter="apply", lora_rank=8)
    with pytest.raises(UserError, match=r"expected an adapter in .*lora_adapter, got none"):
        policy(bare(shallow, tmp_path / "bare"), adapter="apply")
    with pytest.raises(UserError, match=r"no adapter: .*lora_rank 0"):
        save_adapter(policy(shallow), tmp_path)
    folder = copied(shallow, tmp_path / "copy")
    path = folder / "lora_adapter/adapter_model.safetensors"
    tensors = load_file(path)
    path.unlink()
    key = "base_model.model.projector.fc1.lora_A.weight"
    save_file({**tensors, key: tensors[key][:, 1:].contiguous()}, path)
    with pytest.raises(UserError, match=r"projector.fc1.lora_A.weight: expected .* got \[4, 47\]"):
        policy(folder, adapter="apply")
    save_file({**tensors, "base_model.model.other.lora_A.weight": torch.zeros(4, 2)}, path)
    with pytest.raises(UserError, match=r"unexpected other.lora_A.weight"):
        policy(folder, adapter="apply")


@torch.no_grad()
def test_what_was_trained_of_a_policy_of_tokens_is_one_adapter_to_peft(shallow, tmp_path):
    folder = bare(shallow, tmp_path / "own")
    for path in folder.glob("*.pt"):
        path.unlink()
    torch.manual_seed(0)
    model = policy(folder, "openvla-token", lora_rank=2)
    for group in model.trainable_groups().values():
        for parameter in group:
            parameter.add_(0.05 * torch.randn_like(parameter))
    trained = model(look())[0]
    export(model, folder)
    assert not [*folder.glob("*.pt")]  # the vocabulary's layer goes with the adapter
    again = policy(folder, "openvla-token", adapter="apply", lora_rank=2)
    assert torch.equal(again(look())[0], trained)
    wrapped = PeftModel.from_pretrained(policy(folder, "openvla-token"), folder / "lora_adapter")
    assert torch.equal(wrapped(look())[0], trained)
