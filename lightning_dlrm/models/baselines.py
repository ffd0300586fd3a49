"""Baselines that DLRM and DCN are compared with.

Shape suffixes: B samples, I dense features, F columns, V fields, D width.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.errors import require
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.models import layers
from lightning_dlrm.models.layers import CompressedInteraction, PairwiseSum, initialize
from lightning_dlrm.models.network import CTRNetwork, LinearTerms, Missing, scalar_tables
from lightning_dlrm.tables.embeddings import Embeddings, TableSettings
from lightning_dlrm.tables.lookup import EmbeddingTables
from lightning_dlrm.tables.table import Table


class FieldVectors(nn.Module):
    """A vector for every field: v_c[id] for a column's id, x_i v_i for a dense feature (Rendle 2010, equation 1).

    Args:
        features: dense inputs and tables.
        embedding_dim: D.
        seed: seed of the initial rows.
        tables: see TableSettings; the vectors must have one width.
        user: the model's name, for messages.
    """

    def __init__(
        self, features: Features, embedding_dim: int, seed: int, tables: TableSettings | None, user: str
    ) -> None:
        super().__init__()
        self.embeddings = Embeddings(features.tables, embedding_dim, seed, tables)
        self.embeddings.require_one_width(user)
        self.dense = nn.Parameter(torch.empty(features.dense, embedding_dim))
        self.fields = len(features.tables) + features.dense
        self.width = embedding_dim
        require(self.fields >= 1, f"{user} needs columns or dense features; the dataset has none")

    def lookup(self, ids: SparseIds) -> Tensor:
        """Return the columns' vectors side by side, [B, F * D]."""
        vectors_Bn: Tensor = self.embeddings(ids)
        return vectors_Bn

    def forward(self, dense_BI: Tensor, vectors_Bn: Tensor) -> Tensor:
        """Return the fields' vectors [B, V, D], the columns first, from dense features and the result of ``lookup``."""
        vectors_BFD = vectors_Bn.unflatten(1, (-1, self.width))
        scaled_BID = dense_BI[:, :, None] * self.dense
        return torch.cat([vectors_BFD, scaled_BID.to(vectors_BFD.dtype)], dim=1)

    def multiply_adds(self) -> int:
        """Return the multiply-adds of a sample."""
        return self.embeddings.multiply_adds() + self.dense.numel()

    def initial_variances(self) -> dict[str, float]:
        """Return small variances, since dense features can be far from 0: see CrossNetwork."""
        return {"dense": 1e-4}


