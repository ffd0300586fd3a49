"""The result of a comparison, from which the report, its figures and the W&B page are made."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np

from lightning_dlrm.cli.report import published_notes
from lightning_dlrm.compare.options import Split
from lightning_dlrm.compare.pairs import Pair, make_pair, same_data, with_one_seed
from lightning_dlrm.compare.runs import Arm, Run, by_data, data_differences
from lightning_dlrm.compare.scores import Scores
from lightning_dlrm.compare.statistics import (
    METRICS,
    SCORES,
    UNGROUPED_SCORES,
    Components,
    Difference,
    Interval,
    Metric,
    Reliability,
    Score,
    components,
    difference,
    holm,
    mean_interval,
    reliability,
)
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.tracking import names


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Configurations with their runs, scored on one split."""

    title: str
    split: Split
    arms: Sequence[Arm]
    scores: Mapping[str, Scores]
    """Run name -> its scores."""
    pairs: Sequence[Pair]
    intervals: Mapping[tuple[str, Score], Interval | None]
    """(Configuration, metric) -> mean over the seeds with its interval; None for a single seed."""
    warnings: Sequence[str]
    """Reasons against comparing the runs; empty unless --force was given."""
    experiment: bool
    """Whether the runs are those of an experiment, which can train more seeds."""

    @property
    def metrics(self) -> list[Score]:
        """The scores of all runs."""
        return [score for score in SCORES if all(score in self.scores[run.name].metrics for run in self.runs)]

    @property
    def judged(self) -> list[Metric]:
        """The metrics with verdicts."""
        return list(dict.fromkeys(pair.metric for pair in self.pairs))

    @property
    def groups_note(self) -> str:
        """Return what the AUC by group is the mean of; empty without groups."""
        if "group_auc" not in self.metrics:
            return ""
        data = by_data(self.arms)
        found = {title: self.scores[arms[0].runs[0].name].metrics for title, arms in data.items()}
        if len(data) == 1:
            (of_all,) = found.values()
            return (
                f"AUC by group: mean over {of_all['groups']:,} groups with both labels, weighted by samples; "
                f"{of_all['groups_left_out']:,} groups with one label are left out"
            )
        listed = [
            f"{found[title]['groups']:,} counted and {found[title]['groups_left_out']:,} left out of {title} for "
            f"{', '.join(arm.name for arm in arms)}"
            for title, arms in data.items()
        ]
        return (
            "AUC by group: mean over the groups with both labels, weighted by samples; groups with one label are left "
            f"out ({'; '.join(listed)})"
        )

    @property
    def one_seed(self) -> bool:
        """Whether every configuration has a single run."""
        return all(len(arm.runs) == 1 for arm in self.arms)

    @property
    def scored(self) -> str:
        """Return a description of the scored samples."""
        data = by_data(self.arms)
        counts = {title: len(self.scores[arms[0].runs[0].name].samples.labels) for title, arms in data.items()}
        if len(data) == 1:
            return f"the {next(iter(counts.values())):,} samples of the {self.split} split"
        listed = [f"{counts[title]:,} of {title} for {', '.join(a.name for a in arms)}" for title, arms in data.items()]
        return f"the samples of the {self.split} splits of different data ({'; '.join(listed)})"

    @property
    def click_rate_alone(self) -> Mapping[str, float]:
        """Metrics of predicting the click rate of the split for every sample; empty if the data differ."""
        return {} if self.warnings else self.scores[self.runs[0].name].samples.of_click_rate

    @property
    def click_rate_note(self) -> str:
        """Return what the click rate alone is; empty without its metrics."""
        if not self.click_rate_alone:
            return ""
        return f"{CLICK_RATE_ALONE}: the click rate of the {self.split} split as the prediction for every sample"

    def random_runs(self, arm: Arm) -> list[Run]:
        """Return the runs of a configuration whose AUC is no better than that of random predictions; all, if their mean
        is not: initial parameters alone can give an AUC above 0.5."""
        chance = self.scores[arm.runs[0].name].samples.chance
        is_random = bool(np.mean(self.values(arm, "auc")) <= 0.5 + chance)
        return [run for run in arm.runs if is_random or self.scores[run.name].random]

    @property
    def runs(self) -> list[Run]:
        return [run for arm in self.arms for run in arm.runs]

    @property
    def adjustment(self) -> str:
        """Return how verdicts are adjusted for their number; empty without verdicts."""
        judged = sum(not pair.single for pair in self.pairs)
        if not judged:
            return ""
        return (
            f"verdicts and p are adjusted for the {judged} differences by Holm's method: if no configurations differ, "
            "a comparison says otherwise in at most 5% of cases"
        )

    def published(self, arm: Arm) -> list[str]:
        """Return how far a configuration's means are from its published scores."""
        means = {f"{self.split}/{metric}": float(np.mean(self.values(arm, metric))) for metric in self.metrics}
        return [f"{arm.name}: {note}" for note in published_notes(arm.published, means, self.split, arm["dataset"])]

    def values(self, arm: Arm, metric: Score) -> list[float]:
        """Return a metric of each run of a configuration."""
        return [self.scores[run.name].metrics[metric] for run in arm.runs]

    def steady(self, name: str) -> bool:
        """Whether a time differs at most 1.5 times between the runs of each configuration.

        If it differs more, times say nothing about the configurations.
        """
        return all(arm.is_steady(name) for arm in self.arms)

    @cached_property
    def reliability(self) -> dict[str, Reliability]:
        """Configuration -> reliability of the predictions of its runs."""
        return {
            arm.name: reliability(
                [self.scores[run.name].probabilities for run in arm.runs],
                self.scores[arm.runs[0].name].samples.labels,
            )
            for arm in self.arms
        }

    def document(self) -> dict[str, Any]:
        """Return the content of ``report.json``."""
        runs = [
            {
                "name": run.name,
                "arm": arm.name,
                "seed": run.seed,
                "folder": str(run.path),
                "metrics": {f"{self.split}/{name}": v for name, v in self.scores[run.name].metrics.items()},
                "final": dict(run.final),
                "best": dict(run.best),
            }
            for arm in self.arms
            for run in arm.runs
        ]
        pairs = [
            {
                "a": pair.a,
                "b": pair.b,
                "metric": pair.metric,
                "difference": pair.difference.interval.value,
                "low": pair.difference.interval.low,
                "high": pair.difference.interval.high,
                "p": pair.difference.p,
                "p_adjusted": pair.p_adjusted,
                "verdict": pair.verdict,
                "verdict_unadjusted": pair.unadjusted,
                "reason": pair.reason,
                "did_not_train": list(pair.untrained),
                "seed_variance": pair.seed_variance,
                "sample_variance": pair.difference.sample_variance,
                "degrees_of_freedom": (
                    pair.difference.degrees_of_freedom if np.isfinite(pair.difference.degrees_of_freedom) else None
                ),
            }
            for pair in self.pairs
        ]
        arms = [
            {
                "name": arm.name,
                "intervals": {
                    metric: {"mean": found.value, "low": found.low, "high": found.high}
                    for metric in self.metrics
                    if (found := self.intervals[arm.name, metric])
                },
                "seeds_no_better_than_random": [run.seed for run in self.random_runs(arm)],
                "published": [asdict(score) for score in arm.published],
            }
            for arm in self.arms
        ]
        alone = {f"{self.split}/{name}": value for name, value in self.click_rate_alone.items()}
        return {"click_rate_alone": alone, "runs": runs, "arms": arms, "pairs": pairs, "adjustment": "holm"}


