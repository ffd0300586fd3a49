"""The number of optimizer steps of a fit, and the setting of the trainer that ends it."""

import math
from typing import NamedTuple

import pytorch_lightning as pl
from pytorch_lightning.callbacks import GradientAccumulationScheduler

from lightning_dlrm.contracts.errors import require


class FitLength(NamedTuple):
    """The last step of a fit that no callback stops earlier."""

    steps: float
    """Infinite if neither ``max_steps`` nor ``max_epochs`` bounds the fit."""
    setting: str
    """The setting that ends the fit, such as ``trainer.max_epochs 1``."""


def _schedule(trainer: pl.Trainer) -> GradientAccumulationScheduler | None:
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((each for each in callbacks if isinstance(each, GradientAccumulationScheduler)), None)


def micro_batches(trainer: pl.Trainer, epoch: int) -> int:
    """Return the number of batches of an optimizer step in an epoch, counted from 0."""
    schedule = _schedule(trainer)
    return schedule.get_accumulate_grad_batches(epoch) if schedule else trainer.accumulate_grad_batches


def all_micro_batches(trainer: pl.Trainer) -> set[int]:
    """Return the numbers of batches of an optimizer step over all epochs."""
    schedule = _schedule(trainer)
    return set(schedule.scheduling.values()) if schedule else {trainer.accumulate_grad_batches}


def steps_of_epochs(trainer: pl.Trainer, batches: int) -> int:
    """Return the optimizer steps of ``max_epochs`` epochs of ``batches`` batches."""
    return sum(-(-batches // micro_batches(trainer, epoch)) for epoch in range(trainer.max_epochs or 0))


def planned_steps(trainer: pl.Trainer, user: str) -> int:
    """Return the optimizer steps of a fit before its data are loaded.

    Lightning's own estimate would load the data and lose the position of a resumed run.

    Args:
        trainer: trainer of the fit.
        user: name of what needs the number, for the message.

    Raises:
        UserError: neither the trainer nor the data bound the fit.
    """
    batches = getattr(trainer.datamodule, "training_batches", None)  # type: ignore[attr-defined]
    if batches is None or trainer.max_epochs in (None, -1):
        require(trainer.max_steps != -1, f"{user} needs the length of the fit: set trainer.max_steps")
        return trainer.max_steps
    steps = steps_of_epochs(trainer, batches)
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)


def fit_length(trainer: pl.Trainer) -> FitLength:
    """Return the length of a fit whose training batches are known to the trainer."""
    bounds = [FitLength(math.inf, "no bound")]
    if trainer.max_steps != -1:
        bounds.append(FitLength(trainer.max_steps, f"trainer.max_steps {trainer.max_steps:,}"))
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if epochs not in (None, -1) and math.isfinite(batches):
        bounds.append(FitLength(steps_of_epochs(trainer, int(batches)), f"trainer.max_epochs {epochs:,}"))
    return min(bounds)


def refuse_longer_fit(end: int, steps: float) -> None:
    """
    Raises:
        UserError: the fit takes more steps than a OneCycleLR, which torch ends with an error.
    """
    require(
        steps <= end,
        f"the schedule OneCycleLR ends at step {end:,}, but this fit takes more steps: set trainer.max_steps to {end} "
        "or less, or start a new run",
    )


def unreached_settings(trainer: pl.Trainer, length: FitLength) -> list[str]:
    """Return the settings that ask for more steps or epochs than the fit takes."""
    given = {"min_epochs": (trainer.min_epochs, math.inf), "min_steps": (trainer.min_steps, length.steps)}
    given["max_steps"] = trainer.max_steps, length.steps
    if trainer.max_epochs not in (None, -1):
        given["min_epochs"] = trainer.min_epochs, float(trainer.max_epochs or 0)
    return [f"trainer.{name} {value:,}" for name, (value, reached) in given.items() if (value or 0) > reached]
