"""How often each id of a table is looked up: from the vocabulary where it has counts, else counted in the rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from datamodules.parquet import part_files, read_groups
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import Column, DatasetSchema


@dataclass(frozen=True)
class Skew:
    """The lookups of one table."""

    column: Column
    counts: NDArray[np.int64]
    """Of each id that occurs, the most frequent first."""

    @property
    def lookups(self) -> int:
        return int(self.counts.sum())

    def ids_for(self, share: float) -> int:
        """The least number of ids that a share (0 to 1) of all lookups goes to."""
        return int(np.searchsorted(np.cumsum(self.counts), share * self.lookups)) + 1 if self.lookups else 0

    def coverage(self, points: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Shares of the table's rows, in at most so many logarithmic steps up to 1, and the share of lookups that go
        to that many of the most frequent ids."""
        size = self.column.cardinality
        ids = np.unique(np.geomspace(1, size, points).round().astype(np.int64))
        covered = np.cumsum(self.counts)[np.minimum(ids, len(self.counts)) - 1]
        return ids / size, covered / self.lookups


def vocabulary_skew(folder: Path, schema: DatasetSchema, column: Column) -> Skew | None:
    """The skew of a column as its vocabulary tells; None if it has none, or one without counts.

    Raises:
        UserError: the vocabulary is no readable Parquet file.
    """
    if column.name not in schema.vocabulary:
        return None
    path = Path(folder) / schema.vocabulary[column.name].path
    try:
        with pq.ParquetFile(path) as vocabulary:
            if "count" not in vocabulary.schema_arrow.names:
                return None
            counts = vocabulary.read(["count"]).column("count").to_numpy()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{path} is altered: no readable Parquet; restore the file, or make the dataset again"
        ) from error
    return Skew(column, _descending(counts))


def all_skews(folder: Path, schema: DatasetSchema, progress: bool = True) -> Iterator[Skew]:
    """The skew of every table, in schema order; where no vocabulary tells it, of the rows of all splits.

    Such a column is read once, and takes 8 bytes for each row of its table meanwhile.

    Raises:
        UserError: a file is missing or altered.
    """
    columns = schema.by_role("categorical", "multi_hot")
    for column in tqdm(columns, desc="Reading ids", unit=" tables", disable=None if progress else True):
        yield vocabulary_skew(folder, schema, column) or _counted_skew(folder, schema, column)


def _counted_skew(folder: Path, schema: DatasetSchema, column: Column) -> Skew:
    counts = np.zeros(column.cardinality, np.int64)
    for file in part_files(schema):
        for table in read_groups(folder, schema, file, [column]):
            ids = table.column(column.name)
            np.add.at(counts, (pc.list_flatten(ids) if column.role == "multi_hot" else ids).to_numpy(), 1)
    return Skew(column, _descending(counts))


def _descending(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    counts = np.sort(counts[counts > 0])
    return counts[::-1]
