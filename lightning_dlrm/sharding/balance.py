"""Planner: distributes tables over ranks by their sizes and traffic, without torch.

A plan balances two quantities: bytes (parameters and optimizer state; not below ``SMALL_BYTES`` of a rank), and work,
which is the number of rows that all ranks request of one rank for a global batch. Work counts the unique rows of each
rank's slice, not of the whole batch, since a row that every slice needs is sent to every rank. Row i of a table is
drawn in proportion to (i + 1)^-skew (Zipf's law), so a piece at the head of a table can be small and busy, and a piece
at its tail large and idle.

If bags hold several ids, a rank may send sums instead of rows: for each bag, one sum of the rows that the rank holds.
A plan pools the tables for which sums take fewer bytes than unique rows. The balance counts rows even for these: the
number of sums depends on how many ranks share a table, which is known only after the table is cut.

If the tables do not all fit on one device, ``place_tables`` chooses those that stay in host memory.
"""

import heapq
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.terminal import counted
from lightning_dlrm.sharding.costs import TableLoad, UniqueRows, format_bytes, pooled_tables, table_costs
from lightning_dlrm.sharding.plan import Piece, Plan

_CHUNKS_PER_RANK = (1, 2, 4, 8)
_GOOD_IMBALANCE = 1.1
MOST_RANKS = 4096
"""A plan for more would take longer than 10 s."""
SMALL_BYTES = 1 << 20
"""If a rank's fair share of the bytes is less than this, they are not balanced: only work is, in fewer pieces."""
# A rank with this many times its fair load gets no more while other ranks have less.
_FULL = 1.02
# The smallest share of a fair load that is worth cutting a piece for.
_LEAST_CUT = 0.02


def check_ranks(ranks: int, setting: str) -> None:
    """
    Args:
        ranks: number of ranks of a plan.
        setting: the option or argument that has it, for messages.

    Raises:
        UserError: a plan cannot have so many ranks.
    """
    require(1 <= ranks <= MOST_RANKS, f"{setting} is {ranks}; expected a number of ranks from 1 to {MOST_RANKS:,}")


def make_plan(
    tables: Sequence[TableLoad],
    ranks: int,
    batch_size: int,
    memory: int | Sequence[int] | None = None,
    value_bytes: int = 4,
) -> Plan:
    """Distribute tables over ranks.

    Each piece, the heaviest first, goes to the least loaded rank. The load of a rank is the larger of its bytes and
    its work, each as a share of the mean over the ranks. A piece that would overload that rank is cut to the size that
    fits. Tables start whole, and are cut in smaller pieces only if the ranks are out of balance otherwise.

    Args:
        tables: in the order of the ids of a batch.
        ranks: world size.
        batch_size: samples of a global batch.
        memory: bytes that tables and their optimizer state may take: one amount for every rank, or one for each; None
            for no limit. Tables in host memory are distributed separately, without a limit.
        value_bytes: bytes of one element of a vector or gradient that is sent.

    Raises:
        UserError: the tables do not fit; the message has the missing bytes and the remedies.
    """
    check_ranks(ranks, "ranks")
    require(batch_size >= 1, f"the global batch has {batch_size} samples; expected 1 or more")
    limits = _limits(memory, ranks)
    pieces: dict[str, list[Piece]] = {table.name: [] for table in tables}
    for on_host, room in ((False, limits), (True, [math.inf] * ranks)):
        placed = [table for table in tables if table.on_host == on_host]
        if placed:
            _check_room(placed, room)
            first = {table.name: table.start for table in placed}
            for piece in _balanced(placed, room, batch_size):
                shift = first[piece.table]
                pieces[piece.table].append(replace(piece, start=shift + piece.start, stop=shift + piece.stop))
    plan = Plan(ranks=ranks, pieces=tuple(itertools.chain(*pieces.values())))
    return replace(plan, pooled=pooled_tables(table_costs(plan, tables, batch_size, value_bytes)))


def _balanced(tables: Sequence[TableLoad], limits: Sequence[float], batch_size: int) -> list[Piece]:
    """Return the balanced pieces with the fewest cuts, or else those with the least imbalance; rows count from the
    first row of each load."""
    traffic = [UniqueRows(table, batch_size / len(limits)) for table in tables]
    best, best_imbalance = list[Piece](), math.inf
    for chunks in _CHUNKS_PER_RANK:
        pieces, imbalance = _distribute(tables, traffic, limits, chunks)
        # More pieces make more messages and smaller lookups, so they must reduce the imbalance.
        if imbalance < 0.98 * best_imbalance:
            best, best_imbalance = pieces, imbalance
        if best_imbalance <= _GOOD_IMBALANCE:
            break
    return best


