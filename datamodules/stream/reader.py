"""Row groups of Parquet parts, decoded and put together as the slices of batches that an order asks for.

Shape suffixes: n rows of a row group, B of a batch, I dense columns, F tables, N multi-hot indices.
"""

import itertools
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from datamodules.parquet import check_weights, open_part, weighted_column
from datamodules.stream.order import LANES, Order
from lightning_dlrm.contracts.batch import Batch, SparseIds
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import Column, DataFile, DatasetSchema

_NAN = pa.scalar(float("nan"), type=pa.float32())
# Bounds are worked out for this many batches at once: a quarter of the cost for each alone.
_BOUNDS_AT_ONCE = 256
_ROWS_TOGETHER = 32_768
# Each lane is in one file at a time, or passing from one to the next.
_OPEN_FILES = LANES + 16


@dataclass(kw_only=True)
class Rows:
    """Decoded rows; every array has a row for each."""

    label: np.ndarray | None
    """int8 [n]"""
    dense: np.ndarray
    """float32 [n, I], NaN where missing"""
    ids: np.ndarray
    """int32 [n, F]: ids; with multi-hot columns, how many each bag has"""
    rows: np.ndarray
    """int64 [n]: positions in the split"""
    values: np.ndarray | None = None
    """int32 [N]: with multi-hot columns the ids, sample by sample and within it table by table"""
    ends: np.ndarray | None = None
    """int64 [n + 1]: sample b has values[ends[b] : ends[b + 1]]"""
    weights: np.ndarray | None = None
    """float32 [N]: where any column has weights, those of the ids"""

    def slice(self, start: int, stop: int) -> "Rows":
        """Rows ``start`` to ``stop - 1``, as views."""
        values, ends, weights = self.values, self.ends, self.weights
        if values is not None and ends is not None:
            bags = slice(ends[start], ends[stop])
            values, ends = values[bags], ends[start : stop + 1] - ends[start]
            weights = None if weights is None else weights[bags]
        return Rows(
            label=None if self.label is None else self.label[start:stop],
            dense=self.dense[start:stop],
            ids=self.ids[start:stop],
            rows=self.rows[start:stop],
            values=values,
            ends=ends,
            weights=weights,
        )

    def take(self, index: np.ndarray) -> "Rows":
        """The rows at int64 ``index``, in that order."""
        values, ends, weights = self.values, self.ends, self.weights
        if values is not None and ends is not None:
            lengths = np.diff(ends)[index]
            taken = _ranges(ends[:-1][index], lengths)
            values, ends = values[taken], np.append(0, np.cumsum(lengths))
            weights = None if weights is None else weights[taken]
        return Rows(
            label=None if self.label is None else self.label.take(index),
            dense=self.dense.take(index, axis=0),
            ids=self.ids.take(index, axis=0),
            rows=self.rows.take(index),
            values=values,
            ends=ends,
            weights=weights,
        )

    @classmethod
    def join(cls, pieces: Sequence["Rows"]) -> "Rows":
        """All rows of at least one piece, one piece after the other."""
        labels = [piece.label for piece in pieces if piece.label is not None]
        values = [piece.values for piece in pieces if piece.values is not None]
        lengths = [np.diff(piece.ends) for piece in pieces if piece.ends is not None]
        weights = [piece.weights for piece in pieces if piece.weights is not None]
        return cls(
            label=np.concatenate(labels) if labels else None,
            dense=np.concatenate([piece.dense for piece in pieces]),
            ids=np.concatenate([piece.ids for piece in pieces]),
            rows=np.concatenate([piece.rows for piece in pieces]),
            values=np.concatenate(values) if values else None,
            ends=np.append(0, np.cumsum(np.concatenate(lengths))) if lengths else None,
            weights=np.concatenate(weights) if weights else None,
        )


