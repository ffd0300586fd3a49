"""Tables larger than the device: their rows and optimiser state in host memory, on the device those of the batches
at hand.

The rows of a batch that was announced are fetched while an earlier one computes; what that one's update
changes of them is put right on the device. Updated rows are written back while the next batch computes.
One thread reads and writes host memory, in the order in which it is asked to, so that a row is never
read before it is written.

Shape suffixes: B samples, F tables, D width, R rows of all tables, N indices of all bags, U distinct
rows among them.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.lookup import EmbeddingLookup, RowGradient, SortedLookups
from lightning_dlrm.tables.pooling import PoolingLookup, pool_rows
from lightning_dlrm.tables.tables import EmbeddingTables

_hands = ThreadPoolExecutor(1, thread_name_prefix="host tables")
"""Whoever touches tables in host memory during training; a thread that starts with its first work."""


@dataclass(eq=False)
class RowsAtHand:
    """Some rows of the tables, with their optimiser state, on the device."""

    lookups: SortedLookups
    """Which indices look up which of them; on the device."""
    host_rows: Tensor
    """[U]: ``lookups.rows``, in host memory."""
    weight: Tensor
    """[U, D]."""
    state: dict[str, Tensor]
    """Slot name -> [U, ...]; without what nobody has asked for yet."""

    def take_over(self, newer: "RowsAtHand") -> None:
        """Replaces the rows that the other one has too by what they are there."""
        if not len(newer.lookups.rows):
            return
        at_U = torch.searchsorted(newer.lookups.rows, self.lookups.rows).clamp(max=len(newer.lookups.rows) - 1)
        shared_U = newer.lookups.rows.index_select(0, at_U) == self.lookups.rows
        self.weight = _replaced(self.weight, newer.weight, at_U, shared_U)
        self.state = {slot: _replaced(values, newer.state[slot], at_U, shared_U) for slot, values in self.state.items()}

    @staticmethod
    def merged(parts: "Sequence[RowsAtHand]") -> "RowsAtHand":
        """The rows of all of them, which agree on those that they share."""
        if len(parts) == 1:
            return parts[0]
        lookups = SortedLookups.of(torch.cat([part.lookups.rows for part in parts]))
        first_U = lookups.order[torch.cumsum(lookups.counts, 0) - lookups.counts]

        def taken(tensors: Iterable[Tensor]) -> Tensor:
            return torch.cat(list(tensors)).index_select(0, first_U)

        slots = set.intersection(*(set(part.state) for part in parts))
        return RowsAtHand(
            lookups,
            torch.unique(torch.cat([part.host_rows for part in parts])),
            taken(part.weight for part in parts),
            {slot: taken(part.state[slot] for part in parts) for slot in slots},
        )


class HostRows(EmbeddingLookup):
    """What a lookup is whose ``weight`` stays in host memory whatever device the module is moved to.

    Arithmetic, that of the update rule too, is done on the device, by the same code as for other tables.
    Between an update and ``settle``, ``weight`` may lack the update's rows.
    """

    LOOKS_AHEAD: ClassVar[bool] = True
    ON_HOST: ClassVar[bool] = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._state: Mapping[str, Tensor] = {}
        self._begun: weakref.WeakSet[Begun] = weakref.WeakSet()
        self._held: list[RowsAtHand] = []
        """Of the micro-batches whose gradients are waiting for an update."""
        self._written: Future | None = None

    def clear_gradient(self) -> None:
        super().clear_gradient()
        self._held = []

    def update(
        self,
        gradient: RowGradient,
        state: dict[str, Tensor],
        change: Callable[[Tensor, RowGradient, dict[str, Tensor]], None],
    ) -> None:
        """See EmbeddingLookup.update."""
        rows, self._held = RowsAtHand.merged(self._held), []
        # Fetched with the rows from now on.
        self._state = state
        if missing := {slot: values for slot, values in state.items() if slot not in rows.state}:
            fetched = _hands.submit(_fetch, missing, rows.host_rows, self._copies()).result()
            rows.state |= fetched()
        positions_U = torch.arange(len(gradient.rows), device=gradient.rows.device)
        change(rows.weight, RowGradient(positions_U, gradient.values), rows.state)
        for begun in list(self._begun):
            begun.rows().take_over(rows)
        self.settle()
        told = self._copies().computed()
        self._written = _hands.submit(self._write_back, rows, told)

    def settle(self) -> None:
        """See EmbeddingLookup.settle."""
        if self._written is not None:
            self._written.result()
            self._written = None

    def device(self) -> torch.device:
        """Where the arithmetic is done."""
        raise TypeError(f"{type(self).__name__} does not define device")

    def begin(self, rows_on_host: Callable[[], Tensor]) -> "Begun":
        """Asks for rows of ``weight``.

        Args:
            rows_on_host: called by the thread that fetches them, gives the row of each index in host memory.
        """
        begun = Begun(_hands.submit(self._fetch_batch, rows_on_host))
        self._begun.add(begun)
        return begun

    def hold(self, rows: RowsAtHand, gradient: RowGradient) -> None:
        """Takes the gradient of rows at hand, and keeps them for the update."""
        self.add_gradient(gradient)
        self._held.append(rows)

    def _fetch_batch(self, rows_on_host: Callable[[], Tensor]) -> Callable[[], RowsAtHand]:
        host, copies = SortedLookups.of(rows_on_host()), self._copies()
        lookups = copies.to_device({"rows": host.rows, "counts": host.counts, "order": host.order})
        fetched = _fetch({"": self.weight.detach(), **self._state}, host.rows, copies)

        def at_hand() -> RowsAtHand:
            state = fetched()
            return RowsAtHand(SortedLookups(**lookups()), host.rows, state.pop(""), state)

        return at_hand

    def _write_back(self, rows: RowsAtHand, told: Any) -> None:
        updated = self._copies().to_host({"": rows.weight, **rows.state}, told)
        with torch.no_grad():
            for slot, values in updated.items():
                (self._state[slot] if slot else self.weight).index_copy_(0, rows.host_rows.long(), values)

    def _copies(self) -> "Copies":
        return Copies.of(self.device())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HostRows":
        """Takes part in changes of type, but not of device."""
        weight = self._parameters.pop("weight")
        super()._apply(fn, recurse)
        assert weight is not None
        dtype = fn(torch.empty(0, dtype=weight.dtype, device="cpu")).dtype
        weight.data = weight.data.to(dtype)
        self._parameters["weight"] = weight
        return self


class HostTables(HostRows, PoolingLookup, EmbeddingTables):
    """Tables in host memory; for the arguments see EmbeddingTables."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        offsets = [piece.offset for piece in self.pieces]
        self._host_offsets = torch.tensor(offsets, dtype=self.row_offsets.dtype, device="cpu")

    def announce(self, ids: SparseIds) -> None:
        """See EmbeddingLookup.announce."""
        ids.ahead[self] = self._ask(ids)

    def device(self) -> torch.device:
        """See HostRows.device."""
        return self.row_offsets.device

    def _pool(self, ids: SparseIds, offsets: Tensor | None, bag_N: Tensor | None, weights_N: Tensor | None) -> Tensor:
        begun = ids.ahead.pop(self, None) or self._ask(ids)
        rows = begun.rows()
        anchor = torch.empty(0, device=rows.weight.device, requires_grad=self.weight.requires_grad)
        return pool_rows(anchor, rows.weight, rows.lookups, offsets, bag_N, weights_N, partial(self._take, rows))

    def _take(self, rows: RowsAtHand, values_UD: Tensor) -> None:
        self.hold(rows, RowGradient(rows.lookups.rows.long(), values_UD))

    def _ask(self, ids: SparseIds) -> "Begun":
        values, offsets = ids.values.cpu(), None if ids.offsets is None else ids.offsets.cpu()

        def rows_on_host() -> Tensor:
            host_ids = SparseIds(values=values, tables=len(self.tables), offsets=offsets)
            if offsets is None:
                return (values + self._host_offsets).view(-1)
            return values + self._host_offsets[host_ids.bag_of_each() % max(len(self.tables), 1)]

        return self.begin(rows_on_host)

    @staticmethod
    def _place() -> torch.device | None:
        # Lightning builds networks with the accelerator as default device; sizes are counted on the meta device.
        meta = torch.get_default_device().type == "meta"
        return torch.device("meta" if meta else "cpu")


