"""The callbacks that log metrics and norms of a fit, and write ``summary.json`` and the results of evaluations."""

import logging
import resource
import sys
import time
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dlrm.contracts.batch import Batch
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.engine.checkpointing import RunCheckpoints, refuse_validation_amid_a_step
from lightning_dlrm.engine.evaluation import TrainingWindow
from lightning_dlrm.engine.fit_length import micro_batches
from lightning_dlrm.engine.memory import table_loads
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.engine.strategy import EmbeddingShardedDDP
from lightning_dlrm.models.network import CTRNetwork
from lightning_dlrm.optim.optimizer import CTROptimizer
from lightning_dlrm.sharding.collectives import Ranks
from lightning_dlrm.tables.embeddings import WidthGroup
from lightning_dlrm.tracking import names
from lightning_dlrm.tracking.run_folder import RunFolder, curves_file

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
        self.gradient_norm: float | None = None
        """The newest norm of all gradients together, if a NormLogger measures it."""
        self.configuration: str | None = None
        """The text of ``config.yaml``, which is written when training starts."""
        self.versions: dict[str, str | None] = {}
        """The content of ``versions.json``, which is written then too."""
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
        self.folder.agree(trainer.strategy)
        self._start = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: CTRModule) -> None:  # type: ignore[override]
        # GradientAccumulationScheduler sets it when an epoch starts, so not in a fit that resumes amid an epoch.
        trainer.accumulate_grad_batches = micro_batches(trainer, trainer.current_epoch)
        if self.checkpoints is not None:
            refuse_validation_amid_a_step(trainer)
        self._step = self.logged_step = trainer.global_step
        # Not earlier: if the checkpoint is refused, the run folder stays as it is.
        Ranks(long_timeout=True).run_on_rank_zero(self._prepare_folder)
        if self._step:
            log.info("resumed at step %s (%s samples)", f"{self._step:,}", f"{self.samples:,}")
        for logger in trainer.loggers:
            logger.log_hyperparams(describe(trainer, pl_module) | fingerprints(pl_module))
        self._start = self._last_log = self._mark(trainer, pl_module)

    def _prepare_folder(self) -> None:
        """Set aside what the fit writes again, and write its settings.

        Raises:
            UserError: a file cannot be read or written, or ``metrics.jsonl`` has a line of another form.
        """
        try:
            self.folder.set_lines_aside(self._step)
            if self.configuration is not None:
                self.folder.write_start(self.configuration, self.versions)
        except OSError as error:
            raise UserError(
                f"the run folder {self.folder.path} cannot be read and written ({error}); check its files and its disk"
            ) from error

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

    def on_validation_end(self, trainer: pl.Trainer, pl_module: CTRModule) -> None:  # type: ignore[override]
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._evaluation_seconds += time.perf_counter() - self._evaluation_start
        self._log(trainer, {**pl_module.results, names.TRAINING_SECONDS: self._training_seconds()})

    def on_fit_end(self, trainer: pl.Trainer, pl_module: CTRModule) -> None:  # type: ignore[override]
        # Not in on_train_end, which Lightning does not call for a resumed run that has no step left.
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
        self._log(trainer, training | self._learning_rates | exchanges | served_by_device(module.network))

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


class NormLogger(pl.Callback):
    """Callback that logs 2-norms at each logged step, before clipping and before the update.

    These are the norms of every gradient, and of each table's rows and their gradients, averaged over the rows that
    the step updates.

    Args:
        metrics: the callback that counts the samples; must come earlier in the list of callbacks.
    """

    def __init__(self, metrics: MetricsLogger) -> None:
        self._metrics = metrics
        self._norms: dict[str, float] = {}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: CTRModule, optimizer: Any) -> None:  # type: ignore[override]
        if (trainer.global_step + 1) % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        ours: CTROptimizer = getattr(optimizer, "optimizer", optimizer)
        self._norms = norms(pl_module.network, ours)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        found, self._norms = self._norms, {}
        self._metrics.gradient_norm = found.get(f"{names.GRADIENT_NORM}/total", self._metrics.gradient_norm)
        for logger in trainer.loggers if found else ():
            logger.log_metrics({names.SAMPLES: self._metrics.samples, **found}, step=trainer.global_step)


