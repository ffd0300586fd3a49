"""Requests of table rows from the ranks that hold them, by arithmetic on ids alone.

A requested row or sum is a *vector*: if the plan pools a table, a rank requests sums, one for each bag and each rank
that holds rows of the bag. A request lists the *rows* that each vector is the sum of.

A request is made in two steps. ``RowMap.request`` sorts a batch's ids and counts, and no operation waits for a GPU. The
host then reads the counts, and ``UnsizedRequest.sized`` makes tensors of these sizes.

Shape suffixes: B samples, F tables, N indices of all bags, P pieces, W ranks, C cells (a cell is a table on a rank:
W * F cells, rank after rank), U vectors that this rank requests, V vectors that all ranks request from this one, E
requested rows.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.kernels import native
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


@dataclass(frozen=True, kw_only=True)
class UnsizedRequest:
    """A request before the host knows how many vectors and rows it has; no operation so far waits for a device.

    All tensors are in the order of ``keys``, sorted by vector, unless said otherwise.
    """

    ids: SparseIds
    keys: Tensor
    """[N]: the key of each index's vector, ascending."""
    order: Tensor
    """int64 [N]: the indices in this order."""
    begins: Tensor
    """bool [N]: whether the index is the first of its vector."""
    counts: Tensor
    """int64 [2, C]: the number of vectors, and of rows, of each table on each rank."""
    rank_starts: Tensor
    """[W]: the first row of each rank, in the numbering of ``keys``; read only if no table is pooled."""
    pooled: Tensor | None = None
    """bool [N], in the original order: whether the table of each index is pooled; None if no table is."""
    rows: Tensor | None = None
    """[N]: the row of each index, in the numbering of the rank that holds it; None if no table is pooled."""

    def counts_of_ranks(self, ranks: int) -> Tensor:
        """Return the number of vectors and of rows that are requested from each rank: int64 [W, 2]."""
        return self.counts.view(2, ranks, -1).sum(2).T

    def tensors(self) -> list[Tensor]:
        """Return the tensors that ``sized`` reads."""
        values = (*vars(self).values(), self.ids.offsets, self.ids.weights)
        return [value for value in values if isinstance(value, Tensor)]

    def sized(self, vectors: int, rows: int) -> LookupRequest:
        """Return the request, given its numbers of vectors and of rows."""
        starts_U = indices_where(self.begins, vectors)
        keys_U = self.keys.index_select(0, starts_U)
        counts_U = torch.cat([starts_U, starts_U.new_full((1,), len(self.order))]).diff()
        if self.pooled is not None and self.rows is not None:
            summed_N = self.pooled.index_select(0, self.order)
            counts_U = torch.where(summed_N.index_select(0, starts_U), 1, counts_U)
            return self._sized_pooled(keys_U, counts_U, self.pooled, summed_N, self.rows, rows)
        vectors_W = self.counts_of_ranks(len(self.rank_starts))[:, 0]
        first_rows_U = torch.repeat_interleave(self.rank_starts, vectors_W, output_size=vectors)
        return LookupRequest(
            lookups=SortedLookups(keys_U, counts_U, self.order),
            offsets=self.ids.offsets,
            weights=None,
            pooled=False,
            rows=keys_U - first_rows_U,
            factors=None,
            counts=self.counts,
        )

    def _sized_pooled(
        self, keys_U: Tensor, counts_U: Tensor, pooled_N: Tensor, summed_N: Tensor, rows_N: Tensor, rows: int
    ) -> LookupRequest:
        """Return the request if some tables are pooled.

        Args:
            keys_U: the key of each vector.
            counts_U: the indices of each vector; a sum counts as one.
            pooled_N: ``pooled``.
            summed_N: the same, in the order of ``keys``.
            rows_N: ``rows``.
            rows: number of rows of all vectors.
        """
        order_N = self.order
        # Datasets hold float32; with precision 64-true, Lightning converts weights that were not prefetched to float64.
        factors_N = None if self.ids.weights is None else self.ids.weights.detach().reshape(-1).float()
        sent_E = indices_where(self.begins | summed_N, rows)
        rows_E = torch.where(self.begins, rows_N, -1 - rows_N).index_select(0, sent_E)
        factors_E = None
        if factors_N is not None:
            factors_E = torch.where(summed_N, factors_N.index_select(0, order_N), 1.0).index_select(0, sent_E)
        # In the request, a sum is one index of its bag: of its indices the first is kept.
        kept_N = self.begins | ~summed_N
        kept = len(order_N) - rows + len(keys_U)
        kept_there_N = torch.empty_like(kept_N).index_copy_(0, order_N, kept_N)
        places_N = _counts_before(kept_there_N)
        weights = None
        if factors_N is not None:
            weights = torch.where(pooled_N, 1.0, factors_N).index_select(0, indices_where(kept_there_N, kept))
        return LookupRequest(
            lookups=SortedLookups(
                keys_U, counts_U, places_N.index_select(0, order_N.index_select(0, indices_where(kept_N, kept)))
            ),
            offsets=None if self.ids.offsets is None else places_N[self.ids.offsets],
            weights=weights,
            pooled=True,
            rows=rows_E,
            factors=factors_E,
            counts=self.counts,
        )


def indices_where(chosen_N: Tensor, count: int) -> Tensor:
    """Return the indices of the chosen elements, of which there are ``count``: int64 [count].

    ``torch.nonzero`` would wait for a GPU to learn the count; ``nonzero_static`` takes three times as long on a CPU.
    """
    return torch.repeat_interleave(chosen_N.long(), output_size=count)


