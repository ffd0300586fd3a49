"""A schema file for a log, written from a sample of its rows, with what was seen as comments, to be edited.

Roles are guesses by the form of the values and by words in the names: see ``columns.choose``. Nothing here imports
torch.
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from datamodules.log_schema import LABEL, read_log_schema
from datamodules.preprocess.columns import (
    Choice,
    Facts,
    choose,
    examples,
    facts_of,
    formatted_number,
    in_order,
    missing_words,
    shortened,
)
from datamodules.preprocess.dialect import is_number
from datamodules.preprocess.journal import written_aside
from datamodules.preprocess.label_leaks import find_leak
from datamodules.preprocess.labels import SampledLabel, find_label, propose_labels
from datamodules.preprocess.report import fit_command
from datamodules.preprocess.sniffing import Form, Sample, read_sample
from datamodules.preprocess.text_tables import filled_below
from lightning_dlrm.contracts.documents import is_name, printable
from lightning_dlrm.contracts.errors import require
from lightning_dlrm.contracts.schema import ROLE_MEANINGS, ROLE_NAMES
from lightning_dlrm.contracts.terminal import command_line, counted, wrapped

_SPLIT_WORDS = {"train": ("train", "training"), "validation": ("valid", "validation", "val", "dev"), "test": ("test",)}
_GUESSED_ENCODINGS = ("cp1252", "latin-1")
_RATIOS = (0.8, 0.1, 0.1)
_MANY_TIMES = 20  # rows of equal times stay in one split, which then hardly changes the shares
_MISSING_LABELS = " remove them from the file, or add --on-bad-row skip to preprocess"
_WIDTH = 116


@dataclass(frozen=True, kw_only=True)
class _Inferred:
    """What the schema file says of a log."""

    name: str
    label: SampledLabel
    facts: Sequence[Facts]
    choices: Mapping[str, Choice]
    """By column, in order; without the label's and those of weights."""
    leaks: Mapping[str, str]
    """By column, how it gives the label away."""
    split: Mapping[str, Any]
    split_reason: str


@dataclass(frozen=True, kw_only=True)
class Inference:
    """A schema file that ``infer`` has written."""

    output: Path
    log: _Inferred
    sample: Sample
    next_commands: Sequence[str]
    """They make the dataset and train on it."""


def infer(output: Path, label: str | None, inputs: Sequence[str], columns: Sequence[str] | None = None) -> Inference:
    """Write a schema file for a log.

    Args:
        output: the YAML file to make.
        label: a column, or a condition such as ``rating >= 4``.
        inputs: the log's files: see ``read_sample``.
        columns: names of the columns of text without a header.

    Raises:
        UserError: the output exists or cannot be written; no label is given, or see ``find_label`` and ``read_sample``.
            Nothing is written then.
    """
    require(not output.exists(), f"{output} exists; edit it, or name a new file")
    require(output.absolute().parent.is_dir(), f"cannot write {output}: there is no folder {output.absolute().parent}")
    sample = read_sample(inputs, columns)
    facts = facts_of(sample)
    require(label, propose_labels(facts))
    assert label is not None
    log = _infer(output.stem, find_label(label, facts, sample), facts, sample, inputs)
    named = [] if columns is None else ["--columns", ",".join(columns)]
    command = command_line("preprocess", "--infer", str(output), "--label", label, *named, "--input", *inputs)
    has_dense = any(choice.settings["role"] == "dense" for choice in log.choices.values())
    then = [
        command_line("preprocess", "--schema", str(output), "--input", *inputs, "--output", f"data/{output.stem}"),
        fit_command(f"data/{output.stem}", has_dense),
    ]
    with written_aside(output) as partial:
        partial.write_text(_schema_text(log, sample, command, then), encoding="utf-8")
        read_log_schema(partial)
    return Inference(output=output, log=log, sample=sample, next_commands=then)


def render(found: Inference, width: int = 0) -> str:
    """Return what was found and what to do next, in a few lines.

    Args:
        found: what ``infer`` returns.
        width: of the terminal, which lines do not exceed; 0 for no limit.
    """
    lines = [
        *_report(found.output, found.log, found.sample, width),
        "make the dataset, then train on it:",
        *(f"  {line}" for line in found.next_commands),
    ]
    return wrapped(map(printable, lines))


