"""Contract: intervals of a comparison are those of the books, and count both the seeds and the test samples."""

import itertools
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import expit
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss, roc_auc_score

from lightning_dlrm.compare.statistics import (
    UNGROUPED_SCORES,
    Interval,
    components,
    difference,
    holm,
    mean_interval,
    reliability,
    verdict,
)
from lightning_dlrm.contracts.batch import NO_GROUP
from lightning_dlrm.objectives.metrics import click_metrics


def clicks(samples: int, seed: int = 0) -> tuple[Any, Any]:
    """Labels and probabilities with many ties."""
    random = np.random.default_rng(seed)
    labels = (random.random(samples) < 0.3).astype(np.int8)
    return labels, np.clip((0.3 * labels + random.random(samples)).round(1) / 1.5, 0.01, 0.99).astype(np.float32)


def test_components_have_the_metric_as_their_mean() -> None:
    labels, probabilities = clicks(500)
    (losses,) = components("log_loss", probabilities, labels)
    assert losses.mean() == pytest.approx(log_loss(labels, probabilities.astype(float)), abs=1e-12)
    for stratum in components("auc", probabilities, labels):
        assert stratum.mean() == pytest.approx(roc_auc_score(labels, probabilities), abs=1e-12)


def test_auc_components_are_counts_over_the_other_class() -> None:
    labels, probabilities = clicks(60)
    clicked, others = probabilities[labels == 1], probabilities[labels == 0]
    wins = (clicked[:, None] > others) + 0.5 * (clicked[:, None] == others)
    below, above = components("auc", probabilities, labels)
    np.testing.assert_allclose(below, wins.mean(1), atol=1e-12)
    np.testing.assert_allclose(above, wins.mean(0), atol=1e-12)


def test_one_run_a_side_has_the_variance_of_delong() -> None:
    labels, first = clicks(80)
    second = clicks(80, seed=3)[1]
    found = difference([components("auc", first, labels)], [components("auc", second, labels)], paired=False)
    # DeLong et al. (1988), equations 5 to 8, written out.
    covariances = []
    for label in (1, 0):
        rows = []
        for scores in (first, second):
            own, other = scores[labels == label], scores[labels != label]
            wins = [np.mean([(x > y) + 0.5 * (x == y) for y in other]) for x in own]
            rows.append(wins if label else [1 - win for win in wins])
        covariances.append(np.cov(rows) / len(rows[0]))
    total = covariances[0] + covariances[1]
    variance = total[0, 0] + total[1, 1] - 2 * total[0, 1]
    assert found.sample_variance == pytest.approx(variance, rel=1e-9)
    z = NormalDist().inv_cdf(0.975)
    assert found.interval.high - found.interval.value == pytest.approx(z * variance**0.5, rel=1e-9)


def constant(values: list[float], samples: int = 50) -> list[Any]:
    """Runs whose every sample has the same value: only the seeds vary."""
    return [(np.full(samples, value),) for value in values]


