"""Embedding tables in pieces on all ranks: the sharded twin of ``EmbeddingTables``.

A rank asks the owners for the distinct rows that its samples need, gets their vectors back, and in
the backward pass sends each row's summed gradient to its owner, who sums over the ranks. Of tables that
the plan pools, it asks for sums: each owner of some of a bag's rows adds them up, and gets the bag's
gradient back.

Everything travels while something else is computed: the ids of an announced batch during the one before
it, vectors during the dense layers between ``start`` and ``forward``, gradients during the backward pass
of those layers. All of it is begun by the ranks' main threads at the same points of a step, so that
every rank makes the same calls in the same order.

Shape suffixes: B samples, F tables, D width, R rows held here, N indices of all bags, W ranks, U units (distinct
rows, or sums) that this rank needs, V units that all ranks ask of this one.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.lookup import RowGradient, Table
from lightning_dlrm.sharding.collectives import AsyncCollective, Ranks
from lightning_dlrm.sharding.needs import Asked, Needs, RowMap
from lightning_dlrm.sharding.plan import Plan
from lightning_dlrm.tables.memory import empty_table
from lightning_dlrm.tables.pooling import PoolingLookup, pool_rows
from lightning_dlrm.tables.tables import EmbeddingTables, fill_initial_rows


class Request:
    """What this rank needs for a batch, and what it is asked for, as far as that is known.

    Args:
        needs: of this rank.
        ranks: who takes part.
    """

    def __init__(self, needs: Needs, ranks: Ranks) -> None:
        self.needs = needs
        self._ranks = ranks
        self._asks_W2 = needs.of_ranks(ranks.ranks)
        self._counts = ranks.all_to_all_counts(self._asks_W2)
        self._ids: AsyncCollective | None = None
        self._factors: AsyncCollective | None = None
        self.asks: list[int] = []
        """How many units of each rank this one needs; known once the ids are sent."""
        self.asked: list[int] = []
        """How many units of this rank each one needs; likewise."""
        self.vectors: AsyncCollective | None = None
        self.gradients: AsyncCollective | None = None
        self.fetched: Any = None
        """What has been begun here for what it asks of this rank."""

    def send_ids(self) -> None:
        """Begins to tell the owners what is needed, where that has not begun."""
        if self._ids is not None:
            return
        counts = torch.stack([self._asks_W2, self._counts.wait()]).permute(0, 2, 1)
        (self.asks, entries), (self.asked, asked_entries) = counts.tolist()
        self._ids = self._ranks.all_to_all(self.needs.entries, entries, asked_entries)
        if self.needs.factors is not None:
            self._factors = self._ranks.all_to_all(self.needs.factors, entries, asked_entries)

    def entries(self) -> Tensor:
        """What the ranks have told of the rows that they need, rank after rank; waits for it."""
        assert self._ids is not None
        return self._ids.wait()

    @cached_property
    def here(self) -> Asked:
        """The rows of ``weight`` that the ranks need, rank after rank; waits for them."""
        factors = None if self._factors is None else self._factors.wait()
        return Asked.of(self.entries(), factors, self.pooled)

    @property
    def pooled(self) -> bool:
        """Whether some of what is asked for are sums."""
        return self.needs.bags is not None


@dataclass(frozen=True, kw_only=True)
class TableTraffic:
    """What one table's exchanges in training came to, over all ranks."""

    rows: NDArray
    """[W]: distinct rows of each rank's slices that each rank was asked for, or where it is pooled, sums."""
    bytes: float
    """Sent from rank to rank: ids, vectors and gradients."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What the exchanges of training came to since they were last looked at."""

    seconds: float
    """This rank's, of waiting for exchanges, and so for slower ranks; on a GPU, what the host waits for only."""
    sent_bytes: NDArray
    """[W]: by each rank."""
    tables: Mapping[str, TableTraffic]


