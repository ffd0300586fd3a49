"""The facts of a dataset folder, as tables or as JSON, for ``inspect``."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datamodules.folder import Folder
from datamodules.preprocess.leakage import render_equal_rows
from datamodules.preprocess.skew import Skew, vocabulary_skew
from datamodules.preprocess.split_words import schema_of_log, split_words
from datamodules.preprocess.text_tables import filled_below, fitted
from lightning_dlrm.contracts.documents import parse_json
from lightning_dlrm.contracts.schema import SCHEMA_FILE, SPLITS, Column, DatasetSchema
from lightning_dlrm.contracts.terminal import aligned, binary_size

_ONE_VALUE = "one value"


@dataclass(frozen=True, kw_only=True)
class _Report:
    """The counts of ``DatasetSchema.report`` that ``inspect`` shows."""

    rows_per_file: tuple[tuple[str, int], ...] = ()
    missing: Mapping[str, int] = field(default_factory=dict)
    distinct: Mapping[str, int] = field(default_factory=dict)


def summary(folder: str | Path | Folder, schema: DatasetSchema) -> dict[str, Any]:
    """Return the facts of a dataset as JSON values.

    ``columns`` has for each column ``missing`` (share of the rows read, or of those written if it is counted in them),
    ``most_frequent`` (share of the lookups of the most frequent id), ``most_frequent_is`` (which values this id is
    reserved for, such as ``rare``), ``ids_for_90`` (the smallest number of ids that 90% of the lookups go to) and
    ``unknown`` (share of the rows after the training split); None if not known. ``note`` names columns of one value,
    none, and few bins. ``split_rule`` says how the rows were split, and ``left_out`` lists the columns of a log that
    its schema leaves out.

    Raises:
        UserError: a vocabulary is not a readable Parquet file.
    """
    report = parse_json(json.dumps(schema.report), _Report, Folder(folder) / SCHEMA_FILE, "make the dataset again")
    return {
        "folder": str(folder),
        "dataset": schema.dataset,
        "protocol": schema.protocol,
        "settings": dict(schema.settings),
        "fingerprints": {"encoding": schema.encoding_fingerprint, "data": schema.data_fingerprint},
        "rows": sum(split.rows for split in schema.splits.values()),
        "bytes": sum(file.bytes for split in schema.splits.values() for file in split.files),
        "table_rows": sum(schema.features.table_rows),
        "split_rule": split_words(schema) or None,
        "left_out": _left_out(schema),
        "splits": {
            name: {
                "rows": split.rows,
                "label_mean": None if split.positives is None or not split.rows else split.positives / split.rows,
                "files": len(split.files),
                **schema.cell_shares(name),
            }
            for name in SPLITS
            if (split := schema.splits.get(name))
        },
        "columns": _columns(folder, schema, report),
        "optimum": {
            name: {"auc": optimum.auc, "log_loss": optimum.log_loss} for name, optimum in schema.optimum.items()
        },
        "rows_per_file": [list(of_file) for of_file in report.rows_per_file] or None,
    }


def _columns(folder: str | Path | Folder, schema: DatasetSchema, report: _Report) -> list[dict[str, Any]]:
    """Return the facts of each column; see ``summary``."""
    # Missing values are counted in the rows that were read, of which sampling may drop some.
    rows_read = sum(count for _, count in report.rows_per_file)
    rows_read = rows_read or sum(split.rows for split in schema.splits.values())
    missing = report.missing if rows_read else {}
    held_out = [name for name in schema.cells if name != "train"]
    found = []
    for column in schema.columns:
        name, skew = column.name, vocabulary_skew(folder, schema, column)
        share = missing[name] / rows_read if name in missing else _cell_share(schema, name, "missing", schema.cells)
        # An empty list is no missing value of the bag's ids, and is not counted.
        share = None if column.role == "multi_hot" and not share else share
        found.append(
            {
                "name": name,
                "role": column.role,
                "cardinality": column.cardinality,
                "transform": column.transform,
                "reserved": dict(column.reserved),
                "missing": share,
                "most_frequent": skew.most_frequent if skew else None,
                "most_frequent_is": _reserved_kinds(column, skew, share, report.distinct.get(name)),
                "ids_for_90": skew.ids_for.get(0.9) if skew else None,
                "unknown": _cell_share(schema, name, "unknown", held_out),
                "note": _note(schema, column, report.distinct.get(name)),
            }
        )
    return found


def _left_out(schema: DatasetSchema) -> list[str]:
    """Return the columns of a log that its schema leaves out."""
    of_log = schema_of_log(schema)
    columns = of_log.get("columns")
    named = columns.items() if isinstance(columns, Mapping) else ()
    left = [name for name, column in named if isinstance(column, Mapping) and column.get("role") == "leave"]
    return [*left, *(["all columns that the schema does not name"] if of_log.get("rest") == "leave" else [])]


def _reserved_kinds(column: Column, skew: Skew | None, missing: float | None, values: int | None) -> str | None:
    """Return the values that the most frequent id is reserved for, such as ``missing/rare``; None for a value's own.

    Args:
        column: the column.
        skew: spread of its lookups.
        missing: share of missing values.
        values: number of different values.
    """
    row = None if skew is None else skew.most_frequent_id
    if row is None or not _is_reserved(row, column.reserved, _has_one_value(column.cardinality, values == 1)):
        return None
    kinds = [kind for kind in ("missing", "rare") if column.reserved.get(kind) == row]
    # Columns without missing values have no row of their own for them.
    kinds = kinds[-1:] if missing == 0 else kinds
    return "/".join(kinds) or None


def _is_reserved(row: int, reserved: Mapping[str, int], has_one_value: bool) -> bool:
    """Return whether a row is for reserved values alone, and not also the last row, which is that of a value."""
    # Without rare values in training, rare values have the last row: see ``trained_ids``.
    is_own = row == reserved.get("unknown") != reserved.get("rare")
    return is_own or (row <= 1 and row in reserved.values() and not (row == 1 and has_one_value))


def _has_one_value(table_rows: int, is_one_value: bool) -> bool:
    """Return whether a table has one reserved row and one row of a value."""
    return table_rows == 2 and is_one_value


def _cell_share(schema: DatasetSchema, column: str, kind: str, splits: Iterable[str]) -> float | None:
    """Return the share of missing, rare or unknown values in a column of some splits; None if they are not counted."""
    counted = [(schema.splits[name].rows, cells) for name in splits if (cells := schema.cells[name].get(column))]
    rows = sum(of_split for of_split, _ in counted)
    return sum(cells.get(kind, 0) for _, cells in counted) / rows if rows else None


def _note(schema: DatasetSchema, column: Column, values: int | None) -> str:
    """Return what is unusual about a column, given the number of different values over which it was counted."""
    bins = schema.settings.get("bins")
    if values is None:
        return ""
    if values > 1:
        if isinstance(bins, int) and column.transform.startswith("quantile(") and values < bins:
            return f"{values} of at most {bins} bins"
        return ""
    return _ONE_VALUE if values else "all missing"


def render(facts: Mapping[str, Any], width: int = 0) -> str:
    """Format the facts of ``summary`` as text, and under ``leakage`` those of ``equal_rows`` if there are any.

    Args:
        facts: as ``summary`` returns them.
        width: of the terminal, which lines do not exceed; 0 for no limit.
    """
    settings = "".join(
        f", {name} {value}"
        for name, value in facts["settings"].items()
        if not isinstance(value, Mapping)  # of single columns, which the columns describe
    )
    entries = [
        ("dataset", f"{facts['dataset']}, protocol {facts['protocol']}{settings}"),
        ("encoding", f"{facts['fingerprints']['encoding'][:16]}  (a model scores only rows with this encoding)"),
        ("data", f"{facts['fingerprints']['data'][:16]}  (a run resumes only on these rows)"),
        ("size", f"{facts['rows']:,} rows, {binary_size(facts['bytes'])} of Parquet"),
    ]
    if facts["rows_per_file"]:
        entries.append(("made from", ", ".join(f"{name} ({rows:,} rows)" for name, rows in facts["rows_per_file"])))
    if facts["split_rule"]:
        entries.append(("split", facts["split_rule"]))
    entries += [("columns", _roles(facts)), *_transforms(facts)]
    if facts["left_out"]:
        entries.append(("left out", ", ".join(facts["left_out"])))
    lines = [str(Folder(facts["folder"]) / SCHEMA_FILE)]
    lines += [line for name, words in entries for line in filled_below(words, width, f"  {name:<12} ")]
    lines += ["", *_split_table(facts, width), "", *_column_tables(facts, width)]
    for name, optimum in facts["optimum"].items():
        scores = f"AUC {optimum['auc']:.4f}, log loss {optimum['log_loss']:.4f}"
        lines.append(f"best scores that any model can reach on {name}: {scores}")
    if facts.get("leakage"):
        lines += ["", *render_equal_rows(facts["leakage"])]
    return "\n".join(lines)


def _roles(facts: Mapping[str, Any]) -> str:
    """Return how many columns have each role, and their names."""
    names: dict[str, list[str]] = {}
    for column in facts["columns"]:
        names.setdefault(column["role"], []).append(column["name"])
    words = {"multi_hot": "multi-hot", "keep": "kept beside the features"}
    return "; ".join(
        role if role == "label" else f"{len(some)} {words.get(role, role)} ({_ranges(some)})"
        for role, some in names.items()
    )


def _transforms(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return for each role the transform of its columns, with the columns' names if transforms differ."""
    columns_of: dict[str, dict[str, list[str]]] = {}
    for column in facts["columns"]:
        if column["transform"]:
            columns_of.setdefault(column["role"], {}).setdefault(column["transform"], []).append(column["name"])
    entries = []
    for role, by_words in columns_of.items():
        for number, (words, names) in enumerate(by_words.items()):
            which = f"{_ranges(names)}: " if len(by_words) > 1 or role == "keep" else ""
            title = {"keep": "kept", "multi_hot": "multi-hot"}.get(role, role)
            entries.append(("" if number else title, f"{which}{words}"))
    return entries


