"""Costs of the parts of a model: operations, memory traffic, and the least time of both on this machine.

A multiply-add counts as two operations, an addition as one. Traffic is the least number of bytes between processor and
memory: every parameter, activation and gradient once for each pass that reads or writes it, and the unique table rows
of the batch. Caches may hold some of it, so a small part can be faster than its floor.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from lightning_dlrm.bench.contenders import Workload
from lightning_dlrm.bench.floors import MachineRates
from lightning_dlrm.contracts.batch import Batch

Part = Literal["tables", "bottom MLP", "interaction", "top MLP", "update"]
PARTS: tuple[Part, ...] = get_args(Part)

_EXACT = 4
"""Bytes of an element of parameters, their gradients, and looked-up vectors, in either precision."""


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
    return sum(rates.floor(c.flops, c.bytes, precision) for c in costs(workload, batches, precision).values())


def distinct_rows(workload: Workload, batch: Batch) -> int:
    """Return the number of distinct rows that a batch looks up in all tables."""
    starts = torch.tensor([0, *itertools.accumulate(workload.tables)][:-1], device=batch.ids.values.device)
    table_of_each = batch.ids.bag_of_each() % len(workload.tables)
    return len(torch.unique(batch.ids.values.view(-1) + starts[table_of_each]))


def _costs(workload: Workload, batch: Batch, precision: str) -> dict[Part, Cost]:
    size, width, count = len(batch), workload.width, len(workload.tables)
    number = 2 if precision == "bf16-mixed" else 4
    looked_up, distinct = batch.ids.values.numel(), distinct_rows(workload, batch)
    vectors, rows = size * count * width * _EXACT, distinct * width * _EXACT
    # Forward reads ids and rows and writes vectors; backward reads their gradients and writes the rows'.
    tables = Cost(2 * looked_up * width, 4 * looked_up + rows + vectors + vectors + rows)
    if workload.model == "dlrm":
        joined = count + 1
        pairs = joined * (joined - 1) // 2
        bottom = _mlp((workload.dense, *workload.bottom), size, number)
        top = _mlp((width + pairs, *workload.top, 1), size, number)
        # Forward reads the vectors and writes the pairs; backward reads both again and writes the vectors' gradients.
        interaction = Cost(6 * size * pairs * width, number * size * (3 * joined * width + 2 * pairs))
    else:
        joined = count * width + workload.dense
        outputs = 1 if workload.model == "dcn" else joined
        bottom = Cost(0, 0)
        deep, logit = _mlp((joined, *workload.top), size, number), _mlp((joined + workload.top[-1], 1), size, number)
        top = deep + logit
        product = Cost(
            6 * size * (joined * outputs + joined), 3 * number * joined * outputs + 5 * number * size * joined
        )
        interaction = Cost(6 * product.flops, 6 * product.bytes)
    update = Cost(2 * (distinct * width + _weights(workload)), 3 * (rows + _weights(workload) * _EXACT))
    parts: dict[Part, Cost] = {
        "tables": tables, "bottom MLP": bottom, "interaction": interaction, "top MLP": top, "update": update
    }  # fmt: skip
    return {part: cost for part, cost in parts.items() if cost.bytes}


def _mlp(widths: Sequence[int], size: int, number: int) -> Cost:
    """Return the cost of an MLP.

    Forward reads inputs and weights and writes outputs. Backward reads both and the outputs' gradients, and writes the
    gradients of both.
    """
    flops = moved = 0
    for width_in, width_out in itertools.pairwise(widths):
        flops += 6 * size * width_in * width_out
        moved += number * (3 * width_in * width_out + size * (3 * width_in + 2 * width_out))
    return Cost(flops, moved)


def _weights(workload: Workload) -> int:
    """Return the number of dense weights without biases."""
    joined = len(workload.tables) + 1
    if workload.model == "dlrm":
        chains: tuple[tuple[int, ...], ...] = (
            (workload.dense, *workload.bottom),
            (workload.width + joined * (joined - 1) // 2, *workload.top, 1),
        )
        return sum(a * b for chain in chains for a, b in itertools.pairwise(chain))
    wide = len(workload.tables) * workload.width + workload.dense
    crosses = 6 * wide * (1 if workload.model == "dcn" else wide)
    return crosses + sum(a * b for a, b in itertools.pairwise((wide, *workload.top))) + wide + workload.top[-1]
