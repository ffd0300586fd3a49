"""Embedding tables before they are allocated, pieces of their rows, and their initial rows.

Shape suffixes: D table width, R rows of all tables held in one parameter.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_ROWS = 65_536
"""Rows of a block: initial rows are drawn block by block, so that each rank can draw its own pieces."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table before its rows are allocated.

    Its initial rows are ``given``, or drawn from U(centre - bound, centre + bound). Drawn rows are a function of (seed,
    name, block of rows), so that every rank draws the same rows.
    """

    name: str
    """``C3`` for the vectors of column C3; ``C3/linear`` and the like for further tables of the column."""
    rows: int
    bound: float
    centre: float = 0.0
    given: Tensor | None = None
    """[rows, D]: the initial rows, if they are not drawn."""

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
