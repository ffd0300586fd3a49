"""Contract: what is computed beside the caller's stream is waited for before it is used, and its memory is not reused
before; the host waits for the sizes of a batch alone. Streams are recorded here, not real; tensors are on the CPU."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.engine.transfer import SideStream
from lightning_dlrm.sharding.collectives import Ranks
from lightning_dlrm.sharding.placement import ShardedPlacement
from lightning_dlrm.sharding.plan import Piece, Plan
from lightning_dlrm.tables import host
from lightning_dlrm.tables.lookup import EmbeddingTables, placed_by
from lightning_dlrm.tables.table import Table
from tests.toy import toy_batch


class Streams:
    """Records what is asked of streams, and on which stream tensors are sorted and copied."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.kept: list[int] = []
        """Addresses of the tensors whose memory the caller's stream keeps."""
        self._current = ["caller"]
        empty, sort = torch.empty, torch.sort
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(self, "side"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(self, self._current[-1]))
        monkeypatch.setattr(torch.cuda, "stream", self._enter)
        monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **options: empty(*shape, **options))
        monkeypatch.setattr(torch, "sort", lambda *args, **options: (self.say("sort"), sort(*args, **options))[1])
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: self.kept.append(tensor.data_ptr()))

    def say(self, what: str) -> None:
        self.log.append(f"{what} on {self._current[-1]}")

    @contextlib.contextmanager
    def _enter(self, stream: "Stream") -> Iterator[None]:
        self._current.append(stream.name)
        yield
        self._current.pop()


class Stream:
    def __init__(self, streams: Streams, name: str) -> None:
        self._streams, self.name = streams, name

    def record_event(self) -> Any:
        self._streams.log.append(f"event of {self.name}")
        return Event(self._streams, self.name)

    def wait_stream(self, other: "Stream") -> None:
        self._streams.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: "Event") -> None:
        self._streams.log.append(f"{self.name} waits for {event.name}")


class Event:
    def __init__(self, streams: Streams, name: str) -> None:
        self._streams, self.name = streams, name

    def synchronize(self) -> None:
        self._streams.log.append(f"host waits for {self.name}")


def test_a_prefetched_request_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(ranks=1, pieces=(Piece(table="A", start=0, stop=6, rank=0),))
    with placed_by(partial(ShardedPlacement, plan=plan, ranks=Ranks())):
        tables = EmbeddingTables([Table.of_column("A", 6)], 3, 1)
    tables.kernels = "plain"  # those in C are for CPUs alone
    streams = Streams(monkeypatch)
    cpu = torch.device("cpu")
    monkeypatch.setitem(host._copies, cpu, host.CudaCopies(cpu))
    ids = SparseIds(values=torch.tensor([[4], [1], [4]], dtype=torch.int32), tables=1)
    tables.prefetch(ids)
    # The request, and the copy of its sizes.
    assert streams.log == ["sort on side", "event of side", "event of side"]
    pending = tables.placement._prefetched
    read = {tensor.data_ptr() for tensor in pending._unsized.tensors()}
    streams.log.clear()
    found = tables(ids)
    assert streams.log == ["host waits for side", "caller waits for side"] and set(streams.kept) == read
    assert torch.equal(found.flatten(1), tables.weight.detach()[[4, 1, 4]])

    streams.log.clear()
    again = SparseIds(values=ids.values, tables=1)
    assert torch.equal(tables(again), found)
    # Not prefetched: all of it is the caller's.
    assert streams.log == ["sort on caller", "event of caller", "host waits for caller"]


def test_a_batch_that_a_side_stream_copies_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams(monkeypatch)
    batch = toy_batch(4, 0)
    moved = SideStream(torch.device("cpu")).send(batch)
    tensors = (moved.label, moved.dense, moved.ids.values, moved.rows)
    assert streams.log == ["caller waits for side"]
    assert set(streams.kept) == {tensor.data_ptr() for tensor in tensors if tensor is not None}
