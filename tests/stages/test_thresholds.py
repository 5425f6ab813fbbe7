"""Two thresholds: where each is put, by episodes whose answer is known, and who may use which."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from worldenv.config import ReflectorConfig
from worldenv.data.windows import FrameSequence
from worldenv.fields import from_dict
from worldenv.models.reflector import NOT_CALIBRATED
from worldenv.presets import preset
from worldenv.runtime.errors import UserError
from worldenv.runtime.seeds import generator
from worldenv.stages import store, thresholds
from worldenv.stages.fidelity import reflector_quality
from worldenv.stages.thresholds import (
    Peaks,
    interval,
    of_reality,
    peaks,
    real,
    stopping,
    threshold_at,
)

SMALL = replace(preset("smoke"), reflector=ReflectorConfig(width=8, encoder_channels=8))


def sequence(frames: int, won_at: int | None) -> FrameSequence:
    """Without pictures; success from frame `won_at` on."""
    success = torch.arange(frames) >= (frames if won_at is None else won_at)
    empty = torch.zeros(frames, 0)
    return FrameSequence(empty, empty, empty, success, torch.arange(frames), 0, 0, "lift the cup")


def found(false: list[float], top: list[float], won: list[bool]) -> Peaks:
    return Peaks(np.array(false), np.array(top), np.array(won))


@pytest.mark.parametrize(
    ("rewards", "won_at", "grace", "false", "top"),
    [
        ([0.9, 0.1, 0.6, 0.8, 0.7], 3, 0, 0.6, 0.8),  # the first frame is not judged
        ([0.9, 0.1, 0.6, 0.8, 0.7], 3, 1, 0.1, 0.8),  # a chunk later it has succeeded
        ([0.0, 0.1, 0.6, 0.3], None, 1, 0.6, 0.6),
        ([0.0, 0.1, 0.2, 0.9], None, 1, 0.9, 0.9),  # at the last frame too it is no success
        ([0.0, 0.8, 0.9], 1, 0, 0.0, 0.9),
    ],
)
def test_a_stop_is_false_where_success_has_not_come_when_the_grace_is_over(
    rewards, won_at, grace, false, top
):
    got = peaks([torch.tensor(rewards)], [sequence(len(rewards), won_at)], grace)
    assert got.false == pytest.approx([false])
    assert got.top == pytest.approx([top])
    assert got.won.tolist() == [won_at is not None]


def test_rates_are_of_episodes_and_of_successes():
    four = found([0.9, 0.2, 0.3, 0.1], [0.9, 0.4, 0.8, 0.9], [False, True, True, True])
    assert four.rates(0.5) == (0.25, pytest.approx(1 / 3))
    assert four[~four.won].rates(0.5) == (1.0, None)


def test_where_both_can_be_had_the_threshold_is_between_them():
    # 40 failures: one may stop falsely. 10 successes: one may be missed.
    false = [*np.linspace(0.1, 0.3, 39), 0.99, *[0.0] * 10]
    tops = [*false[:40], 0.2, *np.linspace(0.7, 0.9, 9)]
    eta = stopping(found(false, tops, [False] * 40 + [True] * 10))
    assert eta == pytest.approx((0.3 + 0.7) / 2)


def test_where_both_cannot_be_had_false_stops_come_first():
    false, top = [0.8] * 10, [0.6] * 10
    episodes = found([*false, *[0.0] * 10], [*false, *top], [False] * 10 + [True] * 10)
    assert stopping(episodes) == 0.8
    assert episodes.rates(0.8) == (0.0, 1.0)


def test_thresholds_stay_within_bounds_whatever_happened():
    assert stopping(found([0.0], [0.0], [True])) == 0.001
    assert stopping(found([1.0], [1.0], [False])) == 0.999


def test_where_nothing_has_succeeded_a_success_may_get_any_reward():
    assert stopping(found([0.4, 0.6], [0.4, 0.6], [False, False])) == pytest.approx(0.8)


def test_an_interval_is_of_the_episodes_and_of_the_seed():
    values = np.array([0.0] * 50 + [1.0] * 50)
    low, high = interval(100, lambda rows: values[rows].mean(), (0, 1), 3)
    assert 0.36 < low < 0.44 < 0.56 < high < 0.64  # 0.5 +- 1.96 * 0.05
    assert [low, high] == interval(100, lambda rows: values[rows].mean(), (0, 1), 3)
    assert interval(1, lambda rows: 0.5, (0.2, 0.7), 3) == [0.2, 0.7]


def test_what_is_recorded():
    record = real(found([0.1, 0.2, 0.0], [0.1, 0.2, 0.8], [False, False, True]), 0)
    low, high = record.pop("real_threshold_interval")
    assert 0.001 <= low <= record["real_threshold"] <= high <= 0.999
    assert record == {
        "real_threshold": 0.5,
        "real_episodes": 3,
        "real_false_stop_rate": 0.0,
        "real_missed_success_rate": 0.0,
    }


def test_imagination_succeeds_as_often_as_reality():
    top = torch.rand(200, generator=generator("top"))
    for rate in (0.1, 0.25, 0.4):
        share = (top > threshold_at(top, rate)).float().mean()
        assert abs(float(share) - rate) < 0.01
    assert abs(threshold_at(top, 0.0) - 0.99) < 1e-6
    assert abs(threshold_at(top, 1.0) - 0.5) < 1e-6


def saved(path, **changes) -> None:
    """A reflector's checkpoint; changes: of its tensors, None takes one away."""
    store.save("reflector", store.build("reflector", SMALL), path)
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
    tensors |= changes
    save_file({k: v for k, v in tensors.items() if v is not None}, path, metadata)


