"""Linear terms: a weight for every dense feature and every id.

Shape suffixes: B samples, I dense features.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.tables.lookup import EmbeddingTables
from lightning_dlrm.tables.table import Table


class LinearTerms(nn.Module):
    """w_0 + sum_i w_i x_i over the dense features and the columns' ids: logistic regression's logit.

    The linear terms are also the wide part of Wide & Deep (Cheng et al. 2016, section 3.1, without crossed columns), an
    option of DLRM and DCN. Tables of width 1, ``C3/linear``, hold the weights of the ids. All weights start at zero.

    Args:
        features: dense inputs and tables.
        seed: seed of the initial rows.
    """

    def __init__(self, features: Features, seed: int) -> None:
        super().__init__()
        self.tables = EmbeddingTables(scalar_tables(features.tables, "linear"), 1, seed)
        self.bias = nn.Parameter(torch.zeros(()))
        self.weight = nn.Parameter(torch.zeros(features.dense))

    def lookup(self, ids: SparseIds) -> Tensor:
        """Return the sum of the ids' weights, [B]."""
        weights_BF1: Tensor = self.tables(ids)
        return weights_BF1.sum((1, 2))

    def forward(self, dense_BI: Tensor, weights_B: Tensor) -> Tensor:
        """Return the linear terms [B] of dense features and the result of ``lookup``."""
        return weights_B + dense_BI.to(self.weight.dtype) @ self.weight + self.bias

    def multiply_adds(self) -> int:
        """Return the multiply-adds of a sample."""
        return self.weight.numel()


def scalar_tables(columns: Mapping[str, int], purpose: str) -> list[Table]:
    """Return tables of width 1 that start at zero, named by their purpose."""
    return [Table(name=f"{name}/{purpose}", rows=rows, bound=0.0) for name, rows in columns.items()]
