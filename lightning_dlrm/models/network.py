"""Base of the click-through-rate models: tables, dense layers, one logit for each sample; sizes.

Shape suffixes: B samples, I dense features, F columns.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.own_code import with_place
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.models.fields import DenseVectors, FieldVectors, LinearTerms
from lightning_dlrm.models.layers import MissingValues
from lightning_dlrm.tables.embeddings import Embeddings
from lightning_dlrm.tables.lookup import EmbeddingTables

Missing: TypeAlias = Literal["zero", "learned"]
"""Replacement of missing dense values: see MissingValues."""


class VectorsKeyError(KeyError):
    """A key that the vectors of ``lookup`` do not have."""

    def __str__(self) -> str:
        # That of KeyError has quotes around the whole message.
        return str(self.args[0])


class _Vectors(dict[str, Tensor]):
    """The vectors of ``lookup``; the error of a missing key names the keys that exist."""

    def __missing__(self, key: object) -> NoReturn:
        raise VectorsKeyError(f"no key {key!r}; the keys of vectors are {', '.join(self) or 'none'}")


class CTRNetwork(nn.Module):
    """Base of the models.

    A model defines ``score``. This class defines ``lookup``, which reads the tables of the model's children: those that
    are Embeddings, or whose class defines ``lookup``. ``forward(dense, ids)`` is ``score(dense, lookup(ids))``. Lookups
    run eagerly; ``score`` is compiled or exported. A model may define ``forward`` instead of ``score``, and then
    ``model.compile`` is not available.

    Args:
        dense: I.
        missing: replacement of missing dense values: zero or learned.

    Raises:
        UserError: ``missing`` has another value.
    """

    HIDDEN_WIDTHS: ClassVar[Mapping[str, slice]] = {}
    """Arguments with widths of hidden layers -> the widths that ``params --match`` may scale: no other argument
    depends on them."""

    def __init__(self, dense: int, missing: Missing = "zero") -> None:
        super().__init__()
        require(missing in ("zero", "learned"), f"missing {missing!r} is not one of zero, learned")
        self.missing = MissingValues(dense, learned=missing == "learned")

    def forward(self, dense_BI: Tensor, ids: SparseIds) -> Tensor:
        """Return logits [B].

        Args:
            dense_BI: dense features; NaN if a value is missing.
            ids: ids of every table.
        """
        return self.score(dense_BI, _Vectors(self.lookup(ids)))

    def lookup(self, ids: SparseIds) -> dict[str, Tensor]:
        """Return the tables' vectors of a batch: name of the child that owns the tables -> tensor [B, ...]."""
        vectors: dict[str, Tensor] = {}
        children: Iterable[tuple[str, Any]] = self.named_children()
        for name, child in children:
            if isinstance(child, Embeddings):
                vectors[name] = child(ids)
            elif getattr(type(child), "lookup", None) is not None:
                vectors[name] = child.lookup(ids)
        return vectors

    def score(self, dense_BI: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        """Return logits [B] from dense features and the vectors of ``lookup``; dense arithmetic only.

        Args:
            dense_BI: dense features; NaN if a value is missing.
            vectors: result of ``lookup``.
        """
        raise TypeError(f"{type(self).__name__} defines neither score nor forward")

    @property
    def has_score(self) -> bool:
        """Whether the model defines ``score``."""
        return type(self).score is not CTRNetwork.score

    def prefetch(self, ids: SparseIds) -> None:
        """Start the transfers of a later ``forward`` while an earlier batch is computed."""
        for module in self.modules():
            if isinstance(module, Embeddings):
                module.prefetch(ids)

    def multiply_adds(self) -> int:
        """Return the multiply-adds of one sample's forward pass.

        Matrix products, kept pairs and cross layers count; biases, activations and lookups do not.
        """
        raise TypeError(f"{type(self).__name__} does not define multiply_adds")

    def lookups(self) -> list[EmbeddingTables]:
        """Return every module that holds table rows, in the order of ``modules``."""
        return [module for module in self.modules() if isinstance(module, EmbeddingTables)]

    def wide_lookups(self) -> list[EmbeddingTables]:
        """Return the modules of ``lookups`` that hold the weights of linear terms."""
        return [module.tables for module in self.modules() if isinstance(module, LinearTerms)]

    def field_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of single fields: table rows, and the vectors and linear weights of dense features."""
        found: list[nn.Parameter] = []
        for module in self.modules():
            if isinstance(module, (EmbeddingTables, DenseVectors, LinearTerms)):
                found.append(module.weight)
            elif isinstance(module, FieldVectors):
                found.append(module.dense)
        return found

    def dense_parameters(self) -> list[nn.Parameter]:
        """Return every parameter outside the tables."""
        tables = {lookup.weight for lookup in self.lookups()}
        return [parameter for parameter in self.parameters() if parameter not in tables]


def fault_of_logits(found: object, samples: int) -> str | None:
    """Return the fault of a network's result, found without reading its values; None if it is a logit for each sample.

    Args:
        found: what ``score`` or ``forward`` returned.
        samples: samples of the batch.
    """
    if not isinstance(found, Tensor):
        returned = "None" if found is None else f"a {type(found).__name__}"
    elif found.shape != (samples,):
        returned = f"shape {tuple(found.shape)}"
    elif not found.is_floating_point():
        returned = f"dtype {found.dtype}"
    else:
        return None
    return f"returns {returned}; expected one logit for each sample, ({samples},)"


_SAME_VALUES = ("Squeeze", "Unsqueeze", "View", "UnsafeView", "ReshapeAlias", "Select", "Slice", "ToCopy", "Clone")
"""Operations of torch that leave values as they are, as the names of their gradients begin."""

PROBABILITIES = "returns probabilities; expected logits, as the loss takes the sigmoid: leave out its own sigmoid"


def returns_probabilities(logits_B: Tensor) -> bool:
    """Return whether a sigmoid or a softmax made logits, found without reading their values; False if they have no
    gradient, or if they come from a compiled network."""
    node = logits_B.grad_fn
    while node is not None and type(node).__name__.startswith(_SAME_VALUES):
        node = node.next_functions[0][0]
    return type(node).__name__.startswith(("Sigmoid", "Softmax"))


def require_logits(network: CTRNetwork, found: object, samples: int) -> None:
    """Refuse the result of a network that is not a logit for each sample; its values are not read.

    Raises:
        UserError: it has another type or shape; the message names the method and its file.
    """
    fault = fault_of_logits(found, samples)
    if fault is not None:
        raise UserError(f"{place_of(network)} {fault}")


def place_of(network: CTRNetwork) -> str:
    """Return the method that computes a network's logits, with its file and line if it is the user's own."""
    made = type(network)
    return with_place(getattr(made, "score" if made.forward is CTRNetwork.forward else "forward"))


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Parameters and operations of a model; a multiply-add counts as two operations."""

    tables: int
    """Parameters in the embedding tables, of all ranks together."""
    dense: int
    """All other parameters."""
    flops_per_sample_forward: int
    """0 if unknown."""

    @property
    def total(self) -> int:
        return self.tables + self.dense

    @property
    def flops_per_sample_training(self) -> int:
        """Operations of both passes; the backward pass takes two products for each product of the forward pass."""
        return 3 * self.flops_per_sample_forward


def model_size(network: CTRNetwork, features: Features | None = None) -> ModelSize:
    """Count parameters and operations of a network, which may be on the meta device.

    Args:
        network: the network.
        features: features of its dataset, needed if the network does not define ``multiply_adds``.
    """
    tables = {table.name: table.rows * lookup.width for lookup in network.lookups() for table in lookup.tables}
    dense = sum(parameter.numel() for parameter in network.dense_parameters())
    if type(network).multiply_adds is not CTRNetwork.multiply_adds:
        flops = 2 * network.multiply_adds()
    else:
        flops = 0 if features is None else _counted_flops(network, features)
    return ModelSize(tables=sum(tables.values()), dense=dense, flops_per_sample_forward=flops)


def _counted_flops(network: CTRNetwork, features: Features) -> int:
    """Return torch's count of operations of a forward pass of one sample; 0 if the pass fails."""
    # Its import takes a third of a second, and most networks count their operations themselves.
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device(next((p.device for p in network.parameters()), "cpu")), torch.no_grad():
        dense_BI = torch.zeros(1, features.dense)
        ids = SparseIds(values=torch.zeros(1, len(features.tables), dtype=torch.int32), tables=len(features.tables))
        try:
            with FlopCounterMode(display=False) as counter:
                network(dense_BI, ids)
        except Exception:
            # A custom forward pass may not support the meta device, which training does not need.
            return 0
    return counter.get_total_flops()
