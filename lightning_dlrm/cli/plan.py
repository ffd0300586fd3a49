"""``plan``: which rank would hold which rows, what each would hold and send; no data and no table is made."""

import argparse
import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from jsonargparse import DefaultHelpFormatter
from pytorch_lightning.cli import LightningArgumentParser
from tqdm import tqdm

from datamodules.parquet import load_schema
from datamodules.preprocess.skew import lookup_counts
from lightning_dlrm.cli.lightning import SettingsCommand
from lightning_dlrm.cli.palette import OKABE_ITO, filling
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.engine.strategy import DEFAULT_BATCH_SIZE, table_loads
from lightning_dlrm.models.network import CTRNetwork
from lightning_dlrm.sharding.balance import make_plan
from lightning_dlrm.sharding.costs import RankCost, TableCost, rank_costs, table_costs
from lightning_dlrm.sharding.loads import TableLoad, imbalance, parse_bytes, parse_memory
from lightning_dlrm.sharding.offload import place_tables
from lightning_dlrm.sharding.plan import Plan, read_plan
from lightning_dlrm.tables.embeddings import WidthGroup

PLOT_WIDTH = 10.0
"""Inches."""

EXAMPLES = """\
examples:
  python -m lightning_dlrm plan --config dlrm.yaml --ranks 8
  python -m lightning_dlrm plan --config dlrm.yaml --ranks 8 --memory-per-rank 80GiB --plot plan.png
  python -m lightning_dlrm plan --config dlrm.yaml --ranks 2 --memory-per-rank 24GiB,80GiB --output plan.yaml
  python -m lightning_dlrm plan --config mlperf_v2.yaml --data.path DIR --ranks 8 --output plan.yaml

  python -m lightning_dlrm plan --config dlrm.yaml --device-memory 1GiB --output places.yaml
  python -m lightning_dlrm fit --config dlrm.yaml --config places.yaml

--device-memory is for one device that has no room for all tables: it tells which of them stay in host memory, as
model.network.tables.on_host, and --output writes that as a configuration. For several ranks, --output writes the
plan for a run to keep to; without one, it makes the plan that this shows without --counted and --skew. Under "pooled",
the file has the tables whose bags are summed where their rows are:
  trainer:
    strategy:
      class_path: EmbeddingShardedDDP
      init_args: {plan: plan.yaml}
"""

_RANKS_SHOWN = 16
_TABLES_COLOURED = 8


class _HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the examples."""


class PlanCommand(SettingsCommand):
    """Builds data and model of a configuration for a plan of their tables."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.prog = "python -m lightning_dlrm plan"
        parser.formatter_class = _HelpFormatter
        parser.description = (
            "Shows which rank would hold which rows, what each would hold and send; no data and no table is made.\n"
            "With --device-memory: which tables would stay in host memory."
        )
        parser.epilog = EXAMPLES
        parser.add_argument("--ranks", type=int, default=1, help="processes to spread the tables over")
        parser.add_argument(
            "--memory-per-rank",
            type=str | None,
            default=None,
            help="what tables and their optimiser state may take: 80GiB, or an amount for each rank: 24GiB,80GiB",
        )
        parser.add_argument(
            "--device-memory",
            type=str | None,
            default=None,
            help="choose which tables stay in host memory, for one device on which tables, their optimiser state and "
            "the rows of three batches may take so much: 8GiB",
        )
        parser.add_argument("--skew", type=float, default=1.0, help="row i is drawn in proportion to (i + 1)^-skew")
        parser.add_argument(
            "--counted",
            action="store_true",
            help="take how often each row is looked up from the dataset folder, in place of --skew: from the counts in "
            "its vocabularies, else by reading the column's rows",
        )
        parser.add_argument(
            "--indices",
            type=str | None,
            default=None,
            help="ids that a sample looks up on average: one figure for all columns, or one for each, separated by "
            "commas; by default what the dataset says of its multi-hot columns, and 1",
        )
        parser.add_argument(
            "--wire",
            type=Literal["full", "bf16"],
            default="full",
            help="type of vectors and gradients while they travel, as the strategy's option",
        )
        parser.add_argument("--plan", type=str | None, default=None, help="show this plan instead of making one")
        parser.add_argument("--output", type=str | None, default=None, help="write the plan there, as YAML")
        parser.add_argument("--plot", type=str | None, default=None, help="draw it there: PNG, SVG or PDF")
        parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: Sequence[str]) -> int:
    command = PlanCommand(arguments, run=False)
    settings, module = command.config, command.model
    assert isinstance(module, CTRModule)
    with torch.device("meta"):
        network = module.make_network(module.schema.features, module.seed)
    loads = table_loads(network, module, settings.skew, parse_indices(settings.indices, module.schema.features))
    if settings.counted:
        loads = _counted(loads, command.datamodule.folder)
    batch_size = getattr(command.datamodule, "batch_size", DEFAULT_BATCH_SIZE)
    element_bytes = 2 if settings.wire == "bf16" else network.lookups()[0].weight.element_size()
    if settings.device_memory is not None:
        return _place(settings, network, loads, batch_size)
    if settings.plan is not None:
        plan = read_plan(Path(settings.plan))
        unpoolable = [load.name for load in loads if not load.may_pool]
        plan.check({load.name: load.rows for load in loads}, plan.ranks, unpoolable)
    else:
        memory = None if settings.memory_per_rank is None else parse_memory(settings.memory_per_rank)
        plan = make_plan(loads, settings.ranks, batch_size, memory, element_bytes)
    costs = rank_costs(plan, loads, batch_size, element_bytes)
    of_tables = table_costs(plan, loads, batch_size, element_bytes)
    if settings.output is not None:
        _write(Path(settings.output), yaml.safe_dump(plan.document(), default_flow_style=None, sort_keys=False))
    if settings.plot is not None:
        draw(plan, loads, costs, batch_size, Path(settings.plot))
    if settings.json:
        print(json.dumps(figures(plan, costs, of_tables, batch_size), indent=1))
    else:
        print(describe(plan, loads, costs, of_tables))
        for what, path in (("plan", settings.output), ("drawing", settings.plot)):
            if path is not None:
                print(f"{what} written to {path}")
    return 0


