"""Intervals of the difference between two configurations, over seeds and test samples.

Two configurations, each trained with several seeds, are scored on the same test samples. Seeds and samples are
random, and crossed: every trained model scores every sample. Studies in which several readers judge the same cases have
this design, and the analysis follows Obuchowski and Rockette (1995), with the covariances of DeLong et al. (1988). The
variance of the difference of the means over n seeds is

    V = s^2 / n + C

s^2 is the variance of the per-seed differences on these samples. C is the part of the samples: the covariance of two
*different* seeds' differences through the samples that they share. (The variance of a single seed over the samples
would count the randomness of its training twice.) C is 0 or more.

s^2 is estimated from few seeds and C from many samples, so each has its own quantile, and the interval is the mean
difference plus or minus

    sqrt(t(df)^2 s^2 / n + z^2 C)

The p-value is 1 minus the confidence at which this interval touches 0.

A common t quantile, with Satterthwaite's degrees of freedom as in Hillis (2007), gives intervals that are too short
for two seeds: it called up to 13% of equal sides different. If the seeds are taken in pairs, df is n - 1; otherwise
s^2 / n is the sum over both sides, and df is Welch's.

A metric is the mean of a number for each sample: for the log loss the cross-entropy; for the AUC DeLong's structural
components, separately for clicked and for other samples; for ratios of means their linear expansion. The AUC by group
is such a ratio over the groups, which take the place of the samples: groups are taken as independent, the samples of a
group are not.

The verdicts of an experiment are adjusted for their number as in Holm (1979): if all configurations are equal, at most
5% of experiments have a verdict that says otherwise.

Shape suffixes: S seeds, N samples, M samples of a stratum.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from lightning_dlrm.objectives.metrics import group_aucs

LEVEL = 0.95
"""Confidence of every interval."""
SIGNIFICANCE = 0.05
"""A verdict needs a smaller p-value."""

Metric = Literal["auc", "log_loss", "group_auc"]
METRICS: tuple[Metric, ...] = get_args(Metric)
"""Metrics with verdicts; ``group_auc`` only if the samples have groups."""
Score = Literal["auc", "log_loss", "accuracy", "normalized_entropy", "calibration", "group_auc"]
SCORES: tuple[Score, ...] = get_args(Score)
"""All scores; ``group_auc`` only if the samples have groups."""
UNGROUPED_SCORES: tuple[Score, ...] = tuple(score for score in SCORES if score != "group_auc")
HIGHER_IS_BETTER: dict[Metric, bool] = {"auc": True, "log_loss": False, "group_auc": True}

Verdict = Literal["a_better", "b_better", "not_distinguishable", "none"]

Components: TypeAlias = tuple[NDArray[np.float64], ...]
"""Numbers of a run's samples, [M] for each stratum; their mean is the metric."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value and its confidence interval of LEVEL."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference of two configurations, the first minus the second."""

    interval: Interval
    seed_variance: float
    """Part of the variance that comes from the seeds."""
    sample_variance: float
    """Part of the variance that comes from the test samples."""
    degrees_of_freedom: float
    """Degrees of freedom of ``seed_variance``; infinite if the seeds do not vary, or do not count."""
    p: float
    """Probability of a difference at least this large between equal configurations."""
    paired: bool
    """Whether the seeds were taken in pairs."""

    @property
    def seed_share(self) -> float:
        """Share of the squared width of the interval that comes from the seeds; the test samples have the rest."""
        seeds, both = (
            _reach(SIGNIFICANCE, self.seed_variance, samples, self.degrees_of_freedom) ** 2
            for samples in (0.0, self.sample_variance)
        )
        return seeds / both if both else 0.0


def components(
    metric: Score,
    probabilities_N: NDArray[np.floating],
    labels_N: NDArray[np.integer],
    groups_N: NDArray[np.int64] | None = None,
) -> Components:
    """Return a number for each sample (of ``group_auc`` for each group with both labels), in strata; the mean of each
    stratum is the metric.

    Args:
        metric: see ``click_metrics``.
        probabilities_N: probabilities of a click.
        labels_N: labels, 0 or 1; both occur.
        groups_N: groups of the samples, for ``group_auc``.

    Raises:
        ValueError: one of the classes is missing.
    """
    clicked = labels_N > 0
    if clicked.all() or not clicked.any():
        raise ValueError("samples of both classes are needed")
    if metric == "auc":
        return _auc_components(probabilities_N[clicked], probabilities_N[~clicked])
    if metric == "group_auc":
        assert groups_N is not None
        samples, aucs = group_aucs(probabilities_N, labels_N, groups_N)
        has_both = ~np.isnan(aucs)
        weights = samples[has_both].astype(np.float64)
        return (_ratio(aucs[has_both] * weights, weights),)
    doubles_N = probabilities_N.astype(np.float64)
    if metric == "accuracy":
        return ((clicked == (doubles_N >= 0.5)).astype(np.float64),)
    if metric == "calibration":
        return (_ratio(doubles_N, clicked.astype(np.float64)),)
    # A float32 cannot represent probabilities that are nearer to 1.
    bounded = np.clip(doubles_N, 2.0**-25, 1 - 2.0**-25)
    losses = -np.log(np.where(clicked, bounded, 1 - bounded))
    if metric == "log_loss":
        return (losses,)
    # The linear expansion of the entropy of the click rate.
    rate = clicked.mean()
    return (_ratio(losses, -np.log(np.where(clicked, rate, 1 - rate))),)


