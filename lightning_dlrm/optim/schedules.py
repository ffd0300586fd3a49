"""Learning-rate schedules: torch LRSchedulers that compute the rate from the step and the length of the fit."""

import logging
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_dlrm.contracts.errors import UserError, one_line, require
from lightning_dlrm.contracts.own_code import place_in_own_code, with_place
from lightning_dlrm.optim.dense import name_of, takes, target_of

log = logging.getLogger("lightning_dlrm")

Schedule = Callable[[Optimizer], LRScheduler]
"""A class or a ``functools.partial`` of it: returns a schedule of an optimizer."""


def schedule_name(schedule: Schedule) -> str:
    return name_of(target_of(schedule, LRScheduler)[0])


def needs_total_steps(schedule: Schedule) -> bool:
    """Whether the schedule has a parameter ``total_steps`` that is not given."""
    target, given = target_of(schedule, LRScheduler)
    # torch's OneCycleLR takes epochs and steps_per_epoch instead.
    return takes(target, "total_steps") and given.get("total_steps") is None and given.get("steps_per_epoch") is None


def make_schedule(schedule: Schedule, optimizer: Optimizer, total_steps: Callable[[], int]) -> LRScheduler:
    """Return the schedule of an optimizer, after it has set the learning rates of the first step.

    Args:
        schedule: makes the schedule.
        optimizer: the optimizer; the schedule changes the ``lr`` of its groups.
        total_steps: returns the optimizer steps of the whole fit; called if the schedule needs them.

    Raises:
        UserError: a setting is out of range, the warm-up takes more than half of the fit, or the schedule follows a
            metric.
    """
    settings = {"total_steps": total_steps()} if needs_total_steps(schedule) else {}
    try:
        made = schedule(optimizer, **settings)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        if place_in_own_code(error) is not None:
            raise
        name = with_place(target_of(schedule, LRScheduler)[0])
        raise UserError(f"schedule {name}: {one_line(error)}") from error
    require(
        isinstance(made, LRScheduler),
        f"schedule makes a {type(made).__name__}; expected a torch.optim.lr_scheduler.LRScheduler",
    )
    require(
        not isinstance(made, ReduceLROnPlateau),
        "schedule ReduceLROnPlateau follows a metric of validations, and schedules here are stepped after each "
        "optimizer step: take the callback ReduceOnPlateau in trainer.callbacks, or a schedule such as WarmupThenDecay",
    )
    _require_short_warmup(getattr(made, "warmup_steps", 0), schedule_name(schedule), total_steps)
    return made


def _require_short_warmup(warmup_steps: int, name: str, total_steps: Callable[[], int]) -> None:
    """Refuse a warm-up of more than half of the fit: the rate would hardly reach its value."""
    if not warmup_steps:
        return
    try:
        steps = total_steps()
    except UserError:
        return  # nothing bounds the fit
    require(
        2 * warmup_steps <= steps,
        f"{name}: warmup_steps is {warmup_steps}, more than half of the fit's {steps} steps; "
        f"{f'give at most {steps // 2}' if steps > 1 else 'leave it out'}, or take a schedule with warmup_share, such "
        "as WarmupThenDecay",
    )


class StepSchedule(LRScheduler):
    """Base class of this project's schedules: a formula of the step, stepped after each optimizer step.

    Its state in a checkpoint is the number of steps, and the length of the fit. A resumed run has settings and a length
    of its own.
    """

    def rate(self, step: int, base: float) -> float:
        """Return the learning rate of an optimizer step.

        Args:
            step: number of the step, from 1.
            base: learning rate of the group before the schedule changes it.
        """
        raise TypeError(f"{type(self).__name__} does not define rate")

    def get_lr(self) -> list[float | Tensor]:
        return [self.rate(self.last_epoch + 1, base) for base in self.base_lrs]  # type: ignore[arg-type]

    def get_last_lr(self) -> list[float | Tensor]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("last_epoch", "total_steps") if hasattr(self, name)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the step of a saved state, which may be that of a scheduler of torch."""
        self.last_epoch = state_dict["last_epoch"]
        before, now = state_dict.get("total_steps"), getattr(self, "total_steps", None)
        if before is not None and now is not None and before != now:
            log.info(
                "the fit now has %s steps, and %s before: schedule %s gave the steps so far the learning rates of a "
                "fit of %s steps",
                *(f"{now:,}", f"{before:,}", type(self).__name__, f"{before:,}"),
            )
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


class Constant(StepSchedule):
    """A constant learning rate for each group."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)

    def rate(self, step: int, base: float) -> float:
        return base