def _counted(loads: Sequence[TableLoad], folder: Any) -> list[TableLoad]:
    """The same with counted lookups, for tables with a row for each id of a column.

    Raises:
        UserError: there is no such dataset folder, or it is damaged.
    """
    schema = load_schema(folder)
    columns = {column.name: column for column in schema.by_role("categorical", "multi_hot")}
    found = []
    for load in tqdm(loads, desc="Reading ids", unit=" tables", disable=None):
        column = columns.get(load.name.partition("/")[0])
        # A row of another table of the column, such as a quotient's, is that of several ids.
        counts = lookup_counts(folder, schema, column) if column and column.cardinality == load.rows else None
        found.append(dataclasses.replace(load, counts=counts))
    return found


def _place(settings: Any, network: CTRNetwork, loads: Sequence[TableLoad], batch_size: int) -> int:
    """``--device-memory``: which tables stay in host memory."""
    for option, given in (
        ("--ranks", settings.ranks > 1),
        ("--memory-per-rank", settings.memory_per_rank is not None),
        ("--plan", settings.plan is not None),
        ("--plot", settings.plot is not None),
        ("--wire", settings.wire != "full"),
    ):
        if given:
            raise UserError(f"--device-memory is for one device, {option} for several ranks: give one of them")
    # A table that the configuration cuts already is there twice.
    whole: dict[str, TableLoad] = {}
    for load in loads:
        rows = load.rows + (whole[load.name].rows if load.name in whole else 0)
        whole[load.name] = dataclasses.replace(load, rows=rows)
    loads = list(whole.values())
    groups = [module for module in network.modules() if isinstance(module, WidthGroup)]
    movable = {member.table.name for group in groups for member in group.members}
    places = place_tables(loads, movable, batch_size, parse_bytes(settings.device_memory))
    columns = list(dict.fromkeys(name.partition("/")[0] for name in places.on_host))
    on_host = {column: places.cut.get(column, 0) for column in columns} if places.cut else columns
    document = {"model": {"network": {"init_args": {"tables": {"on_host": on_host}}}}}
    if settings.output is not None:
        header = f"# Tables in host memory, so that the others fit into {settings.device_memory} of a device.\n"
        _write(Path(settings.output), header + yaml.safe_dump(document, default_flow_style=None, sort_keys=False))
    if settings.json:
        print(json.dumps(dataclasses.asdict(places) | {"columns": columns, "batch_size": batch_size}, indent=1))
        return 0
    lines: list[tuple[str, ...]] = [("table", "rows", "GiB", "rows fetched", "place")]
    for load in sorted(loads, key=lambda load: -load.bytes):
        fetched = places.fetched.get(load.name)
        size, moved = f"{load.bytes / 2**30:.3f}", "" if fetched is None else f"{fetched:,.0f}"
        place = "device" if fetched is None else "host"
        if load.name in places.cut:
            place = f"host from row {places.cut[load.name]:,}"
        lines.append((load.name, f"{load.rows:,}", size, moved, place))
    print(_aligned(lines))
    print("rows fetched: before each step, from host memory, and written back after it\n")
    print(
        f"device: {places.device_bytes / 2**30:.3f} GiB, of which {places.cached_bytes / 2**30:.3f} for cached rows; "
        f"host: {places.host_bytes / 2**30:.3f} GiB; a step moves {places.bus_bytes / 2**20:,.1f} MiB either way"
    )
    option = yaml.safe_dump(on_host, default_flow_style=True, sort_keys=False, width=math.inf).strip()
    print(f"--model.network.tables.on_host '{option}'")
    if settings.output is not None:
        print(f"configuration written to {settings.output}")
    return 0


