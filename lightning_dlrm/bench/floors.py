"""Measured peak rates of this machine: matrix products and memory traffic."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from lightning_dlrm.bench.options import finisher

_LONG_S, _BUDGET_S = 0.05, 1.0
"""Seconds after which a product is large enough, and after which no further try is made."""


@dataclass(frozen=True)
class MachineRates:
    """Peak rates, from which floors are computed."""

    flops: Mapping[str, float]
    """Precision -> floating-point operations a second of a large square matrix product."""
    bytes: float
    """Bytes a second, read and written, of a copy that is larger than the caches."""

    def floor(self, flops: float, moved: float, precision: str) -> float:
        """Return the least seconds of some operations and bytes moved, if the two overlap completely."""
        return max(flops / self.flops[precision], moved / self.bytes)

    def __str__(self) -> str:
        products = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {precision}" for precision, rate in self.flops.items())
        return f"floors from rates measured now: {products}, {self.bytes / 1e9:,.1f} GB/s"


def measure(device: torch.device, precisions: Iterable[str]) -> MachineRates:
    """Measure the rates: the best of several tries of each."""
    large = device.type == "cuda"
    flops = {
        precision: _product_rate(torch.bfloat16 if precision == "bf16-mixed" else torch.float32, device)
        for precision in precisions
    }
    source = torch.ones((1 << 30 if large else 1 << 27) // 4, device=device)
    target = torch.empty_like(source)
    return MachineRates(flops, 2 * source.nbytes / _best(lambda: target.copy_(source), device))


def _product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Return the operations a second of a matrix product that is as large as it needs to be.

    Processors without instructions for bfloat16 multiply a hundred times slower, so the size grows from a small one.
    """
    rate, size, largest = 0.0, 192, 8192 if device.type == "cuda" else 1536
    while size <= largest:
        left, right, out = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(3))
        seconds = _best(lambda: torch.mm(left, right, out=out), device)  # noqa: B023
        rate, size = max(rate, 2 * size**3 / seconds), 2 * size
        if seconds > _LONG_S:
            break
    return rate


def _best(work: Callable[[], object], device: torch.device, tries: int = 10) -> float:
    finish = finisher(device)
    seconds: list[float] = []
    # The first try warms up.
    while len(seconds) <= tries and (len(seconds) < 2 or sum(seconds) < _BUDGET_S):
        finish()
        start = time.perf_counter()
        work()
        finish()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
