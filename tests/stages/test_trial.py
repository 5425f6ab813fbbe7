"""The trial of a world from its first episode to its page, in a run of smoke size whose reality is
made up."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from worlds import CHUNK, episode

from worldenv.envs.start import Start
from worldenv.presets import preset
from worldenv.report import measures as drawing
from worldenv.runtime.errors import UserError
from worldenv.stages import evaluate, measures, pipeline, probe, store, trial
from worldenv.stages.run import Run

ASKED = trial.Trial(episodes=6, policy_starts=6)


class Made:
    """Stands in for the real benchmark: episodes of a block; every other one is carried."""

    def __init__(self) -> None:
        self.begun: list[Start] = []
        self.stop_after = 1000

    def objects(self, row: int) -> dict:
        """The block and where it should go, in the world."""
        away = [0.04 * max(0, f - 5) * self.held for f in range(len(self.shown))]
        return {
            CHUNK * f: {
                "block": torch.tensor([x, 0.0, 0.9]).numpy(),
                "plate": torch.ones(3).numpy(),
            }
            for f, x in enumerate(away)
        }

    def roll_out(self, policy, starts, watch, *, seeds, noise, terminate, record_every) -> None:
        """One recorded episode from each start."""
        assert terminate == "never"
        assert len(set(seeds)) == len(seeds)
        for k, start in enumerate(starts):
            if len(self.begun) == self.stop_after:
                raise KeyboardInterrupt
            self.begun.append(start)
            self.held = len(self.begun) % 2 == 1
            self.shown = episode(self.held)
            self._show(k, watch(self))

    def _show(self, k: int, watcher) -> None:
        s = self.shown
        for f in range(len(s) - 1):
            before = {"image": s.images[f][None], "proprio": s.proprio[f][None]}
            before["instruction"] = (s.instruction,)
            dones = torch.zeros(CHUNK, dtype=torch.bool)
            dones[-1] = bool(s.success[f + 1])
            frames = {"image": s.images[f + 1 : f + 2].numpy(), "dones": dones.numpy()}
            frames |= {"proprio": s.proprio[f + 1 : f + 2].numpy(), "steps": [CHUNK * (f + 1)]}
            info = {"steps": [CHUNK * (f + 1)], "frames": [frames]}
            watcher.step(k, before, s.actions[f][None], {}, info)
        watcher.finish(k, {"success": bool(s.success.any())})

    def close(self) -> None:
        """Nothing runs."""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished smoke run by name, with untrained models."""
    base = preset("smoke")
    config = replace(base, run_dir=tmp_path, device="cpu", env=replace(base.env, max_steps=24))
    made = Run(config)
    made.reality = Made()
    for name in ("policy-sft", "policy-0", "simulator-0", "reflector-0"):
        kind = name.split("-")[0]
        torch.manual_seed(len(name))
        model = store.build(kind, config)
        if kind == "reflector":
            model.real_threshold.fill_(0.5)
        store.save(kind, model, made.path("checkpoints", f"{name}.safetensors"))
    monkeypatch.setattr(probe, "STEPS", 3)
    monkeypatch.setattr(trial, "POLICIES", 4)
    monkeypatch.setattr(measures, "DRIFT", 3)
    monkeypatch.setattr(pipeline, "check_made", lambda run, names: None)
    asked: list[int] = []

    def evaluate_policy(run, policy, starts, label, reflector, keep, noise):
        asked.append(len(starts))
        done = [
            {"task": s.task, "start": None, "seed": s.seed, "success": s.seed % 2 == 0}
            for s in starts
        ]
        keep(done)
        return done

    monkeypatch.setattr(evaluate, "evaluate_policy", evaluate_policy)
    made.asked = asked
    yield made
    made.close()


