"""Requests of a batch's lookups to the ranks that hold table rows: arithmetic on ids, before any exchange.

A rank requests unique rows of most tables. Of pooled tables it requests sums: one for each bag and each rank that holds
rows of the bag. A requested row or sum is a *vector*; the request lists the *rows* that each vector is the sum of.

Shape suffixes: B samples, F tables, N indices of all bags, P pieces, W ranks, C cells (a cell is a table on a rank:
W * F cells, rank after rank), U vectors that this rank requests, E rows of these vectors.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.sharding.plan import Plan
from lightning_dlrm.tables.gradients import RowRequest, SortedLookups
from lightning_dlrm.tables.table import Table, TablePiece


@dataclass(frozen=True, kw_only=True)
class LookupRequest:
    """The request of one rank to all ranks for a batch, and how its bags are summed from the answer."""

    lookups: SortedLookups
    """The requested vectors by ascending rank, and the indices that read each vector; a sum counts as one index."""
    offsets: Tensor | None
    """int64 [bags + 1]: where each bag begins among these indices; None if each index is a bag."""
    weights: Tensor | None
    """Per-sample weights of these indices if sums are requested: 1 for a sum, whose rows are weighted already; None
    means 1. If no sums are requested, the ids' own weights apply."""
    pooled: bool
    """Whether sums are among the vectors."""
    rows: Tensor
    """[E]: rows in the numbering of the ranks that hold them, vector after vector; all rows of a sum but the first are
    encoded as -1 - row."""
    factors: Tensor | None
    """[E]: per-sample weight of each row in its sum; None means 1."""
    counts: Tensor
    """int64 [2, C]: the number of vectors, and of rows, of each table on each rank."""

    def counts_of_ranks(self, ranks: int) -> Tensor:
        """Return the number of vectors and of rows that are requested from each rank: int64 [W, 2]."""
        return self.counts.view(2, ranks, -1).sum(2).T


def decode_rows(rows_E: Tensor, factors_E: Tensor | None, pooled: bool) -> RowRequest:
    """Return the request that a rank has received.

    Args:
        rows_E: the part of ``LookupRequest.rows`` for this rank, of all ranks one after the other.
        factors_E: the same part of ``LookupRequest.factors``.
        pooled: whether sums are requested.
    """
    if not pooled:
        return RowRequest.of_rows(rows_E)
    begins_E = rows_E >= 0
    starts_U = torch.nonzero(begins_E).view(-1)
    offsets = torch.cat([starts_U, starts_U.new_full((1,), len(rows_E))])
    return RowRequest.of_rows(torch.where(begins_E, rows_E, -1 - rows_E), offsets, factors_E)


