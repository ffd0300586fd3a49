"""FinalMLP: two MLPs, whose inputs are gated and whose outputs are multiplied (Mao et al. 2023, arXiv:2304.00902).

Shape suffixes: B samples, I dense features, F columns, D width, n features of all fields, p and q the widths of the
towers' outputs, H heads.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.models.fields import DenseVectors, FieldVectors, join_fields
from lightning_dlrm.models.layers import MLP, initialize
from lightning_dlrm.models.network import CTRNetwork, Missing
from lightning_dlrm.tables.embeddings import TableSettings
from lightning_dlrm.tables.lookup import EmbeddingTables


class FeatureGate(nn.Module):
    """Factors of all features, 2 sigmoid(MLP(c)), from vectors c of some fields (Mao et al. 2023, equations 7 and 8).

    The vectors are the gate's own: tables ``C3/gate1``, and a vector for each dense feature, multiplied with its value.
    Without fields, c is one learned vector for all samples, which starts at zero.

    Args:
        features: dense inputs and tables of the dataset.
        context: names of fields.
        name: name of the gate, such as gate1.
        option: name of the option that gives the context, such as context1.
        embedding_dim: D.
        hidden: widths of the MLP's hidden layers.
        outputs: n.
        seed: seed of the initial rows.
        settings: settings of the tables.

    Raises:
        UserError: the context names a field twice, or an unknown field.
    """

    columns: Tensor
    dense_columns: Tensor

    def __init__(
        self,
        features: Features,
        context: Sequence[str],
        name: str,
        option: str,
        embedding_dim: int,
        hidden: Sequence[int],
        outputs: int,
        seed: int,
        settings: TableSettings,
    ) -> None:
        super().__init__()
        dense = [feature for feature in features.dense_names if feature in context]
        columns = [column for column in features.tables if column in context]
        if unknown := [field for field in context if field not in (*dense, *columns)]:
            known = ", ".join((*features.dense_names, *features.tables))
            raise UserError(f"{option} names {unknown[0]}, which is not a field; the fields are {known}")
        if twice := [field for position, field in enumerate(context) if field in context[:position]]:
            raise UserError(f"{option} names {twice[0]} twice; expected each field once: leave one of them out")
        places = [list(features.tables).index(column) for column in columns]
        dense_places = [features.dense_names.index(feature) for feature in dense]
        self.register_buffer("columns", torch.tensor(places, dtype=torch.int64), persistent=False)
        self.register_buffer("dense_columns", torch.tensor(dense_places, dtype=torch.int64), persistent=False)
        self._settings = settings
        tables = [settings.table(f"{column}/{name}", features.tables[column]) for column in columns]
        gradients = settings.dense_gradients
        self.tables = EmbeddingTables(tables, embedding_dim, seed, dense_gradients=gradients) if tables else None
        self.dense = DenseVectors(len(dense), embedding_dim) if dense else None
        self.vector = None if context else nn.Parameter(torch.zeros(embedding_dim))
        self.layers = MLP([embedding_dim * max(1, len(dense) + len(columns)), *hidden, outputs], linear_output=True)

    def lookup(self, ids: SparseIds) -> Tensor:
        """Return the vectors of the context's columns side by side, [B, F * D]."""
        if self.tables is None:
            return self.layers.linears()[0].weight.new_zeros(len(ids), 0)
        vectors_BFD: Tensor = self.tables(self._settings.without_padding(ids.of_tables(self.columns)))
        return vectors_BFD.flatten(1)

    def forward(self, dense_BI: Tensor, vectors_Bn: Tensor) -> Tensor:
        """Return the factors [B, n] from all dense features and the result of ``lookup``."""
        if self.vector is not None:
            context_Bn = self.vector.expand(len(dense_BI), -1)
        elif self.dense is None:
            context_Bn = vectors_Bn
        else:
            context_Bn = join_fields(dense_BI.index_select(1, self.dense_columns), vectors_Bn, self.dense)
        return 2 * torch.sigmoid(self.layers(context_Bn))

    def multiply_adds(self) -> int:
        """Return the multiply-adds of a sample: the vectors, the MLP, and the factors times the features."""
        of_dense = 0 if self.dense is None else self.dense.multiply_adds()
        return of_dense + self.layers.multiply_adds() + self.layers.widths[-1]


