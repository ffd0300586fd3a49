"""Times of the parts of training steps."""

import time
from typing import Any

import pytorch_lightning as pl
import torch

from lightning_dlrm.tracking import names


class StepTimer(pl.Callback):
    """Callback that measures the forward pass, the backward pass and the update of every training step.

    On a CUDA device these are times of the host, which launches work and does not wait for it.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((names.FORWARD_SHARE, names.BACKWARD_SHARE, names.UPDATE_SHARE), 0.0)
        """Seconds of each part, summed over all training steps so far."""
        self._began = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def after_update(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            self._count(names.UPDATE_SHARE)

        # Lightning has no hook right after the update; torch's optimizers do.
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(after_update)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._began = time.perf_counter()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        self._count(names.FORWARD_SHARE)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._count(names.BACKWARD_SHARE)

    def _count(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] += now - self._began
        self._began = now
