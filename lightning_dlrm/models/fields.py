"""Fields: columns and dense features alike, each with a vector or a single weight of its own.

Shape suffixes: B samples, I dense features, F columns, V = F + I fields, D width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.errors import require
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.tables.embeddings import Embeddings, TableSettings
from lightning_dlrm.tables.lookup import EmbeddingTables
from lightning_dlrm.tables.table import Table


class LinearTerms(nn.Module):
    """w_0 + sum_i w_i x_i over the dense features and the columns' ids: logistic regression's logit.

    The linear terms are also the wide part of Wide & Deep (Cheng et al. 2016, section 3.1, without crossed columns), an
    option of DLRM and DCN. Tables of width 1, ``C3/linear``, hold the weights of the ids. All weights start at zero,
    unless the settings give ``initial_std``.

    Args:
        features: dense inputs and tables.
        seed: seed of the initial rows.
        settings: of the tables: ``initial_std``, ``padding_row`` and ``dense_gradients`` concern these too.
        bias: whether there is w_0.
    """

    def __init__(
        self, features: Features, seed: int, settings: TableSettings | None = None, *, bias: bool = True
    ) -> None:
        super().__init__()
        self._settings = settings or TableSettings()
        tables = [self._settings.table(f"{name}/linear", rows, 0.0) for name, rows in features.tables.items()]
        self.tables = EmbeddingTables(tables, 1, seed, dense_gradients=self._settings.dense_gradients)
        self.bias = nn.Parameter(torch.zeros(())) if bias else None
        self.weight = nn.Parameter(torch.zeros(features.dense))

    def lookup(self, ids: SparseIds) -> Tensor:
        """Return the sum of the ids' weights, [B]."""
        weights_BF1: Tensor = self.tables(self._settings.without_padding(ids))
        return weights_BF1.sum((1, 2))

    def forward(self, dense_BI: Tensor, weights_B: Tensor) -> Tensor:
        """Return the linear terms [B] of dense features and the result of ``lookup``."""
        terms_B = weights_B + dense_BI.to(self.weight.dtype) @ self.weight
        return terms_B if self.bias is None else terms_B + self.bias

    def multiply_adds(self) -> int:
        """Return the multiply-adds of a sample."""
        return self.weight.numel()

    def xavier_variances(self) -> dict[str, float]:
        """Return the variances of a linear layer from one value to one."""
        return {"weight": 1.0}


def scalar_tables(columns: Mapping[str, int], purpose: str) -> list[Table]:
    """Return tables of width 1 that start at zero, named by their purpose."""
    return [Table(name=f"{name}/{purpose}", rows=rows, bound=0.0) for name, rows in columns.items()]


class DenseVectors(nn.Module):
    """A vector v_i for every dense feature, multiplied with its value: x_i v_i (Rendle 2010, equation 1).

    Args:
        features: I.
        width: D.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features, width))

    def forward(self, dense_BI: Tensor) -> Tensor:
        """Return the vectors side by side: [B, I] -> [B, I * D]."""
        return (dense_BI[:, :, None] * self.weight).flatten(1)

    def multiply_adds(self) -> int:
        """Return the multiply-adds of a sample."""
        return self.weight.numel()

    def initial_variances(self) -> dict[str, float]:
        """Return small variances, since dense features can be far from 0: see CrossNetwork."""
        return {"weight": 1e-4}

    def xavier_variances(self) -> dict[str, float]:
        """Return the variances of a linear layer from one value to D."""
        return {"weight": 2 / (1 + self.weight.shape[1])}


def join_fields(dense_BI: Tensor, vectors_Bn: Tensor, dense_vectors: DenseVectors | None) -> Tensor:
    """Return the features of each sample side by side, [B, d], in the dtype of the columns' vectors.

    Args:
        dense_BI: dense features.
        vectors_Bn: vectors of the columns; the dense values come after them.
        dense_vectors: vectors of the dense features, which come before them in place of the values, as in FuxiCTR.
    """
    if dense_vectors is None:
        return torch.cat([vectors_Bn, dense_BI.to(vectors_Bn.dtype)], dim=1)
    return torch.cat([dense_vectors(dense_BI).to(vectors_Bn.dtype), vectors_Bn], dim=1)


class FieldVectors(nn.Module):
    """A vector for every field: v_c[id] for a column's id, x_i v_i for a dense feature (Rendle 2010, equation 1).

    Args:
        features: dense inputs and tables.
        embedding_dim: D.
        seed: seed of the initial rows.
        tables: see TableSettings; the vectors must have one width.
        user: the model's name, for messages.
        dense_first: put dense features before the columns, as FuxiCTR does: sums then round in the same way.
    """

    def __init__(
        self,
        features: Features,
        embedding_dim: int,
        seed: int,
        tables: TableSettings | None,
        user: str,
        dense_first: bool = False,
    ) -> None:
        super().__init__()
        self.embeddings = Embeddings(features.tables, embedding_dim, seed, tables)
        self.embeddings.require_one_width(user)
        self.dense = nn.Parameter(torch.empty(features.dense, embedding_dim))
        self.fields = len(features.tables) + features.dense
        self.width = embedding_dim
        self.dense_first = dense_first
        require(self.fields >= 1, f"{user} needs columns or dense features; the dataset has none")

    def lookup(self, ids: SparseIds) -> Tensor:
        """Return the columns' vectors side by side, [B, F * D]."""
        vectors_Bn: Tensor = self.embeddings(ids)
        return vectors_Bn

    def forward(self, dense_BI: Tensor, vectors_Bn: Tensor) -> Tensor:
        """Return the fields' vectors [B, V, D] from dense features and the result of ``lookup``."""
        vectors_BFD = vectors_Bn.unflatten(1, (-1, self.width))
        scaled_BID = (dense_BI[:, :, None] * self.dense).to(vectors_BFD.dtype)
        return torch.cat([scaled_BID, vectors_BFD] if self.dense_first else [vectors_BFD, scaled_BID], dim=1)

    def multiply_adds(self) -> int:
        """Return the multiply-adds of a sample."""
        return self.embeddings.multiply_adds() + self.dense.numel()

    def initial_variances(self) -> dict[str, float]:
        """Return small variances, since dense features can be far from 0: see CrossNetwork."""
        return {"dense": 1e-4}

    def xavier_variances(self) -> dict[str, float]:
        """Return the variances of linear layers from one value to D."""
        return {"dense": 2 / (1 + self.width)}
