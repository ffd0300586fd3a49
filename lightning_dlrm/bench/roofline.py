"""Costs of the parts of a model: operations, memory traffic, and the least time of both at this machine's rates.

A multiply-add counts as two operations, an addition as one. Traffic is the least number of bytes between processor and
memory: every parameter, activation and gradient once for each pass that reads or writes it, and the unique table rows
of the batch. Caches may hold some of it, so a small part can be faster than its floor.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from lightning_dlrm.bench.contenders import Workload
from lightning_dlrm.bench.measurement import finisher
from lightning_dlrm.contracts.batch import Batch

Part = Literal["tables", "bottom MLP", "interaction", "top MLP", "update"]
PARTS: tuple[Part, ...] = get_args(Part)

_EXACT = 4
"""Bytes of an element of parameters, their gradients, and looked-up vectors, in either precision."""
_LONG_S, _BUDGET_S = 0.05, 1.0
"""Seconds after which a product is large enough, and after which no further try is made."""


@dataclass(frozen=True)
class Cost:
    """Operations and memory traffic of one training step."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.bytes

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


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

    def floor_of(self, part: Part, cost: Cost, precision: str) -> float:
        """Return the least seconds of a part of a step."""
        return self.floor(cost.flops, cost.bytes, precision_of(part, precision))

    def bound_of(self, part: Part, cost: Cost, precision: str) -> Literal["memory", "arithmetic"]:
        """Return what bounds a part of a step."""
        return "memory" if cost.intensity < self.flops[precision_of(part, precision)] / self.bytes else "arithmetic"

    def __str__(self) -> str:
        products = ", ".join(f"{rate / 1e9:.3g} GFLOP/s in {precision}" for precision, rate in self.flops.items())
        return f"floors from rates measured now: {products}, {self.bytes / 1e9:.3g} GB/s"


def precision_of(part: Part, precision: str) -> str:
    """Return the precision of a part's arithmetic: table rows and updates of parameters are always float32."""
    return "32-true" if part in ("tables", "update") else precision


def measure_rates(device: torch.device, precisions: Iterable[str]) -> MachineRates:
    """Measure the rates, of float32 and of the given precisions: the best of several tries of each."""
    flops = {
        precision: _product_rate(torch.bfloat16 if precision == "bf16-mixed" else torch.float32, device)
        for precision in dict.fromkeys(["32-true", *precisions])
    }
    source = torch.ones((1 << 30 if device.type == "cuda" else 1 << 27) // 4, device=device)
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


def costs(workload: Workload, batches: Sequence[Batch], precision: str) -> dict[Part, Cost]:
    """Return the cost of each part of a model in a step with plain SGD, forward and backward: the mean over batches."""
    each = [_costs(workload, batch, precision) for batch in batches]
    count = len(each)
    return {
        part: Cost(sum(c[part].flops for c in each) / count, sum(c[part].bytes for c in each) / count)
        for part in each[0]
    }


def floor(workload: Workload, batches: Sequence[Batch], rates: MachineRates, precision: str) -> float:
    """Return the least seconds of a step, whose parts run one after the other."""
    return sum(rates.floor_of(part, c, precision) for part, c in costs(workload, batches, precision).items())


def distinct_rows(workload: Workload, batch: Batch) -> int:
    """Return the number of distinct rows that a batch looks up in all tables."""
    starts = torch.tensor([0, *itertools.accumulate(workload.tables)][:-1], device=batch.ids.values.device)
    table_of_each = batch.ids.bag_of_each() % len(workload.tables)
    return len(torch.unique(batch.ids.values.view(-1) + starts[table_of_each]))


def _costs(workload: Workload, batch: Batch, precision: str) -> dict[Part, Cost]:
    size, width, joined = len(batch), workload.width, workload.joined
    number = 2 if precision == "bf16-mixed" else 4
    looked_up, distinct = batch.ids.values.numel(), distinct_rows(workload, batch)
    vectors, rows = size * len(workload.tables) * width * _EXACT, distinct * width * _EXACT
    # Forward reads ids and rows and writes vectors; backward reads their gradients and writes the rows'.
    tables = Cost(2 * looked_up * width, 4 * looked_up + rows + vectors + vectors + rows)
    mlp = [joined, *workload.top, *([1] if workload.bottom else [])]
    top, bottom = _mlp(mlp, size, number), _mlp((workload.dense, *workload.bottom), size, number)
    layers, weights, computed = workload.crosses
    if not layers:
        # Forward reads the vectors and writes the pairs; backward reads both again and writes the vectors' gradients.
        moved = 3 * (len(workload.tables) + 1) * width + 2 * workload.pairs
        interaction = Cost(6 * size * workload.pairs * width, number * size * moved)
    else:
        interaction = Cost(
            6 * size * layers * (weights + joined), number * layers * (3 * weights + 5 * size * computed)
        )
    if not workload.bottom:
        top += _mlp((joined + workload.top[-1], 1), size, number)
    crosses = layers * weights
    # Biases are left out.
    dense = (bottom.flops + top.flops) / (6 * size) + crosses
    parts: dict[Part, Cost] = {
        "tables": tables, "bottom MLP": bottom, "interaction": interaction, "top MLP": top,
        "update": Cost(2 * (distinct * width + dense), 3 * (rows + dense * _EXACT)),
    }  # fmt: skip
    return {part: cost for part, cost in parts.items() if cost.bytes}


def _mlp(widths: Sequence[int], size: int, number: int) -> Cost:
    """Return the cost of an MLP.

    Forward reads inputs and weights and writes outputs. Backward reads both and the outputs' gradients, and writes the
    gradients of both.
    """
    layers = itertools.pairwise(widths)
    return sum(
        (Cost(6 * size * i * o, number * (3 * i * o + size * (3 * i + 2 * o))) for i, o in layers), start=Cost(0, 0)
    )
