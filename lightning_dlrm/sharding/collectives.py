"""Collective operations between the ranks of a fit."""

import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from lightning_dlrm.contracts.errors import UserError

_PATIENCE = timedelta(hours=2)

# The default group it was made beside, and the group itself.
_patient: tuple[Any, Any] | None = None


class Ranks:
    """The ranks of the default process group, or this process alone where there is none.

    Every rank makes the same calls in the same order. Arrays travel on the device that the group's
    backend needs: CUDA under NCCL, else the CPU; tensors stay where they are.

    Args:
        patient: wait for hours instead of the group's timeout, over gloo: for what one rank may do
            much longer than another, such as writing to disk.
    """

    def __init__(self, patient: bool = False) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.ranks = dist.get_world_size() if together else 1
        self._group = _patient_group() if patient and self.ranks > 1 else None

    def all_gather(self, values: NDArray) -> list[NDArray]:
        """Every rank's array; all are of one shape and type."""
        if self.ranks == 1:
            return [values]
        mine = self._to_wire(values)
        theirs = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(theirs, mine, group=self._group)
        return [part.cpu().numpy() for part in theirs]

    def all_gather_uneven(self, values: NDArray) -> list[NDArray]:
        """Every rank's array [n, ...], of whatever length; all are of one type."""
        lengths = [int(part[0]) for part in self.all_gather(np.array([len(values)]))]
        padded = np.zeros((max(lengths), *values.shape[1:]), values.dtype)
        padded[: len(values)] = values
        return [part[:length] for part, length in zip(self.all_gather(padded), lengths, strict=True)]

    def all_gather_json(self, value: Any) -> list[Any]:
        """Every rank's JSON value."""
        text = json.dumps(value).encode()
        parts = self.all_gather_uneven(np.frombuffer(text, np.uint8))
        return [json.loads(part.tobytes()) for part in parts]

    def broadcast(self, values: NDArray, source: int) -> NDArray:
        """The array [n] of rank ``source``, of whatever length; all are of one type."""
        if self.ranks == 1:
            return values
        length = int(self.all_gather(np.array([len(values)]))[source][0])
        wire = self._to_wire(values if self.rank == source else np.empty(length, values.dtype))
        dist.broadcast(wire, source, group=self._group)
        return wire.cpu().numpy()

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the ranks."""
        total = value.detach().clone()
        if self.ranks > 1:
            dist.all_reduce(total, group=self._group)
        return total

    def all_to_all(self, values: Tensor, sent: Sequence[int], received: Sequence[int]) -> "AsyncCollective":
        """Start to send a part of ``values`` to each rank and to receive this rank's part of theirs.

        Args:
            values: [sum of sent, ...], by ascending receiving rank.
            sent: how many rows each rank receives from this one.
            received: how many rows this rank receives from each.

        Returns:
            [sum of received, ...], by ascending sending rank, once it has been waited for.
        """
        if self.ranks == 1:
            return AsyncCollective(values, values, None)
        values = values.contiguous()
        arriving = values.new_empty((sum(received), *values.shape[1:]))
        work = dist.all_to_all_single(arriving, values, list(received), list(sent), group=self._group, async_op=True)
        return AsyncCollective(values, arriving, work)

    def all_to_all_counts(self, counts: Tensor) -> "AsyncCollective":
        """int64 [ranks, ...] -> the same shape: what each rank has counted for this one."""
        return self.all_to_all(counts, [1] * self.ranks, [1] * self.ranks)

    def run_on_all_ranks(self, action: Callable[[], Any]) -> list[Any]:
        """Run an action on every rank and return the results of all ranks, which are JSON values.

        Raises:
            UserError: the action raised one on some rank; every rank raises the first of them.
        """
        try:
            result = {"value": action()}
        except UserError as error:
            result = {"error": str(error)}
        results = self.all_gather_json(result)
        for result in results:
            if "error" in result:
                raise UserError(result["error"])
        return [result["value"] for result in results]

    def run_on_rank_zero(self, action: Callable[[], Any]) -> Any:
        """Run an action on rank 0 and return its result, a JSON value, on every rank.

        Raises:
            UserError: the action raised one; every rank raises it.
        """
        return self.run_on_all_ranks(action if self.rank == 0 else lambda: None)[0]

    def _to_wire(self, values: NDArray) -> Tensor:
        device = "cuda" if dist.get_backend(self._group) == "nccl" else "cpu"
        return torch.from_numpy(np.require(values, requirements=["C", "W"])).to(device)


class AsyncCollective:
    """A collective operation that has been started.

    Args:
        sent: the tensor that is sent; kept alive until it has been.
        received: the tensor that is filled.
        work: torch's handle of the operation; None if it is done already.
    """

    def __init__(self, sent: Tensor, received: Tensor, work: Any) -> None:
        self._sent: Tensor | None = sent
        self._received, self._work = received, work

    def wait(self) -> Tensor:
        """Wait for the operation and return the received tensor. On a GPU the caller's stream waits, not the caller.

        Several threads may wait, each with a stream of its own.
        """
        if self._work is not None:
            self._work.wait()
            self._sent = None
        return self._received


def set_timeout(seconds: float) -> None:
    """How long the default group waits for a rank that does not answer."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def lost_rank(error: BaseException) -> bool:
    """Whether an error says that another rank is gone or does not answer."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
        return True
    # Gloo tells of it in plain RuntimeErrors, which begin with the place in its sources.
    text = str(error).lower()
    told = ("closed by peer", "reset by peer", "timed out", "broken pipe", "no route to host", "connection refused")
    return isinstance(error, RuntimeError) and "/gloo/" in text and any(words in text for words in told)


def _patient_group() -> Any:
    global _patient
    if _patient is None or _patient[0] is not dist.group.WORLD:
        _patient = dist.group.WORLD, dist.new_group(backend="gloo", timeout=_PATIENCE)
    return _patient[1]
