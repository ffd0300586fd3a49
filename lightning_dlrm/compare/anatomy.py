"""Parameters of each table and dense part of a run's model, and the load of each rank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_dlrm.cli.parser import build_model_and_data
from lightning_dlrm.compare.runs import Run
from lightning_dlrm.engine.strategy import DEFAULT_BATCH_SIZE, table_loads
from lightning_dlrm.sharding.balance import make_plan
from lightning_dlrm.sharding.costs import RankCost, TableLoad, parse_memory, rank_costs
from lightning_dlrm.sharding.plan import Plan, read_plan
from lightning_dlrm.tracking import names
from lightning_dlrm.tracking.run_folder import CONFIG


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """The rows of each rank."""

    plan: Plan
    loads: Sequence[TableLoad]
    costs: Sequence[RankCost]
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Parameters by table and by dense part."""

    tables: Mapping[str, int]
    dense: Mapping[str, int]
    sharding: Sharding | None
    """None if one process held all tables."""


def anatomy(run: Run) -> Anatomy:
    """Return the anatomy of a run's configuration, without allocating tables."""
    built = build_model_and_data(["--config", str(run.path / CONFIG)])
    module = built.module
    with torch.device("meta"):
        network = module.make_network(module.schema.features, module.seed)
    loads = table_loads(network, module)
    dense = {id(parameter) for parameter in network.dense_parameters()}
    parts = {name: _count(child.parameters(), dense) for name, child in network.named_children()}
    parts["other"] = _count(network.parameters(recurse=False), dense)
    ranks = int(run.final[names.RANKS])
    batch_size = getattr(built.datamodule, "batch_size", DEFAULT_BATCH_SIZE)
    return Anatomy(
        tables={load.name: load.rows * load.width for load in loads},
        dense={name: count for name, count in parts.items() if count},
        sharding=_sharding(run, loads, ranks, batch_size) if ranks > 1 else None,
    )


def merge_equal(anatomies: Mapping[str, Anatomy]) -> dict[str, Anatomy]:
    """Merge equal anatomies under the names of all of them."""
    groups: list[tuple[list[str], Anatomy]] = []
    for name, anatomy in anatomies.items():
        alike = next((g for g in groups if (g[1].tables, g[1].dense) == (anatomy.tables, anatomy.dense)), None)
        if alike is None:
            groups.append(([name], anatomy))
        else:
            alike[0].append(name)
    return {",\n".join(members): anatomy for members, anatomy in groups}


def _count(parameters: Any, dense: set[int]) -> int:
    return sum(parameter.numel() for parameter in parameters if id(parameter) in dense)


def _sharding(run: Run, loads: Sequence[TableLoad], ranks: int, batch_size: int) -> Sharding:
    strategy = run.config["trainer"]["strategy"]
    options = strategy.get("init_args") or {} if isinstance(strategy, Mapping) else {}
    file, memory = options.get("plan"), options.get("memory_per_rank")
    if file is not None:
        plan = read_plan(Path(file))
    else:
        plan = make_plan(loads, ranks, batch_size, None if memory is None else parse_memory(memory))
    return Sharding(plan=plan, loads=loads, costs=rank_costs(plan, loads, batch_size), batch_size=batch_size)
