"""Sources of the rows of an order (a window of decoded row groups, or rows held in memory), and the batches made of
them.

Shape suffixes: n rows, N multi-hot indices, L lanes of a rank, K batches."""

import functools
import itertools
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from datamodules.stream.order import Order, ranges
from datamodules.stream.rows import WEIGHTED_IDS, Decoder, Rows, take_bags, take_rows
from lightning_dlrm.contracts.batch import Batch, SparseIds

# Bounds are computed for this many batches at once: a quarter of the cost for each alone.
_BOUNDS_AT_ONCE = 256
# Small batches are cut from a block of several: gathering has a cost per call.
_BLOCK_ROWS = 16_384
LARGE = 65_536
"""Rows of a row group that is still read whole: four times those that DatasetWriter makes."""
_PARTS_BYTES = 512 * 2**20


class Window:
    """The rows of a rank's lanes from those being served to the end of the last decoded row group.

    Every lane has a ring of rows. A row group is decoded as its rows come within reach, and laid
    behind those of its lane, permuted by the order; the rows of batches are then gathered from all
    rings. All lanes finish their row groups at nearly the same time. So that the consumer does not
    wait while all of them decode the next, they decode one after the other, from 0.6 of a row group
    ahead of the batch down to 0.1.

    Row groups of more than ``LARGE`` rows, which other writers make, are read in parts: so many rows of all lanes
    together take ``_PARTS_BYTES`` at most. Each part of a shuffled row group is drawn from all over it, so the row
    group is decoded once for each part.

    Args:
        read: decodes a row group, or some of its rows, as ``Decoder.__call__``; called from several threads.
        empty: allocates rows.
        order: of one epoch.
        rank, world: the rank whose lanes are read, and the world size.
        at_once: maximum of batches that are fetched at once.
        threads: number of threads that decode, the calling one included.
        buffer: memory to use if it is large enough; a closed window's ``buffer``.
    """

    def __init__(
        self,
        read: Callable[[int, np.ndarray | None], Rows],
        empty: Callable[[int], Rows],
        order: Order,
        *,
        rank: int,
        world: int,
        at_once: int,
        threads: int,
        buffer: Rows | None = None,
    ) -> None:
        self._read, self._order = read, order
        lanes = order.lanes_of(rank, world)
        begins_L, self._lane_ends_L = (
            order.edges[lanes.start : lanes.stop],
            order.edges[lanes.start + 1 : lanes.stop + 1],
        )
        busy = max(int(np.count_nonzero(self._lane_ends_L > begins_L)), 1)
        affordable = _PARTS_BYTES // (busy * max(empty(1).nbytes, 1))
        self._part_rows = max(LARGE, affordable) if order.shuffle == "window" else LARGE
        """Rows that are decoded into a ring at once, at most."""
        largest = min(int(order.group_rows.max(initial=0)), self._part_rows)
        # A single lane is read in file order: each further thread decodes a row group ahead.
        ahead = 0.1 + 0.5 * np.arange(1, len(lanes) + 1) / len(lanes) if len(lanes) > 1 else np.array([threads - 1])
        self._reach_L = (ahead * largest).astype(np.int64)
        # A batch takes from a lane its share of rows, give or take a few.
        batch_rows_L = at_once * order.batch_size * (self._lane_ends_L - begins_L) // max(order.rows, 1) + 4
        self._capacity_L = np.minimum(batch_rows_L + self._reach_L + largest, self._lane_ends_L - begins_L)
        self._ring_starts_L = np.cumsum(self._capacity_L) - self._capacity_L
        rows = int(self._capacity_L.sum())
        self.buffer: Rows | None = buffer if buffer is not None and len(buffer) >= rows else empty(rows)
        """Memory that the next window may reuse, once this one is closed."""
        self._rings = self.buffer.slice(0, rows)
        self._bags: list[dict[int, tuple[np.ndarray, np.ndarray]]] = [{} for _ in lanes]
        """For each lane, by the place of the first row: values and ends of multi-hot columns, as in ``Rows``."""
        self._begun_L: np.ndarray | None = None
        """Places up to which the lanes are decoded, or being decoded."""
        self._loads: list[_Load] = []
        """Loads that may be unfinished."""
        self._pool = ThreadPoolExecutor(threads - 1, "row group decoder") if threads > 1 else None

    def fetch(self, bounds: np.ndarray) -> Rows:
        """Return the rows of consecutive batches, batch by batch and within it lane by lane.

        Args:
            bounds: int64 [K, L, 2] as ``Order.bounds`` returns them; each call continues where the previous one ended.

        Raises:
            UserError: a file is missing, altered or cannot be decoded.
        """
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
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _begin_load(self, lane: int, begin: int) -> int:
        """Start to decode the row group at a place of a lane, or a part of it; return the place after it."""
        index = int(np.searchsorted(self._order.ends, begin, side="right"))
        end = int(min(self._order.ends[index], self._lane_ends_L[lane], begin + self._part_rows))
        run = functools.partial(self._load, lane, index, begin, end)
        if self._pool is None:
            run()
        else:
            self._loads.append(_Load(lane, begin, run, self._pool.submit(run)))
        return end

    def _finish_loads(self, stops_L: np.ndarray) -> None:
        """Wait for the row groups with rows before the places ``stops_L``; decode here those that no thread has
        begun."""
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
        """Decode a row group of the sequence and copy its rows ``begin`` to ``end - 1`` into the ring."""
        group = int(self._order.sequence[index])
        count = int(self._order.group_rows[group])
        first = int(self._order.ends[index]) - count
        taken = self._order.permutation(group, begin - first, end - first)
        if count <= self._part_rows:
            rows = self._read(group, None)
        else:
            rows, taken = self._read(group, taken), np.arange(end - begin)
        if rows.values is not None and rows.ends is not None:
            self._bags[lane][begin] = take_bags(rows.values, rows.ends, taken)
        ring, capacity = int(self._ring_starts_L[lane]), int(self._capacity_L[lane])
        slot = begin % capacity
        # The ring may end in the middle of them.
        for part, at in ((taken[: capacity - slot], ring + slot), (taken[capacity - slot :], ring)):
            for ring_array, decoded in zip(self._rings.arrays, rows.arrays, strict=True):
                take_rows(decoded, part, out=ring_array[at : at + len(part)])

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
        """Return values and ends of the rows of batches, given the number of values of each row."""
        # If the rank has no rows of these batches, there are no pieces.
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
        return take_bags(np.concatenate(pieces), np.append(0, np.cumsum(lengths_there)), index)


