"""The whole method on two ranks, killed and resumed on another number: bit for bit one process's.

On `examples/own_benchmark.py`, whose world is drawn with numpy, with models smaller than smoke's.
"""

import json
import os
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranked import Group
from safetensors.torch import load_file

# They take seconds to import: once here, not in every rank.
from torch import _dynamo  # noqa: F401
from torch.distributed import checkpoint as dcp  # noqa: F401
from torch.distributed import fsdp  # noqa: F401

from worldenv import launch
from worldenv.envs.benchmark import begun
from worldenv.presets import preset
from worldenv.rl import update
from worldenv.runtime import checkpoint, parallel, ranks
from worldenv.runtime.errors import UserError
from worldenv.stages import pipeline, posttrain, training
from worldenv.stages.run import Run

FILE = Path(__file__).parents[2] / "examples" / "own_benchmark.py"


@pytest.fixture(autouse=True, scope="module")
def _as_here():
    """Without an estimate, which takes seconds; with the usual threads afterwards. Every other
    episode is called a success: after so few steps none is, and nothing would be updated."""

    def rewards(trajectories, kind):
        return (torch.arange(len(trajectories.length)) % 2).float()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update, "episode_rewards", rewards)
        patch.setattr(pipeline, "_announce", lambda run, marks: None)
        yield
    parallel.use_threads()


def config(folder: Path, **more):
    base = preset("smoke")
    env = replace(begun(base.env, str(FILE)), image_size=32, workers=1)
    small = {"width": 16, "layers": 1, "heads": 2, "encoder_channels": 8}
    made = replace(
        base,
        run_dir=folder / "run",
        device="cpu",
        threads=1,
        env=env,
        collect=replace(base.collect, episodes=4),
        policy=replace(base.policy, **small),
        sft=replace(base.sft, steps=6, batch=4),
        simulator=replace(base.simulator, steps=3, refresh_steps=1, width=24),
        reflector=replace(base.reflector, steps=2, refresh_steps=1),
        posttrain=replace(base.posttrain, rounds=1, iterations=2),
    )
    return replace(made, **more)


def whole(folder: Path, **more) -> dict:
    """Every stage; what a rank is told at the end."""
    with launch.together(settings := config(folder, **more)):
        run = Run(settings)
        results = pipeline.run_all(run)
        run.close()
    return {"results": str(results), "pid": os.getpid()}


def killed(folder: Path) -> dict:
    """As `whole`, and rank 1 is killed in imitation's fourth step."""
    draw = training.generator

    def drawn(seed: int, *keys: int | str):
        if keys[:2] == ("sft", 3) and ranks.number() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(seed, *keys)

    training.generator, training.CHECKPOINT_SECONDS = drawn, 0.0
    return _ended(folder)


def full(folder: Path) -> dict:
    """As `whole`, and rank 0's disk fills up: the simulator's first checkpoint does not fit."""
    training.CHECKPOINT_SECONDS = 0.0
    train = training.train

    def trained(run: Run, name: str, *rest, **more):
        if name == "simulator-0" and ranks.lead():
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        return train(run, name, *rest, **more)

    training.train = trained
    return _ended(folder)


def poisoned(folder: Path) -> dict:
    """As `whole`, and rank 1 finds NaN in the reflector's second step."""
    training.CHECKPOINT_SECONDS = 0.0
    train = training.train

    def trained(run: Run, name: str, mark: str, module, loss_at, **more):
        def lost(step: int, shard: int):
            loss, logged = loss_at(step, shard)
            bad = (name, step, ranks.number()) == ("reflector-0", 1, 1)
            return (loss * float("nan") if bad else loss), logged

        return train(run, name, mark, module, lost, **more)

    training.train = trained
    return _ended(folder)


def _ended(folder: Path) -> dict:
    try:
        return whole(folder)
    except UserError as error:
        return {"error": str(error)}


