"""Predictions for the real data sets from a measured run of ``preprocess``, by the costs of a row."""

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_dlrm.contracts.schema import CRITEO_CATEGORICAL


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Costs of one row in a measured run."""

    core_s: Mapping[str, float]
    """Stage -> core seconds, if all cores were busy."""
    disk_bytes: float
    """Peak disk space beside the input."""
    output_bytes: float
    worker_bytes: float
    """Memory of a worker; it does not depend on the number of rows."""


@dataclass(frozen=True, kw_only=True)
class Target:
    name: str
    rows: int
    largest_table: float
    """Share of the largest table in the distinct values of all tables."""


TARGETS = (
    Target(name="kaggle", rows=45_840_617, largest_table=10_131_227 / 33_762_577),
    Target(name="terabyte, 24 days", rows=4_373_472_329, largest_table=292_775_614 / 882_774_559),
)
# Assumptions; they are printed with the prediction.
_NODES = (1, 10)
_NODE_CORES = 16
_EFFICIENCY = 0.7
_NODE_BYTES_PER_S = 1e9
_TEXT_BYTES = 250


def predict(cost: Cost, target: Target, nodes: int) -> dict[str, float]:
    """Return the seconds of each stage and their ``total``, ``memory`` of a node, ``disk`` and ``output`` in bytes."""
    cores = nodes * _NODE_CORES * _EFFICIENCY
    parallel = dict.fromkeys(cost.core_s, 1 / cores)
    # One core counts a column.
    parallel["count"] = max(1 / min(cores, len(CRITEO_CATEGORICAL)), target.largest_table)
    seconds = {stage: target.rows * core_s * parallel[stage] for stage, core_s in cost.core_s.items()}
    # The text is read once; intermediate files are written and read once.
    moved = target.rows * (_TEXT_BYTES + 2 * cost.disk_bytes)
    return {
        **seconds,
        "total": max(sum(seconds.values()), moved / (nodes * _NODE_BYTES_PER_S)),
        "memory": _NODE_CORES * cost.worker_bytes,
        "disk": target.rows * cost.disk_bytes,
        "output": target.rows * cost.output_bytes,
    }


def render_predictions(cost: Cost) -> str:
    """Return the predictions for the real data sets as text, with the assumptions."""
    stages = list(cost.core_s)
    lines = ["prediction, not measured, from the largest run of ours above:"]
    header = f"  {'data set':<20}{'nodes x cores':>14}" + "".join(f"{stage:>10}" for stage in stages)
    lines.append(f"{header}{'total':>10}{'memory of a node':>18}{'disk meanwhile':>16}{'result':>10}")
    for target in TARGETS:
        for nodes in _NODES:
            found = predict(cost, target, nodes)
            times = "".join(f"{_minutes(found[name]):>10}" for name in (*stages, "total"))
            sizes = (
                f"{found['memory'] / 1e9:>15,.1f} GB{found['disk'] / 1e9:>13,.0f} GB{found['output'] / 1e9:>7,.0f} GB"
            )
            lines.append(f"  {target.name:<20}{f'{nodes} x {_NODE_CORES}':>14}{times}{sizes}")
    lines += [
        f"  assumed: a core at {_EFFICIENCY:.0%} of the speed of these here; plain text (of compressed days, one core "
        "reads one file);",
        "  a column is counted by one core, in a share of the stage like its share of the distinct values; costs of a "
        "row as measured",
        f"  here; disks or a shared file system of {_NODE_BYTES_PER_S / 1e9:.0f} GB/s a node, which bound the total; "
        "as many workers as cores, each with",
        "  the memory of one here, whatever the rows.",
    ]
    return "\n".join(lines)


def _minutes(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.1f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )
