"""Folders as they should be, in each naming there is, and in every bad state: named, refused."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published.damage import RAN, Payload, cut, drop, edit, put, repickle, retensor
from published.openvla_policy import ROBOT, copied, look, policy
from safetensors.torch import load_file, save_file

from worldenv.config import PolicyConfig
from worldenv.layouts import openvla as published
from worldenv.models.openvla import OpenVLA
from worldenv.runtime.errors import UserError

HEAD, PROPRIO = (f"{n}--150000_checkpoint.pt" for n in ("action_head", "proprio_projector"))


def test_the_layout_is_in_four_shards_with_an_index(oft):
    index = json.loads((oft / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 4
    sizes = published.shapes(published.FULL)
    assert len(sizes) == 982
    assert sum(torch.Size(s).numel() for s in sizes.values()) == 7_541_237_184
    text = published.config(published.FULL)["text_config"]
    assert set(text) == {"model_type", "pad_token_id", "torch_dtype", "vocab_size"}


def test_full_size_has_the_published_shapes(oft):
    """Modules on meta: every tensor that is built is one of the 982, the other 44 are named."""
    from worldenv.models import openvla_folder

    class Named:
        shapes = published.shapes(published.FULL)

    described = published.config(published.FULL)
    sizes = openvla_folder._sizes(oft, described, Named)
    with torch.device("meta"):
        model = OpenVLA(PolicyConfig(kind="openvla-oft", folder=oft), ROBOT, sizes)
    assert len(openvla_folder._backbone(model, Named, oft / "config.json")) == 982 - 44
    assert sum(p.numel() for p in model.action_head.parameters()) == 151_117_831
    assert model.sizes.llama.rms_norm_eps == 1e-6
    assert model.language_model.model.layers[0].mlp.up_proj.weight.shape == (11008, 4096)


def test_weights_stay_in_the_files_memory(oft, tokens):
    """Loading copies nothing: tensors are mapped from the shards."""
    model = policy(oft, train=False)
    mapped = Path("/proc/self/maps").read_text()
    spans = []
    for line in mapped.splitlines():
        if re.search(r"model-0000\d-of", line) and str(oft) in line:
            low, high = (int(x, 16) for x in line.split()[0].split("-"))
            spans.append((low, high))
    parts = {n: p for n, p in model.named_parameters() if not n.startswith("scale_head")}
    heads = ("action_head", "proprio_projector")
    inside = [
        any(low <= p.data_ptr() < high for low, high in spans)
        for n, p in parts.items()
        if not n.startswith(heads)
    ]
    assert len(inside) > 600
    assert all(inside)


@torch.no_grad()
def test_both_namings_of_the_heads_load(shallow, tmp_path):
    want = policy(shallow)(look(1))[0]
    for number, start in enumerate(("", "module._orig_mod.", "_orig_mod.")):
        folder = copied(shallow, tmp_path / str(number))
        for name in (HEAD, PROPRIO):
            tensors = torch.load(folder / name, weights_only=True)
            named = {start + k.removeprefix("module."): v for k, v in tensors.items()}
            repickle(folder / name, named)
        assert torch.equal(policy(folder)(look(1))[0], want)


@torch.no_grad()
def test_other_writers_folders_load(shallow, tmp_path):
    """One file in place of shards, timm's own name of a layer scale, --latest, statistics in
    config.json."""
    folder = copied(shallow, tmp_path / "single")
    tensors = {}
    for path in folder.glob("model-*"):
        tensors |= {re.sub("scale_factor$", "gamma", n): t for n, t in load_file(path).items()}
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(tensors, folder / "model.safetensors")
    (folder / HEAD).rename(folder / "action_head--latest_checkpoint.pt")
    (folder / "dataset_statistics.json").unlink()
    model = policy(folder, unnorm_key="bridge_orig")
    assert torch.equal(model(look(1))[0], policy(shallow)(look(1))[0])


@torch.no_grad()
def test_the_tensors_that_are_never_used_may_be_absent(shallow, tmp_path):
    folder = copied(shallow, tmp_path / "less")
    name = "vision_backbone.fused_featurizer.attn_pool.latent"
    retensor(folder, name, lambda t: None)
    edit(
        folder / "model.safetensors.index.json",
        lambda v: {**v, "weight_map": {n: f for n, f in v["weight_map"].items() if n != name}},
    )
    assert torch.equal(policy(folder)(look(1))[0], policy(shallow)(look(1))[0])


@torch.no_grad()
def test_without_proprio_there_is_one_token_less(shallow, tmp_path):
    folder = copied(shallow, tmp_path / "blind")
    (folder / PROPRIO).unlink()
    model = policy(folder, proprio=False)
    before, _ = model.prefix(look(1))
    assert before.shape[1] + 1 == policy(shallow).prefix(look(1))[0].shape[1]
    one = policy(shallow, images=1)
    assert one.prefix(look(1))[0].shape[1] + 4 == policy(shallow).prefix(look(1))[0].shape[1]


def test_the_gripper_is_the_robots(shallow):
    other = policy(shallow, robot=replace(ROBOT, gripper_closes=-1))
    opened = torch.tensor([[0.0] * 6 + [1.0]])
    assert policy(shallow).command(opened)[0, 6] == -1
    assert other.command(opened)[0, 6] == 1


def test_the_key_is_the_suite_without_or_with_its_suffix(shallow):
    for key in (None, "libero_spatial", "libero_spatial_no_noops"):
        assert policy(shallow, unnorm_key=key).units.action_low[0] == -0.7


NORM = "language_model.model.norm.weight"
FC1 = "projector.fc1.weight"


def stats(change):
    def act(folder):
        edit(folder / "dataset_statistics.json", lambda v: change(v) or v)

    return act


def described(**fields):
    return lambda f: edit(f / "config.json", lambda v: {**v, **fields})


def texted(**fields):
    def change(value):
        return {**value, "text_config": {**value["text_config"], **fields}}

    return lambda f: edit(f / "config.json", change)


def placed(table):
    return lambda f: edit(
        f / "model.safetensors.index.json", lambda v: {"weight_map": {**v["weight_map"], **table}}
    )


def nan(folder):
    retensor(folder, FC1, lambda t: t.index_put((torch.tensor(3),), torch.tensor(torch.nan)))


def head(change):
    def act(folder):
        repickle(folder / HEAD, change(torch.load(folder / HEAD, weights_only=True)))

    return act


def nan_head(tensors):
    tensors["module.model.fc2.bias"][2] = torch.inf
    return tensors


SECOND, INDEX = "model-00002-of-00004.safetensors", "model.safetensors.index.json"
ROWS = {
    "no folder": (
        lambda f: f.rename(f.with_name("away")),
        "policy.folder: expected the folder",
    ),
    "no config": (drop("config.json"), "expected config.json, got "),
    "config is no JSON": (put("config.json", "{"), "config.json is not valid JSON"),
    "config is a list": (put("config.json", "[]"), "config.json: expected a table, got list"),
    "of another model": (
        described(model_type="llava"),
        "model_type: expected 'openvla', got 'llav",
    ),
    "one tower": (
        described(use_fused_vision_backbone=False),
        "use_fused_vision_backbone: ",
    ),
    "other towers": (
        described(timm_model_ids=["vit_b"]),
        r"timm_model_ids: .* got \['vit",
    ),
    "two sizes": (described(image_sizes=[28, 42]), r"image_sizes: .* got \[28, 42\]"),
    "another size": (
        described(image_sizes=[42, 42]),
        r"pos_embed: expected \[1, 9, 32\], got",
    ),
    "no text_config": (described(text_config=None), "text_config: expected dict, got None"),
    "other text model": (texted(model_type="mistral"), "text_config.model_type: expected 'llama'"),
    "text_config of words": (texted(hidden_size="wide"), "config.json: text_config: "),
    "another width": (texted(hidden_size=32), r"fc3.bias: expected \[32\], got \[16\]"),
    "a layer more": (
        texted(num_hidden_layers=3),
        r"missing language_model.*layers.2.* in all",
    ),
    "a layer less": (
        texted(num_hidden_layers=1),
        r"unexpected .*layers.1.* in all\).*config.j",
    ),
    "no weights": (
        lambda f: [p.unlink() for p in f.glob("model*")],
        "expected model.safetensors.index.json and its shards, or model.safetensors; got action",
    ),
    "a shard is missing": (drop(SECOND), f"expected 4 shards.* missing: {SECOND}"),
    "a shard is cut": (cut(SECOND), f"{SECOND} .* is cut short or no safetensors file"),
    "a shard is text": (put(SECOND, "version https://git-lfs"), f"{SECOND} .* no safetensors file"),
    "an index of an absent tensor": (
        placed({"other.weight": SECOND}),
        f"{SECOND} lacks other.weight, which its index places there",
    ),
    "an index that lacks one": (
        lambda f: edit(
            f / INDEX,
            lambda v: {"weight_map": {n: p for n, p in v["weight_map"].items() if n != NORM}},
        ),
        f"holds {NORM}, which its index does not name",
    ),
    "an index elsewhere": (placed({NORM: "../x"}), "expected the name of a file beside it"),
    "an empty index": (put(INDEX, '{"weight_map": {}}'), "weight_map: expected a table"),
    "two checkpoints": (
        lambda f: save_file({"a": torch.zeros(1)}, f / "model.safetensors"),
        "expected one checkpoint, got two: model.safetensors",
    ),
    "another shape": (
        lambda f: retensor(f, FC1, lambda t: t[:, 1:].contiguous()),
        rf"{FC1}: expected \[192, 48\], got \[192, 47\]",
    ),
    "a NaN": (nan, rf"{FC1} \[192, 48\]: expected finite weights, got 48 NaN"),
    "no tokenizer": (drop("tokenizer.json"), "expected tokenizer.json, got "),
    "a tokenizer of nothing": (put("tokenizer.json", "{}"), "tokenizer.json: no tokenizer"),
    "no preprocessor": (drop("preprocessor_config.json"), "expected preprocessor_config.json"),
    "no normalisation": (
        put("preprocessor_config.json", '{"tvf_normalize_params": [1]}'),
        "tvf_normalize_params: expected mean and std",
    ),
    "no statistics": (
        lambda f: (drop("dataset_statistics.json")(f), described(norm_stats=None)(f)),
        "expected statistics of the policy's data in dataset_statistics.json",
    ),
    "no statistics of actions": (
        stats(lambda v: v[published.KEY].pop("action") and None),
        "libero_spatial_no_noops.action: expected statistics, got none",
    ),
    "statistics of another robot": (
        stats(lambda v: v[published.KEY]["action"].update(q01=[0.0] * 14)),
        r"action.q01: expected 7 numbers, got 14 entries",
    ),
    "bounds the wrong way round": (
        stats(lambda v: v[published.KEY]["action"].update(q01=[9.0] * 7)),
        "expected q01 of at most q99",
    ),
    "a mask of numbers": (
        stats(lambda v: v[published.KEY]["action"].update(mask=[1] * 7)),
        "action.mask: expected 7 times true or false",
    ),
    "proprio that was never measured": (
        stats(lambda v: v[published.KEY]["proprio"].update(q01=[0.0] * 8, q99=[0.0] * 8)),
        "proprio: expected bounds of measured proprio, got zeros only",
    ),
    "no action head": (
        drop(HEAD),
        r"action_head--\*_checkpoint.pt, got none.*openvla-tok",
    ),
    "two action heads": (
        lambda f: os.link(f / HEAD, f / "action_head--50000_checkpoint.pt"),
        "expected one action_head checkpoint, got 2: action_head--150000_checkpoint.pt, action_h",
    ),
    "no proprio projector": (drop(PROPRIO), r"expected proprio_projector--.*policy.proprio false"),
    "a payload": (head(lambda t: {**t, "x": Payload()}), f"{HEAD}: expected tensors alone"),
    "a head cut short": (cut(HEAD), f"{HEAD} is damaged"),
    "a head of text": (put(HEAD, "version https://git-lfs"), f"{HEAD}"),
    "a list of tensors": (
        head(lambda t: list(t.values())),
        "expected a table of tensors",
    ),
    "a head of another width": (
        head(lambda t: {**t, "module.model.fc2.weight": torch.zeros(14, 16)}),
        r"model.fc2.weight: expected \[7, 16\], got \[14, 16\].*robot of other sizes",
    ),
    "a head with more": (
        head(lambda t: {**t, "module.model.fc9.bias": torch.zeros(1)}),
        "unexpected model.fc9.bias",
    ),
    "an infinity in a head": (
        head(nan_head),
        rf"{HEAD}: module.model.fc2.bias \[7\]: expected finite",
    ),
    "a diffusion head": (
        head(lambda t: {"module.noise_predictor.mlp_resnet.fc1.weight": torch.zeros(1)}),
        "a diffusion head: expected the L1 head",
    ),
    "FiLM": (
        lambda f: os.link(f / HEAD, f / "vision_backbone--150000_checkpoint.pt"),
        "vision_backbone--150000_checkpoint.pt: a policy with FiLM, which is not supported",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_folder_is_named(name, shallow, tmp_path, capsys):
    act, message = ROWS[name]
    folder = copied(shallow, tmp_path / "copy")
    act(folder)
    with pytest.raises(UserError) as caught:
        policy(folder)
    text = str(caught.value)
    assert re.search(message, text), text
    assert str(folder) in text
    assert RAN not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"unnorm_key": "libero_spacial"},
            "Did you mean 'libero_spatial_no_noops'.* It has: libero_s",
        ),
        ({"images": 3}, "policy.images: expected at most the 2 cameras of robot, got 3"),
        ({"kind": "openvla-token"}, "which policy.kind openvla-token .* does not use"),
        ({"proprio": False}, "proprio_projector--150000_checkpoint.pt, which policy.kind"),
        (
            {"robot": replace(ROBOT, action=ROBOT.action * 2)},
            r"model.fc2.weight: expected \[14, 16\], got \[7, 16\]",
        ),
    ],
)
def test_a_folder_at_odds_with_what_is_asked_is_named(shallow, fields, message):
    with pytest.raises(UserError, match=message):
        policy(shallow, **fields)


def test_more_statistics_than_one_want_a_key(shallow, tmp_path):
    folder = copied(shallow, tmp_path / "copy")
    (folder / "dataset_statistics.json").unlink()
    with pytest.raises(UserError, match=r"policy.unnorm_key to say whose. It has: bridge_"):
        policy(folder)


def test_token_after_token_is_for_chunks_of_one(tokens):
    with pytest.raises(UserError, match="expected chunks of 1 action, got 2"):
        policy(tokens, "openvla-token", decode="autoregressive")


def test_published_kinds_need_a_folder():
    from worldenv.config import Config

    with pytest.raises(UserError, match=r"policy.folder: expected the folder of a publ"):
        Config(policy=PolicyConfig(kind="openvla-oft"))
    with pytest.raises(UserError, match=r"policy.decode: expected parallel, for kind small"):
        Config(policy=PolicyConfig(decode="autoregressive"))
