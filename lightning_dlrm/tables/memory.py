"""Memory of tables: large pages, fast copies of rows, and reuse of freed memory during a fit."""

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt, in malloc.h
_LARGEST_MMAP_THRESHOLD = 2**25  # of glibc
_LARGE_PAGE_BYTES = 2**21


def empty_table(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Return an uninitialized tensor; on a CPU under Linux it uses pages of 2 MiB if the system has them.

    Lookups read scattered rows: with pages of 4 KiB most of them also miss the processor's cache of page addresses
    (TLB).

    Args:
        shape: the first dimension is the rows.
        dtype: dtype of the elements.
        device: None for torch's default device.
    """
    device = torch.get_default_device() if device is None else device
    table = torch.empty(shape, dtype=dtype, device="meta")
    if device.type != "cpu" or table.nbytes < _LARGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, table.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # The Linux kernel may be built without large pages.
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=table.numel()).view(*shape)


def gather_rows(weight_RD: Tensor, rows_N: Tensor) -> Tensor:
    """Return ``weight_RD[rows_N]``: [N, D].

    On a CPU this calls ``embedding_bag`` with bags of one row, whose kernel prefetches rows: it takes less than half
    the time of ``index_select`` for rows scattered over a large table.
    """
    if weight_RD.device.type != "cpu" or weight_RD.dtype == torch.float64:
        return weight_RD.index_select(0, rows_N)
    starts_N = torch.arange(len(rows_N), dtype=rows_N.dtype, device="cpu")
    return functional.embedding_bag(rows_N, weight_RD, starts_N, mode="sum")


def put_rows(weight: Tensor, rows_U: Tensor, values: Tensor) -> None:
    """Set ``weight[rows_U] = values`` for unique rows, in place; both are contiguous.

    On a CPU, torch copies element by element. Large copies of aligned rows use elements of 16 bytes, which takes two
    thirds of the time with 64 floats in a row.
    """
    if weight.device.type == "cpu" and values.nbytes >= 2**20 and weight.dim() == 2:
        at_16_bytes = weight.storage_offset() == values.storage_offset() == 0
        if at_16_bytes and values.stride(0) * values.element_size() % 16 == 0:
            weight, values = weight.view(torch.complex128), values.view(torch.complex128)
    weight.index_copy_(0, rows_U, values)


def keep_freed_memory() -> None:
    """Make glibc keep the memory of freed temporary tensors, up to 32 MiB each, for the next step.

    Otherwise the system would clear and map every page again in each step.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
