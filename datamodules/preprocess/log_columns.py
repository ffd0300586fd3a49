"""Columns of a click log as segments hold them, by the schema of the log."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datamodules import times, values
from datamodules.log_schema import LogSchema
from datamodules.log_settings import LogColumn
from datamodules.values import BadValueError, staged_name
from lightning_dlrm.contracts.schema import CRITEO_LABEL, SPLITS

_HASH = re.compile("[0-9a-fA-F]{8}")
_INTEGERS = ((7, pa.int8()), (15, pa.int16()), (31, pa.int32()))

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
        columns[SPLIT] = pa.array(times.split_keys(by, single(by), form))
    elif by is not None:
        columns[SPLIT] = pa.array(values.split_codes(by, single(by), schema.split.values, SPLITS))
    for name, one in schema.columns.items():
        source = one.source or name
        if one.role == "keep":
            columns[staged_name("keep", name)] = times.kept(source, single(source), one.time)
        elif one.role == "multi_hot":
            bag, keep = values.bags(source, column(source), one.separator, one.brackets)
            columns[staged_name("bag", name)] = bag
            if one.weights:
                of_bag = values.weights(
                    one.weights, column(one.weights), one.separator, column(source), keep, one.brackets
                )
                columns[staged_name("weights", name)] = of_bag
        elif one.role != "leave" and (staged := staged_name(one.form, source)) not in columns:
            if one.form == "number":
                columns[staged] = values.numbers(source, single(source), decimal)
            else:
                columns[staged] = values.texts(single(source)) if one.form == "text" else hashes(source, single(source))
    return pa.table(columns)


def hashes(name: str, column: pa.ChunkedArray) -> pa.DictionaryArray:
    """Return hashes of 8 hexadecimal digits as codes into a dictionary of uint32, null where one is missing.

    Raises:
        BadValueError: a value is not such a hash.
    """
    encoded = values.texts(column)
    found = [int(text, 16) if _HASH.fullmatch(text) else None for text in encoded.dictionary.to_pylist()]
    numbers = pa.array(found, pa.uint32())
    if numbers.null_count:
        raise BadValueError(
            pc.and_(encoded.is_valid(), numbers.take(encoded.indices).is_null()),
            lambda row: (
                f"{name} is {values.shown(encoded[row].as_py())}, expected 8 hexadecimal digits; correct the "
                "line, or leave type out of the schema"
            ),
        )
    return pa.DictionaryArray.from_arrays(encoded.indices, numbers)


def segment_of(tables: Sequence[pa.Table]) -> tuple[pa.RecordBatch, dict[str, Any]]:
    """Return rows in the form of a segment, and its facts."""
    table = pa.concat_tables(_with_equal_types(tables), promote_options="permissive")
    distinct: dict[str, int] = {}
    missing: dict[str, int] = {}
    minimum: dict[str, float | None] = {}
    whole: dict[str, float | None] = {}
    columns: dict[str, pa.Array] = {}
    kept: dict[str, str] = {}
    items: dict[str, int] = {}
    for staged in table.column_names:
        kind, _, name = staged.partition("/")
        found = table.column(staged).unify_dictionaries().combine_chunks()
        if isinstance(found, pa.ChunkedArray):
            found = found.chunk(0)
        if kind in ("text", "hash", "number"):
            missing[staged] = found.null_count
        if kind == "number":
            bounds = pc.min_max(found).as_py()
            minimum[staged] = bounds["min"]
            if pa.types.is_integer(found.type):
                highest = max(bounds["max"] or 0, ~(bounds["min"] or 0))
                found = found.cast(next(integer for bits, integer in _INTEGERS if highest < 1 << bits))
            else:
                whole[staged] = _largest_whole(found)
        if kind in ("text", "hash"):
            found = _with_missing(found, "" if kind == "text" else np.uint32(0))
            distinct[staged] = len(found.dictionary) - 1
        elif kind == "bag":
            found = pa.ListArray.from_arrays(found.offsets, _with_missing(found.values, ""))
            distinct[staged] = len(found.values.dictionary) - 1
            items[name] = len(found.values)
            missing[staged] = int(np.count_nonzero(np.diff(found.offsets) == 0))
        elif kind == "keep":
            kept[name] = _kept_type(found)
        columns[staged] = found
    facts = {
        "rows": len(table),
        "missing": missing,
        "minimum": minimum,
        "whole": whole,
        "distinct": distinct,
        "kept": kept,
        "items": items,
    }
    return pa.record_batch(columns), facts


def _largest_whole(numbers: pa.Array) -> float | None:
    """Return the largest absolute value of whole numbers, 0 without values; None if a number has a fraction."""
    values = numbers.drop_null().to_numpy()
    return float(np.abs(values).max(initial=0.0)) if np.array_equal(values, np.floor(values)) else None


def _with_missing(encoded: pa.DictionaryArray, stand_in: str | np.uint32) -> pa.DictionaryArray:
    """Return values without nulls: the narrowest codes, and a dictionary whose last entry stands for missing values."""
    last = len(encoded.dictionary)
    codes = encoded.indices.fill_null(last).to_numpy().astype(np.min_scalar_type(last))
    values = pa.concat_arrays([encoded.dictionary, pa.array([stand_in], encoded.dictionary.type)])
    return pa.DictionaryArray.from_arrays(pa.array(codes), values, safe=False)


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