class RowMap(nn.Module):
    """Map from the rows of tables to the ranks that hold them, which makes the requests of batches.

    Args:
        tables: tables in the order of a batch's ids.
        plan: plan of these tables, and perhaps of others.
    """

    table_offsets: Tensor
    piece_starts: Tensor
    piece_keys: Tensor
    piece_rows: Tensor
    piece_pooled: Tensor
    piece_slots: Tensor
    rank_starts: Tensor
    cell_keys: Tensor
    cell_slots: Tensor

    def __init__(self, tables: Sequence[Table], plan: Plan) -> None:
        super().__init__()
        ranks = plan.ranks
        self.pools = any(table.name in plan.pooled for table in tables)
        held: list[list[TablePiece]] = [[] for _ in range(ranks)]
        rows_held, cell_rows = [0] * ranks, [[0] * len(tables) for _ in range(ranks)]
        # For each piece: its first row among the rows of all tables, its cell, its first row within the cell, and its
        # first row on its rank.
        pieces, table_offsets, total = [], [], 0
        for number, table in enumerate(tables):
            table_offsets.append(total)
            for piece in plan.tables[table.name]:
                rank, offset = piece.rank, rows_held[piece.rank]
                held[rank].append(
                    TablePiece(
                        name=table.name, table_rows=table.rows, start=piece.start, stop=piece.stop, offset=offset
                    )
                )
                pieces.append((total + piece.start, rank * len(tables) + number, cell_rows[rank][number], offset))
                rows_held[rank] += piece.rows
                cell_rows[rank][number] += piece.rows
            total += table.rows
        self.pieces_of_rank = tuple(tuple(of_rank) for of_rank in held)
        """The pieces of each rank, in the order of their offsets."""
        self.ranks, self._total = ranks, total
        # Vectors are sorted by a key: the number of a row, counted rank after rank and table after table, or of a
        # sample if the table is pooled. Each pooled cell shifts the keys after it by the number of samples.
        pooled = [table.name in plan.pooled for table in tables] * ranks
        rows_before = [
            0,
            *itertools.accumulate(0 if p else n for p, n in zip(pooled, itertools.chain(*cell_rows), strict=True)),
        ]
        slots_before = [0, *itertools.accumulate(pooled)]
        self._slots = slots_before[-1]
        # int32 halves the time to sort rows.
        index = torch.int32 if total <= torch.iinfo(torch.int32).max else torch.int64
        for buffer, values, dtype in (
            ("table_offsets", table_offsets, index),
            ("piece_starts", [start for start, *_ in pieces], index),
            (
                "piece_keys",
                [rows_before[c] + (0 if pooled[c] else inside - start) for start, c, inside, _ in pieces],
                index,
            ),
            ("piece_rows", [offset - start for start, _, _, offset in pieces], index),
            ("piece_pooled", [pooled[c] for _, c, _, _ in pieces], torch.bool),
            ("piece_slots", [slots_before[c] for _, c, _, _ in pieces], index),
            ("rank_starts", [0, *itertools.accumulate(rows_held)][:-1], index),
            ("cell_keys", rows_before, torch.int64),
            ("cell_slots", slots_before, torch.int64),
        ):
            self.register_buffer(buffer, torch.tensor(values, dtype=dtype), persistent=False)

    def request(self, ids: SparseIds) -> LookupRequest:
        """Return the request of a batch; per-sample weights are constants if tables are pooled."""
        rows_N, bag_N = RowRequest(ids.values, self.table_offsets, ids.offsets, None).rows_and_bags()
        piece_N = torch.searchsorted(self.piece_starts, rows_N, right=True, out_int32=True) - 1
        if not self.pools:
            lookups = SortedLookups.of(rows_N + self.piece_keys.index_select(0, piece_N))
            vectors_C = torch.searchsorted(lookups.rows, self.cell_keys.to(lookups.rows.dtype)).diff()
            vectors_W = vectors_C.view(self.ranks, -1).sum(1)
            first_rows_U = torch.repeat_interleave(self.rank_starts, vectors_W, output_size=len(lookups.rows))
            return LookupRequest(
                lookups=lookups,
                offsets=ids.offsets,
                weights=None,
                pooled=False,
                rows=lookups.rows - first_rows_U,
                factors=None,
                counts=torch.stack([vectors_C, vectors_C]),
            )
        samples = len(ids)
        keys_P = self.piece_keys
        if self._total + self._slots * samples > torch.iinfo(keys_P.dtype).max:
            keys_P = keys_P.long()
        keys_P = keys_P + self.piece_slots * samples
        pooled_N = self.piece_pooled.index_select(0, piece_N)
        bag_N = ids.bag_of_each() if bag_N is None else bag_N
        sample_N = bag_N // max(ids.tables, 1)
        lookups = SortedLookups.of(torch.where(pooled_N, sample_N, rows_N) + keys_P.index_select(0, piece_N))
        return self._pooled_request(ids, lookups, pooled_N, rows_N + self.piece_rows.index_select(0, piece_N))

    def _pooled_request(
        self, ids: SparseIds, lookups: SortedLookups, pooled_N: Tensor, held_rows_N: Tensor
    ) -> LookupRequest:
        """Return the request of a batch if some tables are pooled.

        Args:
            ids: ids of the batch.
            lookups: all indices, sorted by the keys of their vectors.
            pooled_N: whether the table of each index is pooled.
            held_rows_N: the row of each index, in the numbering of the rank that holds it.
        """
        order_N = lookups.order
        # Datasets hold float32; with precision 64-true, Lightning converts weights that were not prefetched to float64.
        factors_N = None if ids.weights is None else ids.weights.detach().reshape(-1).float()
        starts_U = lookups.counts.cumsum(0) - lookups.counts
        # From here on, indices are sorted by key.
        first_N = torch.zeros_like(pooled_N).index_fill_(0, starts_U, True)
        summed_N = pooled_N.index_select(0, order_N)
        sent_N = first_N | summed_N
        rows_N = held_rows_N.index_select(0, order_N)
        rows_E = torch.where(first_N, rows_N, -1 - rows_N)[sent_N]
        factors_E = None
        if factors_N is not None:
            factors_E = torch.where(summed_N, factors_N.index_select(0, order_N), 1.0)[sent_N]
        bounds_C = torch.searchsorted(
            lookups.rows, (self.cell_keys + self.cell_slots * len(ids)).to(lookups.rows.dtype)
        )
        index_bounds_C = torch.cat([starts_U, starts_U.new_full((1,), len(order_N))])[bounds_C]
        # From here on, indices are in their original order, and a sum is one index of its bag.
        kept_N = torch.empty_like(pooled_N)
        kept_N[order_N] = first_N | ~summed_N
        places_N = _counts_before(kept_N)
        counts_U = torch.where(summed_N[starts_U], 1, lookups.counts)
        return LookupRequest(
            lookups=SortedLookups(lookups.rows, counts_U, places_N[order_N[kept_N[order_N]]]),
            offsets=None if ids.offsets is None else places_N[ids.offsets],
            weights=None if factors_N is None else torch.where(pooled_N, 1.0, factors_N)[kept_N],
            pooled=True,
            rows=rows_E,
            factors=factors_E,
            counts=torch.stack([bounds_C.diff(), _counts_before(sent_N)[index_bounds_C].diff()]),
        )


def _counts_before(chosen_N: Tensor) -> Tensor:
    """Return the number of chosen elements before each place: int64 [N + 1]."""
    return torch.cat([chosen_N.new_zeros(1, dtype=torch.int64), chosen_N.cumsum(0)])
