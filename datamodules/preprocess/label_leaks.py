"""Columns that give the label away, so that they are probably known only after the click."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from datamodules.preprocess.columns import Facts, in_order, shortened

_FEWEST_ROWS = 100  # in fewer, values agree with labels by chance
_LEAST_SHARE = 0.01  # of each label, to judge by all rows
_FEW_VALUES = 20
_LEAK = 0.999
_GROUP_ROWS = 20
_CHANCE = 1e-9
"""Probability that a value of an ordinary column occurs only in rows of the rarer label."""
_COVERED = 0.1  # of the rows of the rarer label, by values that occur in no others: single users click always


def find_leak(facts: Facts, times: Sequence[Facts], given: Sequence[bool], labels: Sequence[bool]) -> str | None:
    """Return how a column gives the label of some rows away; None if it does not, as far as a sample tells.

    Args:
        facts: of the column.
        times: the columns of times.
        given: whether each row of the sample has a label.
        labels: of the rows that have one.
    """
    rows, clicks = len(labels), sum(labels)
    if rows < _FEWEST_ROWS or facts.kind in ("empty", "object") or clicks in (0, rows):
        return None
    cells = [cell for cell, labelled in zip(facts.cells, given, strict=True) if labelled]
    if min(clicks, rows - clicks) >= _LEAST_SHARE * rows and _tells_all(facts, cells, labels):
        return "reveals the label"
    # Ordinary values have rows of the more frequent label.
    rarer = 2 * clicks <= rows
    is_rarer = [label == rarer for label in labels]
    where = f"only in rows with label {int(rarer)}"
    share = sum(is_rarer) / rows
    if _is_pure((one for cell, one in zip(cells, is_rarer, strict=True) if cell is not None), share):
        return f"has a value {where}"
    if facts.kind in ("list", "numbers"):
        return None
    usual = facts.counts.most_common(1)[0][0]
    others = (one for cell, one in zip(cells, is_rarer, strict=True) if cell is not None and cell != usual)
    if _is_pure(others, share):
        return f"is other than {shortened(usual)} {where}"
    if facts.kind == "time":
        return _after(facts, times, given, is_rarer, share, where)
    return _pure_values(cells, is_rarer, share, where)


def _tells_all(facts: Facts, cells: Sequence[Any], labels: Sequence[bool]) -> bool:
    """Return whether a column's value, or its absence, gives the label of nearly every row away."""
    by_value = facts.kind not in ("list", "numbers") and facts.distinct <= _FEW_VALUES
    positives: Counter[Any] = Counter()
    totals: Counter[Any] = Counter()
    for cell, label in zip(cells, labels, strict=True):
        key = cell if by_value else cell is None
        totals[key] += 1
        positives[key] += label
    right = sum(max(positives[key], totals[key] - positives[key]) for key in totals)
    return right >= _LEAK * len(labels)


def _is_pure(group: Iterable[bool], share: float, values: int = 1) -> bool:
    """Return whether a group of rows is of the rarer label, and too large for chance.

    Args:
        group: whether each row is of the rarer label.
        share: of this label in all rows.
        values: of how many groups this is one.
    """
    found = list(group)
    enough = len(found) >= _GROUP_ROWS and len(found) * math.log(share) <= math.log(_CHANCE / values)
    return enough and sum(found) >= _LEAK * len(found)


def _pure_values(cells: Sequence[Any], is_rarer: Sequence[bool], share: float, where: str) -> str | None:
    """Return which values of a column occur only in rows of the rarer label, if they cover many of these."""
    groups: dict[Any, list[bool]] = {}
    for cell, one in zip(cells, is_rarer, strict=True):
        if cell is not None:
            groups.setdefault(cell, []).append(one)
    pure = [value for value, group in groups.items() if _is_pure(group, share, len(groups))]
    if sum(len(groups[value]) for value in pure) < max(_COVERED * sum(is_rarer), 1):
        return None
    return f"is {' or '.join(shortened(value) for value in pure[:3])} {where}"


def _after(
    facts: Facts, times: Sequence[Facts], given: Sequence[bool], is_rarer: Sequence[bool], share: float, where: str
) -> str | None:
    """Return which other time a column of times is later than in rows of the rarer label only, and else equal to."""
    for other in times:
        if other.name == facts.name or other.time != facts.time or other.missing or facts.missing:
            continue
        pairs = [pair for *pair, labelled in zip(in_order(facts), in_order(other), given, strict=True) if labelled]
        later = [one for (a, b), one in zip(pairs, is_rarer, strict=True) if a > b]
        if all(a >= b for a, b in pairs) and _is_pure(later, share):
            return f"is later than {other.name} {where}"
    return None
