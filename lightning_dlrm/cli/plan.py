"""``plan``: show the rows, bytes and traffic of each rank, without data and tables."""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import Namespace
from tqdm import tqdm

from datamodules.folder import load_schema
from datamodules.preprocess.skew import lookup_counts
from lightning_dlrm.cli.configs import given_configs
from lightning_dlrm.cli.parser import CommandParser, build_model_and_data, build_model_parser, refuse_options_of_runs
from lightning_dlrm.cli.plan_report import (
    describe_lookups,
    describe_places,
    describe_plan,
    describe_setup,
    describe_subject,
    plan_document,
    subject_of,
)
from lightning_dlrm.cli.trust import trusting_command
from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.figures import check_figure_file
from lightning_dlrm.contracts.schema import DatasetSchema, Features
from lightning_dlrm.contracts.terminal import command_after, counted, wrapped
from lightning_dlrm.engine.memory import DEFAULT_BATCH_SIZE, table_loads
from lightning_dlrm.models.network import CTRNetwork
from lightning_dlrm.sharding.balance import check_ranks, make_plan, place_tables
from lightning_dlrm.sharding.costs import TableLoad, parse_bytes, parse_memory, rank_costs, rows_of_tables, table_costs
from lightning_dlrm.sharding.plan import Plan, read_plan
from lightning_dlrm.tables.embeddings import WidthGroup

NOTES = """\
more examples:
  python -m lightning_dlrm plan --config dlrm.yaml --ranks 2 --memory-per-rank 24GiB,80GiB
  python -m lightning_dlrm plan --config mlperf_v2.yaml --data.path DIR --ranks 8
  python -m lightning_dlrm fit --config dlrm.yaml --config places.yaml

--device-memory is for devices (one for each of --ranks) that cannot hold all tables: it shows
which tables, or which of their rows, stay in host memory (model.network.tables.on_host), and
--output writes this choice as a configuration. Without --device-memory, --output writes the plan
for a run. In its file, "pooled" lists the tables whose bags are summed by the ranks that hold
their rows. A run without a plan file uses the plan that this command shows without --counted and
--skew; a run with a plan file has
  trainer:
    strategy:
      class_path: EmbeddingShardedDDP
      init_args: {plan: plan.yaml}
"""


def _parser() -> CommandParser:
    parser = build_model_parser("plan", epilog=NOTES)
    parser.add_argument(
        "--ranks",
        type=int | None,
        default=None,
        help="processes to spread the tables over; by default trainer.devices times trainer.num_nodes",
    )
    parser.add_argument(
        "--memory-per-rank",
        type=str | None,
        default=None,
        help="most memory of tables and their optimizer state: 80GiB, or an amount for each rank: 24GiB,80GiB",
    )
    parser.add_argument(
        "--device-memory",
        type=str | None,
        default=None,
        help="choose which tables stay in host memory, so that tables, their optimizer state and the rows of three "
        "batches take at most this much memory of one device: 8GiB; leave room for dense layers and activations, "
        "which are not counted; not together with --memory-per-rank, --plan, --plot or --wire",
    )
    parser.add_argument(
        "--skew",
        type=float,
        default=1.0,
        help="assumed: the k-th row of a table is looked up 1/k^skew times as often as its first row",
    )
    parser.add_argument(
        "--counted",
        action="store_true",
        help="count how often each row is looked up in the dataset folder, instead of --skew: from the counts in its "
        "vocabularies, else by reading the column's rows",
    )
    parser.add_argument(
        "--indices",
        type=str | None,
        default=None,
        help="mean number of ids of a sample: a number for all columns, or a number for each, separated by commas; by "
        "default the dataset's for multi-hot columns, and 1 for others",
    )
    parser.add_argument(
        "--wire",
        type=Literal["full", "bf16"],
        default="full",
        help="type of vectors and gradients in exchanges, as the strategy's option",
    )
    parser.add_argument(
        "--plan", type=str | None, default=None, help="show the plan in this file instead of making a plan"
    )
    parser.add_argument("--output", type=str | None, default=None, help="write the plan to this file, as YAML")
    parser.add_argument("--plot", type=str | None, default=None, help="draw the plan to this file: PNG, SVG or PDF")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    refuse_options_of_runs("plan", arguments)
    built = build_model_and_data(arguments, _parser())
    settings, module = built.settings, built.module
    memory = _checked_memory(settings)
    given_ranks, settings.ranks = settings.ranks, _ranks(settings)
    with torch.device("meta"):
        network = module.make_network(module.schema.features, module.seed)
    loads = table_loads(network, module, settings.skew, parse_indices(settings.indices, module.schema.features))
    if settings.counted:
        loads = _counted(loads, built.datamodule.folder)
    batch_size = getattr(built.datamodule, "batch_size", DEFAULT_BATCH_SIZE)
    element_bytes = 2 if settings.wire == "bf16" else network.lookups()[0].weight.element_size()
    setup = _setup(settings, given_configs(arguments), module.schema, batch_size)
    if settings.device_memory is not None:
        return _place(settings, setup, network, loads, memory, _fit_command(arguments, settings.output))
    plan = _plan(settings, loads, batch_size, element_bytes, memory, given_ranks)
    setup["ranks"] = plan.ranks
    costs = rank_costs(plan, loads, batch_size, element_bytes)
    of_tables = table_costs(plan, loads, batch_size, element_bytes)
    if settings.output is not None:
        _write(Path(settings.output), yaml.safe_dump(plan.document(), default_flow_style=None, sort_keys=False))
    if settings.plot is not None:
        # Matplotlib takes long to load.
        from lightning_dlrm.cli.plan_report import draw

        note = f"{describe_subject(setup)}\n{describe_lookups(setup['skew'])}"
        draw(plan, loads, costs, batch_size, Path(settings.plot), note)
    if settings.json:
        print(json.dumps(setup | plan_document(plan, costs, of_tables), indent=1))
    else:
        print(wrapped([describe_setup(setup), ""]))
        print(describe_plan(plan, loads, costs, of_tables))
        for what, path in (("plan", settings.output), ("drawing", settings.plot)):
            if path is not None:
                print(f"{what} written to {path}")
        if settings.output is None:
            print("--output FILE writes which rows of each table are on which rank")
    return 0


