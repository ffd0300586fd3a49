"""The input of a lookup: rows of a matrix, grouped by bags; and the source of the matrix.

Shape suffixes: B bags (output vectors), F tables, D width, R rows of a matrix, N indices of all bags.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dlrm.tables.gradients import LookupGradient, SortedLookups


class RowRequest(NamedTuple):
    """Rows of a matrix and the bags in which they are summed."""

    values: Tensor
    """int32 or int64 [N], or one-hot [B / F, F]: the id of each index within its table."""
    row_offsets: Tensor
    """int32 or int64 [F]: the first row of each table; bag b is of table b % F."""
    offsets: Tensor | None
    """int64 [B + 1]: where each bag begins, and the end of the last bag; None if each index is a bag."""
    factors: Tensor | None
    """[N], or the shape of ``values``: per-sample weights, the factors of the rows; None means 1."""

    def rows_and_bags(self) -> tuple[Tensor, Tensor | None]:
        """Return the row of each index [N] and its bag, int64 [N], or None if each index is a bag."""
        values, row_offsets_F, offsets, _ = self
        if offsets is None:
            return (values + row_offsets_F).reshape(-1), None
        bag_N = torch.repeat_interleave(offsets.diff(), output_size=len(values))
        if len(row_offsets_F) > 1:
            row_offsets_F = row_offsets_F[bag_N % len(row_offsets_F)]
        return values + row_offsets_F, bag_N

    @staticmethod
    def of_rows(rows_N: Tensor, offsets: Tensor | None = None, factors: Tensor | None = None) -> "RowRequest":
        """Return a request of rows that are numbered by the matrix."""
        return RowRequest(rows_N, rows_N.new_zeros(1), offsets, factors)


class RowSource(NamedTuple):
    """The matrix that a lookup reads, and the function that takes its gradient."""

    weight: Tensor
    """[R, D]."""
    request: RowRequest
    """Rows of ``weight``."""
    lookups: SortedLookups | None
    """The request's rows, sorted, if they are sorted already; they are then all rows of ``weight``."""
    take_gradient: Callable[[LookupGradient], None]
    """Called by the backward pass with the gradient of the rows of ``weight``."""
