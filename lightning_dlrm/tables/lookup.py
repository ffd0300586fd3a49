"""From ids to vectors, and from the vectors' gradient to that of table rows.

``EmbeddingTables`` is the one module with table rows. It has two parts of several kinds: its *storage* says in which
memory the rows of this rank are (``DeviceStorage``, or ``HostStorage`` in ``tables.host``), its *placement* which rows
of the tables this rank has (``WholePlacement``, or ``ShardedPlacement`` in ``sharding.placement``). All of them share
one lookup:

1. The placement turns ids into a ``RowSource``: a matrix of rows, and which of them each vector is made of. The matrix
   is the parameter itself; or rows that were fetched from the host; or vectors that other ranks have sent.
2. ``look_up`` makes the vectors, with the kernels for the device.
3. The backward pass makes a ``LookupGradient`` of the source's rows and gives it to the source, which keeps it for the
   optimizer, or sends it to the ranks that hold the rows.

The optimizer then reads ``gradient`` and calls ``update``; ``optim.rows`` moves the rows.

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
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.gradient import RowGradient
from lightning_dlrm.kernels import native
from lightning_dlrm.kernels.choice import Kernels, choose
from lightning_dlrm.tables.gradients import LookupGradient
from lightning_dlrm.tables.memory import empty_table, gather_rows
from lightning_dlrm.tables.requests import RowRequest, RowSource
from lightning_dlrm.tables.table import Table, TablePiece, fill_initial_rows

Change = Callable[[Tensor, RowGradient, dict[str, Tensor]], None]
"""Moves the gradient's rows of a weight [R, D] and of its optimizer state in place."""


