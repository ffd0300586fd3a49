"""Embedding tables before they are allocated, pieces of their rows, their memory, and their initial rows.

Shape suffixes: D table width, R rows of all tables held in one parameter, N looked-up rows, U unique rows.
"""

import contextlib
import ctypes
import hashlib
import mmap
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lightning_dlrm.contracts.errors import require

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt, in malloc.h
_LARGEST_MMAP_THRESHOLD = 2**25  # of glibc
_LARGE_PAGE_BYTES = 2**21


def empty_table(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Return an uninitialized tensor; on a CPU under Linux it uses pages of 2 MiB if the system has them.

    Lookups read scattered rows: with pages of 4 KiB most of them also miss the processor's cache of page addresses
    (TLB).

    Args:
        shape: the first dimension is the rows.
        dtype: dtype of the elements.
        device: None for torch's default device.
    """
    device = torch.get_default_device() if device is None else device
    table = torch.empty(shape, dtype=dtype, device="meta")
    if device.type != "cpu" or table.nbytes < _LARGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, table.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # The Linux kernel may be built without large pages.
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=table.numel()).view(*shape)


def gather_rows(weight_RD: Tensor, rows_N: Tensor) -> Tensor:
    """Return ``weight_RD[rows_N]``: [N, D].

    On a CPU this calls ``embedding_bag`` with bags of one row, whose kernel prefetches rows: it takes less than half
    the time of ``index_select`` for rows scattered over a large table.
    """
    if weight_RD.device.type != "cpu" or weight_RD.dtype == torch.float64:
        return weight_RD.index_select(0, rows_N)
    starts_N = torch.arange(len(rows_N), dtype=rows_N.dtype, device="cpu")
    return functional.embedding_bag(rows_N, weight_RD, starts_N, mode="sum")


def put_rows(weight: Tensor, rows_U: Tensor, values: Tensor) -> None:
    """Set ``weight[rows_U] = values`` for unique rows, in place; both are contiguous.

    On a CPU, torch copies element by element. Large copies of aligned rows use elements of 16 bytes, which takes two
    thirds of the time with 64 floats in a row.
    """
    if weight.device.type == "cpu" and values.nbytes >= 2**20 and weight.dim() == 2:
        at_16_bytes = weight.storage_offset() == values.storage_offset() == 0
        if at_16_bytes and values.stride(0) * values.element_size() % 16 == 0:
            weight, values = weight.view(torch.complex128), values.view(torch.complex128)
    weight.index_copy_(0, rows_U, values)


def keep_freed_memory() -> None:
    """Make glibc keep the memory of freed temporary tensors, up to 32 MiB each, for the next step.

    Otherwise the system would clear and map every page again in each step.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


BLOCK_ROWS = 65_536
"""Rows of a block: initial rows are drawn block by block, so that each rank can draw its own pieces."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table before its rows are allocated.

    Its initial rows are ``given``, or drawn from U(centre - bound, centre + bound), or with a ``deviation`` from
    N(centre, deviation^2). Drawn rows are a function of (seed, name, block of rows), so that every rank draws the same
    rows.

    Raises:
        UserError: there is no row ``zero_row``.
    """

    name: str
    """``C3`` for the vectors of column C3; ``C3/linear`` and the like for further tables of the column."""
    rows: int
    bound: float
    centre: float = 0.0
    deviation: float | None = None
    """Standard deviation of a normal distribution, which replaces the uniform one."""
    zero_row: int | None = None
    """The row that starts at zero in any case."""
    given: Tensor | None = None
    """[rows, D]: the initial rows, if they are not drawn."""

    def __post_init__(self) -> None:
        require(
            self.zero_row is None or self.zero_row < max(self.rows, 1),
            f"tables.padding_row is {self.zero_row}, and table {self.name} has {self.rows} rows; expected a row "
            f"that every table has, here at most {max(self.rows, 1) - 1}",
        )

    @staticmethod
    def of_column(name: str, rows: int) -> "Table":
        """Return a table that starts U(-1/sqrt(rows), 1/sqrt(rows)), as in the code of Naumov et al. 2019."""
        return Table(name=name, rows=rows, bound=rows**-0.5 if rows > 0 else 0.0)


@dataclass(frozen=True, kw_only=True)
class TablePiece:
    """A range of a table's rows and its place in the parameter that holds them."""

    name: str
    """The table's name, such as ``C3``."""
    table_rows: int
    """Rows of the whole table."""
    start: int
    """The piece's first row of the table."""
    stop: int
    """The row of the table after the piece's last row."""
    offset: int
    """The row of the parameter that holds row ``start`` of the table."""

    @property
    def rows(self) -> int:
        """The number of rows in the piece."""
        return self.stop - self.start

    def of(self, tensor: Tensor) -> Tensor:
        """Return a view of the piece's rows of a tensor whose first dimension is the parameter's rows."""
        return tensor[self.offset : self.offset + self.rows]


def fill_initial_rows(weight_RD: Tensor, tables: Sequence[Table], pieces: Sequence[TablePiece], seed: int) -> None:
    """Write the initial rows of pieces of tables.

    A row's values are a function of (seed, table, block of 65,536 rows), and do not depend on the piece.

    Args:
        weight_RD: parameter that holds each piece at its offset.
        tables: tables of the pieces.
        pieces: the pieces to write.
        seed: seed of all tables.
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
        elif not (table.bound if table.deviation is None else table.deviation):
            out.fill_(table.centre)
        else:
            digest = hashlib.sha256(f"{seed}/{table.name}/{block}".encode()).digest()
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:4], "little"))
            values = torch.empty(block_stop - block_start, width, dtype=torch.float32, device="cpu")
            if table.deviation is None:
                values.uniform_(table.centre - table.bound, table.centre + table.bound, generator=generator)
            else:
                values.normal_(table.centre, table.deviation, generator=generator)
            out.copy_(values[start - block_start : stop - block_start])
        if table.zero_row is not None and start <= table.zero_row < stop:
            out[table.zero_row - start] = 0

    jobs = [
        (piece, block)
        for piece in pieces
        for block in range(piece.start // BLOCK_ROWS, (piece.stop - 1) // BLOCK_ROWS + 1)
        if piece.stop > piece.start
    ]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(lambda job: fill(*job), jobs):
            pass
