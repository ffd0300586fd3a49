"""The input of a lookup, which is rows of a matrix grouped by bags, and the gradient of its vectors, summed by row.

Shape suffixes: B bags (output vectors), F tables, D width, R rows of a matrix, N indices of all
bags, U unique rows among them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lightning_dlrm.contracts.gradient import RowGradient, rows_per_block


class SortedLookups(NamedTuple):
    """Unique looked-up rows, and the indices that looked up each row."""

    rows: Tensor
    """[U]: the unique rows, ascending."""
    counts: Tensor
    """int64 [U]: number of indices that looked up each row."""
    order: Tensor
    """int64 [N]: the indices, sorted by row."""

    @staticmethod
    def of(rows_N: Tensor) -> "SortedLookups":
        """Sort indices by their rows; indices of the same row keep their order."""
        sorted_rows_N, order_N = torch.sort(rows_N, stable=True)
        rows_U, counts_U = torch.unique_consecutive(sorted_rows_N, return_counts=True)
        return SortedLookups(rows_U, counts_U, order_N)

    def positions(self) -> Tensor:
        """Return the position of each index's row in ``rows``: int32 [N]."""
        numbers_U = torch.arange(len(self.rows), dtype=torch.int32, device=self.order.device)
        numbers_N = torch.repeat_interleave(numbers_U, self.counts, output_size=len(self.order))
        return torch.empty_like(numbers_N).scatter_(0, self.order, numbers_N)


class Segments(NamedTuple):
    """Lookups sorted by row, with the output vectors whose gradients are summed for each row."""

    rows: Tensor
    """int64 [U], unique, ascending."""
    starts: Tensor
    """int64 [U]: where the indices of each row begin."""
    bags: Tensor
    """int64 [N]: the output vector that each index went into."""
    factors: Tensor | None
    """[N]: per-sample weight of each index; None means 1."""

    @staticmethod
    def of(lookups: SortedLookups, bag_N: Tensor | None = None, factors_N: Tensor | None = None) -> "Segments":
        """Return segments of sorted lookups; for the arguments see LookupGradient."""
        return Segments(
            rows=lookups.rows.long(),
            starts=torch.cumsum(lookups.counts, 0) - lookups.counts,
            bags=lookups.order if bag_N is None else bag_N[lookups.order],
            factors=None if factors_N is None else factors_N[lookups.order],
        )

    def sums(self, output_BD: Tensor) -> Tensor:
        """Sum the gradients of the output vectors by row: [U, D]."""
        factors = None if self.factors is None else self.factors.to(output_BD.dtype)
        return functional.embedding_bag(self.bags, output_BD, self.starts, mode="sum", per_sample_weights=factors)

    def blocks(self, size: int) -> "Iterator[Segments]":
        """Yield segments of at most ``size`` rows, one after the other."""
        if len(self.rows) <= size:
            # For a single block, the host does not read its end from the device.
            yield self
            return
        ends = [*self.starts[size::size].tolist(), len(self.bags)]
        start = 0
        for rows, starts, end in zip(self.rows.split(size), self.starts.split(size), ends, strict=True):
            factors = None if self.factors is None else self.factors[start:end]
            yield Segments(rows, starts - start, self.bags[start:end], factors)
            start = end


class Lookups(NamedTuple):
    """A gradient before it is summed by row: gradients of output vectors and the indices that went into them."""

    rows: Tensor
    """[N]: the row of each index, in any order."""
    output: Tensor
    """[B, D], float32 at least: the gradient of each output vector."""
    bags: Tensor | None
    """int64 [N]: the output vector that each index went into; None if index i went into vector i."""
    factors: Tensor | None
    """[N]: per-sample weight of each index; None means 1."""

    @staticmethod
    def of(gradient: RowGradient) -> "Lookups":
        """Return the lookups of a gradient; if it is summed already, there is one index for each row."""
        if isinstance(gradient, LookupGradient) and gradient.unsummed is not None:
            return gradient.unsummed
        return Lookups(gradient.rows, gradient.values, None, None)


class LookupGradient(RowGradient):
    """A RowGradient that is sorted and summed by row only when its rows or values are read.

    If most rows are looked up once, the sums take as much memory as all looked-up vectors. An update by ``blocks``, or
    by a kernel that sums while it updates, never stores them.

    Args:
        rows_N: the row of each index.
        grad_BD: gradient of each output vector.
        bag_N: int64, the output vector that each index went into; None if index i went into vector i.
        factors_N: per-sample weight of each index; None means 1.
        lookups: sorted ``rows_N``, if it is known; else it is sorted when ``rows`` or ``values`` is read.
    """

    def __init__(
        self,
        rows_N: Tensor,
        grad_BD: Tensor,
        bag_N: Tensor | None = None,
        factors_N: Tensor | None = None,
        lookups: SortedLookups | None = None,
    ) -> None:
        output_BD = grad_BD.to(torch.promote_types(grad_BD.dtype, torch.float32))
        self.unsummed: Lookups | None = Lookups(rows_N, output_BD, bag_N, factors_N)
        """The gradient before it is summed; None after ``values`` was read, so that nothing is summed twice."""
        self._lookups = lookups
        self._segments: Segments | None = None
        self._summed: RowGradient | None = None

    @staticmethod
    def add(parts: Sequence[RowGradient]) -> RowGradient:
        """Sum one or more gradients of one parameter."""
        if len(parts) == 1:
            return parts[0]
        return LookupGradient(torch.cat([p.rows for p in parts]), torch.cat([p.values for p in parts]))

    @property
    def rows(self) -> Tensor:
        return self._sorted_segments().rows if self._summed is None else self._summed.rows

    @property
    def values(self) -> Tensor:
        if self._summed is None:
            assert self.unsummed is not None
            segments = self._sorted_segments()
            self._summed = RowGradient(segments.rows, segments.sums(self.unsummed.output))
            # Frees memory that is still in the processor's caches, for the next tensors.
            self.unsummed = self._segments = self._lookups = None
        return self._summed.values

    def blocks(self) -> Iterator[RowGradient]:
        """See RowGradient.blocks; each block is summed when it is requested, and the sums are not kept."""
        if self.unsummed is None:
            yield from super().blocks()
            return
        output_BD, segments = self.unsummed.output, self._sorted_segments()
        for block in segments.blocks(rows_per_block(len(segments.rows), output_BD)):
            yield RowGradient(block.rows, block.sums(output_BD))

    def _sorted_segments(self) -> Segments:
        if self._segments is None:
            assert self.unsummed is not None
            rows_N, _, bag_N, factors_N = self.unsummed
            self._segments = Segments.of(self._lookups or SortedLookups.of(rows_N), bag_N, factors_N)
        return self._segments


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
