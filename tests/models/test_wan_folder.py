"""Folders of Wan as published: every naming and layout is the same model; bad ones are refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from worldenv.layouts import wan as fixture
from worldenv.models import wan_folder
from worldenv.runtime.errors import UserError

NAME = "diffusion_pytorch_model.safetensors"


def load(folder, kind="wan", constant=False, precision="float32"):
    return wan_folder.load(folder, kind, constant, precision)


@pytest.mark.parametrize(
    ("naming", "shards", "below"),
    [("diffusers", 1, ""), ("diffusers", 3, "transformer"), ("authors", 1, ""), ("authors", 2, "")],
)
def test_names_and_layouts_are_one_model(tmp_path, naming, shards, below):
    tensors = fixture.write(tmp_path / "wan" / below, naming, shards)
    (tmp_path / "wan" / "vae").mkdir()
    own = load(tmp_path / "wan").state_dict()
    assert own.keys() == tensors.keys()  # none missing, none unexpected
    assert all(torch.equal(own[name], tensors[name]) for name in tensors)


def test_sizes_are_those_of_the_tensors(tmp_path):
    fixture.write(tmp_path / "wan", num_layers=2, ffn_dim=72, in_channels=12, out_channels=12)
    sizes = load(tmp_path / "wan").sizes
    assert (sizes.layers, sizes.ffn, sizes.channels, sizes.text_dim) == (2, 72, 12, 24)
    assert (sizes.heads, sizes.head_dim) == (4, 32)


def test_a_config_that_claims_an_image_encoder_is_reported(tmp_path, capsys):
    fixture.write(tmp_path / "wan", image_dim=1280, added_kv_proj_dim=5120)
    load(tmp_path / "wan")
    assert "image_dim 1280: no such tensors" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc to see mappings in")
def test_what_has_its_precision_stays_in_the_file(tmp_path):
    tensors = fixture.write(tmp_path / "wan", dtype=torch.bfloat16)
    model = load(tmp_path / "wan", precision="bfloat16")
    wide = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert "blocks.0.scale_shift_table" in wide
    assert "blocks.0.norm2.weight" in wide
    assert "proj_out.weight" in wide
    assert "blocks.0.attn1.to_q.weight" not in wide
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [m[0].split("-") for m in maps if m[-1].endswith(NAME)]
    spans = [(int(a, 16), int(b, 16)) for a, b in spans]
    for name, parameter in model.named_parameters():
        inside = any(a <= parameter.data_ptr() < b for a, b in spans)
        assert inside == (name not in wide), name
    mapped = sum(p.nbytes for n, p in model.named_parameters() if n not in wide)
    assert mapped > 0.85 * sum(t.nbytes for t in tensors.values())


def test_wovr_needs_no_config_and_no_text_embedder(tmp_path):
    tensors = fixture.write_wovr(tmp_path / "wovr")
    model = load(tmp_path / "wovr", "wovr")
    assert model.state_dict().keys() == tensors.keys()
    assert (model.sizes.heads, model.sizes.head_dim, model.sizes.actions) == (2, 128, 7)
    file = tmp_path / "wovr" / "model-00001.safetensors"
    extra = {
        "text_embedding.0.weight": torch.zeros(256, 24),
        "text_embedding.0.bias": torch.ones(1),
    }
    save_file(load_file(file) | extra, file)
    assert load(tmp_path / "wovr", "wovr").state_dict().keys() == tensors.keys()


def test_a_prompt_is_read_without_its_padding(tmp_path):
    text = fixture.write_prompt(tmp_path / "prompt.safetensors", 5)
    assert torch.equal(wan_folder.read_prompt(tmp_path / "prompt.safetensors", 24), text[:5])
    with pytest.raises(UserError, match=r"prompt_embeds: expected \[n, 4096\].*got \[512, 24\]"):
        wan_folder.read_prompt(tmp_path / "prompt.safetensors", 4096)


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def retouch(folder, change, name=NAME):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


def poison(tensors):
    tensors["blocks.1.attn1.to_v.weight"][3, 4] = float("nan")


def widen(tensors):
    tensors["blocks.2.attn2.to_k.bias"] = torch.zeros(129)


def quantise(tensors):
    name = "blocks.0.ffn.net.2.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


def add(name):
    return lambda tensors: tensors.update({name: torch.zeros(128, 1280)})


def cut(folder):
    data = (folder / NAME).read_bytes()
    (folder / NAME).write_bytes(data[: len(data) // 2])


BAD = {
    "no folder": (
        lambda f: f.rename(f.parent / "away"),
        r"simulator.folder: expected the folder",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), r"expected config.json"),
    "no weights": (lambda f: (f / NAME).unlink(), r"expected one checkpoint, diffusion_pytorch"),
    "half a file": (cut, r"diffusion_pytorch_model\.safetensors .* (cut short|no safetensors)"),
    "two checkpoints": (
        lambda f: (f / "model.safetensors").write_bytes(b""),
        r"expected one checkpoint.*got diffusion_pytorch_model and model",
    ),
    "two experts": (lambda f: (f / "transformer_2").mkdir(), r"two experts"),
    "another class": (
        lambda f: edit(f, _class_name="AutoencoderKLWan"),
        r"config.json: _class_name: expected WanTransformer3DModel.*got 'AutoencoderKLWan'",
    ),
    "fewer layers": (
        lambda f: edit(f, num_layers=30),
        r"contradicts the weights: num_layers: expected 3, as its tensors have, got 30",
    ),
    "other channels": (lambda f: edit(f, in_channels=16), r"in_channels: expected 4.*got 16"),
    "other heads": (
        lambda f: edit(f, num_attention_heads=8),
        r"attention_head_dim: expected heads of 128 in all, got 8 x 32",
    ),
    "no heads": (lambda f: edit(f, num_attention_heads="four"), r"heads: expected a divisor"),
    "other eps": (lambda f: edit(f, eps=1e-5), r"eps: expected 1e-06.*got 1e-05"),
    "missing tensor": (
        lambda f: retouch(f, lambda t: t.pop("blocks.1.ffn.net.2.bias")),
        r"missing blocks\.1\.ffn\.net\.2\.bias",
    ),
    "missing the first": (
        lambda f: retouch(f, lambda t: t.pop("patch_embedding.weight")),
        r"missing or misshapen patch_embedding\.weight",
    ),
    "unexpected tensor": (
        lambda f: retouch(f, add("blocks.0.gate.weight")),
        r"unexpected blocks\.0\.gate\.weight",
    ),
    "both namings": (
        lambda f: retouch(f, add("blocks.0.self_attn.o.bias")),
        r"expected each tensor once, got blocks\.0\.(self_attn\.o|attn1\.to_out\.0)\.bias twice",
    ),
    "other shape": (
        lambda f: retouch(f, widen),
        r"blocks\.2\.attn2\.to_k\.bias: expected \[128\], got \[129\]",
    ),
    "quantised": (
        lambda f: retouch(f, quantise),
        r"expected weights as BF16.*got blocks\.0\.ffn\.net\.2\.weight F8_E4M3",
    ),
    "image to video": (
        lambda f: retouch(f, add("blocks.0.attn2.add_k_proj.weight")),
        r"image-to-video model \(blocks\.0\.attn2\.add_k_proj\.weight\)",
    ),
    "action embedders": (
        lambda f: retouch(f, add("action_mlp1.0.weight")),
        r"expected a simulator of kind wan, but it has WoVR's.*simulator.kind to wovr",
    ),
    "NaN": (
        lambda f: retouch(f, poison),
        r"blocks\.1\.attn1\.to_v\.weight \[128, 128\]: expected finite weights, got 1 NaN",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_refused_by_name(tmp_path, case):
    fixture.write(tmp_path / "wan")
    damage, message = BAD[case]
    damage(tmp_path / "wan")
    with pytest.raises(UserError, match=message) as refused:
        load(tmp_path / "wan")
    assert str(tmp_path) in str(refused.value)


def test_a_missing_shard_is_named(tmp_path):
    fixture.write(tmp_path / "wan", shards=3)
    lost = "diffusion_pytorch_model-00002-of-00003.safetensors"
    (tmp_path / "wan" / lost).unlink()
    with pytest.raises(UserError, match=lost):
        load(tmp_path / "wan")


def test_a_plain_wan_is_no_wovr(tmp_path):
    fixture.write(tmp_path / "wan")
    with pytest.raises(UserError, match=r"kind wovr, but it has no action embedders"):
        load(tmp_path / "wan", "wovr")
