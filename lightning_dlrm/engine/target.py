"""Fits that end before their length: at a target score, as MLPerf trains and times them, or by EarlyStopping."""

import logging
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.callbacks.early_stopping import EarlyStoppingReason

from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.engine.checkpointing import MONITOR
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.engine.recorder import Recorder
from lightning_dlrm.tracking import names

log = logging.getLogger("lightning_dlrm")


class StopAtAUC(pl.Callback):
    """Ends a fit after the first validation that reaches a target AUC.

    The summary gets ``time_to_target_s`` and ``samples_to_target``; null where the target was not
    reached. The time is that of the fit, with its validations and checkpoints, summed over resumes.

    Args:
        target: AUC.
        recorder: counts the samples and writes the summary; must come later in the list of callbacks.
    """

    def __init__(self, target: float, recorder: Recorder) -> None:
        if not 0.5 < target <= 1:
            raise UserError(f"stop_at_auc is {target}; expected a number above 0.5, at most 1")
        self.target = target
        self.recorder = recorder
        self._seconds_before = 0.0
        self._start: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before = state_dict["seconds"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.perf_counter()
        for name in (names.TIME_TO_TARGET, names.SAMPLES_TO_TARGET):
            self.recorder.latest.setdefault(name, float("nan"))
        if self.recorder.latest.get(MONITOR, 0.0) >= self.target:
            # A run that has reached it is resumed.
            trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        assert isinstance(pl_module, CTRModule)
        auc = pl_module.results[MONITOR]
        if not auc >= self.target:
            return
        seconds = self._seconds()
        self.recorder.latest |= {names.TIME_TO_TARGET: seconds, names.SAMPLES_TO_TARGET: self.recorder.samples}
        log.info(
            "stop_at_auc: validation AUC %.5f reaches %g after %.1f s and %s samples",
            *(auc, self.target, seconds, f"{self.recorder.samples:,}"),
        )
        trainer.should_stop = True

    def _seconds(self) -> float:
        return self._seconds_before + (0.0 if self._start is None else time.perf_counter() - self._start)


class StayStopped(pl.Callback):
    """A fit that EarlyStopping has ended trains no further when it is resumed.

    Args:
        stopping: must come before what saves checkpoints in the list of callbacks, and be made with
            ``check_on_train_epoch_end=False``: the checkpoint of a validation holds the verdict on it.
    """

    def __init__(self, stopping: EarlyStopping) -> None:
        self.stopping = stopping

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.stopping.stopping_reason is not EarlyStoppingReason.NOT_STOPPED:
            log.info("EarlyStopping has ended this fit: to train on, take it out of trainer.callbacks")
            trainer.should_stop = True
