"""Statistics against published values and closed forms."""

import numpy as np
import pytest
import scipy.stats

from worldenv.report.statistics import (
    area_interval,
    area_under_curve,
    bootstrap_difference,
    bootstrap_mean,
    difference_of_rates,
    mcnemar,
    paired_difference,
    pearson,
    roc_curve,
    spearman,
    wilson,
)


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_wilson(successes, episodes, low, high):
    interval = wilson(successes, episodes)
    assert interval.mean == successes / episodes
    assert interval.low == pytest.approx(low, abs=1e-4)
    assert interval.high == pytest.approx(high, abs=1e-4)


def test_wilson_edges():
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0.0, 1.0)
    with pytest.raises(ValueError, match="got 3 of 2"):
        wilson(3, 2)


def test_newcombes_own_example():
    found = difference_of_rates(wilson(56, 70), wilson(48, 80))
    assert found.mean == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    none = difference_of_rates(wilson(10, 10), wilson(10, 10))
    assert (none.low, none.high) == pytest.approx((-0.2775, 0.2775), abs=1e-4)


def test_a_mean_is_as_sure_as_its_values_are_alike():
    values = np.random.default_rng(1).normal(3, 1, 400)
    found = bootstrap_mean(values)
    assert found.mean == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert bootstrap_mean([2.0, 2.0, 2.0]).high == 2.0


def test_correlations_have_intervals():
    x = np.arange(10.0)
    y = x[[1, 0, *range(2, 10)]]  # one swap: the sum of squared ranks' differences is 2
    found = spearman(x, np.exp(y))
    assert found.mean == pytest.approx(1 - 12 / 990)
    assert (found.low, found.high) == pytest.approx((0.9288, 0.9980), abs=1e-3)
    half = 1.96 / np.sqrt(7)
    found = pearson(x, y)
    assert np.arctanh([found.low, found.high]) == pytest.approx(
        [np.arctanh(found.mean) - half, np.arctanh(found.mean) + half], abs=1e-3
    )
    assert np.isnan(pearson(x, [1.0] * 10).mean)
    assert np.isnan(spearman(x, [1.0] * 10).low)


# Gained, lost and p-values of binomial tests computed by hand.
@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (15, 0, 2**-14),
        (12, 1, 28 / 2**13),
        (9, 2, 134 / 2**11),
        (8, 2, 112 / 2**10),
        (3, 3, 1.0),
        (0, 0, 1.0),
    ],
)
def test_mcnemar(gained, lost, p):
    before = [False] * gained + [True] * lost + [True, False]
    after = [True] * gained + [False] * lost + [True, False]
    result = mcnemar(before, after)
    assert (result.gained, result.lost) == (gained, lost)
    assert result.p == pytest.approx(p)


def test_paired_difference_is_the_t_interval_when_clusters_are_single():
    rng = np.random.default_rng(0)
    before, after = rng.normal(0, 0.1, 30), rng.normal(0.2, 0.1, 30)
    change = after - before
    half = 2.0452 * change.std(ddof=1) / np.sqrt(30)
    result = paired_difference(before, after, list(range(30)))
    assert result.mean == pytest.approx(change.mean())
    assert result.low == pytest.approx(change.mean() - half, abs=1e-4)
    assert result.high == pytest.approx(change.mean() + half, abs=1e-4)


def test_repeating_an_episode_adds_no_certainty():
    rng = np.random.default_rng(1)
    before, after = rng.integers(0, 2, 20), rng.integers(0, 2, 20)
    once = paired_difference(before, after, list(range(20)))
    thrice = paired_difference(before.repeat(3), after.repeat(3), np.arange(20).repeat(3).tolist())
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))
    ignored = paired_difference(before.repeat(3), after.repeat(3), list(range(60)))
    assert ignored.high - ignored.low < 0.7 * (once.high - once.low)


def test_paired_interval_covers_the_truth():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(300):
        skill = rng.uniform(-0.3, 0.3, 30).repeat(3)
        before, after = rng.random(90) < 0.4 + skill, rng.random(90) < 0.6 + skill / 2
        result = paired_difference(before, after, np.arange(30).repeat(3).tolist())
        covered += result.low <= 0.2 <= result.high
    assert 0.91 <= covered / 300 <= 0.985


def test_bootstrap_agrees_and_repeats():
    rng = np.random.default_rng(3)
    before, after = rng.random(90) < 0.4, rng.random(90) < 0.8
    clusters = [("task", i // 3) for i in range(90)]
    exact = paired_difference(before, after, clusters)
    resampled = bootstrap_difference(before, after, clusters)
    assert resampled == bootstrap_difference(before, after, clusters)
    assert resampled.mean == pytest.approx(exact.mean)
    assert resampled.low == pytest.approx(exact.low, abs=0.02)
    assert resampled.high == pytest.approx(exact.high, abs=0.02)


@pytest.mark.parametrize("interval", [paired_difference, bootstrap_difference])
def test_one_cluster_tells_nothing(interval):
    result = interval([0, 0, 1], [1, 1, 1], ["a"] * 3)
    assert (result.low, result.high) == (-1.0, 1.0)


def test_no_pairs():
    with pytest.raises(ValueError, match="N > 0 pairs"):
        paired_difference([], [], [])


def test_roc():
    scores, labels = [0.1, 0.4, 0.35, 0.8], [False, False, True, True]
    alarms, hits = roc_curve(scores, labels)
    assert alarms.tolist() == [0, 0, 0.5, 0.5, 1]
    assert hits.tolist() == [0, 0.5, 0.5, 1, 1]
    assert area_under_curve(scores, labels) == 0.75
    assert area_under_curve([0.5] * 6, [True, False] * 3) == 0.5
    with pytest.raises(ValueError, match="both kinds"):
        roc_curve([0.1, 0.2], [True, True])


def test_area_is_the_chance_of_right_order():
    rng = np.random.default_rng(4)
    labels = rng.random(200) < 0.3
    scores = np.round(rng.normal(size=200) + labels, 1)
    gaps = scores[labels][:, None] - scores[~labels]
    assert area_under_curve(scores, labels) == pytest.approx(
        ((gaps > 0) + 0.5 * (gaps == 0)).mean()
    )


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_an_area_of_few_episodes_is_known_as_well_as_is_said(shift):
    rng, truth = np.random.default_rng(0), scipy.stats.norm.cdf(shift / np.sqrt(2))
    labels = [True] * 7 + [False] * 13
    draws = rng.normal(size=(200, 20)) + shift * np.array(labels)
    found = [area_interval(area_under_curve(scores, labels), 7, 13) for scores in draws]
    covered = np.mean([i.low <= truth <= i.high for i in found])
    assert 0.93 <= covered <= 0.99


def test_an_area_of_one_is_not_known_to_be_one():
    sure, unsure = area_interval(1.0, 10, 10), area_interval(1.0, 1, 19)
    assert unsure.low < 0.5 < sure.low < 1.0 == sure.high
    mirrored = area_interval(0.0, 10, 10)
    assert (mirrored.low, mirrored.high) == pytest.approx((0.0, 1 - sure.low), abs=1e-6)
