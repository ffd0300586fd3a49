"""What ``dataset.json`` says of a dataset that is made of raw files: its columns and the counts of its report."""

from collections.abc import Mapping, Sequence
from typing import Any

from datamodules.preprocess.encoding import Encoding
from datamodules.preprocess.log_recipe import LogOptions
from datamodules.preprocess.options import Fitted, Options
from lightning_dlrm.contracts.schema import CRITEO_LABEL, Column, DatasetSchema


def columns_of_dataset(
    encoding: Encoding,
    known: DatasetSchema | None,
    labelled: bool,
    counted: Mapping[str, Mapping[str, Any]],
    kept: Mapping[str, str],
) -> tuple[Column, ...]:
    """Return the columns of the dataset.

    Args:
        encoding: how rows are encoded.
        known: the schema of the dataset whose vocabulary is used, if any.
        labelled: whether the rows have labels.
        counted: for each table the result of ``count_column``.
        kept: types of kept columns.
    """
    label = (Column(name=CRITEO_LABEL, role="label"),) if labelled else ()
    beside = (Column(name=name, role="keep", transform=kind) for name, kind in kept.items())
    recipe = encoding.recipe
    if known is not None:
        features = [column for column in known.columns if column.role not in ("label", "keep")]
    else:
        bags = recipe.bags
        features = [Column(name=d.name, role="dense", transform=d.words) for d in recipe.dense(encoding.fitted)]
        features += (
            Column(
                name=table.name,
                role="multi_hot" if table.bag or (bags and bags.size(table.name) > 1) else "categorical",
                cardinality=counted[table.name]["cardinality"],
                transform=table.words,
                reserved=counted[table.name]["reserved"],
            )
            for table in encoding.tables
        )
        features += recipe.weights()
    columns = {column.name: column for column in (*features, *beside)}
    order = recipe.schema.made if isinstance(recipe, LogOptions) else list(columns)
    return (*label, *(columns[name] for name in order))


def report_of(
    options: Options | LogOptions,
    rows_per_file: list[list[Any]],
    facts: Sequence[Mapping[str, Any]],
    counted: Mapping[str, Mapping[str, Any]],
    cells: Mapping[str, Mapping[str, Mapping[str, int]]],
    bad_rows: int,
) -> dict[str, Any]:
    """Return the report of the schema: rows of each file, missing and distinct values, unknown and bad rows.

    Args:
        options: the options of the run.
        rows_per_file: name and rows of each input.
        facts: of each segment.
        counted: for each table the result of ``count_column`` or ``look_up_column``.
        cells: of the schema.
        bad_rows: rows that were skipped.
    """
    tables = [table.name for table in options.tables(Fitted())]
    return {
        "rows_per_file": rows_per_file,
        "missing": {
            name: sum(of_segment["missing"].get(source, 0) for of_segment in facts)
            for name, source in options.missing_sources().items()
        },
        **(
            {fact: {name: counted[name][fact] for name in tables} for fact in ("distinct", "kept")}
            if options.encoding_of is None
            else {"unknown": {name: cells["test"][name]["unknown"] for name in tables}}
        ),
        **({"bad_rows": bad_rows} if options.on_bad_row == "skip" else {}),
    }


def kept_types(facts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the type of each kept column: that of all segments with values, or text if they differ."""
    found: dict[str, set[str]] = {}
    for of_segment in facts:
        for name, kind in of_segment.get("kept", {}).items():
            found.setdefault(name, set()).add(kind)
    known = {name: kinds - {"null"} for name, kinds in found.items()}
    return {name: kinds.pop() if len(kinds) == 1 else "text" for name, kinds in known.items()}


def bag_sizes(
    options: Options | LogOptions, columns: Sequence[Column], facts: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Return the mean number of ids in the bags of each multi-hot column."""
    if isinstance(options, Options):
        return options.bag_sizes(columns)
    rows = sum(of_segment["rows"] for of_segment in facts)
    bags = [column.name for column in columns if column.role == "multi_hot"]
    return {name: sum(of_segment["items"][name] for of_segment in facts) / max(rows, 1) for name in bags}
