"""The progress display: a bar on a terminal, a line every few seconds elsewhere."""

import math
import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from tqdm import tqdm

from lightning_dlrm.engine.fit_length import fit_length
from lightning_dlrm.engine.metrics_logger import MetricsLogger
from lightning_dlrm.tracking import names

# Without steps/s, since samples/s are shown; so it fits into 80 columns.
FIT_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
LINE_SECONDS = 10.0
"""Between two lines without a terminal: redraws would fill a log."""


class RunProgress(ProgressBar):
    """Progress bar with steps, remaining time, samples/s, wait for data and loss of a fit, or batches of an evaluation.

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

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._fit_bar, self._shown_step = None, trainer.global_step

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
            self._shown_step, latest = metrics.logged_step, metrics.latest
            self._fit_bar.set_postfix_str(
                f"{latest[names.SAMPLES_PER_SECOND]:,.0f} samples/s, data wait {latest[names.DATA_WAIT_SHARE]:.0%}, "
                f"loss {latest[names.TRAIN_LOSS]:.4f}",
                False,
            )
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

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._evaluation_bar is not None:
            self._evaluation_bar.close()

    on_test_end = on_predict_end = on_validation_end

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
            bar_format=FIT_FORMAT if name == "fit" and known is not None else None,
            leave=leave,
            dynamic_ncols=True,
            mininterval=0.2,
            disable=not self._enabled or self.trainer.global_rank > 0,
        )


class Lines(tqdm):
    """A progress bar that prints a line every few seconds instead of redrawing."""

    def __init__(self, **options: Any) -> None:
        self._printed = time.monotonic()
        super().__init__(**(options | {"leave": False, "dynamic_ncols": False, "ncols": 110}))

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        now = time.monotonic()
        if now - self._printed >= LINE_SECONDS:
            self._printed = now
            print(str(self).strip(), file=sys.stderr, flush=True)

    def close(self) -> None:
        # tqdm would erase a line that was never drawn.
        self.disable = True
