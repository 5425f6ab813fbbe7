"""A round of post-training keeps the policy that did best in reality, scripted here."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from worldenv.config import PolicyConfig
from worldenv.models.policy import Policy
from worldenv.presets import preset
from worldenv.runtime import checkpoint
from worldenv.stages import posttrain, store
from worldenv.stages.run import Run


class Killed(Exception):
    pass


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """(make, updates): make(real, **changes) is a run whose checks return `real` by iteration; each
    update adds 1 to the last bias."""
    updates: list[int] = []
    runs: list[Run] = []

    def update(learner, episodes, seed, step):
        updates.append(step)
        with torch.no_grad():
            learner.policy.mu[-1].bias += 1
        return {"imagined_success": 0.5}

    def make(real: dict[int, float], **changes) -> Run:
        base = preset("smoke")
        rl = replace(base.posttrain, iterations=4, real_check_every=2, **changes)
        small = PolicyConfig(width=16, layers=1, heads=1, encoder_channels=8)
        run = Run(replace(base, run_dir=tmp_path, policy=small, posttrain=rl, device="cpu"))
        runs.append(run)
        policy = Policy(small, run.embodiment)
        torch.nn.init.zeros_(policy.mu[-1].bias)
        store.save("policy", policy, run.path("checkpoints", "policy-sft.safetensors"))
        monkeypatch.setattr(
            posttrain,
            "_check_reality",
            lambda run, policy, envs, firsts, number, step, known: real[step],
        )
        return run

    episodes = SimpleNamespace(episode=[0])
    monkeypatch.setattr(posttrain, "make_world", lambda run, number: (None, [], []))
    monkeypatch.setattr(posttrain, "_imagine", lambda *a: episodes)
    monkeypatch.setattr(posttrain, "update", update)
    yield make, updates
    for run in runs:
        run.close()


def kept(run: Run) -> float:
    """How many updates the round's policy has seen."""
    policy = store.load("policy", run.path("checkpoints", "policy-0.safetensors"))
    return policy.mu[-1].bias[0].item()


@pytest.mark.parametrize(
    ("real", "changes", "iteration"),
    [
        ({0: 0.5, 2: 0.7, 4: 0.6}, {}, 2),
        ({0: 0.5, 2: 0.7, 4: 0.7}, {}, 2),  # no better: the earlier one has exploited less
        ({0: 0.5, 2: 0.4, 4: 0.3}, {}, 0),
        ({0: 0.5, 2: 0.6, 4: 0.7}, {}, 4),
        ({0: 0.5, 2: 0.7, 4: 0.6}, {"keep_best": False}, 4),
    ],
)
def test_the_policy_that_did_best_is_kept(scripted, real, changes, iteration):
    make, updates = scripted
    run = make(real, **changes)
    record = posttrain.run(run, "mark", 0)
    assert updates == [0, 1, 2, 3]
    assert kept(run) == iteration
    assert record["kept_iteration"] == iteration
    assert record["kept_success"] == real[iteration]
    assert record["check_episodes"] == 3 * run.config.posttrain.real_check_episodes


def test_a_killed_round_still_knows_its_best(scripted, monkeypatch):
    make, updates = scripted
    run = make({0: 0.5, 2: 0.7, 4: 0.6})
    imagine = posttrain._imagine

    def killed(*arguments):
        if len(updates) == 3:
            raise Killed
        return imagine(*arguments)

    monkeypatch.setattr(posttrain, "_imagine", killed)
    with pytest.raises(Killed):
        posttrain.run(run, "mark", 0)
    monkeypatch.setattr(posttrain, "_imagine", imagine)
    record = posttrain.run(run, "mark", 0)
    assert updates == [0, 1, 2, 3]
    assert (kept(run), record["kept_iteration"]) == (2, 2)


def test_without_checks_the_last_policy_is_kept(scripted):
    make, _ = scripted
    run = make({})
    run.config = replace(run.config, posttrain=replace(run.config.posttrain, real_check_every=0))
    assert posttrain.run(run, "mark", 0)["kept_iteration"] is None
    assert kept(run) == 4


def test_policies_on_the_way_are_left_for_whoever_ranks_them(scripted):
    make, _ = scripted
    run = make({0: 0.5, 2: 0.7, 4: 0.6}, snapshot_every=1)
    posttrain.run(run, "mark", 0)
    left = run.path(*posttrain.snapshots(0))
    assert sorted(path.name for path in left.iterdir()) == [
        f"{k}.safetensors" for k in (1, 2, 3, 4)
    ]
    for k in (1, 2, 3, 4):
        assert store.load("policy", left / f"{k}.safetensors").mu[-1].bias[0].item() == k
    assert kept(run) == 2


def test_an_unfinished_round_leaves_the_finished_policy_in_place(scripted, monkeypatch):
    """After its first check an interrupted run had replaced policy-0 by the imitated policy."""
    make, _ = scripted
    run = make({0: 0.5, 2: 0.7, 4: 0.6})
    posttrain.run(run, "mark", 0)
    before = run.path("checkpoints", "policy-0.safetensors").read_bytes()
    monkeypatch.setattr(posttrain, "_imagine", lambda *a: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        posttrain.run(run, "of other settings", 0)
    assert run.path("checkpoints", "policy-0.safetensors").read_bytes() == before
    assert run.path("checkpoints", "posttrain-0.best.safetensors").exists()


@pytest.mark.parametrize("lost", ["best", "partial", "totals", "weights", "critic"])
def test_a_round_with_damaged_leftovers_begins_anew(scripted, monkeypatch, lost):
    make, updates = scripted
    run = make({0: 0.5, 2: 0.7, 4: 0.6})
    imagine = posttrain._imagine

    def killed(*arguments):
        if len(updates) == 3:
            raise Killed
        return imagine(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(posttrain, "_imagine", killed)
        with pytest.raises(Killed):
            posttrain.run(run, "mark", 0)
    partial = run.path("checkpoints", "posttrain-0.partial.safetensors")
    best = run.path("checkpoints", "posttrain-0.best.safetensors")
    if lost == "best":
        best.unlink()
    elif lost == "partial":
        partial.write_bytes(partial.read_bytes()[:200])
    elif lost == "weights":
        best.write_bytes(best.read_bytes()[:200])
    elif lost == "critic":  # another version's: it ended in "Train anew"
        tensors, metadata = checkpoint.load(partial)
        name = next(n for n, t in tensors.items() if n.startswith("critic/model/") and t.ndim)
        checkpoint.save(partial, {**tensors, name: tensors[name][:1]}, metadata)
    else:
        tensors, metadata = checkpoint.load(partial)
        checkpoint.save(partial, tensors, {**metadata, "totals": {"frames": 3}})
    updates.clear()
    record = posttrain.run(run, "mark", 0)
    assert updates == [0, 1, 2, 3]
    assert (kept(run), record["kept_iteration"]) == (2, 2)
