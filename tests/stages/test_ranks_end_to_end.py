"""The whole method on two ranks, killed and resumed on another number: bit for bit one process's.

On `examples/own_benchmark.py`, whose world is drawn with numpy, with models smaller than smoke's.
"""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranked import Group
from safetensors.torch import load_file

# They take seconds to import: once here, not in every rank.
from torch import _dynamo  # noqa: F401
from torch.distributed import checkpoint, fsdp  # noqa: F401

from worldenv import launch
from worldenv.envs.benchmark import begun
from worldenv.presets import preset
from worldenv.rl import update
from worldenv.runtime import parallel, ranks
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
    return replace(
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
        **more,
    )


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
    try:
        return whole(folder)
    except UserError as error:
        return {"error": str(error)}


def other(folder: Path) -> dict:
    """Ranks of different configurations."""
    settings = config(folder, seed=ranks.number())
    try:
        with launch.together(settings):
            return {}
    except UserError as error:
        return {"error": str(error)}


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
    """As `whole`, with a signal to stop in the second iteration."""
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
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    whole(folder)
    return outcome(folder)


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


def test_a_killed_rank_ends_all_and_one_process_goes_on(alone, tmp_path):
    group = Group(killed, tmp_path, 2)
    error = group.of(0)["error"]
    assert "rank 1 is gone: it was killed" in error
    assert (tmp_path / "run" / "checkpoints" / "sft.partial.safetensors").exists()
    whole(tmp_path)
    same(outcome(tmp_path), alone)


def test_sharded_ranks_do_to_rounding_what_one_process_does(alone, tmp_path):
    """On two of them, that end in the second iteration of post-training; one process goes on."""
    for own in Group(stopped_sharded, tmp_path, 2).found():
        assert own["stopped"]
    partial = tmp_path / "run" / "checkpoints" / "posttrain-0.partial.safetensors"
    assert partial.with_suffix(".a").is_dir()
    whole(tmp_path)
    assert not [*(tmp_path / "run" / "checkpoints").glob("*.partial*")]
    close(outcome(tmp_path), alone)


def test_ranks_of_other_settings_are_told_what_differs(tmp_path):
    for own in Group(other, tmp_path, 2).found():
        words = "seed: expected the same on every rank, got 0 on rank 0 and 1 on rank 1"
        assert own["error"].startswith(words)


def test_more_ranks_than_shards_are_refused(tmp_path):
    def five(folder: Path) -> dict:
        try:
            with launch.together(config(folder)):
                return {}
        except UserError as error:
            return {"error": str(error)}

    assert "ranks: expected at most 4" in Group(five, tmp_path, 5).of(0)["error"]
