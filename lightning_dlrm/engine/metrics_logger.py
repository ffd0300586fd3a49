"""The callback that logs the metrics of a fit and writes ``summary.json``."""

import logging
import time
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_dlrm.contracts.batch import Batch
from lightning_dlrm.engine.checkpointing import RunCheckpoints, refuse_validation_amid_a_step
from lightning_dlrm.engine.fit_length import micro_batches
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.engine.run_facts import describe, fingerprints, peak_memory
from lightning_dlrm.engine.strategy import EmbeddingShardedDDP
from lightning_dlrm.engine.training_window import TrainingWindow
from lightning_dlrm.sharding.collectives import Ranks
from lightning_dlrm.tracking import names
from lightning_dlrm.tracking.run_folder import CONFIG, RunFolder

log = logging.getLogger("lightning_dlrm")


class _Mark(NamedTuple):
    """A moment of a fit; speed is measured between two of them."""

    seconds: float
    """Training time, without validations and checkpoints."""
    samples: int
    parts: dict[str, float]
    """Seconds spent so far in each part of the steps and in waiting for batches."""


class MetricsLogger(pl.Callback):
    """Callback that logs metrics at every logged step and after each validation, and writes ``summary.json``.

    Nothing is read from the device between two logged steps.

    Args:
        folder: the run folder.
        checkpoints: the callback whose saving time is not counted as training; None without checkpoints.
    """

    def __init__(self, folder: RunFolder, checkpoints: RunCheckpoints | None) -> None:
        self.folder = folder
        self.checkpoints = checkpoints
        self.samples = 0
        """Samples trained on since the first step of the run, over all ranks."""
        self.latest: dict[str, Any] = {}
        """The newest value of each metric; on rank 0 only."""
        self.logged_step = 0
        """The last step whose training metrics were logged."""
        self.configuration: str | None = None
        """The text of ``config.yaml``, which is written when training starts."""
        self._window = TrainingWindow()
        self._learning_rates: dict[str, float] = {}
        self._losses: list[Tensor] = []
        """Losses of the micro-batches of the current step."""
        self._step = 0
        self._seconds_before = 0.0
        """Training time before this run was resumed."""
        self._evaluation_seconds = 0.0
        self._start: _Mark | None = None
        self._last_log: _Mark

    @property
    def state_key(self) -> str:
        # Checkpoints keep the name that this class had when the format was fixed.
        return "Recorder"

    @property
    def trained(self) -> bool:
        """Whether this fit has trained on any sample; False if a finished run was resumed."""
        return self._start is not None and self.samples > self._start.samples

    def state_dict(self) -> dict[str, Any]:
        return {
            names.SAMPLES: self.samples,
            "latest": dict(self.latest),
            "window": self._window.gather(),
            "seconds": self._training_seconds(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.samples = state_dict[names.SAMPLES]
        self.latest = dict(state_dict["latest"])
        self._window.load(state_dict["window"])
        self._seconds_before = state_dict.get("seconds", 0.0)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Rank 0 chose the folder.
        self.folder.path = trainer.strategy.broadcast(self.folder.path)
        self._start = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, CTRModule)
        # GradientAccumulationScheduler sets it when an epoch starts, so not in a fit that resumes amid an epoch.
        trainer.accumulate_grad_batches = micro_batches(trainer, trainer.current_epoch)
        if self.checkpoints is not None:
            refuse_validation_amid_a_step(trainer)
        self._step = self.logged_step = trainer.global_step
        if trainer.is_global_zero:
            # Not earlier: if the checkpoint is refused, the run folder stays as it is.
            self.folder.drop_lines_after(self._step)
            if self.configuration is not None:
                self.folder.write_text(CONFIG, self.configuration)
        if self._step:
            log.info("resumed at step %d (%s samples)", self._step, f"{self.samples:,}")
        for logger in trainer.loggers:
            logger.log_hyperparams(describe(trainer, pl_module) | fingerprints(pl_module))
        self._start = self._last_log = self._mark(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, CTRModule) and batch.label is not None
        self.samples += batch.global_size
        self._losses.append(outputs["step_loss"])
        self._window.add(outputs["logits"], batch.label, batch.global_size)
        if trainer.global_step == self._step:
            # A micro-batch of a step that is still accumulating gradients.
            return
        self._step = trainer.global_step
        losses, self._losses = self._losses, []
        if self._step % trainer.log_every_n_steps == 0 or trainer.should_stop:  # type: ignore[attr-defined]
            self._log_training(trainer, pl_module, losses)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        # After the step the schedule has set the rates of the next one.
        self._learning_rates = {
            f"{names.LEARNING_RATE}/{group['name']}": float(group["lr"]) for group in optimizer.param_groups
        }

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluation_start = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        assert isinstance(pl_module, CTRModule)
        self._evaluation_seconds += time.perf_counter() - self._evaluation_start
        self._log(trainer, {**pl_module.results, names.TRAINING_SECONDS: self._training_seconds()})

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not in on_train_end, which Lightning does not call for a resumed run that has no step left.
        assert isinstance(pl_module, CTRModule)
        if not trainer.is_global_zero or not self.samples:
            return
        step = trainer.global_step
        if self.trained:
            assert self._start is not None
            speed = self._speed(self._start, self._mark(trainer, pl_module))
            training = {names.TRAINING_SECONDS: self._training_seconds()}
            self.latest |= speed | training | peak_memory() | describe(trainer, pl_module)
        else:
            kept = self.folder.final()
            if kept.get(names.STEP) == step:
                self.latest = kept
                return
            # The run was killed between its last checkpoint and its summary.
            seconds = self._training_seconds()
            speed = {names.TRAINING_SECONDS: seconds, names.SAMPLES_PER_SECOND: self.samples / max(seconds, 1e-9)}
            self.latest = speed | peak_memory() | describe(trainer, pl_module) | self.latest
        final = {names.STEP: step, names.SAMPLES: self.samples, **self.latest, **fingerprints(pl_module)}
        self.folder.write_summary(final, self.checkpoints.best if self.checkpoints else {})

    def _log_training(self, trainer: pl.Trainer, module: CTRModule, losses: list[Tensor]) -> None:
        now = self._mark(trainer, module)
        speed, self._last_log = self._speed(self._last_log, now), now
        self._window.gather()
        # A rank's loss is its part of the mean over the global batch, times the world size.
        loss = torch.stack(losses).mean().double().cpu().numpy()
        mean_loss = float(np.mean(Ranks().all_gather(loss.reshape(1))))
        steps, self.logged_step = self._step - self.logged_step, self._step
        strategy = trainer.strategy
        exchanges = strategy.measure_exchanges(steps) if isinstance(strategy, EmbeddingShardedDDP) else {}
        if not trainer.is_global_zero:
            return
        training = {names.TRAIN_LOSS: mean_loss, **self._window.metrics()}
        training |= {names.TRAINING_SECONDS: self._training_seconds(), **speed}
        self._log(trainer, training | self._learning_rates | exchanges)

    def _log(self, trainer: pl.Trainer, metrics: dict[str, float]) -> None:
        self.latest |= metrics
        for logger in trainer.loggers:
            logger.log_metrics({names.SAMPLES: self.samples, **metrics}, step=self._step)

    def _training_clock(self) -> float:
        """Return seconds since a fixed moment, without those of validations and checkpoints."""
        saving = self.checkpoints.seconds if self.checkpoints else 0.0
        return time.perf_counter() - self._evaluation_seconds - saving

    def _training_seconds(self) -> float:
        """Return the training time since the first step of the run, over resumptions."""
        return self._seconds_before + (0.0 if self._start is None else self._training_clock() - self._start.seconds)

    def _mark(self, trainer: pl.Trainer, module: CTRModule) -> _Mark:
        waiting = getattr(trainer.train_dataloader, "wait_seconds", 0.0)
        return _Mark(self._training_clock(), self.samples, {names.DATA_WAIT_SHARE: waiting, **module.timer.seconds})

    @staticmethod
    def _speed(since: _Mark, now: _Mark) -> dict[str, float]:
        """Return samples/s and the share of each part; the rest is Lightning's share, with all callbacks."""
        seconds = max(now.seconds - since.seconds, 1e-9)
        shares = {name: (now.parts[name] - since.parts[name]) / seconds for name in now.parts}
        shares[names.LIGHTNING_SHARE] = max(0.0, 1.0 - sum(shares.values()))
        return {names.SAMPLES_PER_SECOND: (now.samples - since.samples) / seconds, **shares}
