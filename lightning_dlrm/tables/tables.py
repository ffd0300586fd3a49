"""Embedding tables of one width, fused into one parameter: one lookup, one update.

Shape suffixes: B samples, F tables, D width, R rows of all tables, N indices of all bags.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.lookup import EmbeddingLookup, Table, TablePiece, gather_rows
from lightning_dlrm.kernels import native
from lightning_dlrm.kernels.choice import choose
from lightning_dlrm.tables.fused_tables import FusedLookup
from lightning_dlrm.tables.memory import empty_table

BLOCK_ROWS = 65_536
"""Initial rows are drawn block by block, so that any piece of a table can be made anywhere."""


_rows_elsewhere = ContextVar("rows_elsewhere", default=False)


@contextmanager
def rows_elsewhere() -> Iterator[None]:
    """Tables built inside have a weight on the meta device, which takes no memory: something else
    is to take their place."""
    token = _rows_elsewhere.set(True)
    try:
        yield
    finally:
        _rows_elsewhere.reset(token)


class EmbeddingTables(EmbeddingLookup):
    """Tables, held here.

    Args:
        tables: in the order of the ids of a batch.
        width: D, the length of every vector.
        seed: of the initial rows.
        trainable: whether the rows are learned; else they stay as they start.
        ranges: of each table the rows that are held, from the first to the one after the last, whose ids then
            count from the first of them; None for all.

    Raises:
        UserError: no width, or a table without rows.
    """

    row_offsets: Tensor

    def __init__(
        self,
        tables: Sequence[Table],
        width: int,
        seed: int = 0,
        trainable: bool = True,
        ranges: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        super().__init__()
        if width < 1:
            raise UserError(f"embedding_dim is {width}; expected at least 1")
        empty = [table.name for table in tables if table.rows < 1]
        if empty:
            raise UserError(f"tables without rows: {', '.join(empty)}; every table needs at least 1 row")
        self.seed = seed
        pieces, total = [], 0
        for table, (start, stop) in zip(tables, ranges or [(0, table.rows) for table in tables], strict=True):
            pieces.append(TablePiece(name=table.name, table_rows=table.rows, start=start, stop=stop, offset=total))
            total += stop - start
        self.tables = tuple(tables)
        self.pieces = tuple(pieces)
        device = torch.device("meta") if _rows_elsewhere.get() else self._place()
        self.weight = nn.Parameter(
            empty_table((total, width), torch.get_default_dtype(), device), requires_grad=trainable
        )
        # int32 halves the time to sort rows; it reaches past any published table set.
        dtype = torch.int32 if total <= torch.iinfo(torch.int32).max else torch.int64
        self.register_buffer("row_offsets", torch.tensor([p.offset for p in pieces], dtype=dtype), persistent=False)
        if not self.weight.is_meta:
            fill_initial_rows(self.weight.data, self.tables, self.pieces, seed)

    def forward(self, ids: SparseIds) -> Tensor:
        """See EmbeddingLookup.forward."""
        kernels = choose(self.kernels, self.weight.device.type, self.weight.dtype)
        if kernels == "triton":
            vectors = FusedLookup.apply(self.weight, _flat(ids.weights), ids, self.row_offsets, self)
        elif kernels == "native" and ids.values.dtype == self.row_offsets.dtype == torch.int32:
            weights_N = _flat(ids.weights)
            vectors = _LookupIds.apply(self.weight, ids.values, ids.offsets, weights_N, self.row_offsets, self)
        elif ids.offsets is None:
            rows_BF = ids.values + self.row_offsets
            vectors = _LookupRows.apply(self.weight, rows_BF.view(-1), None, _flat(ids.weights), None, self)
        else:
            vectors = _LookupRows.apply(self.weight, self._rows(ids), ids.offsets, ids.weights, ids.bag_of_each(), self)
        return vectors.view(len(ids), ids.tables, self.width)

    def each(self, ids: SparseIds) -> Tensor:
        """See EmbeddingLookup.each."""
        return _LookupRows.apply(self.weight, self._rows(ids), None, None, None, self)

    @staticmethod
    def _place() -> torch.device | None:
        """Where ``weight`` is built; None for torch's default device."""
        return None

    def _rows(self, ids: SparseIds) -> Tensor:
        return ids.values.view(-1) + torch.repeat_interleave(self.row_offsets.repeat(len(ids)), ids.lengths().view(-1))

    def extra_repr(self) -> str:
        return f"tables={len(self.pieces)}, rows={self.weight.shape[0]}, width={self.width}"


