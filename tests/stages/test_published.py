"""Whatever is wrong with a published folder is said before a run begins: nothing is written."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from published.damage import Payload, cut, drop, edit, poisoned, put, repickle, retensor

from worldenv import cli
from worldenv.data.episode import Episode
from worldenv.layouts import tiny, vae
from worldenv.layouts import wan as wan_layout
from worldenv.models import weights
from worldenv.presets import preset
from worldenv.runtime.seeds import numpy_generator
from worldenv.stages import folders, pipeline, records, sft, store
from worldenv.stages.run import Run

HEAD = "action_head--150000_checkpoint.pt"
FLAGS = {
    "--policy.folder": "openvla-oft",
    "--simulator.folder": "wan",
    "--simulator.tokenizer-folder": "wan",
    "--reflector.folder": "image-text",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folder of the three that preset `published-tiny` names."""
    root = tmp_path_factory.mktemp("models")
    tiny.prepare(tiny.moved(preset("published-tiny"), root))
    return root


def train(models: Path, run_dir: Path, *more: str) -> list[str]:
    """`worldenv-train --preset published-tiny` with the folders below `models`."""
    folders = [word for flag, name in FLAGS.items() for word in (flag, str(models / name))]
    return ["train", "--preset", "published-tiny", "--run-dir", str(run_dir), *folders, *more]


def oft(act):
    return lambda models: act(models / "openvla-oft")


def wan(act):
    return lambda models: act(models / "wan" / "transformer")


def autoencoder(act):
    return lambda models: act(models / "wan" / "vae")


def eyes(act):
    return lambda models: act(models / "image-text")


def statistics(change):
    return oft(lambda f: edit(f / "dataset_statistics.json", lambda v: change(v) or v))


def whole(models: Path) -> None:
    """It is what is asked of it that does not fit."""


def as_wovr(models: Path) -> None:
    shutil.rmtree(models / "wan" / "transformer")
    channels = json.loads((models / "wan/vae/config.json").read_text())["z_dim"]
    made = models / "wan" / "transformer"
    wan_layout.write_wovr(made, in_channels=channels, out_channels=channels)