CLICK_RATE_ALONE = "click rate alone"
"""Name of the scores that are reached without a model."""


def sample_counts(arm: Arm) -> str:
    """Return the number of samples that a configuration's runs were trained on; both ends if it varies."""
    return " to ".join(f"{count:,.0f}" for count in dict.fromkeys(arm.span(names.SAMPLES)))


def ranked(comparison: Comparison) -> list[Arm]:
    """Return the configurations by their mean AUC, the highest first; in the given order if their data differ."""
    if comparison.warnings:
        return list(comparison.arms)
    return sorted(comparison.arms, key=lambda arm: -np.mean(comparison.values(arm, "auc")))


def pair_of(comparison: Comparison, one: Arm, other: Arm, metric: Metric = "auc") -> Pair:
    """Return two configurations under a metric."""
    return next(
        pair for pair in comparison.pairs if pair.metric == metric and {pair.a, pair.b} == {one.name, other.name}
    )


def check_data(runs: Sequence[Run], force: bool) -> list[str]:
    """Check that all runs were trained on the same data, splits and protocol.

    Returns:
        With ``force``, a line for each difference.

    Raises:
        UserError: without ``force``, the data differ.
    """
    found = data_differences(runs)
    if found and not force:
        # Fingerprints differ whenever something else does.
        first = next((line for line in found if "fingerprint" not in line), found[0])
        raise UserError(
            f"these runs used different data ({first}), so their scores cannot be compared; --force compares them, "
            "with a warning on every figure"
        )
    return found


