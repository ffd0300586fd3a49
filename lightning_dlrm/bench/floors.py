"""What this machine can do at best, measured: matrix products and memory traffic."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from lightning_dlrm.bench.options import finisher


@dataclass(frozen=True)
class MachineRates:
    """The rates that floors are made of."""

    flops: Mapping[str, float]
    """Precision -> floating-point operations a second, of a large square matrix product."""
    bytes: float
    """Bytes a second, read and written, of a copy that fits no cache."""

    def floor(self, flops: float, moved: float, precision: str) -> float:
        """Seconds that so many operations and bytes take at least, where the two overlap wholly."""
        return max(flops / self.flops[precision], moved / self.bytes)

    def __str__(self) -> str:
        products = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {precision}" for precision, rate in self.flops.items())
        return f"floors from rates measured now: {products}, {self.bytes / 1e9:,.1f} GB/s"


def measure(device: torch.device, precisions: Iterable[str]) -> MachineRates:
    """The best of several tries of each."""
    large = device.type == "cuda"
    size = 8192 if large else 1536
    flops = {}
    for precision in precisions:
        dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty(size, size, device=device, dtype=dtype)
        flops[precision] = 2 * size**3 / _best(lambda: torch.mm(left, right, out=out), device)  # noqa: B023
    source = torch.ones((1 << 30 if large else 1 << 27) // 4, device=device)
    target = torch.empty_like(source)
    return MachineRates(flops, 2 * source.nbytes / _best(lambda: target.copy_(source), device))


def _best(work: Callable[[], object], device: torch.device, tries: int = 10) -> float:
    finish = finisher(device)
    seconds = []
    for _ in range(tries + 1):  # the first one warms up
        finish()
        start = time.perf_counter()
        work()
        finish()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
