"""What models, optimisers and sharding say to each other about embedding tables.

Shape suffixes: B samples, F tables, D table width, R rows held here, N looked-up indices,
U distinct rows among them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_dlrm.contracts.batch import SparseIds

Kernels = Literal["auto", "plain", "native", "triton"]
"""Which code looks up and updates table rows: plain torch, compiled C on a CPU, or Triton on a CUDA device. ``auto``:
the one for the tables' device, with float32 or bfloat16 tables, where it works here; else plain."""

_BLOCK_BYTES = 2**21
"""Of a gradient's values: what is summed and applied before the processor's caches lose it."""


def gather_rows(weight_RD: Tensor, rows_N: Tensor) -> Tensor:
    """[N, D]: ``weight_RD[rows_N]``, as sums of one row each, whose kernel fetches rows ahead on a CPU:
    in less than half the time that ``index_select`` takes for rows scattered over a large table."""
    if weight_RD.device.type != "cpu" or weight_RD.dtype == torch.float64:
        return weight_RD.index_select(0, rows_N)
    starts_N = torch.arange(len(rows_N), dtype=rows_N.dtype)
    return functional.embedding_bag(rows_N, weight_RD, starts_N, mode="sum")


def put_rows(weight: Tensor, rows_U: Tensor, values: Tensor) -> None:
    """``weight[rows_U] = values`` for distinct rows, in place; both contiguous. On a CPU elements are copied one by
    one, so many whole rows go as elements of 16 bytes where they can: in two thirds of the time at 64 floats a row."""
    if weight.device.type == "cpu" and values.nbytes >= 2**20 and weight.dim() == 2:
        at_16_bytes = weight.storage_offset() == values.storage_offset() == 0
        if at_16_bytes and values.stride(0) * values.element_size() % 16 == 0:
            weight, values = weight.view(torch.complex128), values.view(torch.complex128)
    weight.index_copy_(0, rows_U, values)


@dataclass(frozen=True)
class SortedLookups:
    """Looked-up rows, sorted: the distinct ones, and which indices looked up each of them."""

    rows: Tensor
    """[U]: the distinct rows, ascending."""
    counts: Tensor
    """int64 [U]: how many indices looked up each row."""
    order: Tensor
    """int64 [N]: the indices, by ascending row."""

    @staticmethod
    def of(rows_N: Tensor) -> "SortedLookups":
        """Sorts the row of each index."""
        sorted_rows_N, order_N = torch.sort(rows_N, stable=True)
        rows_U, counts_U = torch.unique_consecutive(sorted_rows_N, return_counts=True)
        return SortedLookups(rows_U, counts_U, order_N)

    def positions(self) -> Tensor:
        """int64 [N]: where the row of each index is among ``rows``."""
        positions_N = torch.empty_like(self.order)
        positions_N[self.order] = torch.repeat_interleave(self.counts)
        return positions_N

    def sum_gradients(self, grad_BD: Tensor, bag_N: Tensor | None = None, weights_N: Tensor | None = None) -> Tensor:
        """[U, D], float32 at least: the summed gradient of each distinct row, by a segment sum.

        For the arguments see ``RowGradient.from_lookups``.
        """
        output = grad_BD.to(torch.promote_types(grad_BD.dtype, torch.float32))
        return Segments.of_sorted(self, bag_N, weights_N).sums(output)


