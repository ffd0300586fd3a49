"""A schema file for a log, written from a sample of its rows, with what was seen as comments, to be edited.

Roles are guesses by the form of the values and by words in the names: see ``columns.choose``. Nothing here imports torch.
"""

import operator
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from datamodules.preprocess.columns import Choice, Facts, choose, facts_of, tells_label, words_of
from datamodules.preprocess.journal import written_aside
from datamodules.preprocess.sniffing import Sample, Value, is_number, read_sample
from lightning_dlrm.contracts.documents import printable
from lightning_dlrm.contracts.errors import UserError, require

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq, "!=": operator.ne, ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_CONDITION = re.compile(r"(.+?)\s*(==|!=|>=|<=|>|<)\s*(.+)")
_LABEL_WORDS = frozenset(
    ("label", "click", "clicked", "clk", "target", "y", "converted", "conversion", "purchase", "purchased", "buy")
    + ("bought", "like", "liked", "response", "install", "geklickt", "gekauft")
)
_RATING_WORDS = frozenset(("rating", "ratings", "stars", "bewertung", "note"))
_YES = ("yes", "true", "y", "t", "ja", "oui", "si", "click", "clicked")
_MOST_RATINGS = 11
_MOST_CANDIDATES = 5
_EXAMPLES = 3
_EXAMPLE_LENGTH = 24
_SPLIT_WORDS = {"train": ("train", "training"), "validation": ("valid", "validation", "val", "dev"), "test": ("test",)}
_WIDTH = 110


@dataclass(frozen=True)
class Label:
    """A label: a column of two values, or a condition on a column."""

    text: str
    """As in the schema file."""
    column: str
    relation: str | None = None
    value: str = ""

    def of(self, cell: Value) -> bool:
        """Return the label of a row by the column's value, which is not missing."""
        if self.relation is None:
            return _as_label(cell) == 1
        same = self.relation in ("==", "!=")
        if is_number(str(cell)) and is_number(self.value):
            return _OPERATORS[self.relation](float(cell), float(self.value))
        require(
            same, f"--label {self.text!r}: {str(cell)[:40]!r} in column {self.column} is no number; compare it by == or !="
        )
        text = str(cell).lower() if isinstance(cell, bool) else str(cell)
        value = self.value.lower() if isinstance(cell, bool) else self.value
        return _OPERATORS[self.relation](text, value)


def _as_label(cell: Value) -> int | None:
    """Return 0 or 1; None if a value is neither."""
    return {"0": 0, "1": 1, "false": 0, "true": 1, "0.0": 0, "1.0": 1}.get(str(cell).lower())


def infer(output: Path, label: str | None, inputs: Sequence[str], columns: Sequence[str] | None = None) -> str:
    """Write a schema file for a log.

    Args:
        output: the YAML file to make.
        label: a column, or a condition such as ``rating >= 4``.
        inputs: the log's files: see ``read_sample``.
        columns: names of the columns of text without a header.

    Returns:
        What was found, in a few lines.

    Raises:
        UserError: the output exists or cannot be written; the label is missing, unknown or of other than two values,
            in which case nothing is written; or see ``read_sample``.
    """
    require(not output.exists(), f"{output} exists; edit it, or name a new file")
    require(output.absolute().parent.is_dir(), f"cannot write {output}: there is no folder {output.absolute().parent}")
    sample = read_sample(inputs, columns)
    facts = facts_of(sample)
    require(label, "which column is the label? " + _advise_label(facts))
    assert label is not None
    found = _find_label(label, facts)
    labels = _labels(found, facts, sample)
    choices = {
        column.name: _choose(column, found, labels, sample) for column in facts if column.name != found.column
    }
    split, reason = _split(facts, choices, inputs)
    command = _command("preprocess", "--infer", str(output), "--label", label, *_columns_option(columns), "--input", *inputs)
    text = _schema_text(output, found, labels, facts, choices, (split, reason), sample, command, inputs)
    with written_aside(output) as partial:
        partial.write_text(text, encoding="utf-8")
    return _report(output, found, labels, choices, split, sample, inputs)


def _columns_option(columns: Sequence[str] | None) -> list[str]:
    return [] if columns is None else ["--columns", ",".join(columns)]


def _find_label(text: str, facts: Sequence[Facts]) -> Label:
    names = [column.name for column in facts]
    condition = None if text in names else _CONDITION.fullmatch(text.strip())
    label = Label(text, condition[1], condition[2], condition[3].strip("'\"")) if condition else Label(text, text.strip())
    # Not from lightning_dlrm.cli, which this room does not know.
    import difflib

    near = difflib.get_close_matches(label.column, names, n=1)
    require(
        label.column in names,
        f"--label {text!r}: there is no column {label.column!r}{f'; did you mean {near[0]!r}?' if near else ''}; columns: "
        f"{', '.join(names)}",
    )
    return label


