"""What a fit says of itself: training metrics, speed, summary; and that it ends with a validation."""

import logging
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor

from lightning_dlrm.contracts.batch import Batch
from lightning_dlrm.engine.checkpointing import RunCheckpoints, refuse_validation_amid_a_step
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.engine.strategy import EmbeddingShardedDDP, table_loads
from lightning_dlrm.objectives.metrics import click_metrics
from lightning_dlrm.sharding.collectives import Ranks
from lightning_dlrm.tracking import names
from lightning_dlrm.tracking.run_folder import CONFIG, RunFolder

log = logging.getLogger("lightning_dlrm")

AUC_WINDOW = 65_536
"""Samples that the training metrics look back on."""

WINDOW_METRICS = ("auc", "accuracy", "log_loss")
"""Of the training samples in the window, each scored by the weights of its own step."""


class FinalValidation(pl.Callback):
    """Makes the last step of a fit a validation step, wherever in an epoch it falls."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last_step = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
        bounded = trainer.max_epochs is not None and trainer.max_epochs != -1
        last_epoch = bounded and trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
        if last_step or (last_epoch and trainer.is_last_batch):
            # Lightning validates before it stops, also in an epoch that it would pass over.
            trainer.should_stop = True
            if trainer.check_val_every_n_epoch is not None:
                trainer.check_val_every_n_epoch = 1


class Recorder(pl.Callback):
    """Logs every ``log_every_n_steps`` steps and after each validation, and keeps ``summary.json``.

    Nothing is read from the device between two logged steps.

    Args:
        folder: the run folder.
        checkpoints: the time they take does not count as training; None where there are none.
    """

    def __init__(self, folder: RunFolder, checkpoints: RunCheckpoints | None) -> None:
        self.folder = folder
        self.checkpoints = checkpoints
        self.samples = 0
        """Samples trained on since the first step of the run, over all ranks."""
        self.latest: dict[str, float] = {}
        """The newest value of everything that was logged."""
        self.configuration: str | None = None
        """For ``config.yaml``, which is written once nothing refuses the fit any more."""
        self.samples_per_second = 0.0
        """Since the last logged step."""
        self._window: tuple[Tensor, Tensor] = torch.empty(0), torch.empty(0, dtype=torch.int8)
        """Logits and labels of the last samples over all ranks, up to the last logged step."""
        self._recent: deque[tuple[Tensor, Tensor, int]] = deque()
        """Logits and labels of this rank's slice, and global size, of each batch since then."""
        self._recent_size = 0
        """Samples of those batches, over all ranks."""
        self._rates: list[tuple[str, float]] = []
        self._losses: list[Tensor] = []
        self._start: float | None = None
        self._seconds_before = 0.0
        """Of training, before this run was resumed."""
        self._step = 0
        self.logged_step = 0
        """The last one whose training metrics were logged."""

    @property
    def trained(self) -> bool:
        """Whether this fit has trained on anything; not so where the run was at its end already."""
        return self._start is not None and self.samples > self._start_samples

    def state_dict(self) -> dict[str, Any]:
        self._extend_window()
        return {
            names.SAMPLES: self.samples,
            "latest": dict(self.latest),
            "window": list(self._window),
            "seconds": self._training_seconds(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.samples = state_dict[names.SAMPLES]
        self.latest = dict(state_dict["latest"])
        if state_dict["window"]:
            logits, labels = state_dict["window"]
            self._window = logits, labels
        self._seconds_before = state_dict.get("seconds", 0.0)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Rank 0 has chosen it.
        self.folder.path = trainer.strategy.broadcast(self.folder.path)
        self._start = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.checkpoints is not None:
            refuse_validation_amid_a_step(trainer)
        self._step = self.logged_step = trainer.global_step
        if trainer.is_global_zero:
            # Not before: a checkpoint that is refused leaves the folder of its run as it is.
            self.folder.cut_back(self._step)
            if self.configuration is not None:
                self.folder.write_text(CONFIG, self.configuration)
        if self._step:
            log.info("resumed at step %d (%s samples)", self._step, f"{self.samples:,}")
        assert isinstance(pl_module, CTRModule)
        for logger in trainer.loggers:
            logger.log_hyperparams(describe(trainer, pl_module) | fingerprints(pl_module))
        self._evaluation_seconds = 0.0
        self._start = self._last_log = time.perf_counter()
        self._start_pause = self._last_pause = self._pause()
        self._start_samples = self._last_samples = self.samples
        self._start_parts = self._last_parts = _parts(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.samples += batch.global_size
        assert batch.label is not None
        self._losses.append(outputs["step_loss"])
        self._remember(outputs["logits"], batch.label, batch.global_size)
        if trainer.global_step == self._step:
            # A micro-batch of a step that is still being accumulated.
            return
        self._step = trainer.global_step
        losses, self._losses = self._losses, []
        if self._step % trainer.log_every_n_steps == 0 or trainer.should_stop:  # type: ignore[attr-defined]
            assert isinstance(pl_module, CTRModule)
            self._log_training(trainer, pl_module, losses)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        # Afterwards they are those of the next step.
        self._rates = [(group["name"], float(group["lr"])) for group in optimizer.param_groups]

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluation_start = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        assert isinstance(pl_module, CTRModule)
        self._evaluation_seconds += time.perf_counter() - self._evaluation_start
        self._log(trainer, {**pl_module.results, names.TRAINING_SECONDS: self._training_seconds()})

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not when training ends: of a run that had reached its end before it was resumed, none begins.
        assert isinstance(pl_module, CTRModule)
        if not trainer.is_global_zero or not self.samples:
            return
        step = trainer.global_step
        if self.trained:
            self.latest |= self._speed(trainer, pl_module) | describe(trainer, pl_module)
        else:
            kept = self.folder.final()
            if kept.get(names.STEP) == step:
                self.latest = kept
                return
            # It was killed after its last checkpoint, whose step was not logged perhaps.
            seconds = self._training_seconds()
            speed = {names.TRAINING_SECONDS: seconds, names.SAMPLES_PER_SECOND: self.samples / max(seconds, 1e-9)}
            self.latest = speed | _peak_memory() | describe(trainer, pl_module) | self.latest
        final = {names.STEP: step, names.SAMPLES: self.samples, **self.latest, **fingerprints(pl_module)}
        best = {} if self.checkpoints is None else self.checkpoints.best
        self.folder.write_summary(final, best)

    def _log_training(self, trainer: pl.Trainer, module: CTRModule, losses: list[Tensor]) -> None:
        now, pause = time.perf_counter(), self._pause()
        seconds = max(now - self._last_log - (pause - self._last_pause), 1e-9)
        self.samples_per_second = (self.samples - self._last_samples) / seconds
        self._last_log, self._last_pause, self._last_samples = now, pause, self.samples
        parts = _parts(trainer, module)
        shares, self._last_parts = _shares(parts, self._last_parts, seconds), parts
        self._extend_window()
        # A rank's loss is ranks x its part of the mean over the global batch.
        loss = torch.stack(losses).mean().double().cpu().numpy()
        mean_loss = float(np.mean(Ranks().all_gather(loss.reshape(1))))
        steps, self.logged_step = self._step - self.logged_step, self._step
        strategy = trainer.strategy
        exchanges = strategy.measure_exchanges(steps) if isinstance(strategy, EmbeddingShardedDDP) else {}
        if not trainer.is_global_zero:
            return
        window = click_metrics(*self._window)
        self._log(
            trainer,
            {
                names.TRAIN_LOSS: mean_loss,
                **{f"{names.TRAIN}/{name}": window[name] for name in WINDOW_METRICS},
                names.SAMPLES_PER_SECOND: self.samples_per_second,
                names.TRAINING_SECONDS: self._training_seconds(),
                **shares,
                **{f"{names.LEARNING_RATE}/{group}": rate for group, rate in self._rates},
                **exchanges,
            },
        )

    def _remember(self, logits_B: Tensor, labels_B: Tensor, global_size: int) -> None:
        """Keeps what ``train/auc`` may look back on; drops batches that lie wholly before it."""
        self._recent.append((logits_B.float(), labels_B, global_size))
        self._recent_size += global_size
        while self._recent_size - self._recent[0][2] >= AUC_WINDOW:
            self._recent_size -= self._recent.popleft()[2]

    def _extend_window(self) -> None:
        """Adds what came since the last call, of all ranks: batch after batch, rank after rank."""
        if not self._recent:
            return
        ranks = Ranks()
        logits, labels = (torch.cat(parts).cpu() for parts in list(zip(*self._recent, strict=True))[:2])
        counts = ranks.all_gather(np.array([len(part) for part, *_ in self._recent]))
        self._recent.clear()
        self._recent_size = 0
        self._window = tuple(  # type: ignore[assignment]
            torch.cat([kept, *_by_batch(ranks.all_gather_uneven(new.numpy()), counts)])[-AUC_WINDOW:]
            for kept, new in zip(self._window, (logits, labels), strict=True)
        )

    def _log(self, trainer: pl.Trainer, metrics: dict[str, float]) -> None:
        self.latest |= metrics
        for logger in trainer.loggers:
            logger.log_metrics({names.SAMPLES: self.samples, **metrics}, step=self._step)

    def _pause(self) -> float:
        """Seconds since the start that were no training."""
        return self._evaluation_seconds + (self.checkpoints.seconds if self.checkpoints else 0.0)

    def _seconds_here(self) -> float:
        """Of training since the start or the resumption of the run."""
        if self._start is None:
            return 0.0
        return max(time.perf_counter() - self._start - (self._pause() - self._start_pause), 1e-9)

    def _training_seconds(self) -> float:
        """Since the first step of the run, over resumptions, without validations and checkpoints."""
        return self._seconds_before + self._seconds_here()

    def _speed(self, trainer: pl.Trainer, module: CTRModule) -> dict[str, float]:
        """Of the whole fit."""
        seconds = self._seconds_here()
        return {
            names.SAMPLES_PER_SECOND: (self.samples - self._start_samples) / seconds,
            **_shares(_parts(trainer, module), self._start_parts, seconds),
            names.TRAINING_SECONDS: self._training_seconds(),
            **_peak_memory(),
        }


def _by_batch(of_ranks: list[NDArray], counts: list[NDArray]) -> Iterator[Tensor]:
    """Cuts each rank's samples into batches and gives them batch after batch, rank after rank."""
    cut = [np.split(samples, np.cumsum(count)[:-1]) for samples, count in zip(of_ranks, counts, strict=True)]
    return (torch.from_numpy(part) for batch in zip(*cut, strict=True) for part in batch)


def _parts(trainer: pl.Trainer, module: CTRModule) -> dict[str, float]:
    """Seconds that the fit has spent in the parts of its steps and in waiting for training batches."""
    return {names.DATA_WAIT_SHARE: getattr(trainer.train_dataloader, "wait_seconds", 0.0), **module.timer.seconds}


def _shares(parts: dict[str, float], before: dict[str, float], seconds: float) -> dict[str, float]:
    """Of the time since ``before``; what no part accounts for is Lightning's own, callbacks and logging included."""
    shares = {name: (parts[name] - before[name]) / seconds for name in parts}
    return shares | {names.LIGHTNING_SHARE: max(0.0, 1.0 - sum(shares.values()))}


def _peak_memory() -> dict[str, float]:
    """The most that this process has held so far, in bytes: resident, and allocated on its GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak: dict[str, float] = {names.PEAK_MEMORY: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak[names.PEAK_DEVICE_MEMORY] = torch.cuda.max_memory_allocated()
    return peak


def describe(trainer: pl.Trainer, module: CTRModule) -> dict[str, float]:
    """What is known of a run before its first step: sizes, ranks, and the optimum of planted data."""
    size, strategy, loads = module.size, trainer.strategy, table_loads(module.network, module)
    if isinstance(strategy, EmbeddingShardedDDP):
        held = strategy.held(loads)
    else:
        held = {names.ROWS_PER_RANK: sum(load.rows for load in loads)}
        held |= {names.BYTES_PER_RANK: sum(load.bytes for load in loads)}
        if on_host := sum(load.bytes for load in loads if load.on_host):
            held[names.HOST_BYTES] = on_host
    facts: dict[str, float] = {
        names.PARAMETERS_TABLES: size.tables,
        names.PARAMETERS_DENSE: size.dense,
        names.PARAMETERS_TOTAL: size.total,
        names.FLOPS_FORWARD: size.flops_per_sample_forward,
        names.FLOPS_TRAINING: size.flops_per_sample_training,
        names.RANKS: trainer.world_size,
        **held,
    }
    optimum = module.data_schema().optimum.get(names.VALIDATION)
    if optimum is not None:
        facts |= {names.OPTIMUM_AUC: optimum.auc, names.OPTIMUM_LOG_LOSS: optimum.log_loss}
    return facts


def fingerprints(module: CTRModule) -> dict[str, str]:
    """Which data a run is trained on."""
    schema = module.data_schema()
    return {
        "dataset": schema.dataset,
        "protocol": schema.protocol,
        "encoding_fingerprint": schema.encoding_fingerprint,
        "data_fingerprint": schema.data_fingerprint,
    }


class StopOnSigterm(pl.Callback):
    """Lets SIGTERM end an evaluation at its next batch; Lightning itself looks for it in training only."""

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self._look(trainer)

    def on_test_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self._look(trainer)

    def on_predict_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self._look(trainer)

    def _look(self, trainer: pl.Trainer) -> None:
        if trainer.received_sigterm:
            raise SIGTERMException


class EvaluationWriter(pl.Callback):
    """Keeps what ``validate`` and ``test`` found as ``validate.json`` and ``test.json``.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Rank 0 has chosen it.
        self.folder.path = trainer.strategy.broadcast(self.folder.path)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._write("validate.json", trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write("test.json", trainer, pl_module)

    def _write(self, name: str, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, CTRModule)
        if trainer.is_global_zero:
            self.folder.write_json(name, pl_module.results)
            for logger in trainer.loggers:
                logger.log_metrics(pl_module.results)
