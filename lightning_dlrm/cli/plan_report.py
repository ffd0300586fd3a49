"""A plan as JSON, as text, and as a drawing."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import Namespace

from lightning_dlrm.cli.palette import OKABE_ITO, filling
from lightning_dlrm.cli.report import data_words
from lightning_dlrm.contracts.figures import save_figure
from lightning_dlrm.contracts.schema import DatasetSchema
from lightning_dlrm.contracts.terminal import aligned, binary_size, counted
from lightning_dlrm.sharding.balance import SMALL_BYTES, HostPlacement
from lightning_dlrm.sharding.costs import RankCost, TableCost, TableLoad, imbalance
from lightning_dlrm.sharding.plan import Plan

_RANKS_SHOWN = 16


def subject_of(settings: Namespace, configurations: Sequence[str], schema: DatasetSchema) -> dict[str, Any]:
    """Return the network, the configurations and the data of a command, as JSON values."""
    return {
        "network": settings.model.network.class_path.rpartition(".")[2],
        "configurations": list(configurations),
        "data": data_words(schema),
    }


def describe_subject(setup: Mapping[str, Any]) -> str:
    """Return the subject of a command in words, such as ``DLRM of dlrm.yaml on demo data``."""
    configs = " + ".join(setup["configurations"])
    return f"{setup['network']}{configs and f' of {configs}'} on {setup['data']}"


def describe_setup(setup: Mapping[str, Any]) -> str:
    """Return the first line of ``plan``: what the plan is for.

    Args:
        setup: ``network``, ``configurations``, ``data``, ``batch_size``, ``ranks``; ``skew``, which is None if lookups
            are counted; ``plan``, the file of the plan, and ``device_memory``, or None.

    >>> describe_setup({"network": "DLRM", "configurations": ["dlrm.yaml"], "data": "demo data", "batch_size": 2048,
    ...                 "ranks": 8, "skew": 0.0, "plan": None, "device_memory": None})
    'DLRM of dlrm.yaml on demo data, global batch 2,048, 8 ranks; assumed: rows of a table are looked up equally often'
    """
    ranks, file = setup["ranks"], setup["plan"]
    if setup["device_memory"] is not None:
        memory = re.sub(r"(?<=\d)(?=[A-Za-z])", " ", setup["device_memory"])
        where = f"{counted(ranks, 'device')} with {memory}{' each' * (ranks > 1)}"
    else:
        where = counted(ranks, "rank") + ("" if file is None else f" of the plan {file}")
    lookups = describe_lookups(setup["skew"])
    return f"{describe_subject(setup)}, global batch {setup['batch_size']:,}, {where}; {lookups}"


def describe_lookups(skew: float | None) -> str:
    """Return how often the rows of a table are looked up; ``skew`` is None if lookups are counted."""
    if skew is None:
        return "lookups as counted in the dataset"
    if skew == 0:
        return "assumed: rows of a table are looked up equally often"
    power = "" if skew == 1 else f"^{skew:g}"
    return f"assumed: the k-th row of a table is looked up 1/k{power} times as often as its first row"


def plan_document(plan: Plan, costs: Sequence[RankCost], of_tables: Sequence[TableCost]) -> dict[str, Any]:
    """Return everything that ``describe_plan`` prints, and the pieces, as JSON values."""
    return {
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
    held, unit, size = held_unit(max(cost.bytes for cost in costs)), *sent_unit(costs)
    sizes = (held[0], "of it on host") if host else (held[0],)
    lines: list[tuple[str, ...]] = [
        ("rank", "pieces", "rows", *sizes, "requested", *(f"{unit} {what}" for what in ("ids", "vectors", "gradients")))
    ]
    lines += [_line(str(cost.rank), cost, host, held, size) for cost in costs[:_RANKS_SHOWN]]
    if len(costs) > _RANKS_SHOWN:
        lines.append(("...",) * len(lines[0]))
        lines.append(_line("mean", _summary(costs, statistics.fmean), host, held, size))
        lines.append(_line("largest", _summary(costs, max), host, held, size))
    text = [
        *aligned(lines, left=()),
        f"{held[0]}: memory of a rank's rows and their optimizer state",
        "requested: rows that all ranks request from this rank in a step, or sums of the",
        "  rows of one bag. A rank requests a row once, even if many samples use it",
        f"{unit} ids, vectors, gradients: what this rank sends for the tables in a step;",
        "  gradients of the dense layers, which every rank has, are not counted",
    ]
    pieces_of = {load: plan.pieces_within(load.name, load.start, load.start + load.rows) for load in loads}
    cut = [load for load in loads if len(pieces_of[load]) > 1]
    if cut:
        rows = [("table", "rows", "pieces", "ranks", "first piece", "largest piece")]
        for load in cut:
            pieces = pieces_of[load]
            first, largest = pieces[0].rows, max(piece.rows for piece in pieces)
            ranks = len({piece.rank for piece in pieces})
            rows.append((load.name, f"{load.rows:,}", str(len(pieces)), str(ranks), f"{first:,}", f"{largest:,}"))
        text += [
            "",
            "Tables in several pieces, each of consecutive rows:",
            *aligned(rows, left=()),
            "first piece: rows of the piece that begins at row 0",
        ]
    bags = [(load, cost) for load, cost in zip(loads, of_tables, strict=True) if load.indices_per_sample > 1]
    if bags and plan.ranks > 1:
        ways: list[tuple[str, ...]] = [("table", "ids in a bag", f"{unit} as rows", f"{unit} as sums", "sent as")]
        for load, cost in bags:
            as_rows, as_sums = cost.sent_rows.sum() / size, cost.sent_sums.sum() / size
            sums = _in_unit(as_sums) if math.isfinite(as_sums) else "impossible"
            how = "sums" if load.name in plan.pooled else "rows"
            ways.append((load.name, f"{load.indices_per_sample:.3g}", _in_unit(as_rows), sums, how))
        text += ["", f"{unit}: what all ranks send in a training step; sums: of a bag's rows on one rank"]
        text += aligned(ways, left=())
    text += [
        "",
        f"{counted(len(loads), 'table')}, {len(loads) - len(cut)} whole, in {counted(len(plan.pieces), 'piece')} on "
        f"{counted(plan.ranks, 'rank')};\n"
        f"balance, largest rank / mean: bytes {imbalance([c.bytes for c in costs]):.3f}, "
        f"requested rows {imbalance([c.work for c in costs]):.3f}",
    ]
    if plan.ranks > 1 and statistics.fmean(cost.bytes for cost in costs) < SMALL_BYTES:
        text.append(
            f"Bytes are balanced from {binary_size(SMALL_BYTES)} a rank on; below it, tables have fewer pieces."
        )
    return "\n".join(text)


def describe_places(places: HostPlacement, loads: Sequence[TableLoad]) -> str:
    """Return the place of each table, and the memory and traffic of a device and its host, as text.

    Args:
        places: places chosen by ``place_tables``.
        loads: loads of whole tables.
    """
    lines: list[tuple[str, ...]] = [("table", "rows", "size", "rows fetched", "served", "place")]
    for load in sorted(loads, key=lambda load: -load.bytes):
        fetched = places.fetched.get(load.name)
        size, moved = binary_size(load.bytes), "" if fetched is None else f"{fetched:,.0f}"
        place = "device" if fetched is None else "host"
        served = f"{places.served.get(load.name, 1):.1%}"
        if load.name in places.cut:
            place = f"host from row {places.cut[load.name]:,}"
        lines.append((load.name, f"{load.rows:,}", size, moved, served, place))
    table = "\n".join(aligned(lines, left=()))
    unit, size_of_unit = held_unit(places.device_bytes)

    def amount(size: float) -> str:
        return f"{_in_unit(size / size_of_unit)} {unit}"

    legend = "rows fetched: before each step, from host memory, and written back after it\n" * bool(places.on_host)
    return (
        f"{legend}served: share of the lookups that read rows on the device\n{table}\n\n"
        f"device: {amount(places.device_bytes)}, of which {amount(places.cached_bytes)} for cached rows;\n"
        "dense layers and activations are on the device too, but are not counted here;\n"
        f"host: {amount(places.host_bytes)}; a step moves {binary_size(places.bus_bytes)} either way"
    )


def sent_unit(costs: Sequence[RankCost]) -> tuple[str, int]:
    """Return the unit in which text and figure give what ranks send, and its bytes."""
    largest = max((max(cost.sent_ids, cost.sent_vectors, cost.sent_gradients) for cost in costs), default=0.0)
    return ("MiB", 1 << 20) if largest >= 10 << 20 else ("KiB", 1 << 10)


def held_unit(largest: float) -> tuple[str, int]:
    """Return the unit in which text and figure give all amounts up to the largest, and its bytes."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if largest >= size:
            return unit, size
    return "KiB", 1 << 10


