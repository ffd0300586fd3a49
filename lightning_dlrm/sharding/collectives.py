"""Collective operations between the ranks of a fit."""

import json
import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from lightning_dlrm.contracts.errors import UserError

_LONG_TIMEOUT = timedelta(hours=2)

_LOST = (
    *("closed by peer", "reset by peer", "pair closure", "timed out", "timeout", "broken pipe", "connection refused"),
    *("no route to host", "network is unreachable", "connection abort", "read error", "write error", "not connected"),
)
"""Parts of gloo's messages about a rank that has ended, is stopped, or has lost its network; in lower case."""

_long_timeout_group: tuple[Any, Any] | None = None
"""The default process group for which the gloo group with the long timeout was made, and that group."""


class Ranks:
    """The ranks of the default process group, or this process alone without a process group.

    Every rank makes the same calls in the same order. Arrays are exchanged on the device that the group's backend
    needs: CUDA with NCCL, else the CPU. Tensors are exchanged on their own device.

    Args:
        long_timeout: use a gloo group with a timeout of two hours, for actions that may take one rank much longer than
            another, such as writing to disk.
    """

    def __init__(self, long_timeout: bool = False) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.ranks = dist.get_world_size() if together else 1
        self._group = _make_long_timeout_group() if long_timeout and self.ranks > 1 else None

    def all_gather(self, values: NDArray) -> list[NDArray]:
        """Return the array of every rank; all arrays have the same shape and dtype."""
        if self.ranks == 1:
            return [values]
        mine = self._to_wire(values)
        theirs = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(theirs, mine, group=self._group)
        return [part.cpu().numpy() for part in theirs]

    def all_gather_uneven(self, values: NDArray) -> list[NDArray]:
        """Return the array [n, ...] of every rank; lengths may differ, dtypes are the same."""
        lengths = [int(part[0]) for part in self.all_gather(np.array([len(values)]))]
        padded = np.zeros((max(lengths), *values.shape[1:]), values.dtype)
        padded[: len(values)] = values
        return [part[:length] for part, length in zip(self.all_gather(padded), lengths, strict=True)]

    def all_gather_json(self, value: Any) -> list[Any]:
        """Return the JSON value of every rank."""
        text = json.dumps(value).encode()
        parts = self.all_gather_uneven(np.frombuffer(text, np.uint8))
        return [json.loads(part.tobytes()) for part in parts]

    def broadcast(self, values: NDArray, source: int) -> NDArray:
        """Return the array [n] of rank ``source``; lengths may differ between ranks, dtypes are the same."""
        if self.ranks == 1:
            return values
        length = int(self.all_gather(np.array([len(values)]))[source][0])
        wire = self._to_wire(values if self.rank == source else np.empty(length, values.dtype))
        dist.broadcast(wire, source, group=self._group)
        return wire.cpu().numpy()

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks."""
        total = value.detach().clone()
        if self.ranks > 1:
            dist.all_reduce(total, group=self._group)
        return total

    def all_to_all(self, values: Tensor, sent: Sequence[int], received: Sequence[int]) -> "AsyncCollective":
        """Start to send a part of ``values`` to each rank and to receive a part of each rank's values.

        Args:
            values: [sum of sent, ...], by ascending receiving rank.
            sent: number of rows that each rank receives from this one.
            received: number of rows that this rank receives from each.

        Returns:
            The operation; its ``wait`` returns [sum of received, ...], by ascending sending rank.
        """
        if self.ranks == 1:
            return AsyncCollective(values, values, None)
        values = values.contiguous()
        arriving = values.new_empty((sum(received), *values.shape[1:]))
        work = dist.all_to_all_single(arriving, values, list(received), list(sent), group=self._group, async_op=True)
        return AsyncCollective(values, arriving, work)

    def run_on_all_ranks(self, action: Callable[[], Any]) -> list[Any]:
        """Run an action on every rank and return the results of all ranks, which are JSON values.

        Raises:
            UserError: the action raised a UserError on a rank; every rank raises the first one.
        """
        try:
            result = {"value": action()}
        except UserError as mistake:
            result = {"error": str(mistake)}
        results = self.all_gather_json(result)
        for result in results:
            if "error" in result:
                error = UserError(result["error"])
                error.on_all_ranks = True
                raise error
        return [result["value"] for result in results]

    def run_on_rank_zero(self, action: Callable[[], Any]) -> Any:
        """Run an action on rank 0 and return its result, a JSON value, on every rank.

        Raises:
            UserError: the action raised a UserError; every rank raises it.
        """
        return self.run_on_all_ranks(action if self.rank == 0 else lambda: None)[0]

    def _to_wire(self, values: NDArray) -> Tensor:
        device = "cuda" if dist.get_backend(self._group) == "nccl" else "cpu"
        return torch.from_numpy(np.require(values, requirements=["C", "W"])).to(device)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return Ranks().sum(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Ranks().sum(grad)


@torch.compiler.disable
def differentiable_sum(value: Tensor) -> Tensor:
    """Return the sum of a tensor over the ranks; its gradient is the sum of the ranks' gradients."""
    total: Tensor = _Sum.apply(value)
    return total