def test_both_come_back_from_a_checkpoint(tmp_path):
    path = tmp_path / "reflector.safetensors"
    saved(path, threshold=torch.tensor(0.25), real_threshold=torch.tensor(0.75))
    judge = store.load("reflector", path)
    assert (float(judge.threshold), of_reality(judge)) == (0.25, 0.75)


def test_one_of_an_older_version_judges_imagined_frames_only(tmp_path, capsys):
    path = tmp_path / "reflector.safetensors"
    saved(path, threshold=torch.tensor(0.25), real_threshold=None)
    judge = store.load("reflector", path)
    assert "no threshold for real frames" in capsys.readouterr().out
    assert float(judge.threshold) == 0.25
    for refused in (of_reality, lambda j: reflector_quality(j, [])):
        with pytest.raises(UserError, match=r"calibrated on real frames, got none.*Run worldenv"):
            refused(judge)


@pytest.mark.parametrize("name", ["threshold", "real_threshold"])
@pytest.mark.parametrize("eta", [0.0, 1.0, 1.5, -0.5])
def test_a_threshold_that_is_none_is_refused(tmp_path, name, eta):
    path = tmp_path / "reflector.safetensors"
    saved(path, **{name: torch.tensor(eta)})
    with pytest.raises(UserError, match=rf"{name}: expected a number above 0 and below 1, got"):
        store.load("reflector", path)
    with pytest.raises(UserError, match=r"threshold: expected a number from 0\.001 to 0\.999"):
        from_dict(type(SMALL), {"reflector": {"threshold": eta}})


def test_a_judge_that_is_not_calibrated_says_so_where_it_is_needed():
    judge = store.build("reflector", SMALL)
    assert float(judge.real_threshold) == NOT_CALIBRATED
    judge.real_threshold.fill_(1.0)
    with pytest.raises(UserError, match="real_threshold: expected a number above 0"):
        of_reality(judge)
    fixed = replace(SMALL, reflector=replace(SMALL.reflector, calibrate=False, threshold=0.6))
    assert of_reality(store.build("reflector", fixed)) == pytest.approx(0.6)


def test_quality_is_by_the_threshold_for_real_frames(monkeypatch):
    judge = store.build("reflector", SMALL)
    judge.threshold.fill_(0.95)
    judge.real_threshold.fill_(0.5)
    rewards = [[0, 0.1, 0.6, 0.7], [0, 0.6, 0.1, 0.1], [0, 0.1, 0.2, 0.3], [0, 0.1, 0.1, 0.2]]
    monkeypatch.setattr(
        "worldenv.stages.fidelity.score", lambda *_: [torch.tensor(r) for r in rewards]
    )
    real_ones = [sequence(4, 2), sequence(4, None), sequence(4, 3), sequence(4, None)]
    got = reflector_quality(judge, real_ones)
    assert (got["false_stop_rate"], got["missed_success_rate"]) == (0.25, 0.5)
    assert got["false_stop_interval"] == [0.0456, 0.6994]  # Wilson, 1 of 4
    assert (got["episodes"], got["successes"]) == (4, 2)


def test_bounds_are_those_of_the_configuration():
    for eta in thresholds.BOUNDS:
        from_dict(type(SMALL), {"reflector": {"threshold": eta}})
