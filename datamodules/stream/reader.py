"""Row groups of Parquet parts, decoded and put together as the slices of batches that an order asks for.

Shape suffixes: n rows, I dense columns, F tables, N multi-hot indices, L lanes of a rank, K batches.
"""

import functools
import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from datamodules.parquet import Folder, check_weights, count_values, open_part, read_group, weighted_column
from datamodules.stream.order import LANES, Order, ranges
from lightning_dlrm.contracts.batch import Batch, SparseIds
from lightning_dlrm.contracts.schema import Column, DataFile, DatasetSchema

_FLOAT32, _INT32 = np.dtype(np.float32), np.dtype(np.int32)
# Side by side, so that whatever moves ids takes their weights along.
_WEIGHTED = np.dtype([("id", np.int32), ("weight", np.float32)])
_NAN = pa.scalar(float("nan"), type=pa.float32())
# Bounds are worked out for this many batches at once: a quarter of the cost for each alone.
_BOUNDS_AT_ONCE = 256
# Small batches are cut from a block of several: gathering has a cost per call.
_BLOCK_ROWS = 16_384
# Each lane is in one file at a time, or passing from one to the next.
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
    values: np.ndarray | None = None
    """int32 [N]: with multi-hot columns the ids, sample by sample and within it table by table; where a column has
    weights, fields ``id`` int32 and ``weight`` float32"""
    ends: np.ndarray | None = None
    """int64 [n + 1]: sample b has values[ends[b] : ends[b + 1]]"""

    def __len__(self) -> int:
        return len(self.dense)

    @property
    def arrays(self) -> list[np.ndarray]:
        """The arrays that have a row for each row."""
        return [array for array in (self.label, self.dense, self.ids) if array is not None]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*self.arrays, self.values, self.ends) if array is not None)

    def slice(self, start: int, stop: int) -> "Rows":
        """Rows ``start`` to ``stop - 1``, as views."""
        values, ends = self.values, self.ends
        if values is not None and ends is not None:
            values, ends = values[ends[start] : ends[stop]], ends[start : stop + 1] - ends[start]
        return Rows(
            label=None if self.label is None else self.label[start:stop],
            dense=self.dense[start:stop],
            ids=self.ids[start:stop],
            values=values,
            ends=ends,
        )

    def take(self, index: np.ndarray) -> "Rows":
        """The rows at int64 ``index``, in that order."""
        values, ends = self.values, self.ends
        if values is not None and ends is not None:
            values, ends = _take_bags(values, ends, index)
        return Rows(
            label=None if self.label is None else _take(self.label, index),
            dense=_take(self.dense, index),
            ids=_take(self.ids, index),
            values=values,
            ends=ends,
        )