def _in_unit(amount: float, digits: int = 1) -> str:
    """Format an amount with some digits after the point, and more if it would look like nothing.

    >>> _in_unit(1234.56), _in_unit(0.0), _in_unit(0.0042)
    ('1,234.6', '0.0', '0.004')
    """
    return f"{amount:,.{digits}f}" if not 0 < amount < 0.5 * 10**-digits else f"{float(f'{amount:.1g}'):f}".rstrip("0")


def _line(name: str, cost: RankCost, host: bool, held: tuple[str, int], unit: int) -> tuple[str, ...]:
    sent, digits = (cost.sent_ids, cost.sent_vectors, cost.sent_gradients), 3 if held[0] == "GiB" else 1
    return (
        name,
        f"{cost.pieces:,}",
        f"{cost.rows:,}",
        *(_in_unit(amount / held[1], digits) for amount in (cost.bytes, cost.host_bytes)[: 1 + host]),
        f"{cost.work:,.0f}",
        *(_in_unit(amount / unit) for amount in sent),
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


PLOT_WIDTH = 10.0
"""Inches."""
_TABLES_COLOURED, _RANKS_HATCHED = 8, 64


def _stack(axes: Any, width: float, amounts: Mapping[str, Sequence[float]]) -> list[float]:
    """Draw amounts of each rank on top of each other, and return their sums."""
    sums = [0.0] * len(next(iter(amounts.values())))
    for number, (name, values) in enumerate(amounts.items()):
        # On thin bars hatches and edges would hide the colours.
        looks = filling(number) if len(sums) <= _RANKS_HATCHED else {"color": OKABE_ITO[number]}
        axes.bar(range(len(sums)), values, width, sums, label=name, **looks)
        sums = [a + b for a, b in zip(sums, values, strict=True)]
    return sums


def _draw_held(axes: Any, loads: Sequence[TableLoad], costs: Sequence[RankCost], width: float) -> list[float]:
    """Draw what each rank holds by table, small tables together; return their sums, in the unit of the axis."""
    unit, size = held_unit(max(cost.bytes for cost in costs))
    largest = sorted(loads, key=lambda load: -load.bytes)[:_TABLES_COLOURED]
    of_tables = {load.name: [cost.bytes_of_table.get(load.name, 0) / size for cost in costs] for load in largest}
    sums = _stack(axes, width, of_tables)
    totals = [cost.bytes / size for cost in costs]
    if len(loads) > len(largest):
        rest = [total - drawn for total, drawn in zip(totals, sums, strict=True)]
        axes.bar(range(len(costs)), rest, width, sums, label=f"{len(loads) - len(largest)} others", color="0.4")
    axes.set_ylabel(f"held by a rank, {unit}")
    return totals


def draw(
    plan: Plan, loads: Sequence[TableLoad], costs: Sequence[RankCost], batch_size: int, path: Path, note: str = ""
) -> None:
    """Draw the bytes of each rank by table, its work, and the bytes that it sends, with their means; ``note``, such as
    the name of the configuration and the assumed lookups, is printed above.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PLOT_WIDTH, 8), layout="constrained")
    held, work, sent = figure.subplots(3, 1, sharex=True)
    ranks, width = [cost.rank for cost in costs], 0.8 if plan.ranks <= _RANKS_HATCHED else 1.0

    held_total = _draw_held(held, loads, costs, width)
    requested = [cost.work for cost in costs]
    work.bar(ranks, requested, width, color="0.8", edgecolor="black")
    work.set_ylabel("embedding rows requested\nfrom a rank in a step")
    work.yaxis.set_major_formatter("{x:,.0f}")
    unit, unit_bytes = sent_unit(costs)
    sums = _stack(
        sent,
        width,
        {
            "ids": [cost.sent_ids / unit_bytes for cost in costs],
            "vectors": [cost.sent_vectors / unit_bytes for cost in costs],
            "gradients": [cost.sent_gradients / unit_bytes for cost in costs],
        },
    )
    sent.set_ylabel(f"sent in a\ntraining step, {unit}")
    for axes, values in ((held, held_total), (work, requested), (sent, sums)):
        mean = statistics.fmean(values)
        axes.axhline(
            mean, color="black", linestyle=":", linewidth=1.2, label="mean of the ranks" if axes is held else None
        )
        axes.set_ylim(0, 1.08 * max(*values, mean))
    for axes in (held, sent):
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    sent.set_xlabel("rank")
    if plan.ranks <= 16:
        sent.set_xticks(ranks)
    for axes in (held, work, sent):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        (f"{note}\n" if note else "")
        + f"{counted(len(loads), 'table')} in {counted(len(plan.pieces), 'piece')} on {counted(plan.ranks, 'rank')}, "
        f"global batch {batch_size:,}"
    )
    save_figure(figure, path, 120)
