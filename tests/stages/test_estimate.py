"""The arithmetic of how long a run will take."""

from contextlib import closing
from dataclasses import asdict, replace

import pytest

from worldenv.config import Config
from worldenv.presets import preset
from worldenv.runtime import parallel
from worldenv.stages import estimate, pipeline
from worldenv.stages.estimate import Costs
from worldenv.stages.reality import Reality

COST = Costs(sample=0.01, window=0.1, judged=0.05, frame=0.01, chunk=0.1)


@pytest.fixture(autouse=True)
def _two_threads():
    parallel.use_threads(2)
    yield
    parallel.use_threads()


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("distilled", [0, 5])
def test_every_stage_but_the_cheapest_is_counted(rounds, distilled):
    config = Config(posttrain=replace(Config().posttrain, rounds=rounds))
    config = replace(config, distill=replace(config.distill, steps=distilled))
    counted = set(estimate.estimate(config, COST))
    cheap = {f"fidelity-{n}" for n in range(rounds)}
    assert counted == set(pipeline.steps(config)) - cheap


def test_seconds_follow_from_costs():
    stages = estimate.estimate(Config(), COST)
    assert stages["sft"] == pytest.approx(1000 * 32 * 0.01)
    assert stages["simulator-0"] == pytest.approx(1000 * 0.1)
    slower = estimate.estimate(Config(), replace(COST, sample=0.03, chunk=0.3))
    assert slower["explore-0"] == pytest.approx(3 * stages["explore-0"])
    assert slower["simulator-0"] == stages["simulator-0"]
    instant = estimate.estimate(Config(), replace(COST, sample=0, chunk=0))
    assert instant["explore-0"] == 0
    assert instant["simulator-0"] == stages["simulator-0"]


def test_checks_in_reality_are_counted_once():
    """The first check of a later round is of a policy that the round before has checked."""
    checked = replace(Config().posttrain, rounds=2, real_check_every=4)
    config = Config(posttrain=checked)
    without = replace(config, posttrain=replace(checked, real_check_every=0))
    costs = [estimate.estimate(c, COST) for c in (config, without)]
    checks = [costs[0][f"posttrain-{n}"] - costs[1][f"posttrain-{n}"] for n in range(2)]
    assert checks[0] == pytest.approx(3 * checks[1])  # at 0, 4 and 8, and at 4


def test_in_reality_a_run_is_its_real_episodes():
    base = Config().posttrain
    rl = replace(base, world="real", rounds=1, real_check_every=0, iterations=3)
    config = Config(posttrain=rl)
    stages = estimate.estimate(config, COST)
    assert stages.keys() == set(pipeline.steps(config))
    explored = estimate.estimate(Config(), COST)["explore-0"] / Config().collect.episodes
    assert stages["posttrain-0"] > 3 * rl.contexts * rl.group * explored
    twice = replace(config, evaluate=replace(config.evaluate, sampled=True))
    assert estimate.estimate(twice, COST)["evaluate"] == pytest.approx(2 * stages["evaluate"])


def test_calibration_times_every_kind_of_work_and_says_it_in_one_line():
    config = preset("smoke")
    with closing(Reality(config)) as reality:
        costs = estimate.calibrate(config, reality)
    assert min(asdict(costs).values()) > 0
    line = estimate.describe(estimate.estimate(config, costs))
    assert "\n" not in line
    assert "2 threads" in line


def test_what_takes_no_minute_is_not_listed():
    """Seven stages of `1 min` each were to make `about 1 min` on `1 threads`."""
    parallel.use_threads(1)
    short = estimate.describe({"demonstrations": 9.0, "sft": 3.0, "fidelity-0": 0.0})
    assert short == "about 1 min on 1 thread of this machine"
    long = estimate.describe({"sft": 240.0, "explore-0": 100.0, "explore-1": 80.0, "evaluate": 9.0})
    assert long.endswith("about 7 min on 1 thread of this machine: sft 4 min, explore 3 min")