class Decoder:
    """Decodes row groups of a split to rows in file order; may be called from several threads.

    Args:
        folder: the dataset folder.
        schema: its schema.
        files: the part files of the split, in order.
        verify: compare the checksums of pages.
    """

    def __init__(self, folder: Folder, schema: DatasetSchema, files: Sequence[DataFile], verify: bool = True) -> None:
        self.folder, self.schema, self.files, self._verify = folder, schema, tuple(files), verify
        self.label = next((column.name for column in schema.by_role("label")), None)
        self.dense = [column.name for column in schema.by_role("dense")]
        self.tables = schema.by_role("categorical", "multi_hot")
        self.multi_hot = bool(schema.by_role("multi_hot"))
        self.weights = {weighted_column(column): column.name for column in schema.by_role("weights")}
        self.value_type = _WEIGHTED if self.weights else _INT32
        """Of ``Rows.values``."""
        self._where = [(i, group) for i, file in enumerate(self.files) for group in range(len(file.row_groups))]
        # pyarrow does not promise that a ParquetFile serves several threads at once, so each takes one of its own.
        self._idle: OrderedDict[int, list[pq.ParquetFile]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, group: int) -> Rows:
        """The rows of a row group, counted over the whole split.

        Raises:
            UserError: its file is missing, altered or cannot be decoded.
        """
        columns = self._read(group)
        count = len(next(iter(columns.values())))
        rows = Rows(
            label=None if self.label is None else columns[self.label].to_numpy(),
            dense=_side_by_side([_floats(columns[name]) for name in self.dense], count, _FLOAT32),
            ids=np.empty((0, 0), np.int32),
        )
        if self.multi_hot:
            rows.ids, rows.values, rows.ends = self._bags(columns, group)
        else:
            rows.ids = _side_by_side([columns[column.name].to_numpy() for column in self.tables], count, _INT32)
        return rows

    def empty(self, count: int) -> Rows:
        """Room for rows; with multi-hot columns ``values`` has the right type, and no room."""
        return Rows(
            label=np.empty(count, np.int8) if self.label else None,
            dense=np.empty((count, len(self.dense)), np.float32),
            ids=np.empty((count, len(self.tables)), np.int32),
            values=np.empty(0, self.value_type) if self.multi_hot else None,
        )

    def bytes_of(self, start: int, stop: int) -> int:
        """Bytes of the decoded rows at the positions ``start`` to ``stop - 1`` of the split; of bags, about.

        Raises:
            UserError: with multi-hot columns, whose footers are read: a file is missing or altered.
        """
        total = (stop - start) * self.empty(1).nbytes
        if self.multi_hot:
            rows = sum(file.rows for file in self.files)
            values = sum(count_values(open_part(self.folder, self.schema, file), self.tables) for file in self.files)
            total += (stop - start) * 8 + self.value_type.itemsize * values * (stop - start) // max(rows, 1)
        return total

    def _read(self, group: int) -> dict[str, pa.Array]:
        index, group = self._where[group]
        part = self._borrow(index)
        # One thread: a wider pool would take the cores that compute.
        table = read_group(self.folder, self.files[index], part, group, self.schema.columns, threads=False)
        self._give_back(index, part)
        return {name: _whole(column) for name, column in zip(table.column_names, table.columns, strict=True)}

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

    def _bags(self, columns: dict[str, pa.Array], group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lengths int32 [n, F], values [N] and ends int64 [n + 1], as in ``Rows``."""
        parts = [_bag_column(columns[column.name], column) for column in self.tables]
        lengths_nF = np.stack([lengths for lengths, _ in parts], axis=1)
        stops_nF = np.cumsum(lengths_nF, dtype=np.int64).reshape(lengths_nF.shape)
        values: np.ndarray = np.empty(int(lengths_nF.sum()), dtype=self.value_type)
        ids = values["id"] if self.weights else values
        for table, (lengths, column_values) in enumerate(parts):
            places = ranges(stops_nF[:, table] - lengths, lengths)
            ids[places] = column_values
            if self.weights:
                values["weight"][places] = self._weights(columns, self.tables[table].name, group)
        return lengths_nF, values, np.append(0, stops_nF[:, -1])

    def _weights(self, columns: dict[str, pa.Array], name: str, group: int) -> np.ndarray | float:
        """float32 values: the weights of a column's ids, or 1 for all of them."""
        if name not in self.weights:
            return 1.0
        weights = columns[self.weights[name]]
        index, in_file = self._where[group]
        where = f"{self.folder / self.files[index].path}, row group {in_file}, column {self.weights[name]}"
        check_weights(where, weights, columns[name])
        return weights.flatten().to_numpy()


class Source(Protocol):
    """Where the rows of an order come from."""

    def fetch(self, bounds: np.ndarray) -> Rows:
        """The rows of consecutive batches, batch by batch and within it lane by lane.

        Args:
            bounds: int64 [K, L, 2] as ``Order.bounds`` gives them. The next call asks for what follows.

        Raises:
            UserError: a file is missing, altered or cannot be decoded.
        """
        ...

    def close(self) -> None:
        """Ends its threads."""
        ...

    @property
    def room(self) -> Rows | None:
        """Memory that the next source may use, once this one is closed."""
        ...


class Window:
    """The rows of a rank's lanes from those being served to the end of the last decoded row group.

    Every lane has a ring of rows. A row group is decoded as its rows come within reach, and laid
    behind those of its lane, permuted as the order says; the rows of batches are then gathered from
    all rings. All lanes finish their row groups at nearly the same time. So that the consumer does
    not wait while all of them decode the next, they do so one by one, from 0.6 of a row group ahead
    of the batch down to 0.1.

    Args:
        read: gives the rows of a row group; called from several threads.
        empty: makes room for rows.
        order: of one epoch.
        rank, world: whose lanes, of how many.
        at_once: most batches that are fetched at once.
        threads: how many decode, the calling one among them.
        room: memory to use, where it is large enough; a closed window's ``room``.
    """

    def __init__(
        self,
        read: Callable[[int], Rows],
        empty: Callable[[int], Rows],
        order: Order,
        *,
        rank: int,
        world: int,
        at_once: int,
        threads: int,
        room: Rows | None = None,
    ) -> None:
        self._read, self._order = read, order
        lanes = order.lanes_of(rank, world)
        begins_L, self._lane_ends_L = (
            order.edges[lanes.start : lanes.stop],
            order.edges[lanes.start + 1 : lanes.stop + 1],
        )
        largest = int(order.group_rows.max(initial=0))
        # A lone lane is read in file order: as many row groups ahead as other threads can decode meanwhile.
        ahead = 0.1 + 0.5 * np.arange(1, len(lanes) + 1) / len(lanes) if len(lanes) > 1 else np.array([threads - 1])
        self._reach_L = (ahead * largest).astype(np.int64)
        # Of a batch, a lane has within a few rows of its share.
        batch_rows_L = at_once * order.batch_size * (self._lane_ends_L - begins_L) // max(order.rows, 1) + 4
        self._capacity_L = np.minimum(batch_rows_L + self._reach_L + largest, self._lane_ends_L - begins_L)
        self._ring_starts_L = np.cumsum(self._capacity_L) - self._capacity_L
        rows = int(self._capacity_L.sum())
        self.room: Rows | None = room if room is not None and len(room) >= rows else empty(rows)
        """See ``Source``."""
        self._rings = self.room.slice(0, rows)
        self._bags: list[dict[int, tuple[np.ndarray, np.ndarray]]] = [{} for _ in lanes]
        """For each lane, by the place of the first row: values and ends of multi-hot columns, as in ``Rows``."""
        self._begun_L: np.ndarray | None = None
        """Places up to which the lanes are decoded, or about to be."""
        self._loads: list[_Load] = []
        """Those not known to be done."""
        self._pool = ThreadPoolExecutor(threads - 1, "row group decoder") if threads > 1 else None

    def fetch(self, bounds: np.ndarray) -> Rows:
        """See ``Source``."""
        begins_L, stops_L = bounds[0, :, 0], bounds[-1, :, 1]
        if self._begun_L is None:
            self._begun_L = begins_L.copy()
        within_L = np.minimum(stops_L + self._reach_L, self._lane_ends_L)
        for lane in np.flatnonzero(self._begun_L < within_L).tolist():
            while self._begun_L[lane] < within_L[lane]:
                self._begun_L[lane] = self._begin_load(lane, int(self._begun_L[lane]))
        assert (self._begun_L - begins_L <= self._capacity_L).all(), "a ring is too small"
        self._finish_loads(stops_L)
        return self._gather(bounds)

    def close(self) -> None:
        """See ``Source``."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _begin_load(self, lane: int, begin: int) -> int:
        """Has the row group at a place of a lane decoded; returns the place after it."""
        index = int(np.searchsorted(self._order.ends, begin, side="right"))
        end = int(min(self._order.ends[index], self._lane_ends_L[lane]))
        run = functools.partial(self._load, lane, index, begin, end)
        if self._pool is None:
            run()
        else:
            self._loads.append(_Load(lane, begin, run, self._pool.submit(run)))
        return end

    def _finish_loads(self, stops_L: np.ndarray) -> None:
        """Waits for row groups with rows before the places ``stops_L``, and decodes those nobody has begun with."""
        needed = [load for load in self._loads if load.begin < stops_L[load.lane]]
        self._loads = [load for load in self._loads if load.begin >= stops_L[load.lane]]
        # The pool takes the oldest first.
        for load in reversed(needed):
            if load.state.cancel():
                load.run()
        for load in needed:
            if not load.state.cancelled():
                load.state.result()

    def _load(self, lane: int, index: int, begin: int, end: int) -> None:
        """Decodes a row group of the sequence and lays those of its rows at ``begin`` to ``end - 1`` into the ring."""
        group = int(self._order.sequence[index])
        rows, permutation = self._read(group), self._order.permutation(group)
        first = int(self._order.ends[index]) - len(rows)
        taken = np.arange(len(rows)) if permutation is None else permutation
        taken = taken[begin - first : end - first]
        if rows.values is not None and rows.ends is not None:
            self._bags[lane][begin] = _take_bags(rows.values, rows.ends, taken)
        ring, capacity = int(self._ring_starts_L[lane]), int(self._capacity_L[lane])
        slot = begin % capacity
        # The ring may end amid them.
        for part, at in ((taken[: capacity - slot], ring + slot), (taken[capacity - slot :], ring)):
            for ring_array, decoded in zip(self._rings.arrays, rows.arrays, strict=True):
                _take(decoded, part, out=ring_array[at : at + len(part)])

    def _gather(self, bounds: np.ndarray) -> Rows:
        begins_KL, sizes_KL = bounds[:, :, 0], bounds[:, :, 1] - bounds[:, :, 0]
        slots_KL = begins_KL % np.maximum(self._capacity_L, 1)
        # Each piece in two: up to the end of its ring, and on from its start.
        heads_KL = np.minimum(sizes_KL, self._capacity_L - slots_KL)
        starts = np.stack([self._ring_starts_L + slots_KL, np.broadcast_to(self._ring_starts_L, slots_KL.shape)], -1)
        rows = self._rings.take(ranges(starts, np.stack([heads_KL, sizes_KL - heads_KL], -1)))
        if self._rings.values is not None:
            rows.values, rows.ends = self._gather_bags(bounds, rows.ids.sum(axis=1, dtype=np.int64))
        return rows

    def _gather_bags(self, bounds: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values and ends of the rows of batches, each of which has so many values."""
        # The rank may have no row of these batches, and so no piece.
        pieces = [np.empty_like(self._rings.values)]
        for bags, begin, stop in zip(self._bags, bounds[0, :, 0].tolist(), bounds[-1, :, 1].tolist(), strict=True):
            for first in sorted(bags):
                values, ends = bags[first]
                if first + len(ends) - 1 <= begin:
                    del bags[first]
                elif first < stop:
                    pieces.append(values[ends[max(begin - first, 0)] : ends[min(stop - first, len(ends) - 1)]])
        # They lie lane by lane, and batch by batch within a lane.
        sizes_LK = (bounds[:, :, 1] - bounds[:, :, 0]).T
        starts_LK = (sizes_LK.cumsum() - sizes_LK.ravel()).reshape(sizes_LK.shape)
        index = ranges(starts_LK.T, sizes_LK.T)
        lengths_there = np.empty_like(lengths)
        lengths_there[index] = lengths
        return _take_bags(np.concatenate(pieces), np.append(0, np.cumsum(lengths_there)), index)


@dataclass(frozen=True)
class _Load:
    """A row group on its way into a ring."""

    lane: int
    begin: int
    """Place of its first row."""
    run: Callable[[], None]
    state: "Future[None]"
    """Of ``run``, in the pool."""


class Held:
    """Rows held in memory, in file order.

    Args:
        rows: a range of the split.
        first: position in the split of its first row.
        order: ``none`` or ``full``.
    """

    room = None
    """See ``Source``."""

    def __init__(self, rows: Rows, first: int, order: Order) -> None:
        self._rows, self._first, self._order = rows, first, order

    def fetch(self, bounds: np.ndarray) -> Rows:
        """See ``Source``."""
        if self._order.shuffle == "none" and len(bounds) == 1:
            ((begin, stop),) = (bounds[0] - self._first).tolist()
            return self._rows.slice(begin, stop)
        places = ranges(bounds[:, :, 0], bounds[:, :, 1] - bounds[:, :, 0])
        return self._rows.take(self._order.split_rows(places) - self._first)

    def close(self) -> None:
        """See ``Source``."""


def hold(decoder: Decoder, order: Order, start: int, stop: int, threads: int) -> Rows:
    """Decodes the rows at the positions ``start`` to ``stop - 1`` of a split.

    Args:
        decoder: of the split.
        order: any order of the split.
        threads: how many decode.
    """
    held = decoder.empty(stop - start)

    def load(group: int) -> Rows:
        rows, first = decoder(group), int(order.group_starts[group])
        rows = rows.slice(max(start - first, 0), min(stop - first, len(rows)))
        at = max(first - start, 0)
        for array, decoded in zip(held.arrays, rows.arrays, strict=True):
            array[at : at + len(rows)] = decoded
        return rows if decoder.multi_hot else decoder.empty(0)

    groups = np.flatnonzero((order.group_starts < stop) & (order.group_starts + order.group_rows > start))
    with ThreadPoolExecutor(threads) as pool:
        bags = list(pool.map(load, groups.tolist()))
    if held.values is not None:
        held.values = np.concatenate([held.values, *(rows.values for rows in bags if rows.values is not None)])
        held.ends = np.append(0, np.cumsum(held.ids.sum(axis=1, dtype=np.int64)))
    return held


def batches_at_once(order: Order, world: int) -> int:
    """How many batches are best fetched together."""
    # In file order, a damaged file is told where its rows would come.
    return 1 if order.shuffle == "none" else max(1, _BLOCK_ROWS * world // order.batch_size)


def read_batches(
    source: Source, order: Order, *, first: int = 0, rank: int = 0, world: int = 1, rows: bool = False
) -> Generator[list[Batch], None, None]:
    """A rank's slices of the global batches of an order; those that are fetched together, in one list.

    Args:
        source: of the rows of ``order``.
        order: of one epoch.
        first: the first global batch to read.
        rank, world: whose slice, of how many.
        rows: fill ``Batch.rows``.

    Raises:
        UserError: a file is missing, altered or cannot be decoded.
    """
    at_once = batches_at_once(order, world)
    for block in range(first, order.batches, _BOUNDS_AT_ONCE):
        bounds = order.bounds(block, min(block + _BOUNDS_AT_ONCE, order.batches), rank, world)
        for start in range(0, len(bounds), at_once):
            several = bounds[start : start + at_once]
            sizes = (several[:, :, 1] - several[:, :, 0]).sum(axis=1).tolist()
            index = range(block + start, block + start + len(sizes))
            batches = _to_batches(source.fetch(several), sizes, [order.global_size(i) for i in index])
            if rows:
                for i, batch in zip(index, batches, strict=True):
                    batch.rows = torch.from_numpy(order.batch_rows(i, rank, world))
            yield batches


def _to_batches(rows: Rows, sizes: Sequence[int], global_sizes: Sequence[int]) -> list[Batch]:
    """Consecutive batches of so many rows each, as views."""
    # Torch splits in a fraction of the time that NumPy's slices and a conversion of each would take.
    labels = [None] * len(sizes) if rows.label is None else torch.from_numpy(rows.label).split(sizes)
    dense = torch.from_numpy(rows.dense).split(sizes)
    return [
        Batch(label=label, dense=dense_BI, ids=ids, global_size=global_size)
        for label, dense_BI, ids, global_size in zip(labels, dense, _split_ids(rows, sizes), global_sizes, strict=True)
    ]


def _split_ids(rows: Rows, sizes: Sequence[int]) -> list[SparseIds]:
    tables = rows.ids.shape[1]
    if rows.values is None:
        return [SparseIds(values=values, tables=tables) for values in torch.from_numpy(rows.ids).split(sizes)]
    parts = [rows.slice(begin, stop) for begin, stop in itertools.pairwise([0, *itertools.accumulate(sizes)])]
    return [_bags_as_ids(part.ids, part.values) for part in parts if part.values is not None]


def _bags_as_ids(lengths_nF: np.ndarray, values: np.ndarray) -> SparseIds:
    weights = None
    if values.dtype == _WEIGHTED:
        values, weights = (np.ascontiguousarray(values[name]) for name in ("id", "weight"))
    return SparseIds(
        values=torch.from_numpy(values),
        tables=lengths_nF.shape[1],
        offsets=torch.from_numpy(np.append(0, np.cumsum(lengths_nF, dtype=np.int64))),
        weights=None if weights is None else torch.from_numpy(weights),
    )


def _take_bags(values: np.ndarray, ends: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and ends, as in ``Rows``, of the rows at ``index``."""
    lengths = np.diff(ends)[index]
    return values[ranges(ends[index], lengths)], np.append(0, np.cumsum(lengths))


def _side_by_side(columns: Sequence[np.ndarray], count: int, dtype: np.dtype) -> np.ndarray:
    """[count, columns], row by row in memory, from arrays of so many values."""
    # Columns that lie a multiple of 4 KiB apart share a few sets of the cache, where they evict each other: the
    # transposition would take three times as long.
    block = _room((len(columns), count + (16 - count) % 1024), dtype)[:, :count]
    for row, column in zip(block, columns, strict=True):
        row[:] = column
    rows = _room((count, len(columns)), dtype)
    rows[:] = block.T
    return rows


def _take(array: np.ndarray, index: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """The rows of an array at ``index``."""
    if out is None:
        out = _room((len(index), *array.shape[1:]), array.dtype)
    # Any mode but "clip" would write to a copy first.
    return array.take(index, axis=0, out=out, mode="clip")


def _room(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array from Arrow's pool, which has freed memory at hand; NumPy's would be mapped anew."""
    size = math.prod(shape) * dtype.itemsize
    return np.frombuffer(pa.allocate_buffer(size), dtype).reshape(shape)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """The values in one array; a row group mostly has them so."""
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _floats(column: pa.Array) -> np.ndarray:
    """float32 values, NaN where there is none."""
    return (column.fill_null(_NAN) if column.null_count else column).to_numpy()


def _bag_column(column: pa.Array, kind: Column) -> tuple[np.ndarray, np.ndarray]:
    """Lengths int32 [n] and values int32 [N] of a column of bags, or of single ids."""
    if kind.role == "categorical":
        return np.ones(len(column), dtype=np.int32), column.to_numpy()
    offsets = column.offsets.to_numpy()
    return np.diff(offsets), column.values.to_numpy()[offsets[0] : offsets[-1]]
