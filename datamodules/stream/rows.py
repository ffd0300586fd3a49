"""Decoded rows of a split, and the decoder that makes them from row groups of Parquet part files.

Shape suffixes: n rows, I dense columns, F tables, N multi-hot indices.
"""

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datamodules.folder import Folder
from datamodules.parquet import check_values, open_part, read_slices, weighted_column
from datamodules.stream.order import LANES, ranges
from lightning_dlrm.contracts.batch import NO_GROUP
from lightning_dlrm.contracts.schema import Column, DataFile, DatasetSchema

_FLOAT32, _INT32 = np.dtype(np.float32), np.dtype(np.int32)
# In one array, so that code that moves ids moves their weights too.
WEIGHTED_IDS = np.dtype([("id", np.int32), ("weight", np.float32)])
_NAN = pa.scalar(float("nan"), type=pa.float32())
# Each lane reads one file at a time; some lanes are passing from one file to the next.
_OPEN_FILES = LANES + 16


@dataclass(kw_only=True)
class Rows:
    """Decoded rows, row by row in memory, as a model reads them."""

    label: np.ndarray | None
    """int8 [n]"""
    dense: np.ndarray
    """float32 [n, I], NaN where missing"""
    ids: np.ndarray
    """int32 [n, F]: ids; with multi-hot columns, how many each bag has"""
    group: np.ndarray | None = None
    """int64 [n]: numbers of the values of a kept column; see ``group_numbers``"""
    values: np.ndarray | None = None
    """int32 [N]: with multi-hot columns the ids, sample by sample and within it table by table; where a column has
    weights, fields ``id`` int32 and ``weight`` float32"""
    ends: np.ndarray | None = None
    """int64 [n + 1]: sample b has values[ends[b] : ends[b + 1]]"""

    def __len__(self) -> int:
        return len(self.dense)

    @property
    def arrays(self) -> list[np.ndarray]:
        """The arrays with one item for each row."""
        return [array for array in (self.label, self.dense, self.ids, self.group) if array is not None]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*self.arrays, self.values, self.ends) if array is not None)

    def slice(self, start: int, stop: int) -> "Rows":
        """Return the rows ``start`` to ``stop - 1``, as views."""
        rows = self._each(lambda array: array[start:stop])
        if self.values is not None and self.ends is not None:
            rows.values = self.values[self.ends[start] : self.ends[stop]]
            rows.ends = self.ends[start : stop + 1] - self.ends[start]
        return rows

    def take(self, index: np.ndarray) -> "Rows":
        """Return the rows at int64 ``index``, in that order."""
        rows = self._each(lambda array: take_rows(array, index))
        if self.values is not None and self.ends is not None:
            rows.values, rows.ends = take_bags(self.values, self.ends, index)
        return rows

    def _each(self, choose: Callable[[np.ndarray], np.ndarray]) -> "Rows":
        """Return rows chosen alike from each of ``arrays``, still without bags (``values`` keeps its type)."""
        return Rows(
            label=None if self.label is None else choose(self.label),
            dense=choose(self.dense),
            ids=choose(self.ids),
            group=None if self.group is None else choose(self.group),
            values=self.values,
            ends=self.ends,
        )


