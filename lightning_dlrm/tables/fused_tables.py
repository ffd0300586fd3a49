"""Tables whose rows are looked up and updated by the fused kernels: what holds them to the contracts.

Shape suffixes: B bags (output vectors), F tables, D width, R rows of all tables, N indices of all bags.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.lookup import EmbeddingLookup, RowGradient


class UnsummedGradient(RowGradient):
    """A RowGradient that is summed by row only where somebody asks for ``rows`` or ``values``.

    The fused update sums while it updates, without learning on the host how many rows there are.

    Args:
        rows_N: the row of each index, in any order; R for one that counts for nothing.
        table_rows: R.
        grad_BD: gradient of each output vector.
        bag_N: the output vector that each index went into; None when index i went into vector i.
        weights_N: the factor of each index; None means 1.
    """

    def __init__(
        self, rows_N: Tensor, table_rows: int, grad_BD: Tensor, bag_N: Tensor | None, weights_N: Tensor | None
    ) -> None:
        # The base is frozen.
        self.__dict__.update(lookups=(rows_N, grad_BD, bag_N, weights_N), table_rows=table_rows)

    lookups: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    """The arguments ``rows_N``, ``grad_BD``, ``bag_N`` and ``weights_N``."""
    table_rows: int

    def anew(self) -> "UnsummedGradient":
        """The same, to be summed once more: its tensors hold the gradient of another step by now."""
        rows_N, grad_BD, bag_N, weights_N = self.lookups
        return UnsummedGradient(rows_N, self.table_rows, grad_BD, bag_N, weights_N)

    @cached_property
    def _summed(self) -> RowGradient:
        rows_N, grad_BD, bag_N, weights_N = self.lookups
        counts_N = rows_N < self.table_rows
        bag_N, weights_N = (None if x is None else x[counts_N] for x in (bag_N, weights_N))
        return RowGradient.from_lookups(rows_N[counts_N], grad_BD, bag_N, weights_N)

    @property
    def rows(self) -> Tensor:
        return self._summed.rows

    @property
    def values(self) -> Tensor:
        return self._summed.values


class FusedLookup(torch.autograd.Function):
    """Looks up in one kernel; hands the gradient to ``owner`` unsummed."""

    @staticmethod
    def forward(
        ctx: Any,
        weight_RD: Tensor,
        weights_N: Tensor | None,
        ids: SparseIds,
        row_offsets_F: Tensor,
        owner: EmbeddingLookup,
    ) -> Tensor:
        """[B, D]."""
        from lightning_dlrm.kernels import fused

        ctx.owner, ctx.ids = owner, ids
        ctx.save_for_backward(weight_RD, weights_N, row_offsets_F)
        return fused.lookup(weight_RD, ids.values.flatten(), row_offsets_F, ids.offsets, weights_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, None, None, None]:
        weight_RD, weights_N, row_offsets_F = ctx.saved_tensors
        ids, grad_BD = ctx.ids, grads[0].contiguous()
        rows = weight_RD.shape[0]
        places_N = torch.arange(ids.values.numel(), device=grad_BD.device)
        bag_N, tables = None, max(ids.tables, 1)
        if ids.offsets is None:
            rows_N = ids.values.flatten() + row_offsets_F[places_N % tables]
        else:
            # Indices after the last bag get a bag that is none.
            bag_N = torch.searchsorted(ids.offsets, places_N, right=True) - 1
            inside_N = bag_N < len(grad_BD)
            rows_N = torch.where(inside_N, ids.values + row_offsets_F[bag_N % tables], rows)
            bag_N = torch.where(inside_N, bag_N, 0) if len(grad_BD) else bag_N
        if ctx.needs_input_grad[0]:
            ctx.owner.add_gradient(UnsummedGradient(rows_N, rows, grad_BD, bag_N, weights_N))
        grad_weights_N = None
        if ctx.needs_input_grad[1]:
            # The row past the last one is none: any will do, as its gradient is.
            vectors_ND = weight_RD.index_select(0, rows_N.clamp(max=rows - 1))
            grad_ND = grad_BD if bag_N is None else grad_BD.index_select(0, bag_N)
            grad_weights_N = (vectors_ND * grad_ND).sum(1).to(weights_N.dtype)
            if bag_N is not None:
                grad_weights_N = grad_weights_N * (rows_N < rows)
        return None, grad_weights_N, None, None, None


def fused_update(
    weight_RD: Tensor,
    gradient: UnsummedGradient,
    state: Mapping[str, Tensor],
    rule: str,
    settings: Mapping[str, float],
    learning_rate: Tensor,
    step: Tensor,
) -> None:
    """Moves the touched rows and their state by a rule's kernel; see ``UpdateRule.apply``."""
    from lightning_dlrm.kernels import fused

    one = torch.ones_like(learning_rate)
    scalars = torch.stack(
        [
            learning_rate,
            one - learning_rate * settings["weight_decay"],
            one - settings.get("beta1", 0.0) ** step,
            one - settings.get("beta2", 0.0) ** step,
        ]
    )
    names = ("l2", "epsilon", "beta1", "beta2")
    formula = fused.Formula(rule, **{name: settings[name] for name in names if name in settings})
    fused.update(
        weight_RD,
        *gradient.lookups,
        state,
        formula,
        scalars.float().to(weight_RD.device, non_blocking=True),
    )
