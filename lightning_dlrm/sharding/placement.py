"""Embedding tables in pieces on all ranks: their placement, which exchanges ids, vectors and gradients.

A rank asks the ranks that hold them for the unique rows that its samples need, and gets their vectors back; in the
backward pass it sends each row's summed gradient to the rank that holds the row, which sums over the ranks. Of tables
that the plan pools, it asks for sums: each rank that holds rows of a bag adds them up, and gets their gradient back.

The ids of a prefetched batch travel during the batch before it, gradients while DDP reduces those of the dense layers;
they are waited for when the optimizer reads them. The ranks' main threads start all exchanges at the same points of a
step, so that every rank makes the same calls in the same order.

Shape suffixes: F tables, D width, E rows that all ranks ask of this one, W ranks, U vectors that this rank asks for, V
vectors that all ranks ask of this one.
"""

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.sharding.collectives import AsyncCollective, Ranks
from lightning_dlrm.sharding.plan import Plan
from lightning_dlrm.sharding.requests import LookupRequest, RowMap, decode_rows
from lightning_dlrm.tables.gradients import LookupGradient
from lightning_dlrm.tables.host import Copies
from lightning_dlrm.tables.lookup import EmbeddingTables, Placement, look_up
from lightning_dlrm.tables.requests import RowRequest, RowSource
from lightning_dlrm.tables.table import Table


class PendingLookup:
    """A batch's request and what the other ranks ask for with it, as far as they have sent it.

    Args:
        request: of this rank.
        ranks: that hold the tables.
    """

    def __init__(self, request: LookupRequest, ranks: Ranks) -> None:
        self.request = request
        self._ranks = ranks
        self._sent_W2 = request.counts_of_ranks(ranks.ranks)
        self._received_W2 = ranks.all_to_all_counts(self._sent_W2)
        self._rows: AsyncCollective | None = None
        self._factors: AsyncCollective | None = None
        self.vectors_sent: list[int] = []
        """How many vectors each rank asks of this one; known after ``send_rows``."""
        self.vectors_received: list[int] = []
        """How many vectors this rank asks of each; likewise."""
        self.fetched: Any = None
        """What the storage has started for the rows that are asked of this rank."""

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
        """Wait for the rows that are asked of this rank, and return them in host memory: [E]."""
        assert self._rows is not None
        return decode_rows(Copies.of(device).on_host(self._rows.wait), None, self.request.pooled).values

    @cached_property
    def received(self) -> RowRequest:
        """The rows of this rank that all ranks ask for, rank after rank; waits for them."""
        assert self._rows is not None
        factors = None if self._factors is None else self._factors.wait()
        return decode_rows(self._rows.wait(), factors, self.request.pooled)


@dataclass(frozen=True, kw_only=True)
class TableTraffic:
    """What the exchanges of one table in training came to, over all ranks."""

    rows: NDArray
    """[W]: unique rows of each rank's slices that each rank was asked for; of a pooled table, sums."""
    bytes: float
    """Sent from rank to rank: ids, vectors and gradients."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What the exchanges of training came to since they were last measured."""

    seconds: float
    """Time that this rank waited for exchanges, and so for slower ranks; on a GPU, what the host waited for only."""
    sent_bytes: NDArray
    """[W]: by each rank."""
    tables: Mapping[str, TableTraffic]


class ShardedPlacement(Placement):
    """The pieces of some tables that a plan gives to this rank.

    Every rank makes the same lookups and backward passes, also with an empty slice: each is an exchange between all
    ranks.

    Args:
        tables: in the order of the ids of a batch.
        ranges: see EmbeddingTables; all rows of each table.
        plan: which rank holds which rows of these tables, among those of others.
        ranks: that hold them.
        wire: type of vectors and gradients while they are sent; None for their own.
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
        assert all(rows == (0, table.rows) for rows, table in zip(ranges, tables, strict=True))
        self.ranks = ranks
        self._wire = wire
        self._rows = RowMap(tables, plan)
        self.pieces = self._rows.pieces_of_rank[ranks.rank]
        self._pending: weakref.WeakKeyDictionary[object, PendingLookup] = weakref.WeakKeyDictionary()
        """Key of the ids -> their request."""
        self._prefetched: PendingLookup | None = None
        """The request whose rows are sent during the next lookup."""
        self._gradients: list[tuple[AsyncCollective, Callable[[Tensor], None]]] = []
        """Gradients that the ranks are sending, and who takes each."""
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
        # By now it is known how many rows of the next batch each rank gets.
        if self._prefetched is not None:
            self._send_rows(tables, self._prefetched)
            self._prefetched = None

        def take_received(grad_VD: Tensor) -> None:
            grad_VD = self._from_wire(grad_VD, tables.weight.dtype)
            local.take_gradient(LookupGradient(rows_E, grad_VD, bag_E, local.request.factors, local.lookups))

        # Learned weights are newer than those that were prefetched.
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
        """Return what training's exchanges came to since the last call; all ranks call it together."""
        ranks = self.ranks.ranks
        asked = np.stack(self.ranks.all_gather(self._counts_2C.cpu().numpy().copy())).reshape(ranks, 2, ranks, -1)
        """Of each rank, vectors and rows that it asked for, of each rank and table."""
        away_W2WF = asked * ~np.eye(ranks, dtype=bool)[:, None, :, None]
        value_bytes = tables.width * (self._wire or tables.weight.dtype).itemsize
        row_bytes = self._rows.table_offsets.element_size() + self._factor_bytes
        values_WWF, ids_WWF = away_W2WF[:, 0] * float(value_bytes), away_W2WF[:, 1] * float(row_bytes)
        # Ids and gradients are sent by the rank that needs a row, vectors by the rank that holds it.
        sent_W = (ids_WWF + values_WWF).sum((1, 2)) + values_WWF.sum((0, 2))
        moved_F = (ids_WWF + 2 * values_WWF).sum((0, 1))
        rows_WF = asked[:, 0].sum(0)
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