class Decoder:
    """Decodes row groups of a split to rows in file order; may be called from several threads.

    Args:
        folder: the dataset folder.
        schema: its schema.
        files: the part files of the split, in order.
        verify: compare the checksums of pages.
        threads: number of threads that call the decoder.
        group: the kept column whose values ``Rows.group`` numbers; None for none. Other kept columns are not read.
    """

    def __init__(
        self,
        folder: Folder,
        schema: DatasetSchema,
        files: Sequence[DataFile],
        verify: bool = True,
        threads: int = 1,
        group: str | None = None,
    ) -> None:
        self.folder, self.schema, self.files, self._verify = folder, schema, tuple(files), verify
        self.label = next((column.name for column in schema.by_role("label")), None)
        self.dense = [column.name for column in schema.by_role("dense")]
        self.tables = schema.by_role("categorical", "multi_hot")
        self.multi_hot = bool(schema.by_role("multi_hot"))
        self.weights = {weighted_column(column): column.name for column in schema.by_role("weights")}
        self.value_type = WEIGHTED_IDS if self.weights else _INT32
        """Of ``Rows.values``."""
        self._group = group
        self._columns = [column for column in schema.columns if column.role != "keep" or column.name == group]
        # As uint32, negative ids are large. Tables without a number of rows take any id.
        self._limits_F = np.array([column.cardinality or 2**32 for column in self.tables], np.int64)
        self._where = [(i, group) for i, file in enumerate(self.files) for group in range(len(file.row_groups))]
        # pyarrow does not promise that a ParquetFile is thread-safe, so each thread has its own.
        self._idle: OrderedDict[int, list[pq.ParquetFile]] = OrderedDict()
        self._threads = threads
        self._cursors: list[_Cursor] = []
        """Readers that later calls may continue, one for each thread at most, the latest last."""
        self._lock = threading.Lock()

    def __call__(self, group: int, positions: np.ndarray | None = None) -> Rows:
        """Decode a row group, counted over the whole split, or some of its rows.

        Args:
            group: the row group.
            positions: int64 [n], the rows of the row group to return, in that order, each once; None for all rows in
                the order of the file. Memory holds these rows and one slice. A call for later rows continues where the
                last one stopped, if that one read consecutive rows.

        Raises:
            UserError: its file is missing or altered, cannot be decoded, or has values that its schema does not allow.
        """
        if positions is None:
            return join_rows(list(self.slices(group)) or [self._empty_slice()])
        order = np.argsort(positions, kind="stable")
        wanted = positions[order]
        cursor, pieces, found = self._cursor(group, int(wanted[0])), [], 0
        while found < len(wanted):
            until = int(np.searchsorted(wanted, cursor.first + len(cursor.rows)))
            if until > found:
                pieces.append(cursor.rows.take(wanted[found:until] - cursor.first))
                found = until
            else:
                cursor.advance()
        # Other rows are drawn from all over the row group, and so are those of the next call.
        consecutive = wanted[-1] - wanted[0] + 1 == len(wanted)
        if consecutive and wanted[-1] + 1 < self._group_rows(group):
            with self._lock:
                self._cursors = [*self._cursors, cursor][-self._threads :]
        rows = join_rows(pieces)
        return rows if (order[1:] > order[:-1]).all() else rows.take(np.argsort(order))

    def slices(self, group: int) -> Iterator[Rows]:
        """Decode a row group in slices of a bounded number of rows, in the order of the file.

        Raises:
            UserError: see ``__call__``.
        """
        index, in_file = self._where[group]
        file, part = self.files[index], self._borrow(index)
        place, first = f"{self.folder / file.path}, row group {in_file}", sum(file.row_groups[:in_file])
        # One thread, because a wider pool would take cores from training.
        for found in read_slices(self.folder, file, part, in_file, self._columns, threads=False, check=self.multi_hot):
            yield self._decoded(found, place, first)
            first += len(found)
        self._give_back(index, part)

    def _group_rows(self, group: int) -> int:
        index, in_file = self._where[group]
        return self.files[index].row_groups[in_file]

    def _cursor(self, group: int, first: int) -> "_Cursor":
        """Return a reader of a row group before its row ``first``: the nearest one, or one at its beginning."""
        with self._lock:
            before = [cursor for cursor in self._cursors if cursor.group == group and cursor.first <= first]
            if before:
                nearest = max(before, key=lambda cursor: cursor.first)
                self._cursors.remove(nearest)
                return nearest
        return _Cursor(group, self.slices(group), self._empty_slice())

    def _empty_slice(self) -> Rows:
        rows = self.empty(0)
        if self.multi_hot:
            rows.ends = np.zeros(1, np.int64)
        return rows

    def _decoded(self, found: pa.RecordBatch, place: str, first: int) -> Rows:
        """Return the rows of a slice.

        Args:
            found: the slice; with multi-hot columns its values are checked already.
            place: its file and row group, for messages.
            first: place of its first row in the file.

        Raises:
            UserError: see ``check_values``.
        """
        columns, count = dict(zip(found.schema.names, found.columns, strict=True)), len(found)
        ids_Fn: np.ndarray = np.empty((0, count), np.int32)
        try:
            label = None if self.label is None else columns[self.label].to_numpy()
            dense_In = _stacked([_floats(columns[name]) for name in self.dense], count, _FLOAT32)
            if not self.multi_hot:
                ids_Fn = _stacked([columns[column.name].to_numpy() for column in self.tables], count, _INT32)
        except pa.ArrowInvalid:
            # Nulls.
            check_values(place, self._columns, found, first)
            raise
        if not (self.multi_hot or self._are_valid(label, dense_In, ids_Fn)):
            check_values(place, self._columns, found, first)
        rows = Rows(label=label, dense=_transposed(dense_In), ids=_transposed(ids_Fn))
        if self._group is not None:
            rows.group = group_numbers(columns[self._group])
        if self.multi_hot:
            rows.ids, rows.values, rows.ends = self._bags(columns)
        return rows

    def _are_valid(self, label: np.ndarray | None, dense_In: np.ndarray, ids_Fn: np.ndarray) -> bool:
        """Return whether ``check_values`` would find no fault; a few calls for all columns take a third of its time."""
        return bool(
            (label is None or label.view(np.uint8).max(initial=0) <= 1)
            and (ids_Fn.view(np.uint32).max(axis=1, initial=0) < self._limits_F[: len(ids_Fn)]).all()
            and not np.isinf(dense_In).any()
        )

    def empty(self, count: int) -> Rows:
        """Allocate rows; with multi-hot columns ``values`` has the right type and no items."""
        return Rows(
            label=np.empty(count, np.int8) if self.label else None,
            dense=np.empty((count, len(self.dense)), np.float32),
            ids=np.empty((count, len(self.tables)), np.int32),
            group=None if self._group is None else np.empty(count, np.int64),
            values=np.empty(0, self.value_type) if self.multi_hot else None,
        )

    def bytes_of(self, start: int, stop: int) -> int:
        """Return the bytes of the decoded rows at the positions ``start`` to ``stop - 1`` of the split; an estimate for
        bags.

        Raises:
            UserError: with multi-hot columns, of which some rows are read: see ``__call__``.
        """
        total = (stop - start) * self.empty(1).nbytes
        if self.multi_hot and self._where:
            some = next(self.slices(0), self._empty_slice())
            assert some.values is not None
            total += (stop - start) * 8 + some.values.nbytes * (stop - start) // max(len(some), 1)
        return total

    def _borrow(self, index: int) -> pq.ParquetFile:
        with self._lock:
            if self._idle.get(index):
                return self._idle[index].pop()
        return open_part(self.folder, self.schema, self.files[index], self._verify)

    def _give_back(self, index: int, part: pq.ParquetFile) -> None:
        with self._lock:
            self._idle.setdefault(index, []).append(part)
            self._idle.move_to_end(index)
            if len(self._idle) > _OPEN_FILES:
                self._idle.popitem(last=False)

    def _bags(self, columns: dict[str, pa.Array]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return lengths int32 [n, F], values [N] and ends int64 [n + 1], as in ``Rows``."""
        parts = [_bag_column(columns[column.name], column) for column in self.tables]
        lengths_nF = np.stack([lengths for lengths, _ in parts], axis=1)
        stops_nF = np.cumsum(lengths_nF, dtype=np.int64).reshape(lengths_nF.shape)
        values: np.ndarray = np.empty(int(lengths_nF.sum()), dtype=self.value_type)
        ids = values["id"] if self.weights else values
        for table, (lengths, column_values) in enumerate(parts):
            places = ranges(stops_nF[:, table] - lengths, lengths)
            ids[places] = column_values
            if self.weights:
                values["weight"][places] = self._weights(columns, self.tables[table].name)
        return lengths_nF, values, np.append(0, stops_nF[:, -1])

    def _weights(self, columns: dict[str, pa.Array], name: str) -> np.ndarray | float:
        """Return the weights float32 [N] of a column's ids, or 1 for all of them."""
        return columns[self.weights[name]].flatten().to_numpy() if name in self.weights else 1.0


class _Cursor:
    """A reader in the middle of a row group.

    Args:
        group: the row group, counted over the whole split.
        slices: its rows, slice by slice.
        empty: no rows.
    """

    def __init__(self, group: int, slices: Iterator[Rows], empty: Rows) -> None:
        self.group, self._slices, self.rows, self.first = group, slices, empty, 0

    def advance(self) -> None:
        """Read the next slice: ``rows`` from the place ``first`` on."""
        self.first += len(self.rows)
        self.rows = next(self._slices)


def join_rows(pieces: Sequence[Rows]) -> Rows:
    """Return the rows of several pieces, one after the other."""
    if len(pieces) == 1:
        return pieces[0]
    rows = Rows(
        dense=np.concatenate([piece.dense for piece in pieces]),
        ids=np.concatenate([piece.ids for piece in pieces]),
        label=_joined([piece.label for piece in pieces]),
        group=_joined([piece.group for piece in pieces]),
    )
    if pieces[0].values is not None:
        rows.values = np.concatenate([piece.values for piece in pieces if piece.values is not None])
        rows.ends = np.append(0, np.cumsum(rows.ids.sum(axis=1, dtype=np.int64)))
    return rows


def _joined(arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
    present = [array for array in arrays if array is not None]
    return np.concatenate(present) if present else None


def group_numbers(values: pa.Array) -> np.ndarray:
    """Return int64 [n], equal for equal values of a kept column, the same in every file: integers as they are, other
    values by a 64-bit hash of their text, and ``NO_GROUP`` for nulls."""
    if pa.types.is_integer(values.type):
        return values.fill_null(NO_GROUP).to_numpy()
    encoded = values.dictionary_encode()
    digests = (hashlib.blake2b(str(value).encode(), digest_size=8).digest() for value in encoded.dictionary.to_pylist())
    numbers = np.append(np.frombuffer(b"".join(digests), "<i8"), NO_GROUP)
    return numbers[encoded.indices.fill_null(-1).to_numpy()]


def take_bags(values: np.ndarray, ends: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return values and ends, as in ``Rows``, of the rows at ``index``."""
    lengths = np.diff(ends)[index]
    return values[ranges(ends[index], lengths)], np.append(0, np.cumsum(lengths))


def _stacked(columns: Sequence[np.ndarray], count: int, dtype: np.dtype) -> np.ndarray:
    """Return [columns, count], column by column in memory."""
    # Columns at distances of a multiple of 4 KiB share a few sets of the cache and evict each other: the transposition
    # would take three times as long.
    block = _allocate((len(columns), count + (16 - count) % 1024), dtype)[:, :count]
    for row, column in zip(block, columns, strict=True):
        row[:] = column
    return block


def _transposed(block: np.ndarray) -> np.ndarray:
    """Return the transposed array, row by row in memory."""
    rows = _allocate(block.shape[::-1], block.dtype)
    rows[:] = block.T
    return rows


def take_rows(array: np.ndarray, index: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Return the rows of an array at ``index``."""
    if out is None:
        out = _allocate((len(index), *array.shape[1:]), array.dtype)
    # Other modes than "clip" write to a copy first.
    return array.take(index, axis=0, out=out, mode="clip")


def _allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an uninitialized array from Arrow's pool, which reuses freed memory; NumPy would map it anew."""
    size = math.prod(shape) * dtype.itemsize
    return np.frombuffer(pa.allocate_buffer(size), dtype).reshape(shape)


def _floats(column: pa.Array) -> np.ndarray:
    """Return float32 values, NaN for nulls."""
    return (column.fill_null(_NAN) if column.null_count else column).to_numpy()


def _bag_column(column: pa.Array, kind: Column) -> tuple[np.ndarray, np.ndarray]:
    """Return lengths int32 [n] and values int32 [N] of a column of bags, or of single ids."""
    if kind.role == "categorical":
        return np.ones(len(column), dtype=np.int32), column.to_numpy()
    offsets = column.offsets.to_numpy()
    return np.diff(offsets), column.values.to_numpy()[offsets[0] : offsets[-1]]
