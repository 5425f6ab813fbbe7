"""Statistics of paired evaluations: intervals of success rates, tests of their difference, ROC
curves.

By scipy; our own are what it lacks, the interval clustered by start (the usual cluster-robust one)
and the ROC curve. Between clusters nothing can be learned from a single one: its interval is
[-1, 1]. (`scipy.stats` loads at first use: `import scipy` alone costs a command's start nothing.)
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class McNemar:
    """Pairs that changed: failures that became successes, successes lost, and the exact p-value."""

    gained: int
    lost: int
    p: float


def wilson(successes: int, episodes: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a success rate; [0, 1] when nothing was tried."""
    if not 0 <= successes <= episodes:
        raise ValueError(f"expected 0 <= successes <= episodes, got {successes} of {episodes}")
    if episodes == 0:
        return Interval(0.0, 0.0, 1.0)
    bounds = scipy.stats.binomtest(successes, episodes).proportion_ci(confidence, "wilson")
    return Interval(successes / episodes, float(bounds.low), float(bounds.high))


def difference_of_rates(one: Interval, other: Interval) -> Interval:
    """one - other of two rates with Wilson's intervals, by Newcombe's square-and-add (Statistics in
    Medicine 17, 1998, method 10): never of no width. Of pairs that agree by chance or better it is
    too wide rather than too narrow.
    """
    mean = one.mean - other.mean
    low = math.hypot(one.mean - one.low, other.high - other.mean)
    high = math.hypot(one.high - one.mean, other.mean - other.low)
    return Interval(mean, mean - low, mean + high)


