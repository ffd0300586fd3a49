"""Which rank holds which rows: arithmetic on the tables' sizes and their traffic, nothing else.

A plan cuts every table into pieces, ranges of rows, and gives each piece to a rank; a whole table
is one piece. It balances two things at once: bytes (weights and optimiser state), and work, the
rows that all ranks ask of one rank for a global batch: of each rank's slice the expected distinct
rows. (Those of the whole batch would pass over what the exchange costs: the rows that every slice
needs travel to every rank.) A table's row i is expected to be drawn in proportion to
(i + 1)^-skew (Zipf's law), so that a piece at the head of a table can be small and busy, and one at
its tail large and idle.

Where bags hold several ids, a rank may send sums in place of rows: of each bag, one for each rank
that holds some of its rows. A plan names the tables that are pooled so: those for which sums are
fewer bytes than distinct rows. It is balanced by rows all the same: a table's sums are more, the more
ranks share it, so that what they come to is known only once the table is cut.
"""

import bisect
import heapq
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from lightning_dlrm.contracts.errors import UserError

ID_BYTES = 4
"""Of a row id on the wire."""
FACTOR_BYTES = 4
"""Of an index's factor on the wire."""

_CHUNKS_PER_RANK = (1, 2, 4, 8)
_GOOD_IMBALANCE = 1.1
# A rank with this many times its fair load gets no more, as long as others have less.
_FULL = 1.02
# The smallest share of a fair load that is worth cutting a piece for.
_LEAST_CUT = 0.02


@dataclass(frozen=True, kw_only=True)
class TableLoad:
    """What a table asks of the ranks that hold it."""

    name: str
    rows: int
    width: int
    """D, elements of a row's vector."""
    bytes_per_row: int
    """Weights and optimiser state."""
    indices_per_sample: float = 1.0
    """Mean number of rows that a sample looks up."""
    factors: bool = False
    """Whether each index has a factor in its bag's sum."""
    may_pool: bool = True
    """Whether a bag's rows may be summed where they are: see EmbeddingLookup.may_pool."""
    on_host: bool = False
    """Whether its rows stay in host memory, whatever the device."""
    skew: float = 1.0
    """Exponent of Zipf's law; 0 where all rows are drawn alike."""
    counts: NDArray | None = field(default=None, compare=False, repr=False)
    """[rows]: how often each row is looked up, where that was counted; then ``skew`` is of no effect."""

    def __post_init__(self) -> None:
        if self.rows < 1 or self.width < 1 or self.bytes_per_row < 1:
            raise UserError(f"table {self.name}: {self.rows} rows of width {self.width}; expected 1 or more of each")
        if not (self.skew >= 0 and self.indices_per_sample >= 0):
            raise UserError(
                f"table {self.name}: skew {self.skew} and {self.indices_per_sample} indices a sample; "
                "expected numbers of 0 or more"
            )

    @property
    def bytes(self) -> int:
        return self.rows * self.bytes_per_row


