"""What bench.action_map says of two simulators: paired, in percent, by kind of replay."""

import math

import pytest
import torch

from bench.action_map import AHEAD, MIDDLE, compared, errors
from worldenv.config import SimulatorConfig
from worldenv.data.windows import FrameSequence
from worldenv.envs.libero.robot import embodiment
from worldenv.models.simulator import Simulator
from worldenv.runtime.seeds import generator


def episode(number: int, frames: int) -> FrameSequence:
    g = generator("episode", number)
    return FrameSequence(
        images=torch.randint(0, 255, (frames, 2, 16, 16, 3), dtype=torch.uint8, generator=g),
        proprio=torch.randn(frames, 8, generator=g),
        actions=torch.randn(frames - 1, 8, 7, generator=g),
        success=torch.zeros(frames, dtype=torch.bool),
        steps=8 * torch.arange(frames),
        episode=number,
        task=0,
        instruction="go",
    )


def test_every_replay_is_measured_at_each_distance():
    torch.manual_seed(0)
    config = SimulatorConfig(width=48, layers=1, heads=2, patch=8)
    model = Simulator(config, embodiment(16)).eval()  # untrained: it keeps nearly what it sees
    real = [episode(k, frames) for k, frames in enumerate((9, 13, 17))]
    rows = list(errors(model, real, 1, 0))
    replays = 3 + sum(len(s) > begin + 8 for s in real for begin in MIDDLE)
    assert len(rows) == len(AHEAD) * replays
    assert {r["from"] for r in rows} == {"first frame", "mid-episode"}
    for row in rows:
        assert row["mse"] == pytest.approx((row["mse_view_0"] + row["mse_view_1"]) / 2)
    still = [r for r in rows if r["from"] == "first frame" and r["ahead"] == 1]
    for row, s in zip(still, real, strict=True):
        copied = ((s.images[0].float() - s.images[1]) / 255).square().mean()
        assert row["mse"] == pytest.approx(float(copied), rel=0.1)
        moved = 1000 * float((s.proprio[0] - s.proprio[1])[:3].norm())
        assert row["effector_mm"] == pytest.approx(moved, rel=0.01)


def test_differences_are_paired_and_in_percent_of_the_first_arm():
    def rows(scale):
        return [
            {"from": "first frame", "ahead": 1, "episode": k, "mse": scale * m, "mse_moving": v}
            for k, (m, v) in enumerate([(0.01, None), (0.03, 0.1), (0.02, 0.3)])
        ]

    whole, moving = compared({"none": rows(1.0), "map": rows(0.9)})
    assert (whole["error"], moving["error"]) == ("mse", "mse_moving")
    assert (whole["replays"], moving["replays"]) == (3, 2)
    assert whole["mean"] == {"none": pytest.approx(0.02), "map": pytest.approx(0.018)}
    assert whole["psnr"]["none"] == pytest.approx(-10 * math.log10(0.02), abs=1e-3)
    mean, low, high = whole["difference_percent"]["map"]
    assert mean == pytest.approx(-10)
    assert -15 <= low < -10 < high <= -5
    assert moving["difference_percent"]["map"] == [0, 0, 0]
