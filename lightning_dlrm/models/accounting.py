"""Parameters and floating-point operations of a model, counted without running it."""

from dataclasses import dataclass

from lightning_dlrm.models.network import CTRNetwork


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What a model costs; a multiply-add counts as two operations."""

    tables: int
    """Parameters in the embedding tables, of all ranks together."""
    dense: int
    """All other parameters."""
    flops_per_sample_forward: int

    @property
    def total(self) -> int:
        return self.tables + self.dense

    @property
    def flops_per_sample_training(self) -> int:
        """Forward and backward: a backward pass is two products for each one of the forward pass."""
        return 3 * self.flops_per_sample_forward


def model_size(network: CTRNetwork) -> ModelSize:
    """Counts; ``network`` may be on the meta device, where its tables take no memory."""
    tables = {table.name: table.rows * lookup.width for lookup in network.lookups() for table in lookup.tables}
    dense = sum(parameter.numel() for parameter in network.dense_parameters())
    return ModelSize(tables=sum(tables.values()), dense=dense, flops_per_sample_forward=2 * network.multiply_adds())