def _limits(memory: int | Sequence[int] | None, ranks: int) -> list[float]:
    if memory is None:
        return [math.inf] * ranks
    limits = [memory] * ranks if isinstance(memory, int) else list(memory)
    require(
        len(limits) == ranks,
        f"memory is given for {len(limits)} ranks, but there are {ranks}: give one amount, or {ranks}",
    )
    require(min(limits) >= 0, f"memory per rank is {min(limits)} bytes; expected 0 or more")
    return [float(limit) for limit in limits]


def _check_room(tables: Sequence[TableLoad], limits: Sequence[float]) -> None:
    needed, room = sum(table.bytes for table in tables), sum(limits)
    if needed <= room:
        return
    missing, largest = needed - int(room), max(limits)
    count = math.ceil(missing / largest) if largest else 0
    more = f"{counted(count, 'more rank')} of {format_bytes(largest)}" if largest else "ranks with memory"
    # RowWiseAdagrad has one number for each row.
    stateful = any(table.bytes_per_row > table.element_bytes * (table.width + 1) for table in tables)
    less_state = "an optimizer with less state (RowWiseAdagrad), or " * stateful
    raise UserError(
        f"the tables and their optimizer state take {format_bytes(needed)}, but {counted(len(limits), 'rank')} "
        f"together {'has' if len(limits) == 1 else 'have'} {format_bytes(room)}, {format_bytes(missing)} too few: give "
        f"{more}, or {format_bytes(needed / len(limits))} on each rank, or {less_state}a smaller width"
    )


def _fair_bytes(total: int, limits: Sequence[float]) -> list[float]:
    """Split bytes equally over ranks, but give no rank more than its limit; the other ranks share the rest."""
    shares, left, open_ranks = [0.0] * len(limits), float(total), len(limits)
    for rank in sorted(range(len(limits)), key=lambda r: (limits[r], r)):
        shares[rank] = min(limits[rank], left / open_ranks)
        left -= shares[rank]
        open_ranks -= 1
    return shares


@dataclass
class _Loads:
    """Bytes and work of each rank so far, its fair share and its limit: arrays [ranks]."""

    limits: NDArray
    fair_bytes: NDArray
    fair_work: float
    bytes: NDArray
    work: NDArray

    def shares(self, size: float = 0.0, work: float = 0.0) -> NDArray:
        """Return the load of each rank after adding a piece to it: [ranks]."""
        return np.maximum((self.bytes + size) / self.fair_bytes, (self.work + work) / self.fair_work)

    def room(self, rank: int, share: float = math.inf) -> float:
        """Return the bytes that fit on a rank within its limit and a share of its fair load."""
        return min(share * self.fair_bytes[rank], self.limits[rank]) - self.bytes[rank]


def _distribute(
    tables: Sequence[TableLoad], traffic: Sequence[UniqueRows], limits: Sequence[float], chunks: int
) -> tuple[list[Piece], float]:
    """Return pieces and their imbalance; no piece has more than 1 / ``chunks`` of a rank's fair load."""
    ranks = len(limits)
    fair_bytes = [max(share, SMALL_BYTES) for share in _fair_bytes(sum(table.bytes for table in tables), limits)]
    fair_work = sum(t.below(table.rows) for t, table in zip(traffic, tables, strict=True)) / ranks
    largest_bytes, largest_work = max(fair_bytes) / chunks, max(fair_work / chunks, 1e-9)

    def weighed(i: int, start: int, stop: int) -> tuple[float, int, int, int]:
        size, work = (stop - start) * tables[i].bytes_per_row, traffic[i].between(start, stop)
        return -max(size / largest_bytes, work / largest_work), i, start, stop

    waiting = [
        weighed(i, start, stop)
        for i, (table, t) in enumerate(zip(tables, traffic, strict=True))
        for start, stop in _cut(table, t, largest_bytes, largest_work)
    ]
    heapq.heapify(waiting)
    loads = _Loads(np.array(limits), np.array(fair_bytes), max(fair_work, 1e-9), np.zeros(ranks), np.zeros(ranks))
    placed: list[tuple[int, int, int, int]] = []
    while waiting:
        _, i, start, stop = heapq.heappop(waiting)
        rank, rows = _choose_rank(loads, tables[i], traffic[i], start, stop)
        require(
            rows >= 1,
            f"the ranks' memory is full, and {(stop - start) * tables[i].bytes_per_row:,} bytes of table "
            f"{tables[i].name} fit on no rank: give each rank "
            f"{format_bytes(sum(t.bytes for t in tables) / ranks * 1.01)}, or more ranks",
        )
        if start + rows < stop:
            heapq.heappush(waiting, weighed(i, start + rows, stop))
        loads.bytes[rank] += rows * tables[i].bytes_per_row
        loads.work[rank] += traffic[i].between(start, start + rows)
        placed.append((i, start, start + rows, rank))
    return _joined(placed, tables), float(loads.shares().max())


