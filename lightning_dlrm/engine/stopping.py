"""Callbacks that end a fit: with a validation, at a target score, or on a signal."""

import contextlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping, Timer
from pytorch_lightning.callbacks.early_stopping import EarlyStoppingReason
from pytorch_lightning.utilities.exceptions import SIGTERMException

from lightning_dlrm.contracts.errors import require
from lightning_dlrm.engine.checkpointing import MONITOR, RunCheckpoints, validates_now
from lightning_dlrm.engine.fit_length import FitLength, fit_length, unreached_settings
from lightning_dlrm.engine.metrics_logger import MetricsLogger
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.engine.plateau import ReduceOnPlateau
from lightning_dlrm.sharding.collectives import Ranks
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

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == "fit" and what_ended(trainer, checkpoint):
            _end_without_step(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A request to stop that the smallest number of steps or epochs has deferred stays valid.
        trainer.should_stop |= _stopped_by_callback(trainer) is not None
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
            _end_without_step(trainer)
            if trainer.check_val_every_n_epoch is not None:
                trainer.check_val_every_n_epoch = 1

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Timer) and _is_over(callback) and trainer.global_step < self._length.steps:
                log.info("stopped at step %s by the time limit (%s)", f"{trainer.global_step:,}", _time_limit(trainer))


def _end_without_step(trainer: pl.Trainer) -> None:
    trainer.should_stop = True
    trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None


def what_ended(trainer: pl.Trainer, checkpoint: Mapping[str, Any]) -> list[str]:
    """Return the settings that end a fit at a checkpoint, such as ``trainer.max_steps 100``; none if steps are left.

    Args:
        trainer: trainer of the fit that continues; its callbacks that can end a fit get their state.
        checkpoint: Lightning's dictionary.
    """
    states, step = checkpoint.get("callbacks", {}), checkpoint["global_step"]
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if (
            isinstance(callback, (EarlyStopping, MetricsLogger, ReduceOnPlateau, Timer))
            and callback.state_key in states
        ):
            callback.load_state_dict(states[callback.state_key])
    epochs = _close_epoch(checkpoint["loops"]["fit_loop"], trainer)
    found = []
    if 0 <= trainer.max_steps <= step:
        found.append(f"trainer.max_steps {trainer.max_steps:,}")
    if 0 <= (-1 if trainer.max_epochs is None else trainer.max_epochs) <= epochs:
        found.append(f"trainer.max_epochs {trainer.max_epochs:,}")
    is_met = step >= (trainer.min_steps or 0) and epochs >= (trainer.min_epochs or 0)
    if is_met and (ended := _stopped_by_callback(trainer)) is not None:
        found.append(ended)
    return found


def _close_epoch(loops: dict[str, Any], trainer: pl.Trainer) -> int:
    """Move a position after the last batch of an epoch to the start of the next; return the number of epochs done.

    Checkpoints of an epoch's last batch are saved before Lightning closes the epoch. From such a position Lightning
    trains a batch too many, unless the validation that saved it was due at that batch.

    Args:
        loops: Lightning's state of the fit loop; modified in place.
        trainer: trainer of the fit that continues from it, maybe with a longer epoch.
    """
    epoch, batch = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    batches = getattr(trainer.datamodule, "training_batches", None)  # type: ignore[attr-defined]
    at_end = batch["is_last_batch"] if batches is None else batch["current"]["ready"] >= batches
    is_open = epoch["total"]["ready"] > epoch["total"]["processed"]
    if at_end and is_open:
        for counts in epoch.values():
            done = counts["processed"] + 1
            counts.update(ready=done + 1, started=done, processed=done, completed=done)
        batch["total"]["completed"] = batch["total"]["ready"]
        batch["current"] = dict.fromkeys(batch["current"], 0)
    # The last batch of a shorter epoch is not the last batch of a longer one.
    batch["is_last_batch"] &= not is_open
    processed: int = epoch["current"]["processed"]
    return processed


