"""Two configurations under one metric: the difference, the verdict, and both in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_dlrm.compare.numbers import p_text
from lightning_dlrm.compare.runs import Arm
from lightning_dlrm.compare.statistics import (
    HIGHER_IS_BETTER,
    SCORES,
    Difference,
    Interval,
    Metric,
    Score,
    Verdict,
    verdict,
)
from lightning_dlrm.contracts.terminal import counted
from lightning_dlrm.tracking import names

WORDS: Mapping[Verdict, str] = {
    "a_better": "better",
    "b_better": "better",
    "not_distinguishable": "not distinguishable",
    "none": "none: one seed",
}
"""Verdict -> its words on the side with the better mean, in every table."""

METRIC_TITLES: Mapping[Score, str] = {score: names.title_of(score) for score in SCORES}

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
    """By ``p_adjusted``; ``none`` if a side has one seed."""
    unadjusted: Verdict
    """By the p-value of the difference alone."""
    p_adjusted: float | None
    """The p-value of the difference, adjusted for all verdicts of the comparison; None without a verdict."""
    reason: str
    """Reason of the verdict, as text."""
    single: Sequence[str]
    """Names of the sides with one seed."""
    same_data: bool
    """Whether both sides were trained and scored on the same data."""
    untrained: Sequence[str]
    """Names of the sides whose every run has an AUC no better than random."""

    @property
    def word(self) -> str:
        """Return the verdict on the winner, for a table."""
        given = self._word_of(self.verdict)
        if self.untrained:
            return f"no verdict, because {' and '.join(self.untrained)} did not train"
        return given if self.same_data else f"{given} (different data)"

    @property
    def kind(self) -> str:
        """Return the verdict without names, for a legend."""
        if self.untrained:
            return "no verdict, because a side did not train"
        if self.single:
            return "no verdict from one seed"
        return "they differ (verdict)" if self.decided else WORDS[self.verdict]

    @property
    def unadjusted_word(self) -> str:
        """Return the verdict on the winner without adjustment, and its p-value; a dash without a verdict."""
        if self.single or self.untrained:
            return "-"
        return f"{self._word_of(self.unadjusted)}, p {p_text(self.difference.p)}"

    def _word_of(self, verdict: Verdict) -> str:
        return WORDS[verdict] if self.same_data else WORDS[verdict].replace("better", "differ")

    @property
    def seed_variance(self) -> float | None:
        """The part of the variance that comes from the sides with several seeds; None if there is none."""
        return None if len(self.single) == 2 else self.difference.seed_variance

    @property
    def winner(self) -> str:
        """The side with the better mean, whether or not the verdict says so."""
        value = self.difference.interval.value
        return self.a if not value or (value > 0) == HIGHER_IS_BETTER[self.metric] else self.b

    @property
    def loser(self) -> str:
        """The other side."""
        return self.b if self.winner == self.a else self.a

    @property
    def interval(self) -> Interval:
        """The difference winner minus loser."""
        found = self.difference.interval
        if self.winner == self.a:
            return found
        return Interval(value=-found.value, low=-found.high, high=-found.low)

    @property
    def decided(self) -> bool:
        """Whether the verdict is that the two differ."""
        return self.verdict in ("a_better", "b_better")

    @property
    def worded(self) -> bool:
        """Whether a sentence says more than that the two are not distinguishable."""
        return self.decided or bool(self.single or self.untrained) or not self.same_data

    @property
    def headline(self) -> str:
        """Return the verdict in a few words, or which side did not train."""
        title = METRIC_TITLES[self.metric]
        if self.untrained:
            return f"{self.winner} and {self.loser} by {title}: {self.word}"
        if self.single:
            return f"no verdict on {self.winner} and {self.loser} by {title}"
        if not self.same_data:
            found = "differ" if self.decided else "are not distinguishable"
            return f"{title} of {self.a} and of {self.b}, each on its own data, {found}"
        if not self.decided:
            return f"{self.winner} and {self.loser} are not distinguishable by {title}"
        return f"{self.winner} is better than {self.loser} by {title}"

    @property
    def details(self) -> str:
        """Return the numbers behind the verdict."""
        interval = self.interval
        word = "higher" if HIGHER_IS_BETTER[self.metric] else "lower"
        span = f"95% interval {interval.low:+.5f} to {interval.high:+.5f}"
        difference = f"{self.winner} minus {self.loser} {interval.value:+.5f}, {span}"
        if not self.same_data and not self.single:
            return f"{difference}; {OTHER_DATA}"
        if self.untrained:
            return difference
        if not self.decided:
            return f"{self.reason} ({difference})"
        near, far = sorted((abs(interval.low), abs(interval.high)))
        amount = f"{abs(interval.value):.5f} {word}"
        return f"{amount}, 95% interval {near:.5f} to {far:.5f}, adjusted p {p_text(self.p_adjusted)}"

    @property
    def sentence(self) -> str:
        """Return headline and details."""
        return f"{self.headline}: {self.details}."


def same_data(a: Arm, b: Arm) -> bool:
    """Return whether two configurations were trained and scored on the same data."""
    same: bool = a["data_fingerprint"] == b["data_fingerprint"]
    return same


def with_one_seed(a: Arm, b: Arm) -> list[str]:
    """Return the names of configurations with one seed."""
    return [arm.name for arm in (a, b) if len(arm.seeds) < 2]


def make_pair(
    a: Arm,
    b: Arm,
    metric: Metric,
    found: Difference,
    *,
    p_adjusted: float | None,
    verdicts: int,
    untrained: Sequence[str],
) -> Pair:
    """Return the verdict on two configurations and its reason.

    Args:
        a: the first.
        b: the second.
        metric: the metric.
        found: the difference.
        p_adjusted: p-value adjusted for all verdicts; None if a side has one seed.
        verdicts: number of verdicts of the comparison.
        untrained: names of the configurations that did not train.
    """
    single, same = with_one_seed(a, b), same_data(a, b)
    given: Verdict = "none"
    unadjusted: Verdict = "none"
    if p_adjusted is None:
        of = "the seeds, because each side" if len(single) == 2 else f"the seeds of {single[0]}, because it"
        reason = f"the interval leaves out the variation over {of} has one seed"
    else:
        given, unadjusted = (verdict(metric, found.interval.value, p) for p in (p_adjusted, found.p))
        how = f"{len(a.seeds)} seeds in pairs" if found.paired else f"{len(a.seeds)} and {len(b.seeds)} seeds"
        contains = "contains" if unadjusted == "not_distinguishable" else "does not contain"
        but = "but " if given != unadjusted else ""
        reason = (
            f"the 95% interval {contains} 0, with {how}, {but}p is {p_text(p_adjusted)} when adjusted for "
            f"{counted(verdicts, 'verdict')} (unadjusted {p_text(found.p)}); {found.seed_share:.0%} of the "
            "uncertainty comes from the seeds"
        )
    if not same:
        reason += f"; {OTHER_DATA}"
    return Pair(
        a=a.name,
        b=b.name,
        metric=metric,
        difference=found,
        verdict=given,
        unadjusted=unadjusted,
        p_adjusted=p_adjusted,
        reason=reason,
        single=single,
        same_data=same,
        untrained=[arm.name for arm in (a, b) if arm.name in untrained],
    )
