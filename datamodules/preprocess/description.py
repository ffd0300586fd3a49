"""What the schema of a preprocessed dataset says of its columns, settings and raw values."""

from collections.abc import Mapping, Sequence
from typing import Any

from datamodules.preprocess.options import Options
from lightning_dlrm.contracts.schema import CRITEO_CATEGORICAL, CRITEO_DENSE, CRITEO_LABEL, Column, DatasetSchema


def columns_of_dataset(
    options: Options,
    known: DatasetSchema | None,
    labelled: bool,
    minimum: Mapping[str, int],
    counted: Mapping[str, Mapping[str, Any]],
) -> tuple[Column, ...]:
    """Return the columns of the dataset.

    Args:
        options: the options of the run.
        known: the schema of the dataset whose vocabulary is used, if any.
        labelled: whether the rows have labels.
        minimum: of each integer column, if the protocol needs it.
        counted: for each table the result of ``count_column``.
    """
    label = (Column(name=CRITEO_LABEL, role="label"),) if labelled else ()
    if known is not None:
        return (*label, *(column for column in known.columns if column.role != "label"))
    rules, bags = options.rules, options.bags
    dense = (
        Column(name=name, role="dense", transform=rules.dense_words.format(minimum=minimum.get(name, "")))
        for name in (CRITEO_DENSE if rules.dense else ())
    )
    tables = (
        Column(
            name=table.name,
            role="multi_hot" if bags and bags.size(table.name) > 1 else "categorical",
            cardinality=counted[table.name]["cardinality"],
            transform=_category_words(options, table.source),
            reserved=rules.reserved_of(table, options.threshold),
        )
        for table in rules.tables()
    )
    return (*label, *dense, *tables)


def _category_words(options: Options, source: str) -> str:
    """Describe the encoding of a categorical column."""
    rules, words = options.rules, options.rules.category_words
    if options.threshold > 1:
        words += f"; rare is below {options.threshold}"
    if source not in CRITEO_CATEGORICAL:
        missing = "missing as 0, " if rules.missing_bin_as_value else ""
        return f"{missing}floor(log(x)^2) where x > 2, {words}"
    if options.max_rows is not None and rules.modulo:
        modulo = f"{rules.modulo} % {options.max_rows}"
        words = f"{modulo}, {words}" if rules.modulo == "hash" else f"{words}, {modulo}"
    if options.bags and options.bags.size(source) > 1:
        words += f"; a bag of {options.bags.size(source)}: the id and {options.multi_hot_distribution} ones"
    return words


def settings_of(options: Options, known: DatasetSchema | None, minimum: Mapping[str, int]) -> dict[str, Any]:
    """Return the settings that shape the encoding."""
    if known is not None:
        return dict(known.settings)
    return options.settings() | ({"minimum": dict(minimum)} if minimum else {})


def report_of(
    options: Options,
    rows_per_file: list[list[Any]],
    facts: Sequence[Mapping[str, Any]],
    counted: Mapping[str, Mapping[str, Any]],
    bad_rows: int,
) -> dict[str, Any]:
    """Return the report of the schema: rows of each file, missing and distinct values, unknown and bad rows.

    Args:
        options: the options of the run.
        rows_per_file: name and rows of each input.
        facts: of each segment.
        counted: for each table the result of ``count_column`` or ``look_up_column``.
        bad_rows: rows that were skipped.
    """
    tables = [table.name for table in options.rules.tables()]
    columns = (*CRITEO_DENSE, *CRITEO_CATEGORICAL)
    report: dict[str, Any] = {
        "rows_per_file": rows_per_file,
        "missing": {name: sum(of_segment["missing"][name] for of_segment in facts) for name in columns},
    }
    sources = {"distinct": "distinct", "kept": "kept"} if options.encoding_of is None else {"unknown": "unknown_rows"}
    for name, fact in sources.items():
        report[name] = {table: counted[table][fact] for table in tables}
    if options.on_bad_row == "skip":
        report["bad_rows"] = bad_rows
    return report