def compare(
    arms: Sequence[Arm],
    scores: Mapping[str, Scores],
    *,
    title: str,
    split: Split,
    warnings: Sequence[str] = (),
    experiment: bool = False,
) -> Comparison:
    """Compare every two configurations under every metric: see ``Comparison`` for the arguments.

    Raises:
        UserError: there are fewer than two configurations.
    """
    if len(arms) < 2:
        runs = ", ".join(run.name for arm in arms for run in arm.runs)
        raise UserError(f"{runs}: all of one configuration; give runs of at least two to compare")
    found: list[tuple[Arm, Arm, Metric, Difference]] = []
    intervals: dict[tuple[str, Score], Interval | None] = {}
    grouped = all(scores[run.name].samples.groups is not None for arm in arms for run in arm.runs)
    for score in SCORES if grouped else UNGROUPED_SCORES:
        parts = {arm.name: [_components(score, scores[run.name]) for run in arm.runs] for arm in arms}
        intervals |= {(name, score): mean_interval(runs) for name, runs in parts.items()}
        for metric in METRICS:
            for a, b in combinations(arms, 2) if metric == score else ():
                paired = a.seeds == b.seeds and len(a.seeds) > 1
                of_pair = difference(parts[a.name], parts[b.name], paired=paired, same_samples=same_data(a, b))
                found.append((a, b, metric, of_pair))
    adjusted = holm([of_pair.p for a, b, _, of_pair in found if not with_one_seed(a, b)])
    remaining = iter(adjusted)
    untrained = [arm.name for arm in arms if all(scores[run.name].random for run in arm.runs)]
    pairs = [
        make_pair(
            a,
            b,
            metric,
            of_pair,
            p_adjusted=None if with_one_seed(a, b) else next(remaining),
            verdicts=len(adjusted),
            untrained=untrained,
        )
        for a, b, metric, of_pair in found
    ]
    means = {arm.name: np.mean([scores[run.name].metrics["auc"] for run in arm.runs]) for arm in arms}
    # In the order of the ranking.
    pairs.sort(key=lambda pair: (METRICS.index(pair.metric), *sorted((-means[pair.a], -means[pair.b]))))
    return Comparison(
        title=title,
        split=split,
        arms=arms,
        scores=scores,
        pairs=pairs,
        intervals=intervals,
        warnings=list(warnings),
        experiment=experiment,
    )


def _components(score: Score, of_run: Scores) -> Components:
    return components(score, of_run.probabilities, of_run.samples.labels, of_run.samples.groups)
