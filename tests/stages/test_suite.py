"""Several tasks with one policy, world and judge, and the same in reality alone: the program itself
with a stand-in for the benchmark."""

import json
from dataclasses import replace

import pytest
import torch
from official_files import write_official
from safetensors.torch import load_file
from stand_in import StandIn

from worldenv.config import Config, DataConfig, PolicyConfig
from worldenv.data.libero_tasks import SUITES
from worldenv.data.windows import FrameWindows, chunk_sequences
from worldenv.envs.libero import benchmark
from worldenv.presets import preset
from worldenv.runtime.errors import UserError
from worldenv.runtime.logging import read_metrics
from worldenv.stages import collect, pipeline, posttrain, results, thresholds
from worldenv.stages.measures import by_task
from worldenv.stages.run import Run, open_run

SUITE, TASKS = "libero_goal", (2, 7)


class Reacting(StandIn):
    """Where the policy does not explore, what comes of an episode hangs on its every action."""

    def reset(self, *, seed=None, options=None):
        self.gone = 0.0
        return super().reset(seed=seed, options=options)

    def step(self, actions):
        self.gone += float(actions[..., 0].mean())
        return super().step(actions)

    def lucky(self):
        return super().lucky() if self.terminate == "never" else [int(self.gone * 1e6) % 4 == 0]


@pytest.fixture
def config(tmp_path, monkeypatch) -> Config:
    """The smoke preset, smaller still, with two tasks and one round."""
    monkeypatch.setattr(benchmark, "LiberoVectorEnv", Reacting)
    monkeypatch.setattr(benchmark, "resolve_assets", lambda *_: None)
    monkeypatch.setattr(results, "_draw_videos", lambda run: None)
    monkeypatch.setattr(pipeline, "_announce", lambda run, marks: None)  # it takes seconds
    for task in TASKS:
        path = tmp_path / "official" / SUITE / f"{SUITES[SUITE][task]}_demo.hdf5"
        write_official(path, demos=2, size=64, steps=32)
    base = preset("smoke")
    return replace(
        base,
        run_dir=tmp_path / "run",
        device="cpu",
        env=replace(base.env, suite=SUITE, tasks=TASKS, max_steps=32),
        data=DataConfig(paths=(tmp_path / "official",)),
        collect=replace(base.collect, fresh=1.0),
        policy=PolicyConfig(width=16, layers=1, heads=2, encoder_channels=8),
        sft=replace(base.sft, steps=2, batch=4),
        simulator=replace(base.simulator, width=32, layers=1, steps=2),
        reflector=replace(base.reflector, steps=2),
        posttrain=replace(base.posttrain, rounds=1, iterations=1, reward="binary"),
        evaluate=replace(base.evaluate, sampled=True),
    )


def in_reality(config: Config, **changes) -> Config:
    part = replace(config.posttrain, world="real", contexts=3, group=4, iterations=2, lr=1e-4)
    return replace(config, posttrain=replace(part, **changes))


def trained(config: Config) -> dict:
    run = Run(config)
    try:
        return json.loads(pipeline.run_all(run).read_text())
    finally:
        run.close()


def test_two_tasks_share_a_world_and_are_told_apart_in_what_is_said_of_it(config, monkeypatch):
    def wrong_about_the_second(tasks, hits):
        rates = by_task(tasks, hits)
        for task, wrong in zip(TASKS, (0.0, 0.5), strict=True):
            rates[str(task)]["imagined"]["value"] = rates[str(task)]["real"]["value"] + wrong
        return rates

    monkeypatch.setattr(thresholds, "by_task", wrong_about_the_second)
    config = replace(config, posttrain=replace(config.posttrain, task_gap=0.25))
    found = trained(config)
    learned = found["stages"]["posttrain-0"]
    assert learned["gate"]["tasks"] == [TASKS[0]]
    assert learned["contexts"] == 2 + 3  # first frames of its demonstrations and explored episodes
    assert (found["fidelity"]["episodes"], found["fidelity"]["trained_in"]["episodes"]) == (2, 1)
    assert found["fidelity"]["trained_in"]["false_stops"]["n"] == 4
    assert [task["id"] for task in found["tasks"]] == [*TASKS]
    for kind in ("sft", "posttrained"):
        assert [task[kind]["episodes"] for task in found["tasks"]] == [2, 2]
        parts = [task[kind]["successes"] for task in found["tasks"]]
        assert found[kind] == {"successes": sum(parts), "episodes": 4}
        assert found["sampled"][kind]["episodes"] == 4
    assert found["no_oracle"]["sft"]["episodes"] == 4
    assert found["sampled"]["no_oracle"]["sft"]["episodes"] == 4
    used = {"demonstrations": 4, "explored": 8, "checks": 0, "rl": 0}
    assert (found["real_episodes"], found["real_episodes_used"]) == (used, 12)
    rates = found["stages"]["reflector-0"]["success_by_task"]
    assert {t: v["real"]["n"] for t, v in rates.items()} == {"2": 3, "7": 3}
    agreed = found["fidelity"]["outcome_agreement_by_task"]
    assert {t: v["agreement"]["n"] for t, v in agreed.items()} == {"2": 1, "7": 1}
    page = (config.run_dir / "report.html").read_text()
    for words in (
        "With the noise of post-training",
        "Ended by the reflector",
        "Replays that agree",
        f"Of the tasks only {TASKS[0]} were trained in",
    ):
        assert page.count(words) == 1


