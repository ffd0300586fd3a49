"""Placement of embedding tables in pieces on all ranks, which exchanges ids, vectors and gradients.

A rank requests the unique rows of its samples from the ranks that hold them, and receives their vectors. In the
backward pass it sends each row's summed gradient to the rank that holds the row, which sums over the ranks. If the plan
pools a table, a rank requests sums: one for each bag and each rank that holds rows of the bag, which adds them up and
receives the sum's gradient. ``requests`` makes requests of ids.

The ids of a prefetched batch are exchanged during the batch before it. For each lookup of a batch, the host waits for
the device once: for the numbers of vectors and rows that the ranks request from each other, because shapes depend on
them. For a prefetched batch these numbers are counted ahead, on a GPU in a second stream.

Gradients are exchanged while DDP reduces the dense gradients; the exchange is waited for when the optimizer reads them.
The main thread of each rank starts all exchanges, so that every rank makes the same calls in the same order.

Shape suffixes: B samples, F tables, D width, W ranks, C cells (a cell is a table on a rank: W * F cells, rank after
rank), U vectors that this rank requests, V vectors that all ranks request from this one, E requested rows.
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
from lightning_dlrm.kernels.choice import choose
from lightning_dlrm.sharding.collectives import AsyncCollective, Ranks
from lightning_dlrm.sharding.plan import Plan
from lightning_dlrm.sharding.requests import LookupRequest, RowMap, UnsizedRequest, decode_rows
from lightning_dlrm.tables.gradients import LookupGradient, RowRequest, RowSource
from lightning_dlrm.tables.host import Copies
from lightning_dlrm.tables.lookup import EmbeddingTables, Placement, look_up
from lightning_dlrm.tables.table import Table


class PendingLookup:
    """The requests of all ranks for a batch, while they are exchanged.

    The host waits for the device once, in ``send_rows``, for the sizes of all that follows.

    Args:
        unsized: request of this rank.
        ranks: ranks that hold the tables.
        computed: the event after which the request is computed; None if the caller's stream computes it.
    """

    def __init__(self, unsized: UnsizedRequest, ranks: Ranks, computed: Any = None) -> None:
        self._unsized, self._ranks, self._computed = unsized, ranks, computed
        sent_W2 = unsized.counts_of_ranks(ranks.ranks).contiguous()
        received_W2 = ranks.all_to_all(sent_W2, [1] * ranks.ranks, [1] * ranks.ranks)
        self._copies = Copies.of(sent_W2.device)
        self._read_sizes = self._copies.begin_on_host(lambda: torch.stack([sent_W2, received_W2.wait()]))
        self._request: LookupRequest | None = None
        self._rows: AsyncCollective | None = None
        self._factors: AsyncCollective | None = None
        self.vectors_sent: Sequence[int] = ()
        """Number of vectors that each rank requests from this one; known after ``send_rows``."""
        self.vectors_received: Sequence[int] = ()
        """Number of vectors that this rank requests from each rank; known after ``send_rows``."""
        self.fetched: Any = None
        """The storage's fetch of the rows that are requested from this rank."""

    @property
    def is_sent(self) -> bool:
        return self._rows is not None

    @property
    def request(self) -> LookupRequest:
        """This rank's request; known after ``send_rows``."""
        assert self._request is not None
        return self._request

    def send_rows(self) -> None:
        """Start to exchange the requested rows; all ranks call it together."""
        sizes_2W2 = self._read_sizes().tolist()
        (self.vectors_received, sent), (self.vectors_sent, received) = (
            zip(*of_ranks, strict=True) for of_ranks in sizes_2W2
        )
        self._copies.use_after(self._unsized.tensors(), self._computed)
        self._request = self._unsized.sized(sum(self.vectors_received), sum(sent))
        self._rows = self._ranks.all_to_all(self._request.rows, sent, received)
        if self._request.factors is not None:
            self._factors = self._ranks.all_to_all(self._request.factors, sent, received)

    def rows_on_host(self, device: torch.device) -> Tensor:
        """Wait for the rows that are requested from this rank, and return them in host memory: [E]."""
        assert self._rows is not None
        rows = Copies.of(device).on_host(self._rows.wait)
        return decode_rows(rows, None, self.request.pooled, sum(self.vectors_sent)).values

    @cached_property
    def received(self) -> RowRequest:
        """The rows that all ranks request from this one, rank after rank; waits for them."""
        assert self._rows is not None
        factors = None if self._factors is None else self._factors.wait()
        return decode_rows(self._rows.wait(), factors, self.request.pooled, sum(self.vectors_sent))


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
        copies = Copies.of(self.device)
        with copies.on_side_stream():
            here = ids.map(lambda tensor: None if tensor is None else tensor.to(self.device, non_blocking=True))
            request = self._rows.request(here, self._is_native(tables))
            self._prefetched = PendingLookup(request, self.ranks, copies.record_event())
        self._pending[ids.key] = self._prefetched

    def source(self, tables: EmbeddingTables, ids: SparseIds, pooled: bool) -> RowSource:
        pending = self._pending.pop(ids.key, None)
        if pending is None:
            pending = PendingLookup(self._rows.request(ids, self._is_native(tables)), self.ranks)
        self._send_rows(tables, pending)
        request = pending.request
        # Metrics are per training step, so exchanges of a validation are not counted.
        if self.training:
            self._counts_2C = self._counts_2C.to(request.counts.device) + request.counts
            self._factor_bytes = 0 if request.factors is None else request.factors.element_size()
        received = self._timed(lambda: pending.received)
        local = tables.storage.source(tables.weight, received, pending.fetched)
        vectors_VD, rows_E, bag_E = look_up(local.weight, local.request, tables.kernels)
        exchange = self.ranks.all_to_all(self._to_wire(vectors_VD), pending.vectors_sent, pending.vectors_received)
        # What follows runs while the vectors arrive. The weights are read now, because learned weights may have changed
        # since the ids were prefetched.
        weights = request.weights if request.pooled else ids.weights
        bags = (request.offsets, weights) if pooled else (None, None)
        positions = RowRequest.of_rows(request.lookups.positions(), *bags)
        # The numbers of rows that the next batch requests from each rank have arrived by now.
        if self._prefetched is not None:
            self._send_rows(tables, self._prefetched)
            self._prefetched = None
        vectors_UD = self._from_wire(self._timed(exchange.wait), tables.weight.dtype)

        def take_received(grad_VD: Tensor) -> None:
            grad_VD = self._from_wire(grad_VD, tables.weight.dtype)
            local.take_gradient(LookupGradient(rows_E, grad_VD, bag_E, local.request.factors, local.lookups))

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

    def _is_native(self, tables: EmbeddingTables) -> bool:
        return choose(tables.kernels, self.device.type, tables.weight.dtype) == "native"

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
