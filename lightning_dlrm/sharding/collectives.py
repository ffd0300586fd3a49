"""What the ranks say to each other."""

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor


class Ranks:
    """The ranks of the default process group, or this process alone where there is none.

    Arrays travel on the device that the group's backend needs: CUDA under NCCL, else the CPU.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.ranks = dist.get_world_size() if together else 1

    def all_gather(self, values: NDArray) -> list[NDArray]:
        """Every rank's array; all are of one shape and type."""
        if self.ranks == 1:
            return [values]
        mine = _to_wire(values)
        theirs = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(theirs, mine)
        return [part.cpu().numpy() for part in theirs]

    def broadcast(self, values: NDArray, source: int) -> NDArray:
        """The array [n] of rank ``source``, of whatever length; all are of one type."""
        if self.ranks == 1:
            return values
        length = int(self.all_gather(np.array([len(values)]))[source][0])
        wire = _to_wire(values if self.rank == source else np.empty(length, values.dtype))
        dist.broadcast(wire, source)
        return wire.cpu().numpy()


def _to_wire(values: NDArray) -> Tensor:
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)
