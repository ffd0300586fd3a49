"""What every click-through-rate model here is: tables, dense layers, one logit a sample."""

from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar, Literal, TypeAlias

from torch import Tensor, nn

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.lookup import EmbeddingLookup
from lightning_dlrm.models.layers import MissingValues
from lightning_dlrm.models.linear import LinearTerms
from lightning_dlrm.tables.embeddings import Embeddings

Missing: TypeAlias = Literal["zero", "learned"]
"""What stands for a missing dense value: see MissingValues."""


class CTRNetwork(nn.Module):
    """Base of the models. Shapes: B samples, I dense features.

    Args:
        dense: I.
        missing: what stands for a missing dense value.
    """

    HIDDEN_WIDTHS: ClassVar[Mapping[str, slice]] = {}
    """The arguments that are widths of hidden layers, and which of each list's widths may be changed
    without changing anything else: what ``params --match`` scales."""

    def __init__(self, dense: int, missing: Missing) -> None:
        super().__init__()
        if missing not in ("zero", "learned"):
            raise UserError(f"missing {missing!r} is neither zero nor learned")
        self.missing = MissingValues(dense, learned=missing == "learned")

    def forward(self, dense_BI: Tensor, ids: SparseIds) -> Tensor:
        """Logits [B]; a probability exists only outside the loss.

        Args:
            dense_BI: NaN where a value is missing.
            ids: of every table.
        """
        # What vectors wait for is under way while dense layers compute.
        for embeddings in self._embeddings:
            embeddings.start(ids)
        return self.logits(self.missing(dense_BI), ids)

    def announce(self, ids: SparseIds) -> None:
        """Hears of the ids of a later ``forward``, while an earlier batch is under way; it comes with ``ids.ahead``."""
        for embeddings in self._embeddings:
            embeddings.announce(ids)

    @cached_property
    def _embeddings(self) -> list[Embeddings]:
        # Asked at every step; a network keeps them, whatever becomes of the lookups inside.
        return [module for module in self.modules() if isinstance(module, Embeddings)]

    def logits(self, dense_BI: Tensor, ids: SparseIds) -> Tensor:
        """The model proper: as ``forward``, without missing values."""
        raise TypeError(f"{type(self).__name__} does not define logits")

    def multiply_adds(self) -> int:
        """Multiply-adds of one sample's forward pass.

        Matrix products, kept pairs and cross layers count; biases, activations and lookups do not.
        """
        raise TypeError(f"{type(self).__name__} does not define multiply_adds")

    def lookups(self) -> list[EmbeddingLookup]:
        """All that hold table rows, in the order in which the model was put together."""
        return [module for module in self.modules() if isinstance(module, EmbeddingLookup)]

    def wide_lookups(self) -> list[EmbeddingLookup]:
        """Those of them that hold linear terms' weights."""
        return [module.lookup for module in self.modules() if isinstance(module, LinearTerms)]

    def dense_parameters(self) -> list[nn.Parameter]:
        """All other weights."""
        tables = {lookup.weight for lookup in self.lookups()}
        return [parameter for parameter in self.parameters() if parameter not in tables]