def _checked_memory(settings: Namespace) -> Any:
    """Check the options of the command before ids are read; return the bytes of a device, or of each rank, or None.

    Raises:
        UserError: an option is out of range, or has no effect beside another one.
    """
    require(0 <= settings.skew < math.inf, f"--skew is {settings.skew:g}; expected a number of 0 or more")
    if settings.plot is not None:
        check_figure_file(Path(settings.plot))
    for option, given in (
        ("--memory-per-rank", settings.memory_per_rank is not None),
        ("--plan", settings.plan is not None),
        ("--plot", settings.plot is not None),
        ("--wire", settings.wire != "full"),
    ):
        require(
            settings.device_memory is None or not given,
            f"--device-memory chooses tables for host memory, but {option} is for a plan: give one of them",
        )
    if settings.device_memory is not None:
        return parse_bytes(settings.device_memory, "--device-memory")
    given = settings.memory_per_rank
    return None if given is None else parse_memory(given, "--memory-per-rank")


def _ranks(settings: Namespace) -> int:
    """Return the number of ranks: that of ``--ranks``, else of the Trainer; 1 if its devices are not a number or a
    list.

    Raises:
        UserError: a plan cannot have so many ranks.
    """
    if settings.ranks is not None:
        check_ranks(settings.ranks, "--ranks")
        return int(settings.ranks)
    devices, nodes = settings.trainer.devices, settings.trainer.num_nodes
    listed = devices.split(",") if isinstance(devices, str) and "," in devices else devices
    counts = [str(len(listed) if isinstance(listed, list) else devices), str(nodes)]
    if not all(count.isdecimal() and int(count) >= 1 for count in counts):
        return 1
    ranks = math.prod(map(int, counts))
    check_ranks(ranks, "trainer.devices times trainer.num_nodes")
    return ranks


def _setup(settings: Namespace, configs: Sequence[str], schema: DatasetSchema, batch_size: int) -> dict[str, Any]:
    """Return what a plan is for, as JSON values."""
    return {
        **subject_of(settings, configs, schema),
        "batch_size": batch_size,
        "ranks": settings.ranks,
        "plan": settings.plan,
        "device_memory": settings.device_memory,
        "skew": None if settings.counted else settings.skew,
    }


