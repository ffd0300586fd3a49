"""Sizes and traffic of tables, and costs of a plan for each rank: memory, requested rows, bytes sent in a step."""

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.sharding.plan import Piece, Plan


@dataclass(frozen=True, kw_only=True)
class TableLoad:
    """Size and traffic of one embedding table, or of a range of its rows."""

    name: str
    rows: int
    start: int = 0
    """The first of these rows in the table; more than 0 if a table's earlier rows are on the device."""
    table_rows: int = 0
    """Rows of the whole table; 0 if they are ``rows``."""
    width: int
    """D, elements of a row's vector."""
    bytes_per_row: int
    """Parameters and optimizer state."""
    element_bytes: int = 4
    """Bytes of an element of parameters and optimizer state."""
    indices_per_sample: float = 1.0
    """Mean number of rows that a sample looks up."""
    factors: bool = False
    """Whether the table's ids have per-sample weights."""
    may_pool: bool = True
    """Whether the rank that holds the rows may sum them: see EmbeddingTables.may_pool."""
    on_host: bool = False
    """Whether the rows stay in host memory when the model is on another device."""
    skew: float = 1.0
    """Exponent of Zipf's law: row i is drawn in proportion to (i + 1)^-skew; 0 for uniform draws."""
    counts: NDArray | None = field(default=None, compare=False, repr=False)
    """[rows]: counted lookups of each row, used instead of ``skew``."""

    def __post_init__(self) -> None:
        require(
            self.rows >= 1 and self.width >= 1 and self.bytes_per_row >= 1,
            f"table {self.name}: {self.rows} rows of width {self.width}; expected 1 or more of each",
        )
        require(
            self.skew >= 0 and self.indices_per_sample >= 0,
            f"table {self.name}: skew {self.skew} and {self.indices_per_sample} indices a sample; "
            "expected numbers of 0 or more",
        )

    @property
    def bytes(self) -> int:
        return self.rows * self.bytes_per_row


class UniqueRows:
    """Expected number of unique rows that a batch looks up, for any range of the rows of a TableLoad.

    Rows count from the load's first row.

    n draws miss row i with probability exp(-n p_i). The first rows are summed one by one, the others in blocks that
    grow by a few percent; unless rows were counted, each row of a block has the probability of its middle row.

    Args:
        table: the table.
        samples: samples of the batch, or of one rank's slice of it.
    """

    def __init__(self, table: TableLoad, samples: float) -> None:
        edges, sizes, shares = _blocks(table.start, table.rows, table.skew)
        others = [(0, table.start), (table.start + table.rows, table.table_rows - table.start - table.rows)]
        blocks = [(sizes, shares), *(_blocks(start, rows, table.skew)[1:] for start, rows in others if rows > 0)]
        total = math.fsum(size * share for pair in blocks for size, share in zip(*pair, strict=True))
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
        """Return the expected unique rows among rows 0 to ``row`` - 1."""
        return self._at(self._below, row)

    def between(self, start: int, stop: int) -> float:
        """Return the expected unique rows among rows ``start`` to ``stop`` - 1."""
        return self.below(stop) - self.below(start)

    def share(self, start: int, stop: int) -> float:
        """Return the expected share of the draws that hit rows ``start`` to ``stop`` - 1."""
        return self._at(self._share_below, stop) - self._at(self._share_below, start)

    def _at(self, sums: Sequence[float], row: int) -> float:
        i = min(bisect.bisect_right(self._edges, row) - 1, len(self._edges) - 2)
        a, b = self._edges[i], self._edges[i + 1]
        return sums[i] + (sums[i + 1] - sums[i]) * (row - a) / (b - a)

    def row_after(self, start: int, count: float) -> int:
        """Return the largest row r > ``start`` with at most ``count`` expected unique rows in ``start`` to r - 1."""
        goal = self.below(start) + count
        i = bisect.bisect_right(self._below, goal) - 1
        if i >= len(self._edges) - 1:
            return self._edges[-1]
        step = self._below[i + 1] - self._below[i]
        inside = int((goal - self._below[i]) / step * (self._edges[i + 1] - self._edges[i])) if step > 0 else 0
        return max(start + 1, self._edges[i] + inside)


