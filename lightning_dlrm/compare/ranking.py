"""The answer of a comparison in a few sentences, and its configurations ranked by their mean AUC."""

import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from lightning_dlrm.compare.pairs import Pair
from lightning_dlrm.compare.results import Comparison, pair_of, ranked, sample_counts
from lightning_dlrm.compare.runs import Arm, by_data
from lightning_dlrm.compare.statistics import Interval, Metric, Score
from lightning_dlrm.compare.training_length import fall_words, improving_words
from lightning_dlrm.contracts.errors import joined

_SHOWN_NAMES = 4
"""Most configurations that a title or a sentence lists by name; of more it gives the number."""


def title_of(arms: Sequence[Arm]) -> str:
    """Return a comparison's title in words, such as "DLRM and DCN under SGD and Adagrad, demo data"."""
    data = by_data(arms)
    if len(data) > 1:
        return " and ".join(f"{_listed([arm.name for arm in of_data])} on {name}" for name, of_data in data.items())
    protocol = arms[0]["protocol"]
    # Generated data and logs with a schema of their own have no named protocol.
    named = protocol not in ("demo", "random", "trace", "schema")
    on = f"{_data(arms[0])}{f' (protocol {protocol})' * named}"
    both = [(_network(arm), _class(arm, "table_optimizer")) for arm in arms]
    networks, rules = (list(dict.fromkeys(part)) for part in zip(*both, strict=True))
    crossed = len(set(both)) == len(networks) * len(rules) == len(arms)
    if len(networks) == len(arms):
        # The rest of the report has the names of the configurations.
        networks = [
            network + f" ({arm.name})" * (network.lower().replace(" ", "") != arm.name.lower())
            for network, arm in zip(networks, arms, strict=True)
        ]
    elif not crossed:
        return f"{_listed([arm.name for arm in arms])}, {on}"
    under = f" under {_listed(rules)}" if crossed and len(rules) > 1 else ""
    return f"{_listed(networks)}{under}, {on}"


def _data(arm: Arm) -> str:
    """Return the name of a configuration's data in a sentence."""
    made = "generated " * (arm["dataset"] != "demo" and arm.runs[0].generated)
    return f"{made}{arm['dataset']} data"


def is_figure5(arms: Sequence[Arm]) -> bool:
    """Return whether configurations are those of Figure 5 of Naumov et al. (2019), on its data or demo data."""
    both = sorted((_network(arm), _class(arm, "table_optimizer")) for arm in arms)
    data = {arm["dataset"] for arm in arms}
    return data <= {"kaggle", "demo"} and both == [(n, rule) for n in ("DCN", "DLRM") for rule in ("Adagrad", "SGD")]


def _class(arm: Arm, part: str) -> str:
    return str(arm.settings.get(f"model.{part}.class_path")).rpartition(".")[2]


def _network(arm: Arm) -> str:
    """Return the name of a configuration's network in words."""
    name = _class(arm, "network")
    version_2 = name == "DCN" and arm.settings.get("model.network.init_args.cross", "vector") != "vector"
    return _in_words(name) + " v2" * version_2


def _in_words(name: str) -> str:
    """Return the name of a class in words.

    >>> [_in_words(name) for name in ("LogisticRegression", "WideAndDeep", "DeepFM", "DLRM")]
    ['Logistic regression', 'Wide and deep', 'DeepFM', 'DLRM']
    """
    return re.sub(r"(?<=[a-z])[A-Z](?=[a-z])", lambda found: f" {found[0].lower()}", name)


def _listed(words: Sequence[str]) -> str:
    if len(words) > _SHOWN_NAMES:
        return f"{len(words)} configurations"
    return joined(words, "and")


def with_spread(comparison: Comparison, metric: Score, digits: int = 5) -> list[str]:
    """Return the mean of a metric of each ranked configuration, with the standard deviation over its seeds in brackets;
    then that of the click rate alone. All have the same number of decimals."""
    cells = []
    for arm in ranked(comparison):
        values = comparison.values(arm, metric)
        spread = f"{np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        if spread and not float(spread):
            spread = f"below {10**-digits:.{digits}f}"
        cells.append(f"{np.mean(values):.{digits}f}" + f" ({spread})" * bool(spread))
    return [*cells, *(f"{value:.{digits}f}" for name, value in comparison.click_rate_alone.items() if name == metric)]


