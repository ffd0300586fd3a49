"""Callbacks that end a fit: with a validation, at a target score, after EarlyStopping, or on SIGTERM."""

import logging
import math
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping, Timer
from pytorch_lightning.callbacks.early_stopping import EarlyStoppingReason
from pytorch_lightning.utilities.exceptions import SIGTERMException

from lightning_dlrm.contracts.errors import require
from lightning_dlrm.engine.checkpointing import MONITOR
from lightning_dlrm.engine.fit_length import FitLength, fit_length, unreached_settings
from lightning_dlrm.engine.metrics_logger import MetricsLogger
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.tracking import names

log = logging.getLogger("lightning_dlrm")


class FinalValidation(pl.Callback):
    """Callback that logs at which step a fit ends and why, and validates after the last step.

    A stop that another callback requests takes effect when the gradients of a step are complete. Callbacks that stop a
    fit must come earlier in the list of callbacks.
    """

    def __init__(self) -> None:
        self._length = FitLength(math.inf, "")
        self._stop_after_step = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._length, self._stop_after_step = fit_length(trainer), False
        steps, setting = self._length
        if math.isfinite(steps):
            log.info("the fit ends at step %s (%s)", f"{int(steps):,}", setting)
        for beyond in unreached_settings(trainer, self._length):
            log.warning("%s is not reached: %s ends the fit at step %s", beyond, setting, f"{int(steps):,}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            # A checkpoint between the micro-batches of a step would lose the first of them.
            self._stop_after_step |= trainer.should_stop
            trainer.should_stop = False
            return
        trainer.should_stop |= self._stop_after_step
        epochs_done = trainer.current_epoch + trainer.is_last_batch
        last_epoch = trainer.max_epochs not in (None, -1) and epochs_done >= (trainer.max_epochs or 0)
        is_met = trainer.global_step >= (trainer.min_steps or 0) and epochs_done >= (trainer.min_epochs or 0)
        if trainer.global_step >= self._length.steps or last_epoch or (trainer.should_stop and is_met):
            # Lightning validates before it stops if none of these settings forbids it.
            trainer.should_stop = True
            trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None
            if trainer.check_val_every_n_epoch is not None:
                trainer.check_val_every_n_epoch = 1

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            remaining = callback.time_remaining() if isinstance(callback, Timer) else None
            if remaining is not None and remaining <= 0 and trainer.global_step < self._length.steps:
                log.info("stopped at step %s by the time limit (trainer.max_time)", f"{trainer.global_step:,}")


class StopAtAUC(pl.Callback):
    """Callback that ends a fit after the first validation that reaches a target AUC.

    The summary gets ``time_to_target_s`` and ``samples_to_target``, null if the target was not reached. The time is
    that of the fit, with its validations and checkpoints, over resumptions.

    Args:
        target: the AUC.
        metrics: the callback that writes the summary; must come later in the list of callbacks.

    Raises:
        UserError: the target is not above 0.5 and at most 1.
    """

    def __init__(self, target: float, metrics: MetricsLogger) -> None:
        require(0.5 < target <= 1, f"stop_at_auc is {target}; expected a number above 0.5, at most 1")
        self.target = target
        self._metrics = metrics
        self._seconds_before = 0.0
        self._start: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before = state_dict["seconds"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.perf_counter()
        for name in (names.TIME_TO_TARGET, names.SAMPLES_TO_TARGET):
            self._metrics.latest.setdefault(name, float("nan"))
        if self._metrics.latest.get(MONITOR, 0.0) >= self.target:
            # The run reached its target before it was resumed.
            trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: CTRModule) -> None:  # type: ignore[override]
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        auc = pl_module.results[MONITOR]
        if not auc >= self.target:
            return
        seconds, samples = self._seconds(), self._metrics.samples
        self._metrics.latest |= {names.TIME_TO_TARGET: seconds, names.SAMPLES_TO_TARGET: samples}
        log.info(
            "stop_at_auc: validation AUC %.5f reaches %g after %.1f s and %s samples",
            *(auc, self.target, seconds, f"{samples:,}"),
        )
        trainer.should_stop = True

    def _seconds(self) -> float:
        return self._seconds_before + (0.0 if self._start is None else time.perf_counter() - self._start)


class StayStopped(pl.Callback):
    """Callback that ends a resumed fit at its start if EarlyStopping ended it before.

    Args:
        stopping: the callback; it must come before the callback that saves checkpoints, and be made with
            ``check_on_train_epoch_end=False``, so that the checkpoint of a validation holds the decision.
    """

    def __init__(self, stopping: EarlyStopping) -> None:
        self.stopping = stopping

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.stopping.stopping_reason is not EarlyStoppingReason.NOT_STOPPED:
            log.info("EarlyStopping has ended this fit: to train on, take it out of trainer.callbacks")
            trainer.should_stop = True


class StopOnSigterm(pl.Callback):
    """Callback that ends an evaluation at its next batch after SIGTERM; Lightning checks for it in training only."""

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.received_sigterm:
            raise SIGTERMException

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
