"""DCN: Deep & Cross Network (Wang et al. 2017, arXiv:1708.05123)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.models.layers import MLP, CrossNetwork, initialise
from lightning_dlrm.models.network import CTRNetwork
from lightning_dlrm.models.tables import EmbeddingTables


class DCN(CTRNetwork):
    """A cross network beside a deep one, over the tables' vectors and the dense features.

    Args:
        features: dense inputs and tables, from the dataset's schema.
        seed: of the initial weights.
        embedding_dim: D, the width of every table.
        cross_layers: layers of the cross network.
        deep: widths of the deep network's layers.
    """

    def __init__(
        self,
        features: Features,
        seed: int = 0,
        *,
        embedding_dim: int = 16,
        cross_layers: int = 6,
        deep: Sequence[int] = (512, 256),
    ) -> None:
        super().__init__()
        width = len(features.tables) * embedding_dim + features.dense
        self.embeddings = EmbeddingTables(features.tables, embedding_dim, seed)
        self.cross = CrossNetwork(width, cross_layers)
        self.deep = MLP([width, *deep])
        self.logit = MLP([width + self.deep.widths[-1], 1], linear_output=True)
        initialise(self, seed)

    def forward(self, dense_BI: Tensor, ids: SparseIds) -> Tensor:
        """See CTRNetwork.forward."""
        vectors_BFD = self.embeddings(ids)
        x0_Bd = torch.cat([vectors_BFD.flatten(1), dense_BI.to(vectors_BFD.dtype)], dim=1)
        return self.logit(torch.cat([self.cross(x0_Bd), self.deep(x0_Bd)], dim=1)).squeeze(1)

    def multiply_adds(self) -> int:
        """See CTRNetwork.multiply_adds."""
        return self.cross.multiply_adds() + self.deep.multiply_adds() + self.logit.multiply_adds()