class DistinctRows:
    """Expected distinct rows among draws from a table, for any range of its rows.

    Row i is missed by n draws with probability exp(-n p_i). The first rows are summed one by one,
    the others in blocks that grow by a few percent, each row taken as the block's middle one unless
    rows were counted.
    """

    def __init__(self, table: TableLoad, samples: float) -> None:
        edges = list(range(min(64, table.rows) + 1))
        while edges[-1] < table.rows:
            edges.append(min(table.rows, edges[-1] + max(1, edges[-1] // 32)))
        middles = [(a + b + 1) / 2 for a, b in itertools.pairwise(edges)]
        shares = [middle**-table.skew for middle in middles]
        sizes = [b - a for a, b in itertools.pairwise(edges)]
        total = math.fsum(size * share for size, share in zip(sizes, shares, strict=True))
        draws = samples * table.indices_per_sample
        if table.counts is not None:
            lookups = max(int(table.counts.sum()), 1)
            missed = np.expm1(table.counts * (-draws / lookups))
            found = (-np.add.reduceat(missed, edges[:-1])).tolist()
            drawn = (np.add.reduceat(table.counts, edges[:-1]) / lookups).tolist()
        else:
            found = [-size * math.expm1(-draws * share / total) for size, share in zip(sizes, shares, strict=True)]
            drawn = [size * share / total for size, share in zip(sizes, shares, strict=True)]
        self._edges = edges
        self._below = [0.0, *itertools.accumulate(found)]
        self._share_below = [0.0, *itertools.accumulate(drawn)]

    def below(self, row: int) -> float:
        """Among the rows 0 to ``row`` - 1."""
        return self._at(self._below, row)

    def between(self, start: int, stop: int) -> float:
        return self.below(stop) - self.below(start)

    def share(self, start: int, stop: int) -> float:
        """Of the draws, those from the rows ``start`` to ``stop`` - 1."""
        return self._at(self._share_below, stop) - self._at(self._share_below, start)

    def _at(self, sums: Sequence[float], row: int) -> float:
        i = min(bisect.bisect_right(self._edges, row) - 1, len(self._edges) - 2)
        a, b = self._edges[i], self._edges[i + 1]
        return sums[i] + (sums[i + 1] - sums[i]) * (row - a) / (b - a)

    def row_after(self, start: int, count: float) -> int:
        """The last row with at most ``count`` distinct ones between ``start`` and it; at least one row on."""
        goal = self.below(start) + count
        i = bisect.bisect_right(self._below, goal) - 1
        if i >= len(self._edges) - 1:
            return self._edges[-1]
        step = self._below[i + 1] - self._below[i]
        inside = int((goal - self._below[i]) / step * (self._edges[i + 1] - self._edges[i])) if step > 0 else 0
        return max(start + 1, self._edges[i] + inside)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The rows ``start`` to ``stop`` - 1 of a table, and the rank that holds them."""

    table: str
    start: int
    stop: int
    rank: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where every row of every table is.

    Raises:
        UserError: a rank out of range, pieces that do not follow each other, or a pooled table that is none.
    """

    ranks: int
    pieces: tuple[Piece, ...]
    """Table by table, each by ascending rows."""
    pooled: tuple[str, ...] = ()
    """Tables of which ranks send sums of a bag's rows in place of rows."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.pooled if name not in self.tables]:
            raise UserError(f"plan: pooled names {unknown[0]}, of which it has no pieces; give names of its tables")
        for name, pieces in self.tables.items():
            expected = 0
            for piece in pieces:
                if not 0 <= piece.rank < self.ranks:
                    raise UserError(f"plan: table {name} has a piece on rank {piece.rank}, but ranks are {self.ranks}")
                if piece.start != expected or piece.stop <= piece.start:
                    raise UserError(
                        f"plan: table {name} has a piece of rows {piece.start} to {piece.stop} where one from row "
                        f"{expected} on was expected; pieces follow each other without a gap"
                    )
                expected = piece.stop

    @cached_property
    def tables(self) -> Mapping[str, tuple[Piece, ...]]:
        """The pieces of each table, by ascending rows."""
        found: dict[str, list[Piece]] = {}
        for piece in self.pieces:
            found.setdefault(piece.table, []).append(piece)
        return {name: tuple(pieces) for name, pieces in found.items()}

    def check(self, table_rows: Mapping[str, int], ranks: int, unpoolable: Iterable[str] = ()) -> None:
        """Compares a plan that was written down with the model and the ranks at hand.

        Args:
            table_rows: of the model.
            ranks: at hand.
            unpoolable: tables that cannot be pooled: see EmbeddingLookup.may_pool.

        Raises:
            UserError: they differ.
        """
        if wrong := sorted(set(self.pooled) & set(unpoolable)):
            raise UserError(
                f"the plan has table {wrong[0]} among its pooled ones, but the model has factors of its own for the "
                "rows (tables.pooling_weights): make a plan with this model, or take the table out of pooled"
            )
        if ranks != self.ranks:
            raise UserError(f"the plan is for {self.ranks} ranks, this run has {ranks}: make a plan for {ranks}")
        planned = {name: pieces[-1].stop for name, pieces in self.tables.items()}
        for name in sorted(planned.keys() | table_rows.keys()):
            if planned.get(name) != table_rows.get(name):
                raise UserError(
                    f"the plan has {planned.get(name, 'no')} rows for table {name}, the model has "
                    f"{table_rows.get(name, 'no such table')}: make a plan with this model and dataset"
                )

    def document(self) -> dict[str, Any]:
        """As YAML and JSON keep it: per table a list of [first row, row after the last, rank]."""
        return {
            "ranks": self.ranks,
            "pooled": list(self.pooled),
            "tables": {name: [[p.start, p.stop, p.rank] for p in pieces] for name, pieces in self.tables.items()},
        }

    @staticmethod
    def of_document(document: Any) -> "Plan":
        """Takes what ``document`` gave.

        Raises:
            UserError: it is no such thing.
        """
        try:
            pieces = [
                Piece(table=str(name), start=int(start), stop=int(stop), rank=int(rank))
                for name, rows in document["tables"].items()
                for start, stop, rank in rows
            ]
            ranks = int(document["ranks"])
            pooled = tuple(str(name) for name in document.get("pooled", ()))
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise UserError(
                f"the plan is not of the form 'ranks: 2, tables: {{C1: [[0, 100, 1]]}}' ({error!r}); "
                "make one with 'python -m lightning_dlrm plan --output FILE'"
            ) from error
        return Plan(ranks=ranks, pieces=tuple(pieces), pooled=pooled)


def read_plan(path: Path) -> Plan:
    """A plan that was written down.

    Raises:
        UserError: there is no such file, or it holds no plan.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read the plan {path}: {error.strerror}; make one with 'python -m lightning_dlrm plan'"
        ) from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"the plan {path} is not YAML: {' '.join(str(error).split())}; make it again") from error
    return Plan.of_document(document)


def make_plan(
    tables: Sequence[TableLoad],
    ranks: int,
    batch_size: int,
    memory: int | Sequence[int] | None = None,
    value_bytes: int = 4,
) -> Plan:
    """Spreads tables over ranks.

    Each piece, the heaviest first, goes to the rank that is then the least loaded, in bytes or in
    work, whichever is the greater share of what is fair; where it would overfill that rank, it is
    cut to fill what room there is. It starts from whole tables, and cuts finer only where that
    leaves ranks out of balance.

    Args:
        tables: in the order of the ids of a batch.
        ranks: how many.
        batch_size: samples of a global batch.
        memory: bytes that the tables and their optimiser state may take, on every rank or on each;
            None where that is no limit. Tables in host memory are spread by themselves, and have no limit.
        value_bytes: of one element on the wire.

    Raises:
        UserError: the tables do not fit; it says by how many bytes, and what would help.
    """
    if ranks < 1 or batch_size < 1:
        raise UserError(f"a plan needs 1 rank or more and a batch of 1 or more; got {ranks} and {batch_size}")
    refuse_cut_tables(tables)
    limits = _limits(memory, ranks)
    pieces: dict[str, list[Piece]] = {table.name: [] for table in tables}
    for on_host, room in ((False, limits), (True, [math.inf] * ranks)):
        placed = [table for table in tables if table.on_host == on_host]
        if placed:
            _check_room(placed, room)
            for piece in _balanced(placed, room, batch_size).pieces:
                pieces[piece.table].append(piece)
    plan = Plan(ranks=ranks, pieces=tuple(itertools.chain(*pieces.values())))
    return replace(plan, pooled=_worth_pooling(table_costs(plan, tables, batch_size, value_bytes)))


def refuse_cut_tables(tables: Sequence[TableLoad]) -> None:
    """
    Raises:
        UserError: a table is there twice: in part on the device, in part in host memory.
    """
    names = [table.name for table in tables]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"tables.on_host cuts table {twice[0]} between the device and host memory, which is for one device; "
            "several ranks keep a table in one or the other: give on_host a list of columns"
        )