def behind(comparison: Comparison, arm: Arm) -> str:
    """Return how far a configuration is behind the first, with its interval; empty for the first, or if data differ."""
    first, *others = ranked(comparison)
    if arm is first or comparison.warnings:
        return ""
    return distances([pair_of(comparison, first, other) for other in others])[others.index(arm)]


def distances(pairs: Sequence[Pair]) -> list[str]:
    """Format differences and their intervals with the same number of digits."""
    digits = max(_digits(pair.interval) for pair in pairs)
    return [distance(pair.interval, digits) for pair in pairs]


def distance(interval: Interval, digits: int | None = None) -> str:
    """Format a difference and its interval; by default with as many digits as the interval is certain of."""
    digits = digits or _digits(interval)
    return f"{interval.value:.{digits}f} ({interval.low:.{digits}f} to {interval.high:.{digits}f})"


def _digits(interval: Interval) -> int:
    reach, value = interval.high - interval.value, abs(interval.value)
    # A difference that is small against its interval has a digit that is not 0.
    certain = [1 - math.floor(math.log10(reach)) if reach > 0 else 5, -math.floor(math.log10(value)) if value else 0]
    if interval.low * interval.high > 0:
        # The end that is near 0 is not shown as 0, which the interval excludes.
        certain.append(-math.floor(math.log10(min(abs(interval.low), abs(interval.high)))))
    return min(max(*certain, 3), 5)


def answer(comparison: Comparison) -> list[str]:
    """Return which configuration is best, by how much, how surely and on what data, in one sentence, after those that
    did not train; then paragraphs: the reason, with the log loss and the samples; doubts; what to do."""
    failed, chance, look = _untrained(comparison)
    reason = remedy = ""
    if comparison.warnings:
        head = "No ranking: the runs are of different data."
    elif sum(len(comparison.random_runs(arm)) < len(arm.runs) for arm in comparison.arms) < 2:
        # Between a model and none, or between none and none.
        head, reason = "This is not a comparison of models.", _highest(comparison)
    else:
        head, reason, remedy = _verdict(comparison)
    but, rise, longer = improving_words(comparison)
    fall, shorter = fall_words(comparison)
    on = f"Scored on {comparison.scored}{_demo(comparison)}."
    paragraphs = [
        [failed, head, but],
        [chance, reason, on],
        [rise, fall, *_unequal(comparison)],
        [look, longer, shorter, remedy],
    ]
    texts = [" ".join(filter(None, sentences)) for sentences in paragraphs]
    return [text for text in texts if text]


def _untrained(comparison: Comparison) -> tuple[str, str, str]:
    """Return which configurations did not train, all of their seeds or some; which AUC counts as random; and what to
    look at; empty if all trained."""
    wholly: dict[str, str] = {}
    sentences, found = [], []
    for arm in ranked(comparison):
        runs = comparison.random_runs(arm)
        if not runs:
            continue
        found.append(arm.name)
        if len(runs) == len(arm.runs):
            wholly[arm.name] = f"{np.mean(comparison.values(arm, 'auc')):.4f}"
        else:
            seeds = f"seed{'s' * (len(runs) > 1)} {joined([str(run.seed) for run in runs], 'and')}"
            sentences.append(
                f"{arm.name} did not train with {seeds}: AUC no better than random; its mean includes "
                f"{'it' if len(runs) == 1 else 'them'}."
            )
    if wholly:
        aucs = list(wholly.values())
        of = joined(aucs, "and") if len(aucs) <= _SHOWN_NAMES else f"{min(aucs)} to {max(aucs)}"
        is_no_better = f"its AUC of {of} is" if len(wholly) == 1 else f"their AUCs of {of} are"
        sentences.insert(0, f"{joined(list(wholly), 'and')} did not train: {is_no_better} no better than random.")
    if not found:
        return "", "", ""
    limit = ""
    if not comparison.warnings:
        samples = comparison.scores[comparison.runs[0].name].samples
        limit = f" Here an AUC up to {0.5 + samples.chance:.4f} counts as random: 0.5 plus {samples.chance_words}."
    return (
        " ".join(sentences),
        f"Random predictions have an AUC of 0.5 on average.{limit}",
        "Look at the training log loss of "
        f"{joined(found, 'and')} in the report, under 'Accuracy and log loss while training': if it stays above that "
        "of the click rate alone, train longer or with higher learning rates; if it rises or jumps, with lower ones.",
    )