def test_where_only_seeds_vary_the_interval_is_students_and_welchs() -> None:
    a, b = [0.71, 0.74, 0.72, 0.75], [0.70, 0.72, 0.73, 0.71]
    paired = difference(constant(a), constant(b), paired=True)
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (paired.interval.low, paired.interval.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert paired.seed_share == pytest.approx(1) and difference(constant(a), constant(a), paired=True).seed_share == 0
    welch = difference(constant(a), constant(b[:3]), paired=False)
    result = stats.ttest_ind(a, b[:3], equal_var=False)
    expected = result.confidence_interval(0.95)
    assert (welch.interval.low, welch.interval.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert welch.degrees_of_freedom == pytest.approx(result.df, rel=1e-12)
    assert paired.p == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-9)
    assert welch.p == pytest.approx(result.pvalue, rel=1e-9)
    mean = mean_interval(constant(a))
    assert mean is not None
    assert (mean.low, mean.high) == pytest.approx(stats.t.interval(0.95, 3, np.mean(a), stats.sem(a)), abs=1e-12)


def test_the_samples_part_is_the_covariance_of_different_seeds() -> None:
    random = np.random.default_rng(1)
    samples, seeds = 40, 4
    a, b = (random.normal(size=(seeds, samples)) + random.normal(size=samples) for _ in range(2))
    as_runs = [[(row,) for row in side] for side in (a, b)]
    d = a - b
    paired = np.mean([np.cov(d[i], d[j])[0, 1] for i, j in itertools.permutations(range(seeds), 2)])
    found = difference(*as_runs, paired=True)
    assert found.sample_variance == pytest.approx(paired / samples, rel=1e-9)
    of_seeds = stats.t.ppf(0.975, seeds - 1) ** 2 * found.seed_variance
    reach = found.interval.high - found.interval.value
    assert found.seed_share == pytest.approx(of_seeds / reach**2, rel=1e-6)
    own = [np.mean([np.cov(x[i], x[j])[0, 1] for i, j in itertools.permutations(range(seeds), 2)]) for x in (a, b)]
    across = np.mean([np.cov(x, y)[0, 1] for x in a for y in b])
    found = difference(*as_runs, paired=False)
    assert found.sample_variance == pytest.approx((sum(own) - 2 * across) / samples, rel=1e-9)


def test_sides_scored_on_other_samples_vary_apart() -> None:
    random = np.random.default_rng(2)
    a, b = random.normal(size=(3, 30)), random.normal(size=(3, 50))
    found = difference([(x,) for x in a], [(x,) for x in b], paired=True, same_samples=False)
    assert not found.paired
    parts = 0.0
    for side in (a, b):
        pairs = itertools.permutations(range(3), 2)
        parts += np.mean([np.cov(side[i], side[j])[0, 1] for i, j in pairs]) / side.shape[1]
    assert found.sample_variance == pytest.approx(max(parts, 0.0), rel=1e-9)


def test_intervals_hold_the_truth_where_seeds_and_samples_both_vary() -> None:
    random = np.random.default_rng(3)
    seeds, samples, repetitions = 3, 100, 400
    for paired in (True, False):
        missed = 0
        for _ in range(repetitions):
            shared = random.normal(0, 0.1, seeds) if paired else 0.0
            sides = []
            for _ in range(2):
                effects = shared + random.normal(0, 0.05, seeds)
                sides.append(effects[:, None] + random.normal(0, 0.5, samples) + random.normal(size=(seeds, samples)))
            found = difference(*([(row,) for row in side] for side in sides), paired=paired)
            missed += not found.interval.low <= 0 <= found.interval.high
        assert missed <= 0.08 * repetitions


def test_equal_runs_differ_by_nothing() -> None:
    labels, probabilities = clicks(100)
    runs = [components("auc", probabilities, labels)] * 2
    found = difference(runs, runs, paired=True)
    assert found.interval == Interval(value=0.0, low=0.0, high=0.0)
    assert found.p == 1.0


def test_verdicts_know_which_way_is_better() -> None:
    assert (verdict("auc", 0.2, 0.04), verdict("auc", -0.2, 0.04)) == ("a_better", "b_better")
    assert (verdict("log_loss", 0.2, 0.04), verdict("log_loss", -0.2, 0.04)) == ("b_better", "a_better")
    assert verdict("auc", 0.1, 0.05) == "not_distinguishable"


def test_the_p_value_is_the_level_of_the_interval_that_touches_zero() -> None:
    random = np.random.default_rng(4)
    for shift in (0.0, 0.3, 3.0, 30.0):
        a = random.normal(size=(4, 1)) * 0.1 + random.normal(size=60) * 0.5 + random.normal(size=(4, 60)) * 0.2 + shift
        found = difference([(row,) for row in a], constant([0.0] * 4, 60), paired=True)
        t, z = stats.t.ppf(found.p / 2, found.degrees_of_freedom), stats.norm.ppf(found.p / 2)
        reach = np.hypot(t * found.seed_variance**0.5, z * found.sample_variance**0.5)
        assert reach == pytest.approx(abs(found.interval.value), rel=1e-6)
        assert (found.p < 0.05) == (not found.interval.low <= 0 <= found.interval.high)


def test_holm_multiplies_by_the_number_of_p_values_that_are_not_smaller() -> None:
    assert holm([0.01, 0.04, 0.03, 0.2]) == pytest.approx([0.04, 0.09, 0.09, 0.2])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_one_class_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="both classes"):
        components("auc", np.array([0.1, 0.2]), np.array([0, 0]))


def test_a_single_seed_has_no_interval() -> None:
    assert mean_interval(constant([0.7])) is None


