"""The result of a comparison, from which the report, its figures and the W&B page are made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np

from lightning_dlrm.compare.runs import Arm, Run, by_data, data_differences
from lightning_dlrm.compare.scores import Scores, Split
from lightning_dlrm.compare.statistics import (
    HIGHER_IS_BETTER,
    METRICS,
    Components,
    Difference,
    Interval,
    Metric,
    Reliability,
    Verdict,
    components,
    difference,
    over_seeds,
    reliability,
    verdict,
)
from lightning_dlrm.contracts.errors import UserError

METRIC_TITLES: Mapping[str, str] = {
    "auc": "AUC",
    "log_loss": "log loss",
    "accuracy": "accuracy",
    "normalized_entropy": "normalized entropy",
    "calibration": "calibration",
}


OTHER_DATA = (
    "their data differ, so they share no sample, the interval takes the sides as independent, and the difference is of "
    "data and models together"
)
"""Meaning of an interval if --force compares runs of different data."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two configurations under one metric."""

    a: str
    b: str
    metric: Metric
    difference: Difference
    """The difference a minus b."""
    verdict: Verdict
    reason: str
    """Reason of the verdict, as text."""
    single: Sequence[str]
    """Names of the sides with one seed."""
    same_data: bool
    """Whether both sides were trained and scored on the same data."""

    @property
    def word(self) -> str:
        """Return the verdict for a table."""
        given = "none: one seed" if self.single else self.verdict.replace("_", " ")
        return given if self.same_data else f"{given} (different data)"

    @property
    def headline(self) -> str:
        """Return the verdict in a few words."""
        title = METRIC_TITLES[self.metric]
        if self.single:
            return f"{self.a} and {self.b} by {title}: no verdict"
        if not self.same_data:
            found = "are not distinguishable" if self.verdict == "not_distinguishable" else "differ"
            return f"{title} of {self.a} and of {self.b}, each on its own data, {found}"
        if self.verdict == "not_distinguishable":
            return f"{self.a} and {self.b} are not distinguishable by {title}"
        winner, loser = (self.a, self.b) if self.verdict == "a_better" else (self.b, self.a)
        return f"{winner} is better than {loser} by {title}"

    @property
    def details(self) -> str:
        """Return the numbers behind the verdict."""
        interval = self.difference.interval
        span = f"{interval.value:+.5f}, 95% interval {interval.low:+.5f} to {interval.high:+.5f}"
        if self.single:
            seeds = "one seed a side" if len(self.single) == 2 else f"one seed of {self.single[0]}"
            text = (
                f"{seeds} does not show the variation over seeds; train more seeds (--seeds) (difference {span}, "
                "without this variation)"
            )
            return text if self.same_data else f"{text}; {OTHER_DATA}"
        if not self.same_data:
            return f"{self.a} minus {self.b} {span}; {OTHER_DATA}"
        if self.verdict == "not_distinguishable":
            return f"{self.reason} (difference {span})"
        near, far = sorted((abs(interval.low), abs(interval.high)))
        word = "higher" if HIGHER_IS_BETTER[self.metric] else "lower"
        return f"{abs(interval.value):.5f} {word}, 95% interval {near:.5f} to {far:.5f}"

    @property
    def sentence(self) -> str:
        """Return headline and details."""
        return f"{self.headline}: {self.details}."


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Configurations with their runs, scored on one split."""

    title: str
    split: Split
    arms: Sequence[Arm]
    scores: Mapping[str, Scores]
    """Run name -> its scores."""
    pairs: Sequence[Pair]
    warnings: Sequence[str]
    """Reasons against comparing the runs; empty unless --force was given."""

    @property
    def one_seed(self) -> bool:
        """Whether every configuration has a single run."""
        return all(len(arm.runs) == 1 for arm in self.arms)

    @property
    def scored(self) -> str:
        """Return a description of the scored samples."""
        data = by_data(self.arms)
        counts = {title: len(self.scores[arms[0].runs[0].name].labels) for title, arms in data.items()}
        if len(data) == 1:
            return f"the {next(iter(counts.values())):,} samples of the {self.split} split"
        listed = [f"{counts[title]:,} of {title} for {', '.join(a.name for a in arms)}" for title, arms in data.items()]
        return f"the samples of the {self.split} splits of different data ({'; '.join(listed)})"

    @property
    def runs(self) -> list[Run]:
        return [run for arm in self.arms for run in arm.runs]

    def values(self, arm: Arm, metric: str) -> list[float]:
        """Return a metric of each run of a configuration."""
        return [self.scores[run.name].metrics[metric] for run in arm.runs]

    def interval(self, arm: Arm, metric: str) -> Interval | None:
        """Return the mean over the seeds and its 95% interval; None for a single seed."""
        return over_seeds(self.values(arm, metric))

    def steady(self, name: str) -> bool:
        """Whether a time differs at most 1.5 times between the runs of each configuration.

        If it differs more, other work slowed the machine down, and times say nothing about the configurations.
        """
        return all(high <= _STEADY * low for low, high in (span(arm, name) for arm in self.arms))

    @cached_property
    def reliability(self) -> dict[str, Reliability]:
        """Configuration -> reliability of all its runs together."""
        return {
            arm.name: reliability(
                np.concatenate([self.scores[run.name].probabilities for run in arm.runs]),
                np.concatenate([self.scores[run.name].labels for run in arm.runs]),
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
                "verdict": pair.verdict,
                "reason": pair.reason,
            }
            for pair in self.pairs
        ]
        return {"runs": runs, "pairs": pairs}


_STEADY = 1.5


def span(arm: Arm, name: str) -> tuple[float, float]:
    """Return the smallest and the largest value of a metric at the end of a configuration's runs."""
    values = [run.final[name] for run in arm.runs if run.final.get(name) is not None]
    return min(values, default=0.0), max(values, default=0.0)