def bootstrap_mean(
    values: Sequence[float], confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> Interval:
    """Mean of N >= 2 independent values with its percentile bootstrap interval."""
    bounds = scipy.stats.bootstrap(
        (np.asarray(values, np.float64),),
        np.mean,
        method="percentile",
        confidence_level=confidence,
        n_resamples=draws,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(np.mean(values)), float(bounds.low), float(bounds.high))


def pearson(x: Sequence[float], y: Sequence[float], confidence: float = 0.95) -> Interval:
    """Correlation of N >= 4 pairs with Fisher's interval; nan throughout where one side is
    constant."""
    with np.errstate(all="ignore"):
        found = scipy.stats.pearsonr(x, y) if np.ptp(x) and np.ptp(y) else None
    if found is None:
        return Interval(math.nan, math.nan, math.nan)
    bounds = found.confidence_interval(confidence)
    return Interval(float(found.statistic), float(bounds.low), float(bounds.high))


def spearman(x: Sequence[float], y: Sequence[float], confidence: float = 0.95) -> Interval:
    """Rank correlation of N >= 4 pairs; the interval is Fisher's with the error of Bonett and
    Wright (Psychometrika 65, 2000), sqrt((1 + r^2 / 2) / (N - 3))."""
    r = pearson(scipy.stats.rankdata(x), scipy.stats.rankdata(y)).mean
    half = scipy.stats.norm.ppf(0.5 + confidence / 2) * math.sqrt((1 + r * r / 2) / (len(x) - 3))
    z = math.atanh(min(max(r, -1 + 1e-12), 1 - 1e-12)) if math.isfinite(r) else r
    return Interval(r, math.tanh(z - half), math.tanh(z + half))


def paired_difference(
    before: Sequence[float],
    after: Sequence[float],
    clusters: Sequence[Hashable],
    confidence: float = 0.95,
) -> Interval:
    """Mean of after - before over N pairs, with a t interval whose errors are clustered.

    `clusters` names the group of each pair, such as its start: pairs of one group may depend on
    each other in any way, groups may not.
    """
    sums, counts, mean = _cluster_sums(before, after, clusters)
    groups, pairs = len(sums), counts.sum()
    if groups < 2:
        return Interval(mean, -1.0, 1.0)
    residual = sums - counts * mean
    error = math.sqrt(groups / (groups - 1) * float((residual**2).sum())) / pairs
    half = float(scipy.stats.t.ppf(0.5 + confidence / 2, groups - 1)) * error
    return Interval(mean, max(mean - half, -1.0), min(mean + half, 1.0))


def bootstrap_difference(
    before: Sequence[float],
    after: Sequence[float],
    clusters: Sequence[Hashable],
    confidence: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The same difference with a percentile bootstrap interval that resamples whole clusters."""
    sums, counts, mean = _cluster_sums(before, after, clusters)
    if len(sums) < 2:
        return Interval(mean, -1.0, 1.0)
    bounds = scipy.stats.bootstrap(
        (sums, counts),
        lambda s, n, axis: s.sum(axis) / n.sum(axis),
        paired=True,
        method="percentile",
        confidence_level=confidence,
        n_resamples=draws,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(bounds.low), float(bounds.high))


def _cluster_sums(
    before: Sequence[float], after: Sequence[float], clusters: Sequence[Hashable]
) -> tuple[np.ndarray, np.ndarray, float]:
    """Sum of differences and number of pairs per cluster, and the mean over all pairs."""
    change = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    if change.ndim != 1 or len(change) == 0 or len(change) != len(clusters):
        raise ValueError(f"expected N > 0 pairs and clusters, got {change.shape}, {len(clusters)}")
    number = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    owner = np.array([number[name] for name in clusters])
    return np.bincount(owner, change), np.bincount(owner).astype(float), float(change.mean())


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> McNemar:
    """McNemar's exact two-sided test on N paired outcomes."""
    first, second = np.asarray(before, bool), np.asarray(after, bool)
    if first.shape != second.shape:
        raise ValueError(f"expected equally many outcomes, got {first.shape} and {second.shape}")
    gained, lost = int((~first & second).sum()), int((first & ~second).sum())
    changed = gained + lost
    return McNemar(gained, lost, scipy.stats.binomtest(gained, changed).pvalue if changed else 1.0)


def roc_curve(scores: Sequence[float], labels: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates [K] from (0, 0) to (1, 1), one point per distinct score.

    ValueError unless both labels occur.
    """
    values, truth = _scored(scores, labels)
    order = np.argsort(-values, kind="stable")
    last = np.append(np.diff(values[order]) != 0, True)
    hits = np.cumsum(truth[order])[last]
    alarms = np.cumsum(~truth[order])[last]
    return (
        np.concatenate([[0.0], alarms / (~truth).sum()]),
        np.concatenate([[0.0], hits / truth.sum()]),
    )


def area_under_curve(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Area under the ROC curve: how often a success outscores a failure, ties counting half.

    ValueError unless both labels occur.
    """
    values, truth = _scored(scores, labels)
    won, lost = values[truth], values[~truth]
    outscored = scipy.stats.mannwhitneyu(won, lost, method="asymptotic").statistic
    return float(outscored) / (len(won) * len(lost))


def area_interval(area: float, won: int, lost: int, confidence: float = 0.95) -> Interval:
    """Of an area under the ROC curve of so many successes and failures, each by itself: Newcombe's
    method 5 (Statistics in Medicine 25, 2006), with the variance of Hanley and McNeil at the bound.
    Never of no width: few episodes say little however well they are ordered.
    """
    z, more = scipy.stats.norm.ppf(0.5 + confidence / 2), (won + lost) / 2 - 1

    def apart(at: float) -> float:
        tails = 1 + more * ((1 - at) / (2 - at) + at / (1 + at))
        return (area - at) ** 2 - z * z * at * (1 - at) * tails / (won * lost)

    tiny = 1e-9  # at the area itself an end of [0, 1] is a root too
    low = scipy.optimize.brentq(apart, 0, min(area, 1 - tiny)) if area > 0 else 0.0
    high = scipy.optimize.brentq(apart, max(area, tiny), 1) if area < 1 else 1.0
    return Interval(area, low, high)


def _scored(scores: Sequence[float], labels: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    values, truth = np.asarray(scores, np.float64), np.asarray(labels, bool)
    if values.shape != truth.shape or truth.all() or not truth.any():
        raise ValueError(
            f"expected scores with labels of both kinds, got {int(truth.sum())} of {truth.size}"
        )
    return values, truth
