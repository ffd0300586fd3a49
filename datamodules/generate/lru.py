"""A compiled LRU stack of table rows: the depth at which an access finds its row, and the row at a depth.

The stack distance of an access (Mattson et al. 1970) is the number of distinct rows accessed since the last access of
the same row, itself included: 1 for a row accessed twice in a run. A cache of c rows that drops the least recently
used one serves just the accesses with distances up to c.

Every access takes a slot in the order of time, and a row's latest slot is marked by a bit. A row's distance is the
number of marks from its slot on (Bennett & Kruskal 1975); the row at distance d has the d-th mark from the end. Marks
are counted in blocks of 512 bits, whose counts are held in a Fenwick tree, so both take a walk through the tree and
one block. When all slots are taken, the marked ones move together.

Memory: 8 to 17 bytes for each distinct row, 20 to 41 while slots move, and at least 0.3 MB: there are two to four times
as many slots as distinct rows. To measure distances, also 4 bytes for each row of the table.

Needs numba.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

_LEAST_SLOTS = 1 << 16
_WORDS = 8
"""64-bit words of a block."""


class LruStack:
    """Rows by the time of their last access.

    Args:
        rows: of the table, to measure distances of its ids; None to make accesses only.
    """

    def __init__(self, rows: int | None = None) -> None:
        self._slot_of = None if rows is None else np.full(rows, -1, dtype=np.int32)
        self._row_at: NDArray[np.int32] = np.empty(0, dtype=np.int32)
        self._marks: NDArray[np.uint64] = np.empty(0, dtype=np.uint64)
        self._make_room()

    @property
    def depth(self) -> int:
        """Distinct rows accessed so far."""
        return int(self._state[1])

    def distances(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the stack distance of each access, in order; 0 for the first access of a row."""
        assert self._slot_of is not None
        found, done = np.empty(len(ids), dtype=np.int32), 0
        while done < len(ids):
            done = _distances(ids, found, done, self._slot_of, self._row_at, self._marks, self._tree, self._state)
            if done < len(ids):
                self._make_room()
        return found

    def accesses(self, distances: NDArray[np.int32]) -> NDArray[np.int32]:
        """Access the row at each distance and return it; a distance of 0 accesses a new row.

        Such rows are numbered 0, 1, 2 and on. A distance beyond the depth counts as the depth; without any rows, it
        accesses a new row.
        """
        made, done = np.empty(len(distances), dtype=np.int32), 0
        while done < len(distances):
            done = _accesses(distances, made, done, self._row_at, self._marks, self._tree, self._state)
            if done < len(distances):
                self._make_room()
        return made

    @staticmethod
    def choose(bits: NDArray[np.uint64], left: int, wanted: int) -> NDArray[np.bool_]:
        """Choose ``wanted`` of the next ``left`` accesses at random (Knuth's algorithm S, selection sampling).

        Called piece by piece until no access is left, it chooses exactly ``wanted`` accesses, and every choice is
        equally likely.

        Args:
            bits: 32 random bits for each access of the piece; 0 is chosen while any is wanted.
        """
        chosen = np.empty(len(bits), dtype=np.bool_)
        _choose(bits, left, wanted, chosen)
        return chosen

    def _make_room(self) -> None:
        """Move the marked slots together, and at least double the free slots."""
        rows = self._row_at[np.unpackbits(self._marks.view(np.uint8), bitorder="little").view(np.bool_)]
        slots = max(_LEAST_SLOTS, 1 << (2 * len(rows) - 1).bit_length() if len(rows) else 0)
        self._row_at = np.empty(slots, dtype=np.int32)
        self._row_at[: len(rows)] = rows
        marks = np.zeros(slots, dtype=np.uint8)
        marks[: len(rows)] = 1
        self._marks = np.packbits(marks, bitorder="little").view(np.uint64)
        # A Fenwick tree over the blocks: node i holds the count of the i & -i blocks before and with block i - 1.
        counts = np.concatenate([[0], np.cumsum(marks.reshape(-1, 64 * _WORDS).sum(axis=1, dtype=np.int32))])
        nodes = np.arange(len(counts))
        self._tree = (counts - counts[nodes & (nodes - 1)]).astype(np.int32)
        # The next slot, and how many are marked.
        self._state = np.array([len(rows), len(rows)], dtype=np.int64)
        if self._slot_of is not None:
            self._slot_of[rows] = np.arange(len(rows), dtype=np.int32)


