"""Embedding tables in pieces on all ranks: the sharded twin of ``EmbeddingTables``.

A rank asks the owners for the distinct rows that its samples need, gets their vectors back, and in
the backward pass sends each row's summed gradient to its owner, who sums over the ranks.

Everything travels while something else is computed: the ids of an announced batch during the one before
it, vectors during the dense layers between ``start`` and ``forward``, gradients during the backward pass
of those layers. All of it is begun by the ranks' main threads at the same points of a step, so that
every rank makes the same calls in the same order.

Shape suffixes: B samples, F tables, D width, R rows held here, N indices of all bags, P pieces, W ranks,
U distinct rows that this rank needs, Q rows that all ranks ask of this one.
"""

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.lookup import EmbeddingLookup, RowGradient, SortedLookups, Table, TablePiece
from lightning_dlrm.models.memory import empty_table
from lightning_dlrm.models.pooling import pool_rows
from lightning_dlrm.models.tables import EmbeddingTables, fill_initial_rows
from lightning_dlrm.sharding.collectives import Ranks, Travelling
from lightning_dlrm.sharding.plan import Plan


class Request:
    """The rows that this rank needs for a batch, and those that it is asked for, as far as they are known.

    Args:
        lookups: of this rank's indices; rows are numbered rank after rank, as they lie there.
        at_owner_U: the same rows as their owners number them.
        asks_P: how many rows of each piece this rank needs.
        asks_W: how many rows of each rank.
        ranks: who takes part.
    """

    def __init__(
        self, lookups: SortedLookups, at_owner_U: Tensor, asks_P: Tensor, asks_W: Tensor, ranks: Ranks
    ) -> None:
        self.lookups = lookups
        self.asks_P = asks_P
        self._at_owner_U, self._asks_W, self._ranks = at_owner_U, asks_W, ranks
        self._counts = ranks.all_to_all_counts(asks_W)
        self._ids: Travelling | None = None
        self.asks: list[int] = []
        """How many rows of each rank this one needs; known once the ids are sent."""
        self.asked: list[int] = []
        """How many rows held here each rank needs; likewise."""
        self.vectors: Travelling | None = None
        self.gradients: Travelling | None = None

    def send_ids(self) -> None:
        """Begins to tell the owners which rows are needed, where that has not begun."""
        if self._ids is None:
            self.asks, self.asked = torch.stack([self._asks_W, self._counts.arrived()]).tolist()
            self._ids = self._ranks.all_to_all(self._at_owner_U, self.asks, self.asked)

    @property
    def rows(self) -> Tensor:
        """[Q]: the rows of ``weight`` that the ranks need, rank after rank; waits for them."""
        assert self._ids is not None
        return self._ids.arrived()


@dataclass(frozen=True, kw_only=True)
class TableTraffic:
    """What one table's exchanges in training came to, over all ranks."""

    rows: NDArray
    """[W]: distinct rows of each rank's slices that each rank was asked for."""
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