def _ranges(names: Sequence[str]) -> str:
    """Join names; three or more consecutive ones become a range, such as C1..C26.

    >>> _ranges(["I1", "I2", "I3", "I5", "I6", "size", "C7"])
    'I1..I3, I5, I6, size, C7'
    """
    runs: list[list[str]] = []
    for name in names:
        if runs and name == _next_name(runs[-1][-1]):
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ", ".join(run) for run in runs)


def _next_name(name: str) -> str | None:
    """Return the name with the number at its end incremented; None without a number."""
    stem = name.rstrip("0123456789")
    return f"{stem}{int(name[len(stem) :]) + 1}" if stem != name else None


def _split_table(facts: Mapping[str, Any], width: int) -> list[str]:
    header = ("split", "rows", "share", "label mean", "files", "unknown", "rare", "missing")
    body = [
        (
            name,
            f"{split['rows']:,}",
            f"{split['rows'] / facts['rows']:.1%}" if facts["rows"] else "",
            "" if split["label_mean"] is None else f"{split['label_mean']:.4f}",
            f"{split['files']:,}",
            *(f"{split[kind]:.2%}" if kind in split else "" for kind in ("unknown", "rare", "missing")),
        )
        for name, split in facts["splits"].items()
    ]
    lines = aligned([header, *body])
    # Without splits all cells are empty, and there are no lines.
    shown = lines[0] if lines else ""
    words = ["label mean: share of the rows with label 1"] if "label mean" in shown else []
    if "unknown" in shown:
        words.append("unknown, rare, missing: shares of the values of all tables")
    return lines + [part for one in words for part in filled_below(one, width, "  ", 4)]