def check_data(runs: Sequence[Run], force: bool) -> list[str]:
    """Check that all runs were trained on the same data, splits and protocol.

    Returns:
        With ``force``, a line for each difference.

    Raises:
        UserError: without ``force``, the data differ.
    """
    found = data_differences(runs)
    if found and not force:
        listed = "\n".join(f"  {line}" for line in found)
        raise UserError(
            "these runs are of different data, so their scores cannot be compared (--force compares them all the same, "
            f"with a warning on every figure):\n{listed}"
        )
    return found


def compare(
    arms: Sequence[Arm], scores: Mapping[str, Scores], *, title: str, split: Split, warnings: Sequence[str] = ()
) -> Comparison:
    """Compare every two configurations under every metric.

    Raises:
        UserError: there are fewer than two configurations.
    """
    if len(arms) < 2:
        runs = ", ".join(run.name for arm in arms for run in arm.runs)
        raise UserError(f"{runs}: all of one configuration; give runs of at least two to compare")
    pairs = []
    for metric in METRICS:
        parts = {
            arm.name: [components(metric, scores[run.name].probabilities, scores[run.name].labels) for run in arm.runs]
            for arm in arms
        }
        pairs += [_pair(metric, a, b, parts) for a, b in combinations(arms, 2)]
    return Comparison(title=title, split=split, arms=arms, scores=scores, pairs=pairs, warnings=list(warnings))


def _pair(metric: Metric, a: Arm, b: Arm, parts: Mapping[str, list[Components]]) -> Pair:
    paired = a.seeds == b.seeds and len(a.seeds) > 1
    same = a["data_fingerprint"] == b["data_fingerprint"]
    found = difference(parts[a.name], parts[b.name], paired=paired, same_samples=same)
    single = [arm.name for arm in (a, b) if len(arm.seeds) < 2]
    if single:
        given: Verdict = "not_distinguishable"
        counts = "includes the test samples only" if len(single) == 2 else "leaves its seeds out"
        reason = (
            f"one seed of {' and of '.join(single)} does not show the variation over seeds, and the interval {counts}"
        )
    else:
        given = verdict(metric, found.interval)
        share = found.seed_variance / (found.seed_variance + found.sample_variance or 1.0)
        how = f"{len(a.seeds)} seeds in pairs" if found.paired else f"{len(a.seeds)} and {len(b.seeds)} seeds"
        leaves = "holds" if given == "not_distinguishable" else "leaves out"
        reason = f"the interval {leaves} 0 with {how}; {100 * share:.0f}% of the variance is the seeds'"
    if not same:
        reason += f"; {OTHER_DATA}"
    return Pair(
        a=a.name, b=b.name, metric=metric, difference=found, verdict=given, reason=reason, single=single, same_data=same
    )
