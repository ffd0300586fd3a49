"""The facts of a dataset folder, as tables or as JSON, for ``inspect``."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datamodules.folder import Folder
from datamodules.preprocess.leakage import render_equal_rows
from datamodules.preprocess.progress import format_size
from datamodules.preprocess.skew import vocabulary_skew
from lightning_dlrm.contracts.documents import parse_json
from lightning_dlrm.contracts.schema import SCHEMA_FILE, SPLITS, Column, DatasetSchema
from lightning_dlrm.contracts.terminal import aligned


@dataclass(frozen=True, kw_only=True)
class _Report:
    """The counts of ``DatasetSchema.report`` that ``inspect`` shows."""

    rows_per_file: tuple[tuple[str, int], ...] = ()
    missing: Mapping[str, int] = field(default_factory=dict)
    distinct: Mapping[str, int] = field(default_factory=dict)


def summary(folder: str | Path | Folder, schema: DatasetSchema) -> dict[str, Any]:
    """Return the facts of a dataset as JSON values.

    ``columns`` has for each column ``missing`` (share of the rows read, or of those written if it is counted in them),
    ``most_frequent`` (share of the lookups of the most frequent id), ``ids_for_90`` (the smallest number of ids that
    90% of the lookups go to) and ``unknown`` (share of the rows after the training split); None if not known. ``note``
    names columns of one value, none, and few bins.

    Raises:
        UserError: a vocabulary is not a readable Parquet file.
    """
    rows = sum(split.rows for split in schema.splits.values())
    report = parse_json(json.dumps(schema.report), _Report, Folder(folder) / SCHEMA_FILE, "make the dataset again")
    # Missing values are counted in the rows that were read, of which sampling may drop some.
    rows_read = sum(count for _, count in report.rows_per_file) or rows
    missing = report.missing if rows_read else {}
    skews = {column.name: vocabulary_skew(folder, schema, column) for column in schema.columns}
    held_out = [name for name in schema.cells if name != "train"]
    return {
        "folder": str(folder),
        "dataset": schema.dataset,
        "protocol": schema.protocol,
        "settings": dict(schema.settings),
        "fingerprints": {"encoding": schema.encoding_fingerprint, "data": schema.data_fingerprint},
        "rows": rows,
        "bytes": sum(file.bytes for split in schema.splits.values() for file in split.files),
        "table_rows": sum(schema.features.table_rows),
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
        "columns": [
            {
                "name": column.name,
                "role": column.role,
                "cardinality": column.cardinality,
                "transform": column.transform,
                "reserved": dict(column.reserved),
                "missing": missing[column.name] / rows_read
                if column.name in missing
                else _cell_share(schema, column.name, "missing", schema.cells),
                "most_frequent": skew.most_frequent if skew else None,
                "ids_for_90": skew.ids_for.get(0.9) if skew else None,
                "unknown": _cell_share(schema, column.name, "unknown", held_out),
                "note": _note(schema, column, report.distinct.get(column.name)),
            }
            for column in schema.columns
            for skew in (skews[column.name],)
        ],
        "optimum": {
            name: {"auc": optimum.auc, "log_loss": optimum.log_loss} for name, optimum in schema.optimum.items()
        },
        "rows_per_file": [list(of_file) for of_file in report.rows_per_file] or None,
    }


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
    return "one value" if values else "all missing"


def render(facts: Mapping[str, Any]) -> str:
    """Format the facts of ``summary`` as text, and under ``leakage`` those of ``equal_rows`` if there are any."""
    settings = "".join(
        f", {name} {'for each column' if isinstance(value, Mapping) else value}"
        for name, value in facts["settings"].items()
        if name != "schema"  # of a log, which the columns describe
    )
    lines = [
        Folder(facts["folder"]) / SCHEMA_FILE,
        f"  dataset      {facts['dataset']}, protocol {facts['protocol']}{settings}",
        f"  encoding     {facts['fingerprints']['encoding'][:16]}  (a model needs data with it)",
        f"  data         {facts['fingerprints']['data'][:16]}  (a run resumes only on data with it)",
        f"  size         {facts['rows']:,} rows, {format_size(facts['bytes'])} of Parquet",
    ]
    if facts["rows_per_file"]:
        lines.append("  made from    " + ", ".join(f"{name} ({rows:,} rows)" for name, rows in facts["rows_per_file"]))
    if split := facts["settings"].get("schema", {}).get("split"):
        lines.append(f"  split        {_split_words(**split)}")
    lines += _transforms(facts)
    lines += ["", *_split_table(facts), "", *_column_table(facts)]
    for name, optimum in facts["optimum"].items():
        lines.append(f"best reachable on {name}: AUC {optimum['auc']:.4f}, log loss {optimum['log_loss']:.4f}")
    if facts.get("leakage"):
        lines += ["", *render_equal_rows(facts["leakage"])]
    return "\n".join(lines)


def _split_words(by: str, **options: Any) -> str:
    """Return how the schema of a log splits its rows."""
    given = (f"{name} {', '.join(map(str, v)) if isinstance(v, list) else v}" for name, v in options.items())
    return ", ".join([by if by == "random" else f"by {by}", *given])


def _transforms(facts: Mapping[str, Any]) -> list[str]:
    """Return for each role the transform of its columns, with the columns' names if transforms differ."""
    columns_of: dict[str, dict[str, list[str]]] = {}
    for column in facts["columns"]:
        if column["transform"]:
            columns_of.setdefault(column["role"], {}).setdefault(column["transform"], []).append(column["name"])
    lines = []
    for role, by_words in columns_of.items():
        for number, (words, names) in enumerate(by_words.items()):
            which = f"{_ranges(names)}: " if len(by_words) > 1 else ""
            lines.append(f"  {'' if number else role:<12} {which}{words}")
    return lines


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


def _split_table(facts: Mapping[str, Any]) -> list[str]:
    header = ("split", "rows", "share", "label mean", "files", "unknown ids", "rare", "missing")
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
    return aligned([header, *body])


def _column_table(facts: Mapping[str, Any]) -> list[str]:
    header = ("column", "role", "table rows", "missing", "unknown", "top id", "90% in", "")
    kinds = dict.fromkeys(kind for column in facts["columns"] for kind in column["reserved"])
    body = [
        (
            column["name"],
            column["role"],
            f"{column['cardinality']:,}" if column["cardinality"] else "",
            *(
                "" if column[share] is None else f"{column[share]:.2%}"
                for share in ("missing", "unknown", "most_frequent")
            ),
            "" if column["ids_for_90"] is None else f"{column['ids_for_90']:,}",
            column["note"],
        )
        for column in facts["columns"]
    ]
    total = ("all", "", f"{facts['table_rows']:,}", *[""] * 5)
    lines = aligned([header, *body, total], left=(0, 1, 7))
    if "top id" in lines[0]:
        lines.append("top id: share of the lookups of the most frequent id; 90% in: ids that take 90%")
    if kinds:
        lines.append(f"table rows include the rows of {', '.join(kinds)} values")
    return lines
