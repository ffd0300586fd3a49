"""The order in which a split's rows are served: arithmetic on (schema, seed, epoch), nothing else.

No file is opened and no process is asked: every rank computes the same order, and any batch of it
can be addressed by its index, so the position of a run is an epoch and a batch index.

``none`` is the order of the files; rank r of W serves the r-th of W contiguous parts of each batch.

``window`` shuffles the files, and the row groups within each file, and cuts the sequence of row
groups into ``LANES`` lanes of (nearly) equally many. Each lane serves its row groups one after the
other, the rows of each in an order of their own: the row group is the lane's window. All lanes
advance together and run out together, so each batch is drawn from up to 48 row groups all over the
split. Rank r of W serves the r-th of W contiguous blocks of lanes: the rows of a batch do not
depend on W, and W ranks together read the data once. Because a lane finishes one file before it
opens the next, a reader holds few footers.

Orders come from our own integer mixing, so they stay the same from one release of a library to the
next.
"""

import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np

Shuffle = Literal["none", "window"]

LANES = 48  # divisible by 1, 2, 3, 4, 6, 8, 12, 16 and 24 ranks

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class Order:
    """The global batches of one epoch.

    Args:
        files: rows of every row group of every file of the split, in order.
        batch_size: rows of a global batch, over all ranks.
        shuffle: ``none`` or ``window``.
        seed, epoch: choose one of the shuffled orders; of no effect with ``none``.
        lanes: how many lanes advance together; with ``none`` there is one.
    """

    def __init__(
        self,
        files: Sequence[Sequence[int]],
        *,
        batch_size: int,
        shuffle: Shuffle,
        seed: int = 0,
        epoch: int = 0,
        lanes: int = LANES,
    ) -> None:
        assert batch_size > 0 and lanes > 0
        self.batch_size = batch_size
        self.group_rows = np.array([rows for groups in files for rows in groups], dtype=np.int64)
        """int64 [groups]: rows of each row group of the split."""
        self.group_starts = np.cumsum(self.group_rows) - self.group_rows
        """int64 [groups]: position in the split of the first row of each row group."""
        self.rows = int(self.group_rows.sum())
        self._shuffled = shuffle == "window"
        self._seed, self._epoch = seed, epoch
        if self._shuffled:
            sequence = self._shuffle_groups([len(groups) for groups in files])
        else:
            sequence, lanes = np.arange(len(self.group_rows)), 1
        cuts = [lane * len(sequence) // lanes for lane in range(lanes + 1)]
        self.lanes = [sequence[a:b] for a, b in itertools.pairwise(cuts)]
        """Per lane, the row groups that it serves, in order."""
        self._lane_rows = np.array([self.group_rows[groups].sum() for groups in self.lanes], dtype=np.int64)
        assert 2 * self.rows * int(self._lane_rows.max()) < 2**63, "too many rows for 64-bit arithmetic"

    @property
    def batches(self) -> int:
        """Global batches of the epoch; the last one may be partial."""
        return -(-self.rows // self.batch_size)

    def global_size(self, batch: int) -> int:
        """Rows of a global batch, over all ranks."""
        return min(self.batch_size, self.rows - batch * self.batch_size)

    def lanes_of(self, rank: int, world: int) -> range:
        """The lanes that a rank reads: a block of its own, or the only lane, shared by all."""
        if not self._shuffled:
            return range(1)
        return range(rank * len(self.lanes) // world, (rank + 1) * len(self.lanes) // world)

    def bounds(self, first: int, last: int, rank: int, world: int) -> np.ndarray:
        """What the batches ``first`` to ``last - 1`` take from each of a rank's lanes.

        Returns:
            int64 [last - first, lanes of the rank, 2]: from where to where in the lane's own count of
            rows; the slice of the rank is these pieces, lane after lane.
        """
        edges = np.minimum(np.arange(first, last + 1, dtype=np.int64) * self.batch_size, self.rows)
        if not self._shuffled:
            sizes = edges[1:] - edges[:-1]
            start = edges[:-1] + sizes * rank // world
            stop = edges[:-1] + sizes * (rank + 1) // world
            return np.stack([start, stop], axis=1)[:, None]
        lanes = self.lanes_of(rank, world)
        counts = _shares(self._lane_rows, edges)[:, lanes.start : lanes.stop]
        return np.stack([counts[:-1], counts[1:]], axis=2)

    def permutation(self, group: int) -> np.ndarray | None:
        """int64 [rows of the group]: the order of a row group's rows; None where they keep theirs."""
        if not self._shuffled:
            return None
        return permutation(int(self.group_rows[group]), _key(self._seed, self._epoch, 2, int(group)))

    def batch_rows(self, batch: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """int64 [slice]: positions in the split of the rows of a rank's slice of a global batch."""
        pieces = [np.empty(0, dtype=np.int64)]
        for lane, (start, stop) in zip(
            self.lanes_of(rank, world), self.bounds(batch, batch + 1, rank, world)[0], strict=True
        ):
            groups = self.lanes[lane]
            ends = np.cumsum(self.group_rows[groups])
            for i in range(np.searchsorted(ends, start, side="right"), len(groups)):
                offset = int(ends[i] - self.group_rows[groups[i]])
                if offset >= stop:
                    break
                order = self.permutation(groups[i])
                rows = np.arange(self.group_rows[groups[i]]) if order is None else order
                pieces.append(self.group_starts[groups[i]] + rows[max(start - offset, 0) : stop - offset])
        return np.concatenate(pieces)

    def _shuffle_groups(self, groups_per_file: Sequence[int]) -> np.ndarray:
        firsts = np.cumsum(groups_per_file) - groups_per_file
        files = permutation(len(groups_per_file), _key(self._seed, self._epoch, 0, 0))
        within = [
            firsts[file] + permutation(groups_per_file[file], _key(self._seed, self._epoch, 1, int(file)))
            for file in files
        ]
        return np.concatenate([np.empty(0, dtype=np.int64), *within])


def permutation(n: int, key: int) -> np.ndarray:
    """A pseudo-random order of ``range(n)``: sorted by 32 random bits each, ties by index.

    The two stable passes over 16 bits each are what NumPy sorts by counting, in 8 ns a row; the
    result is that of any stable sort.
    """
    bits = _mix(np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(key))
    low, high = bits.astype(np.uint16), (bits >> np.uint64(16)).astype(np.uint16)
    order = np.argsort(low, kind="stable")
    return order[np.argsort(high[order], kind="stable")]


def _shares(sizes: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """How many rows each lane has served when all lanes together have served ``totals``.

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
    # less than a row or so per lane; the rest is then added key by key.
    low = np.maximum(totals - lanes // 2 - 1, 0)
    counts = (2 * low[:, None] * sizes + rows) // (2 * rows)
    missing = totals - counts.sum(axis=1)
    while (short := np.flatnonzero(missing)).size:
        keys = np.where(counts[short] < sizes, (2 * counts[short] + 1) / np.maximum(sizes, 1), np.inf)
        counts[short, keys.argmin(axis=1)] += 1
        missing[short] -= 1
    return counts


def _key(*parts: int) -> int:
    """64 bits that depend on all parts."""
    key = 0
    for part in parts:
        key = int(_mix(np.array([(key + part * _GOLDEN + 1) & _MASK], dtype=np.uint64))[0])
    return key


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), a bijection of uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
