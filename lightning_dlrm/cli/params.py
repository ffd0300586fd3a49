"""``params``: count the costs of a configuration, without allocating its tables or preparing its data."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_dlrm.cli import matching
from lightning_dlrm.cli.parser import CommandParser, build_model_parser
from lightning_dlrm.cli.settings import build_model_and_data
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.optim.dense import dense_state_bytes


def run(arguments: Sequence[str], description: str) -> int:
    """Run the command; return its exit code."""
    matched = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_matching_arguments(matched)
    options, rest = matched.parse_known_args(arguments)
    if options.match is not None:
        return _match(options, rest)
    built = build_model_and_data(arguments, _parser(description))
    sizes = count(built.module)
    if built.settings.json:
        print(json.dumps(sizes, indent=1))
    else:
        for name, value in sizes.items():
            human = f"  {value / 2**30:8.3f} GiB" if value and name.startswith("bytes") else ""
            print(f"{name:28s}{'unknown' if value is None else f'{value:,}':>18}{human}")
    return 0


def _parser(description: str) -> CommandParser:
    parser = build_model_parser("params", description)
    parser.add_argument("--json", action="store_true", help="print JSON")
    _add_matching_arguments(parser)
    return parser


def _add_matching_arguments(parser: Any) -> None:
    """Add the options that change a model's widths to match the cost of another model."""
    parser.add_argument(
        "--match",
        nargs="+",
        default=None,
        help="configuration whose hidden layers are widened or narrowed, with its overlays: params --match "
        "dcn.yaml --to dlrm.yaml --by dense --output matched.yaml (other options, such as --data.path, go to both)",
    )
    parser.add_argument("--to", nargs="+", default=None, help="configuration whose cost is matched, with its overlays")
    parser.add_argument("--by", default="dense", help="the cost: total, dense (parameters), or flops (forward)")
    parser.add_argument("--output", default=None, help="the new configuration's file")


def _match(options: argparse.Namespace, rest: Sequence[str]) -> int:
    for needed in ("to", "output"):
        if getattr(options, needed) is None:
            raise UserError(f"--match needs --{needed}: params --match A.yaml --to B.yaml --by dense --output FILE")
    if options.by not in matching.COSTS:
        raise UserError(f"--by {options.by} is none of {', '.join(matching.COSTS)}")
    lost = [option.partition("=")[0] for option in rest if option.startswith("--model.")]
    if lost:
        raise UserError(
            f"{lost[0]} would be missing in the new configuration: put it into an overlay and name that "
            f"after {options.match[-1]}"
        )
    ours, theirs = (
        build_model_and_data([*(f"--config={name}" for name in names), *rest], _parser(""))
        for names in (options.match, options.to)
    )
    goal = theirs.module.size
    widths, size = matching.match(ours.module, vars(ours.settings.model.network.init_args), goal, options.by)
    name, goal_name = (" + ".join(names) for names in (options.match, options.to))
    lines = matching.describe(Path(options.match[0]).stem, Path(options.to[0]).stem, size, goal, options.by)
    header = [f"{name} with the hidden widths that come nearest to {goal_name} by {options.by}.", "", *lines]
    matching.write_config(options.match, widths, Path(options.output), header)
    print("\n".join(lines))
    print("; ".join(f"{name}: {values}" for name, values in widths.items()) + f"; written to {options.output}")
    return 0


def count(module: CTRModule) -> dict[str, int | None]:
    """Return the number of parameters, of FLOPs per sample (None if they are not known), and of bytes of parameters and
    optimizer state."""
    size = module.size
    with torch.device("meta"):
        network = module.make_network(module.schema.features, module.seed)
    tables = [lookup.weight for lookup in network.lookups()]
    trained = [lookup for lookup in network.lookups() if lookup.weight.requires_grad]
    dense = network.dense_parameters()
    return {
        "tables": size.tables,
        "dense": size.dense,
        "total": size.total,
        "flops_per_sample_forward": size.flops_per_sample_forward or None,
        "flops_per_sample_training": size.flops_per_sample_training or None,
        "bytes_weights": sum(p.numel() * p.element_size() for p in (*tables, *dense)),
        "bytes_optimizer_tables": sum(
            values.nbytes
            for lookup in trained
            for values in module.rule_of(lookup, network).state(lookup.weight.detach()).values()
        ),
        "bytes_optimizer_dense": dense_state_bytes(module.dense_optimizer, dense),
    }
