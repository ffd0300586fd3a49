"""DLRM: Deep Learning Recommendation Model (Naumov et al. 2019, arXiv:1906.00091).

``reference_state_dict`` names its parameters as facebookresearch/dlrm does, to read files and to compare results.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.contracts.terminal import counted
from lightning_dlrm.models.dcn import CrossKind, CrossNetwork, make_cross
from lightning_dlrm.models.fields import LinearTerms
from lightning_dlrm.models.layers import MLP, DotInteraction, ProjectionInteraction, initialize
from lightning_dlrm.models.network import CTRNetwork, Missing
from lightning_dlrm.tables.embeddings import Embeddings, TableSettings


class DLRM(CTRNetwork):
    """Bottom MLP and tables, their interaction, top MLP (Naumov et al. 2019, section 2).

    With interaction cross it is the DLRM-DCNv2 of MLPerf.

    Args:
        features: dense inputs and tables, from the dataset's schema.
        seed: seed of the initial parameters.
        embedding_dim: D, the width of every vector unless ``tables`` says otherwise.
        bottom_mlp: widths of the bottom MLP's layers; the last width equals embedding_dim. Empty without dense
            features: then there is no bottom MLP, and no vector of it.
        top_mlp: widths of the top MLP's hidden layers; a layer of width 1 follows.
        interaction: dot (dot products of all pairs of vectors, beside the bottom MLP's output), projection
            (dot products of two sets of vectors made from all), cat (the vectors side by side), or cross (a
            cross network over them).
        self_interaction: also take each vector's product with itself; for dot only.
        projection: widths of the two MLPs that make the vectors; for projection only.
        cross: kind of cross layers: vector (DCN v1), matrix (DCN v2), low_rank, or mixture; for cross only.
        cross_layers: layers of the cross network; for cross only.
        cross_rank: rank of low_rank and mixture; for cross only.
        cross_experts: experts of mixture; for cross only.
        batch_norm: normalize over the batch in both MLPs, between each hidden layer and its ReLU.
        wide: add linear terms, a weight for each dense feature and each id (Cheng et al. 2016).
        dropout: share of the top MLP's hidden outputs that training sets to 0.
        tables: settings of the tables, such as widths and pooling.
        missing: replacement of missing dense values: zero, or learned (a number for each feature).
    """

    HIDDEN_WIDTHS: ClassVar[Mapping[str, slice]] = {"bottom_mlp": slice(0, -1), "top_mlp": slice(None)}

    def __init__(
        self,
        features: Features,
        seed: int = 0,
        *,
        embedding_dim: int = 16,
        bottom_mlp: Sequence[int] = (512, 256, 64, 16),
        top_mlp: Sequence[int] = (512, 256),
        interaction: Literal["dot", "cat", "projection", "cross"] = "dot",
        self_interaction: bool = False,
        projection: Sequence[Sequence[int]] | None = None,
        cross: CrossKind | None = None,
        cross_layers: int | None = None,
        cross_rank: int | None = None,
        cross_experts: int | None = None,
        batch_norm: bool = False,
        wide: bool = False,
        dropout: float = 0.0,
        tables: TableSettings | None = None,
        missing: Missing = "zero",
    ) -> None:
        super().__init__(features.dense, missing)
        _check_bottom(features, bottom_mlp, embedding_dim)
        _check_options(
            interaction,
            {
                "self_interaction": ("dot", self_interaction or None),
                "projection": ("projection", projection),
                "cross": ("cross", cross),
                "cross_layers": ("cross", cross_layers),
                "cross_rank": ("cross", cross_rank),
                "cross_experts": ("cross", cross_experts),
            },
        )
        self.bottom = (
            MLP([features.dense, *bottom_mlp], batch_norm=batch_norm, norm_output=False) if bottom_mlp else None
        )
        self.embeddings = Embeddings(features.tables, embedding_dim, seed, tables)
        if interaction in ("dot", "projection"):
            self.embeddings.require_one_width(f"interaction {interaction}", ", or choose interaction: cat or cross")
        of_bottom = embedding_dim if bottom_mlp else 0
        vectors = bool(bottom_mlp) + len(features.tables)
        joined = of_bottom + sum(self.embeddings.widths)
        self.interaction: DotInteraction | ProjectionInteraction | CrossNetwork | None = None
        if interaction == "dot":
            self.interaction = DotInteraction(vectors, embedding_dim, self_interaction)
            width = of_bottom + self.interaction.pairs.numel()
        elif interaction == "projection":
            assert projection is not None
            self.interaction = ProjectionInteraction(vectors, embedding_dim, projection)
            width = of_bottom + self.interaction.outputs
        else:
            if interaction == "cross":
                assert cross is not None and cross_layers is not None
                self.interaction = make_cross(cross, joined, cross_layers, cross_rank, cross_experts)
            width = joined
        self.top = MLP([width, *top_mlp, 1], linear_output=True, batch_norm=batch_norm, dropout=dropout)
        self.wide = LinearTerms(features, seed, tables) if wide else None
        initialize(self, seed)

    def score(self, dense_BI: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        """See CTRNetwork.score."""
        dense_BI = self.missing(dense_BI)
        bottom_BD = None if self.bottom is None else self.bottom(dense_BI)
        joined_Bn = vectors_Bn = vectors["embeddings"]
        if isinstance(self.interaction, DotInteraction):
            joined_Bn = self.interaction(bottom_BD, vectors_Bn)
        elif bottom_BD is not None:
            joined_Bn = torch.cat([bottom_BD.to(vectors_Bn.dtype), vectors_Bn], dim=1)
        if isinstance(self.interaction, ProjectionInteraction):
            products_Bn = self.interaction(joined_Bn)
            joined_Bn = (
                products_Bn if bottom_BD is None else torch.cat([bottom_BD, products_Bn.to(bottom_BD.dtype)], dim=1)
            )
        elif isinstance(self.interaction, CrossNetwork):
            joined_Bn = self.interaction(joined_Bn)
        logits_B = self.top(joined_Bn).squeeze(1)
        return logits_B if self.wide is None else logits_B + self.wide(dense_BI, vectors["wide"])

    def multiply_adds(self) -> int:
        """See CTRNetwork.multiply_adds."""
        parts = (self.bottom, self.embeddings, self.interaction, self.top, self.wide)
        return sum(part.multiply_adds() for part in parts if part is not None)


def _check_bottom(features: Features, bottom_mlp: Sequence[int], embedding_dim: int) -> None:
    """
    Raises:
        UserError: the vectors have no width, the bottom MLP has no input, or its output is not as wide as the vectors.
    """
    require(embedding_dim >= 1, f"embedding_dim is {embedding_dim}; expected 1 or more")
    if not features.dense:
        require(
            not bottom_mlp,
            "the dataset has no dense features for DLRM's bottom MLP: set bottom_mlp to [], or use another model",
        )
        return
    require(
        bottom_mlp and bottom_mlp[-1] == embedding_dim,
        f"bottom_mlp ends in {bottom_mlp[-1]} but embedding_dim is {embedding_dim}: the bottom MLP's output joins the "
        "tables' vectors, so make them equal"
        if bottom_mlp
        else f"bottom_mlp is [], but this dataset has {counted(features.dense, 'dense column')}: end bottom_mlp in "
        f"{embedding_dim}, the embedding_dim",
    )


def _check_options(interaction: str, options: Mapping[str, tuple[str, Any]]) -> None:
    """Check that the options fit the interaction.

    Args:
        interaction: name of the interaction.
        options: name of an option -> the interaction that it belongs to, and its value; None if it is not given.

    Raises:
        UserError: there is no such interaction, an option belongs to another interaction, or an option is missing.
    """
    needs: dict[str, dict[str, str]] = {
        "dot": {},
        "cat": {},
        "projection": {"projection": "two lists of widths, such as [[512, 64], [512, 64]]"},
        "cross": {"cross": "vector, matrix, low_rank or mixture", "cross_layers": "a number, such as 3"},
    }
    require(interaction in needs, f"interaction {interaction!r} is not one of {', '.join(needs)}")
    for name, (owner, value) in options.items():
        require(value is None or owner == interaction, f"{name} needs interaction: {owner}; got {interaction}")
        if value is None and name in needs[interaction]:
            raise UserError(
                f"interaction: {interaction} needs {name}, which is missing: give {needs[interaction][name]}"
            )


SUFFIXES = {"": "weight", "quotient": "weight_q", "remainder": "weight_r"}
"""Suffix of one of our tables' names -> name of its parameter in facebookresearch/dlrm."""


def reference_state_dict(network: DLRM) -> dict[str, Tensor]:
    """Return our parameters by their names in the ``state_dict`` of facebookresearch/dlrm; tables are views.

    Fixed pooling weights are included; the ``state_dict`` of facebookresearch/dlrm has learned pooling weights only.
    """
    embeddings = network.embeddings
    mixed = embeddings.settings.project
    names: dict[str, Tensor] = {}
    for group in embeddings.groups:
        for member, piece in zip(group.members, group.lookup.pieces, strict=True):
            name = SUFFIXES[member.table.name.removeprefix(embeddings.names[member.column]).removeprefix("/")]
            part = "embs." if mixed and name == "weight" else ""
            names[f"emb_l.{member.column}.{part}{name}"] = piece.of(group.lookup.weight)
    for column, projection in enumerate(embeddings.projections):
        for weight in projection.parameters():
            names[f"emb_l.{column}.proj.weight"] = weight
    if embeddings.pooling_weights is not None:
        for column, piece in enumerate(embeddings.pooling_weights.pieces):
            names[f"v_W_l.{column}"] = piece.of(embeddings.pooling_weights.weight)[:, 0]
    for prefix, mlp in (("bot_l", network.bottom), ("top_l", network.top)):
        for i, linear in enumerate(mlp.linears() if mlp is not None else ()):
            names |= {f"{prefix}.{2 * i}.weight": linear.weight, f"{prefix}.{2 * i}.bias": linear.bias}
    return names
