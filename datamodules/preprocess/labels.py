"""The label that a user names for a log whose schema is inferred, and proposals where none is named."""

import math
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from datamodules.log_schema import Label, LogSchema, parse_label
from datamodules.preprocess.columns import Facts, examples, facts_of, words_of
from datamodules.preprocess.sniffing import Sample, Value, read_sample
from datamodules.values import BOOLEANS, YES, label_of
from lightning_dlrm.contracts.errors import UserError, nearest_first, require

_LABEL_WORDS = frozenset(
    """
    label click clicked clk target y converted conversion purchase purchased buy bought like liked response install
    geklickt gekauft
    """.split()  # noqa: SIM905
)
_RATING_WORDS = frozenset(("rating", "ratings", "stars", "bewertung", "note"))
_MOST_RATINGS = 11  # such as 0 to 10, or 0.5 to 5
_MOST_CANDIDATES = 5
_LIKED = 0.75  # of the highest rating: 4 of 5, 8 of 10


@dataclass(frozen=True, kw_only=True)
class SampledLabel:
    """The label of a log, and the labels of its sample."""

    text: str
    """As in the schema file."""
    column: str
    labels: Sequence[bool]
    """Of the rows of the sample whose label is not missing."""
    missing: int


def find_label(text: str, facts: Sequence[Facts], sample: Sample) -> SampledLabel:
    """Return the label that a user has named.

    Args:
        text: a column of 0 and 1 (false and true), or a condition such as ``rating >= 4``.
        facts: of the columns.
        sample: the log.

    Raises:
        UserError: there is no such column; it has other values and there is no condition; a condition orders
            text that is not a number; the whole log is read and every row has the same label.
    """
    names = [column.name for column in facts]
    label = parse_label(text, names)
    column = next((column for column in facts if column.name == label.column), None)
    if column is None:
        raise UserError(
            f"--label {text!r}: there is no column {label.column!r}"
            f"{nearest_first(label.column, names, 'the columns are')}"
        )
    values = {value: _is_positive(label, value) for value in column.counts}
    other = [value for value, positive in values.items() if positive is None]
    where = f"--label {text!r}: column {column.name} {_held(column)}"
    require(column.counts and column.kind not in ("list", "numbers"), f"{where}; expected two values, or numbers")
    require(
        not other or label.operator is not None,
        f"{where}; expected 0 and 1, or true and false: {_correct(column)}give a condition{_example(column)}",
    )
    if other:
        raise UserError(f"{where}; {str(other[0])!r} is not a number, so compare it by == or !={_example(column)}")
    labels = [bool(values[value]) for value in column.values]
    require(
        0 < sum(labels) < len(labels) or not sample.whole,
        f"{where}; every row has the same label: give a condition that tells rows apart{_example(column)}",
    )
    return SampledLabel(text=text.strip(), column=column.name, labels=labels, missing=column.missing)


def _is_positive(label: Label, value: Value) -> bool | None:
    """Return the label of a row by its value; None if the value cannot be judged."""
    found = label_of(label, str(value).lower() if isinstance(value, bool) else str(value))
    return None if found is None else bool(found)


def _example(column: Facts) -> str:
    proposal = _proposal(column, named=True)
    return f", such as --label {shlex.quote(proposal)}" if proposal else ""


def _proposal(column: Facts, named: bool = False) -> str | None:
    """Return a label that a column may be; None if it hardly is one.

    Args:
        column: facts of the column.
        named: whether the user has named the column, so that any condition is better than none.
    """
    values = sorted(column.counts, key=str)
    if column.distinct == 2 and {BOOLEANS.get(str(value).lower()) for value in values} == {False, True}:
        return column.name
    if column.distinct == 2:
        yes = [value for value in values if str(value).lower() in YES]
        return f"{column.name} == {yes[0] if yes else values[-1]}" if yes or named else None
    rating = column.kind in ("integer", "number") and 2 < column.distinct <= _MOST_RATINGS
    if named and rating and _stray(column):
        return f"{column.name} >= 1"
    if rating and (named or words_of(column.name) & _RATING_WORDS):
        return f"{column.name} >= {math.ceil(_LIKED * max(column.counts))}"
    if named and column.kind in ("integer", "number") and column.distinct > 1:
        return f"{column.name} >= {_upper_half(column):g}"
    return _most_frequent(column) if named and column.kind == "text" and column.distinct > 1 else None


def _upper_half(column: Facts) -> float:
    """Return the least value that at most half of the rows reach; else the largest."""
    ordered = sorted(column.values)
    half = math.ceil(len(ordered) / 2)
    firsts = (ordered[n] for n in range(half, len(ordered)) if ordered[n] != ordered[n - 1])
    return float(next(firsts, ordered[-1]))


def _most_frequent(column: Facts) -> str | None:
    """Return the condition for the most frequent value that a condition can express."""
    for value, _ in column.counts.most_common():
        condition = f"{column.name} == {value}"
        if parse_label(condition, [column.name]) == Label(column=column.name, operator="==", value=value):
            return condition
    return None


def _stray(column: Facts) -> list[Value]:
    """Return values beside 0 and 1 that hardly any row has."""
    stray = [value for value in column.counts if value not in (0, 1)]
    rows = sum(column.counts.values())
    return stray if {0, 1} <= set(column.counts) and sum(column.counts[one] for one in stray) < 0.05 * rows else []


def _correct(column: Facts) -> str:
    stray = _stray(column)
    return f"correct the rows with {', '.join(map(str, stray[:_MOST_CANDIDATES]))}, or " if stray else ""


def _held(column: Facts) -> str:
    seen = examples(column)
    return f"holds values {seen}" if seen.startswith("such as") else f"holds {seen}"


def describe_label(schema: LogSchema, inputs: Sequence[str]) -> str:
    """Describe the label of a log, and the values of its column in a sample of the files."""
    with suppress(UserError):
        sample = read_sample(inputs, schema.names or None)
        label = schema.label_in(list(sample.columns))
        column = next(facts for facts in facts_of(sample) if facts.name == label.column)
        return f"the label is {schema.label!r}, and {column.name} {_held(column)}"
    return f"the label is {schema.label!r}"


def propose_labels(facts: Sequence[Facts]) -> str:
    """Return, for a message, what a user can give as the label of a log."""
    proposals = {column.name: proposal for column in facts if (proposal := _proposal(column))}
    found = [column for column in facts if column.name in proposals]
    found.sort(key=lambda column: not words_of(column.name) & (_LABEL_WORDS | _RATING_WORDS))
    if not found:
        return (
            "no column looks like a label; give --label COLUMN, a column of 0 and 1, or a condition such as "
            f"--label 'rating >= 4'; the columns are {', '.join(column.name for column in facts)}"
        )
    return "--label is missing: it names what to predict; give " + ", or ".join(
        f"--label {shlex.quote(proposals[column.name])} ({column.name}: {examples(column)})"
        for column in found[:_MOST_CANDIDATES]
    )
