"""Parameters and floating-point operations of a model, counted without running it."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.models.network import CTRNetwork


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Parameters and operations of a model; a multiply-add counts as two operations."""

    tables: int
    """Parameters in the embedding tables, of all ranks together."""
    dense: int
    """All other parameters."""
    flops_per_sample_forward: int
    """0 if unknown."""

    @property
    def total(self) -> int:
        return self.tables + self.dense

    @property
    def flops_per_sample_training(self) -> int:
        """Operations of both passes; the backward pass takes two products for each product of the forward pass."""
        return 3 * self.flops_per_sample_forward


def model_size(network: CTRNetwork, features: Features | None = None) -> ModelSize:
    """Count parameters and operations of a network, which may be on the meta device.

    Args:
        network: the network.
        features: features of its dataset, needed if the network does not define ``multiply_adds``.
    """
    tables = {table.name: table.rows * lookup.width for lookup in network.lookups() for table in lookup.tables}
    dense = sum(parameter.numel() for parameter in network.dense_parameters())
    if type(network).multiply_adds is not CTRNetwork.multiply_adds:
        flops = 2 * network.multiply_adds()
    else:
        flops = 0 if features is None else _counted_flops(network, features)
    return ModelSize(tables=sum(tables.values()), dense=dense, flops_per_sample_forward=flops)


def _counted_flops(network: CTRNetwork, features: Features) -> int:
    """Return torch's count of operations of a forward pass of one sample; 0 if the pass fails."""
    with torch.device(next((p.device for p in network.parameters()), "cpu")), torch.no_grad():
        dense_BI = torch.zeros(1, features.dense)
        ids = SparseIds(values=torch.zeros(1, len(features.tables), dtype=torch.int32), tables=len(features.tables))
        try:
            with FlopCounterMode(display=False) as counter:
                network(dense_BI, ids)
        except Exception:
            # A custom forward pass may not support the meta device, which training does not need.
            return 0
    return counter.get_total_flops()
