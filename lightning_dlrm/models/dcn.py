"""DCN: Deep & Cross Network (Wang et al. 2017, arXiv:1708.05123; v2: Wang et al. 2021, arXiv:2008.13535)."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.models.cross import CrossNetwork, LowRankCross, MatrixCross, MixtureCross, VectorCross
from lightning_dlrm.models.layers import MLP, initialise
from lightning_dlrm.models.network import CTRNetwork
from lightning_dlrm.models.tables import EmbeddingTables


class DCN(CTRNetwork):
    """A cross network beside, or before, a deep one, over the tables' vectors and the dense features.

    Args:
        features: dense inputs and tables, from the dataset's schema.
        seed: of the initial weights.
        embedding_dim: D, the width of every table.
        cross: kind of cross layers: vector (DCN v1), matrix (DCN v2), low_rank, or mixture (of low-rank experts).
        cross_layers: layers of the cross network.
        cross_rank: rank of low_rank and mixture; below the number of features they join.
        cross_experts: experts of mixture.
        deep: widths of the deep network's layers.
        structure: parallel (both networks see the input) or stacked (the deep one sees the crosses).
    """

    def __init__(
        self,
        features: Features,
        seed: int = 0,
        *,
        embedding_dim: int = 16,
        cross: Literal["vector", "matrix", "low_rank", "mixture"] = "vector",
        cross_layers: int = 6,
        cross_rank: int | None = None,
        cross_experts: int | None = None,
        deep: Sequence[int] = (512, 256),
        structure: Literal["parallel", "stacked"] = "parallel",
    ) -> None:
        super().__init__()
        if structure not in ("parallel", "stacked"):
            raise UserError(f"structure {structure!r} is neither parallel nor stacked")
        width = len(features.tables) * embedding_dim + features.dense
        self.stacked = structure == "stacked"
        self.embeddings = EmbeddingTables(features.tables, embedding_dim, seed)
        self.cross = make_cross(cross, width, cross_layers, cross_rank, cross_experts)
        self.deep = MLP([width, *deep])
        self.logit = MLP([self.deep.widths[-1] + (0 if self.stacked else width), 1], linear_output=True)
        initialise(self, seed)

    def forward(self, dense_BI: Tensor, ids: SparseIds) -> Tensor:
        """See CTRNetwork.forward."""
        vectors_BFD = self.embeddings(ids)
        x0_Bd = torch.cat([vectors_BFD.flatten(1), dense_BI.to(vectors_BFD.dtype)], dim=1)
        crosses_Bd = self.cross(x0_Bd)
        if self.stacked:
            return self.logit(self.deep(crosses_Bd)).squeeze(1)
        return self.logit(torch.cat([crosses_Bd, self.deep(x0_Bd)], dim=1)).squeeze(1)

    def multiply_adds(self) -> int:
        """See CTRNetwork.multiply_adds."""
        return self.cross.multiply_adds() + self.deep.multiply_adds() + self.logit.multiply_adds()


def make_cross(kind: str, features: int, layers: int, rank: int | None, experts: int | None) -> CrossNetwork:
    """A cross network by its name in configurations.

    Raises:
        UserError: no such kind, or a rank or experts missing or given where the kind has none.
    """
    needs = {"vector": (), "matrix": (), "low_rank": ("cross_rank",), "mixture": ("cross_rank", "cross_experts")}
    if kind not in needs:
        raise UserError(f"cross {kind!r} is none of {', '.join(needs)}")
    given = {"cross_rank": rank, "cross_experts": experts}
    for option, value in given.items():
        if (value is None) == (option in needs[kind]):
            verb = "needs" if value is None else "takes no"
            raise UserError(f"cross: {kind} {verb} {option}; it is {'missing' if value is None else value}")
    if rank is None:
        return VectorCross(features, layers) if kind == "vector" else MatrixCross(features, layers)
    if experts is None:
        return LowRankCross(features, layers, rank)
    return MixtureCross(features, layers, rank, experts)
