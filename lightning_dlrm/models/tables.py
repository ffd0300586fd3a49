"""Embedding tables of one width, fused into one parameter: one lookup, one update.

Shape suffixes: B samples, F tables, D width, R rows of all tables, N indices of all bags.
"""

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.lookup import EmbeddingLookup, RowGradient, TablePiece

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
    """Whole tables, held here.

    Args:
        tables: name -> rows, in the order of the ids of a batch.
        width: D, the length of every vector.
        seed: of the initial rows.

    Raises:
        UserError: no width, or a table without rows.
    """

    row_offsets: Tensor

    def __init__(self, tables: Mapping[str, int], width: int, seed: int = 0) -> None:
        super().__init__()
        if width < 1:
            raise UserError(f"embedding_dim is {width}; expected at least 1")
        empty = [name for name, rows in tables.items() if rows < 1]
        if empty:
            raise UserError(f"tables without rows: {', '.join(empty)}; every table needs at least 1 row")
        self.width = width
        self.seed = seed
        pieces, total = [], 0
        for name, rows in tables.items():
            pieces.append(TablePiece(name=name, table_rows=rows, start=0, stop=rows, offset=total))
            total += rows
        self.pieces = tuple(pieces)
        self.weight = nn.Parameter(torch.empty(total, width, device="meta" if _rows_elsewhere.get() else None))
        # int32 halves the time to sort rows; it reaches past any published table set.
        dtype = torch.int32 if total <= torch.iinfo(torch.int32).max else torch.int64
        self.register_buffer("row_offsets", torch.tensor([p.offset for p in pieces], dtype=dtype), persistent=False)
        if not self.weight.is_meta:
            fill_initial_rows(self.weight.data, self.pieces, seed)

    def forward(self, ids: SparseIds) -> Tensor:
        """See EmbeddingLookup.forward."""
        if ids.offsets is None:
            rows_BF = ids.values + self.row_offsets
            vectors = _LookupRows.apply(self.weight, rows_BF.view(-1), None, _flat(ids.weights), None, self)
        else:
            bag_N = torch.repeat_interleave(ids.offsets.diff())
            rows_N = ids.values + self.row_offsets[bag_N % max(ids.tables, 1)]
            vectors = _LookupRows.apply(self.weight, rows_N, ids.offsets, ids.weights, bag_N, self)
        return vectors.view(len(ids), ids.tables, self.width)

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
        ctx.save_for_backward(rows_N, bag_N, weights_N)
        if offsets is None:
            vectors = weight_RD.index_select(0, rows_N)
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
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None, None, None]:
        rows_N, bag_N, weights_N = ctx.saved_tensors
        ctx.owner.add_gradient(RowGradient.from_lookups(rows_N, grads[0].contiguous(), bag_N, weights_N))
        return None, None, None, None, None, None


def fill_initial_rows(weight_RD: Tensor, pieces: tuple[TablePiece, ...], seed: int) -> None:
    """Writes initial rows U(-1/sqrt(n), 1/sqrt(n)), n being the rows of the whole table.

    Row values are a function of (seed, table name, block of 65,536 rows), whatever piece holds
    them. The distribution is that of the code published with Naumov et al. 2019.
    """
    width = weight_RD.shape[1]

    def fill(piece: TablePiece, block: int) -> None:
        digest = hashlib.sha256(f"{seed}/{piece.name}/{block}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:4], "little"))
        bound = piece.table_rows**-0.5
        block_start = block * BLOCK_ROWS
        rows = min(BLOCK_ROWS, piece.table_rows - block_start)
        values = torch.empty(rows, width, dtype=torch.float32, device="cpu").uniform_(
            -bound, bound, generator=generator
        )
        start, stop = max(piece.start, block_start), min(piece.stop, block_start + rows)
        offset = piece.offset - piece.start
        weight_RD[start + offset : stop + offset].copy_(values[start - block_start : stop - block_start])

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