def _labels(label: Label, facts: Sequence[Facts], sample: Sample) -> list[bool]:
    """Return the label of each row of the sample whose label is not missing."""
    column = next(column for column in facts if column.name == label.column)
    if label.relation is None:
        other = [value for value in column.counts if _as_label(value) is None]
        require(
            not other and column.kind not in ("empty", "list", "numbers", "object"),
            f"--label {label.text!r}: the column holds {_examples(column)}; expected 0 and 1, or true and false: give a "
            f"condition instead{_condition_example(column)}",
        )
    labels = [label.of(value) for value in column.values]
    require(
        0 < sum(labels) < len(labels) or not sample.whole,
        f"--label {label.text!r} is {'true' if all(labels) else 'false'} in every row; the column holds "
        f"{_examples(column)}: give a label that tells rows apart{_condition_example(column)}",
    )
    return labels


def _condition_example(column: Facts) -> str:
    proposal = _proposal(column, named=True)
    return f", such as --label {shlex.quote(proposal)}" if proposal else ""


def _proposal(column: Facts, named: bool = False) -> str | None:
    """Return a label that a column may be; None if it hardly is one.

    Args:
        column: facts of the column.
        named: whether the user has named the column, so that any condition will do.
    """
    values = sorted(column.counts, key=str)
    if column.distinct == 2 and all(_as_label(value) is not None for value in values):
        return column.name
    yes = [value for value in values if str(value).lower() in _YES]
    if column.kind == "text" and column.distinct == 2 and (yes or named):
        return f"{column.name} == {yes[0] if yes else values[-1]}"
    rating = column.kind in ("integer", "number") and 2 < column.distinct <= _MOST_RATINGS
    if rating and (named or words_of(column.name) & _RATING_WORDS):
        rows = len(column.values)
        shares = {value: sum(other >= value for other in column.values) / rows for value in column.counts}
        return f"{column.name} >= {min(shares, key=lambda value: abs(shares[value] - 0.5)):g}"
    return None


def _advise_label(facts: Sequence[Facts]) -> str:
    """Return what the user can give as the label."""
    proposals = {column.name: _proposal(column) for column in facts}
    found = [column for column in facts if proposals[column.name] is not None]
    found.sort(key=lambda column: not words_of(column.name) & (_LABEL_WORDS | _RATING_WORDS))
    if not found:
        return (
            "no column looks like one; give --label COLUMN, of 0 and 1, or a condition such as --label 'rating >= 4'; "
            f"columns: {', '.join(column.name for column in facts)}"
        )
    return "give " + ", or ".join(
        f"--label {shlex.quote(proposals[column.name] or '')} ({column.name}: {_examples(column)})"
        for column in found[:_MOST_CANDIDATES]
    )


def _choose(column: Facts, label: Label, labels: Sequence[bool], sample: Sample) -> Choice:
    given = [cell is not None for cell in sample.columns[label.column]]
    cells = [cell for cell, is_given in zip(sample.columns[column.name], given, strict=True) if is_given]
    return choose(column, sample, tells_label(column, cells, labels))


def _split(
    facts: Sequence[Facts], choices: Mapping[str, Choice], inputs: Sequence[str]
) -> tuple[dict[str, Any], str]:
    """Return the split of a schema, and why: by files named so, by a column of splits, by time, or at random."""
    by_file = _split_names([Path(path).name for path in inputs], whole=False)
    if len(inputs) > 1 and by_file and sum(map(len, by_file.values())) == len(inputs):
        return {"by": "files", **by_file}, "the files' names say so"
    for column in facts:
        named = _split_names([str(value) for value in column.counts], whole=True) if column.distinct <= 3 else None
        if column.kind == "text" and column.name in choices and named:
            return {"by": "column", "column": column.name, **named}, "its values say so"
    times = [column for column in facts if column.kind == "time" and column.name in choices]
    if times:
        # A time that has gaps may be that of something else.
        column = min(times, key=lambda column: column.missing)
        if not column.missing:
            return {"by": "time", "column": column.name, "ratios": [0.8, 0.1, 0.1]}, "later rows test, as in use"
    return (
        {"by": "random", "seed": 0, "ratios": [0.8, 0.1, 0.1]},
        "no column is a time; if the rows are in the order of time, {by: position, ratios: [0.8, 0.1, 0.1]}",
    )