def _ratio(above_N: NDArray[np.float64], below_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the linear expansion of mean(above) / mean(below) in the samples; its mean is the ratio."""
    ratio = above_N.mean() / below_N.mean()
    expanded: NDArray[np.float64] = ratio + (above_N - ratio * below_N) / below_N.mean()
    return expanded


def _auc_components(clicked_M: NDArray[np.floating], others_M: NDArray[np.floating]) -> Components:
    """Return the structural components of DeLong et al. (1988), equations 4 and 5; a tie counts one half.

    Returns:
        For each clicked sample the share of other samples with a lower score, and for each other sample the share of
        clicked samples with a higher score.
    """
    ranks = stats.rankdata(np.concatenate([clicked_M, others_M]))
    below = (ranks[: len(clicked_M)] - stats.rankdata(clicked_M)) / len(others_M)
    above = 1 - (ranks[len(clicked_M) :] - stats.rankdata(others_M)) / len(clicked_M)
    return below, above


def mean_interval(runs: Sequence[Components]) -> Interval | None:
    """Return the mean of a configuration's runs and its interval, over seeds and samples; None for a single seed."""
    return _estimate([_strata(runs)], paired=False, same_samples=False).interval if len(runs) > 1 else None


def difference(
    a: Sequence[Components], b: Sequence[Components], *, paired: bool, same_samples: bool = True
) -> Difference:
    """Return the mean of ``a`` minus the mean of ``b``, over seeds and samples.

    If a side has a single run, the variance of its seeds is unknown, and the interval leaves it out.

    Args:
        a: components of each run of the first configuration.
        b: components of each run of the second configuration.
        paired: whether the k-th runs of both sides share a seed, and so the order of the training samples.
        same_samples: whether both sides scored the same samples, in the same order.
    """
    if paired and len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} runs cannot be paired")
    paired = paired and same_samples
    if paired:
        sides = [_strata([tuple(x - y for x, y in zip(*pair, strict=True)) for pair in zip(a, b, strict=True)])]
    else:
        sides = [_strata(a), _strata(b)]
    return _estimate(sides, paired=paired, same_samples=same_samples)


def _estimate(sides: Sequence[Sequence[NDArray[np.float64]]], *, paired: bool, same_samples: bool) -> Difference:
    """Return the mean of one side, or the first minus the second, with its variances.

    Args:
        sides: strata of one or two sides, as ``_strata`` returns them.
        paired: whether a single side is that of paired differences.
        same_samples: whether two sides share their samples.
    """
    means = [np.array([float(np.mean(row)) for row in side[0]]) for side in sides]
    value = float(means[0].mean() - (means[1].mean() if len(means) > 1 else 0.0))
    seed_parts = [float(mean.var(ddof=1)) / len(mean) for mean in means if len(mean) > 1]
    freedoms = [len(mean) - 1 for mean in means if len(mean) > 1]
    sample_part = sum(_between_seeds(stratum) / stratum.shape[1] for side in sides for stratum in side)
    if len(sides) > 1 and same_samples:
        for x, y in zip(*sides, strict=True):
            sample_part -= 2 * float(np.cov(x.mean(0), y.mean(0))[0, 1]) / x.shape[1]
    sample_part = max(sample_part, 0.0)
    seed_part = sum(seed_parts)
    lost = sum(part**2 / freedom for part, freedom in zip(seed_parts, freedoms, strict=True))
    freedom = seed_part**2 / lost if lost > 0 else np.inf
    reach = _reach(SIGNIFICANCE, seed_part, sample_part, freedom)
    return Difference(
        interval=Interval(value=value, low=value - reach, high=value + reach),
        seed_variance=seed_part,
        sample_variance=sample_part,
        degrees_of_freedom=float(freedom),
        p=_p_value(abs(value), seed_part, sample_part, freedom),
        paired=paired,
    )