@dataclass(frozen=True)
class _Load:
    """A row group being decoded into a ring."""

    lane: int
    begin: int
    """Place of its first row."""
    run: Callable[[], None]
    state: "Future[None]"
    """Of ``run``, in the pool."""


class CachedRows:
    """Rows held in memory, in file order.

    Args:
        rows: a range of the split.
        first: position in the split of its first row.
        order: ``none`` or ``full``.
    """

    buffer = None
    """None: these rows stay in use, so their memory is not reused."""

    def __init__(self, rows: Rows, first: int, order: Order) -> None:
        self._rows, self._first, self._order = rows, first, order

    def fetch(self, bounds: np.ndarray) -> Rows:
        """Return the rows of consecutive batches; see ``Window.fetch``."""
        if self._order.shuffle == "none" and len(bounds) == 1:
            ((begin, stop),) = (bounds[0] - self._first).tolist()
            return self._rows.slice(begin, stop)
        places = ranges(bounds[:, :, 0], bounds[:, :, 1] - bounds[:, :, 0])
        return self._rows.take(self._order.split_rows(places) - self._first)

    def close(self) -> None:
        """Do nothing: there are no threads."""


Source: TypeAlias = Window | CachedRows


def cache_rows(decoder: Decoder, order: Order, start: int, stop: int, threads: int) -> Rows:
    """Decode the rows at the positions ``start`` to ``stop - 1`` of a split.

    Args:
        decoder: of the split.
        order: any order of the split.
        threads: number of threads that decode.
    """
    cached = decoder.empty(stop - start)

    def load(group: int) -> list[np.ndarray]:
        """Copy the rows of a row group, and return the values of their bags."""
        bags, first = [], int(order.group_starts[group])
        for decoded in decoder.slices(group):
            rows = decoded.slice(min(max(start - first, 0), len(decoded)), max(min(stop - first, len(decoded)), 0))
            at = max(first - start, 0)
            for array, of_rows in zip(cached.arrays, rows.arrays, strict=True):
                array[at : at + len(rows)] = of_rows
            if rows.values is not None:
                bags.append(rows.values)
            first += len(decoded)
        return bags

    groups = np.flatnonzero((order.group_starts < stop) & (order.group_starts + order.group_rows > start))
    with ThreadPoolExecutor(threads) as pool:
        bags = list(pool.map(load, groups.tolist()))
    if cached.values is not None:
        cached.values = np.concatenate([cached.values, *itertools.chain(*bags)])
        cached.ends = np.append(0, np.cumsum(cached.ids.sum(axis=1, dtype=np.int64)))
    return cached