class Decoder:
    """Decodes row groups of a split to row-major arrays.

    Args:
        folder: the dataset folder.
        schema: its schema.
        files: the part files of the split, in order.
    """

    def __init__(self, folder: Path, schema: DatasetSchema, files: Sequence[DataFile]) -> None:
        self.folder, self.schema, self.files = Path(folder), schema, tuple(files)
        self.label = next((column.name for column in schema.by_role("label")), None)
        self.dense = [column.name for column in schema.by_role("dense")]
        self.tables = schema.by_role("categorical", "multi_hot")
        self.multi_hot = bool(schema.by_role("multi_hot"))
        self.weights = {weighted_column(column): column.name for column in schema.by_role("weights")}
        groups_per_file = [len(file.row_groups) for file in self.files]
        self._where = [(i, group) for i, groups in enumerate(groups_per_file) for group in range(groups)]
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()

    def __call__(self, group: int, first_row: int) -> Rows:
        """The rows of a row group.

        Args:
            group: counted over the whole split.
            first_row: position of its first row in the split.
        """
        batch = self._read(group)
        rows = Rows(
            label=None if self.label is None else batch.column(self.label).to_numpy(),
            dense=_stack([batch.column(name).fill_null(_NAN) for name in self.dense], batch.num_rows, np.float32),
            ids=np.empty((0, 0), np.int32),
            rows=np.arange(first_row, first_row + batch.num_rows),
        )
        if self.multi_hot:
            rows.ids, rows.values, rows.ends, rows.weights = self._bags(batch, group)
        else:
            rows.ids = _stack([batch.column(column.name) for column in self.tables], batch.num_rows, np.int32)
        return rows

    def nothing(self) -> Rows:
        """No rows, in arrays of the right shapes and types."""
        return Rows(
            label=np.empty(0, np.int8) if self.label else None,
            dense=np.empty((0, len(self.dense)), np.float32),
            ids=np.empty((0, len(self.tables)), np.int32),
            rows=np.empty(0, np.int64),
            values=np.empty(0, np.int32) if self.multi_hot else None,
            ends=np.zeros(1, np.int64) if self.multi_hot else None,
            weights=np.empty(0, np.float32) if self.weights else None,
        )

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def _read(self, group: int) -> pa.RecordBatch:
        index, group = self._where[group]
        file = self.files[index]
        try:
            if index not in self._open:
                self._open[index] = open_part(self.folder, self.schema, file)
                if len(self._open) > _OPEN_FILES:
                    self._open.popitem(last=False)[1].close()
            self._open.move_to_end(index)
            columns = [column.name for column in self.schema.columns]
            # One thread: a wider pool would take the cores that compute.
            table = self._open[index].read_row_group(group, columns=columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{self.folder / file.path} is altered: row group {group} cannot be decoded "
                f"({' '.join(str(error).split())}); restore the file, or make the dataset again"
            ) from error
        return table.combine_chunks().to_batches()[0]

    def _bags(self, batch: pa.RecordBatch, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """Lengths int32 [n, F], values int32 [N], ends int64 [n + 1] and weights float32 [N], as in ``Rows``."""
        parts = [_bag_column(batch.column(column.name), column) for column in self.tables]
        lengths_nF = np.stack([lengths for lengths, _ in parts], axis=1)
        stops_nF = np.cumsum(lengths_nF, dtype=np.int64).reshape(lengths_nF.shape)
        values = np.empty(int(lengths_nF.sum()), dtype=np.int32)
        weights = np.ones(len(values), dtype=np.float32) if self.weights else None
        for table, (lengths, column_values) in enumerate(parts):
            places = _ranges(stops_nF[:, table] - lengths, lengths)
            values[places] = column_values
            name = self.tables[table].name
            if weights is not None and name in self.weights:
                column = batch.column(self.weights[name])
                index, in_file = self._where[group]
                where = f"{self.folder / self.files[index].path}, row group {in_file}, column {self.weights[name]}"
                check_weights(where, column, batch.column(name))
                weights[places] = column.flatten().to_numpy()
        return lengths_nF, values, np.append(0, stops_nF[:, -1]), weights


class _Lane:
    """Serves the rows of one lane; keeps the row groups that are being served, and the next one."""

    def __init__(self, decoder: Decoder, order: Order, groups: np.ndarray, ahead: float | None) -> None:
        self.decoder, self.order, self.groups = decoder, order, groups
        self.ends = np.cumsum(order.group_rows[groups])
        self.ahead = ahead
        self.loaded: dict[int, Rows] = {}

    def take(self, start: int, stop: int) -> Iterator[Rows]:
        """The rows from ``start`` to ``stop`` of the lane's own count, in pieces."""
        index = int(np.searchsorted(self.ends, start, side="right"))
        for done in [i for i in self.loaded if i < index]:
            del self.loaded[done]
        while start < stop:
            rows = self._load(index)
            offset = int(self.ends[index]) - len(rows.rows)
            upto = min(stop - offset, len(rows.rows))
            yield rows.slice(start - offset, upto)
            start = offset + upto
            index += 1
        if self.ahead is not None:
            self._decode_ahead(start, self.ahead)

    def _decode_ahead(self, position: int, ahead: float) -> None:
        """Decodes the next row group when no more than the share ``ahead`` of the one being served is left."""
        index = int(np.searchsorted(self.ends, position, side="right"))
        if index + 1 < len(self.groups):
            size = int(self.order.group_rows[self.groups[index]])
            if self.ends[index] - position <= ahead * size:
                self._load(index + 1)

    def _load(self, index: int) -> Rows:
        if index not in self.loaded:
            group = int(self.groups[index])
            rows = self.decoder(group, int(self.order.group_starts[group]))
            order = self.order.permutation(group)
            self.loaded[index] = rows if order is None else rows.take(order)
        return self.loaded[index]


def read_batches(
    decoder: Decoder, order: Order, *, first: int = 0, rank: int = 0, world: int = 1, rows: bool = False
) -> Generator[Batch, None, None]:
    """A rank's slices of the global batches of an order.

    Holds at most two row groups of each of the rank's lanes, beside what a batch itself spans: over
    all ranks 96 groups of 16,384 rows, 260 MB for Criteo's columns, and half of it at most times.

    Args:
        decoder: of the same split as ``order``.
        order: of one epoch.
        first: the first global batch to read.
        rank, world: whose slice, of how many.
        rows: fill ``Batch.rows``.

    Raises:
        UserError: a file is missing, altered or cannot be decoded.
    """
    mine = order.lanes_of(rank, world)
    # All lanes finish their row groups at nearly the same time. So that the consumer does not wait
    # while all of them decode the next, they do so one by one over the second half of the current.
    lanes = [
        _Lane(decoder, order, order.lanes[lane], 0.5 * (i + 1) / len(mine) if len(mine) > 1 else None)
        for i, lane in enumerate(mine)
    ]
    # Small batches are cut from the rows of several, as asking 48 lanes for some 40 rows each costs
    # as much as decoding them. (A single lane may leave out rows of other ranks between two batches.)
    together = max(1, _ROWS_TOGETHER * world // order.batch_size) if len(mine) > 1 else 1
    for block in range(first, order.batches, _BOUNDS_AT_ONCE):
        bounds = order.bounds(block, min(block + _BOUNDS_AT_ONCE, order.batches), rank, world)
        for start in range(0, len(bounds), together):
            several = bounds[start : start + together]
            parts = [decoder.nothing()]
            for lane, begin, end in zip(lanes, several[0, :, 0].tolist(), several[-1, :, 1].tolist(), strict=True):
                parts += lane.take(begin, end)
            joined = Rows.join(parts)
            sizes = several[:, :, 1] - several[:, :, 0]
            if len(several) > 1:
                joined = joined.take(_batch_by_batch(sizes))
            stops = sizes.sum(axis=1).cumsum().tolist()
            for i, (begin, end) in enumerate(itertools.pairwise([0, *stops])):
                yield _to_batch(joined.slice(begin, end), decoder, order.global_size(block + start + i), rows)


def _batch_by_batch(sizes: np.ndarray) -> np.ndarray:
    """Where rows that lie lane by lane, and batch by batch within a lane, go batch by batch.

    Args:
        sizes: int64 [batches, lanes], rows of each batch from each lane.

    Returns:
        int64 [rows]: the index of each row, in the order batch by batch and lane by lane within.
    """
    starts = (sizes.T.cumsum() - sizes.T.ravel()).reshape(sizes.T.shape).T
    return _ranges(starts.ravel(), sizes.ravel())


def _to_batch(rows: Rows, decoder: Decoder, global_size: int, with_rows: bool) -> Batch:
    tables = len(decoder.tables)
    if rows.values is None:
        ids = SparseIds(values=torch.from_numpy(rows.ids), tables=tables)
    else:
        offsets = np.append(0, np.cumsum(rows.ids, dtype=np.int64))
        ids = SparseIds(
            values=torch.from_numpy(rows.values),
            tables=tables,
            offsets=torch.from_numpy(offsets),
            weights=None if rows.weights is None else torch.from_numpy(rows.weights),
        )
    return Batch(
        label=None if rows.label is None else torch.from_numpy(rows.label),
        dense=torch.from_numpy(rows.dense),
        ids=ids,
        global_size=global_size,
        rows=torch.from_numpy(rows.rows) if with_rows else None,
    )


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64 [sum of lengths]: ``starts[i] ... starts[i] + lengths[i] - 1`` for every i, joined."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


def _stack(columns: Sequence[pa.Array], rows: int, dtype: type) -> np.ndarray:
    """[rows, columns] from columns of one type; Arrow's own transposition is the fastest at hand."""
    if not columns:
        return np.empty((rows, 0), dtype)
    batch = pa.RecordBatch.from_arrays(list(columns), names=[str(i) for i in range(len(columns))])
    return batch.to_tensor(row_major=True).to_numpy()


def _bag_column(column: pa.Array, kind: Column) -> tuple[np.ndarray, np.ndarray]:
    """Lengths int32 [n] and values int32 [N] of a column of bags, or of single ids."""
    if kind.role == "categorical":
        return np.ones(len(column), dtype=np.int32), column.to_numpy()
    offsets = column.offsets.to_numpy()
    return np.diff(offsets), column.values.to_numpy()[offsets[0] : offsets[-1]]