class AsyncCollective:
    """A collective operation that has been started.

    Args:
        sent: the tensor to send; kept alive until the operation ends.
        received: the tensor to fill.
        work: torch's handle of the operation; None if the operation is complete.
    """

    def __init__(self, sent: Tensor, received: Tensor, work: Any) -> None:
        self._sent: Tensor | None = sent
        self._received, self._work = received, work

    def wait(self) -> Tensor:
        """Wait for the operation and return the received tensor.

        On a GPU the caller's stream waits, and the caller does not. Several threads may wait, each with its own stream.
        """
        if self._work is not None:
            self._work.wait()
            self._sent = None
        return self._received


def reserve_port() -> socket.socket:
    """Return a socket with a TCP port of this machine for the store of a process group.

    The system gives no other process the port while the socket is open. The store can still listen on the port,
    because this socket does not listen, and both set SO_REUSEADDR.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held


def slice_start(known: int | None, samples: int) -> int:
    """Return the position in the global batch of the first sample of this rank's slice.

    Args:
        known: the position, if the stream says it; None to ask the ranks.
        samples: size of the slice.
    """
    if known is not None:
        return known
    ranks = Ranks()
    return int(sum(int(size[0]) for size in ranks.all_gather(np.array([samples]))[: ranks.rank]))


def set_timeout(seconds: float) -> None:
    """Set the time that the default group waits for a rank that does not answer."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def is_lost_rank(error: BaseException) -> bool:
    """Return whether an error says that another rank has ended or does not answer."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
        return True
    # Gloo raises RuntimeError, whose message begins with a path in gloo's sources.
    text = str(error).lower()
    return isinstance(error, RuntimeError) and "/gloo/" in text and any(phrase in text for phrase in _LOST)


def is_first_to_report(message: str) -> bool:
    """Return whether no other rank has reported an error that differs in numbers alone, such as the size of its slice.

    The ranks need not be in step: they count in the store by which the process group was made. The others let rank 0
    report first. Rank 0 may hold the store, so it waits for the others for two seconds.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return True
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"lightning_dlrm/error/{attempt}/{re.sub('[0-9]+', '', message)}"
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=2))
        if dist.get_rank() != 0:
            time.sleep(0.5)
        is_first = store.add(key, 1) == 1
        end = time.monotonic() + 2
        while dist.get_rank() == 0 and store.add(key, 0) < dist.get_world_size() and time.monotonic() < end:
            time.sleep(0.01)
    except (KeyError, RuntimeError):
        # Without the store, it is better to print an error twice than to lose it.
        return True
    return is_first


def _make_long_timeout_group() -> Any:
    global _long_timeout_group
    if _long_timeout_group is None or _long_timeout_group[0] is not dist.group.WORLD:
        _long_timeout_group = dist.group.WORLD, dist.new_group(backend="gloo", timeout=_LONG_TIMEOUT)
    return _long_timeout_group[1]