def test_the_auc_by_group_is_the_mean_of_the_components_of_groups() -> None:
    labels, probabilities = clicks(1500)
    logits = torch.logit(torch.from_numpy(probabilities.astype(float)))
    random = np.random.default_rng(1)
    groups = random.integers(0, 150, 1500)
    # Left out: one label, and no group.
    groups[labels == 0] = np.where(groups[labels == 0] < 20, 20, groups[labels == 0])
    groups[:100] = NO_GROUP

    def group_auc(rows: Any, groups: Any) -> Any:
        return click_metrics(logits[rows], torch.from_numpy(labels[rows]), groups_N=torch.from_numpy(groups))

    (stratum,) = components("group_auc", probabilities, labels, groups)
    expected = group_auc(np.arange(1500), groups)
    assert stratum.mean() == pytest.approx(expected["group_auc"], abs=1e-12)
    assert (len(stratum), expected["groups_left_out"]) == (expected["groups"], len(set(groups)) - 1 - len(stratum))
    # The variance of a single run is that of the bootstrap of whole groups.
    rows_of = [np.flatnonzero(groups == group) for group in set(groups.tolist()) - {NO_GROUP}]
    resampled = []
    for _ in range(300):
        drawn = random.integers(0, len(rows_of), len(rows_of))
        numbers = np.repeat(np.arange(len(drawn)), [len(rows_of[group]) for group in drawn])
        resampled.append(group_auc(np.concatenate([rows_of[group] for group in drawn]), numbers)["group_auc"])
    assert np.var(stratum, ddof=1) / len(stratum) == pytest.approx(np.var(resampled), rel=0.25)


@pytest.mark.parametrize("metric", UNGROUPED_SCORES)
def test_every_score_is_the_mean_of_its_components(metric: Any) -> None:
    labels, probabilities = clicks(500)
    logits = torch.logit(torch.from_numpy(probabilities.astype(float)))
    expected = click_metrics(logits, torch.from_numpy(labels))[metric]
    for stratum in components(metric, probabilities, labels):
        assert stratum.mean() == pytest.approx(expected, abs=1e-9)
    # The variance of a single run over the samples is that of the bootstrap.
    random = np.random.default_rng(0)
    drawn = [random.integers(0, 500, 500) for _ in range(600)]
    resampled = [click_metrics(logits[rows], torch.from_numpy(labels[rows]))[metric] for rows in drawn]
    variance = sum(np.var(stratum) / len(stratum) for stratum in components(metric, probabilities, labels))
    assert variance == pytest.approx(np.var(resampled), rel=0.2)


def test_runs_that_are_calibrated_are_shown_as_calibrated() -> None:
    """Each run knows another part of what decides a click, so that their mean prediction is too near the middle."""
    random, (nodes, weights) = np.random.default_rng(2), np.polynomial.hermite_e.hermegauss(41)
    parts = random.normal(0, 1, (4, 200_000))
    labels = (random.random(200_000) < expit(parts.sum(axis=0) - 1.2)).astype(np.int8)
    # The expected click rate, given one of the four parts.
    runs = [expit(part[:, None] - 1.2 + 3**0.5 * nodes) @ weights / weights.sum() for part in parts]
    found, of_mean = reliability(runs, labels), reliability([np.mean(runs, axis=0)], labels)
    assert np.mean((found.low <= found.predicted) & (found.predicted <= found.high)) >= 0.9
    assert np.mean((of_mean.low <= of_mean.predicted) & (of_mean.predicted <= of_mean.high)) < 0.5


def test_wilsons_interval_is_that_of_scipy() -> None:
    labels, _ = clicks(1000)
    found = reliability([np.arange(1000.0)], labels, groups=7)
    for number, part in enumerate(np.array_split(labels, 7)):
        interval = stats.binomtest(int((part > 0).sum()), len(part)).proportion_ci(0.95, "wilson")
        assert (found.low[number], found.high[number]) == pytest.approx((interval.low, interval.high), abs=1e-12)


def test_reliability_is_that_of_scikit_learn() -> None:
    labels, _ = clicks(1000)
    probabilities = np.random.default_rng(5).random(1000).astype(np.float32)
    found = reliability([probabilities], labels, groups=10)
    shares, predicted = calibration_curve(labels, probabilities.astype(float), n_bins=10, strategy="quantile")
    np.testing.assert_allclose(found.predicted, predicted, atol=2e-3)
    np.testing.assert_allclose(found.clicked, shares, atol=2e-2)
    assert (found.low < found.clicked).all() and (found.clicked < found.high).all()


def test_the_interval_of_a_group_without_clicks_includes_0() -> None:
    probabilities = np.random.default_rng(1).random(1000)
    for label in (0, 1):
        found = reliability([probabilities, probabilities[::-1]], np.full(1000, label))
        assert (found.low <= label).all() and (found.high >= label).all()