class WarmupThenDecay(StepSchedule):
    """Linear warm-up, plateau, and quadratic decay to zero over the last part of the fit.

    Args:
        optimizer: optimizer whose learning rates change.
        warmup_steps: steps of linear warm-up, at most half of the fit; None for those of ``warmup_share``.
        decay_share: share of the fit's steps that the decay takes, 0 to 1.
        warmup_share: share of the fit's steps that the warm-up takes, 0 to 0.5.
        total_steps: optimizer steps of the whole fit; CTRModule gives it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int | None = None,
        decay_share: float = 0.5,
        *,
        warmup_share: float = 0.0,
        total_steps: int | None = None,
    ) -> None:
        require(
            0 <= decay_share <= 1, f"WarmupThenDecay: decay_share is {decay_share}; give a share of the fit, 0 to 1"
        )
        self.decay_share = decay_share
        self.total_steps = _known(total_steps, "WarmupThenDecay")
        self.warmup_steps = _warmup("WarmupThenDecay", warmup_steps, warmup_share, self.total_steps)
        super().__init__(optimizer)

    def rate(self, step: int, base: float) -> float:
        warm = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        decay_steps = self.decay_share * self.total_steps
        left = max(0.0, min(1.0, (self.total_steps - step + 1) / decay_steps)) if decay_steps else 1.0
        return base * warm * left**2


class Cosine(StepSchedule):
    """Linear warm-up, then half a cosine down to the end of the fit.

    Loshchilov and Hutter 2017, equation 5, without restarts.

    Args:
        optimizer: optimizer whose learning rates change.
        warmup_steps: steps of linear warm-up, at most half of the fit; None for those of ``warmup_share``.
        final_share: share of the full rate that the cosine reaches one step after the last step.
        warmup_share: share of the fit's steps that the warm-up takes, 0 to 0.5.
        total_steps: optimizer steps of the whole fit; CTRModule gives it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int | None = None,
        final_share: float = 0.0,
        *,
        warmup_share: float = 0.0,
        total_steps: int | None = None,
    ) -> None:
        require(0 <= final_share <= 1, f"Cosine: final_share is {final_share}; give a share of the rate, 0 to 1")
        self.final_share = final_share
        self.total_steps = _known(total_steps, "Cosine")
        self.warmup_steps = _warmup("Cosine", warmup_steps, warmup_share, self.total_steps)
        super().__init__(optimizer)

    def rate(self, step: int, base: float) -> float:
        if step <= self.warmup_steps:
            return base * step / self.warmup_steps
        done = min(1.0, (step - 1 - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return base * (self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * done)))


class WarmupQuadraticDecay(StepSchedule):
    """Linear warm-up, plateau, quadratic decay: the schedule of the code published with DLRM.

    As published, warm-up goes from base / warmup_steps to base (1 - 1 / warmup_steps), and that rate is kept until
    decay_start_step. The decay starts from base, and its last rate is kept.

    Args:
        optimizer: optimizer whose learning rates change.
        warmup_steps: steps of linear warm-up, at most half of the fit.
        decay_start_step: first step of the decay; not before the end of the warm-up.
        decay_steps: length of the decay; 0 for none.
    """

    MIN_LEARNING_RATE = 1e-7
    """Lowest rate of the decay, as published."""

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int, decay_start_step: int = 0, decay_steps: int = 0
    ) -> None:
        require(
            min(warmup_steps, decay_start_step, decay_steps) >= 0,
            f"WarmupQuadraticDecay: warmup_steps {warmup_steps}, decay_start_step {decay_start_step}, "
            f"decay_steps {decay_steps}; expected numbers of 0 or more",
        )
        require(
            not decay_steps or decay_start_step >= warmup_steps,
            f"WarmupQuadraticDecay: the decay starts at step {decay_start_step}, before the warm-up of "
            f"{warmup_steps} steps ends; set decay_start_step to {warmup_steps} or later",
        )
        self.warmup_steps = warmup_steps
        self.decay_start_step = decay_start_step
        self.decay_steps = decay_steps
        super().__init__(optimizer)

    def rate(self, step: int, base: float) -> float:
        if step < self.warmup_steps:
            return base * step / self.warmup_steps
        if self.decay_steps == 0:
            return base
        if step < self.decay_start_step:
            return base * (self.warmup_steps - 1) / self.warmup_steps if self.warmup_steps > 1 else base
        decayed = min(step - self.decay_start_step, self.decay_steps - 1)
        return max(self.MIN_LEARNING_RATE, base * ((self.decay_steps - decayed) / self.decay_steps) ** 2)


def _known(total_steps: int | None, name: str) -> int:
    if total_steps is None:
        raise UserError(f"{name} depends on the fit's length: give total_steps, or use it as CTRModule's schedule")
    return total_steps


def _warmup(name: str, steps: int | None, share: float, total_steps: int) -> int:
    """Return the steps of a warm-up, given as steps or as a share of the fit.

    Raises:
        UserError: they are out of range.
    """
    require(0 <= share <= 0.5, f"{name}: warmup_share is {share}; give a share of the fit, 0 to 0.5")
    require(steps is None or steps >= 0, f"{name}: warmup_steps is {steps}; give 0 or more")
    return round(share * total_steps) if steps is None else steps