def _highest(comparison: Comparison) -> str:
    """Return which configuration has the highest AUC, and how far it is above the second."""
    first, second, *_ = ranked(comparison)
    return f"{first.name} has the highest AUC, {_mean_auc(comparison, first)}, {_above(comparison, first, second)}."


def _mean_auc(comparison: Comparison, arm: Arm) -> str:
    return f"{np.mean(comparison.values(arm, 'auc')):.4f}"


def _above(comparison: Comparison, first: Arm, second: Arm) -> str:
    amount, interval = distance(pair_of(comparison, first, second).interval).split(" ", 1)
    return f"{amount} above {second.name} (95% interval {interval.strip('()')})"


def _verdict(comparison: Comparison) -> tuple[str, str, str]:
    """Return which of the configurations is best, by how much, how surely and on what data, in one sentence; then why
    there is no verdict, and what the log loss says; and what makes a verdict more likely."""
    first, second, *_ = arms = ranked(comparison)
    pairs = [pair_of(comparison, first, arm) for arm in arms[1:]]
    auc, above = _mean_auc(comparison, first), _above(comparison, first, second)
    undecided = [pair for pair in pairs if not (pair.decided or pair.single)]
    single = [pair.loser for pair in pairs if pair.single]
    more_seeds = _more_seeds(comparison, [arm for arm in arms if len(arm.seeds) < 2])
    lead = remedy = ""
    on, highest = f"on {_data(first)}", f"{first.name} has the highest AUC, {auc}, {above}"
    if pairs[0].single and not undecided:
        head = f"No verdict from one seed {on}: {highest}."
        reason = pairs[0].reason
        lead, remedy = f"{reason[0].upper()}{reason[1:]}.", more_seeds
    elif undecided:
        head = f"No clear winner {on}: {highest}, {_seeds(comparison)}."
        why, remedy = _why_undecided(comparison, undecided)
        lead = " ".join([why, *(f"{s}." for s in _decided(comparison, "auc"))])
    else:
        head = f"{first.name} wins {on}: AUC {auc}, {above}, {_seeds(comparison)}."
        if single:
            head += f" With one seed there is no verdict against {_listed(single)}."
            remedy = more_seeds
    return head, " ".join(filter(None, [lead, _by_log_loss(comparison, first, second)])), remedy


def _why_undecided(comparison: Comparison, undecided: Sequence[Pair]) -> tuple[str, str]:
    """Return over which others the first has no verdict, and why; and what makes one more likely."""
    name, said = ranked(comparison)[0].name, []
    if level := [pair.loser for pair in undecided if pair.unadjusted == pair.verdict]:
        said.append(f"{name} is not distinguishable from {_listed(level)}: the interval contains 0.")
    if leads := _by_adjustment(comparison, undecided):
        said.append(f"{leads[0].upper()}{leads[1:]}.")
    share, samples = undecided[0].difference.seed_share, comparison.scores[comparison.runs[0].name].samples
    if share > 0.5:
        said.append(f"With {_seeds(comparison)}, {share:.0%} of the uncertainty comes from the seeds.")
        return " ".join(said), _more_seeds(comparison, ranked(comparison))
    of = f"the {len(samples.labels):,} {comparison.split} samples"
    said.append(f"{1 - share:.0%} of the uncertainty comes from {of}.")
    return " ".join(said), f"A larger {comparison.split} split helps more than more seeds."


def _by_adjustment(comparison: Comparison, undecided: Sequence[Pair]) -> str:
    """Return which leads are no verdict although their intervals exclude 0; empty without one."""
    over: dict[str, list[str]] = {}
    for winner, loser in _adjusted_away(undecided):
        over.setdefault(winner, []).append(loser)
    if not over:
        return ""
    verdicts = sum(not pair.single for pair in comparison.pairs)
    leads = joined([f"{winner} over {_listed(losers)}" for winner, losers in over.items()], "and")
    one = sum(map(len, over.values())) == 1
    are = f"lead of {leads} is" if one else f"leads of {leads} are"
    excludes = "its interval excludes 0" if one else "their intervals exclude 0"
    return f"the {are} too uncertain for a verdict after adjustment for {verdicts} comparisons, although {excludes}"