def _balanced(tables: Sequence[TableLoad], limits: Sequence[float], batch_size: int) -> Plan:
    """Of the coarsest cut that leaves the ranks in balance, if there is one."""
    traffic = [DistinctRows(table, batch_size / len(limits)) for table in tables]
    best, best_imbalance = None, math.inf
    for chunks in _CHUNKS_PER_RANK:
        plan, imbalance = _spread(tables, traffic, limits, chunks)
        # A finer cut has to earn its pieces.
        if imbalance < 0.98 * best_imbalance:
            best, best_imbalance = plan, imbalance
        if best_imbalance <= _GOOD_IMBALANCE:
            break
    assert best is not None
    return best


def _limits(memory: int | Sequence[int] | None, ranks: int) -> list[float]:
    if memory is None:
        return [math.inf] * ranks
    limits = [memory] * ranks if isinstance(memory, int) else list(memory)
    if len(limits) != ranks:
        raise UserError(f"memory is given for {len(limits)} ranks, but there are {ranks}: give one figure, or {ranks}")
    if min(limits) < 0:
        raise UserError(f"memory per rank is {min(limits)} bytes; expected 0 or more")
    return [float(limit) for limit in limits]


def _check_room(tables: Sequence[TableLoad], limits: Sequence[float]) -> None:
    needed, room = sum(table.bytes for table in tables), sum(limits)
    if needed <= room:
        return
    largest = max(limits)
    more = f"{math.ceil((needed - room) / largest)} more ranks of {_human(largest)}" if largest else "ranks with memory"
    raise UserError(
        f"the tables and their optimiser state take {needed:,} bytes ({_human(needed)}), the {len(limits)} ranks have "
        f"{int(room):,}: {needed - int(room):,} bytes ({_human(needed - room)}) too few; {more} would hold them, or "
        f"{_human(needed / len(limits))} on each rank, or a rule with less state (RowWiseAdagrad), or a smaller width"
    )


