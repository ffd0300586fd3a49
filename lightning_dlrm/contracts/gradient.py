"""The gradient of table rows, which lookups make and optimizers apply.

Shape suffixes: D table width, U unique rows.
"""

from collections.abc import Iterator

from torch import Tensor

_BLOCK_BYTES = 2**21
"""Bytes of a block of values, which are summed and applied together: the block stays in the processor's caches."""


class RowGradient:
    """The gradient of a parameter [R, D] of which few rows were looked up.

    Every RowGradient obeys these rules:

    - It is the gradient of the mean loss over the *global* batch.
    - ``rows`` are unique and ascending; each rank de-duplicates its rows before any exchange.
    - Gradients of micro-batches add up, and are de-duplicated again.
    - In the global norm a row counts once, with its summed gradient.
    - L2 and weight decay apply only to the rows of the gradient.

    Args:
        rows: int64 [U], unique, ascending.
        values: [U, D], the summed gradient of each row; float32 at least.
    """

    def __init__(self, rows: Tensor, values: Tensor) -> None:
        self._rows, self._values = rows, values

    @property
    def rows(self) -> Tensor:
        """int64 [U], unique, ascending."""
        return self._rows

    @property
    def values(self) -> Tensor:
        """[U, D], the summed gradient of each row; float32 at least."""
        return self._values

    def blocks(self) -> "Iterator[RowGradient]":
        """Yield the gradient in blocks of rows, which fit in the caches of a CPU."""
        rows, values = self.rows, self.values
        size = rows_per_block(len(rows), values)
        for block_rows, block_values in zip(rows.split(size), values.split(size), strict=True):
            yield RowGradient(block_rows, block_values)

    def squared_norm(self) -> Tensor:
        """Return the sum of squares, 0-dim."""
        return self.values.square().sum()


def rows_per_block(rows: int, vectors: Tensor) -> int:
    """Return the number of rows of a block, 1 at least.

    Args:
        rows: rows of the whole gradient. They are one block on devices other than a CPU, and if two blocks would hold
            them.
        vectors: [n, D], vectors of the gradient's width, dtype and device.
    """
    if vectors.device.type != "cpu":
        return max(rows, 1)
    size = max(_BLOCK_BYTES // max(vectors.shape[1] * vectors.element_size(), 1), 1)
    return size if rows > 2 * size else max(rows, 1)
