"""Tables that FBGEMM's table-batched embedding looks up and updates, in the same memory.

FBGEMM updates rows within its backward pass. The contract wants a gradient first and the update later, at that step's
learning rate; so its backward pass is run by the update, after one more lookup.

Shape suffixes: B samples, F tables, D width, N indices of all bags.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.tables.fused_tables import UnsummedGradient
from lightning_dlrm.tables.tables import EmbeddingTables, rows_elsewhere

_OPTIMISERS = {"SGD": "EXACT_SGD", "Adagrad": "EXACT_ADAGRAD", "RowWiseAdagrad": "EXACT_ROWWISE_ADAGRAD"}
"""Our rules that FBGEMM has too, with the same formulas."""


class FBGEMMTables(EmbeddingTables):
    """Takes over a lookup's tables, its weight included.

    Args:
        whole: what it stands for; on the device where it is used.
        rule: the update rule's name.
        settings: the rule's.

    Raises:
        UserError: FBGEMM is not installed, or has no such tables or rule.
    """

    def __init__(self, whole: EmbeddingTables, rule: str, settings: Mapping[str, float]) -> None:
        with rows_elsewhere():
            super().__init__(whole.tables, whole.width, whole.seed, whole.weight.requires_grad)
        self._refuse(rule, settings)
        self.weight, self.pieces = whole.weight, whole.pieces
        self.row_offsets = whole.row_offsets
        # In a tuple: its parameters are our weight and state once more, and no weights of the network.
        self._held = (_table_batched(whole, _OPTIMISERS[rule], settings),)

    def _refuse(self, rule: str, settings: Mapping[str, float]) -> None:
        mistake = None
        if importlib.util.find_spec("fbgemm_gpu") is None:
            mistake = "FBGEMM is not installed (pip install 'lightning-dlrm[fbgemm]')"
        elif rule not in _OPTIMISERS:
            mistake = f"it has no rule {rule} for tables; choose one of {', '.join(_OPTIMISERS)}"
        elif settings["l2"] or settings["weight_decay"]:
            mistake = "its rules know neither l2 nor weight_decay; set both to 0 for the tables"
        elif self.width % 4:
            mistake = f"its tables' widths are multiples of 4, and one here is {self.width}"
        if mistake is not None:
            raise UserError(f"kernels is fbgemm, but {mistake}, or set kernels to auto")

    def forward(self, ids: SparseIds) -> Tensor:
        """See EmbeddingLookup.forward."""
        vectors = _Lookup.apply(self.weight, ids.weights, ids, self)
        return vectors.view(len(ids), ids.tables, self.width)

    @property
    def _batched(self) -> Any:
        return self._held[0]

    def batched(self, ids: SparseIds) -> Tensor:
        """[B, F * D], from FBGEMM; its backward pass updates the rows."""
        if not len(ids):
            return self.weight.new_zeros(0, ids.tables * self.width)
        values, offsets, weights = _table_major(ids)
        vectors: Tensor = self._batched(values, offsets, weights)
        return vectors

    def fused_update(self, ids: SparseIds, grad_BD: Tensor, state: Mapping[str, Tensor], rate: float) -> None:
        """Moves the looked-up rows and their state, which FBGEMM then keeps in our memory."""
        if not len(ids):
            return
        place = "dev" if self.weight.is_cuda else "host"
        for values in state.values():  # one at most
            getattr(self._batched, f"momentum1_{place}").data = values.view(-1)
        self._batched.set_learning_rate(rate)
        with torch.enable_grad():
            vectors = self.batched(ids)
            vectors.backward(grad_BD.view(vectors.shape).to(vectors.dtype))


class FBGEMMGradient(UnsummedGradient):
    """A gradient that FBGEMM sums while it updates."""

    def move(self, state: Mapping[str, Tensor], rate: float) -> None:
        owner, ids = self.__dict__["source"]
        owner.fused_update(ids, self.lookups[1], state, rate)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_RD: Tensor, weights_N: Tensor | None, ids: SparseIds, owner: FBGEMMTables) -> Tensor:
        ctx.owner, ctx.ids = owner, ids
        ctx.save_for_backward(weights_N)
        return owner.batched(ids).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None]:
        # Factors are constants: learned ones are tables of width 1, which FBGEMM has not.
        (weights_N,) = ctx.saved_tensors
        owner, ids = ctx.owner, ctx.ids
        grad_BD = grads[0].contiguous().view(-1, owner.width)
        bag_N = ids.bag_of_each()
        rows_N = ids.values.flatten() + owner.row_offsets[bag_N % max(ids.tables, 1)]
        flat_N = None if weights_N is None else weights_N.flatten()
        if ctx.needs_input_grad[0]:
            gradient = FBGEMMGradient(rows_N, len(owner.weight), grad_BD, bag_N, flat_N)
            gradient.__dict__["source"] = owner, ids
            owner.add_gradient(gradient)
        return None, None, None, None


def use_fbgemm(network: nn.Module, rule: str, settings: Mapping[str, float]) -> None:
    """Puts FBGEMM's tables in the place of a network's own.

    Raises:
        UserError: FBGEMM is not installed, or has no such tables or rule.
    """
    for owner in list(network.modules()):
        for name, child in list(owner.named_children()):
            if type(child) is EmbeddingTables:
                setattr(owner, name, FBGEMMTables(child, rule, settings))


def _table_batched(whole: EmbeddingTables, optimiser: str, settings: Mapping[str, float]) -> Any:
    """FBGEMM's module over the weight of ``whole``."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    cuda = whole.weight.is_cuda
    where = EmbeddingLocation.DEVICE if cuda else EmbeddingLocation.HOST
    on = ComputeDevice.CUDA if cuda else ComputeDevice.CPU
    batched = SplitTableBatchedEmbeddingBagsCodegen(
        [(piece.stop - piece.start, whole.width, where, on) for piece in whole.pieces],
        optimizer=getattr(EmbOptimType, optimiser),
        eps=settings.get("epsilon", 0.0),
        device=whole.weight.device,
    )
    held = batched.weights_dev if cuda else batched.weights_host
    assert held.numel() == whole.weight.numel()
    held.data = whole.weight.data.view(-1)
    return batched


def _table_major(ids: SparseIds) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids, where each bag begins, and factors, table by table, as FBGEMM reads them."""
    if ids.offsets is None:
        values = ids.values.T.flatten().long()
        weights = None if ids.weights is None else ids.weights.T.flatten()
        return values, torch.arange(len(values) + 1, device=values.device), weights
    starts_b = ids.offsets[:-1].view(-1, ids.tables).T.flatten()
    lengths_b = ids.lengths().T.flatten()
    ends_b = torch.cumsum(lengths_b, 0)
    moved_N = torch.repeat_interleave(starts_b - (ends_b - lengths_b), lengths_b)
    source_N = moved_N + torch.arange(len(moved_N), device=moved_N.device)
    weights = None if ids.weights is None else ids.weights[source_N]
    return ids.values[source_N].long(), torch.cat([ends_b.new_zeros(1), ends_b]), weights
