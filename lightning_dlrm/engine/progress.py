"""The progress display: a bar on a terminal, a line every few seconds elsewhere."""

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from tqdm import tqdm

from lightning_dlrm.contracts.terminal import columns, decimal, has_colors
from lightning_dlrm.engine.fit_length import fit_length
from lightning_dlrm.engine.metrics_logger import MetricsLogger, peak_memory
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.tracking import names

# Without steps/s, because samples/s are shown.
FIT_FORMAT = "{desc} {percentage:3.0f}%|{bar}| steps {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"
EVALUATION_FORMAT = "{desc} {percentage:3.0f}%|{bar}| batches {n_fmt}/{total_fmt} {elapsed}<{remaining}"
_BAR_CELLS = 8
"""Cells of a bar that metrics beside it leave free."""
LINE_SECONDS = 10.0
"""Seconds between two lines if there is no terminal, where redraws would fill a log."""
LINE_COLUMNS = 98


class RunProgress(ProgressBar):
    """Progress bar with steps, remaining time, and as many metrics of a fit as fit into the terminal; or with the
    batches of an evaluation. Each validation of a fit leaves a line.

    Args:
        metrics: the callback whose metrics are shown; None outside a fit.
    """

    def __init__(self, metrics: MetricsLogger | None) -> None:
        super().__init__()
        self._metrics = metrics
        self._enabled = True
        self._fit_bar: tqdm | None = None
        self._shown_step = 0
        """The logged step whose metrics the bar shows."""
        self._evaluation_bar: tqdm | None = None
        self._highest_auc = -math.inf
        """Of the validations so far."""

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._fit_bar, self._shown_step = None, trainer.global_step
        best = self._metrics.checkpoints.best if self._metrics is not None and self._metrics.checkpoints else {}
        self._highest_auc = best.get(f"{names.VALIDATION}/auc", -math.inf)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not in on_train_start, where other callbacks print.
        if self._fit_bar is None:
            self._fit_bar = self._bar("fit", fit_length(trainer).steps, trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._fit_bar is not None
        metrics = self._metrics
        # Only rank 0 has metrics to show.
        if trainer.is_global_zero and metrics is not None and metrics.logged_step > self._shown_step:
            # No refresh here: the bar redraws on its own clock.
            self._shown_step = metrics.logged_step
            self._fit_bar.set_postfix_str(format_metrics(metrics, metrics_width(self._fit_bar)), False)
        self._fit_bar.update(trainer.global_step - self._fit_bar.n)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._fit_bar is not None:
            self._fit_bar.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        for bar in (self._evaluation_bar, self._fit_bar):
            if bar is not None:
                bar.close()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_evaluation("validation", sum(trainer.num_val_batches))

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_evaluation("test", sum(trainer.num_test_batches))

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_evaluation("predict", sum(trainer.num_predict_batches))

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        assert self._evaluation_bar is not None
        self._evaluation_bar.update()

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._evaluation_bar is not None:
            self._evaluation_bar.close()

    on_predict_end = on_test_end

    def on_validation_end(self, trainer: pl.Trainer, pl_module: CTRModule) -> None:  # type: ignore[override]
        self.on_test_end(trainer, pl_module)
        if self._metrics is not None and self._enabled and trainer.is_global_zero and not trainer.sanity_checking:
            auc = pl_module.results.get(f"{names.VALIDATION}/auc", -math.inf)
            is_highest = auc > self._highest_auc and not pl_module.chance
            line = format_validation(pl_module.results, trainer.global_step, is_highest)
            self._highest_auc = max(self._highest_auc, auc)
            if sys.stderr.isatty():
                # Not print: it would leave a part of the bar.
                tqdm.write(line, file=sys.stderr)
            else:
                print(line, file=sys.stderr, flush=True)

    def _start_evaluation(self, name: str, batches: float) -> None:
        self._evaluation_bar = self._bar(name, batches, 0, leave=self._fit_bar is None)

    def _bar(self, name: str, total: float, start: int, leave: bool = True) -> tqdm:
        bar = tqdm if sys.stderr.isatty() else Lines
        known = math.ceil(total) if math.isfinite(total) else None
        return bar(
            desc=name,
            total=known,
            initial=start,
            unit="step" if name == "fit" else "batch",
            bar_format=None if known is None else FIT_FORMAT if name == "fit" else EVALUATION_FORMAT,
            colour="blue" if has_colors(sys.stderr) else None,
            leave=leave,
            dynamic_ncols=True,
            mininterval=0.2,
            disable=not self._enabled or self.trainer.global_rank > 0,
        )


def format_metrics(metrics: MetricsLogger, width: int) -> str:
    """Return the newest metrics of a fit, the most important ones first, as many as fit into a number of characters."""
    latest = metrics.latest
    parts = [
        f"loss {latest[names.TRAIN_LOSS]:{'.4f' if abs(latest[names.TRAIN_LOSS]) < 1000 else '.3g'}}",
        f"{latest[names.SAMPLES_PER_SECOND]:,.0f} samples/s now",
        f"data wait {latest[names.DATA_WAIT_SHARE]:.0%}",
        f"{peak_memory()[names.PEAK_MEMORY] / 2**30:.2f} GiB",
    ]
    if metrics.gradient_norm is not None:
        parts.insert(2, f"gradient norm {metrics.gradient_norm:.3g}")
    while len(parts) > 1 and len(", ".join(parts)) > width:
        parts.pop()
    return ", ".join(parts)


def metrics_width(bar: tqdm) -> int:
    """Return the characters that a bar of a fit leaves for metrics."""
    width = LINE_COLUMNS if isinstance(bar, Lines) else columns(bar.fp)
    elapsed = bar.format_interval(bar.format_dict["elapsed"])
    taken = f"fit 100%|| steps {bar.total}/{bar.total} {elapsed}<{elapsed}, "
    return width - len(taken) - _BAR_CELLS


def format_validation(results: Mapping[str, float], step: int, highest: bool) -> str:
    """Return the line of a validation during a fit."""
    scores = ", ".join(
        f"{names.title_of(metric)} {decimal(results[name], 4)}"
        for metric in ("auc", "log_loss")
        if (name := f"{names.VALIDATION}/{metric}") in results
    )
    return f"validation at step {step:,}: {scores}{' (highest AUC so far)' * highest}"


class Lines(tqdm):
    """A progress bar that prints a line every few seconds instead of redrawing."""

    def __init__(self, **options: Any) -> None:
        self._printed = time.monotonic()
        super().__init__(**(options | {"leave": False, "dynamic_ncols": False, "ncols": LINE_COLUMNS}))

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        now = time.monotonic()
        if now - self._printed >= LINE_SECONDS:
            self._printed = now
            print(str(self).strip(), file=sys.stderr, flush=True)

    def close(self) -> None:
        # tqdm would erase a line that was never drawn.
        self.disable = True
