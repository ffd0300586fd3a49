"""Penalties of the size of parameters, added to the loss of every step."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from lightning_dlrm.contracts.errors import require


@dataclass(frozen=True, kw_only=True)
class Regularization:
    """A penalty ``l1 sum |w| + l2 / 2 sum w^2`` over all elements of parameters, as in FuxiCTR.

    It is not divided by the batch size, and not part of the logged loss. Its gradient is part of clipping.

    Args:
        fields_l1: l1 of parameters of single fields: whole tables, and vectors and linear weights of dense features.
        fields_l2: l2 of the same parameters. Both need tables.dense_gradients; the l2 of an update rule applies only to
            the rows of a step.
        network_l1: l1 of all other parameters, biases and normalizations included.
        network_l2: l2 of the same parameters.
    """

    fields_l1: float = 0.0
    fields_l2: float = 0.0
    network_l1: float = 0.0
    network_l2: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            require(0 <= value < math.inf, f"regularization.{name} is {value}; expected a number of 0 or more")

    @property
    def covers_fields(self) -> bool:
        """Whether parameters of fields are penalized."""
        return bool(self.fields_l1 or self.fields_l2)

    def penalty(self, fields: Iterable[Tensor], network: Iterable[Tensor]) -> Tensor | float:
        """Return the penalty, a 0-dim tensor; 0 if nothing is penalized.

        Args:
            fields: parameters of single fields.
            network: all other parameters.
        """
        groups = ((fields, self.fields_l1, self.fields_l2), (network, self.network_l1, self.network_l2))
        return sum(_penalty(w, l1, l2) for weights, l1, l2 in groups if l1 or l2 for w in weights if w.requires_grad)


def _penalty(weight: Tensor, l1: float, l2: float) -> Tensor:
    # In bfloat16 a sum of many elements would stop growing.
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    found = exact.new_zeros(())
    if l1:
        found = found + l1 * exact.abs().sum()
    return found + l2 / 2 * exact.square().sum() if l2 else found