def _stopped_by_callback(trainer: pl.Trainer) -> str | None:
    """Return the setting of the callback whose state ends the fit; None if no callback ends it."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Timer) and _is_over(callback):
            return _time_limit(trainer)
        if isinstance(callback, EarlyStopping) and callback.stopping_reason is not EarlyStoppingReason.NOT_STOPPED:
            return "EarlyStopping in trainer.callbacks"
        if isinstance(callback, ReduceOnPlateau) and callback.stops:
            return "ReduceOnPlateau in trainer.callbacks"
        if isinstance(callback, StopAtAUC) and callback.is_reached:
            return f"stop_at_auc {callback.target:g}"
    return None


def _time_limit(trainer: pl.Trainer) -> str:
    """Return the setting that the Timer of a trainer comes from: Lightning makes one of ``max_time``."""
    return "trainer.max_time" if getattr(trainer, "max_time", None) is not None else "Timer in trainer.callbacks"


def _is_over(timer: Timer) -> bool:
    remaining = timer.time_remaining()
    return remaining is not None and remaining <= 0


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

    @property
    def is_reached(self) -> bool:
        """Whether the last validation reached the target."""
        return self._metrics.latest.get(MONITOR, 0.0) >= self.target

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before = state_dict["seconds"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.perf_counter()
        for name in (names.TIME_TO_TARGET, names.SAMPLES_TO_TARGET):
            self._metrics.latest.setdefault(name, float("nan"))

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


class StopOnSignal(pl.Callback):
    """Callback that ends a command after SIGTERM, SIGINT or SIGUSR1, on all ranks after the same batch.

    A fit is saved first: at the end of the optimizer step or, if a validation is due there, at the checkpoint before
    it. Lightning ends a fit on SIGTERM and SIGINT without saving it; with several ranks its handler broadcasts, which
    blocks if the signal comes amid another collective, and SIGINT to one rank would reach the others as a lost
    connection. So this callback takes the signals. A second SIGINT interrupts at once.

    Args:
        checkpoints: the callback that saves the fit; None if nothing is to be saved.
    """

    EVERY = 8
    """Number of batches after which several ranks ask each other for signals."""

    def __init__(self, checkpoints: RunCheckpoints | None) -> None:
        self._checkpoints = checkpoints
        self._received = 0
        self._note = b""
        self.agreed = 0
        """The signal on which all ranks end; 0 for none."""

    def receive(self, number: int, frame: object) -> None:
        """Note a signal; a handler for ``signal.signal``. SIGUSR1 counts more than others."""
        if self._received != signal.SIGUSR1:
            self._received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # Standard error may be a pipe or a terminal that is gone.
            with contextlib.suppress(OSError):
                os.write(2, self._note)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            saved = b": the fit is saved first" if self._checkpoints is not None else b""
            self._note = b"\nending soon%b; Ctrl-C again ends at once\n" % saved
        if threading.current_thread() is not threading.main_thread():
            return
        # Lightning has set its handler by now, and restores the handler of before at the end.
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
            signal.signal(signal.SIGTERM, self.receive)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler and not self._received:
            signal.signal(signal.SIGINT, self.receive)

    on_validation_start = on_test_start = on_predict_start = on_train_start

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._ask(trainer, batch_idx + 1)
        amid_step = (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch
        # A fit that is saved before a validation would skip that validation when it continues.
        if not self.agreed or amid_step or validates_now(trainer, batch_idx):
            return
        if self._checkpoints is not None:
            self._checkpoints.save(trainer)
        raise SIGTERMException

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._ask(trainer, batch_idx)
        if self.agreed:
            raise SIGTERMException

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A signal during the last batch.
        self.on_validation_batch_start(trainer, pl_module, None, 0)

    def _ask(self, trainer: pl.Trainer, batches: int) -> None:
        """Learn whether a rank has received a signal, after ``EVERY`` batches."""
        received = self._received or (signal.SIGTERM if trainer.received_sigterm else 0)
        if trainer.world_size > 1:
            if self.agreed or batches % self.EVERY:
                return
            theirs = [int(part[0]) for part in Ranks().all_gather(np.array([received], np.int64))]
            received = signal.SIGUSR1 if signal.SIGUSR1 in theirs else max(theirs)
        self.agreed = received
