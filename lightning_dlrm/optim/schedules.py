"""Learning-rate schedules: pure functions of the step and of the fit's length."""

import math

from lightning_dlrm.contracts.errors import UserError


class Schedule:
    """Base of the schedules."""

    needs_total_steps = False
    """Whether ``learning_rate`` reads ``total_steps``."""

    def learning_rate(self, step: int, base: float, total_steps: int | None = None) -> float:
        """The rate of one optimiser step.

        Args:
            step: counted from 1.
            base: the rule's own rate.
            total_steps: of the whole fit; None where nobody knows.
        """
        raise TypeError(f"{type(self).__name__} does not define learning_rate")


class Constant(Schedule):
    """The rule's own learning rate at every step."""

    def learning_rate(self, step: int, base: float, total_steps: int | None = None) -> float:
        return base


class WarmupThenDecay(Schedule):
    """Linear warm-up, plateau, and quadratic decay to zero over the last part of the fit, however long it is.

    Args:
        warmup_steps: steps of linear warm-up.
        decay_share: share of the fit's steps that the decay takes, 0 to 1.
    """

    needs_total_steps = True

    def __init__(self, warmup_steps: int = 0, decay_share: float = 0.5) -> None:
        if warmup_steps < 0 or not 0 <= decay_share <= 1:
            raise UserError(
                f"WarmupThenDecay: warmup_steps is {warmup_steps} and decay_share {decay_share}; "
                "expected 0 or more, and 0 to 1"
            )
        self.warmup_steps = warmup_steps
        self.decay_share = decay_share

    def learning_rate(self, step: int, base: float, total_steps: int | None = None) -> float:
        assert total_steps is not None
        warm = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        decay_steps = self.decay_share * total_steps
        left = max(0.0, min(1.0, (total_steps - step + 1) / decay_steps)) if decay_steps else 1.0
        return base * warm * left**2


class Cosine(Schedule):
    """Linear warm-up, then half a cosine down to the end of the fit, however long it is.

    Loshchilov and Hutter 2017, equation 5, without restarts.

    Args:
        warmup_steps: steps of linear warm-up.
        final_share: of the full rate, which the cosine would reach one step after the last.
    """

    needs_total_steps = True

    def __init__(self, warmup_steps: int = 0, final_share: float = 0.0) -> None:
        if warmup_steps < 0 or not 0 <= final_share <= 1:
            raise UserError(
                f"Cosine: warmup_steps is {warmup_steps} and final_share {final_share}; expected 0 or more, and 0 to 1"
            )
        self.warmup_steps = warmup_steps
        self.final_share = final_share

    def learning_rate(self, step: int, base: float, total_steps: int | None = None) -> float:
        assert total_steps is not None
        if step <= self.warmup_steps:
            return base * step / self.warmup_steps
        done = min(1.0, (step - 1 - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        return base * (self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * done)))


class WarmupQuadraticDecay(Schedule):
    """Linear warm-up, plateau, quadratic decay: the schedule of the code published with DLRM.

    As published, warm-up leads from base / warmup_steps to base (1 - 1 / warmup_steps), which is
    kept up to decay_start_step; the decay then starts from base, and its last rate stays.

    Args:
        warmup_steps: steps of linear warm-up.
        decay_start_step: first step of the decay; not before the warm-up's end.
        decay_steps: length of the decay; 0 for none.
    """

    MIN_LEARNING_RATE = 1e-7
    """The decay goes no lower, as published."""

    def __init__(self, warmup_steps: int, decay_start_step: int = 0, decay_steps: int = 0) -> None:
        if min(warmup_steps, decay_start_step, decay_steps) < 0:
            raise UserError(
                f"WarmupQuadraticDecay: warmup_steps {warmup_steps}, decay_start_step {decay_start_step}, "
                f"decay_steps {decay_steps}; expected numbers of 0 or more"
            )
        if decay_steps and decay_start_step < warmup_steps:
            raise UserError(
                f"WarmupQuadraticDecay: the decay starts at step {decay_start_step}, before the warm-up of "
                f"{warmup_steps} steps ends; set decay_start_step to {warmup_steps} or later"
            )
        self.warmup_steps = warmup_steps
        self.decay_start_step = decay_start_step
        self.decay_steps = decay_steps

    def learning_rate(self, step: int, base: float, total_steps: int | None = None) -> float:
        if step < self.warmup_steps:
            return base * step / self.warmup_steps
        if self.decay_steps == 0:
            return base
        if step < self.decay_start_step:
            return base * (self.warmup_steps - 1) / self.warmup_steps if self.warmup_steps > 1 else base
        decayed = min(step - self.decay_start_step, self.decay_steps - 1)
        return max(self.MIN_LEARNING_RATE, base * ((self.decay_steps - decayed) / self.decay_steps) ** 2)