class ShardedTables(EmbeddingLookup):
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

    table_offsets: Tensor
    piece_starts: Tensor
    piece_shifts: Tensor
    piece_bounds: Tensor
    rank_starts: Tensor
    rank_bounds: Tensor

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
        held: list[list[TablePiece]] = [[] for _ in range(plan.ranks)]
        rows_held = [0] * plan.ranks
        table_offsets, piece_starts, owners, offsets = [], [], [], []
        total = 0
        for table in tables:
            table_offsets.append(total)
            for piece in plan.tables[table.name]:
                offset = rows_held[piece.rank]
                held[piece.rank].append(
                    TablePiece(
                        name=table.name, table_rows=table.rows, start=piece.start, stop=piece.stop, offset=offset
                    )
                )
                piece_starts.append(total + piece.start)
                owners.append(piece.rank)
                offsets.append(offset)
                rows_held[piece.rank] += piece.rows
            total += table.rows
        self.pieces = tuple(held[ranks.rank])
        self.all_pieces = tuple((rank, piece) for rank, of_rank in enumerate(held) for piece in of_rank)
        """The pieces of all ranks and their ranks, rank after rank, as they lie there."""
        self._seconds = 0.0
        # Counted on the device, where nobody waits for it.
        self._asked_P = torch.zeros(len(self.all_pieces), dtype=torch.int64, device=device)
        rank_starts = [0, *itertools.accumulate(rows_held)]
        shifts = [
            rank_starts[owner] + offset - start
            for owner, offset, start in zip(owners, offsets, piece_starts, strict=True)
        ]
        # int32 halves the time to sort rows; it reaches past any published table set.
        index = torch.int32 if total <= torch.iinfo(torch.int32).max else torch.int64
        for buffer, values in (
            ("table_offsets", table_offsets),
            ("piece_starts", piece_starts),
            ("piece_shifts", shifts),
            ("piece_bounds", [*(rank_starts[rank] + piece.offset for rank, piece in self.all_pieces), rank_starts[-1]]),
            ("rank_starts", rank_starts),
            ("rank_bounds", [0, *itertools.accumulate(map(len, held))]),
        ):
            self.register_buffer(buffer, torch.tensor(values, dtype=index, device=device), persistent=False)
        weight_RD = empty_table((rows_held[ranks.rank], width), dtype, torch.device(device))
        self.weight = nn.Parameter(weight_RD, requires_grad=trainable)
        fill_initial_rows(weight_RD, self.tables, self.pieces, seed)

    @staticmethod
    def of(
        tables: EmbeddingTables,
        plan: Plan,
        ranks: Ranks,
        wire: torch.dtype | None,
        device: torch.device,
    ) -> "ShardedTables":
        """Takes the place of tables that were built under ``rows_elsewhere``."""
        weight = tables.weight
        return ShardedTables(
            tables.tables, tables.width, tables.seed, plan, ranks, wire, weight.dtype, device, weight.requires_grad
        )

    def announce(self, ids: SparseIds) -> None:
        """See EmbeddingLookup.announce."""
        device = self.table_offsets.device
        here = ids.map(lambda tensor: None if tensor is None else tensor.to(device, non_blocking=True))
        self._announced = ids.ahead[self] = self._ask(here)

    def start(self, ids: SparseIds) -> None:
        """See EmbeddingLookup.start."""
        request = ids.ahead.pop(self, None) or self._ask(ids)
        # Figures are divided by training steps, to which a validation's exchanges do not belong.
        if self.training:
            self._asked_P += request.asks_P
        ids.ahead[self] = request, _SendVectors.apply(self.weight, request, self)

    def forward(self, ids: SparseIds) -> Tensor:
        """See EmbeddingLookup.forward."""
        bag_N = None if ids.offsets is None else ids.bag_of_each()
        weights_N = None if ids.weights is None else ids.weights.reshape(-1)
        return self._pool(ids, ids.offsets, bag_N, weights_N).view(len(ids), ids.tables, self.width)

    def each(self, ids: SparseIds) -> Tensor:
        """See EmbeddingLookup.each."""
        return self._pool(ids, None, None, None)

    def _pool(self, ids: SparseIds, offsets: Tensor | None, bag_N: Tensor | None, weights_N: Tensor | None) -> Tensor:
        if not isinstance(ids.ahead.get(self), tuple):
            self.start(ids)
        request, anchor = ids.ahead.pop(self)
        rows_UD = self._received(request.vectors)
        # By now it is known how many ids of the next batch each rank is to get.
        if self._announced is not None:
            self._send_ids(self._announced)
            self._announced = None
        return pool_rows(
            anchor, rows_UD, request.lookups, offsets, bag_N, weights_N, partial(self._send_gradients, request)
        )

    def over_ranks(self, value: Tensor) -> Tensor:
        """See EmbeddingLookup.over_ranks."""
        return self.ranks.sum(value)

    def measure(self) -> Traffic:
        """What training's exchanges came to since the last call; all ranks call it together."""
        asked_WP = np.stack(self.ranks.all_gather(self._asked_P.cpu().numpy().copy()))
        owner_P = np.array([rank for rank, _ in self.all_pieces])
        away_WP = asked_WP * (owner_P != np.arange(self.ranks.ranks)[:, None])
        value_bytes = self.width * (self._wire or self.weight.dtype).itemsize
        id_bytes = self.table_offsets.element_size()
        # Ids and gradients are sent by the rank that needs a row, vectors by the one that holds it.
        sent_W = away_WP.sum(1) * float(id_bytes + value_bytes)
        np.add.at(sent_W, owner_P, away_WP.sum(0) * value_bytes)
        rows = {table.name: np.zeros(self.ranks.ranks) for table in self.tables}
        moved = dict.fromkeys(rows, 0.0)
        for i, (rank, piece) in enumerate(self.all_pieces):
            rows[piece.name][rank] += asked_WP[:, i].sum()
            moved[piece.name] += float(away_WP[:, i].sum()) * (id_bytes + 2 * value_bytes)
        seconds, self._seconds = self._seconds, 0.0
        self._asked_P.zero_()
        return Traffic(
            seconds=seconds,
            sent_bytes=sent_W,
            tables={name: TableTraffic(rows=rows[name], bytes=moved[name]) for name in rows},
        )

    def extra_repr(self) -> str:
        return f"pieces={len(self.pieces)}, rows={self.weight.shape[0]}, width={self.width}"

    def _ask(self, ids: SparseIds) -> Request:
        """Finds out which rows a batch needs, and begins to tell each rank how many of its own."""
        if ids.offsets is None:
            rows_N = (ids.values + self.table_offsets).view(-1)
        else:
            rows_N = ids.values + self.table_offsets[ids.bag_of_each() % max(ids.tables, 1)]
        # The number of each index's row, counted rank after rank.
        piece_N = torch.searchsorted(self.piece_starts, rows_N, right=True, out_int32=True) - 1
        lookups = SortedLookups.of(rows_N + self.piece_shifts.index_select(0, piece_N))
        bounds_P = torch.searchsorted(lookups.rows, self.piece_bounds)
        asks_W = bounds_P.index_select(0, self.rank_bounds).diff()
        at_owner_U = lookups.rows - torch.repeat_interleave(self.rank_starts[:-1], asks_W)
        return Request(lookups, at_owner_U, bounds_P.diff(), asks_W, self.ranks)

    def _send_ids(self, request: Request) -> None:
        start = time.perf_counter()
        request.send_ids()
        self._count(start)

    def _send_vectors(self, request: Request) -> None:
        self._send_ids(request)
        start = time.perf_counter()
        rows = request.rows
        self._count(start)
        vectors = self.weight.detach().index_select(0, rows)
        request.vectors = self.ranks.all_to_all(self._on_wire(vectors), request.asked, request.asks)

    def _send_gradients(self, request: Request, values_UD: Tensor) -> None:
        # A rank's loss is ranks x its part of the mean over the global batch: DDP averages the dense
        # gradients, and here they are summed.
        values_UD = self._on_wire(values_UD.div_(self.ranks.ranks))
        request.gradients = self.ranks.all_to_all(values_UD, request.asks, request.asked)

    def _take_gradients(self, request: Request) -> None:
        self.add_gradient(RowGradient.from_lookups(request.rows, self._received(request.gradients)))

    def _on_wire(self, values: Tensor) -> Tensor:
        return values if self._wire is None else values.to(self._wire)

    def _received(self, values: Travelling | None) -> Tensor:
        assert values is not None
        start = time.perf_counter()
        arrived = values.arrived()
        self._count(start)
        return arrived.to(torch.promote_types(arrived.dtype, self.weight.dtype))

    def _count(self, start: float) -> None:
        if self.training:
            self._seconds += time.perf_counter() - start


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
