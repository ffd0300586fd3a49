"""What the runs of two configurations say about their difference: seeds and test samples both count.

Two configurations, each trained with several seeds, are scored on the same test samples. Seeds and samples are
random, and crossed: every trained model scores every sample. This is the setting of studies in which several readers
judge the same cases, and the analysis follows Obuchowski and Rockette (1995), with the covariances of DeLong et al.
(1988). The variance of the difference of the means over n seeds is

    V = s^2 / n + C

where s^2 is the variance of the per-seed differences on the samples at hand, and C what the samples themselves add:
the covariance of two *different* seeds' differences through the samples that they share. (A single seed's variance
over the samples would count the accidents of its training twice.) C cannot be below 0.

s^2 is known from few seeds, C from many samples, so each has a quantile of its own, and the interval reaches

    sqrt(t(df)^2 s^2 / n + z^2 C)

to both sides of the mean difference. One t quantile for both, with the degrees of freedom of Satterthwaite as Hillis
(2007) has them, is too sure with two seeds: it called up to 13% of equal sides different. Where the seeds are taken in
pairs, df is n - 1; else s^2 / n is the sum of both sides' and df is Welch's.

A metric is the mean of one number for each sample: its cross-entropy for the log loss; for the AUC, DeLong's
structural components, within the clicked and within the other samples.

Shape suffixes: S seeds, N samples, M samples of a stratum.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95
"""Confidence of every interval."""

Metric = Literal["auc", "log_loss"]
METRICS: tuple[Metric, ...] = get_args(Metric)
HIGHER_IS_BETTER: dict[Metric, bool] = {"auc": True, "log_loss": False}

Verdict = Literal["a_better", "b_better", "not_distinguishable"]

Components: TypeAlias = tuple[NDArray[np.float64], ...]
"""Of one run: for each stratum one number a sample [M], whose mean is the metric."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value and where it lies with a confidence of LEVEL."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Of two configurations, the first minus the second."""

    interval: Interval
    seed_variance: float
    """The part of the variance that comes from the seeds."""
    sample_variance: float
    """The part that comes from the test samples."""
    degrees_of_freedom: float
    """Of the seeds' part."""
    paired: bool
    """Whether the seeds were taken in pairs."""


def components(metric: Metric, probabilities_N: NDArray[np.floating], labels_N: NDArray[np.integer]) -> Components:
    """One number for each sample, in strata, whose mean in each stratum is the metric.

    Args:
        metric: ``auc`` or ``log_loss``.
        probabilities_N: of a click.
        labels_N: 0 or 1, both of them.

    Raises:
        ValueError: one of the classes is missing.
    """
    clicked = labels_N > 0
    if clicked.all() or not clicked.any():
        raise ValueError("samples of both classes are needed")
    if metric == "auc":
        return _auc_components(probabilities_N[clicked], probabilities_N[~clicked])
    # Nearer to 0 or 1 a float32 cannot tell.
    bounded = np.clip(probabilities_N.astype(np.float64), 2.0**-25, 1 - 2.0**-25)
    return (-np.log(np.where(clicked, bounded, 1 - bounded)),)


def _auc_components(clicked_M: NDArray[np.floating], others_M: NDArray[np.floating]) -> Components:
    """DeLong et al. (1988), equations 4 and 5: of each clicked sample the share of the others that score lower, of
    each other sample the share of the clicked ones that score higher; a tie counts one half."""
    ranks = stats.rankdata(np.concatenate([clicked_M, others_M]))
    below = (ranks[: len(clicked_M)] - stats.rankdata(clicked_M)) / len(others_M)
    above = 1 - (ranks[len(clicked_M) :] - stats.rankdata(others_M)) / len(clicked_M)
    return below, above