def _adjusted_away(pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    """Return winner and loser of each pair that has a verdict without adjustment only."""
    return [(pair.winner, pair.loser) for pair in pairs if not pair.single and pair.unadjusted != pair.verdict]


def _decided(comparison: Comparison, metric: Metric, except_pair: Pair | None = None) -> list[str]:
    """Return which configurations are better than which, by the verdicts under a metric on all pairs but one."""
    better: dict[str, list[str]] = {}
    for pair in comparison.pairs:
        if pair.metric == metric and pair.decided and pair is not except_pair:
            better.setdefault(pair.loser, []).append(pair.winner)
    losers: dict[tuple[str, ...], list[str]] = {}
    for loser, winners in better.items():
        losers.setdefault(tuple(winners), []).append(loser)
    return [
        f"{_listed(winners)} {'is' if len(winners) == 1 else 'are'} better than {_listed(of)}"
        for winners, of in losers.items()
    ]


def _more_seeds(comparison: Comparison, arms: Sequence[Arm]) -> str:
    """Return how to train some configurations with more seeds: for an experiment the option for at least five seeds, or
    twice as many as now, the present ones first. Empty if none of them trained."""
    arms = [arm for arm in arms if len(comparison.random_runs(arm)) < len(arm.runs)]
    if not arms:
        return ""
    if not comparison.experiment:
        return (
            f"Train {_listed([arm.name for arm in arms])} again with other values of seed_everything, and give those "
            "runs too."
        )
    present = max((arm.seeds for arm in comparison.arms), key=len)
    more = max(5 - len(present), len(present) if len(present) > 2 else 0)
    seeds = [*present, *range(max(present) + 1, max(present) + 1 + more)]
    return f"Train more seeds: --seeds {','.join(map(str, seeds))}."


def _by_log_loss(comparison: Comparison, first: Arm, second: Arm) -> str:
    """Return what the log loss says of all configurations; empty without a verdict on the first two."""
    near, by_auc = (pair_of(comparison, first, second, metric) for metric in ("log_loss", "auc"))
    if near.single:
        return ""
    others = [pair_of(comparison, first, arm, "log_loss") for arm in ranked(comparison)[1:]]
    undecided = [pair for pair in others if not (pair.decided or pair.single)]
    level = [({pair.a, pair.b} - {first.name}).pop() for pair in undecided if pair.unadjusted == pair.verdict]
    said = [f"{first.name} is not distinguishable from {_listed(level)}"] if level else []
    by_auc_alone = _adjusted_away([pair_of(comparison, first, arm) for arm in ranked(comparison)[1:]])
    same = f"the same {'lead is' if len(by_auc_alone) == 1 else 'leads are'} too uncertain"
    as_by_auc = bool(by_auc_alone) and _adjusted_away(undecided) == by_auc_alone
    said += filter(None, [same if as_by_auc else _by_adjustment(comparison, undecided)])
    decided = _decided(comparison, "log_loss", near)
    agrees = near.winner == first.name if by_auc.decided and near.decided else by_auc.decided == near.decided
    if near.decided:
        interval = near.interval
        lower = distance(Interval(value=-interval.value, low=-interval.high, high=-interval.low))
        too = " too" * agrees
        than = f" than {near.loser}" * (len(comparison.arms) > 2)
        said.insert(0, f"{near.winner} is better{than}{too}, lower by {lower}")
    return f"By log loss{', however,' * (not agrees)} {'; '.join([*said, *decided])}."


def _unequal(comparison: Comparison) -> list[str]:
    """Return which configurations have other seeds, and which were trained on how many samples; empty if all are
    equal."""
    said = []
    if seeds := _by_value(comparison, lambda arm: ", ".join(map(str, arm.seeds))):
        said.append(
            f"Seeds differ ({seeds}), so the runs are not taken in pairs; equal seeds can make intervals shorter."
        )
    if counts := _by_value(comparison, sample_counts):
        said.append(f"Trained on different numbers of samples: {counts}.")
    return said


def _by_value(comparison: Comparison, value: Callable[[Arm], str]) -> str:
    """Return the configurations with each value; empty if all have the same."""
    of_value: dict[str, list[str]] = {}
    for arm in ranked(comparison):
        of_value.setdefault(value(arm), []).append(arm.name)
    return "; ".join(f"{', '.join(arms)} {found}" for found, arms in of_value.items()) if len(of_value) > 1 else ""


def _seeds(comparison: Comparison) -> str:
    fewest, most = (f([len(arm.runs) for arm in comparison.arms]) for f in (min, max))
    return f"{fewest} seeds each" if fewest == most else f"{fewest} to {most} seeds"


def _demo(comparison: Comparison) -> str:
    if not any(arm.runs[0].generated for arm in comparison.arms):
        return ""
    return ": generated clicks, which say nothing about real ones"
