"""Embedding tables in pieces on all ranks: the sharded twin of ``EmbeddingTables``.

A rank asks the owners for the distinct rows that its samples need, gets their vectors back, and in
the backward pass sends each row's summed gradient to its owner, who sums over the ranks.

Shape suffixes: B samples, F tables, D width, R rows held here, N indices of all bags, P pieces,
U distinct rows that this rank needs, Q rows that all ranks ask of this one.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.lookup import EmbeddingLookup, RowGradient, SortedLookups, Table, TablePiece
from lightning_dlrm.models.memory import empty_table
from lightning_dlrm.models.tables import EmbeddingTables, fill_initial_rows
from lightning_dlrm.sharding.collectives import Ranks
from lightning_dlrm.sharding.plan import Plan


@dataclass(frozen=True)
class Request:
    """The rows that this rank needs, and those that it is asked for."""

    lookups: SortedLookups
    """Of this rank's indices; rows are numbered rank after rank, as they lie there."""
    asks: list[int]
    """How many rows of each rank this one needs."""
    asked: list[int]
    """How many rows held here each rank needs."""
    rows: Tensor
    """[Q]: the rows of ``weight`` that the ranks need, rank after rank."""


@dataclass
class Traffic:
    """What the exchanges of training came to on this rank, since they were last looked at."""

    sent_bytes: float = 0.0
    """To other ranks: ids, vectors and gradients."""
    rows: float = 0.0
    """Rows held here that all ranks asked for: the work of this rank."""
    seconds: float = 0.0
    """In exchanges, waiting for slower ranks included. On a GPU, of what the host waits for only."""


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

    table_offsets: Tensor
    piece_starts: Tensor
    piece_shifts: Tensor
    rank_starts: Tensor

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
        self.traffic = Traffic()
        self._wire = wire
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
            ("rank_starts", rank_starts),
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

    def forward(self, ids: SparseIds) -> Tensor:
        """See EmbeddingLookup.forward."""
        bag_N = None if ids.offsets is None else ids.bag_of_each()
        weights_N = None if ids.weights is None else ids.weights.reshape(-1)
        request = self._ask(self._number(ids, bag_N))
        vectors = _LookUpPieces.apply(self.weight, request, ids.offsets, bag_N, weights_N, self)
        return vectors.view(len(ids), ids.tables, self.width)

    def each(self, ids: SparseIds) -> Tensor:
        """See EmbeddingLookup.each."""
        request = self._ask(self._number(ids, None if ids.offsets is None else ids.bag_of_each()))
        return _LookUpPieces.apply(self.weight, request, None, None, None, self)

    def squared_gradient_norm(self) -> Tensor:
        """See EmbeddingLookup.squared_gradient_norm."""
        return self.ranks.sum(super().squared_gradient_norm())

    def extra_repr(self) -> str:
        return f"pieces={len(self.pieces)}, rows={self.weight.shape[0]}, width={self.width}"

    def _number(self, ids: SparseIds, bag_N: Tensor | None) -> Tensor:
        """[N]: the number of each index's row, counted rank after rank."""
        if bag_N is None:
            rows_N = (ids.values + self.table_offsets).view(-1)
        else:
            rows_N = ids.values + self.table_offsets[bag_N % max(ids.tables, 1)]
        piece_N = torch.searchsorted(self.piece_starts, rows_N, right=True, out_int32=True) - 1
        return rows_N + self.piece_shifts.index_select(0, piece_N)

    def _ask(self, numbers_N: Tensor) -> Request:
        """The exchange of ids: each rank hears which of its rows are needed."""
        lookups = SortedLookups.of(numbers_N)
        bounds = torch.searchsorted(lookups.rows, self.rank_starts)
        asks_W = bounds.diff()
        at_owner_U = lookups.rows - torch.repeat_interleave(self.rank_starts[:-1], asks_W)
        start = time.perf_counter()
        asks, asked = torch.stack([asks_W, self.ranks.all_to_all_counts(asks_W)]).tolist()
        self._count(start, rows=sum(asked))
        return Request(lookups, asks, asked, self._exchange(at_owner_U, asks, asked))

    def _send(self, values: Tensor, sent: list[int], received: list[int]) -> Tensor:
        on_wire = values if self._wire is None else values.to(self._wire)
        return self._exchange(on_wire, sent, received).to(values.dtype)

    def _exchange(self, values: Tensor, sent: list[int], received: list[int]) -> Tensor:
        start = time.perf_counter()
        arrived = self.ranks.all_to_all(values, sent, received)
        to_others = sum(sent) - sent[self.ranks.rank]
        self._count(start, sent_bytes=to_others * values[:1].numel() * values.element_size())
        return arrived

    def _count(self, start: float, rows: int = 0, sent_bytes: int = 0) -> None:
        # Figures are divided by training steps, to which a validation's exchanges do not belong.
        if self.training:
            self.traffic.seconds += time.perf_counter() - start
            self.traffic.rows += rows
            self.traffic.sent_bytes += sent_bytes


class _LookUpPieces(torch.autograd.Function):
    """The exchange of vectors; in the backward pass that of gradients, which ends in a RowGradient."""

    @staticmethod
    def forward(
        ctx: Any,
        weight_RD: Tensor,
        request: Request,
        offsets: Tensor | None,
        bag_N: Tensor | None,
        weights_N: Tensor | None,
        owner: ShardedTables,
    ) -> Tensor:
        ctx.owner, ctx.request = owner, request
        vectors_UD = owner._send(weight_RD.index_select(0, request.rows), request.asked, request.asks)
        positions_N = request.lookups.positions()
        # The vectors are needed once more in the backward pass where the factors are learned.
        ctx.save_for_backward(
            bag_N, weights_N, *((vectors_UD, positions_N) if ctx.needs_input_grad[4] else (None, None))
        )
        if weights_N is not None:
            weights_N = weights_N.to(vectors_UD.dtype)
        if offsets is None:
            vectors = vectors_UD.index_select(0, positions_N)
            return vectors if weights_N is None else vectors * weights_N[:, None]
        return functional.embedding_bag(
            positions_N, vectors_UD, offsets, mode="sum", per_sample_weights=weights_N, include_last_offset=True
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None, Tensor | None, None]:
        owner, request = ctx.owner, ctx.request
        bag_N, weights_N, vectors_UD, positions_N = ctx.saved_tensors
        grad_BD = grads[0].contiguous()
        if ctx.needs_input_grad[0]:
            values_UD = request.lookups.sum_gradients(grad_BD, bag_N, weights_N)
            # A rank's loss is ranks x its part of the mean over the global batch: DDP averages the dense
            # gradients, and here they are summed.
            values_QD = owner._send(values_UD.div_(owner.ranks.ranks), request.asks, request.asked)
            owner.add_gradient(RowGradient.from_lookups(request.rows, values_QD))
        grad_weights_N = None
        if vectors_UD is not None:
            grad_ND = grad_BD if bag_N is None else grad_BD.index_select(0, bag_N)
            grad_weights_N = (vectors_UD.index_select(0, positions_N) * grad_ND).sum(1).to(weights_N.dtype)
        return None, None, None, None, grad_weights_N, None
