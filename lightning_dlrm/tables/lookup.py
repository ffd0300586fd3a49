"""Lookups in embedding tables, and the gradient of table rows.

``EmbeddingTables`` is the only module that holds table rows. It has two parts. Its *storage* is the memory of this
rank's rows: ``DeviceStorage``, or ``HostStorage`` in ``tables.host``. Its *placement* decides which rows this rank
holds: ``WholePlacement``, or ``ShardedPlacement`` in ``sharding.placement``. All of them share one lookup:

1. The placement turns ids into a ``RowSource``: a matrix of rows, and the rows that each vector is the sum of. The
   matrix is the parameter itself, or rows fetched from the host, or vectors received from other ranks.
2. ``look_up`` computes the vectors with the kernels for the device.
3. The backward pass makes a ``LookupGradient`` of the source's rows and passes it to the source, which keeps it for
   the optimizer or sends it to the ranks that hold the rows.

The optimizer then reads ``gradient`` and calls ``update``; ``optim.rules`` updates the rows.

Shape suffixes: B bags (output vectors), F tables, D width, R rows of a matrix, N indices of all bags.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.errors import require
from lightning_dlrm.contracts.gradient import RowGradient
from lightning_dlrm.kernels import native
from lightning_dlrm.kernels.choice import Kernels, choose
from lightning_dlrm.tables.gradients import LookupGradient, RowRequest, RowSource
from lightning_dlrm.tables.table import Table, TablePiece, empty_table, fill_initial_rows, gather_rows

Change = Callable[[Tensor, RowGradient, dict[str, Tensor]], None]
"""Updates the gradient's rows of a weight [R, D] and of its optimizer state in place."""


