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
from lightning_dlrm.models.fields import DenseVectors, FieldVectors, LinearTerms, join_fields, scalar_tables
from lightning_dlrm.models.layers import CompressedInteraction, PairwiseSum, initialize
from lightning_dlrm.models.network import CTRNetwork, Missing
from lightning_dlrm.tables.embeddings import Embeddings, TableSettings
from lightning_dlrm.tables.lookup import EmbeddingTables
from lightning_dlrm.tables.table import Table


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
        linear_bias: whether the linear terms have a bias.
        tables: settings of the tables, such as widths and pooling.
        missing: replacement of missing dense values: zero, or learned (a number for each feature).
    """

    def __init__(
        self,
        features: Features,
        seed: int = 0,
        *,
        embedding_dim: int = 16,
        linear_bias: bool = True,
        tables: TableSettings | None = None,
        missing: Missing = "zero",
    ) -> None:
        super().__init__(features.dense, missing)
        self.linear = LinearTerms(features, seed, tables, bias=linear_bias)
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
        dropout: share of the MLP's hidden outputs that training sets to 0.
        embed_dense: give each dense feature a vector, multiplied with its value, in place of the value alone.
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
        dropout: float = 0.0,
        embed_dense: bool = False,
        tables: TableSettings | None = None,
        missing: Missing = "zero",
    ) -> None:
        super().__init__(features.dense, missing)
        self.embeddings = Embeddings(features.tables, embedding_dim, seed, tables)
        self.dense_vectors = DenseVectors(features.dense, embedding_dim) if embed_dense else None
        width = sum(self.embeddings.widths) + features.dense * (embedding_dim if embed_dense else 1)
        self.deep = layers.MLP([width, *deep, 1], linear_output=True, batch_norm=batch_norm, dropout=dropout)
        initialize(self, seed)

    def score(self, dense_BI: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        """See CTRNetwork.score."""
        dense_BI = self.missing(dense_BI)
        return self.deep(join_fields(dense_BI, vectors["embeddings"], self.dense_vectors)).squeeze(1)

    def multiply_adds(self) -> int:
        """See CTRNetwork.multiply_adds."""
        parts = (self.embeddings, self.dense_vectors, self.deep)
        return sum(part.multiply_adds() for part in parts if part is not None)


class WideAndDeep(MLP):
    """The sum of linear terms and of an MLP's output (Cheng et al. 2016, equation 3, without crossed columns).

    Args:
        features: dense inputs and tables, from the dataset's schema.
        seed: seed of the initial parameters.
        linear_bias: whether the linear terms have a bias beside the MLP's.
        tables: settings of the tables, such as widths and pooling.
        options: other options of MLP.
    """

    def __init__(
        self,
        features: Features,
        seed: int = 0,
        *,
        linear_bias: bool = True,
        tables: TableSettings | None = None,
        **options: Any,
    ) -> None:
        super().__init__(features, seed, tables=tables, **options)
        self.wide = LinearTerms(features, seed, tables, bias=linear_bias)

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
        dropout: share of the MLP's hidden outputs that training sets to 0.
        linear_bias: whether the linear terms have a bias beside the MLP's.
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
        dropout: float = 0.0,
        linear_bias: bool = True,
        tables: TableSettings | None = None,
        missing: Missing = "zero",
    ) -> None:
        super().__init__(
            features, seed, embedding_dim=embedding_dim, linear_bias=linear_bias, tables=tables, missing=missing
        )
        self.deep = layers.MLP(
            [self.fields.fields * embedding_dim, *deep, 1], linear_output=True, batch_norm=batch_norm, dropout=dropout
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
        dropout: share of the MLP's hidden outputs that training sets to 0.
        linear_bias: whether the linear terms have a bias beside the MLP's.
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
        dropout: float = 0.0,
        linear_bias: bool = True,
        tables: TableSettings | None = None,
        missing: Missing = "zero",
    ) -> None:
        super().__init__(features.dense, missing)
        self.linear = LinearTerms(features, seed, tables, bias=linear_bias)
        self.fields = FieldVectors(features, embedding_dim, seed, tables, "XDeepFM")
        self.cin = CompressedInteraction(self.fields.fields, embedding_dim, cin_layers)
        self.cin_output = layers.MLP([self.cin.outputs, 1], linear_output=True)
        self.deep = layers.MLP(
            [self.fields.fields * embedding_dim, *deep, 1], linear_output=True, batch_norm=batch_norm, dropout=dropout
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