@pytest.mark.parametrize("world", [True, False])
def test_an_arm_learns_from_demonstrations_alone_what_it_is_told_to(config, world):
    """Two by two: the world, or else the judge, has seen nothing that the policy explored."""
    judge = not world
    found = trained(
        replace(
            config,
            simulator=replace(config.simulator, explored=world),
            reflector=replace(config.reflector, explored=judge, calibrate=judge),
            evaluate=replace(config.evaluate, sampled=False),
        )
    )
    simulator, reflector = (found["stages"][f"{k}-0"] for k in ("simulator", "reflector"))
    shown = chunk_sequences(collect.recorded(open_run(config.run_dir), "demonstrations"))
    frames = config.simulator.frames + 1
    windows = len(FrameWindows(shown, frames, padded=False))
    assert (simulator["windows"] > windows) if world else (simulator["windows"] == windows)
    assert reflector["imagined_sequences"] == (6 if judge else 4)
    assert ("success_by_task" in reflector) == judge
    assert found["real_episodes"]["explored"] == 8
    assert "no_oracle" in found


def test_in_reality_nothing_is_imagined_and_every_episode_is_counted(config):
    found = trained(in_reality(config))
    assert [*found["stages"]] == ["demonstrations", "sft", "posttrain-0", "evaluate"]
    used = {"demonstrations": 4, "explored": 0, "checks": 0, "rl": 24}
    assert (found["real_episodes"], found["real_episodes_used"]) == (used, 28)
    assert found["world"] == "real"
    assert not {"no_oracle", "fidelity", "reflector"} & found.keys()
    rows = read_metrics(config.run_dir, "posttrain-0")
    assert len(rows) == 2
    assert all(0 < row["real_success"] < 1 for row in rows)
    assert all("imagined_success" not in row for row in rows)
    folder = config.run_dir / "checkpoints"
    assert {p.stem for p in folder.glob("*.safetensors")} == {"policy-sft", "policy-0"}
    before, after = (
        load_file(folder / f"{name}.safetensors") for name in ("policy-sft", "policy-0")
    )
    assert not torch.equal(before["mu.2.weight"], after["mu.2.weight"])
    page = (config.run_dir / "report.html").read_text()
    assert "28: 4 demonstrations, 24 rl" in page
    assert "Post-trained in reality" in page


def test_post_training_in_reality_goes_on_from_its_last_iteration(config, tmp_path, monkeypatch):
    config = in_reality(config)
    trained(config)
    broken = replace(config, run_dir=tmp_path / "broken", env=replace(config.env, workers=1))
    update, begun = posttrain.update, []

    def killed(learner, episodes, seed, step):
        begun.append(step)
        if begun == [0, 1]:
            raise KeyboardInterrupt
        return update(learner, episodes, seed, step)

    monkeypatch.setattr(posttrain, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(broken)
    found = trained(broken)
    assert begun == [0, 1, 1]
    assert found["real_episodes"]["rl"] == 24, "an iteration that was begun twice counts once"
    a, b = (load_file(c.run_dir / "checkpoints" / "policy-0.safetensors") for c in (config, broken))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_what_reality_has_no_use_for_is_refused(config, tmp_path):
    config = in_reality(config)
    with pytest.raises(UserError, match=r"posttrain\.rounds: expected 1 in the real world"):
        in_reality(config, rounds=2)
    with pytest.raises(UserError, match=r"real_check_every: expected 0 in the real world"):
        in_reality(config, real_check_every=4)
    run = Run(config)
    try:
        with pytest.raises(UserError, match=r"explore: .* posttrain\.world real"):
            pipeline.run_stage(run, "explore")
        with pytest.raises(UserError, match="nothing is imagined"):
            pipeline.run_all(run, {"simulator": tmp_path / "any"})
        with pytest.raises(UserError, match="which has no simulator-0"):
            pipeline.check_made(run, ["simulator-0"])
    finally:
        run.close()
