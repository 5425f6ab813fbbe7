"""The optional stage distill, and the causal conversion within the stage simulator."""

import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from worldenv.config import (
    CollectConfig,
    Config,
    DistillConfig,
    EnvConfig,
    PosttrainConfig,
    SimulatorConfig,
)
from worldenv.data.episode import Episode
from worldenv.fields import from_dict, to_dict
from worldenv.models.simulator import World
from worldenv.presets import preset
from worldenv.runtime import checkpoint
from worldenv.runtime.errors import UserError
from worldenv.runtime.logging import read_metrics
from worldenv.stages import distill, fidelity, pipeline, simulator, store
from worldenv.stages.run import Run

SMALL = SimulatorConfig(
    width=32, layers=1, heads=2, window=1, frames=2, steps=3, batch=4, dynamics_batch=4
)
CONFIG = Config(
    device="cpu",
    env=EnvConfig(image_size=16, chunk=2),
    collect=CollectConfig(record_every=1),
    simulator=SMALL,
    distill=DistillConfig(
        clip_steps=2, steps=3, self_forcing_steps=3, teacher_steps=4, batch=4, frames=2
    ),
    posttrain=PosttrainConfig(rounds=1, sampling_steps=2, refresh_sampling_steps=2),
)


def episode(seed: int, steps: int = 20) -> Episode:
    random = np.random.default_rng(seed)
    return Episode(
        suite="libero_spatial",
        task=8,
        instruction="go there",
        start=seed,
        seed=seed,
        source="policy",
        actions=random.uniform(-1, 1, (steps, 7)).astype(np.float32),
        proprio=random.normal(size=(steps + 1, 8)).astype(np.float32),
        images=random.integers(0, 256, (steps + 1, 2, 16, 16, 3), dtype=np.uint8),
        frame_steps=np.arange(steps + 1),
        dones=np.zeros(steps, bool),
        success=False,
    )


@pytest.fixture(autouse=True)
def _episodes(monkeypatch):
    found = [episode(0)], [episode(1), episode(2)], [episode(3)]
    for stage in (simulator, fidelity):
        monkeypatch.setattr(stage, "load_round", lambda run, number, tasks=None: found)


def make(folder, config: Config, *stages) -> dict:
    run = Run(replace(config, run_dir=folder))
    try:
        return [stage.run(run, "mark", 0) for stage in stages][-1]
    finally:
        run.close()


def weights(folder, name: str) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / "checkpoints" / f"{name}-0.safetensors")[0]


def test_says_what_each_part_reached_and_leaves_the_teacher_alone(tmp_path):
    make(tmp_path, CONFIG, simulator)
    before = weights(tmp_path, "simulator")
    record = make(tmp_path, CONFIG, distill)
    assert list(record["reached"]) == ["teacher", "before", "warm_up", "self_forcing"]
    assert (record["sampling_steps"], record["teacher_steps"], record["episodes"]) == (2, 4, 1)
    for arm, measured in record["reached"].items():
        assert set(measured["psnr_per_horizon"]) == {"1", "2", "4", "8"}
        known = measured["psnr_to_teacher_per_horizon"]["1"]
        assert (known == 100) == (arm == "teacher")
        one, eight = (measured["psnr_per_horizon"][h] for h in "18")
        assert measured["drift_db"] == pytest.approx(one - eight, abs=2e-3)
    logged = read_metrics(tmp_path, "distill-0")
    assert [row["step"] for row in logged] == [1, 2, 4, 8]
    assert logged[0]["psnr_before"] == record["reached"]["before"]["psnr_per_horizon"]["1"]
    assert all(torch.equal(before[k], v) for k, v in weights(tmp_path, "simulator").items())
    after = weights(tmp_path, "distill")
    same = {k for k, v in before.items() if torch.equal(after[k], v)}
    assert {k for k in before if k.startswith("dynamics")} <= same
    assert not {k for k in same if k.startswith(("blocks", "patch_in", "head"))}
    assert not list((tmp_path / "checkpoints").glob("*.partial.*"))


