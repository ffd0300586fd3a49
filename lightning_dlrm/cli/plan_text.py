"""A plan as JSON and as text."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_dlrm.sharding.balance import HostPlacement
from lightning_dlrm.sharding.costs import RankCost, TableCost, TableLoad, imbalance
from lightning_dlrm.sharding.plan import Plan

_RANKS_SHOWN = 16


def plan_document(
    plan: Plan, costs: Sequence[RankCost], of_tables: Sequence[TableCost], batch_size: int
) -> dict[str, Any]:
    """Return everything that ``describe_plan`` prints, and the pieces, as JSON values."""
    return {
        "ranks": plan.ranks,
        "batch_size": batch_size,
        "imbalance_bytes": imbalance([cost.bytes for cost in costs]),
        "imbalance_work": imbalance([cost.work for cost in costs]),
        "per_rank": [
            {
                "rank": cost.rank,
                "pieces": cost.pieces,
                "rows": cost.rows,
                "bytes": cost.bytes,
                "host_bytes": cost.host_bytes,
                "rows_asked_per_batch": cost.work,
                "sent_bytes_per_step": {
                    "ids": cost.sent_ids,
                    "vectors": cost.sent_vectors,
                    "gradients": cost.sent_gradients,
                },
            }
            for cost in costs
        ],
        "sent_bytes_per_step": {
            cost.name: {
                "as_rows": float(cost.sent_rows.sum()),
                "as_sums": float(cost.sent_sums.sum()) if np.isfinite(cost.sent_sums).all() else None,
            }
            for cost in of_tables
        },
        "pooled": list(plan.pooled),
        "tables": plan.document()["tables"],
    }


def describe_plan(
    plan: Plan, loads: Sequence[TableLoad], costs: Sequence[RankCost], of_tables: Sequence[TableCost]
) -> str:
    """Return a plan as text: tables of its ranks, split tables and tables with bags, and a line of its balance."""
    host = any(cost.host_bytes for cost in costs)
    sizes = ("GiB", "of it on host") if host else ("GiB",)
    lines: list[tuple[str, ...]] = [
        ("rank", "pieces", "rows", *sizes, "rows asked", "ids out", "vectors out", "gradients out")
    ]
    lines += [_line(str(cost.rank), cost, host) for cost in costs[:_RANKS_SHOWN]]
    if len(costs) > _RANKS_SHOWN:
        lines.append(("...",) * len(lines[0]))
        lines.append(_line("mean", _summary(costs, statistics.fmean), host))
        lines.append(_line("largest", _summary(costs, max), host))
    text = [
        aligned(lines),
        "rows asked: by all ranks for a global batch, or sums of them; out: KiB that a rank sends in a training step",
    ]
    cut = [load for load in loads if len(plan.tables[load.name]) > 1]
    if cut:
        rows = [("table", "rows", "pieces", "ranks", "first piece", "largest piece")]
        for load in cut:
            pieces = plan.tables[load.name]
            first, largest = pieces[0].rows, max(piece.rows for piece in pieces)
            ranks = len({piece.rank for piece in pieces})
            rows.append((load.name, f"{load.rows:,}", str(len(pieces)), str(ranks), f"{first:,}", f"{largest:,}"))
        text += ["", aligned(rows)]
    bags = [(load, cost) for load, cost in zip(loads, of_tables, strict=True) if load.indices_per_sample > 1]
    if bags and plan.ranks > 1:
        ways: list[tuple[str, ...]] = [("table", "ids in a bag", "KiB as rows", "KiB as sums", "sent as")]
        for load, cost in bags:
            as_rows, as_sums = cost.sent_rows.sum() / 1024, cost.sent_sums.sum() / 1024
            sums = f"{as_sums:,.1f}" if math.isfinite(as_sums) else "impossible"
            how = "sums" if load.name in plan.pooled else "rows"
            ways.append((load.name, f"{load.indices_per_sample:.3g}", f"{as_rows:,.1f}", sums, how))
        text += ["", aligned(ways)]
        text.append(
            "KiB: ids, vectors and gradients of all ranks in a training step; sums: of a bag's rows on one rank"
        )
    text += [
        "",
        f"{len(loads)} tables, {len(loads) - len(cut)} whole, in {len(plan.pieces)} pieces on {plan.ranks} ranks; "
        f"largest share / mean: bytes {imbalance([c.bytes for c in costs]):.3f}, "
        f"work {imbalance([c.work for c in costs]):.3f}",
    ]
    return "\n".join(text)


def describe_places(places: HostPlacement, loads: Sequence[TableLoad]) -> str:
    """Return the place of each table, and the memory and traffic of a device and its host, as text.

    Args:
        places: places chosen by ``place_tables``.
        loads: loads of whole tables.
    """
    lines: list[tuple[str, ...]] = [("table", "rows", "GiB", "rows fetched", "place")]
    for load in sorted(loads, key=lambda load: -load.bytes):
        fetched = places.fetched.get(load.name)
        size, moved = f"{load.bytes / 2**30:.3f}", "" if fetched is None else f"{fetched:,.0f}"
        place = "device" if fetched is None else "host"
        if load.name in places.cut:
            place = f"host from row {places.cut[load.name]:,}"
        lines.append((load.name, f"{load.rows:,}", size, moved, place))
    return (
        f"{aligned(lines)}\nrows fetched: before each step, from host memory, and written back after it\n\n"
        f"device: {places.device_bytes / 2**30:.3f} GiB, of which {places.cached_bytes / 2**30:.3f} for cached rows; "
        f"host: {places.host_bytes / 2**30:.3f} GiB; a step moves {places.bus_bytes / 2**20:,.1f} MiB either way"
    )


def _line(name: str, cost: RankCost, host: bool) -> tuple[str, ...]:
    sent = (cost.sent_ids, cost.sent_vectors, cost.sent_gradients)
    return (
        name,
        f"{cost.pieces:,}",
        f"{cost.rows:,}",
        f"{cost.bytes / 2**30:.3f}",
        *([f"{cost.host_bytes / 2**30:.3f}"] if host else []),
        f"{cost.work:,.0f}",
        *(f"{amount / 1024:,.1f}" for amount in sent),
    )


def _summary(costs: Sequence[RankCost], of: Any) -> RankCost:
    return RankCost(
        rank=0,
        pieces=math.ceil(of([c.pieces for c in costs])),
        rows=math.ceil(of([c.rows for c in costs])),
        bytes=math.ceil(of([c.bytes for c in costs])),
        host_bytes=math.ceil(of([c.host_bytes for c in costs])),
        work=of([c.work for c in costs]),
        sent_ids=of([c.sent_ids for c in costs]),
        sent_vectors=of([c.sent_vectors for c in costs]),
        sent_gradients=of([c.sent_gradients for c in costs]),
    )


def aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
