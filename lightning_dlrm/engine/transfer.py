"""Copies of batches to a GPU that overlap with training."""

import torch
from torch import Tensor

from lightning_dlrm.contracts.batch import Batch


class SideStream:
    """A CUDA stream that copies batches to a device while earlier steps compute.

    Args:
        device: the CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def send(self, batch: Batch) -> Batch:
        """Return the batch on the device. Later work on the current stream waits for the copy; the host does not."""
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            moved = batch.to(self._device, non_blocking=True)
        current.wait_stream(self._stream)

        def keep(tensor: Tensor | None) -> Tensor | None:
            if tensor is not None:
                # Otherwise the allocator could give its memory to the next copy while a step still reads it.
                tensor.record_stream(current)
            return tensor

        return moved.map(keep)
