"""The report of a run of ``preprocess``, which is also kept in the dataset folder, its warnings, and
the commands to run next."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.preprocess.journal import written_aside
from datamodules.preprocess.progress import StageTime
from datamodules.preprocess.split_words import split_words
from datamodules.preprocess.text_tables import filled_below, fitted
from lightning_dlrm.contracts.schema import CRITEO_DENSE, SPLITS, DatasetSchema
from lightning_dlrm.contracts.terminal import aligned, binary_size, command_line, counted

REPORT_FILE = "report.json"
"""How a dataset was made: inputs, options, times. Not part of dataset.json, because it differs from run to run."""


GENERATED = "generated"
"""Key of the report that is true if a raw file was made by ``generate``."""


ROUNDED = "rounded"
"""Key of the schema's report that lists dense columns of whole numbers that float32 rounds."""


def mark_of(path: Path) -> Path:
    """Return the hidden file that ``generate`` leaves beside a raw file.

    It holds the raw file's size, because a file of other origin may take its place.
    """
    return path.with_name(f".{path.name}.{GENERATED}")


def write_report(
    path: Path, schema: DatasetSchema, run: Mapping[str, Any], stages: Sequence[StageTime], generated: bool = False
) -> None:
    """Write the report as JSON.

    Args:
        generated: whether a raw file was made by ``generate``.
        run: what the dataset's bytes depend on; a later run compares it with its own.
    """
    content = {
        "run": run,
        **({GENERATED: True} if generated else {}),
        "rows": {name: split.rows for name, split in schema.splits.items()},
        "label_mean": {name: label_mean(schema, name) for name in schema.splits},
        "table_rows": dict(schema.features.tables),
        **schema.report,
        "stages": [dataclasses.asdict(stage) for stage in stages],
    }
    with written_aside(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def render_report(schema: DatasetSchema, stages: Sequence[StageTime], width: int = 0, output: str = "") -> str:
    """Format the report as text.

    Args:
        schema: of the dataset.
        stages: the time, memory and disk of each.
        width: of the terminal, which lines do not exceed; 0 for no limit.
        output: the dataset folder.
    """
    report = schema.report
    rows = sum(split.rows for split in schema.splits.values())
    read = sum(count for _, count in report["rows_per_file"])
    splits = [("split", "rows", "positive")]
    for name in (name for name in SPLITS if name in schema.splits):
        mean = label_mean(schema, name)
        splits.append((name, f"{schema.splits[name].rows:,}", "" if mean is None else f"{mean:.2%}"))
    lines = ["", *aligned(splits)]
    if schema.by_role("label"):
        lines.append("  positive: share of the rows with label 1")
    lines += filled_below(f"split  {split_words(schema)}", width, "  ", 4)
    lines += ["", *_column_lines(schema, width), ""]
    lines += filled_below(
        f"{counted(read, 'row')} read, {counted(rows, 'row')} written{f' to {output}' if output else ''} in "
        f"{sum(stage.seconds for stage in stages):,.1f} s, with at most "
        f"{binary_size(max(stage.peak_bytes for stage in stages))} of memory (all processes together)",
        width,
        indent=2,
    )
    if report.get("bad_rows"):
        were = "was" if report["bad_rows"] == 1 else "were"
        lines.append(f"{counted(report['bad_rows'], 'bad row')} {were} left out, see bad_rows.tsv")
    return "\n".join(lines)


def one_label_warnings(schema: DatasetSchema) -> list[str]:
    """Return a line for each split whose rows all have the same label."""
    remedy = "give rows with both labels"
    if schema.report.get("bad_rows"):
        remedy += "; bad_rows.tsv lists the rows that were left out"
    return [
        f"all {split.rows:,} rows of the {name} split have the label {int(split.positives == split.rows)}, so "
        f"{'a model can learn nothing from them' if name == 'train' else 'their AUC is undefined'}: {remedy}"
        for name, split in schema.splits.items()
        if split.rows and split.positives in (0, split.rows)
    ]


def threshold_warnings(schema: DatasetSchema) -> list[str]:
    """Return a line for each table that min_count left without a value of its own."""
    return [
        f"all {values:,} values of {name} are rarer than min_count, so they share one row of the table: lower "
        "min_count, or leave the column out (role: leave)"
        for name, values in schema.report.get("distinct", {}).items()
        if values and schema.report.get("kept", {}).get(name) == 0
    ]


def label_mean(schema: DatasetSchema, split: str) -> float | None:
    """Return the share of label 1 in a split; None without labels."""
    found = schema.splits[split]
    return None if found.positives is None else found.positives / found.rows


def empty_feature_warnings(schema: DatasetSchema) -> list[str]:
    """Return a line if features have no value in any row."""
    rows = sum(count for _, count in schema.report["rows_per_file"])
    empty = [name for name, missing in schema.report["missing"].items() if rows and missing == rows]
    advice = "check the files, or leave the column out (role: leave)"
    return [f"no row has a value of {', '.join(empty)}: {advice}"] if empty else []


def large_number_warnings(schema: DatasetSchema) -> list[str]:
    """Return a line if dense columns have numbers that are too large for some models."""
    large = schema.large_numbers
    advice = "models such as DCN train badly on them; set transform: standard in the schema, or log1p for an amount"
    return [f"large numbers in {large}: {advice}"] if large else []


def rounded_number_warnings(schema: DatasetSchema) -> list[str]:
    """Return a line if dense columns have whole numbers that are rounded."""
    names = ", ".join(schema.report.get(ROUNDED, ()))
    found = f"whole numbers above 16,777,216 in {names}: dense columns keep about 7 digits (float32)"
    advice = "if they are ids, set role: categorical; if they are times, role: keep; amounts may stay dense"
    return [f"{found}; {advice}"] if names else []


def _column_lines(schema: DatasetSchema, width: int) -> list[str]:
    """Format missing values of the raw columns, and what thresholds and moduli left of the tables."""
    report = schema.report
    rows = sum(count for _, count in report["rows_per_file"])
    counts = [report.get(fact, {}) for fact in ("distinct", "kept", "unknown")]
    # Equal numbers would stand there twice.
    if counts[1] == counts[0]:
        counts[1] = {}
    if counts[0] == {column.name: column.cardinality for column in schema.columns if column.cardinality}:
        counts[0] = {}
    # Criteo's bins B1..B13 are made of I1..I13.
    missing = {f"B{name[1:]}": count for name, count in report["missing"].items() if name in CRITEO_DENSE}
    missing |= report["missing"]
    header = ("column", "missing", "values", "kept", "unknown rows", "table rows")
    body = [
        (
            column.name,
            f"{missing[column.name] / rows:.2%}" if rows and column.name in missing else "",
            *(f"{of_columns[column.name]:,}" if column.name in of_columns else "" for of_columns in counts),
            f"{column.cardinality:,}" if column.cardinality else "",
        )
        for column in schema.columns
        if column.role != "label"
    ]
    # Nothing is counted of kept columns.
    body = [row for row in body if any(row[1:])]
    totals = (sum(of_columns.values()) for of_columns in counts)
    last = ("all", "", *(f"{total:,}" if total else "" for total in totals), f"{sum(schema.features.table_rows):,}")
    lines = fitted([header, *body, last], width)
    legends = [f"{name}: {words}" for name, words in _LEGENDS.items() if name in lines[0]]
    if any(column.reserved for column in schema.columns):
        legends[-1] += ", with reserved rows, such as those of missing and rare values"
    return lines + [part for legend in legends for part in filled_below(legend, width, "  ", 4)]


_LEGENDS = {
    "missing": "share of the rows without a value; of multi-hot columns, with an empty list",
    "values": "different values in the rows over which the vocabulary was counted",
    "kept": "values with a row of their own; the others are rare",
    "unknown rows": "rows with a value that the vocabulary does not have",
    "table rows": "rows of the embedding table",
}
"""Header of the table of columns, and what it means."""


def fit_command(data: str, has_dense: bool, files: Sequence[str] = ("dlrm.yaml", "own_data.yaml")) -> str:
    """Return the command that trains DLRM by some configurations on a dataset folder."""
    # DLRM's bottom MLP takes dense features.
    without = [] if has_dense else ["--model.network.bottom_mlp", "[]"]
    configs = [word for file in files for word in ("--config", file)]
    return command_line("fit", *configs, "--data.path", data, *without)