class LogisticRegression(CTRNetwork):
    """One weight for each dense feature and for each id.

    Args:
        features: dense inputs and tables, from the dataset's schema.
        seed: seed of the initial parameters.
        missing: replacement of missing dense values: zero, or learned (a number for each feature).
    """

    def __init__(self, features: Features, seed: int = 0, *, missing: Missing = "zero") -> None:
        super().__init__(features.dense, missing)
        self.linear = LinearTerms(features, seed)

    def score(self, dense_BI: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        """See CTRNetwork.score."""
        dense_BI = self.missing(dense_BI)
        return self.linear(dense_BI, vectors["linear"])

    def multiply_adds(self) -> int:
        """See CTRNetwork.multiply_adds."""
        return self.linear.multiply_adds()


class MatrixFactorization(CTRNetwork):
    """Two columns alone: mu + b_u + b_i + q_i . p_u (Koren et al. 2009, equation 4), as a logit.

    Args:
        features: tables, from the dataset's schema; dense features are not used.
        seed: seed of the initial parameters.
        columns: names of the two columns, such as those of the user and of the item.
        embedding_dim: D, the width of their vectors.
    """

    def __init__(self, features: Features, seed: int = 0, *, columns: Sequence[str], embedding_dim: int = 16) -> None:
        super().__init__(features.dense, "zero")
        unknown = [name for name in columns if name not in features.tables]
        require(
            len(set(columns)) == 2 and not unknown,
            f"columns is [{', '.join(columns)}]; expected the names of two columns among {', '.join(features.tables)}",
        )
        chosen = {name: features.tables[name] for name in columns}
        names = list(features.tables)
        positions = torch.tensor([names.index(name) for name in columns])
        self.register_buffer("positions", positions, persistent=False)
        self.vectors = EmbeddingTables(
            [Table.of_column(name, rows) for name, rows in chosen.items()], embedding_dim, seed
        )
        self.biases = EmbeddingTables(scalar_tables(chosen, "bias"), 1, seed)
        self.mean = nn.Parameter(torch.zeros(()))

    positions: Tensor

    def lookup(self, ids: SparseIds) -> dict[str, Tensor]:
        """See CTRNetwork.lookup; vectors [B, 2, D] and biases [B, 2, 1] of the two columns."""
        pair = ids.of_tables(self.positions)
        return {"vectors": self.vectors(pair), "biases": self.biases(pair)}

    def score(self, dense_BI: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        """See CTRNetwork.score."""
        first_BD, second_BD = vectors["vectors"].unbind(1)
        return self.mean + vectors["biases"].sum((1, 2)) + (first_BD * second_BD).sum(1)

    def multiply_adds(self) -> int:
        """See CTRNetwork.multiply_adds."""
        return self.vectors.width


class FactorizationMachine(CTRNetwork):
    """Linear terms and the dot products of all pairs of fields' vectors (Rendle 2010, equation 1).

    Args:
        features: dense inputs and tables, from the dataset's schema.
        seed: seed of the initial parameters.
        embedding_dim: D, the width of every vector.
        tables: settings of the tables, such as widths and pooling.
        missing: replacement of missing dense values: zero, or learned (a number for each feature).
    """

    def __init__(
        self,
        features: Features,
        seed: int = 0,
        *,
        embedding_dim: int = 16,
        tables: TableSettings | None = None,
        missing: Missing = "zero",
    ) -> None:
        super().__init__(features.dense, missing)
        self.linear = LinearTerms(features, seed)
        self.fields = FieldVectors(features, embedding_dim, seed, tables, type(self).__name__)
        self.pairs = PairwiseSum()
        initialize(self, seed)

    def score(self, dense_BI: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        """See CTRNetwork.score."""
        dense_BI = self.missing(dense_BI)
        return self.linear(dense_BI, vectors["linear"]) + self.pairs(self.fields(dense_BI, vectors["fields"]))

    def multiply_adds(self) -> int:
        """See CTRNetwork.multiply_adds."""
        parts = self.linear.multiply_adds() + self.fields.multiply_adds()
        return parts + self.fields.fields * self.fields.width


class MLP(CTRNetwork):
    """A plain MLP over the columns' vectors and the dense features.

    Args:
        features: dense inputs and tables, from the dataset's schema.
        seed: seed of the initial parameters.
        embedding_dim: D, the width of every vector unless ``tables`` says otherwise.
        deep: widths of the hidden layers; a layer of width 1 follows.
        batch_norm: normalize over the batch between each hidden layer and its ReLU.
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
        deep: Sequence[int] = (512, 256),
        batch_norm: bool = False,
        tables: TableSettings | None = None,
        missing: Missing = "zero",
    ) -> None:
        super().__init__(features.dense, missing)
        self.embeddings = Embeddings(features.tables, embedding_dim, seed, tables)
        width = sum(self.embeddings.widths) + features.dense
        self.deep = layers.MLP([width, *deep, 1], linear_output=True, batch_norm=batch_norm)
        initialize(self, seed)

    def score(self, dense_BI: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        """See CTRNetwork.score."""
        dense_BI = self.missing(dense_BI)
        vectors_Bn = vectors["embeddings"]
        return self.deep(torch.cat([vectors_Bn, dense_BI.to(vectors_Bn.dtype)], dim=1)).squeeze(1)

    def multiply_adds(self) -> int:
        """See CTRNetwork.multiply_adds."""
        return self.embeddings.multiply_adds() + self.deep.multiply_adds()


class WideAndDeep(MLP):
    """The sum of linear terms and of an MLP's output (Cheng et al. 2016, equation 3, without crossed columns).

    Args:
        features: dense inputs and tables, from the dataset's schema.
        seed: seed of the initial parameters.
        options: options of MLP.
    """

    def __init__(self, features: Features, seed: int = 0, **options: Any) -> None:
        super().__init__(features, seed, **options)
        self.wide = LinearTerms(features, seed)

    def score(self, dense_BI: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        """See CTRNetwork.score."""
        dense_BI = self.missing(dense_BI)
        return self.wide(dense_BI, vectors["wide"]) + super().score(dense_BI, vectors)

    def multiply_adds(self) -> int:
        """See CTRNetwork.multiply_adds."""
        return self.wide.multiply_adds() + super().multiply_adds()


class DeepFM(FactorizationMachine):
    """A factorization machine and an MLP that share the fields' vectors (Guo et al. 2017, equation 1).

    Args:
        features: dense inputs and tables, from the dataset's schema.
        seed: seed of the initial parameters.
        embedding_dim: D, the width of every vector.
        deep: widths of the hidden layers; a layer of width 1 follows.
        batch_norm: normalize over the batch between each hidden layer and its ReLU.
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
        deep: Sequence[int] = (512, 256),
        batch_norm: bool = False,
        tables: TableSettings | None = None,
        missing: Missing = "zero",
    ) -> None:
        super().__init__(features, seed, embedding_dim=embedding_dim, tables=tables, missing=missing)
        self.deep = layers.MLP(
            [self.fields.fields * embedding_dim, *deep, 1], linear_output=True, batch_norm=batch_norm
        )
        initialize(self, seed)

    def score(self, dense_BI: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        """See CTRNetwork.score."""
        dense_BI = self.missing(dense_BI)
        vectors_BVD = self.fields(dense_BI, vectors["fields"])
        return (
            self.linear(dense_BI, vectors["linear"])
            + self.pairs(vectors_BVD)
            + self.deep(vectors_BVD.flatten(1)).squeeze(1)
        )

    def multiply_adds(self) -> int:
        """See CTRNetwork.multiply_adds."""
        return super().multiply_adds() + self.deep.multiply_adds()


class XDeepFM(CTRNetwork):
    """Linear terms, a compressed interaction network and an MLP (Lian et al. 2018, equation 9).

    Args:
        features: dense inputs and tables, from the dataset's schema.
        seed: seed of the initial parameters.
        embedding_dim: D, the width of every vector.
        cin_layers: rows of each layer of the compressed interaction network.
        deep: widths of the MLP's hidden layers; a layer of width 1 follows.
        batch_norm: normalize over the batch between each hidden layer and its ReLU.
        tables: settings of the tables, such as widths and pooling.
        missing: replacement of missing dense values: zero, or learned (a number for each feature).
    """

    HIDDEN_WIDTHS: ClassVar[Mapping[str, slice]] = {"cin_layers": slice(None), "deep": slice(None)}

    def __init__(
        self,
        features: Features,
        seed: int = 0,
        *,
        embedding_dim: int = 16,
        cin_layers: Sequence[int] = (64, 64),
        deep: Sequence[int] = (512, 256),
        batch_norm: bool = False,
        tables: TableSettings | None = None,
        missing: Missing = "zero",
    ) -> None:
        super().__init__(features.dense, missing)
        self.linear = LinearTerms(features, seed)
        self.fields = FieldVectors(features, embedding_dim, seed, tables, "XDeepFM")
        self.cin = CompressedInteraction(self.fields.fields, embedding_dim, cin_layers)
        self.cin_output = layers.MLP([self.cin.outputs, 1], linear_output=True)
        self.deep = layers.MLP(
            [self.fields.fields * embedding_dim, *deep, 1], linear_output=True, batch_norm=batch_norm
        )
        initialize(self, seed)

    def score(self, dense_BI: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        """See CTRNetwork.score."""
        dense_BI = self.missing(dense_BI)
        vectors_BVD = self.fields(dense_BI, vectors["fields"])
        crosses_B = self.cin_output(self.cin(vectors_BVD)).squeeze(1)
        return self.linear(dense_BI, vectors["linear"]) + crosses_B + self.deep(vectors_BVD.flatten(1)).squeeze(1)

    def multiply_adds(self) -> int:
        """See CTRNetwork.multiply_adds."""
        parts = (self.linear, self.fields, self.cin, self.cin_output, self.deep)
        return sum(part.multiply_adds() for part in parts)
