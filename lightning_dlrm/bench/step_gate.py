"""The callback by which ``bench`` requests steps of a fit."""

from typing import Any

import pytorch_lightning as pl

from lightning_dlrm.bench.gate import Gate
from lightning_dlrm.bench.measurement import finisher


class StepGate(pl.Callback):
    """Callback that lets a fit wait after the steps that the benchmark has requested, until it requests more."""

    def __init__(self) -> None:
        self._gate: Gate | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if self._gate is None:
            self._gate = Gate(finisher(trainer.strategy.root_device))
        if not self._gate.passed():
            trainer.should_stop = True
