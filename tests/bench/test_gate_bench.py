"""How worlds are spoiled for the gate."""

from types import SimpleNamespace

import numpy as np
import pytest

from bench import gate
from worldenv.presets import preset
from worldenv.stages import collect, reflector, simulator, thresholds


@pytest.fixture
def run(monkeypatch):
    """Of five episodes, one of them held out, whose actions are all different."""
    lengths, count = (16, 21, 8, 40, 24), iter(range(1000))
    episodes = [
        SimpleNamespace(actions=np.array([[next(count)] * 7 for _ in range(n)])) for n in lengths
    ]
    parts = (episodes[:2], episodes[2:4], episodes[4:])
    monkeypatch.setattr(collect, "load_round", lambda run, number: parts)
    return SimpleNamespace(config=preset("smoke"))


def test_shuffled_actions_are_the_same_ones_elsewhere_but_for_those_held_out(run):
    before = [e.actions.copy() for part in collect.load_round(run, 0) for e in part]
    after = [e.actions for part in gate.shuffled(run, 0) for e in part]
    assert [len(a) for a in after] == [len(b) for b in before]
    moved = np.concatenate(after[:4])[:, 0]
    assert sorted(moved) == list(range(85))
    assert (np.diff(moved) == 1).sum() >= 7 * 10  # whole chunks
    assert (moved != np.arange(85)).mean() > 0.5
    assert np.array_equal(after[4], before[4])


def test_the_stages_are_themselves_again_after_an_arm(run):
    was = (simulator.load_round, simulator.run, reflector._learn, thresholds.imagined)
    for arm in gate.ARMS.values():
        with gate.patched(arm):
            assert all(
                getattr({"simulator": simulator, "reflector": reflector}[stage], name) is changed
                for (stage, name), changed in ((k.split("."), v) for k, v in arm.items())
            )
        assert was == (simulator.load_round, simulator.run, reflector._learn, thresholds.imagined)
    assert gate.demonstrated(run, 0)[1] == []