def over_seeds(values_S: Sequence[float]) -> Interval | None:
    """Mean of one value a seed and its interval by Student's t; None for a single seed, which has no spread."""
    if len(values_S) < 2:
        return None
    mean = float(np.mean(values_S))
    if np.ptp(values_S) == 0:
        return Interval(value=mean, low=mean, high=mean)
    low, high = stats.ttest_1samp(values_S, 0.0).confidence_interval(LEVEL)
    return Interval(value=mean, low=float(low), high=float(high))


def difference(
    a: Sequence[Components], b: Sequence[Components], *, paired: bool, same_samples: bool = True
) -> Difference:
    """The mean of ``a`` minus that of ``b``, over seeds and samples.

    Args:
        a: of each run of the first configuration.
        b: of each run of the second one.
        paired: the k-th runs of both sides share a seed, so that the accidents of the order count on both alike.
        same_samples: both sides scored the same samples, in the same order.

    Returns:
        With a single run on a side nothing is known of its seeds: then the interval counts only the samples.
    """
    if paired and len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} runs cannot be paired")
    paired = paired and same_samples
    if paired:
        sides = [_strata([tuple(x - y for x, y in zip(*pair, strict=True)) for pair in zip(a, b, strict=True)])]
    else:
        sides = [_strata(a), _strata(b)]
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
    quantile = (1 + LEVEL) / 2
    reach = float(
        np.hypot(stats.t.ppf(quantile, freedom) * seed_part**0.5, stats.norm.ppf(quantile) * sample_part**0.5)
    )
    return Difference(
        interval=Interval(value=value, low=value - reach, high=value + reach),
        seed_variance=seed_part,
        sample_variance=sample_part,
        degrees_of_freedom=float(freedom),
        paired=paired,
    )


def _strata(runs: Sequence[Components]) -> list[NDArray[np.float64]]:
    """Of each stratum the runs side by side: [S, M]."""
    return [np.stack(stratum) for stratum in zip(*runs, strict=True)]


def _between_seeds(stratum_SM: NDArray[np.float64]) -> float:
    """Covariance over the samples of two different seeds, mean over all such pairs; of a single seed its variance."""
    seeds = len(stratum_SM)
    of_mean = float(stratum_SM.mean(0).var(ddof=1))
    if seeds == 1:
        return of_mean
    own = sum(float(row.var(ddof=1)) for row in stratum_SM)
    return (seeds**2 * of_mean - own) / (seeds * (seeds - 1))


def verdict(metric: Metric, interval: Interval) -> Verdict:
    """Which side is better, where the interval of the difference leaves out 0."""
    if interval.low <= 0 <= interval.high:
        return "not_distinguishable"
    return "a_better" if (interval.value > 0) == HIGHER_IS_BETTER[metric] else "b_better"


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """How often samples of about the same predicted probability were clicked: groups of equal size."""

    predicted: NDArray[np.float64]
    """Mean probability of each group."""
    clicked: NDArray[np.float64]
    """Share of clicks of each group."""
    low: NDArray[np.float64]
    """Wilson's interval of that share."""
    high: NDArray[np.float64]


def reliability(probabilities_N: NDArray[np.floating], labels_N: NDArray[np.integer], groups: int = 20) -> Reliability:
    """Cuts the samples, in order of their probability, into groups of equal size."""
    order = np.argsort(probabilities_N, kind="stable")
    parts = [part for part in np.array_split(order, groups) if len(part)]
    clicks = [int(np.sum(labels_N[part] > 0)) for part in parts]
    intervals = [
        stats.binomtest(count, len(part)).proportion_ci(LEVEL, "wilson")
        for count, part in zip(clicks, parts, strict=True)
    ]
    return Reliability(
        predicted=np.array([float(np.mean(probabilities_N[part], dtype=np.float64)) for part in parts]),
        clicked=np.array([count / len(part) for count, part in zip(clicks, parts, strict=True)]),
        low=np.array([float(interval.low) for interval in intervals]),
        high=np.array([float(interval.high) for interval in intervals]),
    )
