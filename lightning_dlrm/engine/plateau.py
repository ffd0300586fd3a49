"""FuxiCTR's rule for a metric that stops improving: lower the learning rates, end the fit, keep the best parameters."""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import pytorch_lightning as pl

from lightning_dlrm.contracts.errors import nearest_first, require
from lightning_dlrm.engine.checkpoint_state import optimizer_of
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.optim.schedules import Constant, schedule_name
from lightning_dlrm.tracking import names

log = logging.getLogger("lightning_dlrm")


class ReduceOnPlateau(pl.Callback):
    """Callback that lowers all learning rates after a validation without improvement, and ends the fit after several.

    A value v is an improvement unless v < best + min_delta (mode max), or v > best - min_delta (mode min); NaN counts
    as an improvement. The rates drop at the first validation without improvement. Training goes on from the current
    parameters; with checkpoints in a run folder, ``checkpoints/best`` is the last improvement, and the module has its
    parameters at the end of the fit.

    Args:
        monitor: metric of validations; or metric -> weight, for a weighted sum of several.
        mode: max if higher values are better, min if lower values are better.
        patience: number of validations in a row without improvement that ends the fit; None to never end it.
        factor: multiplied with the rates; 1 leaves them as they are.
        min_rate: lowest rate; a lower one is raised to it.
        min_delta: smallest improvement.

    Raises:
        UserError: an argument is out of range; or, in a fit, validations do not yield a monitored metric.
    """

    def __init__(
        self,
        monitor: str | Mapping[str, float] = f"{names.VALIDATION}/auc",
        mode: Literal["max", "min"] = "max",
        patience: int | None = 2,
        factor: float = 0.1,
        min_rate: float = 1e-6,
        min_delta: float = 1e-6,
    ) -> None:
        require(mode in ("max", "min"), f"ReduceOnPlateau: mode {mode!r} is not one of max, min")
        require(patience is None or patience >= 1, f"ReduceOnPlateau: patience is {patience}; expected 1 or more")
        require(0 < factor <= 1, f"ReduceOnPlateau: factor is {factor}; expected a number above 0, at most 1")
        require(
            min_rate >= 0 and min_delta >= 0,
            f"ReduceOnPlateau: min_rate is {min_rate} and min_delta {min_delta}; expected numbers of 0 or more",
        )
        self.weights = {monitor: 1.0} if isinstance(monitor, str) else dict(monitor)
        self.mode = mode
        self.patience = patience
        self.factor = factor
        self.min_rate = min_rate
        self.min_delta = min_delta
        self.best = -math.inf if mode == "max" else math.inf
        """The value of the last improvement."""
        self.count = 0
        """Number of validations in a row without improvement."""
        self.rates: list[float] = []
        """The learning rate of each group of the optimizer; empty before the first validation."""

    @property
    def improved(self) -> bool:
        """Whether the last validation was an improvement."""
        return self.count == 0

    @property
    def stops(self) -> bool:
        """Whether the last validation ends the fit."""
        return self.patience is not None and self.count >= self.patience

    def observe(self, metrics: Mapping[str, float], rates: Sequence[float]) -> None:
        """Take the metrics of a validation; ``rates`` are the learning rates in it, and become ``self.rates``.

        A metric that is missing counts as 0, as in FuxiCTR; a fit refuses missing metrics before.
        """
        value = sum(weight * metrics.get(name, 0.0) for name, weight in self.weights.items())
        self.rates = list(rates)
        is_worse = value < self.best + self.min_delta if self.mode == "max" else value > self.best - self.min_delta
        if not is_worse:
            self.best, self.count = value, 0
            return
        self.count += 1
        if self.factor < 1:
            self.rates = [max(self.factor * rate, self.min_rate) for rate in rates]
            listed = ", ".join(f"{old:g} to {new:g}" for old, new in zip(rates, self.rates, strict=True))
            what = " + ".join(self.weights)
            log.info("%s is %.6f, no better than %.6f: learning rates %s", what, value, self.best, listed)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "count": self.count, "rates": self.rates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.count, self.rates = state_dict["best"], state_dict["count"], list(state_dict["rates"])

    def setup(self, trainer: pl.Trainer, pl_module: CTRModule, stage: str) -> None:  # type: ignore[override]
        name = schedule_name(pl_module.schedule)
        require(
            stage != "fit" or name == Constant.__name__,
            f"trainer.callbacks: ReduceOnPlateau sets the learning rates, and so does model.schedule {name}: leave one "
            "of them out",
        )
        # Datamodules without the attribute may give batches with groups.
        grouped = getattr(trainer.datamodule, "group", "") is not None  # type: ignore[attr-defined]
        metrics = (*names.METRICS, *(names.BY_GROUP if grouped else ()))
        self._check_monitors([f"{names.VALIDATION}/{metric}" for metric in metrics])

    def on_train_start(self, trainer: pl.Trainer, pl_module: CTRModule) -> None:  # type: ignore[override]
        if self.rates:
            self._set_rates(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: CTRModule) -> None:  # type: ignore[override]
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._check_monitors(pl_module.results)
        self.observe(pl_module.results, [float(group["lr"]) for group in optimizer_of(pl_module).param_groups])
        self._set_rates(trainer, pl_module)
        trainer.should_stop |= self.stops

    def _check_monitors(self, yielded: Collection[str]) -> None:
        """Check that validations yield every monitored metric.

        Raises:
            UserError: they do not.
        """
        by_group = f"{names.VALIDATION}/{names.GROUP_AUC}"
        remedy = "" if by_group in yielded else f"; {by_group} needs a kept column as the datamodule's group"
        for monitor in self.weights:
            require(
                monitor in yielded,
                f"ReduceOnPlateau: monitor is {monitor}, which validations do not report"
                f"{nearest_first(monitor, yielded, 'expected one of')}{remedy}",
            )

    def _set_rates(self, trainer: pl.Trainer, module: CTRModule) -> None:
        for group, rate in zip(optimizer_of(module).param_groups, self.rates, strict=True):
            group["lr"] = rate
        for config in trainer.lr_scheduler_configs:
            # A constant schedule sets its base rates again after each step.
            config.scheduler.base_lrs = list(self.rates)
