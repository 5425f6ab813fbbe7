"""What an interrupted evaluation goes on from, and who ends an episode without the benchmark."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from worldenv.envs.imagined import Context, ImaginedVectorEnv
from worldenv.envs.start import Start
from worldenv.presets import preset
from worldenv.runtime.errors import UserError
from worldenv.stages import evaluate, store
from worldenv.stages.run import Run


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """(run, rolled): every episode succeeds; `rolled` counts those of each label."""
    rolled: dict[str, int] = {}
    noises: dict[str, object] = {}

    def evaluate_policy(run, policy, starts, label, reflector, keep, noise):
        rolled[label] = len(starts)
        noises[label] = noise
        done = [{"task": s.task, "start": s.index, "seed": s.seed, "success": True} for s in starts]
        keep(done)
        return done

    monkeypatch.setattr(evaluate, "evaluate_policy", evaluate_policy)
    policy = SimpleNamespace(distribution="laplace")
    monkeypatch.setattr(store, "load", lambda *a: policy)
    run = Run(replace(preset("smoke"), run_dir=tmp_path, device="cpu"))
    run.noises = noises
    yield run, rolled
    run.close()


def test_finished_episodes_are_not_repeated(scripted):
    run, rolled = scripted
    first = evaluate.run(run, "mark")
    assert rolled == {"evaluate sft": 2, "evaluate posttrained": 2}
    assert evaluate.run(run, "mark") == first
    assert rolled == {"evaluate sft": 0, "evaluate posttrained": 0}
    assert evaluate.run(run, "of other settings") == first
    assert rolled == {"evaluate sft": 2, "evaluate posttrained": 2}


def test_sampled_episodes_are_others_beside_the_greedy_ones(scripted):
    run, rolled = scripted
    greedy = evaluate.run(run, "mark")
    run.config = replace(run.config, evaluate=replace(run.config.evaluate, sampled=True))
    both = evaluate.run(run, "mark")
    assert both["outcomes"] == greedy["outcomes"]
    assert both["sampled"].keys() == {"sft", "posttrained"}
    sampled = {f"evaluate {label}-sampled": 2 for label in ("sft", "posttrained")}
    assert rolled == {"evaluate sft": 0, "evaluate posttrained": 0, **sampled}
    push = run.config.posttrain.push
    assert [run.noises[label].push for label in sampled] == [push, push]
    assert run.noises["evaluate sft"] is None
    evaluate.run(run, "mark")
    assert not any(rolled.values())
    for name in evaluate.STAGE.keeps:
        assert (run.dir / name).exists()


@pytest.mark.parametrize("damage", ["cut", "list", "no episodes", "no success", "number"])
def test_damaged_outcomes_are_measured_again(scripted, damage):
    run, rolled = scripted
    first = evaluate.run(run, "mark")
    path = run.dir / "evaluation" / "sft.json"
    record = json.loads(path.read_text())
    if damage == "no success":
        del record["episodes"][0]["success"]
    elif damage == "no episodes":
        del record["episodes"]
    content = {"list": [record], "number": 3}.get(damage, record)
    text = json.dumps(content)
    path.write_text(text[:40] if damage == "cut" else text)
    assert evaluate.run(run, "mark") == first
    assert rolled == {"evaluate sft": 2, "evaluate posttrained": 0}


class Said:
    """A reflector that says what it is told, frame by frame."""

    threshold, real_threshold = torch.tensor(0.95), torch.tensor(0.5)

    def __init__(self, rewards: list[float]) -> None:
        self.rewards = rewards

    def onlooker(self, batch: int) -> "Said":
        return self

    def reset(self, rows: torch.Tensor) -> None:
        self.left = list(self.rewards)

    def watch(self, image, proprio, instruction, rows) -> torch.Tensor:
        return torch.tensor([self.left.pop(0)])


@pytest.mark.parametrize(
    ("rewards", "won_at", "stop", "success"),
    [
        ([0.9, 0.1, 0.6, 0.1, 0.1, 0.1], None, 24, False),  # of the first frame it says nothing
        ([0.0, 0.1, 0.6, 0.1], 24, 24, True),  # too early by a chunk, which the grace makes up for
        ([0.0, 0.6, 0.1, 0.1], 24, 16, False),  # by two
        ([0.0, 0.1, 0.1, 0.6], 24, None, True),  # the signal fires, and nothing can be lost
        ([0.0, 0.1, 0.4, 0.5], 24, None, True),  # above it, not at it
        ([0.0, 0.1, 0.1, 0.1, 0.1, 0.6], None, None, False),  # at the last step nothing is left
    ],
)
def test_without_oracle_the_threshold_for_real_frames_ends_episodes(rewards, won_at, stop, success):
    start, kept = Start(8, 20, 1000), []
    ruling = evaluate._Ruling([start], kept.append, Said(rewards))
    view = {"image": None, "proprio": None, "instruction": None}
    chunks = 5 if won_at is None else won_at // 8
    for k in range(1, chunks + 1):
        fired = won_at is not None and 8 * k >= won_at
        ruling.step(0, view, None, view, {"success": [fired], "steps": [8 * k]})
    ruling.finish(0, {"success": won_at is not None, "success_step": won_at, "steps": 40})
    (got,) = kept
    assert (got["success_no_oracle"], got["stop_step"]) == (success, stop)
    assert got["success"] == (won_at is not None)


def test_without_calibration_on_real_frames_nothing_is_evaluated_without_oracle(tmp_path):
    config = replace(preset("smoke"), run_dir=tmp_path, device="cpu")
    run = Run(config)
    judge, policy = store.build("reflector", config), store.build("policy", config)
    run.reality.roll_out = lambda policy, starts, watch, **how: watch(None)
    with pytest.raises(UserError, match="calibrated on real frames, got none"):
        evaluate.evaluate_policy(run, policy, [Start(8, 20, 1000)], "evaluate", judge)
    run.close()


def test_imagination_goes_by_the_other_threshold():
    config = preset("smoke")
    judge = store.build("reflector", config)
    judge.threshold.fill_(0.25)
    judge.real_threshold.fill_(0.75)
    robot = store.embodiment(config)
    side = config.env.image_size
    image = torch.zeros(1, robot.V, side, side, 3, dtype=torch.uint8)
    still = torch.zeros(1, config.env.chunk, robot.A)
    context = Context(image, torch.zeros(1, robot.P), still, 8, "lift the cup", 0, False)
    world = store.build("simulator", config).for_generation()
    env = ImaginedVectorEnv(world, judge, [context], 1, max_chunks=2, sampling_steps=1)
    assert env.threshold == 0.25
    assert evaluate._Ruling([], print, judge).threshold == 0.75