DIFFUSERS = "diffusion_pytorch_model"
KEY = "libero_spatial_no_noops"
DAMAGED = {
    "policy: no folder": (oft(shutil.rmtree), (), "expected the folder of a published model"),
    "policy: a missing shard": (
        oft(drop("model-00003-of-00004.safetensors")),
        (),
        "missing: model-00003",
    ),
    "policy: another shape": (
        oft(lambda f: retensor(f, "projector.fc2.bias", lambda t: t[1:].clone())),
        (),
        "projector.fc2.bias: expected [16], got [15]",
    ),
    "policy: a config at odds with its tensors": (
        oft(lambda f: edit(f / "config.json", lambda v: {**v, "image_sizes": [42, 42]})),
        (),
        "pos_embed: expected [1, 9,",
    ),
    "policy: NaN": (
        oft(lambda f: retensor(f, "projector.fc2.bias", poisoned)),
        (),
        "projector.fc2.bias [16]: expected finite weights, got 1 NaN",
    ),
    "policy: code in a head": (
        oft(lambda f: repickle(f / HEAD, {"x": Payload()})),
        (),
        f"{HEAD}: expected tensors alone",
    ),
    "policy: two heads": (
        oft(lambda f: shutil.copy(f / HEAD, f / "action_head--50000_checkpoint.pt")),
        (),
        "expected one action_head checkpoint, got 2",
    ),
    "policy: no statistics": (
        oft(
            lambda f: (
                drop("dataset_statistics.json")(f),
                edit(f / "config.json", lambda v: {**v, "norm_stats": {}}),
            )
        ),
        (),
        "expected statistics of the policy's data",
    ),
    "policy: statistics of another robot": (
        statistics(lambda v: v[KEY]["proprio"].update(q01=[0.0] * 7)),
        (),
        "proprio.q01: expected 8 numbers, got 7",
    ),
    "policy: another key": (whole, ("--policy.unnorm-key", "bridge"), f"It has: {KEY}"),
    "policy: more cameras than there are": (
        whole,
        ("--policy.images", "3"),
        "policy.images: expected at most the 2 cameras",
    ),
    "simulator: half a file": (wan(cut(f"{DIFFUSERS}.safetensors")), (), "is cut short"),
    "simulator: NaN": (
        wan(lambda f: retensor(f, "blocks.0.attn1.to_q.bias", poisoned, DIFFUSERS)),
        (),
        "blocks.0.attn1.to_q.bias",
    ),
    "simulator: a config at odds with its tensors": (
        wan(lambda f: edit(f / "config.json", lambda v: {**v, "num_layers": 30})),
        (),
        "contradicts the weights: num_layers",
    ),
    "simulator: of other latents": (
        lambda m: (shutil.rmtree(m / "wan/vae"), vae.wan_vae(m / "wan", "2.2")),
        (),
        "Name the tokenizer that this Wan was trained with",
    ),
    "simulator: of another kind": (
        whole,
        ("--simulator.kind", "wovr"),
        "Set config simulator.kind to wan",
    ),
    "simulator: of one camera": (as_wovr, ("--simulator.kind", "wovr"), "cameras: expected 1"),
    "tokenizer: NaN": (
        autoencoder(lambda f: retensor(f, "quant_conv.bias", poisoned, DIFFUSERS)),
        (),
        "quant_conv.bias [32]: expected finite weights",
    ),
    "tokenizer: no weights": (
        autoencoder(drop(f"{DIFFUSERS}.safetensors")),
        (),
        f"or {DIFFUSERS}.safetensors; got config.json",
    ),
    "tokenizer: patches that its latents do not fill": (
        whole,
        ("--simulator.patch", "4"),
        "simulator.patch: expected a multiple of 8",
    ),
    "reflector: no processor": (
        eyes(drop("preprocessor_config.json")),
        (),
        "preprocessor_config.json: expected the settings of a processor",
    ),
    "reflector: a missing shard": (
        eyes(drop("model-00002-of-00004.safetensors")),
        (),
        "missing: model-00002",
    ),
    "reflector: NaN": (
        eyes(lambda f: retensor(f, "visual.merger.mlp.0.bias", poisoned)),
        (),
        "expected finite weights",
    ),
    "reflector: a processor of other patches": (
        eyes(lambda f: edit(f / "preprocessor_config.json", lambda v: {**v, "merge_size": 1})),
        (),
        "expected a processor that fits its model",
    ),
    "reflector: of another kind": (
        whole,
        ("--reflector.kind", "wovr"),
        "expected one reward network, resnet_rm.pth or taskemb_resnet_rm.pth",
    ),
    "reflector: no JSON": (eyes(put("config.json", "{")), (), "config.json is not valid JSON"),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_fault_ends_the_command_before_anything_is_done(
    models, tmp_path, monkeypatch, capsys, fault
):
    act, more, words = DAMAGED[fault]
    copy, run_dir = tmp_path / "models", tmp_path / "run"
    shutil.copytree(models, copy)
    act(copy)
    monkeypatch.setattr(tiny, "prepare", lambda config: None)  # what is missing stays so
    monkeypatch.setattr(records, "perform", lambda *a: pytest.fail("a stage began"))
    # Without adapters, which cost most of the time and come from no folder.
    monkeypatch.setattr(sys, "argv", train(copy, run_dir, "--policy.lora-rank", "0", *more))
    with pytest.raises(SystemExit) as ended:
        cli.train()
    error = capsys.readouterr().err
    assert ended.value.code == 2, error
    assert words in error, error
    assert [path.name for path in run_dir.iterdir()] == [".lock"]


@pytest.fixture
def run(models, tmp_path):
    """Of the preset, with whole folders."""
    run = Run(
        replace(
            tiny.moved(preset("published-tiny"), models), run_dir=tmp_path / "run", device="cpu"
        )
    )
    yield run
    run.close()


def test_whole_folders_are_built_once(run, models, monkeypatch):
    built, build = [], store.build
    monkeypatch.setattr(store, "build", lambda kind, config: built.append(kind))
    folders.check(run, ["demonstrations", *folders.KINDS])
    assert built == ["policy", "simulator", "reflector"]
    folders.check(run, folders.KINDS)
    assert len(built) == 3
    run.config = replace(run.config, policy=replace(run.config.policy, images=1))
    folders.check(run, folders.KINDS)
    assert built[3:] == ["policy"]
    # Weights that have been looked through are mapped alone when they are loaded again.
    build("policy", run.config)
    monkeypatch.setattr(weights, "finite", lambda t, name, path: pytest.fail(f"{path} {name}"))
    shards = weights.Shards(models / "openvla-oft")
    shards.read([n for n in shards.shapes if n.startswith("projector.")])


def shown(number: int) -> Episode:
    g = numpy_generator("shown", number)
    return Episode(
        suite="libero_spatial",
        task=8,
        instruction="go there",
        start=number,
        seed=number,
        source="expert",
        actions=g.uniform(-1, 1, (16, 7)).astype(np.float32),
        dones=np.arange(16) == 15,
        frame_steps=np.arange(17),
        images=g.integers(0, 256, (17, 2, 64, 64, 3)).astype(np.uint8),
        proprio=g.normal(size=(17, 8)).astype(np.float32),
        success=True,
    )


def test_imitation_leaves_an_adapter_that_peft_reads_and_heads_under_published_names(
    run, models, monkeypatch
):
    monkeypatch.setattr(sft, "recorded", lambda *a: [shown(0)])
    config = run.config = replace(run.config, sft=replace(run.config.sft, steps=2, batch=4))
    step = pipeline.steps(config)["sft"]
    record = records.perform(run, step, "0" * 16)
    left = run.dir / "checkpoints" / "policy-sft"
    sealed = [Path(name) for name in record["artifacts"]]
    files = {p.relative_to(run.dir) for p in left.rglob("*") if p.is_file()}
    assert files == {path for path in sealed if path.parts[1] == "policy-sft"}
    trained = store.load("policy", left.with_suffix(".safetensors"))
    view = {
        "image": torch.from_numpy(shown(1).images[:2]),
        "proprio": torch.from_numpy(shown(1).proprio[:2]),
        "instruction": ["go there"] * 2,
    }
    bare = replace(config, policy=replace(config.policy, lora_rank=0))
    theirs = PeftModel.from_pretrained(store.build("policy", bare), left / "lora_adapter")
    for name in ("action_head", "proprio_projector", "scale_head"):
        held = torch.load(left / f"{name}--latest_checkpoint.pt", weights_only=True)
        getattr(theirs.base_model.model, name).load_state_dict(held)
    with torch.no_grad():
        for ours, other in zip(trained(view), theirs(view), strict=True):
            assert torch.equal(ours, other)
    (left / "lora_adapter" / "adapter_model.safetensors").unlink()
    assert records.finished(run.dir, step, "0" * 16) is None