def _reach(p: float, seed_part: float, sample_part: float, freedom: float) -> float:
    """Return half of the width of the interval of confidence 1 - p."""
    t = special.stdtrit(freedom, p / 2) if seed_part else 0.0
    return float(np.hypot(t * seed_part**0.5, special.ndtri(p / 2) * sample_part**0.5))


def _p_value(distance: float, seed_part: float, sample_part: float, freedom: float) -> float:
    """Return 1 minus the confidence of the interval that just reaches 0 from a distance; 1e-300 stands for less."""
    low, high = np.log(1e-300), 0.0
    for _ in range(50):  # bisection in logarithms, to 12 digits
        middle = (low + high) / 2
        if _reach(np.exp(middle), seed_part, sample_part, freedom) > distance:
            low = middle
        else:
            high = middle
    return float(np.exp(high)) if distance else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number, in the given order (Holm 1979): those below 5% decide a verdict."""
    count, adjusted, largest = len(p_values), [0.0] * len(p_values), 0.0
    for rank, position in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (count - rank) * p_values[position]))
        adjusted[position] = largest
    return adjusted


def _strata(runs: Sequence[Components]) -> list[NDArray[np.float64]]:
    """Return the runs side by side, [S, M] for each stratum."""
    return [np.stack(stratum) for stratum in zip(*runs, strict=True)]


def _between_seeds(stratum_SM: NDArray[np.float64]) -> float:
    """Return the mean covariance over the samples of two different seeds; of a single seed the variance."""
    seeds = len(stratum_SM)
    of_mean = float(stratum_SM.mean(0).var(ddof=1))
    if seeds == 1:
        return of_mean
    own = sum(float(row.var(ddof=1)) for row in stratum_SM)
    return (seeds**2 * of_mean - own) / (seeds * (seeds - 1))


def verdict(metric: Metric, value: float, p: float) -> Verdict:
    """Return which side is better by a difference and its p-value."""
    if p >= SIGNIFICANCE:
        return "not_distinguishable"
    return "a_better" if (value > 0) == HIGHER_IS_BETTER[metric] else "b_better"


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Share of clicks in groups of equal size, by predicted probability."""

    predicted: NDArray[np.float64]
    """Mean probability of each group, the mean over the runs; so is ``clicked``."""
    clicked: NDArray[np.float64]
    """Share of clicks of each group."""
    low: NDArray[np.float64]
    """Lower end of Wilson's interval of that share; ``high`` is the upper end."""
    high: NDArray[np.float64]


def reliability(runs: Sequence[NDArray[np.floating]], labels_N: NDArray[np.integer], groups: int = 20) -> Reliability:
    """Return the reliability of the predictions of runs.

    The samples are sorted by each run's own probabilities and cut into groups; each group is then the mean of that of
    all runs. The mean probability of runs would not do: it is less extreme than the probabilities of each run, so that
    it looks wrong where each run is right.

    Args:
        runs: probabilities [N] of each run.
        labels_N: labels, shape [N].
        groups: number of groups.
    """
    predicted, clicked, places = [], [], []
    for probabilities_N in runs:
        parts = [part for part in np.array_split(np.argsort(probabilities_N, kind="stable"), groups) if len(part)]
        predicted.append([float(np.mean(probabilities_N[part], dtype=np.float64)) for part in parts])
        clicked.append([float(np.mean(labels_N[part] > 0)) for part in parts])
        place_N = np.empty(len(labels_N), np.int16)
        for number, part in enumerate(parts):
            place_N[part] = number
        places.append(place_N)
    share, sizes = np.mean(clicked, axis=0), np.array([len(part) for part in parts])
    # Samples that several runs have in a group count once; the others add to the number of independent clicks.
    common = sum(np.bincount(a[a == b], minlength=len(parts)) for a, b in combinations(places, 2))
    shared = (len(places) * sizes + 2 * common) / len(places) ** 2
    independent = sizes**2 / shared
    # Wilson's interval (1927).
    z = stats.norm.ppf((1 + LEVEL) / 2)
    middle = share + z**2 / (2 * independent)
    reach = z * np.sqrt(share * (1 - share) / independent + (z / (2 * independent)) ** 2)
    low, high = ((middle + side * reach) / (1 + z**2 / independent) for side in (-1, 1))
    # Rounding can put an end on the wrong side of a share of 0 or 1.
    low, high = np.minimum(low, share), np.maximum(high, share)
    return Reliability(predicted=np.mean(predicted, axis=0), clicked=share, low=low, high=high)