def _infer(name: str, label: SampledLabel, facts: Sequence[Facts], sample: Sample, inputs: Sequence[str]) -> _Inferred:
    given = [cell is not None for cell in sample.columns[label.column]]
    choices: dict[str, Choice] = {}
    leaks: dict[str, str] = {}
    weights = _weights(facts)
    times = [column for column in facts if column.kind == "time"]
    for column in facts:
        if column.name == label.column or column.name in weights.values():
            continue
        if (leak := find_leak(column, times, given, label.labels)) is not None:
            leaks[column.name] = leak
        choice = choose(column, sample, leak)
        if column.name in weights and choice.settings["role"] == "multi_hot":
            choice = Choice(
                settings={**choice.settings, "weights": weights[column.name]}, reason=f"{choice.reason}, with weights"
            )
        choices[column.name] = choice
    require(
        any(choice.settings["role"] not in ("keep", "leave") for choice in choices.values()),
        f"no column of {inputs[0]} can be a feature: "
        + "; ".join(f"{column}: {choice.reason}" for column, choice in list(choices.items())[:5]),
    )
    split, reason = _split(facts, choices, label, sample, inputs)
    if split["by"] == "column":
        choices[split["column"]] = Choice(settings={"role": "leave"}, reason="names the split of each row")
    return _Inferred(
        name=name, label=label, facts=facts, choices=choices, leaks=leaks, split=split, split_reason=reason
    )


def _report(output: Path, log: _Inferred, sample: Sample, width: int) -> list[str]:
    """Return the lines that say what was found, and what to look at in the schema file."""
    by_role: dict[str, list[str]] = {}
    for name, choice in log.choices.items():
        by_role.setdefault(choice.settings["role"], []).append(name)
    label, missing = log.label, log.label.missing
    share = sum(label.labels) / len(label.labels)
    rows = counted(sample.rows, "row")
    entries = {"label": f"{label.text} (true in {share:.1%} of the rows{' with a label' if missing else ''})"}
    if missing:
        entries["no label"] = f"{counted(missing, 'row')}:{_MISSING_LABELS}"
    if why := _why_encoding(sample.form):
        entries["encoding"] = f"{sample.form.encoding} ({why})"
    if read := _maybe_thousands(sample):
        entries["decimal"] = f"a comma, as a guess: {read}; if it separates thousands, remove it from the file"
    entries |= {
        role: f"{', '.join(by_role[role])} ({words})" for role, words in ROLE_MEANINGS.items() if role in by_role
    }
    if formatted := [f"{column.name} ({one!r})" for column in log.facts if (one := formatted_number(column))]:
        entries["text"] = f"{', '.join(formatted)}: to use them as numbers, write plain ones in the file, such as 9.56"
    if said := _missing_texts(log.facts, sample):
        entries["missing"] = "; ".join(said)
    if log.leaks:
        names = {leak: [name for name, one in log.leaks.items() if one == leak] for leak in log.leaks.values()}
        found = ", ".join(f"{', '.join(some)} ({leak})" for leak, some in names.items())
        entries["leaks"] = f"{found}: left out, as probably known only after the click"
    unread = {column.name: texts for column in log.facts if (texts := missing_words(column))}
    if unread:
        nulls = dict.fromkeys([*sample.form.nulls, *(text for texts in unread.values() for text in texts)])
        found = ", ".join(f"{name} ({', '.join(map(repr, texts))})" for name, texts in unread.items())
        entries["missing?"] = f"{found}: if these texts mean missing values, set 'nulls: {_flow(list(nulls))}'"
    entries["split"] = f"by {log.split['by']}: {log.split_reason}"
    lines = filled_below(
        f"wrote {output}: a schema of {counted(len(sample.columns), 'column')}, from "
        f"{f'all {rows}' if sample.whole else f'{rows} of about {sample.estimated_rows:,}'}:",
        width,
        indent=2,
    )
    for name, words in entries.items():
        lines += filled_below(words, width or _WIDTH, f"  {name:<12} ")
    return [*lines, f"look at {output} first: roles are guesses, and comments say why", *_CHECKS]


def _missing_texts(facts: Sequence[Facts], sample: Sample) -> list[str]:
    """Return lines about the texts that are read as missing values, and the columns where they may be categories."""
    texts = [text for text in sample.form.nulls if text]
    if not texts:
        return []
    held = sample.read_as_missing
    numeric = [column.name for column in facts if column.kind in ("integer", "number")]
    lines = [f"{', '.join(map(repr, texts))} {'counts' if len(texts) == 1 else 'count'} as missing in every column"]
    for text in texts:
        others = {name: count / sample.rows for name in held if name not in numeric and (count := held[name].get(text))}
        if others:
            needs = next((name for name in numeric if held[name].get(text)), None)
            why = "" if needs is None else f", because {needs} needs it"
            lines.append(
                f"{text!r} in {', '.join(f'{name} ({share:.1%})' for name, share in others.items())} counts as missing"
                f"{why}; if it is a category there, write another text for it in the file"
            )
    return lines


