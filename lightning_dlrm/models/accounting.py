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
    width = network.embeddings.weight.shape[1]
    table_rows = {piece.name: piece.table_rows for piece in network.embeddings.pieces}
    dense = sum(p.numel() for p in network.parameters() if p is not network.embeddings.weight)
    return ModelSize(
        tables=sum(table_rows.values()) * width, dense=dense, flops_per_sample_forward=2 * network.multiply_adds()
    )
