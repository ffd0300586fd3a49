"""Tables larger than the device: rows and optimizer state in host memory, those of the next batches on the device.

The rows of a prefetched batch are copied to the device while an earlier batch computes; rows that the earlier batch
updates are replaced on the device. Updated rows are written back while the next batch computes. One thread reads and
writes host memory, in the order of the calls, so that a row is never read before it is written.

Shape suffixes: D width, N indices of all bags, U unique rows among them.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from lightning_dlrm.contracts.gradient import RowGradient
from lightning_dlrm.tables.gradients import LookupGradient, RowRequest, RowSource, SortedLookups
from lightning_dlrm.tables.lookup import Change, DeviceStorage
from lightning_dlrm.tables.table import empty_table

host_io_executor = ThreadPoolExecutor(1, thread_name_prefix="host tables")
"""The thread that reads and writes tables in host memory during training; it starts with its first task."""


@dataclass(eq=False)
class CachedRows:
    """Some rows of tables with their optimizer state, on the device."""

    lookups: SortedLookups
    """The unique rows and the indices that look them up; on the device."""
    host_rows: Tensor
    """[U]: ``lookups.rows``, in host memory."""
    weight: Tensor
    """[U, D]."""
    state: dict[str, Tensor]
    """Name of the optimizer state -> [U, ...]; state that the optimizer has not created yet is missing."""

    def replace(self, newer: "CachedRows") -> None:
        """Take over the values of all rows that ``newer`` also holds."""
        if not len(newer.lookups.rows):
            return
        at_U = torch.searchsorted(newer.lookups.rows, self.lookups.rows).clamp(max=len(newer.lookups.rows) - 1)
        shared_U = newer.lookups.rows.index_select(0, at_U) == self.lookups.rows

        def replaced(values: Tensor, by: Tensor) -> Tensor:
            return torch.where(shared_U.view(-1, *[1] * (values.dim() - 1)), by.index_select(0, at_U), values)

        self.weight = replaced(self.weight, newer.weight)
        self.state = {name: replaced(values, newer.state[name]) for name, values in self.state.items()}

    @staticmethod
    def merge(parts: "Sequence[CachedRows]") -> "CachedRows":
        """Return the rows of all parts; parts that share a row have the same values for it."""
        if len(parts) == 1:
            return parts[0]
        lookups = SortedLookups.of(torch.cat([part.lookups.rows for part in parts]))
        first_U = lookups.order[torch.cumsum(lookups.counts, 0) - lookups.counts]

        def merged(tensors: Iterable[Tensor]) -> Tensor:
            return torch.cat(list(tensors)).index_select(0, first_U)

        names = set.intersection(*(set(part.state) for part in parts))
        return CachedRows(
            lookups,
            torch.unique(torch.cat([part.host_rows for part in parts])),
            merged(part.weight for part in parts),
            {name: merged(part.state[name] for part in parts) for name in names},
        )


class PendingFetch:
    """A fetch of rows from host memory to the device.

    Args:
        fetched: future of a function that waits for the copies on the device's current stream and returns the rows.
    """

    def __init__(self, fetched: "Future[Callable[[], CachedRows]]") -> None:
        self._fetched = fetched

    @cached_property
    def rows(self) -> CachedRows:
        """The rows; waits for them."""
        return self._fetched.result()()


class HostStorage(DeviceStorage):
    """Rows and optimizer state in host memory; lookups and updates copy them to the device.

    Lookups and updates use the same code as tables on the device. Between an update and ``flush``, the weight may lack
    the updated rows.
    """

    on_host = True

    def __init__(self) -> None:
        super().__init__()
        self._state: Mapping[str, Tensor] = {}
        self._pending: weakref.WeakSet[PendingFetch] = weakref.WeakSet()
        """Fetches whose rows have not been looked up yet; each update replaces its rows in them."""
        self._looked_up: list[CachedRows] = []
        """Cached rows of the gradients since the last update."""
        self._pending_write: Future | None = None

    def empty(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """See DeviceStorage.empty."""
        # The default device may be the accelerator, on which Lightning builds networks, or torch's meta device.
        meta = torch.get_default_device().type == "meta"
        return empty_table(shape, dtype, torch.device("meta" if meta else "cpu"))

    def fetch(self, weight: Tensor, rows: Callable[[], Tensor], device: torch.device) -> PendingFetch:
        """See DeviceStorage.fetch."""
        pending = PendingFetch(host_io_executor.submit(self._fetch_batch, weight, rows, device))
        self._pending.add(pending)
        return pending

    def source(self, weight: Tensor, request: RowRequest, fetched: PendingFetch) -> RowSource:
        """See DeviceStorage.source."""
        cached = fetched.rows
        # From now on ``update`` merges these rows with the other looked-up rows.
        self._pending.discard(fetched)
        positions = RowRequest.of_rows(cached.lookups.positions(), request.offsets, request.factors)
        return RowSource(cached.weight, positions, cached.lookups, partial(self._take_gradient, cached))

    def update(self, weight: Tensor, gradient: RowGradient, state: dict[str, Tensor], change: Change) -> None:
        """See EmbeddingTables.update."""
        copies, cached = Copies.of(gradient.rows.device), CachedRows.merge(self._looked_up)
        self._looked_up = []
        # Later fetches include the optimizer state.
        self._state = state
        if missing := {name: values for name, values in state.items() if name not in cached.state}:
            cached.state |= host_io_executor.submit(_fetch, missing, cached.host_rows, copies).result()()
        positions_U = torch.arange(len(gradient.rows), device=gradient.rows.device)
        # Kernels take the state by its order, which a merge does not keep.
        cached.state = {name: cached.state[name] for name in state}
        change(cached.weight, RowGradient(positions_U, gradient.values), cached.state)
        for pending in list(self._pending):
            pending.rows.replace(cached)
        self.flush()
        computed = copies.record_event()
        self._pending_write = host_io_executor.submit(self._write_back, weight, cached, copies, computed)

    def clear(self) -> None:
        """See DeviceStorage.clear."""
        super().clear()
        self._looked_up = []

    def flush(self) -> None:
        """See DeviceStorage.flush."""
        if self._pending_write is not None:
            self._pending_write.result()
            self._pending_write = None

    def _take_gradient(self, cached: CachedRows, gradient: LookupGradient) -> None:
        self.gradients.append(RowGradient(cached.lookups.rows.long(), gradient.values))
        self._looked_up.append(cached)

    def _fetch_batch(
        self, weight: Tensor, rows: Callable[[], Tensor], device: torch.device
    ) -> Callable[[], CachedRows]:
        host, copies = SortedLookups.of(rows()), Copies.of(device)
        lookups = copies.to_device(host._asdict())
        fetched = _fetch({"": weight.detach(), **self._state}, host.rows, copies)

        def cached() -> CachedRows:
            state = fetched()
            return CachedRows(SortedLookups(**lookups()), host.rows, state.pop(""), state)

        return cached

    def _write_back(self, weight: Tensor, cached: CachedRows, copies: "Copies", computed: Any) -> None:
        updated = copies.to_host({"": cached.weight, **cached.state}, computed)
        with torch.no_grad():
            for name, values in updated.items():
                (self._state[name] if name else weight).index_copy_(0, cached.host_rows.long(), values)


def _fetch(tensors: Mapping[str, Tensor], rows: Tensor, copies: "Copies") -> Callable[[], dict[str, Tensor]]:
    """Start to copy rows of tensors in host memory to the device; the result waits for the copies and returns them."""
    with torch.no_grad():
        return copies.to_device({name: copies.gather(tensor, rows) for name, tensor in tensors.items()})


class Copies:
    """Copies between host memory and a device.

    This class makes plain copies, for tests without a GPU. ``CudaCopies`` copies through page-locked memory on a stream
    of its own, at the same time as the device computes.
    """

    def gather(self, tensor: Tensor, rows: Tensor) -> Tensor:
        """Gather rows of a tensor in host memory for ``to_device``."""
        return tensor.index_select(0, rows)

    def to_device(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """Start to copy tensors; the result waits for the copies on the caller's stream and returns them."""
        copied = {name: tensor.clone() for name, tensor in tensors.items()}
        return lambda: copied

    def on_host(self, compute: Callable[[], Tensor]) -> Tensor:
        """Compute a tensor on the device and return it in host memory; wait for this work only."""
        return compute().cpu()

    def begin_on_host(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Start to compute a tensor on the caller's stream and to copy it; the result waits and returns it in host
        memory."""
        return compute

    def on_side_stream(self) -> AbstractContextManager[object]:
        """Return a context in which the device computes beside the caller's stream; see ``use_after``."""
        return nullcontext()

    def use_after(self, tensors: Iterable[Tensor], computed: Any) -> None:
        """Let the caller's stream use tensors of another stream after an event; the host does not wait."""

    def record_event(self) -> Any:
        """Return an event for ``to_host`` and ``use_after`` after all work that is queued on the caller's stream."""
        return None

    def to_host(self, tensors: Mapping[str, Tensor], computed: Any) -> dict[str, Tensor]:
        """Copy tensors of the device to host memory after an event, and wait for the copies."""
        return {name: tensor.clone() for name, tensor in tensors.items()}

    @staticmethod
    def of(device: torch.device) -> "Copies":
        """Return the one object, with one stream, that makes the copies of a device."""
        if device not in _copies:
            _copies[device] = CudaCopies(device) if device.type == "cuda" else Copies()
        return _copies[device]


_copies: dict[torch.device, Copies] = {}


class CudaCopies(Copies):
    """Copies of a CUDA device: see Copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def gather(self, tensor: Tensor, rows: Tensor) -> Tensor:
        out = torch.empty(len(rows), *tensor.shape[1:], dtype=tensor.dtype, device="cpu", pin_memory=True)
        return torch.index_select(tensor, 0, rows, out=out)

    def to_device(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        with torch.cuda.stream(self._stream):
            copied = {
                name: (tensor if tensor.is_pinned() else tensor.pin_memory()).to(self._device, non_blocking=True)
                for name, tensor in tensors.items()
            }
            done = self._stream.record_event()

        def wait() -> dict[str, Tensor]:
            self.use_after(copied.values(), done)
            return copied

        return wait

    def on_host(self, compute: Callable[[], Tensor]) -> Tensor:
        with torch.cuda.stream(self._stream):
            return compute().cpu()

    def begin_on_host(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        computed = compute()
        copied = torch.empty(computed.shape, dtype=computed.dtype, device="cpu", pin_memory=True)
        copied.copy_(computed, non_blocking=True)
        done = self.record_event()

        def wait() -> Tensor:
            done.synchronize()
            return copied

        return wait

    def on_side_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def use_after(self, tensors: Iterable[Tensor], computed: Any) -> None:
        if computed is None:
            return
        current = torch.cuda.current_stream(self._device)
        current.wait_event(computed)
        for tensor in tensors:
            # The allocator does not reuse the memory before the caller's stream has finished with it.
            tensor.record_stream(current)

    def record_event(self) -> Any:
        return torch.cuda.current_stream(self._device).record_event()

    def to_host(self, tensors: Mapping[str, Tensor], computed: Any) -> dict[str, Tensor]:
        self._stream.wait_event(computed)
        with torch.cuda.stream(self._stream):
            copied = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True).copy_(
                    tensor, non_blocking=True
                )
                for name, tensor in tensors.items()
            }
        self._stream.synchronize()
        return copied