def parse_indices(text: str | None, features: Features) -> dict[str, float] | None:
    """Mean number of ids in a bag by column, from one figure, or one for each, separated by commas; None for none.

    Raises:
        UserError: it is no such thing.
    """
    if text is None:
        return None
    try:
        given = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--indices {text!r}: expected numbers separated by commas") from error
    columns = list(features.tables)
    if len(given) not in (1, len(columns)):
        raise UserError(
            f"--indices gives {len(given)} figures, the data have {len(columns)} columns: give one, or {len(columns)}"
        )
    return dict(zip(columns, given if len(given) > 1 else given * len(columns), strict=True))


def figures(plan: Plan, costs: Sequence[RankCost], of_tables: Sequence[TableCost], batch_size: int) -> dict[str, Any]:
    """Everything that is printed, and the pieces."""
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


def describe(plan: Plan, loads: Sequence[TableLoad], costs: Sequence[RankCost], of_tables: Sequence[TableCost]) -> str:
    """The plan as tables of ranks, of the tables that are cut, and of those with bags; and its balance in a line."""
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
        _aligned(lines),
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
        text += ["", _aligned(rows)]
    bags = [(load, cost) for load, cost in zip(loads, of_tables, strict=True) if load.indices_per_sample > 1]
    if bags and plan.ranks > 1:
        ways: list[tuple[str, ...]] = [("table", "ids in a bag", "KiB as rows", "KiB as sums", "sent as")]
        for load, cost in bags:
            as_rows, as_sums = cost.sent_rows.sum() / 1024, cost.sent_sums.sum() / 1024
            sums = f"{as_sums:,.1f}" if math.isfinite(as_sums) else "impossible"
            how = "sums" if load.name in plan.pooled else "rows"
            ways.append((load.name, f"{load.indices_per_sample:.3g}", f"{as_rows:,.1f}", sums, how))
        text += ["", _aligned(ways)]
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


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def draw(
    plan: Plan, loads: Sequence[TableLoad], costs: Sequence[RankCost], batch_size: int, path: Path, note: str = ""
) -> None:
    """Bytes of each rank by table, its work, and what it sends; ``note`` is printed above.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PLOT_WIDTH, 8), layout="constrained")
    held, work, sent = figure.subplots(3, 1, sharex=True)
    ranks, width = [cost.rank for cost in costs], 0.8 if plan.ranks <= 64 else 1.0

    def looks(number: int) -> dict[str, Any]:
        # On thin bars hatches and edges would hide the colours.
        return filling(number) if plan.ranks <= 64 else {"color": OKABE_ITO[number]}

    largest = sorted(loads, key=lambda load: -load.bytes)[:_TABLES_COLOURED]
    bottom = [0.0] * plan.ranks
    for number, load in enumerate(largest):
        sizes = [cost.bytes_of_table.get(load.name, 0) / 2**30 for cost in costs]
        held.bar(ranks, sizes, width, bottom, label=load.name, **looks(number))
        bottom = [a + b for a, b in zip(bottom, sizes, strict=True)]
    if len(loads) > len(largest):
        rest = [cost.bytes / 2**30 - b for cost, b in zip(costs, bottom, strict=True)]
        held.bar(ranks, rest, width, bottom, label=f"{len(loads) - len(largest)} others", color="0.7")
    held.set_ylabel("weights and\noptimiser state, GiB")
    held.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    work.bar(ranks, [cost.work for cost in costs], width, color=OKABE_ITO[0])
    work.set_ylabel("rows, or sums,\nasked for a batch")
    bottom = [0.0] * plan.ranks
    for number, (name, amounts) in enumerate(
        (
            ("ids", [cost.sent_ids for cost in costs]),
            ("vectors", [cost.sent_vectors for cost in costs]),
            ("gradients", [cost.sent_gradients for cost in costs]),
        )
    ):
        sizes = [amount / 2**20 for amount in amounts]
        sent.bar(ranks, sizes, width, bottom, label=name, **looks(number))
        bottom = [a + b for a, b in zip(bottom, sizes, strict=True)]
    sent.set_ylabel("sent in a\ntraining step, MiB")
    sent.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    sent.set_xlabel("rank")
    if plan.ranks <= 16:
        sent.set_xticks(ranks)
    for axes in (held, work, sent):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        (f"{note}\n" if note else "")
        + f"{len(loads)} tables in {len(plan.pieces)} pieces on {plan.ranks} ranks, global batch {batch_size:,}"
    )
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot draw {path}: {error}; give --plot a file such as plan.png") from error


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another --output") from error
