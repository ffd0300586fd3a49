"""AutoInt: self-attention over the fields' vectors (Song et al. 2019, arXiv:1810.11921).

Shape suffixes: B samples, V fields, D width of the vectors, A width of a layer's output, H heads, K width of a head.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_dlrm.contracts.errors import require
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.models.fields import FieldVectors, LinearTerms
from lightning_dlrm.models.layers import MLP, initialize
from lightning_dlrm.models.network import CTRNetwork, Missing
from lightning_dlrm.tables.embeddings import TableSettings


class SelfAttention(nn.Module):
    """One interacting layer: relu(softmax(Q K^T) V + W_res X), head by head (Song et al. 2019, equations 5 to 8).

    Args:
        fields: V.
        width: D.
        outputs: A, the width of all heads together.
        heads: H; divides A.
        scale: divide the products Q K^T by sqrt(K).
        residual: add W_res X, or X itself if D equals A.
    """

    def __init__(self, fields: int, width: int, outputs: int, heads: int, scale: bool, residual: bool) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, outputs, bias=False) for _ in range(3))
        self.residual = nn.Linear(width, outputs, bias=False) if residual and width != outputs else None
        self.fields, self.heads = fields, heads
        self.scale = (outputs // heads) ** -0.5 if scale else 1.0
        self.adds_input = residual

    def forward(self, x_BVD: Tensor) -> Tensor:
        """Return the fields' new vectors: [B, V, D] -> [B, V, A]."""
        query_BHVK, key_BHVK, value_BHVK = (
            layer(x_BVD).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        attention_BHVV = torch.softmax(query_BHVK @ key_BHVK.transpose(2, 3) * self.scale, dim=3)
        mixed_BVA = (attention_BHVV @ value_BHVK).transpose(1, 2).flatten(2)
        if self.adds_input:
            mixed_BVA = mixed_BVA + (x_BVD if self.residual is None else self.residual(x_BVD))
        return torch.relu(mixed_BVA)

    def multiply_adds(self) -> int:
        """Return the multiply-adds of a sample: the linear layers, and the products of all pairs of fields."""
        weights = sum(weight.numel() for weight in self.parameters())
        return self.fields * weights + 2 * self.fields**2 * self.query.out_features


class AutoInt(CTRNetwork):
    """Self-attention over the fields' vectors, beside an MLP over them and linear terms (AutoInt+).

    Args:
        features: dense inputs and tables, from the dataset's schema.
        seed: seed of the initial parameters.
        embedding_dim: D, the width of every vector.
        attention: width of each interacting layer's output.
        heads: heads of each interacting layer; a divisor of its width.
        scale: divide the products of queries and keys by the square root of a head's width.
        residual: add each interacting layer's input to its output.
        deep: widths of the MLP's hidden layers, and a layer of width 1 follows; empty for no MLP.
        batch_norm: normalize over the batch in the MLP, between each hidden layer and its ReLU.
        dropout: share of the MLP's hidden outputs that training sets to 0.
        wide: add linear terms without a bias.
        tables: settings of the tables, such as pooling.
        missing: replacement of missing dense values: zero, or learned (a number for each feature).
    """

    HIDDEN_WIDTHS: ClassVar[Mapping[str, slice]] = {"deep": slice(None)}

    def __init__(
        self,
        features: Features,
        seed: int = 0,
        *,
        embedding_dim: int = 16,
        attention: Sequence[int] = (32, 32),
        heads: int = 2,
        scale: bool = False,
        residual: bool = True,
        deep: Sequence[int] = (512, 256),
        batch_norm: bool = False,
        dropout: float = 0.0,
        wide: bool = False,
        tables: TableSettings | None = None,
        missing: Missing = "zero",
    ) -> None:
        super().__init__(features.dense, missing)
        require(
            attention and heads >= 1 and all(width >= 1 and width % heads == 0 for width in attention),
            f"attention is {list(attention)} and heads {heads}; expected at least one width, each a multiple of heads",
        )
        self.fields = FieldVectors(features, embedding_dim, seed, tables, "AutoInt", dense_first=True)
        fields, widths = self.fields.fields, [embedding_dim, *attention]
        layers = [SelfAttention(fields, a, b, heads, scale, residual) for a, b in itertools.pairwise(widths)]
        self.attention = nn.Sequential(*layers)
        self.logit = MLP([fields * widths[-1], 1], linear_output=True)
        self.deep = (
            MLP([fields * embedding_dim, *deep, 1], linear_output=True, batch_norm=batch_norm, dropout=dropout)
            if deep
            else None
        )
        self.wide = LinearTerms(features, seed, tables, bias=False) if wide else None
        initialize(self, seed)

    def score(self, dense_BI: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        """See CTRNetwork.score."""
        dense_BI = self.missing(dense_BI)
        x_BVD = self.fields(dense_BI, vectors["fields"])
        logits_B = self.logit(self.attention(x_BVD).flatten(1)).squeeze(1)
        if self.deep is not None:
            logits_B = logits_B + self.deep(x_BVD.flatten(1)).squeeze(1)
        return logits_B if self.wide is None else logits_B + self.wide(dense_BI, vectors["wide"])

    def multiply_adds(self) -> int:
        """See CTRNetwork.multiply_adds."""
        layers = [layer for layer in self.attention if isinstance(layer, SelfAttention)]
        parts = [part for part in (self.deep, self.wide) if part is not None]
        return sum(part.multiply_adds() for part in (self.fields, *layers, self.logit, *parts))