def _blocks(start: int, rows: int, skew: float) -> tuple[list[int], list[int], list[float]]:
    """Cut ``rows`` rows of a table from row ``start`` on into blocks.

    Returns:
        The edges of the blocks, from 0 to ``rows``; the rows of each block; the weight of its middle row.
    """
    edges = list(range(min(64, rows) + 1))
    while edges[-1] < rows:
        edges.append(min(rows, edges[-1] + max(1, (start + edges[-1]) // 32)))
    weights = [(start + (a + b + 1) / 2) ** -skew for a, b in itertools.pairwise(edges)]
    return edges, [b - a for a, b in itertools.pairwise(edges)], weights


def rows_of_tables(tables: Iterable[TableLoad]) -> dict[str, int]:
    """Return table name -> rows of the table, of which two loads may have a range each."""
    found: Counter[str] = Counter()
    for table in tables:
        found[table.name] += table.rows
    return dict(found)


def imbalance(values: Sequence[float]) -> float:
    """Return the largest value divided by the mean; 1 if all are equal or zero."""
    mean = sum(values) / len(values)
    return max(values) / mean if mean else 1.0


_AMOUNT = "a number with a unit (KiB, MiB, GiB, TiB, KB, MB, GB or TB), such as 80GiB"


def parse_bytes(text: str, setting: str) -> int:
    """Parse an amount of memory such as ``80GiB``, ``512 MB`` or a plain number of bytes.

    Args:
        text: the amount.
        setting: the option or key that has it, for messages.

    Raises:
        UserError: the text has another form.

    >>> parse_bytes("1.5GiB", "memory"), parse_bytes("2 GB", "memory"), parse_bytes("100", "memory")
    (1610612736, 2000000000, 100)
    """
    value = _bytes_of(text)
    if value is None:
        raise UserError(f"{setting} is {text}; expected {_AMOUNT}")
    return value


def _bytes_of(text: str) -> int | None:
    """Return the number of bytes of an amount of memory; None if the text has another form."""
    units = {"": 1, "b": 1}
    for power, letter in enumerate("kmgt", start=1):
        units |= {f"{letter}b": 1000**power, f"{letter}ib": 1024**power}
    compact = text.strip().lower().replace(" ", "")
    number = compact.rstrip("bikmgt")
    try:
        value = float(number) * units[compact[len(number) :]]
    except (ValueError, KeyError):
        return None
    return int(value) if math.isfinite(value) and value >= 0 else None


def parse_memory(text: str, setting: str) -> int | list[int]:
    """Parse memory per rank: one amount for all ranks, or one for each, separated by commas; see ``parse_bytes``.

    Raises:
        UserError: the text has another form.
    """
    amounts = [amount for part in text.split(",") if (amount := _bytes_of(part)) is not None]
    if len(amounts) <= text.count(","):
        raise UserError(f"{setting} is {text}; expected {_AMOUNT}, or such an amount for each rank: 24GiB,80GiB")
    return amounts[0] if len(amounts) == 1 else amounts


def format_bytes(amount: float) -> str:
    """Return an amount of memory with four digits and a binary unit."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.4g} {unit}"
        amount /= 1024
    return f"{amount:.4g} TiB"


ID_BYTES = 4
"""Bytes of a row id that is sent."""
FACTOR_BYTES = 4
"""Bytes of a per-sample weight that is sent."""


@dataclass(frozen=True, kw_only=True)
class ExpectedRequest:
    """Expected request of one rank's slice of a batch to one rank for one table."""

    ids: float
    """Ids sent: unique rows, or, if the bags are summed by the rank that holds the rows, all indices."""
    vectors: float
    """Vectors received, and gradients sent back: one for each unique row, or for each sum."""


@dataclass(frozen=True, kw_only=True)
class RankCost:
    """Costs of a plan for one rank; sent bytes are those of one training step."""

    rank: int
    pieces: int = 0
    rows: int = 0
    bytes: int = 0
    """Parameters and optimizer state."""
    host_bytes: int = 0
    """The part of ``bytes`` that is in host memory."""
    work: float = 0.0
    """Rows that all ranks request from this rank for a global batch: unique rows of each rank's slice, or, for a
    pooled table, sums."""
    sent_ids: float = 0.0
    """Bytes of ids that this rank sends to request rows, with their weights for pooled tables."""
    sent_vectors: float = 0.0
    """Bytes of rows, or sums of rows, that this rank sends to other ranks."""
    sent_gradients: float = 0.0
    """Bytes of gradients that this rank sends to the ranks that hold the rows."""
    bytes_of_table: Mapping[str, int] = field(default_factory=dict)


def rank_costs(plan: Plan, tables: Sequence[TableLoad], batch_size: int, value_bytes: int = 4) -> list[RankCost]:
    """Return the costs of a plan for each rank; every rank has an equal slice of the batch.

    Args:
        plan: plan of these tables.
        tables: as for ``make_plan``.
        batch_size: samples of a global batch.
        value_bytes: bytes of one element of a vector or gradient that is sent.
    """
    requests = {table: _requests(plan, table, batch_size, table.name in plan.pooled) for table in tables}
    ids_R, vectors_R, gradients_R = sum(
        (_sent(table, requests[table], plan.ranks, value_bytes, table.name in plan.pooled) for table in tables),
        start=np.zeros((3, plan.ranks)),
    )
    pieces = {table: _by_rank(plan, table) for table in tables}
    costs = []
    for rank in range(plan.ranks):
        held = {table: pieces[table][rank] for table in tables if rank in pieces[table]}
        rows = {table: sum(piece.rows for piece in of_table) for table, of_table in held.items()}
        bytes_of_table: Counter[str] = Counter()
        for table, count in rows.items():
            bytes_of_table[table.name] += count * table.bytes_per_row
        costs.append(
            RankCost(
                rank=rank,
                pieces=sum(map(len, held.values())),
                rows=sum(rows.values()),
                bytes=sum(count * table.bytes_per_row for table, count in rows.items()),
                host_bytes=sum(count * table.bytes_per_row for table, count in rows.items() if table.on_host),
                work=sum(requests[table][rank].vectors for table in held) * plan.ranks,
                sent_ids=float(ids_R[rank]),
                sent_vectors=float(vectors_R[rank]),
                sent_gradients=float(gradients_R[rank]),
                bytes_of_table=bytes_of_table,
            )
        )
    return costs


@dataclass(frozen=True, kw_only=True)
class TableCost:
    """Bytes of one table's exchanges in a training step: ids, vectors and gradients."""

    name: str
    sent_rows: NDArray
    """[ranks]: bytes that each rank sends if unique rows are exchanged."""
    sent_sums: NDArray
    """[ranks]: bytes that each rank sends if sums are exchanged; infinite if the table cannot be pooled."""


def table_costs(plan: Plan, tables: Sequence[TableLoad], batch_size: int, value_bytes: int = 4) -> list[TableCost]:
    """Return the costs of each table with rows and with sums; the arguments are those of ``rank_costs``."""

    def sent(table: TableLoad, pooled: bool) -> NDArray:
        if pooled and not (table.may_pool and table.table_rows in (0, table.rows)):
            return np.full(plan.ranks, np.inf)
        return _sent(table, _requests(plan, table, batch_size, pooled), plan.ranks, value_bytes, pooled).sum(0)

    return [TableCost(name=table.name, sent_rows=sent(table, False), sent_sums=sent(table, True)) for table in tables]


def pooled_tables(costs: Sequence[TableCost]) -> tuple[str, ...]:
    """Return the tables whose sums take fewer bytes than their rows, without more bytes on the busiest rank."""
    sent_R = np.sum([cost.sent_rows for cost in costs], axis=0)
    chosen = set()
    for cost in sorted(costs, key=lambda cost: (cost.sent_sums.sum() - cost.sent_rows.sum(), cost.name)):
        changed_R = sent_R - cost.sent_rows + cost.sent_sums
        if cost.sent_sums.sum() < cost.sent_rows.sum() and changed_R.max() <= sent_R.max():
            chosen.add(cost.name)
            sent_R = changed_R
    return tuple(cost.name for cost in costs if cost.name in chosen)


def _requests(plan: Plan, table: TableLoad, batch_size: int, pooled: bool) -> dict[int, ExpectedRequest]:
    """Return the expected request of each rank to every rank that holds pieces of a table."""
    samples = batch_size / plan.ranks
    traffic = UniqueRows(table, samples)
    return {rank: _request(table, pieces, traffic, samples, pooled) for rank, pieces in _by_rank(plan, table).items()}


def _request(
    table: TableLoad, pieces: Iterable[Piece], traffic: UniqueRows, samples: float, pooled: bool
) -> ExpectedRequest:
    if not pooled:
        rows = math.fsum(traffic.between(piece.start, piece.stop) for piece in pieces)
        return ExpectedRequest(ids=rows, vectors=rows)
    share = min(math.fsum(traffic.share(piece.start, piece.stop) for piece in pieces), 1.0)
    indices = table.indices_per_sample
    # Exact for bags of one length; with different lengths fewer bags hold some of these rows.
    touched = min(1 - (1 - share) ** indices, indices * share)
    return ExpectedRequest(ids=samples * indices * share, vectors=samples * touched)


def _sent(
    table: TableLoad, requests: Mapping[int, ExpectedRequest], ranks: int, value_bytes: int, pooled: bool
) -> NDArray:
    """Return the bytes of ids, vectors and gradients that each rank sends to others: [3, ranks]."""
    here_IR = np.zeros((2, ranks))
    for rank, request in requests.items():
        id_bytes = ID_BYTES + (FACTOR_BYTES if pooled and table.factors else 0)
        here_IR[:, rank] = request.ids * id_bytes, request.vectors * table.width * value_bytes
    ids_R, values_R = here_IR
    # A rank sends ids and gradients to all other ranks, and vectors to each of them.
    return np.stack([ids_R.sum() - ids_R, values_R * (ranks - 1), values_R.sum() - values_R])


def _by_rank(plan: Plan, table: TableLoad) -> dict[int, list[Piece]]:
    """Return rank -> its pieces of a load's rows, which count from the load's first row."""
    found: dict[int, list[Piece]] = {}
    for piece in plan.pieces_within(table.name, table.start, table.start + table.rows):
        found.setdefault(piece.rank, []).append(piece)
    return found
