"""Placement of embedding tables in pieces on all ranks, which exchanges ids, vectors and gradients.

A rank requests the unique rows of its samples from the ranks that hold them, and receives their vectors. In the
backward pass it sends each row's summed gradient to the rank that holds the row, which sums over the ranks. If the plan
pools a table, a rank requests sums: one for each bag and each rank that holds rows of the bag, which adds them up and
receives the sum's gradient. A requested row or sum is a *vector*; a request lists the *rows* that each vector is the
sum of. ``RowMap`` makes requests, by arithmetic on ids alone.

The ids of a prefetched batch are exchanged during the batch before it. Gradients are exchanged while DDP reduces the
dense gradients; the exchange is waited for when the optimizer reads them. The main thread of each rank starts all
exchanges, so that every rank makes the same calls in the same order.

Shape suffixes: B samples, F tables, D width, N indices of all bags, P pieces, W ranks, C cells (a cell is a table on a
rank: W * F cells, rank after rank), U vectors that this rank requests, V vectors that all ranks request from this one,
E requested rows.
"""

import itertools
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.sharding.collectives import AsyncCollective, Ranks
from lightning_dlrm.sharding.plan import Plan
from lightning_dlrm.tables.gradients import LookupGradient, RowRequest, RowSource, SortedLookups
from lightning_dlrm.tables.host import Copies
from lightning_dlrm.tables.lookup import EmbeddingTables, Placement, look_up
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


class PendingLookup:
    """The requests of all ranks for a batch, while they are exchanged.

    Args:
        request: request of this rank.
        ranks: ranks that hold the tables.
    """

    def __init__(self, request: LookupRequest, ranks: Ranks) -> None:
        self.request = request
        self._ranks = ranks
        self._sent_W2 = request.counts_of_ranks(ranks.ranks)
        self._received_W2 = ranks.all_to_all(self._sent_W2, [1] * ranks.ranks, [1] * ranks.ranks)
        self._rows: AsyncCollective | None = None
        self._factors: AsyncCollective | None = None
        self.vectors_sent: list[int] = []
        """Number of vectors that each rank requests from this one; known after ``send_rows``."""
        self.vectors_received: list[int] = []
        """Number of vectors that this rank requests from each rank; known after ``send_rows``."""
        self.fetched: Any = None
        """The storage's fetch of the rows that are requested from this rank."""

    @property
    def is_sent(self) -> bool:
        return self._rows is not None

    def send_rows(self) -> None:
        """Start to exchange the requested rows; all ranks call it together."""
        counts = torch.stack([self._sent_W2, self._received_W2.wait()]).permute(0, 2, 1)
        (self.vectors_received, sent), (self.vectors_sent, received) = counts.tolist()
        self._rows = self._ranks.all_to_all(self.request.rows, sent, received)
        if self.request.factors is not None:
            self._factors = self._ranks.all_to_all(self.request.factors, sent, received)

    def rows_on_host(self, device: torch.device) -> Tensor:
        """Wait for the rows that are requested from this rank, and return them in host memory: [E]."""
        assert self._rows is not None
        return decode_rows(Copies.of(device).on_host(self._rows.wait), None, self.request.pooled).values

    @cached_property
    def received(self) -> RowRequest:
        """The rows that all ranks request from this one, rank after rank; waits for them."""
        assert self._rows is not None
        factors = None if self._factors is None else self._factors.wait()
        return decode_rows(self._rows.wait(), factors, self.request.pooled)


@dataclass(frozen=True, kw_only=True)
class TableTraffic:
    """Traffic of one table in training, over all ranks."""

    rows: NDArray
    """[W]: unique rows, or sums of a pooled table, that all ranks requested from each rank."""
    bytes: float
    """Sent from rank to rank: ids, vectors and gradients."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Traffic of training since the last measurement."""

    seconds: float
    """Time that this rank waited for exchanges, including slower ranks; on a GPU, the time that the host waited."""
    sent_bytes: NDArray
    """[W]: bytes that each rank sent."""
    tables: Mapping[str, TableTraffic]


