"""How often each id of a table is looked up: from the counts of the vocabulary, or counted in the rows."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from tqdm import tqdm

from datamodules.folder import REMEDY, Folder, part_files
from datamodules.parquet import read_groups
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import Column, DatasetSchema

SHARES = (0.5, 0.9, 0.99)
_CURVE_POINTS = 200


@dataclass(frozen=True, kw_only=True)
class Skew:
    """How the lookups of a table are spread over its ids; without numbers if there are no lookups."""

    column: Column
    lookups: int
    most_frequent: float | None
    """The share of the lookups that go to the most frequent id."""
    ids_for: Mapping[float, int]
    """For each of ``SHARES``, the least number of ids that this share of the lookups goes to."""
    curve: tuple[NDArray[np.float64], NDArray[np.float64]]
    """Shares of the table's rows, in logarithmic steps up to 1, and the share of the lookups that go to that many of
    the most frequent ids."""


def skew_of(column: Column, counts: NDArray[np.int64]) -> Skew:
    """Return the skew of a table.

    Args:
        counts: lookups of each id, [cardinality], in any order; overwritten, as a table may have hundreds of millions.
    """
    counts.sort()
    covered = counts[::-1]
    np.cumsum(covered, out=covered)
    lookups = int(covered[-1])
    if not lookups:
        return Skew(column=column, lookups=0, most_frequent=None, ids_for={}, curve=(np.empty(0), np.empty(0)))
    ids = np.unique(np.geomspace(1, len(counts), _CURVE_POINTS).round().astype(np.int64))
    return Skew(
        column=column,
        lookups=lookups,
        most_frequent=float(covered[0] / lookups),
        ids_for={share: int(np.searchsorted(covered, share * lookups)) + 1 for share in SHARES},
        curve=(ids / len(counts), covered[ids - 1] / lookups),
    )


def vocabulary_skew(folder: str | Path | Folder, schema: DatasetSchema, column: Column) -> Skew | None:
    """Return the skew of a column from its vocabulary; None if the vocabulary has no counts, see
    ``_vocabulary_counts``."""
    counts = _vocabulary_counts(folder, schema, column)
    return None if counts is None else skew_of(column, counts)


def lookup_counts(folder: str | Path | Folder, schema: DatasetSchema, column: Column) -> NDArray[np.int64]:
    """Count how often each id of a column is looked up, [cardinality]: from the vocabulary, or in all rows if it has no
    counts.

    Raises:
        UserError: a file is missing or altered.
    """
    counts = _vocabulary_counts(folder, schema, column)
    return _counted(folder, schema, column) if counts is None else counts


def _vocabulary_counts(folder: str | Path | Folder, schema: DatasetSchema, column: Column) -> NDArray[np.int64] | None:
    """Return ``count`` of each ``id`` (the position, if there is no such column). None if there is no vocabulary, or
    one without counts, or the column has several ids a row, which the vocabulary does not count.

    Raises:
        UserError: the vocabulary is no readable Parquet file.
    """
    if column.name not in schema.vocabulary or column.role != "categorical":
        return None
    where, path = Folder(folder), schema.vocabulary[column.name].path
    counts = np.zeros(column.cardinality, np.int64)
    start = 0
    with where.open_vocabulary(path) as vocabulary:
        names = [name for name in ("count", "id") if name in vocabulary.schema_arrow.names]
        if "count" not in names:
            return None
        for group in range(vocabulary.num_row_groups):
            table = vocabulary.read_row_group(group, columns=names)
            stop = start + table.num_rows
            ids = table.column("id").to_numpy() if "id" in names else np.arange(start, stop)
            try:
                np.add.at(counts, ids, table.column("count").to_numpy())
            except IndexError:
                beyond = f"{where / path} has ids beyond the {column.cardinality} rows of its table"
                raise UserError(f"{beyond}; {REMEDY}") from None
            start = stop
    return counts


def all_skews(folder: str | Path | Folder, schema: DatasetSchema, progress: bool = True) -> Iterator[Skew]:
    """Yield the skew of every table, in schema order; from the rows of all splits if the vocabulary has no counts.

    Takes 8 bytes of memory for each row of the largest table.

    Raises:
        UserError: a file is missing or altered.
    """
    columns = schema.by_role("categorical", "multi_hot")
    for column in tqdm(columns, desc="Reading ids", unit=" tables", disable=None if progress else True):
        yield skew_of(column, lookup_counts(folder, schema, column))


def _counted(folder: str | Path | Folder, schema: DatasetSchema, column: Column) -> NDArray[np.int64]:
    counts = np.zeros(column.cardinality, np.int64)
    for file in part_files(schema):
        for table in read_groups(folder, schema, file, [column]):
            ids = table.column(column.name)
            np.add.at(counts, (pc.list_flatten(ids) if column.role == "multi_hot" else ids).to_numpy(), 1)
    return counts