def batches_at_once(order: Order, world: int) -> int:
    """Return how many batches are fetched together."""
    # In file order, one at a time, so that a damaged file raises its error at its first batch.
    return 1 if order.shuffle == "none" else max(1, _BLOCK_ROWS * world // order.batch_size)


def read_batches(
    source: Source,
    order: Order,
    *,
    first: int = 0,
    last: int | None = None,
    rank: int = 0,
    world: int = 1,
    rows: bool = False,
) -> Generator[list[Batch], None, None]:
    """Yield a rank's slices of the global batches of an order; those that are fetched together, in one list.

    Args:
        source: of the rows of ``order``.
        order: of one epoch.
        first: the first global batch to read.
        last: the global batch at which to end; None for the end of the order.
        rank, world: the rank whose slices are served, and the world size.
        rows: fill ``Batch.rows``.

    Raises:
        UserError: a file is missing, altered or cannot be decoded.
    """
    at_once, last = batches_at_once(order, world), order.batches if last is None else last
    for block in range(first, last, _BOUNDS_AT_ONCE):
        until = min(block + _BOUNDS_AT_ONCE, last)
        bounds = order.bounds(block, until, rank, world)
        lower = order.slice_starts(block, until, rank, world).tolist()
        for start in range(0, len(bounds), at_once):
            several = bounds[start : start + at_once]
            sizes = (several[:, :, 1] - several[:, :, 0]).sum(axis=1).tolist()
            index = range(block + start, block + start + len(sizes))
            batches = _to_batches(source.fetch(several), sizes, [order.global_size(i) for i in index])
            for i, batch in zip(index, batches, strict=True):
                batch.start = lower[i - block]
                if rows:
                    batch.rows = torch.from_numpy(order.batch_rows(i, rank, world))
            yield batches


def _to_batches(rows: Rows, sizes: Sequence[int], global_sizes: Sequence[int]) -> list[Batch]:
    """Split rows into consecutive batches of the given sizes, as views."""
    # torch.split takes a fraction of the time of NumPy slices and a conversion of each.
    labels = [None] * len(sizes) if rows.label is None else torch.from_numpy(rows.label).split(sizes)
    groups = [None] * len(sizes) if rows.group is None else torch.from_numpy(rows.group).split(sizes)
    dense = torch.from_numpy(rows.dense).split(sizes)
    return [
        Batch(label=label, dense=dense_BI, ids=ids, global_size=global_size, group=group)
        for label, dense_BI, ids, global_size, group in zip(
            labels, dense, _split_ids(rows, sizes), global_sizes, groups, strict=True
        )
    ]


def _split_ids(rows: Rows, sizes: Sequence[int]) -> list[SparseIds]:
    tables = rows.ids.shape[1]
    if rows.values is None:
        return [SparseIds(values=values, tables=tables) for values in torch.from_numpy(rows.ids).split(sizes)]
    parts = [rows.slice(begin, stop) for begin, stop in itertools.pairwise([0, *itertools.accumulate(sizes)])]
    return [_bags_as_ids(part.ids, part.values) for part in parts if part.values is not None]


def _bags_as_ids(lengths_nF: np.ndarray, values: np.ndarray) -> SparseIds:
    weights = None
    if values.dtype == WEIGHTED_IDS:
        values, weights = (np.ascontiguousarray(values[name]) for name in ("id", "weight"))
    return SparseIds(
        values=torch.from_numpy(values),
        tables=lengths_nF.shape[1],
        offsets=torch.from_numpy(np.append(0, np.cumsum(lengths_nF, dtype=np.int64))),
        weights=None if weights is None else torch.from_numpy(weights),
    )
