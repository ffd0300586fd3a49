"""Contract: over simulated scores of known truth, intervals hold it as often as they say, and equal configurations are
seldom called different. No model is trained; every seed is fixed here.

The tables of docs/statistics.md: pytest -m slow -s tests/compare/test_compare_coverage.py
"""

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from lightning_dlrm.compare.statistics import (
    SIGNIFICANCE,
    Components,
    Metric,
    components,
    difference,
    holm,
    mean_interval,
    reliability,
)
from tests.planted_runs import UNGROUPED

SETTINGS = {"samples dominate": (0.02, 1.0), "both": (0.15, 1.0), "seeds dominate": (0.5, 0.4)}
"""Deviations of a logit from the sample's own: by the seed alone, and by the configuration and the sample."""
ROWS = 400


class World:
    """Labels, and the scores of configurations with their seeds; every configuration errs as much as another.

    A run's logit is the sample's own, times a factor of the run, plus an error of the configuration on that sample
    and one of the run: all drawn anew, so that the expected scores are equal.
    """

    def __init__(self, setting: str, arms: int, seeds: int, seed: int, better: float = 0.0) -> None:
        random = np.random.default_rng((list(SETTINGS).index(setting), arms, seeds, seed))
        by_seed, by_arm = SETTINGS[setting]
        truth = random.normal(-1.2, 1.0, ROWS)
        self.labels = (random.random(ROWS) < 1 / (1 + np.exp(-truth))).astype(np.int8)
        self.runs: list[list[NDArray[np.float64]]] = []
        shared = random.normal(0, by_seed, seeds)  # of the seed: the order of the training samples
        for arm in range(arms):
            error = random.normal(0, by_arm * (1 - better * (arm == 0)), ROWS)
            factors = 1 - np.abs(shared + random.normal(0, by_seed, seeds)) / 2
            noise = random.normal(0, 0.2, (seeds, ROWS))
            self.runs.append(
                [1 / (1 + np.exp(-(factor * truth + error + z))) for factor, z in zip(factors, noise, strict=True)]
            )

    def components(self, metric: Metric) -> list[list[Components]]:
        return [[components(metric, run, self.labels) for run in arm] for arm in self.runs]


def family(setting: str, sets: range, better: float = 0.0) -> NDArray[np.float64]:
    """Share of experiments of four configurations and five seeds with a verdict, without and with Holm's adjustment:
    [any of all verdicts, verdicts between the first and another] x [without, with]."""
    found = np.zeros((2, 2))
    for seed in sets:
        world = World(setting, 4, 5, seed, better)
        p_values, of_first = [], []
        for metric in UNGROUPED:
            parts = world.components(metric)
            for a, b in combinations(range(4), 2):
                p_values.append(difference(parts[a], parts[b], paired=True).p)
                of_first.append(a == 0)
        for adjusted, values in enumerate((p_values, holm(p_values))):
            decided = np.array(values) < SIGNIFICANCE
            found[:, adjusted] += decided.any(), decided[of_first].mean()
    return found / len(sets)


def coverage(setting: str, seeds: int, sets: range) -> NDArray[np.float64]:
    """Share of intervals with the truth: of the difference of two configurations, and of a configuration's mean, by
    log loss. The truth of the mean is that of 400 other sets."""
    truth = np.mean(
        [
            components("log_loss", run, world.labels)[0].mean()
            for n in range(400)
            for world in [World(setting, 1, 2, 10**6 + n)]
            for run in world.runs[0]
        ]
    )
    found = np.zeros(2)
    for seed in sets:
        a, b = World(setting, 2, seeds, seed).components("log_loss")
        of_difference, of_mean = difference(a, b, paired=True).interval, mean_interval(a)
        assert of_mean
        found += of_difference.low <= 0 <= of_difference.high, of_mean.low <= truth <= of_mean.high
    return found / len(sets)


def calibration_coverage(seeds: int, sets: range) -> float:
    """Share of groups whose bar holds the group's expected share of clicks."""
    held = []
    for seed in sets:
        random = np.random.default_rng((7, seeds, seed))
        truth = 1 / (1 + np.exp(-random.normal(-1.2, 1.0, 4000)))
        labels = (random.random(4000) < truth).astype(np.int8)
        runs = [np.clip(truth + random.normal(0, 0.01, 4000), 0.001, 0.999) for _ in range(seeds)]
        found = reliability(runs, labels)
        sorted_by_run = [truth[np.argsort(run, kind="stable")] for run in runs]
        expected = np.mean([[part.mean() for part in np.array_split(of, 20)] for of in sorted_by_run], axis=0)
        held += ((found.low <= expected) & (expected <= found.high)).tolist()
    return float(np.mean(held))


@pytest.mark.parametrize("seeds", [1, 2, 5, 10])
def test_calibration_bars_hold_the_expected_share(seeds: int) -> None:
    assert 0.93 <= calibration_coverage(seeds, range(50)) <= 0.97


def test_few_experiments_of_equal_configurations_have_a_verdict() -> None:
    without, adjusted = family("both", range(150))[0]
    assert without > 0.1 and adjusted <= 0.08
    assert family("both", range(20), better=0.9)[1, 1] > 0.6, "a better configuration is still found"


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_family_wise_errors_and_power(setting: str) -> None:
    equal = family(setting, range(4000))
    print(f"\n{setting}: experiments with a false verdict {equal[0, 0]:.1%}, adjusted {equal[0, 1]:.1%}")
    assert equal[0, 1] <= 0.06
    for better in (0.3, 0.6, 0.9):
        power = family(setting, range(10_000, 10_300), better)[1]
        print(f"  the first errs {better:.0%} less: verdicts in its favour {power[0]:.1%}, adjusted {power[1]:.1%}")


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("setting", SETTINGS)
def test_coverage(setting: str, seeds: int) -> None:
    of_difference, of_mean = coverage(setting, seeds, range(2000))
    print(f"\n{setting}, {seeds} seeds: difference {of_difference:.3f}, mean of one configuration {of_mean:.3f}")
    assert of_difference >= 0.94 and of_mean >= 0.93
