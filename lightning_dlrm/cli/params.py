"""``params``: what a configuration costs, without allocating its tables or preparing its data."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from lightning_dlrm.cli import matching
from lightning_dlrm.cli.lightning import ParamsCommand, add_matching_arguments
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.optim.dense import dense_state_bytes


def run(arguments: Sequence[str]) -> int:
    matched = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_matching_arguments(matched)
    options, rest = matched.parse_known_args(arguments)
    if options.match is not None:
        return _match(options, rest)
    command = ParamsCommand(arguments, run=False)
    assert isinstance(command.model, CTRModule)
    figures = count(command.model)
    if command.config.json:
        print(json.dumps(figures, indent=1))
    else:
        for name, value in figures.items():
            human = f"  {value / 2**30:8.3f} GiB" if name.startswith("bytes") else ""
            print(f"{name:28s}{value:>18,}{human}")
    return 0


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
        ParamsCommand([*(f"--config={name}" for name in names), *rest], run=False)
        for names in (options.match, options.to)
    )
    assert isinstance(ours.model, CTRModule) and isinstance(theirs.model, CTRModule)
    goal = theirs.model.size
    widths, size = matching.match(ours.model, vars(ours.config.model.network.init_args), goal, options.by)
    name, goal_name = (" + ".join(names) for names in (options.match, options.to))
    lines = matching.describe(Path(options.match[0]).stem, Path(options.to[0]).stem, size, goal, options.by)
    header = [f"{name} with the hidden widths that come nearest to {goal_name} by {options.by}.", "", *lines]
    matching.write_config(options.match, widths, Path(options.output), header)
    print("\n".join(lines))
    print("; ".join(f"{name}: {values}" for name, values in widths.items()) + f"; written to {options.output}")
    return 0


def count(module: CTRModule) -> dict[str, int]:
    """Parameters, FLOPs per sample, and bytes of the weights and of the optimiser's state."""
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
        "flops_per_sample_forward": size.flops_per_sample_forward,
        "flops_per_sample_training": size.flops_per_sample_training,
        "bytes_weights": sum(p.numel() * p.element_size() for p in (*tables, *dense)),
        "bytes_optimizer_tables": sum(
            values.nbytes
            for lookup in trained
            for values in module.rule_of(lookup, network).state(lookup.weight.detach()).values()
        ),
        "bytes_optimizer_dense": dense_state_bytes(module.dense_optimizer, dense),
    }
