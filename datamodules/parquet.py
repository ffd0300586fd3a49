"""Part files of a dataset folder: open them, check them against the schema, and read their row groups. Nothing here
imports torch."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datamodules.folder import REMEDY, Folder, check_sizes
from lightning_dlrm.contracts.errors import UserError, one_line, require
from lightning_dlrm.contracts.schema import WEIGHTS_SUFFIX, Column, DataFile, DatasetSchema

ARROW_TYPES: Mapping[str, pa.DataType] = {
    "label": pa.int8(),
    "dense": pa.float32(),
    "categorical": pa.int32(),
    "multi_hot": pa.list_(pa.int32()),
    "weights": pa.list_(pa.float32()),
}

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
        UserError: the file is missing or not Parquet, or its columns, row groups or ids do not match the schema.
    """
    where = Folder(folder)
    check_sizes(where, [file])
    path = where / file.path
    part = where.open_parquet(file.path, verify)
    types = dict(zip(part.schema_arrow.names, part.schema_arrow.types, strict=True))
    for column in schema.columns:
        found = types.get(column.name)
        if found is None or not _fits(found, column):
            state = "is missing" if found is None else f"has type {found}"
            raise UserError(f"{path}: column {column.name} {state}, expected {ARROW_TYPES[column.role]}; {REMEDY}")
    metadata = part.metadata
    groups = tuple(metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))
    require(
        groups == file.row_groups,
        f"{path} is altered: it has {sum(groups)} rows in {len(groups)} row groups, its dataset.json says "
        f"{file.rows} in {len(file.row_groups)} (or splits them differently); {REMEDY}",
    )
    _check_ids(path, schema, metadata)
    return part


def weighted_column(weights: Column) -> str:
    """Return the name of the multi-hot column that a weights column belongs to."""
    return weights.name.removesuffix(WEIGHTS_SUFFIX)


def check_labels(where: str, labels: pa.Array | pa.ChunkedArray) -> None:
    """Check that all labels are 0 or 1.

    Args:
        where: the column, and its file if there is one, for the message.
        labels: int8.

    Raises:
        UserError: some labels are other values.
    """
    limits = pc.min_max(labels)
    if len(labels) and (limits["min"].as_py() < 0 or limits["max"].as_py() > 1):
        found = ", ".join(str(value) for value in sorted(pc.unique(labels).to_pylist())[:5])
        raise UserError(
            f"{where} has the labels {found}; expected 0 (no click) and 1 (click): give each row one of them"
        )


def check_weights(where: str, weights: pa.Array | pa.ChunkedArray, ids: pa.Array | pa.ChunkedArray) -> None:
    """Check that every bag has one finite weight for each of its ids.

    Args:
        where: the column, and its file if there is one, for the message.
        weights: list<float32>.
        ids: list<int32>, as many lists.

    Raises:
        UserError: the numbers of weights and ids of a bag differ, or a weight is null or NaN.
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
        not pc.any(pc.is_null(pc.list_flatten(weights), nan_is_null=True)).as_py(),
        f"{where}: a weight is null or NaN; give each id a number, such as 1",
    )


def count_values(part: pq.ParquetFile, columns: Sequence[Column]) -> int:
    """Count the values of some columns of a part file (an empty bag counts as one)."""
    metadata = part.metadata
    positions = _leaves(metadata)
    groups = (metadata.row_group(group) for group in range(metadata.num_row_groups))
    return sum(group.column(positions[column.name]).num_values for group in groups for column in columns)


def read_group(
    where: Folder, file: DataFile, part: pq.ParquetFile, group: int, columns: Sequence[Column], threads: bool = True
) -> pa.Table:
    """Read some columns of a row group.

    Args:
        where: the dataset folder.
        file: one of its part files.
        part: the same file, open.
        group: index of the row group in the file.
        columns: the columns to read.
        threads: decode columns in parallel.

    Raises:
        UserError: the row group cannot be decoded, has nulls in a column without nulls, or labels other than 0 and 1.
    """
    path = where / file.path
    try:
        table = part.read_row_group(group, columns=[column.name for column in columns], use_threads=threads)
    except Exception as error:  # remote file systems have errors of their own
        raise UserError(
            f"{path} is altered: row group {group} cannot be decoded ({one_line(error)}); {REMEDY}"
        ) from error
    for column in columns:
        place, values = f"{path}, row group {group}, column {column.name}", table.column(column.name)
        if remedy := _REMEDY_OF_NULLS.get(column.role):
            nulls = _nulls(values)
            require(not nulls, f"{place} has nulls ({nulls:,}); {remedy}")
        if column.role == "label":
            check_labels(place, values)
    return table


def read_groups(
    folder: str | Path | Folder, schema: DatasetSchema, file: DataFile, columns: Sequence[Column]
) -> Iterator[pa.Table]:
    """Yield some columns of a part file, row group by row group.

    Raises:
        UserError: see ``open_part`` and ``read_group``.
    """
    where = Folder(folder)
    with open_part(where, schema, file) as part:
        for group in range(part.num_row_groups):
            yield read_group(where, file, part, group, columns)


def _nulls(values: pa.ChunkedArray) -> int:
    """Count the nulls among values, or among the items of lists; a null list is an empty list."""
    if pa.types.is_list(values.type):
        return sum(chunk.flatten().null_count for chunk in values.chunks)
    return values.null_count


def _leaves(metadata: pq.FileMetaData) -> dict[str, int]:
    """Return the position of each column by its name; writers name the items of lists differently."""
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    return {re.sub(r"\.list\.\w+$", "", path): i for i, path in enumerate(paths)}


def _check_ids(path: str, schema: DatasetSchema, metadata: pq.FileMetaData) -> None:
    positions = _leaves(metadata)
    for column in schema.by_role("categorical", "multi_hot"):
        for group in range(metadata.num_row_groups):
            place = f"{path}: row group {group} of column {column.name}"
            values = metadata.row_group(group).column(positions[column.name])
            statistics = values.statistics
            if column.role == "categorical" and statistics is not None and statistics.null_count:
                raise UserError(f"{place} has nulls ({statistics.null_count:,}); {_REMEDY_OF_NULLS['categorical']}")
            if statistics is None or not statistics.has_min_max:
                if column.role == "multi_hot" and statistics is not None and statistics.num_values == 0:
                    continue  # all bags are empty
                raise UserError(
                    f"{place} has no statistics, so its ids cannot be checked; write the file with statistics, as "
                    "DatasetWriter does"
                )
            require(
                statistics.min >= 0 and statistics.max < column.cardinality,
                f"{place} has ids from {statistics.min} to {statistics.max}, its table has rows 0 to "
                f"{column.cardinality - 1}; make the dataset again",
            )


def _fits(found: pa.DataType, column: Column) -> bool:
    expected = ARROW_TYPES[column.role]
    if pa.types.is_list(expected):
        return pa.types.is_list(found) and found.value_type.equals(expected.value_type)
    return found.equals(expected)
