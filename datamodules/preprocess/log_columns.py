"""Columns of a click log as segments hold them, by the schema of the log."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa

from datamodules import values
from datamodules.log_schema import LogColumn, LogSchema
from datamodules.preprocess.staging import dictionary_with_missing
from datamodules.values import staged_name
from lightning_dlrm.contracts.schema import CRITEO_LABEL, SPLITS

SPLIT = "split"
"""Name of the column of segments by which rows are split."""


def staged_columns(
    schema: LogSchema,
    table: pa.Table,
    names: Collection[str],
    *,
    labelled: bool,
    splits: bool,
    nulls: Sequence[str],
) -> pa.Table:
    """Return the columns of segments.

    Args:
        schema: of the log.
        table: rows; columns that it lacks are missing in each row.
        names: the log's columns.
        labelled: whether rows have labels.
        splits: whether rows are split.
        nulls: texts that mean a missing value.

    Raises:
        BadValueError: a value is not of the schema.
    """
    columns: dict[str, pa.Array] = {}
    decimal = schema.decimal

    def column(name: str) -> pa.ChunkedArray:
        given = name in table.column_names
        return values.without_nulls(table.column(name), nulls) if given else pa.chunked_array([pa.nulls(len(table))])

    def single(name: str) -> pa.ChunkedArray:
        values.check_single(name, found := column(name))
        return found

    if labelled:
        label = schema.label_in(names)
        columns[CRITEO_LABEL] = pa.array(values.labels(label, single(label.column), decimal))
    by = schema.split.column if splits else None
    if by is not None and schema.split.by == "time":
        form = _form_of_time(schema.columns, by)
        columns[SPLIT] = pa.array(values.split_keys(by, single(by), form))
    elif by is not None:
        columns[SPLIT] = pa.array(values.split_codes(by, single(by), schema.split.values, SPLITS))
    for name, one in schema.columns.items():
        source = one.source or name
        if one.role == "keep":
            found = values.kept(source, single(source), one.time)
            columns[staged_name("keep", name)] = found
        elif one.role == "multi_hot":
            bag, keep = values.bags(source, column(source), one.separator)
            columns[staged_name("bag", name)] = bag
            if one.weights:
                of_bag = values.weights(one.weights, column(one.weights), one.separator, column(source), keep)
                columns[staged_name("weights", name)] = of_bag
        elif one.role == "dense" or one.transform is not None:
            if (staged := staged_name("number", source)) not in columns:
                columns[staged] = values.numbers(source, single(source), decimal)
        elif one.role == "categorical" and (staged := staged_name("text", source)) not in columns:
            columns[staged] = values.texts(single(source))
    return pa.table(columns)


def segment_of(tables: Sequence[pa.Table]) -> tuple[pa.RecordBatch, dict[str, Any]]:
    """Return rows in the form of a segment, and its facts."""
    table = pa.concat_tables(_with_equal_types(tables), promote_options="permissive")
    distinct: dict[str, int] = {}
    missing: dict[str, int] = {}
    columns: dict[str, pa.Array] = {}
    kept: dict[str, str] = {}
    items: dict[str, int] = {}
    for staged in table.column_names:
        kind, _, name = staged.partition("/")
        found = table.column(staged).unify_dictionaries().combine_chunks()
        if isinstance(found, pa.ChunkedArray):
            found = found.chunk(0)
        if kind in ("text", "number"):
            missing[staged] = found.null_count
        if kind == "text":
            found = dictionary_with_missing(found, "")
            distinct[staged] = len(found.dictionary) - 1
        elif kind == "bag":
            found = pa.ListArray.from_arrays(found.offsets, dictionary_with_missing(found.values, ""))
            distinct[staged] = len(found.values.dictionary) - 1
            items[name] = len(found.values)
        elif kind == "keep":
            kept[name] = _kept_type(found)
        columns[staged] = found
    facts = {
        "rows": len(table),
        "missing": missing,
        "minimum": {},
        "distinct": distinct,
        "kept": kept,
        "items": items,
    }
    return pa.record_batch(columns), facts


def _with_equal_types(tables: Sequence[pa.Table]) -> Sequence[pa.Table]:
    """Return tables of columns of segments, in which kept columns are texts if they have several types.

    Parts of a piece that are read apart, beside a bad row, may have them in JSON.
    """
    for name in tables[0].column_names:
        kinds = {table.column(name).type for table in tables} - {pa.null()}
        if name.startswith(staged_name("keep", "")) and len(kinds) > 1 and kinds != {pa.int64(), pa.float64()}:
            tables = [
                table.set_column(table.column_names.index(name), name, values.texts(table.column(name)))
                for table in tables
            ]
    return tables


def _kept_type(column: pa.Array) -> str:
    """Return the name in ``KEPT_TYPES`` of what ``kept`` returns; ``null`` of nulls alone."""
    kind = column.type
    if pa.types.is_timestamp(kind):
        return "timestamp"
    return {pa.int64(): "int64", pa.float64(): "float64", pa.bool_(): "bool", pa.null(): "null"}.get(kind, "text")


def _form_of_time(columns: Mapping[str, LogColumn], source: str) -> str | None:
    """Return how values of a log's column become times; None if the schema does not say."""
    return next((c.time for name, c in columns.items() if (c.source or name) == source and c.time), None)