def _choose_rank(loads: _Loads, table: TableLoad, traffic: UniqueRows, start: int, stop: int) -> tuple[int, int]:
    """Return the rank for a piece, and how many of its rows that rank takes; 0 rows if no rank has room."""
    rows = stop - start
    size, work = rows * table.bytes_per_row, traffic.between(start, stop)
    share_R = loads.shares(size, work)
    share_R[loads.bytes + size > loads.limits] = np.inf
    chosen = int(share_R.argmin())
    if share_R[chosen] > _FULL:
        emptiest = int(loads.shares().argmin())
        busy = traffic.row_after(start, _FULL * loads.fair_work - loads.work[emptiest]) - start
        fitting = min(int(loads.room(emptiest, _FULL) // table.bytes_per_row), busy)
        if 1 <= fitting < rows:
            part_bytes = fitting * table.bytes_per_row / loads.fair_bytes.max()
            if max(part_bytes, traffic.between(start, start + fitting) / loads.fair_work) >= _LEAST_CUT:
                return emptiest, fitting
    if share_R[chosen] == np.inf:
        chosen = int((loads.limits - loads.bytes).argmax())
        rows = int(loads.room(chosen) // table.bytes_per_row)
    return chosen, rows


def _cut(table: TableLoad, traffic: UniqueRows, most_bytes: float, most_work: float) -> Iterable[tuple[int, int]]:
    """Yield row ranges of about equal weight, none above either limit."""
    start = 0
    while start < table.rows:
        left_bytes = (table.rows - start) * table.bytes_per_row
        left_work = traffic.between(start, table.rows)
        # Equal parts of the remaining rows, so that the last range is not tiny.
        parts_bytes, parts_work = math.ceil(left_bytes / most_bytes), math.ceil(left_work / most_work - 1e-9)
        rows = math.ceil((table.rows - start) / max(parts_bytes, 1))
        stop = min(start + rows, traffic.row_after(start, left_work / max(parts_work, 1)), table.rows)
        if max(parts_bytes, parts_work) <= 1:
            stop = table.rows
        yield start, stop
        start = stop


def _joined(placed: Iterable[tuple[int, int, int, int]], tables: Sequence[TableLoad]) -> list[Piece]:
    """Return pieces by ascending rows; neighbours on one rank become one piece."""
    pieces: list[Piece] = []
    for i, start, stop, rank in sorted(placed):
        name = tables[i].name
        if pieces and (pieces[-1].table, pieces[-1].stop, pieces[-1].rank) == (name, start, rank):
            start = pieces.pop().start
        pieces.append(Piece(table=name, start=start, stop=stop, rank=rank))
    return pieces


_CACHED_BATCHES = 3


_BALANCED = 0.95
"""Share of the devices' memory that a plan of several fills before one of them is full."""


@dataclass(frozen=True, kw_only=True)
class HostPlacement:
    """Tables on the device, and tables in host memory."""

    on_host: tuple[str, ...]
    """Names of the tables in host memory."""
    cut: Mapping[str, int]
    """Name of a table in ``on_host`` -> number of its first rows that are on the device."""
    device_bytes: int
    """Bytes on the device: tables with their optimizer state, and the cached rows."""
    cached_bytes: int
    """Bytes of cached rows: those of three batches, which are fetched, used and written back."""
    host_bytes: int
    fetched: Mapping[str, float]
    """Table in host memory -> expected unique rows of a batch, which each step fetches and writes back."""
    served: Mapping[str, float]
    """Table in host memory -> expected share of its lookups that read rows on the device."""
    bus_bytes: float
    """Bytes that a step moves to the device; as many move back."""


class _Offload:
    """Arithmetic on tables of which some are in host memory."""

    def __init__(self, tables: Sequence[TableLoad], batch_size: int) -> None:
        self.tables = {table.name: table for table in tables}
        self.traffic = {table.name: UniqueRows(table, batch_size) for table in tables}
        self.first: dict[str, int] = {}
        """Name of a table in host memory -> number of its first rows that are on the device."""

    def fetched(self, name: str) -> float:
        """Return the expected rows of a batch that are fetched from host memory."""
        return self.traffic[name].between(self.first.get(name, 0), self.tables[name].rows)

    def fetched_bytes(self, name: str) -> float:
        return self.fetched(name) * self.tables[name].bytes_per_row

    def first_bytes(self, host: Iterable[str]) -> int:
        return sum(self.first.get(name, 0) * self.tables[name].bytes_per_row for name in host)

    def cached(self, host: Iterable[str]) -> int:
        """Return the bytes of cached rows if these tables are in host memory."""
        return _CACHED_BATCHES * sum(math.ceil(self.fetched_bytes(name)) for name in host)

    def on_device(self, host: set[str]) -> int:
        """Return the bytes on the device if these tables are in host memory."""
        whole = sum(table.bytes for name, table in self.tables.items() if name not in host)
        return whole + self.first_bytes(host) + self.cached(host)

    def choose(self, movable: Iterable[str], memory: int) -> set[str]:
        """Return the names of the tables to keep in host memory."""
        host: set[str] = set()
        idlest = sorted(movable, key=lambda name: (self.fetched(name) / self.tables[name].bytes, name))
        for name in idlest:
            if self.on_device(host) <= memory:
                break
            # If most rows of a table are cached anyway, the whole table takes less memory.
            if self.on_device(host | {name}) < self.on_device(host):
                host.add(name)
        for name in reversed(idlest):
            if name in host and self.on_device(host - {name}) <= memory:
                host.remove(name)
        return host


def place_tables(
    tables: Sequence[TableLoad], movable: Iterable[str], batch_size: int, device_memory: int, devices: int = 1
) -> HostPlacement:
    """Choose which tables stay in host memory.

    Tables move to the host by ascending number of rows that a batch needs for each byte of the table. Tables that fit
    on the device afterwards move back. The memory that then remains is given in equal parts to the first rows of the
    tables in host memory, which are expected to be the busiest rows.

    Args:
        tables: tables of the network.
        movable: names of the tables that may stay in host memory.
        batch_size: samples of a batch.
        device_memory: bytes that tables, their optimizer state and the cached rows may take on a device.
        devices: number of devices that share the tables; with several, 95% of their memory are planned, because no
            plan fills all of them to the last byte.

    Raises:
        UserError: the devices have too little memory; the message has the missing bytes.
    """
    total = device_memory * devices
    memory = total if devices == 1 else int(total * _BALANCED)
    offload = _Offload(tables, batch_size)
    host = offload.choose(set(movable), memory)
    device_bytes = offload.on_device(host)
    missing = device_bytes - memory
    require(
        missing <= 0,
        f"the tables and cached rows on the device take {format_bytes(device_bytes)}, but "
        f"{'the device has' if devices == 1 else f'the {devices} devices have'} {format_bytes(total)}"
        f"{'' if devices == 1 else f', of which {_BALANCED:.0%} are planned, {format_bytes(memory)}'}: "
        f"{format_bytes(missing)} too few; "
        f"{format_bytes(offload.cached(host))} are for the cached rows of three batches: give more memory, a smaller "
        "batch or a smaller width",
    )
    # Tables that share a column stay whole: an id reads a row of each of them.
    cuttable = [table for table in tables if table.name in host and "/" not in table.name]
    # No table fits with all of its rows, or it would have moved back.
    cut = {table.name: -missing // len(cuttable) // table.bytes_per_row for table in cuttable}
    offload.first = {name: first for name, first in cut.items() if first}
    return HostPlacement(
        on_host=tuple(table.name for table in tables if table.name in host),
        cut=offload.first,
        device_bytes=offload.on_device(host),
        cached_bytes=offload.cached(host),
        host_bytes=sum(offload.tables[name].bytes for name in host) - offload.first_bytes(host),
        fetched={table.name: offload.fetched(table.name) for table in tables if table.name in host},
        served={
            t.name: offload.traffic[t.name].share(0, offload.first.get(t.name, 0)) for t in tables if t.name in host
        },
        bus_bytes=sum(map(offload.fetched_bytes, host)),
    )
