"""The facts of a dataset folder as JSON values, for ``inspect``; ``inspection_text`` formats them."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datamodules.folder import Folder
from datamodules.preprocess.skew import Skew, vocabulary_skew
from datamodules.preprocess.split_words import schema_of_log, split_words
from lightning_dlrm.contracts.documents import parse_json
from lightning_dlrm.contracts.schema import SCHEMA_FILE, SPLITS, Column, DatasetSchema

_ONE_VALUE = "one value"
_MOSTLY = 0.5  # share of missing values, above which a column is suspicious
_MANY_UNKNOWN = 0.1  # share of unknown values, above which a column is suspicious
_OTHER_MEAN = 0.2  # relative difference of shares of positive labels that is suspicious
_ERRORS = 4.0  # standard errors that this difference must exceed


@dataclass(frozen=True, kw_only=True)
class _Report:
    """The counts of ``DatasetSchema.report`` that ``inspect`` shows."""

    rows_per_file: tuple[tuple[str, int], ...] = ()
    missing: Mapping[str, int] = field(default_factory=dict)
    distinct: Mapping[str, int] = field(default_factory=dict)


def summary(folder: str | Path | Folder, schema: DatasetSchema) -> dict[str, Any]:
    """Return the facts of a dataset as JSON values.

    ``columns`` has for each column ``missing`` (share of rows without a value, or with an empty list, in the rows
    read, or in those written if it is counted in them),
    ``most_frequent`` (share of the lookups of the most frequent id), ``most_frequent_is`` (which values this id is
    reserved for, such as ``rare``), ``ids_for_90`` (the smallest number of ids that 90% of the lookups go to) and
    ``unknown`` (share of the values outside the training split); None if not known. ``reserved_rows`` says which rows
    missing, rare and unknown values get. ``note`` names columns of one
    value, none, and few bins. ``suspicious`` lists what is unusual about the data. ``split_rule`` says how the rows
    were split, and ``left_out`` lists the columns of a log that its schema leaves out.

    Raises:
        UserError: a vocabulary is not a readable Parquet file.
    """
    report = parse_json(json.dumps(schema.report), _Report, Folder(folder) / SCHEMA_FILE, "make the dataset again")
    columns = _columns(folder, schema, report)
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
        "columns": columns,
        "suspicious": _suspicious(schema, columns),
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
        if column.role == "multi_hot" and name not in missing:
            share = None  # Cells count values, and empty lists have none.
        found.append(
            {
                "name": name,
                "role": column.role,
                "cardinality": column.cardinality,
                "transform": column.transform,
                "reserved": dict(column.reserved),
                "reserved_rows": _reserved_rows(column, report.distinct.get(name)),
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


def _reserved_rows(column: Column, values: int | None) -> str:
    """Return which rows missing, rare and unknown values get, given the number of different values of a column."""
    kinds_of: dict[int, list[str]] = {}
    for kind, row in column.reserved.items():
        kinds_of.setdefault(row, []).append(kind)
    parts = []
    for row, kinds in kinds_of.items():
        if not _is_reserved(row, column.reserved, _has_one_value(column.cardinality, values == 1)):
            gets = "get the row of the rarest value"
        else:
            gets = "share a row" if len(kinds) > 1 else "have a row of their own"
        parts.append(f"{', '.join(kinds[:-1])}{' and ' * (len(kinds) > 1)}{kinds[-1]} values {gets}")
    return "; ".join(parts)


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
    counted = [name for name in splits if column in schema.cells[name]]
    values = sum(schema.counted_values(name, column) for name in counted)
    return sum(schema.cells[name][column].get(kind, 0) for name in counted) / values if values else None


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


def _suspicious(schema: DatasetSchema, columns: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return lines about what is unusual: splits without rows or with other shares of positive labels, columns of one
    value or with few values, many unknown values, few bins, and large numbers."""
    features = [column for column in columns if column["role"] in ("dense", "categorical", "multi_hot")]
    mostly = [
        ("no value in more than half of the rows: {}", [c for c in features if (c["missing"] or 0) > _MOSTLY]),
        (
            f"over {_MANY_UNKNOWN:.0%} of the validation and test values are unknown in {{}}",
            [c for c in features if (c["unknown"] or 0) > _MANY_UNKNOWN],
        ),
        ("one value only: {}", [c for c in features if c["note"] == _ONE_VALUE]),
    ]
    lines = [
        *_split_lines(schema),
        *(words.format(", ".join(c["name"] for c in found)) for words, found in mostly if found),
    ]
    few = [f"{c['name']} {c['note'].partition(' ')[0]}" for c in features if c["note"].endswith(" bins")]
    if few:
        lines.append(f"fewer bins than {schema.settings['bins']}, because values repeat: {', '.join(few)}")
    if schema.large_numbers:
        lines.append(f"large numbers, on which models such as DCN train badly: {schema.large_numbers}")
    return lines


def _split_lines(schema: DatasetSchema) -> list[str]:
    """Return lines about splits without rows, or with another share of positive labels than training."""
    lines = [f"the {name} split has no rows" for name, split in schema.splits.items() if not split.rows]
    train = schema.splits.get("train")
    if train is None or not train.rows or train.positives is None:
        return lines
    mean = train.positives / train.rows
    for name, split in schema.splits.items():
        if name == "train" or not split.rows or split.positives is None:
            continue
        share = split.positives / split.rows
        error = math.sqrt(mean * (1 - mean) * (1 / split.rows + 1 / train.rows))
        if abs(share - mean) > max(_ERRORS * error, _OTHER_MEAN * mean):
            lines.append(f"{share:.2%} of the {name} rows are positive, against {mean:.2%} of the training rows")
    return lines