@torch.no_grad()
def norms(network: CTRNetwork, optimizer: CTROptimizer) -> dict[str, float]:
    """Return the norms by name; with sharded tables all ranks call it together.

    The names are ``gradient_norm/total``, ``gradient_norm/PARAMETER``, ``row_norm/TABLE`` and
    ``row_gradient_norm/TABLE``. Tables without updated rows are left out.
    """
    found = {f"{names.GRADIENT_NORM}/total": optimizer.gradient_norm().item()}
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            found[f"{names.GRADIENT_NORM}/{name}"] = parameter.grad.float().norm().item()
    tables = [table.name for lookup in network.lookups() for table in lookup.tables]
    row_norms, gradient_norms, rows = np.sum(Ranks().all_gather(_sums_over_rows(network, tables)), axis=0)
    for name, row_norm, gradient_norm, count in zip(tables, row_norms, gradient_norms, rows, strict=True):
        if count:
            found[f"{names.ROW_NORM}/{name}"] = float(row_norm / count)
            found[f"{names.ROW_GRADIENT_NORM}/{name}"] = float(gradient_norm / count)
    return found


def _sums_over_rows(network: CTRNetwork, tables: list[str]) -> NDArray[np.float64]:
    """Return sums over this rank's updated rows, [3, tables]: of their norms, of their gradients' norms, of ones."""
    sums = np.zeros((3, len(tables)))
    for lookup in network.lookups():
        gradient = lookup.gradient()
        if gradient is None:
            continue
        ends = torch.tensor([piece.offset + piece.stop - piece.start for piece in lookup.pieces])
        piece_U = torch.searchsorted(ends, gradient.rows.cpu(), right=True)
        # Rows of tables on the host may still be in flight.
        lookup.flush()
        touched = lookup.weight.index_select(0, gradient.rows.to(lookup.weight.device))
        weights = touched.float().norm(dim=1), gradient.values.float().norm(dim=1), torch.ones(len(touched))
        for i, weight in enumerate(weights):
            of_pieces = torch.bincount(piece_U, weight.double().cpu(), len(lookup.pieces))
            for piece, total in zip(lookup.pieces, of_pieces.tolist(), strict=True):
                sums[i, tables.index(piece.name)] += total
    return sums


class EvaluationWriter(pl.Callback):
    """Callback that writes the metrics of ``validate`` and ``test`` to JSON files.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.folder.agree(trainer.strategy)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._write("validate.json", trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write("test.json", trainer, pl_module)

    def _write(self, name: str, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self.folder.write_json(name, pl_module.results)


class CurveWriter(pl.Callback):
    """Callback that writes the curves of the last evaluation of each split, also within a fit.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(names.VALIDATION, trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(names.TEST, trainer, pl_module)

    def _write(self, stage: str, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking and pl_module.curves is not None:
            self._folder.write_json(curves_file(stage), pl_module.curves.document())


def describe(trainer: pl.Trainer, module: CTRModule) -> dict[str, float]:
    """Return sizes of the model, rows and bytes per rank, and the best reachable scores of planted data."""
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
    """Return the dataset, protocol and fingerprints of a run's data."""
    schema = module.data_schema()
    return {
        "dataset": schema.dataset,
        "protocol": schema.protocol,
        "encoding_fingerprint": schema.encoding_fingerprint,
        "data_fingerprint": schema.data_fingerprint,
    }


def served_by_device(network: CTRNetwork) -> dict[str, float]:
    """Return which share of the lookups in tables in host memory read rows on the device since the last call."""
    groups = [module for module in network.modules() if isinstance(module, WidthGroup)]
    read = asked = 0
    for group in groups:
        if group.lookup.storage.on_host:
            read, asked = read + group.read, asked + group.asked
        group.read = group.asked = 0
    return {names.DEVICE_SERVED: 1 - read / asked} if asked else {}


def peak_memory() -> dict[str, float]:
    """Return the peak memory of this process in bytes: resident, and allocated on its GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak: dict[str, float] = {names.PEAK_MEMORY: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak[names.PEAK_DEVICE_MEMORY] = torch.cuda.max_memory_allocated()
    return peak