class EmbeddingTables(nn.Module):
    """Embedding tables of one width in one parameter: lookups, their gradient, updates.

    ``weight`` never gets a ``.grad``, which would be as large as all tables: its gradient is a RowGradient.

    Args:
        tables: in the order of the ids of a batch.
        width: D, the length of every vector.
        seed: of the initial rows.
        trainable: whether the rows are learned.
        ranges: of each table the first row that is held and the one after the last, whose ids then count from the
            first of them; None for all rows.
        storage: the memory of the rows; by default the device's.

    Raises:
        UserError: no width, or a table without rows.
    """

    weight: nn.Parameter
    """[R, D]: all rows held by this rank, piece after piece; it requires no gradient if they are not learned."""
    tables: tuple[Table, ...]
    """The F tables, in the order of the ids."""
    ranges: tuple[tuple[int, int], ...]
    """Of each table the rows that are held, by all ranks together."""
    width: int
    """D."""
    kernels: Kernels
    """Which code looks up and updates the rows."""
    may_pool: bool
    """Whether other ranks may sum a bag's rows before they send them: every call is ``forward``, and the ids' weights
    are constants."""

    def __init__(
        self,
        tables: Sequence[Table],
        width: int,
        seed: int = 0,
        trainable: bool = True,
        ranges: Sequence[tuple[int, int]] | None = None,
        storage: "DeviceStorage | None" = None,
    ) -> None:
        super().__init__()
        if width < 1:
            raise UserError(f"embedding_dim is {width}; expected at least 1")
        empty = [table.name for table in tables if table.rows < 1]
        if empty:
            raise UserError(f"tables without rows: {', '.join(empty)}; every table needs at least 1 row")
        self.tables, self.width = tuple(tables), width
        self.ranges = tuple(ranges or [(0, table.rows) for table in tables])
        self.kernels, self.may_pool = "auto", True
        self.storage = storage or DeviceStorage()
        self.placement = _make_placement.get()(self.tables, self.ranges)
        rows = sum(piece.rows for piece in self.pieces)
        weight_RD = self.storage.empty((rows, width), torch.get_default_dtype())
        if not weight_RD.is_meta:
            fill_initial_rows(weight_RD, self.tables, self.pieces, seed)
        self.weight = nn.Parameter(weight_RD, requires_grad=trainable)

    def forward(self, ids: SparseIds) -> Tensor:
        """Return for every sample and table the (weighted) sum of the looked-up rows: [B, F, D].

        An empty bag gives zeros. The result is differentiable in ``ids.weights`` too. If rows are on several ranks,
        all of them call it together, also with an empty slice, and run its backward pass as often.
        """
        return self._look_up(ids, True).view(len(ids), ids.tables, self.width)

    def look_up_each(self, ids: SparseIds) -> Tensor:
        """Return the row of every index, not summed and without the ids' weights: [N, D]."""
        return self._look_up(ids, False)

    def prefetch(self, ids: SparseIds) -> None:
        """Start what a later lookup of these ids needs and updates until then do not change.

        If rows are on several ranks, all of them call it together.
        """
        self.placement.prefetch(self, ids)

    def flush(self) -> None:
        """Wait until ``weight`` and the optimizer state hold every update so far."""
        self.storage.flush()

    @property
    def pieces(self) -> tuple[TablePiece, ...]:
        """What the rows of ``weight`` are, in order."""
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
        """Return the sum over the backward passes since ``clear_gradient``; None if there was none.

        It waits for gradients that other ranks are still sending.
        """
        self.placement.wait_for_gradients()
        gradients = self.storage.gradients
        if not gradients:
            return None
        gradients[:] = [LookupGradient.add(gradients)]
        return gradients[0]

    def add_gradient(self, gradient: RowGradient) -> None:
        """Add a gradient of rows of ``weight``, as a backward pass does."""
        self.storage.gradients.append(gradient)

    def replace_gradient(self, gradient: RowGradient) -> None:
        """Put another gradient of the same rows in place of ``gradient()``; for clipping."""
        self.storage.gradients[:] = [gradient]

    def clear_gradient(self) -> None:
        """Forget all gradients, also those on their way."""
        self.placement.wait_for_gradients()
        self.storage.clear()

    def squared_gradient_norm(self) -> Tensor:
        """Return the sum of squares of the gradient of this rank's rows; 0-dim."""
        gradient = self.gradient()
        return self.weight.new_zeros(()) if gradient is None else gradient.squared_norm()

    def over_ranks(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks that hold rows; they call it together."""
        return self.placement.over_ranks(value)

    def update(self, gradient: RowGradient, state: dict[str, Tensor], change: Change) -> None:
        """Make the optimizer's step.

        Args:
            gradient: ``gradient()``.
            state: name -> tensor [R, ...], the same tensors at every call.
            change: moves rows of a weight and of its state.
        """
        self.storage.update(self.weight, gradient, state, change)

    def _look_up(self, ids: SparseIds, pooled: bool) -> Tensor:
        # Lookups are eager: a network that is compiled as a whole is cut in two here.
        apply = torch.compiler.disable(_Lookup.apply) if torch.compiler.is_compiling() else _Lookup.apply
        vectors_BD: Tensor = apply(self.weight, ids.weights if pooled else None, ids, self, pooled)
        return vectors_BD

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "EmbeddingTables":
        """See nn.Module; rows on the host change their type, but never their device."""
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
    """Rows in the memory of the device that looks them up, and the gradients that wait for their update."""

    on_host: bool = False
    """Whether the rows stay in host memory, whatever device the module is moved to."""

    def __init__(self) -> None:
        self.gradients: list[RowGradient] = []
        """Of the backward passes since the last update."""

    def empty(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return memory for rows; none on torch's meta device."""
        return empty_table(shape, dtype)

    def fetch(self, weight: Tensor, rows: Callable[[], Tensor], device: torch.device) -> Any:
        """Start to fetch rows that a request is going to ask for; return what ``source`` takes.

        Args:
            weight: [R, D], the rows.
            rows: returns the row of each index in host memory; is called by another thread.
            device: where they are wanted.
        """
        return None

    def source(self, weight: Tensor, request: RowRequest, fetched: Any) -> RowSource:
        """Return where a request of rows of ``weight`` is looked up.

        Args:
            weight: [R, D].
            request: its rows.
            fetched: what ``fetch`` returned for the same rows.
        """
        return RowSource(weight, request, None, self.gradients.append)

    def update(self, weight: Tensor, gradient: RowGradient, state: dict[str, Tensor], change: Change) -> None:
        """See EmbeddingTables.update."""
        change(weight, gradient, state)

    def clear(self) -> None:
        """Forget the gradients."""
        self.gradients.clear()

    def flush(self) -> None:
        """Wait until the weight holds every update."""


class Placement(nn.Module):
    """Which rows of some tables this rank holds, and how a lookup gets at all of them.

    Its buffers are on the device of the lookups.
    """

    pieces: tuple[TablePiece, ...]
    """What this rank holds, in order."""
    is_sharded: bool = False
    """Whether other ranks hold rows too."""

    @property
    def device(self) -> torch.device:
        """Where lookups are made."""
        raise TypeError(f"{type(self).__name__} does not define device")

    def prefetch(self, tables: EmbeddingTables, ids: SparseIds) -> None:
        """See EmbeddingTables.prefetch."""
        raise TypeError(f"{type(self).__name__} does not define prefetch")

    def source(self, tables: EmbeddingTables, ids: SparseIds, pooled: bool) -> RowSource:
        """Return where the vectors of these ids are made of.

        Args:
            tables: whose rows they are.
            ids: of a batch.
            pooled: whether bags are summed; else there is a vector for each index, without the ids' weights.
        """
        raise TypeError(f"{type(self).__name__} does not define source")

    def wait_for_gradients(self) -> None:
        """Give the storage all gradients that have been sent to this rank."""

    def over_ranks(self, value: Tensor) -> Tensor:
        """See EmbeddingTables.over_ranks."""
        return value


class WholePlacement(Placement):
    """Whole tables on this rank, or a range of each one's rows.

    Args:
        tables: in the order of the ids of a batch.
        ranges: see EmbeddingTables.
    """

    row_offsets: Tensor
    """[F]: the row of ``weight`` where each table begins. int32 if that is enough: it halves the time of sorting."""

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
        """Key of the ids -> what the storage fetches for them."""

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
    """Build tables inside with a placement of another kind than whole tables.

    Args:
        make: makes the placement of some tables and their ranges; see EmbeddingTables.
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
        request: which of them.
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
    rows_N, bags = request.rows_and_bags()
    factors_N = None if factors is None else factors.reshape(-1)
    if chosen == "triton":
        # torch for CPUs comes without Triton.
        from lightning_dlrm.kernels import fused

        return fused.lookup(weight_RD, values.reshape(-1), row_offsets_F, offsets, factors_N), rows_N, bags
    if factors_N is not None:
        factors_N = factors_N.to(weight_RD.dtype)
    if offsets is None:
        vectors_BD = gather_rows(weight_RD, rows_N)
        return vectors_BD if factors_N is None else vectors_BD * factors_N[:, None], rows_N, bags
    vectors_BD = functional.embedding_bag(
        rows_N,
        weight_RD,
        offsets.to(rows_N.dtype),
        mode="sum",
        per_sample_weights=factors_N,
        include_last_offset=True,
    )
    return vectors_BD, rows_N, bags


class _Lookup(torch.autograd.Function):
    """The lookup of all tables, whatever their storage, placement and kernels.

    Its backward pass gives ``weight`` no gradient tensor: the gradient goes to the source of the rows.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, factors: Tensor | None, ids: SparseIds, tables: EmbeddingTables, pooled: bool
    ) -> Tensor:
        source = tables.placement.source(tables, ids, pooled)
        vectors_BD, rows_N, bag_N = look_up(source.weight, source.request, tables.kernels)
        ctx.lookups, ctx.take_gradient = source.lookups, source.take_gradient
        # The rows are needed once more in the backward pass if the factors are learned.
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