class BilinearFusion(nn.Module):
    """w_x a + w_y b + sum_h a_h^T W_h b_h, with a and b cut into heads (Mao et al. 2023, equations 9 to 11).

    Args:
        first: p.
        second: q.
        heads: H; divides p and q.
    """

    def __init__(self, first: int, second: int, heads: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(first, 1), nn.Linear(second, 1)
        self.products = nn.Parameter(torch.empty(heads, first // heads, second // heads))

    def forward(self, a_Bp: Tensor, b_Bq: Tensor) -> Tensor:
        """Return logits: [B, p], [B, q] -> [B]."""
        heads = self.products.shape[0]
        a_BHp, b_BHq = a_Bp.unflatten(1, (heads, -1)), b_Bq.unflatten(1, (heads, -1))
        mixed_HBq = a_BHp.transpose(0, 1) @ self.products.to(a_BHp.dtype)
        products_B = (mixed_HBq.transpose(0, 1) * b_BHq).sum((1, 2))
        return (self.first(a_Bp) + self.second(b_Bq)).squeeze(1) + products_B

    def multiply_adds(self) -> int:
        """Return the multiply-adds of a sample."""
        return self.first.in_features + 2 * self.second.in_features + self.products.numel()

    def initial_variances(self) -> dict[str, float]:
        """Return the variance of FuxiCTR's: Xavier normal of a matrix with one column."""
        return {"products": 2 / (self.products.numel() + 1)}


class FinalMLP(CTRNetwork):
    """Two MLPs over all fields' vectors, each behind a gate, and the products of their outputs.

    Args:
        features: dense inputs and tables, from the dataset's schema.
        seed: seed of the initial parameters.
        embedding_dim: D, the width of every vector.
        first: widths of the first MLP's layers.
        second: widths of the second MLP's layers.
        heads: number of slices of both outputs whose pairs are multiplied; a divisor of both last widths.
        gates: multiply the features of each MLP with the factors of a gate (the paper's feature selection).
        gate: widths of the hidden layers of both gates.
        context1: fields that the first MLP's gate reads, such as [I1, C3]; empty for one learned vector.
        context2: fields that the second MLP's gate reads.
        batch_norm: normalize over the batch in both MLPs, between each layer and its ReLU; [true, false] for the first
            alone.
        dropout: share of both MLPs' outputs, layer by layer, that training sets to 0; a list for each of them.
        tables: settings of the tables, such as pooling.
        missing: replacement of missing dense values: zero, or learned (a number for each feature).
    """

    HIDDEN_WIDTHS: ClassVar[Mapping[str, slice]] = {"first": slice(0, -1), "second": slice(0, -1)}

    def __init__(
        self,
        features: Features,
        seed: int = 0,
        *,
        embedding_dim: int = 16,
        first: Sequence[int] = (512, 256),
        second: Sequence[int] = (512, 256),
        heads: int = 1,
        gates: bool = True,
        gate: Sequence[int] = (64,),
        context1: Sequence[str] = (),
        context2: Sequence[str] = (),
        batch_norm: bool | Sequence[bool] = False,
        dropout: float | Sequence[float] = 0.0,
        tables: TableSettings | None = None,
        missing: Missing = "zero",
    ) -> None:
        super().__init__(features.dense, missing)
        require(
            first and second and heads >= 1 and first[-1] % heads == second[-1] % heads == 0,
            f"first is {list(first)}, second {list(second)} and heads {heads}; expected widths whose last ones are "
            "multiples of heads",
        )
        require(gates or not (context1 or context2), "context1 and context2 are for gates, and gates is false")
        self.fields = FieldVectors(features, embedding_dim, seed, tables, "FinalMLP", dense_first=True)
        width, settings = self.fields.fields * embedding_dim, tables or TableSettings()
        norms = batch_norm if isinstance(batch_norm, Sequence) else (batch_norm, batch_norm)
        drops = dropout if isinstance(dropout, Sequence) else (dropout, dropout)
        require(
            len(norms) == len(drops) == 2, f"batch_norm is {norms} and dropout {drops}; expected a value, or two each"
        )
        self.first = MLP([width, *first], batch_norm=norms[0], dropout=drops[0])
        self.second = MLP([width, *second], batch_norm=norms[1], dropout=drops[1])
        self.gate1, self.gate2 = (
            FeatureGate(features, context, name, option, embedding_dim, gate, width, seed, settings) if gates else None
            for name, option, context in (("gate1", "context1", context1), ("gate2", "context2", context2))
        )
        self.fusion = BilinearFusion(first[-1], second[-1], heads)
        initialize(self, seed)

    def score(self, dense_BI: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        """See CTRNetwork.score."""
        dense_BI = self.missing(dense_BI)
        first_Bn = second_Bn = self.fields(dense_BI, vectors["fields"]).flatten(1)
        if self.gate1 is not None and self.gate2 is not None:
            first_Bn = first_Bn * self.gate1(dense_BI, vectors["gate1"])
            second_Bn = second_Bn * self.gate2(dense_BI, vectors["gate2"])
        return self.fusion(self.first(first_Bn), self.second(second_Bn))

    def multiply_adds(self) -> int:
        """See CTRNetwork.multiply_adds."""
        parts = (self.fields, self.gate1, self.gate2, self.first, self.second, self.fusion)
        return sum(part.multiply_adds() for part in parts if part is not None)