class Begun:
    """Rows on their way to the device."""

    def __init__(self, fetched: "Future[Callable[[], RowsAtHand]]") -> None:
        self._fetched = fetched
        self._rows: RowsAtHand | None = None

    def rows(self) -> RowsAtHand:
        if self._rows is None:
            self._rows = self._fetched.result()()
        return self._rows


def _fetch(tensors: Mapping[str, Tensor], rows: Tensor, copies: "Copies") -> Callable[[], dict[str, Tensor]]:
    """Some rows of tensors in host memory; what it returns gives them on the device."""
    with torch.no_grad():
        return copies.to_device({name: copies.gather(tensor, rows) for name, tensor in tensors.items()})


class Copies:
    """Copies between host memory and a device, beside what the device computes.

    On a CUDA device they go through page-locked memory, on a stream of their own. Where the device is
    the CPU they are plain copies: a stand-in, by which everything else is tested.
    """

    def gather(self, tensor: Tensor, rows: Tensor) -> Tensor:
        """Some rows of a tensor in host memory, in memory from which ``to_device`` copies."""
        return tensor.index_select(0, rows)

    def to_device(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """Begins to copy; what it returns gives the copies to the caller's stream."""
        copied = {name: tensor.clone() for name, tensor in tensors.items()}
        return lambda: copied

    def on_host(self, made: Callable[[], Tensor]) -> Tensor:
        """What is made on the device, beside what it computes for others; waits for it."""
        return made().cpu()

    def computed(self) -> Any:
        """What ``to_host`` waits for: all that the caller's stream has been given so far."""
        return None

    def to_host(self, tensors: Mapping[str, Tensor], told: Any) -> dict[str, Tensor]:
        """Copies of tensors of the device, in host memory; waits for them."""
        return {name: tensor.clone() for name, tensor in tensors.items()}

    @staticmethod
    def of(device: torch.device) -> "Copies":
        if device not in _copies:
            _copies[device] = CudaCopies(device) if device.type == "cuda" else Copies()
        return _copies[device]


_copies: dict[torch.device, Copies] = {}


class CudaCopies(Copies):
    """See Copies."""

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
            there = self._stream.record_event()

        def taken() -> dict[str, Tensor]:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(there)
            for tensor in copied.values():
                # Its memory is not used again before the caller's stream is done with it.
                tensor.record_stream(current)
            return copied

        return taken

    def on_host(self, made: Callable[[], Tensor]) -> Tensor:
        with torch.cuda.stream(self._stream):
            return made().cpu()

    def computed(self) -> Any:
        return torch.cuda.current_stream(self._device).record_event()

    def to_host(self, tensors: Mapping[str, Tensor], told: Any) -> dict[str, Tensor]:
        self._stream.wait_event(told)
        with torch.cuda.stream(self._stream):
            copied = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True).copy_(
                    tensor, non_blocking=True
                )
                for name, tensor in tensors.items()
            }
        self._stream.synchronize()
        return copied


def _replaced(values: Tensor, newer: Tensor, at_U: Tensor, shared_U: Tensor) -> Tensor:
    return torch.where(shared_U.view(-1, *[1] * (values.dim() - 1)), newer.index_select(0, at_U), values)
