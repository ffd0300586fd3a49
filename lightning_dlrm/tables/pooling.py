"""From the distinct rows of a batch, at hand once each, to a vector for every bag.

Shape suffixes: B bags, D width, N indices of all bags, U distinct rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.lookup import EmbeddingLookup, SortedLookups


class PoolingLookup(EmbeddingLookup):
    """A lookup that has a batch's distinct rows at hand before it makes vectors of them."""

    def forward(self, ids: SparseIds) -> Tensor:
        """See EmbeddingLookup.forward."""
        bag_N = None if ids.offsets is None else ids.bag_of_each()
        weights_N = None if ids.weights is None else ids.weights.reshape(-1)
        return self._pool(ids, ids.offsets, bag_N, weights_N).view(len(ids), ids.tables, self.width)

    def each(self, ids: SparseIds) -> Tensor:
        """See EmbeddingLookup.each."""
        return self._pool(ids, None, None, None)

    def _pool(self, ids: SparseIds, offsets: Tensor | None, bag_N: Tensor | None, weights_N: Tensor | None) -> Tensor:
        """[bags, D]: as ``pool_rows``, whose arguments these are."""
        raise TypeError(f"{type(self).__name__} does not define _pool")


def pool_rows(
    anchor: Tensor,
    rows_UD: Tensor,
    lookups: SortedLookups,
    offsets: Tensor | None,
    bag_N: Tensor | None,
    weights_N: Tensor | None,
    on_gradient: Callable[[Tensor], None],
) -> Tensor:
    """[B, D]: the (weighted) sum of each bag's rows. Differentiable in ``weights_N``.

    Args:
        anchor: [0]; the rows' gradient is wanted where it requires one. What made it hears, in the backward
            pass, after ``on_gradient`` and everything that was done since.
        rows_UD: the vectors of ``lookups.rows``.
        lookups: which indices look up which row.
        offsets: where each bag starts, and the last one ends; None where each index is a bag.
        bag_N: the bag of each index; None where each index is one.
        weights_N: factors; None means 1.
        on_gradient: gets the summed gradient [U, D] of each row, float32 at least.
    """
    pooled: Tensor = _PoolRows.apply(anchor, rows_UD, lookups, offsets, bag_N, weights_N, on_gradient)
    return pooled


class _PoolRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        rows_UD: Tensor,
        lookups: SortedLookups,
        offsets: Tensor | None,
        bag_N: Tensor | None,
        weights_N: Tensor | None,
        on_gradient: Callable[[Tensor], None],
    ) -> Tensor:
        ctx.lookups, ctx.on_gradient = lookups, on_gradient
        positions_N = lookups.positions()
        # The rows are needed once more in the backward pass where the factors are learned.
        again = (rows_UD, positions_N) if ctx.needs_input_grad[5] else (None, None)
        ctx.save_for_backward(anchor, bag_N, weights_N, *again)
        if weights_N is not None:
            weights_N = weights_N.to(rows_UD.dtype)
        if offsets is None:
            vectors = rows_UD.index_select(0, positions_N)
            return vectors if weights_N is None else vectors * weights_N[:, None]
        return functional.embedding_bag(
            positions_N, rows_UD, offsets, mode="sum", per_sample_weights=weights_N, include_last_offset=True
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None, Tensor | None, None]:
        anchor, bag_N, weights_N, rows_UD, positions_N = ctx.saved_tensors
        grad_BD = grads[0].contiguous()
        if ctx.needs_input_grad[0]:
            ctx.on_gradient(ctx.lookups.sum_gradients(grad_BD, bag_N, weights_N))
        grad_weights_N = None
        if rows_UD is not None:
            grad_ND = grad_BD if bag_N is None else grad_BD.index_select(0, bag_N)
            grad_weights_N = (rows_UD.index_select(0, positions_N) * grad_ND).sum(1).to(weights_N.dtype)
        return torch.zeros_like(anchor), None, None, None, None, grad_weights_N, None
