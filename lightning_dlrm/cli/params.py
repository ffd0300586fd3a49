"""``params``: what a configuration costs, without allocating its tables or preparing its data."""

import json
from collections.abc import Sequence

import torch
from torch import nn

from lightning_dlrm.cli.lightning import ParamsCommand
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.optim.rules import UpdateRule


def run(arguments: Sequence[str]) -> int:
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


def count(module: CTRModule) -> dict[str, int]:
    """Parameters, FLOPs per sample, and bytes of the weights and of the optimiser's state."""
    size = module.size
    with torch.device("meta"):
        network = module.make_network(module.schema.features, module.seed)
    tables = [lookup.weight for lookup in network.lookups()]
    trained = [weight for weight in tables if weight.requires_grad]
    dense = network.dense_parameters()
    return {
        "tables": size.tables,
        "dense": size.dense,
        "total": size.total,
        "flops_per_sample_forward": size.flops_per_sample_forward,
        "flops_per_sample_training": size.flops_per_sample_training,
        "bytes_weights": sum(p.numel() * p.element_size() for p in (*tables, *dense)),
        "bytes_optimizer_tables": _state_bytes(module.table_rule, trained),
        "bytes_optimizer_dense": _state_bytes(module.dense_rule, dense),
    }


def _state_bytes(rule: UpdateRule, parameters: Sequence[nn.Parameter]) -> int:
    return sum(t.numel() * t.element_size() for p in parameters for t in rule.state(p.detach()).values())
