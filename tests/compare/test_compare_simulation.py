"""Contract: no configuration is called different from itself, and a defect is seen; real fits on planted clicks.

The whole simulation (200 comparisons) is marked slow: pytest -m slow -s tests/compare/test_compare_simulation.py
"""

from collections import Counter

import pytest
import torch

from lightning_dlrm.compare.statistics import difference, verdict
from tests.planted_runs import UNGROUPED, PlantedData, runs

DEFECT = (0, 1)
"""The columns that the defective configuration cannot see: a pair whose product counts."""


def simulate(laws: range, seeds: int, fewer: int) -> Counter[tuple[str, str, int, str]]:
    """Counts the verdicts on a configuration and itself, and on it and a defective one.

    Every comparison draws a planted law, training rows and test rows of its own. Of the configuration there are three
    sets of runs: the first; one with other orders and weights; one with the same orders and other weights. The
    defective one has the orders and weights of the first, or the others.

    Args:
        laws: a comparison for each of these.
        seeds: of a side.
        fewer: verdicts are also taken on so many of them.

    Returns:
        (sides, metric, seeds, verdict) -> how often.
    """
    found: Counter[tuple[str, str, int, str]] = Counter()
    for law in laws:
        data = PlantedData.draw(law)
        # No seed serves twice: a side whose first weights happen to be good would be better under every law.
        own = range(1000 * law, 1000 * law + seeds)
        first = [(seed, seed) for seed in own]
        others = [(100 + seed, 100 + seed) for seed in own]
        same_orders = [(seed, 200 + seed) for seed in own]
        whole, defective = runs(data, first), data.without(DEFECT)
        for sides, b, paired in (
            ("itself, other seeds", runs(data, others), False),
            ("itself, same orders", runs(data, same_orders), True),
            ("defect, other seeds", runs(defective, others), False),
            ("defect, same seeds", runs(defective, first), True),
        ):
            for metric in UNGROUPED:
                for count in (fewer, seeds):
                    of_count = difference(whole[metric][:count], b[metric][:count], paired=paired)
                    found[sides, metric, count, verdict(metric, of_count.interval.value, of_count.p)] += 1
    return found


def test_a_configuration_is_itself_and_a_defect_is_worse() -> None:
    torch.set_num_threads(1)
    found = simulate(range(5), seeds=3, fewer=2)
    for metric in UNGROUPED:
        for sides in ("itself, other seeds", "itself, same orders"):
            assert found[sides, metric, 3, "not_distinguishable"] >= 4
        for sides in ("defect, other seeds", "defect, same seeds"):
            assert found[sides, metric, 3, "a_better"] >= 4


@pytest.mark.slow
def test_two_hundred_comparisons() -> None:
    torch.set_num_threads(1)
    comparisons = 200
    found = simulate(range(1000, 1000 + comparisons), seeds=5, fewer=2)
    for key, times in sorted(found.items()):
        print(*key, times, sep="; ")
    for metric in UNGROUPED:
        for sides in ("itself, other seeds", "itself, same orders"):
            for seeds in (2, 5):
                called_different = comparisons - found[sides, metric, seeds, "not_distinguishable"]
                assert called_different <= 0.08 * comparisons, (sides, metric, seeds)
        for sides in ("defect, other seeds", "defect, same seeds"):
            assert found[sides, metric, 5, "a_better"] >= 0.9 * comparisons, (sides, metric)
