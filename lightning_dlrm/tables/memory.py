"""How memory is asked for: few, large pages for tables, and none given back in the middle of a fit."""

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt, in malloc.h
_LARGEST_KEPT = 2**25  # the largest threshold that glibc takes
_LARGE_PAGE = 2**21


def empty_table(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """An uninitialised tensor; on a CPU under Linux on pages of 2 MiB where the system has them.

    Rows are read here and there: with pages of 4 KiB, most of a step's lookups would also have to look up
    where their page is.

    Args:
        shape: rows first.
        dtype: of the elements.
        device: None for torch's default device.
    """
    device = torch.get_default_device() if device is None else device
    table = torch.empty(shape, dtype=dtype, device="meta")
    if device.type != "cpu" or table.nbytes < _LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, table.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A kernel may have none.
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=table.numel()).view(*shape)


def keep_freed_memory() -> None:
    """Makes glibc keep what temporary tensors give back, up to 32 MiB each, for the next step.

    Given back to the system, every page of it would be cleared and mapped anew in each step.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