class ShardedPlacement(Placement):
    """Placement of tables in pieces, by a plan.

    Each lookup and backward pass is an exchange between all ranks: every rank makes it, also with an empty slice.

    Args:
        tables: tables in the order of a batch's ids.
        ranges: see EmbeddingTables.
        plan: plan of these tables, and perhaps of others.
        ranks: ranks that hold the tables.
        wire: dtype in which vectors and gradients are sent; None for their own dtype.
    """

    is_sharded = True

    def __init__(
        self,
        tables: Sequence[Table],
        ranges: Sequence[tuple[int, int]],
        plan: Plan,
        ranks: Ranks,
        wire: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.ranks = ranks
        self._wire = wire
        self._rows = RowMap(tables, ranges, plan)
        self.pieces = self._rows.pieces_of_rank[ranks.rank]
        self._pending: weakref.WeakKeyDictionary[object, PendingLookup] = weakref.WeakKeyDictionary()
        """Key of the ids -> their pending lookup."""
        self._prefetched: PendingLookup | None = None
        """The pending lookup whose rows are sent during the next lookup."""
        self._gradients: list[tuple[AsyncCollective, Callable[[Tensor], None]]] = []
        """Exchanges of gradients, and the function that takes each result."""
        self._seconds = 0.0
        # Vectors and rows of each table on each rank, counted on the device, so that the host does not wait for it.
        self._counts_2C = torch.zeros(2, plan.ranks * len(tables), dtype=torch.int64)
        self._factor_bytes = 0

    @property
    def device(self) -> torch.device:
        return self._rows.table_offsets.device

    def prefetch(self, tables: EmbeddingTables, ids: SparseIds) -> None:
        here = ids.map(lambda tensor: None if tensor is None else tensor.to(self.device, non_blocking=True))
        self._prefetched = self._pending[ids.key] = PendingLookup(self._rows.request(here), self.ranks)

    def source(self, tables: EmbeddingTables, ids: SparseIds, pooled: bool) -> RowSource:
        pending = self._pending.pop(ids.key, None) or PendingLookup(self._rows.request(ids), self.ranks)
        request = pending.request
        # Metrics are divided by training steps, to which a validation's exchanges do not belong.
        if self.training:
            self._counts_2C += request.counts.to(self._counts_2C.device)
            self._factor_bytes = 0 if request.factors is None else request.factors.element_size()
        self._send_rows(tables, pending)
        received = self._timed(lambda: pending.received)
        local = tables.storage.source(tables.weight, received, pending.fetched)
        vectors_VD, rows_E, bag_E = look_up(local.weight, local.request, tables.kernels)
        exchange = self.ranks.all_to_all(self._to_wire(vectors_VD), pending.vectors_sent, pending.vectors_received)
        vectors_UD = self._from_wire(self._timed(exchange.wait), tables.weight.dtype)
        # The number of rows of the next batch for each rank has arrived by now.
        if self._prefetched is not None:
            self._send_rows(tables, self._prefetched)
            self._prefetched = None

        def take_received(grad_VD: Tensor) -> None:
            grad_VD = self._from_wire(grad_VD, tables.weight.dtype)
            local.take_gradient(LookupGradient(rows_E, grad_VD, bag_E, local.request.factors, local.lookups))

        # Learned weights may have changed since the ids were prefetched.
        weights = request.weights if request.pooled else ids.weights
        bags = (request.offsets, weights) if pooled else (None, None)
        positions = RowRequest.of_rows(request.lookups.positions(), *bags)
        return RowSource(vectors_UD, positions, request.lookups, partial(self._send_gradient, pending, take_received))

    def wait_for_gradients(self) -> None:
        gradients, self._gradients = self._gradients, []
        for exchange, take in gradients:
            take(self._timed(exchange.wait))

    def over_ranks(self, value: Tensor) -> Tensor:
        return self.ranks.sum(value)

    def measure(self, tables: EmbeddingTables) -> Traffic:
        """Return the traffic of training since the last call; all ranks call this together."""
        ranks = self.ranks.ranks
        requested = np.stack(self.ranks.all_gather(self._counts_2C.cpu().numpy().copy())).reshape(ranks, 2, ranks, -1)
        # [requesting rank, vectors or rows, holding rank, table].
        away_W2WF = requested * ~np.eye(ranks, dtype=bool)[:, None, :, None]
        value_bytes = tables.width * (self._wire or tables.weight.dtype).itemsize
        row_bytes = self._rows.table_offsets.element_size() + self._factor_bytes
        values_WWF, ids_WWF = away_W2WF[:, 0] * float(value_bytes), away_W2WF[:, 1] * float(row_bytes)
        # Ids and gradients are sent by the rank that needs a row, vectors by the rank that holds it.
        sent_W = (ids_WWF + values_WWF).sum((1, 2)) + values_WWF.sum((0, 2))
        moved_F = (ids_WWF + 2 * values_WWF).sum((0, 1))
        rows_WF = requested[:, 0].sum(0)
        seconds, self._seconds = self._seconds, 0.0
        self._counts_2C.zero_()
        return Traffic(
            seconds=seconds,
            sent_bytes=sent_W,
            tables={
                table.name: TableTraffic(rows=rows_WF[:, i].astype(float), bytes=float(moved_F[i]))
                for i, table in enumerate(tables.tables)
            },
        )

    def _send_rows(self, tables: EmbeddingTables, pending: PendingLookup) -> None:
        if not pending.is_sent:
            self._timed(pending.send_rows)
            fetch = partial(pending.rows_on_host, self.device)
            pending.fetched = tables.storage.fetch(tables.weight, fetch, self.device)

    def _send_gradient(self, pending: PendingLookup, take: Callable[[Tensor], None], gradient: LookupGradient) -> None:
        # A rank's loss is the number of ranks times its part of the mean over the global batch: DDP averages the
        # dense gradients, and here they are summed.
        values_UD = self._to_wire(gradient.values / self.ranks.ranks)
        exchange = self.ranks.all_to_all(values_UD, pending.vectors_received, pending.vectors_sent)
        self._gradients.append((exchange, take))

    def _to_wire(self, values: Tensor) -> Tensor:
        return values if self._wire is None else values.to(self._wire)

    def _from_wire(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return values.to(torch.promote_types(values.dtype, dtype))

    def _timed(self, wait: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = wait()
        if self.training:
            self._seconds += time.perf_counter() - start
        return result