def refused(folder: Path) -> dict:
    """What three ranks that differ are told before any work."""
    own, groups = folder / f"policy-{ranks.number()}.safetensors", config(folder).posttrain
    own.write_bytes(b"x" * (1 + ranks.number() // 2))
    link = folder / f"node-{ranks.number()}"
    link.mkdir()
    (link / "policy.safetensors").symlink_to(own)
    os.chdir(link)  # so that the same words name another file
    said = []
    for number, (settings, files) in enumerate(
        [
            (config(folder, seed=ranks.number()), {}),
            (config(folder), {"policy": Path("policy.safetensors")}),
            (config(folder), {}),
            (config(folder), {}),
        ]
    ):
        if number == 2:
            launch._kind = lambda device: f"GPU, {80 >> ranks.number()} GiB"
        if number == 3:
            launch._kind = str
            assert groups.contexts == 2
        try:
            with launch.together(settings, files):
                pass
        except UserError as error:
            said.append(str(error))
    return {"said": said}


def outcome(folder: Path) -> dict:
    """All that a run computed: weights, metrics without times, what became of every episode."""
    run = folder / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("time", "frames_per_second")
    results = json.loads((run / "results.json").read_text())
    return {
        "weights": {p.name: load_file(p) for p in run.glob("checkpoints/*.safetensors")},
        "metrics": [{k: v for k, v in row.items() if k not in timed} for row in rows],
        "evaluation": results["evaluation"],
        "fidelity": results["fidelity"],
    }


def stopped_sharded(folder: Path) -> dict:
    """As `whole`, with a signal to stop in the second iteration; and rank 1's clock never says that
    it is time for a checkpoint, for all must follow rank 0's."""
    training.CHECKPOINT_SECONDS = 0.0 if ranks.lead() else 1e9
    first = posttrain.update

    def second(learner, episodes, seed, step):
        if step == 1:
            raise KeyboardInterrupt
        return first(learner, episodes, seed, step)

    posttrain.update = second
    try:
        whole(folder, fsdp=("policy", "simulator", "reflector"))
    except KeyboardInterrupt:
        return {"stopped": True}
    return {"stopped": False}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    whole(folder)
    return folder


@pytest.fixture(scope="module")
def alone(finished):
    return outcome(finished)


def same(got: dict, wanted: dict) -> None:
    assert got["weights"].keys() == wanted["weights"].keys()
    for name, tensors in wanted["weights"].items():
        for key, tensor in tensors.items():
            assert tensor.equal(got["weights"][name][key]), (name, key)
    for part in ("metrics", "evaluation", "fidelity"):
        assert got[part] == wanted[part], part


def close(got: dict, wanted: dict) -> None:
    """What is counted is the same, what is computed agrees to rounding."""
    assert got["weights"].keys() == wanted["weights"].keys()
    for name, tensors in wanted["weights"].items():
        torch.testing.assert_close(got["weights"][name], tensors, rtol=1e-3, atol=1e-3)
    assert len(got["metrics"]) == len(wanted["metrics"])
    for row, want in zip(got["metrics"], wanted["metrics"], strict=True):
        words = {key for key, value in want.items() if isinstance(value, str)}
        assert {key: row[key] for key in words} == {key: want[key] for key in words}
        numbers = {key: value for key, value in want.items() if key not in words}
        assert {k: row[k] for k in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-3)
        assert row.keys() == want.keys()
    assert got["evaluation"] == wanted["evaluation"]
    assert any("clip_fraction" in row for row in wanted["metrics"])  # the policy was updated


def test_two_ranks_do_what_one_process_does(alone, tmp_path):
    told = Group(whole, tmp_path, 2).found()
    assert {own["results"] for own in told} == {str(tmp_path / "run" / "results.json")}
    same(outcome(tmp_path), alone)
    assert "sft: 6/6" in (tmp_path / "run" / "ranks" / "rank-1.log").read_text()
    assert not [*(tmp_path / "run").rglob("*.rank-*"), *(tmp_path / "run").rglob("*.parts")]


def test_one_round_more_repeats_none(alone, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    base = config(tmp_path)
    whole(tmp_path, posttrain=replace(base.posttrain, rounds=2))
    said = capsys.readouterr().out
    assert "posttrain-0: done in an earlier run" in said
    assert "posttrain-1: done in an earlier run" not in said
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["stages"].keys() >= {"posttrain-1"}


def test_a_killed_rank_a_full_disk_and_nan_end_all_and_one_process_goes_on(alone, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    error = Group(killed, tmp_path, 2).of(0)["error"]
    assert "rank 1 is gone: it was killed" in error
    assert (checkpoints / "sft.partial.safetensors").exists()
    first, second = Group(full, tmp_path, 2).found()
    assert "simulator-0.partial.safetensors: " in first["error"]
    assert "rank 0 is gone: it ended with: Cannot write" in second["error"]
    told = Group(poisoned, tmp_path, 2).found()
    assert all("reflector-0 loss [] holds 1 NaN" in own["error"] for own in told)
    _, about = checkpoint.load(checkpoints / "reflector-0.partial.safetensors", header=True)
    assert about["step"] == 1
    whole(tmp_path)
    same(outcome(tmp_path), alone)


def test_ranks_that_differ_are_told_what_does_before_any_work(tmp_path):
    for own in Group(refused, tmp_path, 3).found():
        seed, artifact, gpu, groups = own["said"]
        assert seed.startswith("seed: expected the same on every rank, got 0 on rank 0 and 1 on")
        assert artifact.startswith("--policy policy.safetensors: expected the same on every rank")
        assert "on rank 2." in artifact
        words = "device: expected the same on every rank, got 'GPU, 80 GiB' on rank 0 and 'GPU, 40"
        assert gpu.startswith(words)
        assert groups.startswith("ranks: expected at most 2, one for each group")
    assert not (tmp_path / "run" / "config.json").exists()


def test_sharded_ranks_do_to_rounding_what_one_process_does(alone, tmp_path):
    """On two of them, that end in the second iteration of post-training; one process goes on."""
    for own in Group(stopped_sharded, tmp_path, 2).found():
        assert own["stopped"]
    partial = tmp_path / "run" / "checkpoints" / "posttrain-0.partial.safetensors"
    assert partial.with_suffix(".a").is_dir()
    whole(tmp_path)
    assert not [*(tmp_path / "run" / "checkpoints").glob("*.partial*")]
    close(outcome(tmp_path), alone)


def test_more_ranks_than_shards_are_refused(tmp_path):
    def five(folder: Path) -> dict:
        try:
            with launch.together(config(folder)):
                return {}
        except UserError as error:
            return {"error": str(error)}

    assert "ranks: expected at most 4" in Group(five, tmp_path, 5).of(0)["error"]