def _plan(
    settings: Namespace,
    loads: Sequence[TableLoad],
    batch_size: int,
    element_bytes: int,
    memory: Any,
    given_ranks: int | None,
) -> Plan:
    """Make a plan, or read the plan of ``--plan``, which must have the ranks of ``--ranks`` if that is given."""
    if settings.plan is None:
        return make_plan(loads, settings.ranks, batch_size, memory, element_bytes)
    plan = read_plan(Path(settings.plan))
    require(
        given_ranks in (None, plan.ranks),
        f"--ranks is {given_ranks}, but {settings.plan} is a plan for {counted(plan.ranks, 'rank')}: leave --ranks out",
    )
    unpoolable = [load.name for load in loads if not load.may_pool]
    plan.check(rows_of_tables(loads), plan.ranks, unpoolable)
    return plan


def _counted(loads: Sequence[TableLoad], folder: Any) -> list[TableLoad]:
    """Return the loads with counted lookups, for tables with a row for each id of a column.

    Raises:
        UserError: the dataset folder does not exist, or is damaged.
    """
    schema = load_schema(folder)
    columns = {column.name: column for column in schema.by_role("categorical", "multi_hot")}
    found = []
    for load in tqdm(loads, desc="Reading ids", unit=" tables", disable=None):
        column = columns.get(load.name.partition("/")[0])
        # Tables with fewer rows, such as that of quotients, share a row between ids: no counts.
        counts = lookup_counts(folder, schema, column) if column and column.cardinality == load.rows else None
        found.append(dataclasses.replace(load, counts=counts))
    return found


def _fit_command(arguments: Sequence[str], output: str | None) -> str:
    """Return the command that trains what the options describe with the changes of ``output``."""
    kept: list[str] = []
    is_kept = False
    for argument in arguments:
        if argument.startswith("--"):
            is_kept = re.match(r"--(config|model|data|trainer)\b", argument) is not None
        if is_kept:
            kept.append(argument)
    return trusting_command("fit", *kept, "--config", str(output))


def _place(
    settings: Namespace,
    setup: dict[str, Any],
    network: CTRNetwork,
    loads: Sequence[TableLoad],
    memory: int,
    fit_command: str,
) -> int:
    """Choose and print which tables stay in host memory, for ``--device-memory``."""
    # A table that the configuration splits has two loads.
    rows = rows_of_tables(loads)
    whole = {load.name: dataclasses.replace(load, rows=rows[load.name], start=0, table_rows=0) for load in loads}
    loads = list(whole.values())
    groups = [module for module in network.modules() if isinstance(module, WidthGroup)]
    movable = {member.table.name for group in groups for member in group.members}
    places = place_tables(loads, movable, setup["batch_size"], memory, settings.ranks)
    columns = list(dict.fromkeys(name.partition("/")[0] for name in places.on_host))
    on_host = {column: places.cut.get(column, 0) for column in columns} if places.cut else columns
    document = {"model": {"network": {"init_args": {"tables": {"on_host": on_host}}}}}
    if settings.output is not None:
        header = f"# Tables in host memory, so that the others fit into {settings.device_memory} of a device.\n"
        _write(Path(settings.output), header + yaml.safe_dump(document, default_flow_style=None, sort_keys=False))
    if settings.json:
        print(json.dumps(setup | dataclasses.asdict(places) | {"columns": columns}, indent=1))
        return 0
    print(wrapped([describe_setup(setup), ""]))
    print(describe_places(places, loads))
    option = yaml.safe_dump(on_host, default_flow_style=True, sort_keys=False, width=math.inf).strip()
    if settings.output is not None:
        print(command_after(f"configuration written to {settings.output}; train with it:", fit_command))
    words = "or, in place of that file, with the option:" if settings.output is not None else "train with the option:"
    print(f"{words}\n  --model.network.tables.on_host '{option}'")
    return 0


def parse_indices(text: str | None, features: Features) -> dict[str, float] | None:
    """Return column -> mean number of ids in a bag; None for no text.

    Args:
        text: a number for all columns, or a number for each, separated by commas.
        features: columns of the data.

    Raises:
        UserError: the text is not of this form.
    """
    if text is None:
        return None
    try:
        given = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--indices is {text}; expected numbers separated by commas, such as 1,3") from error
    columns = list(features.tables)
    require(
        all(0 <= number < math.inf for number in given),
        f"--indices is {text}; expected numbers of 0 or more, such as 1,3",
    )
    require(
        len(given) in (1, len(columns)),
        f"--indices gives {len(given)} numbers, but the data have {len(columns)} columns: give 1 or {len(columns)}",
    )
    return dict(zip(columns, given if len(given) > 1 else given * len(columns), strict=True))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another --output") from error
