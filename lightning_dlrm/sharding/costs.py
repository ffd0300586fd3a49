"""Costs of a plan for each rank: memory, requested rows, and bytes sent in a training step."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lightning_dlrm.sharding.loads import TableLoad, UniqueRows
from lightning_dlrm.sharding.plan import Piece, Plan

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
    requests = {table.name: _requests(plan, table, batch_size, table.name in plan.pooled) for table in tables}
    ids_R, vectors_R, gradients_R = sum(
        (_sent(table, requests[table.name], plan.ranks, value_bytes, table.name in plan.pooled) for table in tables),
        start=np.zeros((3, plan.ranks)),
    )
    pieces = {table.name: _by_rank(plan.tables[table.name]) for table in tables}
    costs = []
    for rank in range(plan.ranks):
        held = {table: pieces[table.name][rank] for table in tables if rank in pieces[table.name]}
        rows = {table: sum(piece.rows for piece in of_table) for table, of_table in held.items()}
        costs.append(
            RankCost(
                rank=rank,
                pieces=sum(map(len, held.values())),
                rows=sum(rows.values()),
                bytes=sum(count * table.bytes_per_row for table, count in rows.items()),
                host_bytes=sum(count * table.bytes_per_row for table, count in rows.items() if table.on_host),
                work=sum(requests[table.name][rank].vectors for table in held) * plan.ranks,
                sent_ids=float(ids_R[rank]),
                sent_vectors=float(vectors_R[rank]),
                sent_gradients=float(gradients_R[rank]),
                bytes_of_table={table.name: count * table.bytes_per_row for table, count in rows.items()},
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
        if pooled and not table.may_pool:
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
    return {
        rank: _request(table, pieces, traffic, samples, pooled)
        for rank, pieces in _by_rank(plan.tables[table.name]).items()
    }


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


def _by_rank(pieces: Iterable[Piece]) -> dict[int, list[Piece]]:
    found: dict[int, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.rank, []).append(piece)
    return found
