"""What the ranks say to each other."""

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

    def all_to_all(self, values: Tensor, sent: Sequence[int], received: Sequence[int]) -> "Travelling":
        """Begins to give each rank its part of ``values`` and to get this rank's part of theirs.

        Args:
            values: [sum of sent, ...], by ascending rank of whom it is for.
            sent: how much of it is for each rank.
            received: how much comes from each rank.

        Returns:
            [sum of received, ...], by ascending rank of whom it is from, once it has arrived.
        """
        if self.ranks == 1:
            return Travelling(values, values, None)
        values = values.contiguous()
        arriving = values.new_empty((sum(received), *values.shape[1:]))
        work = dist.all_to_all_single(arriving, values, list(received), list(sent), group=self._group, async_op=True)
        return Travelling(values, arriving, work)

    def all_to_all_counts(self, counts: Tensor) -> "Travelling":
        """int64 [ranks, ...] -> the same: what each rank has counted for this one."""
        return self.all_to_all(counts, [1] * self.ranks, [1] * self.ranks)

    def each_does(self, action: Callable[[], Any]) -> list[Any]:
        """Every rank acts and hears what all of them got, as JSON values.

        Raises:
            UserError: some rank's action raised one; every rank raises the first of them.
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

    def first_does(self, action: Callable[[], Any]) -> Any:
        """Rank 0 acts; every rank waits for it, and gets the JSON value that it returned.

        Raises:
            UserError: the action raised one; every rank raises it.
        """
        return self.each_does(action if self.rank == 0 else lambda: None)[0]

    def _to_wire(self, values: NDArray) -> Tensor:
        device = "cuda" if dist.get_backend(self._group) == "nccl" else "cpu"
        return torch.from_numpy(np.require(values, requirements=["C", "W"])).to(device)


class Travelling:
    """What is on its way from and to the other ranks."""

    def __init__(self, leaving: Tensor, arriving: Tensor, work: Any) -> None:
        # Kept as long as it is being sent.
        self._leaving: Tensor | None = leaving
        self._arriving, self._work = arriving, work

    def arrived(self) -> Tensor:
        """What the other ranks have sent; waits for it. On a GPU the caller's stream does, not the caller.

        Several threads may ask, each with a stream of its own.
        """
        if self._work is not None:
            self._work.wait()
            self._leaving = None
        return self._arriving


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