class _LookupRows(torch.autograd.Function):
    """Sums rows of ``weight`` by bag; hands the gradient to ``owner`` as a RowGradient.

    ``weight`` itself gets no gradient tensor: a dense one would be as large as all tables.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight_RD: Tensor,
        rows_N: Tensor,
        offsets: Tensor | None,
        weights_N: Tensor | None,
        bag_N: Tensor | None,
        owner: EmbeddingLookup,
    ) -> Tensor:
        ctx.owner = owner
        # Rows are looked up once more in the backward pass where the factors are learned.
        ctx.save_for_backward(rows_N, bag_N, weights_N, weight_RD if ctx.needs_input_grad[3] else None)
        if offsets is None:
            vectors = gather_rows(weight_RD, rows_N)
            return vectors if weights_N is None else vectors * weights_N[:, None].to(vectors.dtype)
        return functional.embedding_bag(
            rows_N,
            weight_RD,
            offsets.to(rows_N.dtype),
            mode="sum",
            per_sample_weights=None if weights_N is None else weights_N.to(weight_RD.dtype),
            include_last_offset=True,
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, Tensor | None, None, None]:
        rows_N, bag_N, weights_N, weight_RD = ctx.saved_tensors
        grad_BD = grads[0].contiguous()
        if ctx.needs_input_grad[0]:
            ctx.owner.add_lookups(rows_N, grad_BD, bag_N, weights_N)
        grad_weights_N = None
        if weight_RD is not None:
            grad_ND = grad_BD if bag_N is None else grad_BD.index_select(0, bag_N)
            grad_weights_N = (weight_RD.index_select(0, rows_N) * grad_ND).sum(1).to(weights_N.dtype)
        return None, None, None, grad_weights_N, None, None


class _LookupIds(torch.autograd.Function):
    """The same of ids, by the native kernel, which finds their rows and bags on the way."""

    backward = _LookupRows.backward

    @staticmethod
    def forward(
        ctx: Any,
        weight_RD: Tensor,
        values_N: Tensor,
        offsets: Tensor | None,
        weights_N: Tensor | None,
        row_offsets_F: Tensor,
        owner: EmbeddingLookup,
    ) -> Tensor:
        vectors_BD, rows_N, bag_N = native.lookup(weight_RD, values_N, offsets, row_offsets_F, weights_N)
        ctx.owner = owner
        ctx.save_for_backward(
            rows_N, None if offsets is None else bag_N, weights_N, weight_RD if ctx.needs_input_grad[3] else None
        )
        return vectors_BD


def fill_initial_rows(weight_RD: Tensor, tables: Sequence[Table], pieces: Sequence[TablePiece], seed: int) -> None:
    """Writes the initial rows of some pieces of the tables.

    Row values are a function of (seed, table, block of 65,536 rows), whatever piece holds them.
    """
    width = weight_RD.shape[1]
    of_name = {table.name: table for table in tables}

    def fill(piece: TablePiece, block: int) -> None:
        table = of_name[piece.name]
        block_start = block * BLOCK_ROWS
        block_stop = min(block_start + BLOCK_ROWS, table.rows)
        start, stop = max(piece.start, block_start), min(piece.stop, block_stop)
        out = weight_RD[start - piece.start + piece.offset : stop - piece.start + piece.offset]
        if table.given is not None:
            out.copy_(table.given[start:stop])
        elif table.bound == 0:
            out.fill_(table.centre)
        else:
            digest = hashlib.sha256(f"{seed}/{table.name}/{block}".encode()).digest()
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:4], "little"))
            values = torch.empty(block_stop - block_start, width, dtype=torch.float32, device="cpu").uniform_(
                table.centre - table.bound, table.centre + table.bound, generator=generator
            )
            out.copy_(values[start - block_start : stop - block_start])

    jobs = [
        (piece, block)
        for piece in pieces
        for block in range(piece.start // BLOCK_ROWS, (piece.stop - 1) // BLOCK_ROWS + 1)
        if piece.stop > piece.start
    ]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(lambda job: fill(*job), jobs):
            pass


def _flat(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.reshape(-1)
