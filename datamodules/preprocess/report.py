"""The report of a run of ``preprocess``: its rows, columns and stages, printed and kept in the dataset folder."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.preprocess.inspection import aligned
from datamodules.preprocess.journal import written_aside
from datamodules.preprocess.progress import StageTime
from lightning_dlrm.contracts.schema import SPLITS, DatasetSchema


def write_report(path: Path, schema: DatasetSchema, run: Mapping[str, Any], stages: Sequence[StageTime]) -> None:
    """Write the report as JSON.

    Args:
        run: what the dataset's bytes depend on; a later run compares it with its own.
    """
    content = {
        "run": run,
        "rows": {name: split.rows for name, split in schema.splits.items()},
        "label_mean": {name: _label_mean(schema, name) for name in schema.splits},
        "table_rows": dict(schema.features.tables),
        **schema.report,
        "stages": [dataclasses.asdict(stage) for stage in stages],
    }
    with written_aside(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def render_report(schema: DatasetSchema, stages: Sequence[StageTime]) -> str:
    """Format the report as text."""
    report = schema.report
    rows = sum(split.rows for split in schema.splits.values())
    read = sum(count for _, count in report["rows_per_file"])
    splits = [("split", "rows", "label mean")]
    for name in (name for name in SPLITS if name in schema.splits):
        mean = _label_mean(schema, name)
        splits.append((name, f"{schema.splits[name].rows:,}", "" if mean is None else f"{mean:.4f}"))
    lines = ["", *aligned(splits), "", *_column_lines(schema), "", *map(str, stages)]
    lines.append(
        f"{read:,} rows read, {rows:,} written in {sum(stage.seconds for stage in stages):,.1f} s, "
        f"{max(stage.peak_bytes for stage in stages) / 1e9:,.2f} GB of memory at most"
    )
    if report.get("bad_rows"):
        were = "row was" if report["bad_rows"] == 1 else "rows were"
        lines.append(f"{report['bad_rows']:,} bad {were} left out, see bad_rows.tsv")
    return "\n".join(lines)


def _label_mean(schema: DatasetSchema, split: str) -> float | None:
    found = schema.splits[split]
    return None if found.positives is None else found.positives / found.rows


def _column_lines(schema: DatasetSchema) -> list[str]:
    """Format missing values of the raw columns, and what thresholds and moduli left of the tables."""
    report = schema.report
    rows = sum(count for _, count in report["rows_per_file"])
    body = []
    for column in schema.columns:
        if column.role == "label":
            continue
        source = column.name.replace("B", "I")
        body.append(
            (
                column.name,
                f"{report['missing'][source] / rows:.2%}" if rows else "",
                *(
                    f"{report[fact][column.name]:,}" if column.name in report.get(fact, {}) else ""
                    for fact in ("distinct", "kept", "unknown")
                ),
                f"{column.cardinality:,}" if column.cardinality else "",
            )
        )
    header = ("column", "missing", "values", "kept", "unknown rows", "table rows")
    totals = [sum(report.get(fact, {}).values()) for fact in ("distinct", "kept", "unknown")]
    body.append(
        ("all", "", *(f"{total:,}" if total else "" for total in totals), f"{sum(schema.features.table_rows):,}")
    )
    return aligned([header, *body])