@dataclass(frozen=True)
class RowGradient:
    """The gradient of a parameter [R, D] of which few rows were touched.

    What holds for every RowGradient, so that no reader has to check it:

    - It is the gradient of the mean loss over the *global* batch.
    - De-duplication happens once, where the gradient is made and before any exchange: ``rows`` are
      distinct and ascending.
    - Micro-batches add up as gradients do: ``RowGradient.sum`` de-duplicates again.
    - In the global norm a row counts once, with its summed gradient.
    - L2 and weight decay touch the rows of the gradient and no others.
    """

    rows: Tensor
    """int64 [U], distinct, ascending."""
    values: Tensor
    """[U, D], the summed gradient of each row; float32 at least."""

    @staticmethod
    def from_lookups(
        rows_N: Tensor, grad_BD: Tensor, bag_N: Tensor | None = None, weights_N: Tensor | None = None
    ) -> "RowGradient":
        """The gradients of looked-up vectors, by row; sorted and summed where somebody asks for it.

        Args:
            rows_N: the row of each index.
            grad_BD: gradient of each output vector.
            bag_N: the output vector each index went into; None when index i went into vector i.
            weights_N: the factor each index's vector had in its sum; None means 1.
        """
        return LookupGradient(rows_N, grad_BD, bag_N, weights_N)

    @staticmethod
    def sum(parts: "Sequence[RowGradient]") -> "RowGradient":
        """The sum of one or more gradients of one parameter."""
        if len(parts) == 1:
            return parts[0]
        return RowGradient.from_lookups(torch.cat([p.rows for p in parts]), torch.cat([p.values for p in parts]))

    def blocks(self) -> "Iterator[RowGradient]":
        """The same, some rows at a time: on a CPU so few that their values stay in its caches."""
        size = self._rows_of_a_block(self.values)
        if len(self.rows) <= size:
            yield self
            return
        for rows, values in zip(self.rows.split(size), self.values.split(size), strict=True):
            yield RowGradient(rows, values)

    def squared_norm(self) -> Tensor:
        """Sum of squares, a 0-dim tensor."""
        return self.values.square().sum()

    def _rows_of_a_block(self, vectors: Tensor) -> int:
        """How many rows a block has, if their gradients are as long as these; all on other devices than a CPU, and
        where two blocks would be enough."""
        rows = len(self.rows)
        if vectors.device.type != "cpu":
            return max(rows, 1)
        size = max(_BLOCK_BYTES // max(vectors.shape[1] * vectors.element_size(), 1), 1)
        return size if rows > 2 * size else max(rows, 1)


class Segments(NamedTuple):
    """Lookups, row after row, and what is summed for each row."""

    rows: Tensor
    """int64 [U], distinct, ascending."""
    starts: Tensor
    """int64 [U]: where the indices of each row begin among those of all rows."""
    bags: Tensor
    """int64 [N]: the output vector that each of these indices went into."""
    factors: Tensor | None
    """[N]: what its vector was multiplied by; None means 1."""

    @staticmethod
    def of(rows_N: Tensor, bag_N: Tensor | None, weights_N: Tensor | None) -> "Segments":
        """For the arguments see ``RowGradient.from_lookups``."""
        lookups = SortedLookups.of(rows_N)
        return Segments.of_sorted(lookups, bag_N, weights_N)

    @staticmethod
    def of_sorted(lookups: SortedLookups, bag_N: Tensor | None, weights_N: Tensor | None) -> "Segments":
        """The same, of lookups that are sorted already."""
        return Segments(
            rows=lookups.rows.long(),
            starts=torch.cumsum(lookups.counts, 0) - lookups.counts,
            bags=lookups.order if bag_N is None else bag_N[lookups.order],
            factors=None if weights_N is None else weights_N[lookups.order],
        )

    def sums(self, output_BD: Tensor) -> Tensor:
        """[U, D]: of each row, by a segment sum."""
        factors = None if self.factors is None else self.factors.to(output_BD.dtype)
        return functional.embedding_bag(self.bags, output_BD, self.starts, mode="sum", per_sample_weights=factors)

    def blocks(self, size: int) -> "Iterator[Segments]":
        """Of at most as many rows, one after the other."""
        ends = [*self.starts[size::size].tolist(), len(self.bags)]
        start = 0
        for rows, starts, end in zip(self.rows.split(size), self.starts.split(size), ends, strict=True):
            factors = None if self.factors is None else self.factors[start:end]
            yield Segments(rows, starts - start, self.bags[start:end], factors)
            start = end


class LookupGradient(RowGradient):
    """A RowGradient that is sorted and summed by row only where somebody asks for its rows or their sums.

    Where nearly every index looks up another row, the sums take as much memory as all looked-up vectors: an
    update by ``blocks``, or by a kernel that sums while it updates, never writes them there.

    For the arguments see ``RowGradient.from_lookups``.
    """

    lookups: tuple[Tensor, Tensor | None, Tensor | None]
    """The row of each index, its output vector and its factor; there, as ``output``, until somebody asked for
    ``values``."""
    output: Tensor
    """[B, D], float32 at least: the gradient of each output vector."""

    def __init__(self, rows_N: Tensor, grad_BD: Tensor, bag_N: Tensor | None, weights_N: Tensor | None) -> None:
        output = grad_BD.to(torch.promote_types(grad_BD.dtype, torch.float32))
        # The base is frozen.
        self.__dict__.update(output=output, lookups=(rows_N, bag_N, weights_N))

    @property
    def summed(self) -> bool:
        """Whether somebody asked for ``values``."""
        return "values" in self.__dict__

    @cached_property
    def segments(self) -> Segments:
        """The lookups by row."""
        return Segments.of(*self.lookups)

    @cached_property
    def rows(self) -> Tensor:
        return self.segments.rows

    @cached_property
    def values(self) -> Tensor:
        sums_UD, _ = self.segments.sums(self.output), self.rows
        # Nobody asks for them again, and their memory is in the caches.
        for name in ("segments", "lookups", "output"):
            del self.__dict__[name]
        return sums_UD

    def blocks(self) -> Iterator[RowGradient]:
        """See RowGradient.blocks; each is summed when it is asked, and no sum is kept here."""
        if self.summed:
            yield from super().blocks()
            return
        size = self._rows_of_a_block(self.output)
        if len(self.rows) <= size:
            yield self
            return
        for block in self.segments.blocks(size):
            yield RowGradient(block.rows, block.sums(self.output))


@dataclass(frozen=True, kw_only=True)
class Table:
    """What a table is before it is made; any piece of it can be made anywhere, the same.

    Its initial rows are drawn from U(centre - bound, centre + bound), a function of (seed, name,
    block of rows), or given.
    """

    name: str
    """``C3`` for the vectors of column C3; further tables of a column are ``C3/linear`` and the like."""
    rows: int
    bound: float
    centre: float = 0.0
    given: Tensor | None = None
    """[rows, D]: initial rows that are not drawn."""

    @staticmethod
    def of_column(name: str, rows: int) -> "Table":
        """A plain table: U(-1/sqrt(rows), 1/sqrt(rows)), as in the code published with Naumov et al. 2019."""
        return Table(name=name, rows=rows, bound=rows**-0.5 if rows > 0 else 0.0)


@dataclass(frozen=True, kw_only=True)
class TablePiece:
    """A range of a table's rows and where they lie in the parameter that holds them."""

    name: str
    """The table's name, such as ``C3``."""
    table_rows: int
    """Rows of the whole table."""
    start: int
    """First row of the table that is held here."""
    stop: int
    """Row of the table after the last one held here."""
    offset: int
    """Where ``start`` lies in the parameter."""

    def of(self, tensor: Tensor) -> Tensor:
        """The piece's part of a tensor whose first dimension is the parameter's rows; a view."""
        return tensor[self.offset : self.offset + self.stop - self.start]


class EmbeddingLookup(nn.Module):
    """Turns ids into vectors, and gradients of vectors into a RowGradient.

    A local lookup holds whole tables, a sharded one holds pieces; a model cannot tell them apart. A
    network owns any number of lookups, each for tables of one width, and reaches table rows through
    them alone. ``weight`` never gets a ``.grad``: its gradient is the RowGradient, read by the optimiser.
    """

    weight: nn.Parameter
    """[R, D]: all rows held here, of tables of one width, table after table; it requires no gradient
    where the rows stay as they are."""
    tables: tuple[Table, ...]
    """The F tables, in the order of the ids."""
    pieces: tuple[TablePiece, ...]
    """What the rows of ``weight`` are, in order."""
    kernels: Kernels = "auto"
    """Which code looks up and updates the rows."""
    LOOKS_AHEAD: ClassVar[bool] = False
    """Whether ``announce`` and ``start`` do anything."""
    may_pool: bool = True
    """Whether every call is ``forward`` with the factors that the ids had when they were announced or begun, none of
    them learned: then rows may be summed where they lie, before the call."""
    ON_HOST: ClassVar[bool] = False
    """Whether ``weight`` stays in host memory, whatever the device."""

    def __init__(self) -> None:
        super().__init__()
        self._gradients: list[RowGradient] = []

    def forward(self, ids: SparseIds) -> Tensor:
        """[B, F, D]: for every sample and table the (weighted) sum of the looked-up rows; zeros for
        an empty bag. Differentiable in ``ids.weights`` too."""
        raise TypeError(f"{type(self).__name__} does not define forward")

    def each(self, ids: SparseIds) -> Tensor:
        """[N, D]: the row of every index, in the order of ``ids.values``, not summed; weights do not count."""
        raise TypeError(f"{type(self).__name__} does not define each")

    def announce(self, ids: SparseIds) -> None:
        """Hears of the ids of a later call, while an earlier batch is under way; it comes with ``ids.ahead``.

        Begins what does not depend on the updates in between. Optional, except that where rows are held by
        several ranks, all of them call it together.
        """

    def start(self, ids: SparseIds) -> None:
        """Begins what ``forward`` or ``each`` of these ids waits for; it is called next, with ``ids.ahead``."""

    def settle(self) -> None:
        """Waits until ``weight`` and the optimiser's state hold every update so far."""

    @property
    def width(self) -> int:
        """D."""
        return self.weight.shape[1]

    def add_lookups(self, rows_N: Tensor, grad_BD: Tensor, bag_N: Tensor | None, weights_N: Tensor | None) -> None:
        """Called by the backward pass of rows that are held here; the arguments are those of ``from_lookups``."""
        self.add_gradient(RowGradient.from_lookups(rows_N, grad_BD, bag_N, weights_N))

    def add_gradient(self, gradient: RowGradient) -> None:
        """Called by the backward pass: once per micro-batch."""
        self._gradients.append(gradient)

    def gradient(self) -> RowGradient | None:
        """The sum over the micro-batches since ``clear_gradient``; None where there was none."""
        if not self._gradients:
            return None
        self._gradients = [RowGradient.sum(self._gradients)]
        return self._gradients[0]

    def squared_gradient_norm(self) -> Tensor:
        """Sum of squares of the gradient of the rows held here; 0-dim."""
        gradient = self.gradient()
        return self.weight.new_zeros(()) if gradient is None else gradient.squared_norm()

    def over_ranks(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all who hold rows of a network's tables; they call it together, for all lookups."""
        return value

    def replace_gradient(self, gradient: RowGradient) -> None:
        """Puts another gradient in place of ``gradient()``; for clipping."""
        self._gradients = [gradient]

    def clear_gradient(self) -> None:
        self._gradients = []

    def update(
        self,
        gradient: RowGradient,
        state: dict[str, Tensor],
        change: Callable[[Tensor, RowGradient, dict[str, Tensor]], None],
    ) -> None:
        """An optimiser's step.

        Args:
            gradient: ``gradient()``.
            state: slot name -> tensor [R, ...], the same at every call.
            change: moves the gradient's rows of a weight and of its state in place.
        """
        change(self.weight, gradient, state)
