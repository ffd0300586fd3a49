"""Predicted speeds of training steps on a GPU, from counted operations, bytes and launches; no GPU is needed.

A prediction is not a measurement: it holds as far as the assumptions of ``Gpu`` do.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from lightning_dlrm.bench import roofline
from lightning_dlrm.bench.contenders import OurStep, Workload, draw_batch
from lightning_dlrm.contracts.terminal import aligned
from lightning_dlrm.models.layers import MLP, DotInteraction

_TABLE_PARTS = ("tables", "update")
_SORT_BYTES = 96
"""Bytes that sorting an index moves: four passes over a row of 4 bytes and a place of 8, read and written."""
_NO_KERNELS = (
    "view", "t", "transpose", "slice", "select", "as_strided", "expand", "unsqueeze", "squeeze", "reshape", "detach",
    "empty", "empty_like", "empty_strided", "resize_", "unbind", "split", "split_with_sizes", "flatten", "alias",
    "lift_fresh", "result_type", "unfold", "permute", "narrow", "set_", "_unsafe_view", "resolve_conj", "resolve_neg",
)  # fmt: skip
"""Operators of torch that launch no kernel."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What predictions assume: rates of a GPU, and the shares of them that this code reaches."""

    name: str = "H200"
    flops_per_s: float = 989e12
    """Of dense bfloat16 products."""
    bytes_per_s: float = 4.8e12
    """Of its memory."""
    of_flops: float = 0.5
    """Share of ``flops_per_s`` that the products of MLPs and cross layers reach."""
    of_bytes: float = 0.3
    """Share of ``bytes_per_s`` for the least traffic of dense layers: eager operators read and write activations about
    twice as often as they must, at 0.6 of the rate."""
    of_rows: float = 0.35
    """Share of ``bytes_per_s`` for scattered table rows and for sorting."""
    launch_s: float = 12e-6
    """Time of the host for each operator that launches a kernel, autograd included."""
    decoded_per_s: float = 1.6e6
    """Rows a second of a thread of the loader: 0.8 of bare decoding on this project's CPUs."""
    threads: int = 8
    """Threads of the loader: the default on a machine with 16 cores."""

    def __str__(self) -> str:
        return (
            f"assumed of one {self.name}: {self.flops_per_s / 1e12:,.0f} TFLOP/s in bfloat16, of which products reach "
            f"{self.of_flops:.0%}; {self.bytes_per_s / 1e12:.1f} TB/s, of which dense layers reach {self.of_bytes:.0%} "
            f"(counted at their least traffic) and table rows and sorting {self.of_rows:.0%}; "
            f"{self.launch_s * 1e6:.0f} us of the host for each operator with a kernel, beside the device's work; "
            f"{self.threads} threads of the loader at {self.decoded_per_s / 1e6:.1f} million rows/s"
        )


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Predicted time of a training step in bfloat16 with fused kernels for table rows."""

    batch_size: int
    flops: float
    """Operations of a step."""
    bytes: float
    """Bytes of memory traffic of a step."""
    launches: int
    """Operators of a step that launch a kernel."""
    products_s: float
    dense_s: float
    """Time of the dense layers beyond that of their products."""
    rows_s: float
    """Time of lookups, sorting and updates of table rows."""
    host_s: float

    @property
    def device_s(self) -> float:
        return self.products_s + self.dense_s + self.rows_s

    @property
    def step_s(self) -> float:
        return max(self.device_s, self.host_s)

    @property
    def samples_per_s(self) -> float:
        return self.batch_size / self.step_s

    @property
    def bound(self) -> str:
        """What the step waits for."""
        times = {"products": self.products_s, "dense traffic": self.dense_s, "table rows": self.rows_s}
        return "host" if self.host_s > self.device_s else max(times, key=lambda name: times[name])


def predict(workload: Workload, batch_size: int, gpu: Gpu) -> Prediction:
    """Predict a step of a workload.

    Args:
        workload: model and shape of the batches; table sizes determine how many distinct rows a drawn batch reads.
        batch_size: samples of a batch.
        gpu: assumptions.
    """
    batch = draw_batch(workload, batch_size, seed=0)
    costs = roofline.costs(workload, [batch], "bf16-mixed")
    of_rows = sum((costs[part] for part in costs if part in _TABLE_PARTS), roofline.Cost(0, 0))
    dense = sum((costs[part] for part in costs if part not in _TABLE_PARTS), roofline.Cost(0, 0))
    moved = of_rows.bytes + _SORT_BYTES * batch.ids.values.numel()
    products_s = dense.flops / (gpu.flops_per_s * gpu.of_flops)
    launches = count_launches(workload)
    return Prediction(
        batch_size=batch_size,
        flops=dense.flops + of_rows.flops,
        bytes=dense.bytes + moved,
        launches=launches,
        products_s=products_s,
        dense_s=dense.bytes / (gpu.bytes_per_s * gpu.of_bytes),
        rows_s=moved / (gpu.bytes_per_s * gpu.of_rows),
        host_s=launches * gpu.launch_s,
    )


def count_launches(workload: Workload) -> int:
    """Return the number of operators of a training step that launch a kernel on a GPU, counted on a CPU.

    The tables are cut to a few rows, which changes no operator. Lookups and updates are one operator each, as on a GPU;
    the kernels in C of dense layers, which GPUs do without, are left out.
    """
    # Without it, the profiler's library writes a line to stderr at each start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    network = workload.cut(100).network()
    for module in network.modules():
        if isinstance(module, (MLP, DotInteraction)):
            module.kernels = "plain"
    step = OurStep(network, "bf16-mixed", torch.device("cpu"))
    batch = draw_batch(workload.cut(100), 8, seed=0)
    step(batch)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step(batch)
    operators = [event for event in profiled.events() or [] if "::" in event.name and not event.cpu_children]
    return sum(event.name.rpartition("::")[2] not in _NO_KERNELS for event in operators)


def render_predictions(predictions: Iterable[tuple[str, str, Prediction, float]]) -> str:
    """Return a table of (name, target, prediction, predicted samples a second)."""
    cells = [("row", "batch", "target", "predicted", "device", "host", "GFLOP", "GB", "operators", "bound by")]
    for name, target, found, rate in predictions:
        cells.append(
            (
                name,
                f"{found.batch_size:,}",
                target,
                f"{rate / 1e6:.1f}M samples/s",
                f"{found.device_s * 1e3:.2f} ms",
                f"{found.host_s * 1e3:.2f} ms",
                f"{found.flops / 1e9:,.0f}",
                f"{found.bytes / 1e9:.2f}",
                str(found.launches),
                found.bound if rate == found.samples_per_s else "loader",
            )
        )
    return "\n".join(aligned(cells, left=(0, 9)))
