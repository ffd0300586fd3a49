"""The order in which a split's rows are served: arithmetic on (schema, seed, epoch), nothing else.

No file is opened and ranks do not communicate: every rank computes the same order, and any batch of it
can be addressed by its index, so the position of a run is an epoch and a batch index.

An order is a sequence of row groups, cut into lanes: ranges of the sequence's rows that advance
together, in proportion to their lengths, and run out together. A global batch takes the next rows
of every lane. Rank r of W serves the r-th of W contiguous blocks of lanes; a lone lane is shared,
and each rank serves the r-th of W contiguous parts of the rows that the lane gives to a batch. Either way a batch
holds the same rows on any number of ranks.

``none`` is the order of the files, in one lane. (Ranks that share it decode the same row groups.)
Cut into one lane for each rank, as evaluation does, it gives every rank a contiguous range of the
rows: each row still comes once and in file order within a rank, but which rows form a global batch
depends on the number of lanes.

``window`` shuffles the files, and the row groups within each file, and cuts the sequence between
row groups into ``LANES`` lanes of (nearly) equally many. Each lane serves its row groups one after
the other, the rows of each in an order of their own: the row group is the lane's window. So each
batch is drawn from up to 48 row groups all over the split, and W ranks together read the data once.
Because a lane finishes one file before it opens the next, a reader holds few footers.

``full`` is one permutation of all rows of the split, in one lane, for data held in memory. It is
computed row by row, so it takes no memory.

Orders come from our own integer mixing, so they stay the same with every release of a library.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from datamodules.mixing import GOLDEN, mix

Shuffle = Literal["none", "window", "full"]

LANES = 48  # divisible by 1, 2, 3, 4, 6, 8, 12, 16 and 24 ranks

_MASK = (1 << 64) - 1
_FEISTEL_ROUNDS = 4
_BLOCK = 1 << 20
"""Numbers that are mixed at once."""


class Order:
    """The global batches of one epoch.

    Rows have two kinds of numbers: their place in the sequence, which ``bounds`` returns, and their position in the
    split, which ``split_rows`` returns for a place.

    Args:
        files: rows of every row group of every file of the split, in order.
        batch_size: rows of a global batch, over all ranks.
        shuffle: ``none``, ``window`` or ``full``.
        seed, epoch: identify a shuffled order; without effect with ``none``.
        lanes: number of lanes that advance together; by default 48 with ``window``, else one.
    """

    def __init__(
        self,
        files: Sequence[Sequence[int]],
        *,
        batch_size: int,
        shuffle: Shuffle,
        seed: int = 0,
        epoch: int = 0,
        lanes: int | None = None,
    ) -> None:
        if lanes is None:
            lanes = LANES if shuffle == "window" else 1
        assert batch_size > 0 and lanes > 0
        self.batch_size = batch_size
        self.group_rows = np.array([rows for groups in files for rows in groups], dtype=np.int64)
        """int64 [groups]: rows of each row group of the split."""
        self.group_starts = np.cumsum(self.group_rows) - self.group_rows
        """int64 [groups]: position in the split of the first row of each row group."""
        self.rows = int(self.group_rows.sum())
        self.shuffle, self._seed, self._epoch = shuffle, seed, epoch
        if shuffle == "window":
            self.sequence = self._shuffled_groups([len(groups) for groups in files])
        else:
            self.sequence = np.arange(len(self.group_rows))
        """int64 [groups]: the row groups in the order in which they are served."""
        self.ends = np.cumsum(self.group_rows[self.sequence])
        """int64 [groups]: place after the last row of each row group of the sequence."""
        if shuffle == "window":
            cuts = np.arange(lanes + 1) * len(self.sequence) // lanes
            self.edges = np.append(0, self.ends)[cuts]
        else:
            self.edges = np.array([lane * self.rows // lanes for lane in range(lanes + 1)])
        """int64 [lanes + 1]: lane i is the rows at the places ``edges[i]`` to ``edges[i + 1] - 1``."""

    @property
    def batches(self) -> int:
        """Global batches of the epoch; the last one may be partial."""
        return -(-self.rows // self.batch_size)

    def global_size(self, batch: int) -> int:
        """Return the rows of a global batch, over all ranks."""
        return min(self.batch_size, self.rows - batch * self.batch_size)

    def lanes_of(self, rank: int, world: int) -> range:
        """Return the lanes that a rank reads: a block of its own, or the only lane, shared by all."""
        lanes = len(self.edges) - 1
        return range(1) if lanes == 1 else range(rank * lanes // world, (rank + 1) * lanes // world)

    def bounds(self, first: int, last: int, rank: int, world: int) -> np.ndarray:
        """Return what the batches ``first`` to ``last - 1`` take from each of a rank's lanes.

        Returns:
            int64 [last - first, lanes of the rank, 2]: from which place of the sequence to which; the
            slice of the rank is these pieces, lane after lane.
        """
        totals = np.minimum(np.arange(first, last + 1, dtype=np.int64) * self.batch_size, self.rows)
        if len(self.edges) == 2:
            sizes = totals[1:] - totals[:-1]
            start = totals[:-1] + sizes * rank // world
            stop = totals[:-1] + sizes * (rank + 1) // world
            return np.stack([start, stop], axis=1)[:, None]
        lanes = self.lanes_of(rank, world)
        served = _shares(np.diff(self.edges), totals)[:, lanes.start : lanes.stop]
        served += self.edges[lanes.start : lanes.stop]
        return np.stack([served[:-1], served[1:]], axis=2)

    def slice_starts(self, first: int, last: int, rank: int, world: int) -> np.ndarray:
        """Return how many rows of each of the batches ``first`` to ``last - 1`` lower ranks serve, int64 [n]."""
        if rank == 0:
            return np.zeros(last - first, np.int64)
        totals = np.minimum(np.arange(first, last + 1, dtype=np.int64) * self.batch_size, self.rows)
        if len(self.edges) == 2:
            return np.diff(totals) * rank // world
        lower = self.lanes_of(rank, world).start
        return np.diff(_shares(np.diff(self.edges), totals)[:, :lower].sum(axis=1))

    def rank_shares(self, world: int) -> np.ndarray:
        """Return the share of the rows that each rank serves, float64 [world]."""
        if len(self.edges) == 2:
            return np.full(world, 1 / world)
        lanes = [self.lanes_of(rank, world) for rank in range(world)]
        served = [self.edges[of_rank.stop] - self.edges[of_rank.start] for of_rank in lanes]
        return np.array(served) / max(self.rows, 1)

    def permutation(self, group: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the rows ``start`` to ``stop - 1`` (by default all) in the order of a row group's rows, int64 [n]."""
        rows = int(self.group_rows[group])
        stop = rows if stop is None else stop
        if self.shuffle != "window":
            return np.arange(start, stop)
        return permutation(rows, _key(self._seed, self._epoch, 2, int(group)), start, stop)

    def split_rows(self, places: np.ndarray) -> np.ndarray:
        """Return the positions in the split, int64 [N], of the rows at int64 [N] places of the sequence."""
        if self.shuffle == "none":
            return places
        if self.shuffle == "full":
            return bijection(places, self.rows, _key(self._seed, self._epoch, 3))
        index = np.searchsorted(self.ends, places, side="right")
        positions = np.empty_like(places)
        for i in np.unique(index).tolist():
            group, here = int(self.sequence[i]), index == i
            order = self.permutation(group)
            positions[here] = self.group_starts[group] + order[places[here] - self.ends[i] + len(order)]
        return positions

    def batch_rows(self, batch: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """Return the positions in the split, int64 [slice], of the rows of a rank's slice of a global batch."""
        bounds = self.bounds(batch, batch + 1, rank, world)
        return self.split_rows(ranges(bounds[:, :, 0], bounds[:, :, 1] - bounds[:, :, 0]))

    def _shuffled_groups(self, groups_per_file: Sequence[int]) -> np.ndarray:
        firsts = np.cumsum(groups_per_file) - groups_per_file
        files = permutation(len(groups_per_file), _key(self._seed, self._epoch, 0, 0))
        within = [
            firsts[file] + permutation(groups_per_file[file], _key(self._seed, self._epoch, 1, int(file)))
            for file in files
        ]
        return np.concatenate([np.empty(0, dtype=np.int64), *within])


def permutation(n: int, key: int, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Return a pseudo-random order of ``range(n)``, int64 [n], or its part ``start`` to ``stop - 1``: sorted by 16
    random bits each, by 32 if n is above 65,536; ties by index.

    NumPy sorts 16 bits by counting, in 9 ns a row. Of the 16,384 rows of a row group one in five shares its bits
    with another row, and the two are adjacent in the order of the file. A part of a larger n takes the memory of the
    part, and two passes of 10 ns a row.
    """
    stop = n if stop is None else stop
    if n <= 1 << 16:
        return np.argsort(_random_bits(0, n, key).astype(np.uint16), kind="stable")[start:stop]
    # The highest 16 of the 32 bits tell which rows may be in the part.
    blocks = [(first, min(first + _BLOCK, n)) for first in range(0, n, _BLOCK)]
    counts = np.zeros(1 << 16, np.int64)
    for block in blocks:
        counts += np.bincount((_random_bits(*block, key) >> np.uint64(16)).astype(np.uint16), minlength=1 << 16)
    ends = np.cumsum(counts)
    lowest, highest = np.searchsorted(ends, [start, stop - 1], side="right")
    index, kept = [], []
    for first, last in blocks:
        bits = _random_bits(first, last, key).astype(np.uint32)
        here = np.flatnonzero((bits >> 16 >= lowest) & (bits >> 16 <= highest))
        index.append(here + first)
        kept.append(bits[here])
    before = int(ends[lowest] - counts[lowest])
    order = np.argsort(np.concatenate(kept), kind="stable")[start - before : stop - before]
    return np.concatenate(index)[order]


def _random_bits(first: int, last: int, key: int) -> np.ndarray:
    """Return 64 random bits, uint64 [last - first], for each of the numbers ``first`` to ``last - 1``."""
    return mix(np.arange(first + 1, last + 1, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(key))


def bijection(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Return where a pseudo-random permutation of ``range(n)`` puts each of the int64 ``index``.

    A Feistel network permutes the numbers of as many bits as n - 1 has: each half in turn is mixed
    into the other. A result of n or more is permuted again until it falls below n (cycle walking),
    twice at most on average. Unlike ``permutation`` it takes no memory and starts anywhere.
    """
    bits = max(n - 1, 1).bit_length()
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = (np.uint64((1 << half) - 1) for half in (bits // 2, bits - bits // 2))
    keys = [np.uint64(_key(key, part)) for part in range(_FEISTEL_ROUNDS)]
    values = index.astype(np.uint64)
    todo = np.arange(len(values))
    while todo.size:
        walking = values[todo]
        high, low = walking >> low_bits, walking & low_mask
        for i in range(0, _FEISTEL_ROUNDS, 2):
            high ^= mix(low + keys[i]) & high_mask
            low ^= mix(high + keys[i + 1]) & low_mask
        values[todo] = high << low_bits | low
        todo = todo[values[todo] >= n]
    return values.astype(np.int64)


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return ``starts[i] ... starts[i] + lengths[i] - 1`` for every i, joined: int64 [sum of lengths]."""
    starts, lengths = starts.ravel(), lengths.ravel()
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


def _shares(sizes: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Return how many rows each lane has served when all lanes together have served ``totals``.

    Row i of a lane of n rows has the key (2i + 1) / n, and rows are served by ascending key, equal
    keys by ascending lane (the Sainte-Lague method of sharing out seats). So the counts never go
    back as the total grows, add up to it exactly, stay within a few rows of proportional, and all
    lanes run out together. Divisions are correctly rounded everywhere, so float64 keys are ordered
    alike on every machine.

    Args:
        sizes: int64 [L], the rows of each lane.
        totals: int64 [K], each from 0 to the sum of sizes.

    Returns:
        int64 [K, L]
    """
    rows, lanes = int(sizes.sum()), len(sizes)
    if rows == 0:
        return np.zeros((len(totals), lanes), dtype=np.int64)
    # All rows with keys up to 2 * low / rows: surely among those served, and short of the total by
    # less than a row or so per lane; the rest is then added key by key. (A millirow is more than
    # float64 is wrong by at 10^12 rows.)
    low = np.maximum(totals - lanes // 2 - 1, 0)
    counts = np.maximum(low[:, None] * (sizes / rows) + (0.5 - 1e-3), 0).astype(np.int64)
    missing = totals - counts.sum(axis=1)
    while (short := np.flatnonzero(missing)).size:
        keys = np.where(counts[short] < sizes, (2 * counts[short] + 1) / np.maximum(sizes, 1), np.inf)
        counts[short, keys.argmin(axis=1)] += 1
        missing[short] -= 1
    return counts


def _key(*parts: int) -> int:
    """Return 64 bits that depend on all parts."""
    key = 0
    for part in parts:
        key = int(mix(np.array([(key + part * GOLDEN + 1) & _MASK], dtype=np.uint64))[0])
    return key
