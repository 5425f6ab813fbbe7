"""The reflector frame by frame equals the reflector on the whole sequence."""

from dataclasses import replace

import pytest
import torch

from worldenv.config import ReflectorConfig
from worldenv.envs.libero.robot import embodiment
from worldenv.models.reflector import NOT_CALIBRATED, Judge, Reflector
from worldenv.runtime.seeds import generator

SMALL = ReflectorConfig(width=16, encoder_channels=8)
WORDS = ("lift the cup", "open the drawer")


def test_watching_frame_by_frame_equals_the_whole_sequence():
    torch.manual_seed(0)
    reflector = Reflector(SMALL, embodiment(16)).eval()
    g = generator("frames")
    image = torch.randint(0, 255, (2, 5, 2, 16, 16, 3), dtype=torch.uint8, generator=g)
    proprio = torch.randn(2, 5, 8, generator=g)
    with torch.no_grad():
        expected = torch.sigmoid(reflector(image, proprio, WORDS))
    judge, everyone = Judge(reflector, 2), torch.ones(2, dtype=torch.bool)
    got = [judge.watch(image[:, f], proprio[:, f], WORDS, everyone) for f in range(5)]
    torch.testing.assert_close(torch.stack(got, 1), expected, rtol=1e-5, atol=1e-6)
    judge.reset(torch.tensor([True, False]))
    again = judge.watch(image[:, 0], proprio[:, 0], WORDS, torch.tensor([True, False]))
    torch.testing.assert_close(again[0], expected[0, 0], rtol=1e-5, atol=1e-6)
    assert not judge.fresh.any()
    follow = judge.watch(image[:, 4], proprio[:, 4], WORDS, everyone)
    torch.testing.assert_close(follow, expected[:, 4], rtol=1e-5, atol=1e-6)


def test_it_has_two_thresholds_and_one_number_serves_both_where_it_is_fixed():
    judge = Reflector(SMALL, embodiment(16))
    assert (float(judge.threshold), float(judge.real_threshold)) == (
        pytest.approx(SMALL.threshold),
        NOT_CALIBRATED,
    )
    fixed = Reflector(replace(SMALL, calibrate=False, threshold=0.6), embodiment(16))
    assert float(fixed.threshold) == float(fixed.real_threshold) == pytest.approx(0.6)
    assert {"threshold", "real_threshold"} <= fixed.state_dict().keys()
