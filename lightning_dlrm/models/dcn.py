"""DCN: Deep & Cross Network (Wang et al. 2017, arXiv:1708.05123; v2: Wang et al. 2021, arXiv:2008.13535).

Shape suffixes: B samples, d features, r rank, E experts. The initial weights of cross networks are Xavier normal, their
initial biases are zero.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.models.fields import DenseVectors, LinearTerms, join_fields
from lightning_dlrm.models.fused import missing_columns
from lightning_dlrm.models.layers import MLP, initialize
from lightning_dlrm.models.network import CTRNetwork, Missing
from lightning_dlrm.tables.embeddings import Embeddings, TableSettings

CrossKind: TypeAlias = Literal["vector", "matrix", "low_rank", "mixture"]
CrossActivation: TypeAlias = Literal["relu", "tanh"]


class CrossNetwork(nn.Module):
    """Base of the cross networks, whose layers each multiply with the input once more.

    Args:
        features: d.
        layers: number of layers.
    """

    def __init__(self, features: int, layers: int) -> None:
        super().__init__()
        require(layers >= 1, f"cross_layers is {layers}; expected at least 1")
        self.features = features
        self.layers = layers

    def forward(self, x0_Bd: Tensor) -> Tensor:
        """Return the crosses of the input: [B, d] -> [B, d]."""
        x_Bd = x0_Bd
        for layer in range(self.layers):
            x_Bd = self.cross(layer, x0_Bd, x_Bd)
        return x_Bd

    def cross(self, layer: int, x0_Bd: Tensor, x_Bd: Tensor) -> Tensor:
        """Return x_{l+1} of one layer from x_0 and x_l."""
        raise TypeError(f"{type(self).__name__} does not define cross")

    def initial_variances(self) -> dict[str, float]:
        """Return the variance of the initial normal weights of each parameter; 0 for parameters that start at zero."""
        raise TypeError(f"{type(self).__name__} does not define initial_variances")

    def multiply_adds(self) -> int:
        """Return the multiply-adds of a sample: the products with the weights, and d a layer to scale x_0."""
        raise TypeError(f"{type(self).__name__} does not define multiply_adds")


class VectorCross(CrossNetwork):
    """DCN v1 (Wang et al. 2017, equation 3): x_{l+1} = x_0 (x_l . w_l) + b_l + x_l.

    Args:
        features: d.
        layers: number of layers.
        left_to_right: add the three terms in the order of the equation, as FuxiCTR does, so that its numbers are
            repeated to rounding. By default the last two are added first, which takes one operation less.
    """

    def __init__(self, features: int, layers: int, left_to_right: bool = False) -> None:
        super().__init__(features, layers)
        self.left_to_right = left_to_right
        self.weight = nn.Parameter(torch.empty(layers, features))
        self.bias = nn.Parameter(torch.zeros(layers, features))

    def cross(self, layer: int, x0_Bd: Tensor, x_Bd: Tensor) -> Tensor:
        product_B1 = (x_Bd @ self.weight[layer])[:, None]
        if self.left_to_right:
            return x0_Bd * product_B1 + self.bias[layer] + x_Bd
        return torch.addcmul(x_Bd + self.bias[layer], x0_Bd, product_B1)

    def initial_variances(self) -> dict[str, float]:
        return {"weight": 2 / (self.features + 1), "bias": 0.0}

    def multiply_adds(self) -> int:
        return self.layers * 2 * self.features


class MatrixCross(CrossNetwork):
    """DCN v2, full rank (Wang et al. 2021, equation 1): x_{l+1} = x_0 * (W_l x_l + b_l) + x_l."""

    def __init__(self, features: int, layers: int) -> None:
        super().__init__(features, layers)
        self.weight = nn.Parameter(torch.empty(layers, features, features))
        self.bias = nn.Parameter(torch.zeros(layers, features))

    def forward(self, x0_Bd: Tensor) -> Tensor:
        """Return the crosses of the input: [B, d] -> [B, d]."""
        extra = missing_columns(self.features, len(x0_Bd))
        if not extra:
            return super().forward(x0_Bd)
        # Columns of zeros align the rows, and stay zero.
        return super().forward(functional.pad(x0_Bd, (0, extra)))[:, : self.features]

    def cross(self, layer: int, x0_Bd: Tensor, x_Bd: Tensor) -> Tensor:
        """Return x_{l+1} of one layer from x_0 and x_l, which may have further columns of zeros."""
        weight_dd, bias_d, extra = self.weight[layer], self.bias[layer], x_Bd.shape[1] - self.features
        if extra:
            weight_dd, bias_d = functional.pad(weight_dd, (0, extra, 0, extra)), functional.pad(bias_d, (0, extra))
        return torch.addcmul(x_Bd, x0_Bd, functional.linear(x_Bd, weight_dd, bias_d))

    def initial_variances(self) -> dict[str, float]:
        return {"weight": 1 / self.features, "bias": 0.0}

    def multiply_adds(self) -> int:
        return self.layers * (self.features**2 + self.features)


class LowRankCross(CrossNetwork):
    """DCN v2, low rank (Wang et al. 2021, equation 2): x_{l+1} = x_0 * (U_l (V_l x_l) + b_l) + x_l.

    Args:
        features: d.
        layers: number of layers.
        rank: r, below d: W_l = U_l V_l.
    """

    def __init__(self, features: int, layers: int, rank: int) -> None:
        super().__init__(features, layers)
        _check_rank(rank, features)
        self.up = nn.Parameter(torch.empty(layers, features, rank))
        self.down = nn.Parameter(torch.empty(layers, rank, features))
        self.bias = nn.Parameter(torch.zeros(layers, features))

    def cross(self, layer: int, x0_Bd: Tensor, x_Bd: Tensor) -> Tensor:
        projected_Br = functional.linear(x_Bd, self.down[layer])
        return torch.addcmul(x_Bd, x0_Bd, functional.linear(projected_Br, self.up[layer], self.bias[layer]))

    def initial_variances(self) -> dict[str, float]:
        variance = 2 / (self.features + self.up.shape[2])
        return {"up": variance, "down": variance, "bias": 0.0}

    def multiply_adds(self) -> int:
        return self.layers * (2 * self.features * self.up.shape[2] + self.features)


class MixtureCross(CrossNetwork):
    """DCN v2, mixture of low-rank experts (Wang et al. 2021, equations 3 and 4).

    x_{l+1} = sum_e softmax_e(g_e . x_l) E_e(x_l) + x_l, with
    E_e(x) = x_0 * (U_e f(C_e f(V_e x)) + b). The gates g_e serve all layers, as published.

    Args:
        features: d.
        layers: number of layers.
        rank: r, below d.
        experts: E.
        activation: f.
    """

    def __init__(
        self, features: int, layers: int, rank: int, experts: int, activation: CrossActivation = "relu"
    ) -> None:
        super().__init__(features, layers)
        require(activation in ("relu", "tanh"), f"cross_activation {activation!r} is not one of relu, tanh")
        self._activation = torch.relu if activation == "relu" else torch.tanh
        _check_rank(rank, features)
        require(experts >= 1, f"cross_experts is {experts}; expected at least 1")
        self.up = nn.Parameter(torch.empty(layers, experts, features, rank))
        self.core = nn.Parameter(torch.empty(layers, experts, rank, rank))
        self.down = nn.Parameter(torch.empty(layers, experts, rank, features))
        self.bias = nn.Parameter(torch.zeros(layers, features))
        self.gates = nn.Parameter(torch.empty(experts, features))

    def cross(self, layer: int, x0_Bd: Tensor, x_Bd: Tensor) -> Tensor:
        projected_EBr = self._activation(x_Bd @ self.down[layer].transpose(1, 2))
        projected_EBr = self._activation(projected_EBr @ self.core[layer].transpose(1, 2))
        expert_EBd = projected_EBr @ self.up[layer].transpose(1, 2) + self.bias[layer]
        gate_EB = torch.softmax(self.gates @ x_Bd.T, dim=0)
        return torch.addcmul(x_Bd, x0_Bd, (gate_EB[..., None] * expert_EBd).sum(0))

    def initial_variances(self) -> dict[str, float]:
        variance = 2 / (self.features + self.core.shape[2])
        return {
            "up": variance,
            "core": 1 / self.core.shape[2],
            "down": variance,
            "bias": 0.0,
            "gates": 2 / (self.features + 1),
        }

    def xavier_variances(self) -> dict[str, float]:
        """Return the variances of FuxiCTR, which takes each stack of matrices as one convolution."""
        _, experts, features, rank = self.up.shape
        outer = 2 / ((features + experts) * rank)
        inner = 2 / ((rank + experts) * rank)
        return {**self.initial_variances(), "up": outer, "down": outer, "core": inner}

    def multiply_adds(self) -> int:
        _, experts, features, rank = self.up.shape
        return self.layers * (experts * (2 * features * rank + rank**2 + 2 * features) + features)


def make_cross(
    kind: CrossKind,
    features: int,
    layers: int,
    rank: int | None,
    experts: int | None,
    activation: CrossActivation = "relu",
    left_to_right: bool = False,
) -> CrossNetwork:
    """Return a cross network by its name in configurations; ``left_to_right`` is that of VectorCross.

    Raises:
        UserError: there is no such kind, or a rank, experts or activation are missing or not supported by the kind.
    """
    needs: dict[str, tuple[str, ...]] = {
        "vector": (),
        "matrix": (),
        "low_rank": ("cross_rank",),
        "mixture": ("cross_rank", "cross_experts"),
    }
    require(kind in needs, f"cross {kind!r} is not one of {', '.join(needs)}")
    given = {"cross_rank": rank, "cross_experts": experts}
    for option, value in given.items():
        if (value is None) == (option in needs[kind]):
            verb = "needs" if value is None else "takes no"
            raise UserError(f"cross: {kind} {verb} {option}; it is {'missing' if value is None else value}")
    require(
        activation == "relu" or kind == "mixture", f"cross_activation {activation} needs cross: mixture; got {kind}"
    )
    if rank is None:
        return VectorCross(features, layers, left_to_right) if kind == "vector" else MatrixCross(features, layers)
    if experts is None:
        return LowRankCross(features, layers, rank)
    return MixtureCross(features, layers, rank, experts, activation)


def _check_rank(rank: int, features: int) -> None:
    require(
        1 <= rank < features,
        f"cross_rank is {rank}; expected 1 to {features - 1}, below the {features} features that it joins",
    )


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
        cross_activation: activation within the experts of mixture: relu, or tanh as in FuxiCTR.
        deep: widths of the deep network's layers; empty for no deep network.
        structure: parallel (both networks get the input), stacked (the deep network gets the crosses), or
            stacked_parallel (one deep network gets the input, another one the crosses).
        stacked_deep: widths of the deep network over the crosses; for stacked_parallel only.
        batch_norm: normalize over the batch in the deep network, between each layer and its ReLU.
        wide: add linear terms, a weight for each dense feature and each id (Cheng et al. 2016).
        dropout: share of the deep network's outputs, layer by layer, that training sets to 0.
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
        cross: CrossKind = "vector",
        cross_layers: int = 6,
        cross_rank: int | None = None,
        cross_experts: int | None = None,
        cross_activation: CrossActivation = "relu",
        deep: Sequence[int] = (512, 256),
        structure: Literal["parallel", "stacked", "stacked_parallel"] = "parallel",
        stacked_deep: Sequence[int] = (),
        batch_norm: bool = False,
        wide: bool = False,
        dropout: float = 0.0,
        embed_dense: bool = False,
        tables: TableSettings | None = None,
        missing: Missing = "zero",
    ) -> None:
        super().__init__(features.dense, missing)
        _check_structure(structure, deep, stacked_deep)
        self.stacked = structure == "stacked"
        self.embeddings = Embeddings(features.tables, embedding_dim, seed, tables)
        self.dense_vectors = DenseVectors(features.dense, embedding_dim) if embed_dense else None
        width = sum(self.embeddings.widths) + features.dense * (embedding_dim if embed_dense else 1)
        # FuxiCTR's DCN, whose order of sums is repeated, gives each dense feature a vector.
        self.cross = make_cross(cross, width, cross_layers, cross_rank, cross_experts, cross_activation, embed_dense)
        self.deep = MLP([width, *deep], batch_norm=batch_norm, dropout=dropout) if deep else None
        self.stacked_deep = (
            MLP([width, *stacked_deep], batch_norm=batch_norm, dropout=dropout) if stacked_deep else None
        )
        of_crosses = 0 if self.stacked else [width, *stacked_deep][-1]
        self.logit = MLP([of_crosses + sum(deep[-1:]), 1], linear_output=True)
        self.wide = LinearTerms(features, seed, tables) if wide else None
        initialize(self, seed)

    def score(self, dense_BI: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        """See CTRNetwork.score."""
        dense_BI = self.missing(dense_BI)
        x0_Bd = join_fields(dense_BI, vectors["embeddings"], self.dense_vectors)
        joined_Bn = self.cross(x0_Bd)
        if self.stacked_deep is not None:
            joined_Bn = self.stacked_deep(joined_Bn)
        if self.deep is not None:
            joined_Bn = self.deep(joined_Bn) if self.stacked else torch.cat([joined_Bn, self.deep(x0_Bd)], dim=1)
        logits_B = self.logit(joined_Bn).squeeze(1)
        return logits_B if self.wide is None else logits_B + self.wide(dense_BI, vectors["wide"])

    def multiply_adds(self) -> int:
        """See CTRNetwork.multiply_adds."""
        parts = (
            *(self.embeddings, self.dense_vectors, self.cross, self.deep, self.stacked_deep, self.logit, self.wide),
        )
        return sum(part.multiply_adds() for part in parts if part is not None)


def _check_structure(structure: str, deep: Sequence[int], stacked_deep: Sequence[int]) -> None:
    """
    Raises:
        UserError: there is no such structure, or it needs other deep networks.
    """
    structures = ("parallel", "stacked", "stacked_parallel")
    require(structure in structures, f"structure {structure!r} is not one of {', '.join(structures)}")
    require(
        bool(stacked_deep) == (structure == "stacked_parallel"),
        f"stacked_deep is {list(stacked_deep)} and structure {structure}: give both, or neither",
    )
    require(
        deep or structure == "parallel",
        f"structure {structure} needs a deep network, and deep is empty: give its widths, or choose parallel",
    )