def _maybe_thousands(sample: Sample) -> str | None:
    """Return how a number with a comma is read, if commas may separate thousands: all have three digits after them."""
    if sample.form.decimal == ".":
        return None
    cells = (cell for cells in sample.columns.values() for cell in cells if cell is not None and "," in cell)
    found = [cell for cell in cells if is_number(cell, ",")]
    if not found or not all(re.fullmatch(r"[+-]?\d{1,3},\d{3}", cell) for cell in found):
        return None
    return f"{found[0]} is read as {found[0].replace(',', '.')}"


_CHECKS = (
    "  a number that names something is categorical, an amount is dense",
    "  what is known only after the click must be left out (leave)",
)


def _why_encoding(form: Form) -> str:
    """Return how an encoding other than UTF-8 was found; nothing for UTF-8."""
    if form.encoding in _GUESSED_ENCODINGS:
        return "a guess, because the text is not UTF-8: check letters such as é"
    return "" if form.encoding == "utf-8" else "by the byte order mark of the file"


def _split(
    facts: Sequence[Facts], choices: Mapping[str, Choice], label: SampledLabel, sample: Sample, inputs: Sequence[str]
) -> tuple[dict[str, Any], str]:
    """Return the split of a schema, and why: by files named so, by a column of splits, by time, or at random."""
    by_file = _split_names([Path(path).name for path in inputs], whole=False)
    if len(inputs) > 1 and by_file and sum(map(len, by_file.values())) == len(inputs):
        return {"by": "files", **by_file}, "the names of the files are names of splits"
    for column in facts:
        named = _split_names([str(value) for value in column.counts], whole=True) if column.distinct <= 3 else None
        if column.kind == "text" and column.name in choices and named:
            return {"by": "column", "column": column.name, **named}, "its values are names of splits"
    for column in facts:
        is_known = column.name in choices and choices[column.name].settings["role"] == "keep"
        if column.kind == "time" and is_known and _splits_labels(column, label, sample):
            return {
                "by": "time",
                "column": column.name,
                "ratios": list(_RATIOS),
            }, "later rows are for validation and test, as in production"
    return (
        {"by": "random", "seed": 0, "ratios": list(_RATIOS)},
        "no column of times can split the rows; if the rows are in the order of time, use {by: position, ratios: [0.8, "
        "0.1, 0.1]}",
    )


def _splits_labels(time: Facts, label: SampledLabel, sample: Sample) -> bool:
    """Return whether each split by a time has rows of both labels, as far as the sample tells."""
    if time.missing or not sample.whole:
        return not time.missing
    given = [cell is not None for cell in sample.columns[label.column]]
    moments = [value for value, labelled in zip(in_order(time), given, strict=True) if labelled]
    order = sorted(range(len(moments)), key=lambda row: moments[row])
    ends = [round(share * len(order)) for share in (0, _RATIOS[0], _RATIOS[0] + _RATIOS[1], 1)]
    splits = [order[start:end] for start, end in pairwise(ends)]
    apart = all(moments[a[-1]] != moments[b[0]] for a, b in pairwise(splits) if a and b)
    both = all(len({label.labels[row] for row in rows}) == 2 for rows in splits)
    return both and (apart or time.distinct > _MANY_TIMES)


def _split_names(names: Sequence[str], whole: bool) -> dict[str, list[str]] | None:
    """Sort names into splits; None if a name is not that of a split, or training or validation rows have none."""
    found: dict[str, list[str]] = {}
    for name in names:
        words = {name.lower()} if whole else set(re.findall(r"[a-z]+", name.lower()))
        split = next((split for split, known in _SPLIT_WORDS.items() if words & set(known)), None)
        if split is None:
            return None
        found.setdefault(split, []).append(name)
    return found if {"train", "validation"} <= set(found) else None


def _weights(facts: Sequence[Facts]) -> dict[str, str]:
    """Return the columns of weights of columns of lists: lists of numbers, always as long, and named like them."""
    found: dict[str, str] = {}
    for weights in (column for column in facts if column.kind == "numbers" and not column.missing):
        for column in facts:
            alike = (
                column.kind == "list"
                and column.lists == weights.lists
                and weights.name.startswith(column.name)
                and not column.missing
            )
            if alike and list(map(len, column.values)) == list(map(len, weights.values)):
                found[column.name] = weights.name
    return found