def test_a_trial_from_beginning_to_end(run, monkeypatch):
    run.reality.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        trial.run_trial(run, replace(ASKED, round=0))
    run.reality.stop_after = 1000
    (run.dir / "results.json").write_text("{}")
    measured = trial.run_trial(run, replace(ASKED, round=0))
    assert len(run.reality.begun) == 6  # those that were finished are not repeated
    assert len(set(run.reality.begun)) == 6
    assert {s.index for s in run.reality.begun} == {None}  # placements of their own
    assert measured["episodes"] == {"n": 6, "successes": 3, "carried_failures": 0}
    assert json.loads((run.dir / "measures" / "simulator-0.json").read_text()) == measured
    view = run.embodiment.views[0]
    assert measured["psnr"]["moving"][view]["8"]["n"] == 6
    assert len(measured["drift_psnr"]) == 3
    assert set(measured["things"]["8"]) == {"object_0_block", "object_1_plate", "painted_over"}
    grasp = measured["event"]["grasp"]
    assert [grasp[str(lead)]["n"] for lead in (1, 2, 3, 4)] == [6, 6, 6, 0]  # closed in the fifth
    assert grasp["1"]["of_yes"]["n"] == 3
    placing = measured["event"]["placing"]["1"]
    assert placing["of_yes"]["n"] == 3
    assert placing["near"]["n"] == 3  # no failure had carried anything
    assert set(measured["closed_loop"]) == {"explored_with_noise", "explored", "posttrained"}
    assert measured["closed_loop"]["explored_with_noise"]["real"]["value"] == 0.5
    assert [*measured["gain"]] == ["on its mean", "with noise"]
    assert all([*worlds] == ["imagined", "real"] for worlds in measured["gain"].values())
    gain = measured["gain"]["on its mean"]["real"]  # both really succeed from the same starts
    assert (gain["value"], gain["n"]) == (0, 6)
    policies = measured["ranking"]["policies"]
    assert [*policies] == [
        "policy-sft", "policy-0", "policy-sft weakened 0.1", "policy-0 weakened 0.1"
    ]  # fmt: skip
    seeds = [s.seed for s in run.reality.begun]
    assert policies["policy-0"]["real"]["value"] == pytest.approx(
        sum(s % 2 == 0 for s in seeds) / 6, abs=1e-3
    )
    for name in ("simulator-0", "film-0"):
        with Image.open(run.dir / "measures" / f"{name}.png") as image:
            assert image.width > 300
    ((title, body),) = drawing.sections(run.dir / "measures")
    assert "6 fresh episodes" in title
    assert body.count("data:image/png") == 2
    assert body in (run.dir / "report.html").read_text()
    told = trial.told(measured)
    assert "imagined - real success, posttrained" in told
    assert "gain of post-training, real, with noise: 0" in told

    assert run.asked == [6] * 6
    with monkeypatch.context() as patch:
        patch.setattr(trial.World, "frames", lambda self: {})
        patch.setattr(trial.World, "succeeds", lambda self, policy, chosen, *noise: [True] * 6)
        patch.setattr(trial, "about_things", lambda *a: {})
        patch.setattr(drawing, "draw", lambda *a: None)
        patch.setattr(trial, "write_report", lambda folder: None)
        again = trial.run_trial(run, replace(ASKED, round=0))
    assert run.asked[6:] == [0] * 6  # no policy's episodes are repeated either
    assert [*again["ranking"]["policies"]] == [*policies]


def test_what_is_refused(run, monkeypatch):
    for asked, words in (
        (replace(ASKED, round=7), "round 7: expected 0..1"),
        (replace(ASKED, episodes=5, policy_starts=5, round=0), "expected at least 6 of each"),
        (replace(ASKED, policy_starts=7, round=0), "no more starts than episodes"),
        (replace(ASKED, within=0.1, round=0), "Expected about 94 episodes"),
    ):
        with pytest.raises(UserError, match=words):
            trial.run_trial(run, asked)
    run.config = replace(run.config, env=replace(run.config.env, image_size=32))
    with pytest.raises(UserError, match=r"trained with env\.image_size 64, got 32"):
        trial.run_trial(run, replace(ASKED, round=0))
    monkeypatch.undo()
    with pytest.raises(UserError, match="has not run"):
        trial.run_trial(run, replace(ASKED, round=0))
    assert not run.reality.begun


def test_a_round_that_kept_what_it_began_with_ranks_it_once(run):
    folder = run.dir / "checkpoints"
    (folder / "policy-0.safetensors").write_bytes((folder / "policy-sft.safetensors").read_bytes())
    found, same = trial.ranked(run, (), 0)
    assert same == {"policy-0": "policy-sft"}
    assert next(iter(found)) == "policy-sft"
    assert len(found) == len({store.digest(p) for p in found.values()}) == 4
    named = folder / "policy-sft.safetensors"
    assert trial.ranked(run, (named,), 0)[1] == {"policy-0": "policy-sft", str(named): "policy-sft"}


def test_policies_left_on_the_way_are_ranked_in_order(run):
    g = torch.Generator().manual_seed(1)
    policy = store.load("policy", run.dir / "checkpoints" / "policy-0.safetensors")
    for k in (12, 4):
        store.save(
            "policy",
            trial.weakened(policy, 0.01, g),
            run.path("checkpoints", "iterations-0", f"{k}.safetensors"),
        )
    found, _ = trial.ranked(run, (), 0)
    assert list(found)[:4] == ["policy-sft", "policy-0", "policy-0 after 4", "policy-0 after 12"]


def test_weaker_copies_leave_the_policy_as_it_is(run):
    policy = store.load("policy", run.dir / "checkpoints" / "policy-0.safetensors")
    before = store.digest(policy)
    copies = [
        trial.weakened(policy, level, torch.Generator().manual_seed(0)) for level in (0.1, 0.2)
    ]
    assert store.digest(policy) == before
    ways = [
        torch.cat(
            [(a - b).flatten() for a, b in zip(c.parameters(), policy.parameters(), strict=True)]
        )
        for c in copies
    ]
    assert bool(ways[0].any())
    assert torch.allclose(2 * ways[0], ways[1], atol=1e-5)