def _fair_bytes(total: int, limits: Sequence[float]) -> list[float]:
    """Equal shares, but no more than a rank can hold: what it cannot, the others share."""
    shares, left, open_ranks = [0.0] * len(limits), float(total), len(limits)
    for rank in sorted(range(len(limits)), key=lambda r: (limits[r], r)):
        shares[rank] = min(limits[rank], left / open_ranks)
        left -= shares[rank]
        open_ranks -= 1
    return shares


def _spread(
    tables: Sequence[TableLoad], traffic: Sequence[DistinctRows], limits: Sequence[float], chunks: int
) -> tuple[Plan, float]:
    """A plan of pieces of at most a share 1 / ``chunks`` of a rank's fair load, and its imbalance."""
    ranks = len(limits)
    fair_bytes = _fair_bytes(sum(table.bytes for table in tables), limits)
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
    limit_R = np.array(limits)
    fair_bytes_R, fair_work_rank = np.maximum(fair_bytes, 1e-9), max(fair_work, 1e-9)
    bytes_R, work_R = np.zeros(ranks), np.zeros(ranks)
    placed: list[tuple[int, int, int, int]] = []
    while waiting:
        _, i, start, stop = heapq.heappop(waiting)
        table, rows = tables[i], stop - start
        size, work = rows * table.bytes_per_row, traffic[i].between(start, stop)
        share_R = np.maximum((bytes_R + size) / fair_bytes_R, (work_R + work) / fair_work_rank)
        share_R[bytes_R + size > limit_R] = np.inf
        chosen = int(share_R.argmin())
        if share_R[chosen] > _FULL:
            emptiest = int(np.maximum(bytes_R / fair_bytes_R, work_R / fair_work_rank).argmin())
            room = int(
                (min(_FULL * fair_bytes_R[emptiest], limit_R[emptiest]) - bytes_R[emptiest]) // table.bytes_per_row
            )
            busy = traffic[i].row_after(start, _FULL * fair_work_rank - work_R[emptiest]) - start
            fitting = min(room, busy)
            if 1 <= fitting < rows:
                part = (
                    fitting * table.bytes_per_row / max(fair_bytes),
                    traffic[i].between(start, start + fitting) / fair_work_rank,
                )
                if max(part) >= _LEAST_CUT:
                    chosen, rows = emptiest, fitting
        if share_R[chosen] == np.inf and rows == stop - start:
            chosen = int((limit_R - bytes_R).argmax())
            rows = int((limit_R[chosen] - bytes_R[chosen]) // table.bytes_per_row)
            if rows < 1:
                raise UserError(
                    f"the ranks' memory is full, with {size:,} bytes of table {table.name} left over that fit into no "
                    f"rank: give each rank {_human(sum(t.bytes for t in tables) / ranks * 1.01)}, or more ranks"
                )
        if start + rows < stop:
            heapq.heappush(waiting, weighed(i, start + rows, stop))
        bytes_R[chosen] += rows * table.bytes_per_row
        work_R[chosen] += traffic[i].between(start, start + rows)
        placed.append((i, start, start + rows, chosen))
    imbalance = float(np.maximum(bytes_R / fair_bytes_R, work_R / fair_work_rank).max())
    return Plan(ranks=ranks, pieces=tuple(_joined(placed, tables))), imbalance


def _cut(table: TableLoad, traffic: DistinctRows, most_bytes: float, most_work: float) -> Iterable[tuple[int, int]]:
    """Row ranges of about equal weight, none above either limit; one where the table is small enough."""
    start = 0
    while start < table.rows:
        left_bytes = (table.rows - start) * table.bytes_per_row
        left_work = traffic.between(start, table.rows)
        # Equal parts of what is left, so that no sliver remains.
        parts_bytes, parts_work = math.ceil(left_bytes / most_bytes), math.ceil(left_work / most_work - 1e-9)
        rows = math.ceil((table.rows - start) / max(parts_bytes, 1))
        stop = min(start + rows, traffic.row_after(start, left_work / max(parts_work, 1)), table.rows)
        if max(parts_bytes, parts_work) <= 1:
            stop = table.rows
        yield start, stop
        start = stop


def _joined(placed: Iterable[tuple[int, int, int, int]], tables: Sequence[TableLoad]) -> list[Piece]:
    """Pieces in order; neighbours on one rank are one piece."""
    pieces: list[Piece] = []
    for i, start, stop, rank in sorted(placed):
        name = tables[i].name
        if pieces and (pieces[-1].table, pieces[-1].stop, pieces[-1].rank) == (name, start, rank):
            start = pieces.pop().start
        pieces.append(Piece(table=name, start=start, stop=stop, rank=rank))
    return pieces


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What one rank's slice of a batch is expected to need of a table's rows on one rank."""

    ids: float
    """Rows that it names: distinct ones, or where bags are summed there, those of all indices."""
    vectors: float
    """That it gets, and gradients that it sends: of these rows, or of these sums."""


def _asked(table: TableLoad, pieces: Iterable[Piece], traffic: DistinctRows, samples: float, pooled: bool) -> Asked:
    """Of the pieces that one rank has."""
    if not pooled:
        rows = math.fsum(traffic.between(piece.start, piece.stop) for piece in pieces)
        return Asked(ids=rows, vectors=rows)
    share = min(math.fsum(traffic.share(piece.start, piece.stop) for piece in pieces), 1.0)
    indices = table.indices_per_sample
    # Of bags with as many ids each; where they differ, fewer have some of these rows.
    touched = min(1 - (1 - share) ** indices, indices * share)
    return Asked(ids=samples * indices * share, vectors=samples * touched)


@dataclass(frozen=True, kw_only=True)
class RankCost:
    """What a plan asks of one rank; bytes sent are those of one training step."""

    rank: int
    pieces: int = 0
    rows: int = 0
    bytes: int = 0
    """Weights and optimiser state."""
    host_bytes: int = 0
    """Of them, those of tables in host memory."""
    work: float = 0.0
    """Rows that all ranks ask of this one for a global batch, distinct ones of each rank's slice; of a pooled table,
    sums."""
    sent_ids: float = 0.0
    """Bytes: ids of rows of others that this rank's samples need, with their factors where these sum them."""
    sent_vectors: float = 0.0
    """Bytes: rows held here that samples of others need, or sums of them."""
    sent_gradients: float = 0.0
    """Bytes: gradients of the rows of others, or of their sums."""
    bytes_of_table: Mapping[str, int] = field(default_factory=dict)


def rank_costs(plan: Plan, tables: Sequence[TableLoad], batch_size: int, value_bytes: int = 4) -> list[RankCost]:
    """What a plan asks of each rank, every rank having an equal slice of the batch.

    Args:
        plan: of these tables.
        tables: as for ``make_plan``.
        batch_size: samples of a global batch.
        value_bytes: of one element on the wire.
    """
    totals: list[dict[str, Any]] = [
        {"pieces": 0, "rows": 0, "bytes": 0, "host": 0, "work": 0.0, "of": {}} for _ in range(plan.ranks)
    ]
    sent_KR = np.zeros((3, plan.ranks))
    for table in tables:
        pooled = table.name in plan.pooled
        asked = _asked_of_ranks(plan, table, batch_size, pooled)
        sent_KR += _sent(table, asked, plan.ranks, value_bytes, pooled)
        for rank, pieces in _by_rank(plan.tables[table.name]).items():
            total, rows = totals[rank], sum(piece.rows for piece in pieces)
            total["pieces"] += len(pieces)
            total["rows"] += rows
            total["bytes"] += rows * table.bytes_per_row
            total["host"] += rows * table.bytes_per_row * table.on_host
            total["work"] += asked[rank].vectors * plan.ranks
            total["of"][table.name] = rows * table.bytes_per_row
    return [
        RankCost(
            rank=rank,
            pieces=total["pieces"],
            rows=total["rows"],
            bytes=total["bytes"],
            host_bytes=total["host"],
            work=total["work"],
            sent_ids=float(sent_KR[0, rank]),
            sent_vectors=float(sent_KR[1, rank]),
            sent_gradients=float(sent_KR[2, rank]),
            bytes_of_table=total["of"],
        )
        for rank, total in enumerate(totals)
    ]


@dataclass(frozen=True, kw_only=True)
class TableCost:
    """What one table's exchanges of a training step move from rank to rank: ids, vectors and gradients."""

    name: str
    sent_rows: NDArray
    """[ranks]: bytes that each rank sends where distinct rows travel."""
    sent_sums: NDArray
    """[ranks]: likewise, where sums do; infinite where the bags cannot be summed where the rows are."""


def table_costs(plan: Plan, tables: Sequence[TableLoad], batch_size: int, value_bytes: int = 4) -> list[TableCost]:
    """Of each table both ways, whichever the plan has chosen; for the arguments see ``rank_costs``."""

    def sent(table: TableLoad, pooled: bool) -> NDArray:
        asked = _asked_of_ranks(plan, table, batch_size, pooled)
        return _sent(table, asked, plan.ranks, value_bytes, pooled).sum(0)

    nowhere = np.full(plan.ranks, np.inf)
    return [
        TableCost(
            name=table.name,
            sent_rows=sent(table, False),
            sent_sums=sent(table, True) if table.may_pool else nowhere,
        )
        for table in tables
    ]


def _worth_pooling(costs: Sequence[TableCost]) -> tuple[str, ...]:
    """The tables of which sums are fewer bytes than rows; none that would have the busiest rank send more."""
    sent_R = np.sum([cost.sent_rows for cost in costs], axis=0)
    chosen = set()
    for cost in sorted(costs, key=lambda cost: (cost.sent_sums.sum() - cost.sent_rows.sum(), cost.name)):
        changed_R = sent_R - cost.sent_rows + cost.sent_sums
        if cost.sent_sums.sum() < cost.sent_rows.sum() and changed_R.max() <= sent_R.max():
            chosen.add(cost.name)
            sent_R = changed_R
    return tuple(cost.name for cost in costs if cost.name in chosen)


def _asked_of_ranks(plan: Plan, table: TableLoad, batch_size: int, pooled: bool) -> dict[int, Asked]:
    samples = batch_size / plan.ranks
    traffic = DistinctRows(table, samples)
    return {
        rank: _asked(table, pieces, traffic, samples, pooled)
        for rank, pieces in _by_rank(plan.tables[table.name]).items()
    }


def _sent(table: TableLoad, asked: Mapping[int, Asked], ranks: int, value_bytes: int, pooled: bool) -> NDArray:
    """[3, ranks]: bytes of ids, vectors and gradients that each rank sends to others."""
    here_IR = np.zeros((2, ranks))
    for rank, of_rank in asked.items():
        id_bytes = ID_BYTES + (FACTOR_BYTES if pooled and table.factors else 0)
        here_IR[:, rank] = of_rank.ids * id_bytes, of_rank.vectors * table.width * value_bytes
    ids_R, values_R = here_IR
    # A rank asks all others, and is asked by them.
    return np.stack([ids_R.sum() - ids_R, values_R * (ranks - 1), values_R.sum() - values_R])


def _by_rank(pieces: Iterable[Piece]) -> dict[int, list[Piece]]:
    found: dict[int, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.rank, []).append(piece)
    return found


@dataclass(frozen=True, kw_only=True)
class Places:
    """Which tables one device holds, and which stay in host memory."""

    on_host: tuple[str, ...]
    """Names of tables."""
    cut: Mapping[str, int]
    """Of them, those of which the device holds the first rows, and how many."""
    device_bytes: int
    """Tables on the device with their optimiser state, and room for the rows at hand of the others."""
    at_hand_bytes: int
    """That room: the rows of three batches, those fetched, in use, and on their way back."""
    host_bytes: int
    fetched: Mapping[str, float]
    """Table in host memory -> distinct rows of a batch, which are fetched and written back at each step."""
    bus_bytes: float
    """That a step moves to the device, and as many back."""


_BATCHES_AT_HAND = 3


def place_tables(tables: Sequence[TableLoad], movable: Iterable[str], batch_size: int, memory: int) -> Places:
    """Chooses which tables stay in host memory where one device has no room for all.

    Those of which a batch needs the fewest rows for the memory that they take go first; what room is
    left at the end is given back to those that fit, and then in equal parts to the first rows of those
    that do not, which are expected to be the busiest.

    Args:
        tables: of the network.
        movable: names of those that may stay in host memory.
        batch_size: samples of a batch.
        memory: bytes that tables, their optimiser state and the rows at hand may take on the device.

    Raises:
        UserError: there is not enough of it; it says by how many bytes.
    """
    movable = set(movable)
    traffic = {table.name: DistinctRows(table, batch_size) for table in tables}
    rows = {table.name: traffic[table.name].below(table.rows) for table in tables}
    of_name = {table.name: table for table in tables}

    def needed(host: set[str]) -> tuple[int, int]:
        at_hand = _BATCHES_AT_HAND * sum(math.ceil(rows[name] * of_name[name].bytes_per_row) for name in host)
        return sum(table.bytes for table in tables if table.name not in host) + at_hand, at_hand

    host: set[str] = set()
    idlest = sorted(movable, key=lambda name: (rows[name] / of_name[name].bytes, name))
    for name in idlest:
        if needed(host)[0] <= memory:
            break
        # A table of which most rows are at hand anyway is better off on the device.
        if needed(host | {name})[0] < needed(host)[0]:
            host.add(name)
    for name in reversed(idlest):
        if name in host and needed(host - {name})[0] <= memory:
            host.remove(name)
    device_bytes, at_hand = needed(host)
    missing = device_bytes - memory
    if missing > 0:
        raise UserError(
            f"what cannot stay in host memory takes {device_bytes:,} bytes ({_human(device_bytes)}), the device has "
            f"{memory:,}: {missing:,} bytes ({_human(missing)}) too few; {_human(at_hand)} are "
            "for the rows of three batches at hand: a smaller batch, or a smaller width, needs less"
        )
    # A column's table among several is whole: an id reads a row of each.
    cuttable = [table for table in tables if table.name in host and "/" not in table.name]
    # None of them has room for all of its rows.
    cut = {table.name: -missing // len(cuttable) // table.bytes_per_row for table in cuttable}
    cut = {name: first for name, first in cut.items() if first}
    for name, first in cut.items():
        rows[name] -= traffic[name].below(first)
    device_bytes, at_hand = needed(host)
    device_bytes += sum(first * of_name[name].bytes_per_row for name, first in cut.items())
    return Places(
        on_host=tuple(table.name for table in tables if table.name in host),
        cut=cut,
        device_bytes=device_bytes,
        at_hand_bytes=at_hand,
        host_bytes=sum(of_name[name].bytes - cut.get(name, 0) * of_name[name].bytes_per_row for name in host),
        fetched={table.name: rows[table.name] for table in tables if table.name in host},
        bus_bytes=sum(rows[name] * of_name[name].bytes_per_row for name in host),
    )


def imbalance(values: Sequence[float]) -> float:
    """The largest value divided by the mean; 1 where all are alike or zero."""
    mean = sum(values) / len(values)
    return max(values) / mean if mean else 1.0


def parse_bytes(text: str) -> int:
    """Bytes from ``80GiB``, ``512 MB`` or a plain number.

    Raises:
        UserError: it is none of them.

    >>> parse_bytes("1.5GiB"), parse_bytes("2 GB"), parse_bytes("100")
    (1610612736, 2000000000, 100)
    """
    units = {"": 1, "b": 1}
    for power, letter in enumerate("kmgt", start=1):
        units |= {f"{letter}b": 1000**power, f"{letter}ib": 1024**power}
    compact = text.strip().lower().replace(" ", "")
    number = compact.rstrip("bikmgt")
    try:
        value = float(number) * units[compact[len(number) :]]
    except (ValueError, KeyError) as error:
        raise UserError(f"{text!r} is no amount of memory; expected such as 80GiB, 512MB or 1000000") from error
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"{text!r} is no amount of memory; expected 0 or more")
    return int(value)


def parse_memory(text: str) -> int | list[int]:
    """Memory per rank: one amount for all, or one for each, separated by commas."""
    amounts = [parse_bytes(part) for part in text.split(",")]
    return amounts[0] if len(amounts) == 1 else amounts


def _human(amount: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.4g} {unit}"
        amount /= 1024
    return f"{amount:.4g} TiB"