def _schema_text(log: _Inferred, sample: Sample, command: str, then: Sequence[str]) -> str:
    """Return the content of the schema file."""
    form = sample.form
    of_all = "all rows" if sample.whole else f"a sample of about {sample.estimated_rows:,}"
    positives = sum(log.label.labels) / len(log.label.labels)
    missing = log.label.missing
    lines = [
        *_comment(f"Inferred from {sample.rows:,} rows ({of_all}) by: {command}"),
        "#",
        *_entry("Needs:", "the files after --input, or other files of the same form."),
        *_entry("Run:", *then),
        *_entry(
            "Expect:",
            f"a dataset of {_counted_roles(log)}, split by {log.split['by']}. Roles are guesses from these rows: read "
            "the comments, and edit what is wrong before the first command. docs/own-data.md explains every key.",
        ),
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
            *(line for words in _missing_texts(log.facts, sample) for line in _comment(f"{words}.")),
            f"nulls: {_flow(list(form.nulls))}",
        ]
    if why := _why_encoding(form):
        lines += _comment(f"{why[0].upper()}{why[1:]}.")
    if form.format != "parquet":
        lines.append(f"encoding: {form.encoding}")
    lines += [
        *_comment(
            f"True in {positives:.1%} of the rows"
            + (" with a label" if missing else "")
            + "."
            + (f" Missing in {missing:,}:{_MISSING_LABELS}." if missing else "")
        ),
        f"label: {_scalar(log.label.text)}",
        "columns:",
    ]
    for column in log.facts:
        if column.name in log.choices:
            choice = log.choices[column.name]
            lines += [f"  {line}" for line in _comment(f"{_describe(column, sample)}. Here: {choice.reason}.")]
            key = _key(column.name)
            source = {} if key == column.name else {"source": column.name}
            lines.append(f"  {_scalar(key)}: {_flow({**choice.settings, **source})}")
    lines += [*_comment(f"Why: {log.split_reason}."), f"split: {_flow(log.split)}", "counts: train"]
    if form.format == "jsonl" and not sample.whole:
        lines += [*_comment("Other keys, which the sample does not have."), "rest: leave"]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    """Return the name that a column gets in the dataset."""
    return name if not name or (name != LABEL and is_name(name)) else re.sub(r"\W", "_", name)[:200] + "_"


def _entry(title: str, *texts: str) -> list[str]:
    """Return the comment lines of an entry of the header; commands are not broken."""
    heads = [f"# {title:<8}", *["#" + " " * 9] * (len(texts) - 1)]
    width = 0 if title == "Run:" else _WIDTH
    lines = [filled_below(printable(text), width, head) for head, text in zip(heads, texts, strict=True)]
    return [f"#{line[1:]}" for some in lines for line in some]


def _counted_roles(log: _Inferred) -> str:
    """Return how many columns of the dataset have each role."""
    roles = [choice.settings["role"] for choice in log.choices.values()]
    return ", ".join(counted(roles.count(role), f"{word} column") for role, word in ROLE_NAMES.items() if role in roles)


def _comment(text: str) -> list[str]:
    return textwrap.wrap(printable(" ".join(text.split())), _WIDTH, initial_indent="# ", subsequent_indent="#   ")


def _scalar(value: Any) -> str:
    return _flow([value])[1:-1]


def _flow(value: Any) -> str:
    """Return a value as YAML in one line."""
    width = float("inf")
    return str(yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=width)).strip()


def _describe(column: Facts, sample: Sample) -> str:
    """Describe the values of a column in the sample."""
    noun = "item" if column.kind in ("list", "numbers") else "value"
    what = f"{column.distinct:,} different {noun}s" if column.distinct > 1 else f"one {noun}"
    parts = ["objects" if column.kind == "object" else what]
    missing, what = column.missing, "missing"
    if column.kind in ("list", "numbers"):
        # preprocess counts empty lists as missing.
        missing += sum(all(item in (None, "") for item in value) for value in column.values)
        what = "missing or empty"
    parts.append(f"{missing / sample.rows:.1%} {what}" if missing else f"none {what}")
    if column.kind in ("integer", "number", "time") and column.values and column.time in (None, "unix", "unix_ms"):
        parts.append(f"{shortened(min(column.values))} to {shortened(max(column.values))}")
    if column.counts:
        parts.append(examples(column))
    if words := missing_words(column):
        parts.append(f"add {' and '.join(map(repr, words))} to nulls if a missing value is meant")
    return ", ".join(parts)
