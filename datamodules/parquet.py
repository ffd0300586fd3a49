"""Part files of a dataset folder: open them, check them against the schema, and read their row groups. Nothing here
imports torch."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datamodules.folder import REMEDY, Folder, check_sizes, load_schema
from lightning_dlrm.contracts.errors import UserError, one_line, require
from lightning_dlrm.contracts.schema import WEIGHTS_SUFFIX, Column, DataFile, DatasetSchema, SplitName

ARROW_TYPES: Mapping[str, pa.DataType] = {
    "label": pa.int8(),
    "dense": pa.float32(),
    "categorical": pa.int32(),
    "multi_hot": pa.list_(pa.int32()),
    "weights": pa.list_(pa.float32()),
}

KEPT_TYPES: Mapping[str, pa.DataType] = {
    "text": pa.string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "timestamp": pa.timestamp("us"),
}
"""Of kept columns, by ``Column.transform``."""

SLICE_ROWS = 65_536
"""Rows that are decoded together, at most: row groups of other writers may have any number of rows."""
_SLICE_BYTES = 64 * 2**20
"""Encoded bytes that are decoded together, about."""

_REMEDY_OF_NULLS: Mapping[str, str] = {
    "label": "give every row the label 0 or 1",
    "categorical": "give missing values an id of their own",
    "multi_hot": "leave missing ids out of the bags, or give them an id of their own",
}


def open_part(
    folder: str | Path | Folder, schema: DatasetSchema, file: DataFile, verify: bool = True
) -> pq.ParquetFile:
    """Open a part file and compare its footer with the schema.

    Args:
        folder: the dataset folder.
        schema: its schema.
        file: one of its part files.
        verify: compare the checksums of pages while reading.

    Raises:
        UserError: the file is missing or not Parquet, or its columns or row groups do not match the schema.
    """
    where = Folder(folder)
    try:
        return _opened(where, schema, file, verify)
    except UserError as error:
        try:
            found = load_schema(where).data_fingerprint
        except UserError:
            raise error from None
        require(
            found == schema.data_fingerprint,
            f"{where} now holds another dataset (fingerprint {found[:12]}, it was {schema.data_fingerprint[:12]}): "
            "restore the first dataset, or start a new run",
        )
        raise


def _opened(where: Folder, schema: DatasetSchema, file: DataFile, verify: bool) -> pq.ParquetFile:
    check_sizes(where, [file])
    path = where / file.path
    part = where.open_parquet(file.path, verify)
    types = dict(zip(part.schema_arrow.names, part.schema_arrow.types, strict=True))
    for column in schema.columns:
        found = types.get(column.name)
        if found is None or not _fits(found, column):
            state = "is missing" if found is None else f"has type {found}"
            raise UserError(f"{path}: column {column.name} {state}, expected {arrow_type(column)}; {REMEDY}")
    metadata = part.metadata
    groups = tuple(metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))
    require(
        groups == file.row_groups,
        f"{path} is altered: it has {sum(groups)} rows in {len(groups)} row groups, its dataset.json says "
        f"{file.rows} in {len(file.row_groups)} (or splits them differently); {REMEDY}",
    )
    return part


def arrow_type(column: Column) -> pa.DataType:
    """Return the type of a column in part files."""
    return KEPT_TYPES[column.transform] if column.role == "keep" else ARROW_TYPES[column.role]


def weighted_column(weights: Column) -> str:
    """Return the name of the multi-hot column that a weights column belongs to."""
    return weights.name.removesuffix(WEIGHTS_SUFFIX)


def check_weights(where: str, weights: pa.Array | pa.ChunkedArray, ids: pa.Array | pa.ChunkedArray) -> None:
    """Check that every bag has one finite weight for each of its ids.

    Args:
        where: the column, and its file if there is one, for the message.
        weights: list<float32>.
        ids: list<int32>, as many lists.

    Raises:
        UserError: the numbers of weights and ids of a bag differ, or a weight is null, NaN or infinite.
    """
    lengths = pc.list_value_length(weights)
    different = pc.indices_nonzero(pc.fill_null(pc.not_equal(lengths, pc.list_value_length(ids)), True))
    if len(different):
        row = different[0].as_py()
        found, expected = (len(lists[row].as_py() or ()) for lists in (weights, ids))
        raise UserError(
            f"{where}: row {row} has {found} weights for {expected} ids; give each id one weight, "
            "and an empty bag an empty list"
        )
    require(
        pc.all(pc.fill_null(pc.is_finite(pc.list_flatten(weights)), False), min_count=0).as_py(),
        f"{where}: a weight is null, NaN or infinite; give each id a number, such as 1",
    )


def read_slices(
    where: Folder,
    file: DataFile,
    part: pq.ParquetFile,
    group: int,
    columns: Sequence[Column],
    threads: bool = True,
    check: bool = True,
) -> Iterator[pa.RecordBatch]:
    """Yield some columns of a row group in slices of ``SLICE_ROWS`` rows, and check every value.

    Args:
        where: the dataset folder.
        file: one of its part files.
        part: the same file, open.
        group: index of the row group in the file.
        columns: the columns to read, at least one.
        threads: decode columns in parallel.
        check: check the values; False if the caller does.

    Raises:
        UserError: the row group cannot be decoded or lacks rows, or see ``check_values``.
    """
    path = where / file.path
    names = [column.name for column in columns]
    slices = part.iter_batches(_rows_of_slice(part, group), row_groups=[group], columns=names, use_threads=threads)
    first = row = sum(file.row_groups[:group])
    while True:
        try:
            found = next(slices, None)
        except Exception as error:  # remote file systems have errors of their own
            raise UserError(
                f"{path} is altered: row group {group} cannot be decoded ({one_line(error)}); {REMEDY}"
            ) from error
        if found is None:
            break
        if check:
            check_values(f"{path}, row group {group}", columns, found, row)
        row += len(found)
        yield found
    expected = file.row_groups[group]
    require(row - first == expected, f"{path} is altered: row group {group} has {row - first} rows of {expected}")


def read_part(
    folder: str | Path | Folder, schema: DatasetSchema, file: DataFile, columns: Sequence[Column]
) -> Iterator[pa.RecordBatch]:
    """Yield some columns of a part file in slices of ``SLICE_ROWS`` rows at most.

    Raises:
        UserError: see ``open_part`` and ``read_slices``.
    """
    where = Folder(folder)
    with open_part(where, schema, file) as part:
        for group in range(part.num_row_groups):
            yield from read_slices(where, file, part, group, columns)


def read_beside(where: Folder, schema: DatasetSchema, splits: Sequence[SplitName]) -> Iterator[pa.Table]:
    """Yield the columns other than features of every row, in order: ``split``, the label if there is one, and the kept
    columns.

    Raises:
        UserError: see ``read_part``.
    """
    columns = schema.by_role("label", "keep")
    for split in splits:
        for file in schema.splits[split].files:
            # Without such columns, any column gives the number of rows.
            for rows in read_part(where, schema, file, columns or schema.columns[:1]):
                names = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(rows), np.int8)), [split])
                beside = [rows.column(column.name) for column in columns]
                yield pa.table([names.cast(pa.string()), *beside], ["split", *(column.name for column in columns)])


def _rows_of_slice(part: pq.ParquetFile, group: int) -> int:
    """Return ``SLICE_ROWS``, or fewer rows if they are long."""
    metadata = part.metadata.row_group(group)
    return max(1, min(SLICE_ROWS, _SLICE_BYTES * metadata.num_rows // max(metadata.total_byte_size, 1)))


def check_values(place: str, columns: Sequence[Column], rows: pa.RecordBatch, first: int) -> None:
    """Check the values of some columns.

    Args:
        place: the file, for messages.
        columns: the columns to check, which ``rows`` have.
        rows: rows in the types of part files.
        first: place of the first of them in the file.

    Raises:
        UserError: a column without nulls has some, labels are other than 0 and 1, dense values or weights are infinite,
            or ids are not those of their table.
    """
    for column in columns:
        _check_column(f"{place}, column {column.name}", column, rows, first)


def _check_column(place: str, column: Column, rows: pa.RecordBatch, first: int) -> None:
    values = rows.column(column.name)
    items = values.flatten() if pa.types.is_list(values.type) else values
    if remedy := _REMEDY_OF_NULLS.get(column.role):
        require(not items.null_count, f"{place} has nulls ({items.null_count:,}); {remedy}")
    if column.role == "label":
        _check_labels(place, values, first)
    elif column.role == "dense":
        _check_dense(place, values, first)
    elif column.role == "weights":
        bags = weighted_column(column)
        if bags in rows.schema.names:
            check_weights(f"{place}, rows from {first:,}", values, rows.column(bags))
    elif column.cardinality:
        # As uint32, negative ids are large. NumPy takes a tenth of the time of pyarrow's min_max.
        ids = items.to_numpy().view(np.uint32)
        if ids.max(initial=0) >= column.cardinality:
            index = int(np.flatnonzero(ids >= column.cardinality)[0])
            row = index if items is values else int(np.searchsorted(_bag_ends(values), index, side="right"))
            raise UserError(
                f"{place} has the id {ids.view(np.int32)[index]} in row {first + row:,} of the file, its table has "
                f"rows 0 to {column.cardinality - 1}; make the dataset again"
            )


def _check_labels(place: str, labels: pa.Array, first: int) -> None:
    # As uint8, negative labels are large.
    values = labels.to_numpy().view(np.uint8)
    if values.max(initial=0) > 1:
        row = int(np.flatnonzero(values > 1)[0])
        found = ", ".join(map(str, np.unique(values.view(np.int8)).tolist()[:5]))
        raise UserError(
            f"{place} has the labels {found} (row {first + row:,} of the file has {labels[row]}); expected 0 (no "
            "click) and 1 (click): give each row one of them"
        )


def _bag_ends(bags: pa.ListArray) -> np.ndarray:
    """Return where each bag ends among the items of all bags."""
    return np.cumsum(pc.fill_null(pc.list_value_length(bags), 0).to_numpy())


def _check_dense(place: str, values: pa.Array, first: int) -> None:
    stored = np.frombuffer(values.buffers()[1] or b"", np.float32)[values.offset :][: len(values)]
    # Values that are stored for nulls are arbitrary.
    if np.isinf(stored).any() and (infinite := np.flatnonzero(np.isinf(values.to_numpy(zero_copy_only=False)))).size:
        raise UserError(
            f"{place} has {stored[infinite[0]]} in row {first + infinite[0]:,} of the file; expected finite numbers, "
            "or null for a missing value: correct the data"
        )


def _fits(found: pa.DataType, column: Column) -> bool:
    expected = arrow_type(column)
    if pa.types.is_list(expected):
        return pa.types.is_list(found) and found.value_type.equals(expected.value_type)
    return found.equals(expected)


def __getattr__(name: str) -> Any:
    if name == "DatasetWriter":
        warnings.warn("DatasetWriter is in datamodules.writer", DeprecationWarning, stacklevel=2)
        from datamodules.writer import DatasetWriter

        return DatasetWriter
    raise AttributeError(f"module {__name__} has no attribute {name}")
