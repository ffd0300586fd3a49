"""What every click-through-rate model here is: tables, dense layers, one logit a sample."""

from torch import Tensor, nn

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.lookup import EmbeddingLookup


class CTRNetwork(nn.Module):
    """Base of the models. Shapes: B samples, I dense features."""

    embeddings: EmbeddingLookup

    def forward(self, dense_BI: Tensor, ids: SparseIds) -> Tensor:
        """Logits [B]; a probability exists only outside the loss."""
        raise TypeError(f"{type(self).__name__} does not define forward")

    def multiply_adds(self) -> int:
        """Multiply-adds of one sample's forward pass.

        Matrix products, kept pairs and cross layers count; biases, activations and lookups do not.
        """
        raise TypeError(f"{type(self).__name__} does not define multiply_adds")