def _split_names(names: Sequence[str], whole: bool) -> dict[str, list[str]] | None:
    """Sort names into splits; None if one is in none, or train or a held-out split has none."""
    found: dict[str, list[str]] = {}
    for name in names:
        words = {name.lower()} if whole else set(re.findall(r"[a-z]+", name.lower()))
        split = next((split for split, known in _SPLIT_WORDS.items() if words & set(known)), None)
        if split is None:
            return None
        found.setdefault(split, []).append(name)
    return found if {"train", "validation"} <= set(found) else None


def _weights(facts: Sequence[Facts], choices: Mapping[str, Choice]) -> dict[str, str]:
    """Return the columns of weights of columns of lists: lists of numbers, always as long, and named like them."""
    found: dict[str, str] = {}
    for weights in (column for column in facts if column.kind == "numbers" and not column.missing):
        for column in facts:
            alike = column.kind == "list" and weights.name.startswith(column.name) and not column.missing
            if alike and column.name in choices and list(map(len, column.values)) == list(map(len, weights.values)):
                found[column.name] = weights.name
    return found


def _schema_text(log: "_Log", sample: Sample, command: str, then: str) -> str:
    """Return the content of the schema file."""
    form = sample.form
    of_all = "all rows" if sample.whole else f"a sample of about {sample.estimated_rows:,}"
    positives = sum(log.labels) / len(log.labels)
    missing = len(sample.columns[log.label.column]) - len(log.labels)
    lines = [
        *_comment(f"Inferred from {sample.rows:,} rows ({of_all}) by: {command}"),
        *_comment("Roles are guesses from these rows: read the comments, edit what is wrong, then:"),
        *(f"#   {line}" for line in then.splitlines()),
        "",
        f"dataset: {_scalar(log.name)}",
        f"format: {form.format}",
    ]
    if form.format == "csv":
        lines += [
            f"separator: {_scalar(form.separator)}",
            "header: true" if form.header else f"names: {_flow(list(sample.columns))}",
            *(["quote: null"] if form.quote is None else []),
            f"decimal: {_scalar(form.decimal)}",
            f"encoding: {form.encoding}",
            f"nulls: {_flow(list(form.nulls))}",
        ]
        if form.encoding in _GUESSED_ENCODINGS:
            lines[-2] += "  # a guess, as the text is not UTF-8: check letters such as é"
    lines += [
        *_comment(f"True in {positives:.1%} of the rows" + (f"; missing in {missing:,}." if missing else ".")),
        f"label: {_scalar(log.label.text)}",
        "columns:",
    ]
    for column in log.facts:
        if column.name in log.choices:
            choice = log.choices[column.name]
            lines += [f"  {line}" for line in _comment(f"{_describe(column, sample)}. Here: {choice.reason}.")]
            lines.append(f"  {_scalar(_key(column.name))}: {_flow(dict(choice.settings))}")
    lines += [*_comment(f"Why: {log.split_reason}."), f"split: {_flow(log.split)}", "counts: train"]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    """Return the name that a column gets in the dataset."""
    return name if name != LABEL and is_name(name) else re.sub(r"\W", "_", name)[:200] + "_"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(printable(" ".join(text.split())), _WIDTH, initial_indent="# ", subsequent_indent="#   ")


def _scalar(value: Any) -> str:
    return _flow([value])[1:-1]


def _flow(value: Any) -> str:
    """Return a value as YAML in one line."""
    width = float("inf")
    return str(yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=width)).strip()


def _describe(column: Facts, sample: Sample) -> str:
    """Return what the sample holds of a column."""
    what = f"{column.distinct:,} different {'items' if column.kind in ('list', 'numbers') else 'values'}"
    parts = [what if column.kind != "object" else "objects"]
    parts.append(f"{column.missing / sample.rows:.1%} missing" if column.missing else "none missing")
    if column.kind in ("integer", "number", "time") and column.values and column.time in (None, *_NUMERIC_TIMES):
        parts.append(f"{_short(min(column.values))} to {_short(max(column.values))}")
    if column.counts:
        parts.append(f"most often {_examples(column)}")
    return ", ".join(parts)


def _examples(column: Facts) -> str:
    """Return the most frequent values of a column with their shares."""
    total = sum(column.counts.values())
    common = column.counts.most_common(_EXAMPLES)
    texts = [f"{_short(value)} ({count / total:.1%})" for value, count in common]
    return ", ".join(texts) if texts else "nothing"


def _short(value: Value) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _EXAMPLE_LENGTH else text[: _EXAMPLE_LENGTH - 3] + "..."