class EmbeddingTables(nn.Module):
    """Embedding tables of one width in one parameter: lookups, their gradient, updates.

    ``weight`` gets no ``.grad``, which would be as large as all tables, unless ``dense_gradients`` asks for it: its
    gradient is a RowGradient.

    Args:
        tables: tables in the order of a batch's ids.
        width: D, the length of every vector.
        seed: seed of the initial rows.
        trainable: whether the rows are learned.
        ranges: (first row, row after the last) of each table that the module holds; ids count from the first row. None
            for all rows.
        storage: the memory of the rows; by default that of the device.
        dense_gradients: compute ``weight.grad`` by torch's own autograd, for an optimizer of torch.optim. Rows that
            several ranks hold are only evaluated.

    Raises:
        UserError: the width is below 1, or a table has no rows.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        width: int,
        seed: int = 0,
        trainable: bool = True,
        ranges: Sequence[tuple[int, int]] | None = None,
        storage: "DeviceStorage | None" = None,
        dense_gradients: bool = False,
    ) -> None:
        super().__init__()
        require(width >= 1, f"embedding_dim is {width}; expected at least 1")
        empty = [table.name for table in tables if table.rows < 1]
        require(not empty, f"tables without rows: {', '.join(empty)}; every table needs at least 1 row")
        self.tables = tuple(tables)
        """The F tables, in the order of the ids."""
        self.ranges = tuple(ranges or [(0, table.rows) for table in tables])
        """(First row, row after the last) of each table that all ranks together hold."""
        self.width = width
        """D."""
        self.kernels: Kernels = "auto"
        """The code that looks up and updates the rows."""
        self.may_pool = True
        """Whether other ranks may sum a bag's rows before they send them: only ``forward`` is called, and the
        per-sample weights are constants."""
        self.dense_gradients = dense_gradients
        """Whether ``weight`` is an ordinary parameter with a ``.grad`` of all rows."""
        self.storage = storage or DeviceStorage()
        self.placement = _make_placement.get()(self.tables, self.ranges)
        rows = sum(piece.rows for piece in self.pieces)
        weight_RD = self.storage.empty((rows, width), torch.get_default_dtype())
        if not weight_RD.is_meta:
            fill_initial_rows(weight_RD, self.tables, self.pieces, seed)
        self.weight = nn.Parameter(weight_RD, requires_grad=trainable)
        """[R, D]: all rows of this rank, piece after piece; requires a gradient only if the rows are learned."""

    def forward(self, ids: SparseIds) -> Tensor:
        """Return the (weighted) sum of the looked-up rows for every sample and table: [B, F, D].

        An empty bag gives zeros. The result is also differentiable in ``ids.weights``. If several ranks hold rows, all
        of them call this together, also with an empty slice, and run the backward pass equally often.
        """
        return self._look_up(ids, True).view(len(ids), ids.tables, self.width)

    def look_up_each(self, ids: SparseIds) -> Tensor:
        """Return the row of every index, without sums and per-sample weights: [N, D]."""
        return self._look_up(ids, False)

    def prefetch(self, ids: SparseIds) -> None:
        """Start the transfers of a later lookup of these ids.

        Updates before the lookup are taken into account. If several ranks hold rows, all of them call this together.
        """
        self.placement.prefetch(self, ids)

    def flush(self) -> None:
        """Wait until ``weight`` and the optimizer state hold every update so far."""
        self.storage.flush()

    @property
    def pieces(self) -> tuple[TablePiece, ...]:
        """The pieces of tables that ``weight`` holds, in order."""
        return self.placement.pieces

    @property
    def device(self) -> torch.device:
        """The device of lookups and updates; ``weight`` may be on the host."""
        return self.placement.device

    @property
    def prefetches(self) -> bool:
        """Whether ``prefetch`` does anything."""
        return self.storage.on_host or self.placement.is_sharded

    def gradient(self) -> RowGradient | None:
        """Return the sum of the gradients since ``clear_gradient``, or None without a backward pass.

        Waits for gradients that other ranks are still sending.
        """
        if self.dense_gradients:
            grad = self.weight.grad
            return None if grad is None else RowGradient(torch.arange(len(grad), device=grad.device), grad)
        self.placement.wait_for_gradients()
        gradients = self.storage.gradients
        if not gradients:
            return None
        gradients[:] = [LookupGradient.add(gradients)]
        return gradients[0]

    def add_gradient(self, gradient: RowGradient) -> None:
        """Add a gradient of rows of ``weight``, like a backward pass."""
        self.storage.gradients.append(gradient)

    def replace_gradient(self, gradient: RowGradient) -> None:
        """Replace ``gradient()`` by another gradient of the same rows, for clipping."""
        self.storage.gradients[:] = [gradient]

    def clear_gradient(self) -> None:
        """Discard all gradients, including gradients that other ranks are still sending."""
        if self.dense_gradients:
            self.weight.grad = None
        self.placement.wait_for_gradients()
        self.storage.clear()

    def squared_gradient_norm(self) -> Tensor:
        """Return the sum of squares of the gradient of this rank's rows; 0-dim."""
        gradient = self.gradient()
        return self.weight.new_zeros(()) if gradient is None else gradient.squared_norm()

    def over_ranks(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks that hold rows; they call this together."""
        return self.placement.over_ranks(value)

    def update(self, gradient: RowGradient, state: dict[str, Tensor], change: Change) -> None:
        """Update the rows of a gradient.

        Args:
            gradient: result of ``gradient()``.
            state: optimizer state: name -> tensor [R, ...], the same tensors at every call.
            change: updates rows of a weight and of its optimizer state.
        """
        self.storage.update(self.weight, gradient, state, change)

    def _look_up(self, ids: SparseIds, pooled: bool) -> Tensor:
        if self.dense_gradients and not self.placement.is_sharded:
            return look_up_plain(self.weight, self.placement.source(self, ids, pooled).request)[0]
        # Lookups run eagerly: torch.compile of a whole network breaks the graph here.
        apply = torch.compiler.disable(_Lookup.apply) if torch.compiler.is_compiling() else _Lookup.apply
        vectors_BD: Tensor = apply(self.weight, ids.weights if pooled else None, ids, self, pooled)
        return vectors_BD

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "EmbeddingTables":
        """Apply a function as nn.Module does; rows on the host change their dtype, but never their device."""
        if not self.storage.on_host:
            return super()._apply(fn, recurse)
        weight = self.weight
        del self.weight
        super()._apply(fn, recurse)
        dtype = fn(torch.empty(0, dtype=weight.dtype, device="cpu")).dtype
        weight.data = weight.data.to(dtype)
        self.weight = weight
        return self

    def extra_repr(self) -> str:
        return f"pieces={len(self.pieces)}, rows={self.weight.shape[0]}, width={self.width}"


class DeviceStorage:
    """Rows in the memory of the device of the lookups, and their gradients."""

    on_host: bool = False
    """Whether the rows stay in host memory if the module is moved to another device."""

    def __init__(self) -> None:
        self.gradients: list[RowGradient] = []
        """Gradients of the backward passes since the last update."""

    def empty(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialized tensor for rows."""
        return empty_table(shape, dtype)

    def fetch(self, weight: Tensor, rows: Callable[[], Tensor], device: torch.device) -> Any:
        """Start to fetch the rows of a later request, and return the fetch for ``source``.

        Args:
            weight: [R, D], the rows.
            rows: returns the row of each index in host memory; called by another thread.
            device: device of the lookup.
        """
        return None

    def source(self, weight: Tensor, request: RowRequest, fetched: Any) -> RowSource:
        """Return the source of the requested rows of ``weight``.

        Args:
            weight: [R, D].
            request: request of rows of ``weight``.
            fetched: result of ``fetch`` for the same rows.
        """
        return RowSource(weight, request, None, self.gradients.append)

    def update(self, weight: Tensor, gradient: RowGradient, state: dict[str, Tensor], change: Change) -> None:
        """See EmbeddingTables.update."""
        change(weight, gradient, state)

    def clear(self) -> None:
        """Discard the gradients."""
        self.gradients.clear()

    def flush(self) -> None:
        """Wait until the weight and the optimizer state hold every update."""


class Placement(nn.Module):
    """Base of the placements: the rows that this rank holds, and the lookup of all rows.

    The module's buffers are on the device of the lookups.
    """

    pieces: tuple[TablePiece, ...]
    """The pieces of tables that this rank holds, in order."""
    is_sharded: bool = False
    """Whether other ranks hold rows too."""

    @property
    def device(self) -> torch.device:
        """The device of lookups and updates."""
        raise TypeError(f"{type(self).__name__} does not define device")

    def prefetch(self, tables: EmbeddingTables, ids: SparseIds) -> None:
        """See EmbeddingTables.prefetch."""
        raise TypeError(f"{type(self).__name__} does not define prefetch")

    def source(self, tables: EmbeddingTables, ids: SparseIds, pooled: bool) -> RowSource:
        """Return the source of the rows that a batch looks up.

        Args:
            tables: the tables of this placement.
            ids: ids of a batch.
            pooled: whether bags are summed; if not, each index has a vector, without per-sample weights.
        """
        raise TypeError(f"{type(self).__name__} does not define source")

    def wait_for_gradients(self) -> None:
        """Wait for all gradients that other ranks send, and pass them to the storage."""

    def over_ranks(self, value: Tensor) -> Tensor:
        """See EmbeddingTables.over_ranks."""
        return value


class WholePlacement(Placement):
    """Placement of tables that one rank holds, whole or as a range of rows.

    Args:
        tables: tables in the order of a batch's ids.
        ranges: see EmbeddingTables.
    """

    row_offsets: Tensor
    """[F]: the row of ``weight`` where each table begins; int32 if possible, which halves the time to sort rows."""

    def __init__(self, tables: Sequence[Table], ranges: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        pieces: list[TablePiece] = []
        total = 0
        for table, (start, stop) in zip(tables, ranges, strict=True):
            pieces.append(TablePiece(name=table.name, table_rows=table.rows, start=start, stop=stop, offset=total))
            total += stop - start
        self.pieces = tuple(pieces)
        dtype = torch.int32 if total <= torch.iinfo(torch.int32).max else torch.int64
        self._host_offsets = torch.tensor([piece.offset for piece in pieces], dtype=dtype, device="cpu")
        self.register_buffer("row_offsets", self._host_offsets.to(torch.get_default_device()), persistent=False)
        self._fetched: weakref.WeakKeyDictionary[object, Any] = weakref.WeakKeyDictionary()
        """Key of the ids -> their fetch."""

    @property
    def device(self) -> torch.device:
        return self.row_offsets.device

    def prefetch(self, tables: EmbeddingTables, ids: SparseIds) -> None:
        if tables.storage.on_host:
            self._fetched[ids.key] = self._fetch(tables, ids)

    def source(self, tables: EmbeddingTables, ids: SparseIds, pooled: bool) -> RowSource:
        fetched = None
        if tables.storage.on_host:
            fetched = self._fetched.pop(ids.key, None) or self._fetch(tables, ids)
        request = RowRequest(ids.values, self.row_offsets, ids.offsets, ids.weights)
        if not pooled:
            request = RowRequest.of_rows(request.rows_and_bags()[0])
        return tables.storage.source(tables.weight, request, fetched)

    def _fetch(self, tables: EmbeddingTables, ids: SparseIds) -> Any:
        offsets = None if ids.offsets is None else ids.offsets.cpu()
        request = RowRequest(ids.values.cpu(), self._host_offsets, offsets, None)
        return tables.storage.fetch(tables.weight, lambda: request.rows_and_bags()[0], self.device)


_make_placement: ContextVar[Callable[[Sequence[Table], Sequence[tuple[int, int]]], Placement]] = ContextVar(
    "placement", default=WholePlacement
)


@contextmanager
def placed_by(make: Callable[[Sequence[Table], Sequence[tuple[int, int]]], Placement]) -> Iterator[None]:
    """Use another placement for all tables that are built in this context.

    Args:
        make: returns the placement of tables and their ranges; see EmbeddingTables.
    """
    token = _make_placement.set(make)
    try:
        yield
    finally:
        _make_placement.reset(token)


def look_up(weight_RD: Tensor, request: RowRequest, kernels: Kernels) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sum the rows of each bag.

    Args:
        weight_RD: the rows.
        request: the rows of each bag.
        kernels: see ``kernels.choice``.

    Returns:
        The sums [B, D], of the weight's type, zeros for an empty bag; the row of each index, [N]; its bag, int64 [N],
        or None if each index is a bag.
    """
    values, row_offsets_F, offsets, factors = request
    chosen = choose(kernels, weight_RD.device.type, weight_RD.dtype)
    if chosen == "native" and values.dtype == row_offsets_F.dtype == torch.int32:
        vectors_BD, rows_N, bag_N = native.lookup(weight_RD, values, offsets, row_offsets_F, factors)
        return vectors_BD, rows_N, None if offsets is None else bag_N
    if chosen == "triton":
        # Builds of torch for CPUs come without Triton.
        from lightning_dlrm.kernels import fused

        factors_N = None if factors is None else factors.reshape(-1)
        vectors_BD = fused.lookup(weight_RD, values.reshape(-1), row_offsets_F, offsets, factors_N)
        return vectors_BD, *request.rows_and_bags()
    return look_up_plain(weight_RD, request)


def look_up_plain(weight_RD: Tensor, request: RowRequest) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sum the rows of each bag as ``look_up`` does, by operators of torch, through which gradients flow."""
    rows_N, bags = request.rows_and_bags()
    factors_N = None if request.factors is None else request.factors.reshape(-1).to(weight_RD.dtype)
    if request.offsets is None:
        vectors_BD = gather_rows(weight_RD, rows_N)
        return vectors_BD if factors_N is None else vectors_BD * factors_N[:, None], rows_N, bags
    vectors_BD = functional.embedding_bag(
        rows_N,
        weight_RD,
        request.offsets.to(rows_N.dtype),
        mode="sum",
        per_sample_weights=factors_N,
        include_last_offset=True,
    )
    return vectors_BD, rows_N, bags


class _Lookup(torch.autograd.Function):
    """The lookup of all tables, for every storage, placement and kernel.

    The backward pass gives ``weight`` no gradient tensor: it passes a LookupGradient to the source of the rows.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, factors: Tensor | None, ids: SparseIds, tables: EmbeddingTables, pooled: bool
    ) -> Tensor:
        source = tables.placement.source(tables, ids, pooled)
        vectors_BD, rows_N, bag_N = look_up(source.weight, source.request, tables.kernels)
        ctx.lookups, ctx.take_gradient = source.lookups, source.take_gradient
        # The backward pass needs the rows only if the per-sample weights are learned.
        learned = ctx.needs_input_grad[1]
        ctx.save_for_backward(rows_N, bag_N, source.request.factors, source.weight if learned else None)
        return vectors_BD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, None, None, None]:
        rows_N, bag_N, factors, weight_RD = ctx.saved_tensors
        grad_BD = grads[0].contiguous()
        if ctx.needs_input_grad[0]:
            factors_N = None if factors is None else factors.reshape(-1)
            ctx.take_gradient(LookupGradient(rows_N, grad_BD, bag_N, factors_N, ctx.lookups))
        grad_factors = None
        if weight_RD is not None:
            grad_ND = grad_BD if bag_N is None else grad_BD.index_select(0, bag_N)
            products_ND = weight_RD.index_select(0, rows_N) * grad_ND
            grad_factors = products_ND.sum(1).to(factors.dtype).view(factors.shape)
        return None, grad_factors, None, None, None