def decode_rows(rows_E: Tensor, factors_E: Tensor | None, pooled: bool, vectors: int) -> RowRequest:
    """Return the request that a rank has received.

    Args:
        rows_E: the part of ``LookupRequest.rows`` for this rank, of all ranks one after the other.
        factors_E: the same part of ``LookupRequest.factors``.
        pooled: whether sums are requested.
        vectors: number of vectors that are requested.
    """
    if not pooled:
        return RowRequest.of_rows(rows_E)
    begins_E = rows_E >= 0
    starts_V = indices_where(begins_E, vectors)
    offsets = torch.cat([starts_V, starts_V.new_full((1,), len(rows_E))])
    return RowRequest.of_rows(torch.where(begins_E, rows_E, -1 - rows_E), offsets, factors_E)


class RowMap(nn.Module):
    """Map from the rows of tables to the ranks that hold them, which makes the requests of batches.

    Args:
        tables: tables in the order of a batch's ids.
        ranges: (first row, row after the last) of each table; ids count from the first row.
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

    def __init__(self, tables: Sequence[Table], ranges: Sequence[tuple[int, int]], plan: Plan) -> None:
        super().__init__()
        ranks = plan.ranks
        self.pools = any(table.name in plan.pooled for table in tables)
        held: list[list[TablePiece]] = [[] for _ in range(ranks)]
        rows_held, cell_rows = [0] * ranks, [[0] * len(tables) for _ in range(ranks)]
        # For each piece: its first row among the rows of all tables, its cell, its first row within the cell, and its
        # first row on its rank.
        pieces, table_offsets, total = [], [], 0
        for number, (table, (first, stop)) in enumerate(zip(tables, ranges, strict=True)):
            table_offsets.append(total)
            for piece in plan.pieces_within(table.name, first, stop):
                rank, offset = piece.rank, rows_held[piece.rank]
                held[rank].append(
                    TablePiece(
                        name=table.name,
                        table_rows=table.rows,
                        start=first + piece.start,
                        stop=first + piece.stop,
                        offset=offset,
                    )
                )
                pieces.append((total + piece.start, rank * len(tables) + number, cell_rows[rank][number], offset))
                rows_held[rank] += piece.rows
                cell_rows[rank][number] += piece.rows
            total += stop - first
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

    def request(self, ids: SparseIds, natively: bool = False) -> UnsizedRequest:
        """Return the request of a batch; per-sample weights are constants if tables are pooled.

        Args:
            ids: ids of the batch.
            natively: sort by ``kernels.native``.
        """
        rows_N, bag_N = RowRequest(ids.values, self.table_offsets, ids.offsets, None).rows_and_bags()
        piece_N = torch.searchsorted(self.piece_starts, rows_N, right=True, out_int32=True) - 1
        if not self.pools:
            keys_N, order_N = _sort(rows_N + self.piece_keys.index_select(0, piece_N), self._total, natively)
            begins_N = _begins(keys_N)
            bounds_C = torch.searchsorted(keys_N, self.cell_keys.to(keys_N.dtype))
            vectors_C = _counts_before(begins_N)[bounds_C].diff()
            return UnsizedRequest(
                ids=ids,
                keys=keys_N,
                order=order_N,
                begins=begins_N,
                counts=torch.stack([vectors_C, vectors_C]),
                rank_starts=self.rank_starts,
            )
        samples = len(ids)
        keys_P, stop = self.piece_keys, self._total + self._slots * samples
        if stop > torch.iinfo(keys_P.dtype).max:
            keys_P = keys_P.long()
        keys_P = keys_P + self.piece_slots * samples
        pooled_N = self.piece_pooled.index_select(0, piece_N)
        bag_N = ids.bag_of_each() if bag_N is None else bag_N
        sample_N = (bag_N // max(ids.tables, 1)).to(rows_N.dtype)
        keys_N, order_N = _sort(
            torch.where(pooled_N, sample_N, rows_N) + keys_P.index_select(0, piece_N), stop, natively
        )
        begins_N = _begins(keys_N)
        sent_N = begins_N | pooled_N.index_select(0, order_N)
        bounds_C = torch.searchsorted(keys_N, (self.cell_keys + self.cell_slots * samples).to(keys_N.dtype))
        return UnsizedRequest(
            ids=ids,
            keys=keys_N,
            order=order_N,
            begins=begins_N,
            counts=torch.stack([_counts_before(chosen_N)[bounds_C].diff() for chosen_N in (begins_N, sent_N)]),
            rank_starts=self.rank_starts,
            pooled=pooled_N,
            rows=(rows_N + self.piece_rows.index_select(0, piece_N)).index_select(0, order_N),
        )


def _sort(keys_N: Tensor, stop: int, natively: bool) -> tuple[Tensor, Tensor]:
    """Return the keys, which are below ``stop``, in ascending order, and their indices; the sort is stable."""
    if natively and keys_N.dtype == torch.int32:
        return native.sort(keys_N, stop)
    keys_N, order_N = torch.sort(keys_N, stable=True)
    return keys_N, order_N


def _begins(keys_N: Tensor) -> Tensor:
    """Return whether each of the sorted keys differs from the one before it: bool [N]."""
    begins_N = torch.ones_like(keys_N, dtype=torch.bool)
    torch.ne(keys_N[1:], keys_N[:-1], out=begins_N[1:])
    return begins_N


def _counts_before(chosen_N: Tensor) -> Tensor:
    """Return the number of chosen elements before each place: int64 [N + 1]."""
    return torch.cat([chosen_N.new_zeros(1, dtype=torch.int64), chosen_N.cumsum(0)])
