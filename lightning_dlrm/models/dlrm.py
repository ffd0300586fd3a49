"""DLRM: Deep Learning Recommendation Model (Naumov et al. 2019, arXiv:1906.00091)."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.models.layers import MLP, DotInteraction, initialise
from lightning_dlrm.models.network import CTRNetwork
from lightning_dlrm.models.tables import EmbeddingTables


class DLRM(CTRNetwork):
    """Bottom MLP and tables, their interaction, top MLP (Naumov et al. 2019, section 2).

    Args:
        features: dense inputs and tables, from the dataset's schema.
        seed: of the initial weights.
        embedding_dim: D, the width of every table.
        bottom_mlp: widths of the bottom MLP's layers; the last one equals embedding_dim.
        top_mlp: widths of the top MLP's hidden layers; a layer of width 1 follows.
        interaction: dot (dot products of all pairs of vectors) or cat (the vectors side by side).
        self_interaction: also take each vector's product with itself; for dot only.
    """

    def __init__(
        self,
        features: Features,
        seed: int = 0,
        *,
        embedding_dim: int = 16,
        bottom_mlp: Sequence[int] = (512, 256, 64, 16),
        top_mlp: Sequence[int] = (512, 256),
        interaction: Literal["dot", "cat"] = "dot",
        self_interaction: bool = False,
    ) -> None:
        super().__init__()
        if features.dense < 1:
            raise UserError("DLRM needs dense features; the dataset has none: use a model without a bottom MLP")
        if not bottom_mlp or bottom_mlp[-1] != embedding_dim:
            raise UserError(
                f"bottom_mlp ends in {bottom_mlp[-1] if bottom_mlp else 'nothing'} but embedding_dim is "
                f"{embedding_dim}: the bottom MLP's output joins the tables' vectors, so make them equal"
            )
        if self_interaction and interaction != "dot":
            raise UserError(f"self_interaction needs interaction: dot; got {interaction}")
        if interaction not in ("dot", "cat"):
            raise UserError(f"interaction {interaction!r} is neither dot nor cat")
        vectors = 1 + len(features.tables)
        self.bottom = MLP([features.dense, *bottom_mlp])
        self.embeddings = EmbeddingTables(features.tables, embedding_dim, seed)
        self.interaction = DotInteraction(vectors, embedding_dim, self_interaction) if interaction == "dot" else None
        width = vectors * embedding_dim
        if self.interaction is not None:
            width = embedding_dim + self.interaction.pairs.numel()
        self.top = MLP([width, *top_mlp, 1], linear_output=True)
        initialise(self, seed)

    def forward(self, dense_BI: Tensor, ids: SparseIds) -> Tensor:
        """See CTRNetwork.forward."""
        bottom_BD = self.bottom(dense_BI)
        vectors_BFD = self.embeddings(ids)
        vectors_BVD = torch.cat([bottom_BD[:, None].to(vectors_BFD.dtype), vectors_BFD], dim=1)
        if self.interaction is None:
            return self.top(vectors_BVD.flatten(1)).squeeze(1)
        pairs_BP = self.interaction(vectors_BVD)
        return self.top(torch.cat([bottom_BD, pairs_BP.to(bottom_BD.dtype)], dim=1)).squeeze(1)

    def multiply_adds(self) -> int:
        """See CTRNetwork.multiply_adds."""
        pairs = 0 if self.interaction is None else self.interaction.multiply_adds()
        return self.bottom.multiply_adds() + pairs + self.top.multiply_adds()