@pytest.mark.parametrize("stopped", ["warm-up-0", "self-forcing-0"])
def test_goes_on_after_ctrl_c_to_the_same_bits(tmp_path, monkeypatch, stopped):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        make(folder, CONFIG, simulator)
    record = make(whole, CONFIG, distill)
    step = distill.distillation_loss
    own, steps = stopped.startswith("self"), []

    def impatient(*args, **kwargs):
        if kwargs["own"] == own:
            steps.append(1)
            if len(steps) == 6:  # in the second step, of four shards
                signal.raise_signal(signal.SIGINT)
        return step(*args, **kwargs)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(distill, "distillation_loss", impatient)
            with pytest.raises(KeyboardInterrupt):
                make(broken, CONFIG, distill)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (broken / "checkpoints" / f"{stopped}.partial.safetensors").exists()
    assert make(broken, CONFIG, distill) == record
    found = weights(broken, "distill")
    assert all(torch.equal(found[k], v) for k, v in weights(whole, "distill").items())
    rows = [read_metrics(f, "self-forcing-0") for f in (whole, broken)]
    assert [r["loss"] for r in rows[0]] == [r["loss"] for r in rows[1]]


def test_conversion_begins_with_the_bidirectional_weights_and_learns_its_velocities(
    tmp_path, monkeypatch
):
    began = []
    loss = World.loss

    def watched(self, *args):
        began.append({k: v.clone() for k, v in self.state_dict().items()})
        return loss(self, *args)

    monkeypatch.setattr(World, "loss", watched)
    distill = DistillConfig(clip_steps=11)
    config = replace(CONFIG, distill=distill, simulator=replace(SMALL, steps=11))
    record = make(tmp_path, config, simulator)
    assert {"clip_loss", "clip_psnr", "conversion", "psnr"} <= set(record)
    assert [row["step"] for row in read_metrics(tmp_path, "clip")] == [0, 10]
    untaught = replace(config, distill=replace(distill, clip_weight=0.0))
    taught = weights(tmp_path, "simulator")
    count = len(began)
    make(tmp_path / "untaught", untaught, simulator)
    assert all(torch.equal(began[0][k], v) for k, v in began[count].items())
    other = weights(tmp_path / "untaught", "simulator")
    assert any(not torch.equal(taught[k], v) for k, v in other.items())
    off = replace(config, distill=DistillConfig())
    make(tmp_path / "off", off, simulator)
    first = began[2 * count]
    assert any(not torch.equal(began[0][k], v) for k, v in first.items())


@pytest.mark.parametrize("name", ["default", "smoke", "published-tiny"])
def test_off_changes_no_step_and_no_fingerprint_of_one(name, monkeypatch):
    monkeypatch.setattr(store, "digest_of_folder", str)  # of folders that are not there yet
    config = preset(name)
    steps = pipeline.steps(config)
    assert not any(step.startswith("distill") for step in steps)
    for stage, needed in (("reflector-0", "simulator-0"), ("fidelity-0", "simulator-0")):
        assert needed in steps[stage].needs(config)
    own = config.simulator, *store.digests(config.simulator)
    assert simulator.STAGE.settings(config, 0) == own
    tuned = replace(config, distill=replace(config.distill, lr=1e-4, teacher_steps=8))
    for a, b in zip(steps.values(), pipeline.steps(tuned).values(), strict=True):
        assert a.stage.settings(config, a.number) == b.stage.settings(tuned, b.number)


def test_on_later_stages_imagine_in_the_distilled_world_and_later_rounds_begin_with_the_teacher():
    config = preset("smoke")
    config = replace(config, distill=DistillConfig(steps=2))
    steps = pipeline.steps(config)
    order = list(steps)
    assert order.index("simulator-1") + 1 == order.index("distill-1")
    for stage in ("reflector-1", "fidelity-1", "posttrain-1"):
        assert "distill-1" in steps[stage].needs(config)
        assert "simulator-1" not in steps[stage].needs(config)
    assert "simulator-0" in steps["simulator-1"].needs(config)
    assert "distill-0" not in steps["simulator-1"].needs(config)


def test_settings_that_cannot_be_met_are_refused(tmp_path):
    with pytest.raises(UserError, match="teacher_steps: expected a multiple of the 2 passes"):
        replace(CONFIG, distill=DistillConfig(steps=1, teacher_steps=5))
    values = to_dict(CONFIG)
    values["simulator"] |= {"kind": "wovr", "folder": "somewhere"}
    with pytest.raises(UserError, match="clip_steps: expected 0 for a WoVR"):
        from_dict(Config, values)
    run = Run(replace(CONFIG, distill=DistillConfig(), run_dir=tmp_path))
    try:
        with pytest.raises(UserError, match="distill: expected a configuration that has"):
            pipeline.run_stage(run, "distill")
    finally:
        run.close()