def _jit(function: Callable[..., Any]) -> Any:
    """Compile a function, once for all processes if numba finds a folder for its cache that it may write to."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)


@_jit
def _ones(word: np.uint64) -> np.int64:
    """Count the set bits of a word; compiled to one instruction if the processor has one."""
    word -= (word >> np.uint64(1)) & np.uint64(0x5555555555555555)
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@_jit
def _flip(slot: int, change: int, marks: np.ndarray, tree: np.ndarray) -> None:
    """Set (change 1) or clear (-1) the mark of a slot."""
    marks[slot >> 6] ^= np.uint64(1) << np.uint64(slot & 63)
    node = (slot >> 9) + 1
    while node < len(tree):
        tree[node] += change
        node += node & -node


@_jit
def _marked_before(slot: int, marks: np.ndarray, tree: np.ndarray) -> int:
    """Count the marked slots before a slot."""
    count = 0
    node = slot >> 9
    for word in range(node * _WORDS, slot >> 6):
        count += _ones(marks[word])
    count += _ones(marks[slot >> 6] & ((np.uint64(1) << np.uint64(slot & 63)) - np.uint64(1)))
    while node:
        count += tree[node]
        node &= node - 1
    return count


@_jit
def _marked(rank: int, marks: np.ndarray, tree: np.ndarray) -> int:
    """Return the slot whose mark has ``rank`` marks before it."""
    block, step = 0, (len(tree) - 1)  # a power of 2
    while step:
        if block + step < len(tree) and tree[block + step] <= rank:
            block += step
            rank -= tree[block]
        step >>= 1
    word = block * _WORDS
    ones = _ones(marks[word])
    while ones <= rank:
        rank -= ones
        word += 1
        ones = _ones(marks[word])
    bits, place = marks[word], 0
    for width in (32, 16, 8, 4, 2, 1):
        ones = _ones(bits & ((np.uint64(1) << np.uint64(width)) - np.uint64(1)))
        if ones <= rank:
            rank -= ones
            bits >>= np.uint64(width)
            place += width
    return word * 64 + place


@_jit
def _distances(
    ids: np.ndarray,
    found: np.ndarray,
    start: int,
    slot_of: np.ndarray,
    row_at: np.ndarray,
    marks: np.ndarray,
    tree: np.ndarray,
    state: np.ndarray,
) -> int:
    """Fill ``found`` from ``start`` on until the slots are used up; return how many items are filled."""
    slot, depth = state
    stop = min(len(ids), start + len(row_at) - slot)
    for i in range(start, stop):
        row = ids[i]
        last = slot_of[row]
        if last < 0:
            found[i] = 0
            depth += 1
        else:
            found[i] = depth - _marked_before(last, marks, tree)
            _flip(last, -1, marks, tree)
        row_at[slot] = row
        slot_of[row] = slot
        _flip(slot, 1, marks, tree)
        slot += 1
    state[0], state[1] = slot, depth
    return stop


@_jit
def _accesses(
    distances: np.ndarray,
    made: np.ndarray,
    start: int,
    row_at: np.ndarray,
    marks: np.ndarray,
    tree: np.ndarray,
    state: np.ndarray,
) -> int:
    """Fill ``made`` from ``start`` on until the slots are used up; return how many items are filled."""
    slot, depth = state
    stop = min(len(distances), start + len(row_at) - slot)
    for i in range(start, stop):
        distance = min(distances[i], depth)
        if distance == 0:
            row = depth
            depth += 1
        else:
            last = _marked(depth - distance, marks, tree)
            row = row_at[last]
            _flip(last, -1, marks, tree)
        made[i] = row
        row_at[slot] = row
        _flip(slot, 1, marks, tree)
        slot += 1
    state[0], state[1] = slot, depth
    return stop


@_jit
def _choose(bits: np.ndarray, left: int, wanted: int, chosen: np.ndarray) -> None:
    for i in range(len(bits)):
        chosen[i] = (bits[i] * np.uint64(left - i)) >> np.uint64(32) < np.uint64(wanted)
        wanted -= chosen[i]