class ShardedTables(PoolingLookup):
    """Those pieces of tables of one width that a plan gives to this rank.

    Every rank calls ``forward`` and the backward pass the same number of times, also with an empty
    slice: each is an exchange between all ranks.

    Args:
        tables: in the order of the ids of a batch.
        width: D.
        seed: of the initial rows, which are those of ``EmbeddingTables``, whatever the plan.
        plan: where the rows of these tables are, among those of others.
        ranks: who takes part.
        wire: type of vectors and gradients while they travel; None for their own.
        dtype, device: of ``weight``.
        trainable: whether the rows are learned; else they stay as they start.
    """

    LOOKS_AHEAD: ClassVar[bool] = True

    def __init__(
        self,
        tables: Sequence[Table],
        width: int,
        seed: int,
        plan: Plan,
        ranks: Ranks,
        wire: torch.dtype | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        trainable: bool = True,
    ) -> None:
        super().__init__()
        self.tables = tuple(tables)
        self.ranks = ranks
        self._wire = wire
        self._announced: Request | None = None
        self.rows = RowMap(tables, plan, device)
        self.pieces = self.rows.held[ranks.rank]
        self._seconds = 0.0
        # Units and entries of each table on each rank, counted on the device, where nobody waits for it.
        self._asked_2C = torch.zeros(2, plan.ranks * len(tables), dtype=torch.int64, device=device)
        self._factor_bytes = 0
        rows_held = sum(piece.stop - piece.start for piece in self.pieces)
        weight_RD = empty_table((rows_held, width), dtype, self._place(torch.device(device)))
        self.weight = nn.Parameter(weight_RD, requires_grad=trainable)
        fill_initial_rows(weight_RD, self.tables, self.pieces, seed)

    @classmethod
    def of(
        cls,
        tables: EmbeddingTables,
        plan: Plan,
        ranks: Ranks,
        wire: torch.dtype | None,
        device: torch.device,
    ) -> "ShardedTables":
        """Takes the place of tables that were built under ``rows_elsewhere``."""
        weight = tables.weight
        sharded = cls(
            tables.tables, tables.width, tables.seed, plan, ranks, wire, weight.dtype, device, weight.requires_grad
        )
        sharded.kernels = tables.kernels
        return sharded

    @staticmethod
    def _place(device: torch.device) -> torch.device:
        """Where ``weight`` is, where the device is this one."""
        return device

    def announce(self, ids: SparseIds) -> None:
        """See EmbeddingLookup.announce."""
        device = self.rows.table_offsets.device
        here = ids.map(lambda tensor: None if tensor is None else tensor.to(device, non_blocking=True))
        self._announced = ids.ahead[self] = Request(self.rows.needs(here), self.ranks)

    def start(self, ids: SparseIds) -> None:
        """See EmbeddingLookup.start."""
        request = ids.ahead.pop(self, None) or Request(self.rows.needs(ids), self.ranks)
        # Figures are divided by training steps, to which a validation's exchanges do not belong.
        if self.training:
            self._asked_2C += request.needs.of_cells
            self._factor_bytes = 0 if request.needs.factors is None else request.needs.factors.element_size()
        ids.ahead[self] = request, _SendVectors.apply(self.weight, request, self)

    def _pool(self, ids: SparseIds, offsets: Tensor | None, bag_N: Tensor | None, weights_N: Tensor | None) -> Tensor:
        if not isinstance(ids.ahead.get(self), tuple):
            self.start(ids)
        request, anchor = ids.ahead.pop(self)
        rows_UD = self._received(request.vectors)
        # By now it is known how many ids of the next batch each rank is to get.
        if self._announced is not None:
            self._send_ids(self._announced)
            self._announced = None
        if (bags := request.needs.bags) is not None:
            offsets, bag_N, weights_N = bags.offsets, bags.bags, bags.factors
        return pool_rows(
            anchor, rows_UD, request.needs.lookups, offsets, bag_N, weights_N, partial(self._send_gradients, request)
        )

    def over_ranks(self, value: Tensor) -> Tensor:
        """See EmbeddingLookup.over_ranks."""
        return self.ranks.sum(value)

    def measure(self) -> Traffic:
        """What training's exchanges came to since the last call; all ranks call it together."""
        ranks = self.ranks.ranks
        asked = np.stack(self.ranks.all_gather(self._asked_2C.cpu().numpy().copy())).reshape(ranks, 2, ranks, -1)
        """Of each rank, units and entries that it asked for, of each rank and table."""
        away_W2WF = asked * ~np.eye(ranks, dtype=bool)[:, None, :, None]
        value_bytes = self.width * (self._wire or self.weight.dtype).itemsize
        entry_bytes = self.rows.table_offsets.element_size() + self._factor_bytes
        values_WWF, ids_WWF = away_W2WF[:, 0] * float(value_bytes), away_W2WF[:, 1] * float(entry_bytes)
        # Ids and gradients are sent by the rank that needs a row, vectors by the one that holds it.
        sent_W = (ids_WWF + values_WWF).sum((1, 2)) + values_WWF.sum((0, 2))
        moved_F = (ids_WWF + 2 * values_WWF).sum((0, 1))
        rows_WF = asked[:, 0].sum(0)
        seconds, self._seconds = self._seconds, 0.0
        self._asked_2C.zero_()
        return Traffic(
            seconds=seconds,
            sent_bytes=sent_W,
            tables={
                table.name: TableTraffic(rows=rows_WF[:, i].astype(float), bytes=float(moved_F[i]))
                for i, table in enumerate(self.tables)
            },
        )

    def extra_repr(self) -> str:
        return f"pieces={len(self.pieces)}, rows={self.weight.shape[0]}, width={self.width}"

    def _send_ids(self, request: Request) -> None:
        start = time.perf_counter()
        request.send_ids()
        self._count(start)

    def _send_vectors(self, request: Request) -> None:
        self._send_ids(request)
        start = time.perf_counter()
        self._await(request)
        self._count(start)
        request.vectors = self.ranks.all_to_all(self._on_wire(self._units(request)), request.asked, request.asks)

    def _await(self, request: Request) -> None:
        """Waits until what is asked for is known, and at hand."""
        _ = request.here

    def _units(self, request: Request) -> Tensor:
        """[V, D]: the rows, or the sums of them, that the ranks need."""
        return sum_units(self.weight.detach(), request.here.rows, request.here)

    def _send_gradients(self, request: Request, values_UD: Tensor) -> None:
        # A rank's loss is ranks x its part of the mean over the global batch: DDP averages the dense
        # gradients, and here they are summed.
        values_UD = self._on_wire(values_UD.div_(self.ranks.ranks))
        request.gradients = self.ranks.all_to_all(values_UD, request.asks, request.asked)

    def _take_gradients(self, request: Request) -> None:
        asked, grad_VD = request.here, self._received(request.gradients)
        self.add_gradient(RowGradient.from_lookups(asked.rows, grad_VD, asked.units, asked.factors))

    def _on_wire(self, values: Tensor) -> Tensor:
        return values if self._wire is None else values.to(self._wire)

    def _received(self, values: AsyncCollective | None) -> Tensor:
        assert values is not None
        start = time.perf_counter()
        arrived = values.wait()
        self._count(start)
        return arrived.to(torch.promote_types(arrived.dtype, self.weight.dtype))

    def _count(self, start: float) -> None:
        if self.training:
            self._seconds += time.perf_counter() - start


def sum_units(weight_RD: Tensor, rows_E: Tensor, asked: Asked) -> Tensor:
    """[V, D]: of the rows of ``weight_RD`` that stand for those asked for, each one or their sums."""
    if asked.starts is None:
        return weight_RD.index_select(0, rows_E)
    factors_E = None if asked.factors is None else asked.factors.to(weight_RD.dtype)
    starts_V = asked.starts.to(rows_E.dtype)
    return functional.embedding_bag(rows_E, weight_RD, starts_V, mode="sum", per_sample_weights=factors_E)


class _SendVectors(torch.autograd.Function):
    """Begins the exchange of vectors; its backward pass is the end of that of gradients, a RowGradient.

    What it returns is the anchor of ``pool_rows``.
    """

    @staticmethod
    def forward(ctx: Any, weight_RD: Tensor, request: Request, owner: ShardedTables) -> Tensor:
        ctx.owner, ctx.request = owner, request
        owner._send_vectors(request)
        return weight_RD.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.owner._take_gradients(ctx.request)
        return None, None, None
