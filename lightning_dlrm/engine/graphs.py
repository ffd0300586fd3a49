"""For GPUs: a training step as two CUDA graphs, and copies of batches that overlap with training.

A step launches some hundred kernels, each of a few microseconds; a graph launches all of them at once.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from lightning_dlrm.contracts.batch import Batch
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.kernels.choice import choose
from lightning_dlrm.models.network import CTRNetwork
from lightning_dlrm.optim.optimizer import CTROptimizer
from lightning_dlrm.tables.fused_tables import UnsummedGradient
from lightning_dlrm.tables.tables import EmbeddingTables

log = logging.getLogger("lightning_dlrm")

Replay = Callable[[], object]
Recorder = Callable[[Callable[[], None]], Replay]
"""Takes work that reads and writes tensors at fixed places; gives what does it again."""

EAGER_STEPS = 3
"""First steps of a fit that are made without graphs: kernels are compiled and libraries loaded meanwhile."""

_SPARE = 1.1
"""Room for the ids of bags, over what the first batch needs: later batches hold more or fewer."""


class GraphedStep:
    """Records a step when it is first asked for one, and replays it from then on.

    One graph holds forward, loss and backward, another the update, so that what Lightning does between the two stays
    where it is. Both read a batch from fixed places: batches are copied there. Bags are padded to a fixed number of
    ids, which the fused kernels pass over; a batch that needs more is recorded anew. A batch of another size, such as
    the last one of an epoch, is not taken: its step is made eagerly, on the same gradients and weights.

    Args:
        network: whose tables use the fused kernels.
        loss: of logits [B] and labels [B]: the scalar to minimise.
        optimizer: of the network.
        autocast: context of the forward pass; without a cache of casts, which would outlive its memory.
        record: makes the graphs.

    Raises:
        UserError: the tables do not use the fused kernels.
    """

    def __init__(
        self,
        network: CTRNetwork,
        loss: Callable[[Tensor, Batch], Tensor],
        optimizer: CTROptimizer,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        record: Recorder | None = None,
    ) -> None:
        for lookup in network.lookups():
            fused = type(lookup) is EmbeddingTables and (
                choose(lookup.kernels, lookup.weight.device.type, lookup.weight.dtype) == "triton"
            )
            if not fused:
                raise UserError(
                    f"cuda_graphs needs tables on the GPU with the fused kernels; these are {type(lookup).__name__} "
                    f"on {lookup.weight.device.type} with kernels {getattr(lookup, 'kernels', 'of their own')}: "
                    "set cuda_graphs to false"
                )
        self._network, self._loss, self._optimizer, self._autocast = network, loss, optimizer, autocast
        self._record = record or record_cuda_graph
        self._batch: Batch | None = None
        self._steps = 0
        self._forward: Replay
        self._update: Replay | None = None
        self._gradients: list[UnsummedGradient | None] = []
        self._rates: dict[str, tuple[Tensor, Tensor]] = {}
        self._out: tuple[Tensor, Tensor]

    def takes(self, batch: Batch) -> bool:
        """Whether a batch's step is replayed; counts it if it is one of the first, which are not."""
        if self._steps < EAGER_STEPS:
            self._steps += 1
            return False
        return self._batch is None or (
            len(batch) == len(self._batch)
            and batch.global_size == self._batch.global_size
            and (batch.ids.weights is None) == (self._batch.ids.weights is None)
        )

    def forward_backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss, 0-dim, and the logits [B], both detached; gradients are then in their fixed places."""
        if self._batch is None or batch.ids.values.numel() > self._batch.ids.values.numel():
            self._begin(batch)
        else:
            self._fill(batch)
        self._forward()
        for lookup, gradient in zip(self._optimizer.lookups, self._gradients, strict=True):
            if gradient is not None:
                lookup.replace_gradient(gradient.anew())
        loss, logits_B = self._out
        # The next replay writes over them, and metrics look at them later.
        return loss.clone(), logits_B.clone()

    def update(self) -> None:
        """Moves the weights, as ``CTROptimizer.update_weights`` does."""
        for group in self._optimizer.param_groups:
            for place, now in zip(self._rates[group["name"]], (group["lr"], group["steps"]), strict=True):
                # A number from the host: nothing waits for the device.
                place.fill_(float(now))
        if self._update is None:
            self._update = self._recorded(lambda: self._optimizer.update_weights(self._rates))
        self._update()

    def _begin(self, batch: Batch) -> None:
        """Takes memory for batches as large as this one, and records forward and backward."""
        if self._batch is not None:
            log.info("a batch has %d ids, more than there is room for: the step is recorded anew", _count(batch))
        ids = batch.ids
        spare = 0 if ids.offsets is None else int(_count(batch) * (_SPARE - 1)) + 1

        def place(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.clone()

        def padded(tensor: Tensor) -> Tensor:
            return torch.cat([tensor, tensor.new_zeros(spare)]) if spare else tensor.clone()

        weights = None if ids.weights is None else padded(ids.weights)
        placed = replace(ids.map(place), values=padded(ids.values), weights=weights)
        self._batch = replace(batch.map(place), ids=placed)
        device = batch.dense.device
        self._rates = {
            group["name"]: (
                torch.zeros((), dtype=torch.float64, device=device),
                torch.zeros((), dtype=torch.float64, device=device),
            )
            for group in self._optimizer.param_groups
        }
        self._update = None
        self._forward = self._recorded(self._make)

    def _fill(self, batch: Batch) -> None:
        assert self._batch is not None
        here, there = self._batch, batch
        for place, tensor in (
            (here.label, there.label),
            (here.dense, there.dense),
            (here.ids.values, there.ids.values),
            (here.ids.offsets, there.ids.offsets),
            (here.ids.weights, there.ids.weights),
        ):
            if place is not None and tensor is not None:
                place[: len(tensor)].copy_(tensor, non_blocking=True)

    def _make(self) -> None:
        """Forward, loss and backward of the batch at its fixed place, with gradients that begin anew."""
        assert self._batch is not None
        self._optimizer.zero_grad()
        with self._autocast():
            logits_B = self._network(self._batch.dense, self._batch.ids)
            loss = self._loss(logits_B, self._batch)
        loss.backward()
        gradients = [lookup.gradient() for lookup in self._optimizer.lookups]
        assert all(gradient is None or isinstance(gradient, UnsummedGradient) for gradient in gradients)
        self._gradients = cast(list[UnsummedGradient | None], gradients)
        self._out = loss.detach(), logits_B.detach()

    def _recorded(self, work: Callable[[], None]) -> Replay:
        try:
            return self._record(work)
        except RuntimeError as error:
            raise UserError(
                f"the training step cannot be recorded as a CUDA graph ({' '.join(str(error).split())[:200]}): "
                "set cuda_graphs to false"
            ) from error


def record_cuda_graph(work: Callable[[], None]) -> Replay:
    """A CUDA graph of the kernels that ``work`` launches; they do not run until it is replayed."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


class SideStream:
    """Copies batches to a GPU in a stream of their own, while earlier steps still compute."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def send(self, batch: Batch) -> Batch:
        """The batch on the device; what is launched from now on waits for it there, and nothing does here."""
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            moved = batch.to(self._device, non_blocking=True)
        current.wait_stream(self._stream)

        def keep(tensor: Tensor | None) -> Tensor | None:
            if tensor is not None:
                # Or its memory would be given to the next copy while a step still reads it.
                tensor.record_stream(current)
            return tensor

        return moved.map(keep)


def _count(batch: Batch) -> int:
    return batch.ids.values.numel()