def _column_tables(facts: Mapping[str, Any], width: int) -> list[str]:
    """Return a table of the dense columns whose missing values are known, one of the columns with a table of ids, and
    what their headers mean."""
    columns = facts["columns"]
    tables = [column for column in columns if column["cardinality"]]
    others = [column for column in columns if not column["cardinality"] and column["missing"] is not None]
    lines = []
    if any(column["missing"] for column in others):
        body = [(column["name"], column["role"], f"{column['missing']:.2%}") for column in others]
        lines += [*fitted([("column", "role", "missing"), *body], width, left=(0, 1)), ""]
    if tables:
        lines += _id_tables(tables, facts["table_rows"], width)
    if any(column["missing"] == 0 for column in columns) and not any(column["missing"] for column in columns):
        lines.append("  no values are missing")
    lines += [part for words in _legends(columns) for part in filled_below(words, width, "  ", 4)]
    for words in _reserved_rows(tables):
        lines += filled_below(words, width, "  ", 4)
    return lines + [part for words in _notes(columns) for part in filled_below(words, width, "  ", 4)]


def _notes(columns: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what is unusual about columns, a line for columns with the same note or with few bins."""
    names: dict[str, list[str]] = {}
    bins: dict[str, list[str]] = {}
    for column in columns:
        found, _, most = column["note"].partition(" of at most ")
        if most:
            bins.setdefault(most.removesuffix(" bins"), []).append(f"{column['name']} {found}")
        elif found:
            names.setdefault(found, []).append(column["name"])
    return [
        *(f"{note}: {_ranges(some)}" for note, some in names.items()),
        *(f"columns with fewer bins than {most}: {', '.join(some)}" for most, some in bins.items()),
    ]


_LEGENDS = (
    ("reserved", "table rows: rows of the embedding table: of values, and reserved ones (such as rows 0 and 1)"),
    ("missing", "missing: share of the rows without a value"),
    ("unknown", "unknown: share of the validation and test rows with a value that the vocabulary does not have"),
    ("most_frequent", "most frequent id: its share of the rows over which the vocabulary was counted"),
    ("most_frequent_is", "word after the share: the most frequent id is the reserved row of these values"),
    ("ids_for_90", "ids for 90%: how many ids, the most frequent ones, 90% of these rows have"),
)
"""Fact of a column, and what its header means."""


def _legends(columns: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what the headers of the tables mean; missing values have a header if there are any."""
    shown = {name for column in columns for name, value in column.items() if value not in (None, {})}
    if not any(column["missing"] for column in columns):
        shown -= {"missing"}
    return [words for name, words in _LEGENDS if name in shown]


def _id_tables(tables: Sequence[Mapping[str, Any]], rows: int, width: int) -> list[str]:
    """Return lines for the columns that have a table of ids, and their sum."""
    header = (
        ("", "", "", "", "", "most frequent", "ids"),
        ("column", "role", "table rows", "missing", "unknown", "id", "for 90%"),
    )
    # Nearly all are categorical.
    shows_roles = any(column["role"] != "categorical" for column in tables)
    has_missing = any(column["missing"] for column in tables)
    body: list[tuple[str, ...]] = [
        (
            column["name"],
            column["role"] if shows_roles else "",
            f"{column['cardinality']:,}",
            "" if not has_missing or column["missing"] is None else f"{column['missing']:.2%}",
            "" if column["unknown"] is None else f"{column['unknown']:.2%}",
            "" if column["most_frequent"] is None else f"{column['most_frequent']:.2%}{_of_reserved(column)}",
            "" if column["ids_for_90"] is None else f"{column['ids_for_90']:,}",
        )
        for column in tables
    ]
    body.append(("all", "", f"{rows:,}", *[""] * 4))
    given = [number for number, cells in enumerate(zip(*body, strict=True)) if any(cells)]
    shown = [[row[number] for number in given] for row in (*header, *body)]
    # The first line of the headers may be empty.
    return fitted(shown if any(shown[0]) else shown[1:], width, left=(0, 1) if shows_roles else (0,))


def _of_reserved(column: Mapping[str, Any]) -> str:
    return f" ({column['most_frequent_is']})" if column["most_frequent_is"] else ""


def _reserved_rows(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return which rows of the tables stand for missing, rare and unknown values; a line for tables that agree."""
    names: dict[str, list[str]] = {}
    for column in tables:
        has_one_value = _has_one_value(column["cardinality"], column["note"] == _ONE_VALUE)
        words = _reserved_words(column["reserved"], column["unknown"] is not None, has_one_value)
        names.setdefault(words, []).append(column["name"])
    lines = [
        f"{'reserved rows' if len(names) == 1 else f'reserved rows of {_ranges(some)}'}: {words}"
        for words, some in names.items()
    ]
    kinds = {kind for column in tables for kind in column["reserved"]}
    if kinds & {"rare", "unknown"}:
        lines.append(
            "rare values occur too seldom to have a row of their own; unknown values do not occur in the rows over "
            "which the vocabulary was counted"
        )
    return lines


def _reserved_words(reserved: Mapping[str, int], has_vocabulary: bool, has_one_value: bool) -> str:
    """Return which row each kind of values has.

    Args:
        reserved: the row of each kind.
        has_vocabulary: whether the table has a vocabulary, so that values can be unknown.
        has_one_value: whether the table has one reserved row and one row of a value.
    """
    kinds_of: dict[int, list[str]] = {}
    for kind in ("missing", "rare", "unknown"):
        if kind in reserved:
            kinds_of.setdefault(reserved[kind], []).append(kind)
    words = [
        f"row {row} is for {_and(kinds)} values"
        if _is_reserved(row, reserved, has_one_value)
        else f"{_and(kinds)} values share the last row with the rarest value"
        for row, kinds in kinds_of.items()
    ]
    return ", ".join(words) or ("none; unknown values get the last row" if has_vocabulary else "none")


def _and(words: Sequence[str]) -> str:
    """
    >>> _and(["missing"]), _and(["missing", "rare", "unknown"])
    ('missing', 'missing, rare and unknown')
    """
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]
