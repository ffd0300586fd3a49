"""DCN: Deep & Cross Network (Wang et al. 2017, arXiv:1708.05123; v2: Wang et al. 2021, arXiv:2008.13535)."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_dlrm.contracts.errors import require
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.models.cross import CrossKind, make_cross
from lightning_dlrm.models.layers import MLP, initialize
from lightning_dlrm.models.linear import LinearTerms
from lightning_dlrm.models.network import CTRNetwork, Missing
from lightning_dlrm.tables.embeddings import Embeddings, TableSettings


class DCN(CTRNetwork):
    """A cross network beside, or before, a deep network, over the tables' vectors and the dense features.

    Args:
        features: dense inputs and tables, from the dataset's schema.
        seed: seed of the initial parameters.
        embedding_dim: D, the width of every vector unless ``tables`` says otherwise.
        cross: kind of cross layers: vector (DCN v1), matrix (DCN v2), low_rank, or mixture (of low-rank experts).
        cross_layers: layers of the cross network.
        cross_rank: rank of low_rank and mixture; below the number of features they join.
        cross_experts: experts of mixture.
        deep: widths of the deep network's layers.
        structure: parallel (both networks get the input) or stacked (the deep network gets the crosses).
        batch_norm: normalize over the batch in the deep network, between each layer and its ReLU.
        wide: add linear terms, a weight for each dense feature and each id (Cheng et al. 2016).
        dropout: share of the deep network's outputs, layer by layer, that training sets to 0.
        tables: settings of the tables, such as widths and pooling.
        missing: replacement of missing dense values: zero, or learned (a number for each feature).
    """

    HIDDEN_WIDTHS: ClassVar[Mapping[str, slice]] = {"deep": slice(None)}

    def __init__(
        self,
        features: Features,
        seed: int = 0,
        *,
        embedding_dim: int = 16,
        cross: CrossKind = "vector",
        cross_layers: int = 6,
        cross_rank: int | None = None,
        cross_experts: int | None = None,
        deep: Sequence[int] = (512, 256),
        structure: Literal["parallel", "stacked"] = "parallel",
        batch_norm: bool = False,
        wide: bool = False,
        dropout: float = 0.0,
        tables: TableSettings | None = None,
        missing: Missing = "zero",
    ) -> None:
        super().__init__(features.dense, missing)
        require(structure in ("parallel", "stacked"), f"structure {structure!r} is neither parallel nor stacked")
        self.stacked = structure == "stacked"
        self.embeddings = Embeddings(features.tables, embedding_dim, seed, tables)
        width = sum(self.embeddings.widths) + features.dense
        self.cross = make_cross(cross, width, cross_layers, cross_rank, cross_experts)
        self.deep = MLP([width, *deep], batch_norm=batch_norm, dropout=dropout)
        self.logit = MLP([self.deep.widths[-1] + (0 if self.stacked else width), 1], linear_output=True)
        self.wide = LinearTerms(features, seed) if wide else None
        initialize(self, seed)

    def score(self, dense_BI: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        """See CTRNetwork.score."""
        dense_BI = self.missing(dense_BI)
        vectors_Bn = vectors["embeddings"]
        x0_Bd = torch.cat([vectors_Bn, dense_BI.to(vectors_Bn.dtype)], dim=1)
        crosses_Bd = self.cross(x0_Bd)
        joined_Bn = self.deep(crosses_Bd) if self.stacked else torch.cat([crosses_Bd, self.deep(x0_Bd)], dim=1)
        logits_B = self.logit(joined_Bn).squeeze(1)
        return logits_B if self.wide is None else logits_B + self.wide(dense_BI, vectors["wide"])

    def multiply_adds(self) -> int:
        """See CTRNetwork.multiply_adds."""
        parts = (self.embeddings, self.cross, self.deep, self.logit, self.wide)
        return sum(part.multiply_adds() for part in parts if part is not None)
