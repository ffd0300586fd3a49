"""Whether the configurations of a comparison were trained long enough, or longer than their validation AUC rose."""

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_dlrm.compare.results import Comparison, pair_of, ranked
from lightning_dlrm.compare.runs import Arm
from lightning_dlrm.contracts.errors import joined
from lightning_dlrm.tracking import names

_FEW_STEPS = 1000
"""Steps from which on a training is not called too short: one epoch of a larger log, where an AUC rises because more
samples are seen, and rises in all configurations."""
_LATE_RISE = 0.01
"""Smallest ``late_rise`` that calls a training too short."""
_LATE_SHARE = 0.25
"""Smallest share of the distance to the first configuration for the same: a smaller rise does not change the order."""
_FALL = 0.01
"""Smallest fall of a validation AUC from the best validation to the last that is mentioned."""
_LONGER = 3
"""Factor of the longer training that is advised."""


@dataclass(frozen=True, kw_only=True)
class Improving:
    """A configuration that was still improving when its training ended."""

    arm: str
    rise: float
    """Its ``late_rise``."""
    behind: float
    """Distance of its AUC from that of the first configuration; 0 for the first."""


def still_improving(comparison: Comparison) -> list[Improving]:
    """Return the configurations of few steps that were still improving by a large part of their distance to the first,
    so that a longer training may change the order. The first is one of them if it was improving too, and another was or
    the second is not surely behind."""
    arms = _trained(comparison)
    if len(arms) < 2:
        return []
    first, *others = arms
    pairs = [pair_of(comparison, first, arm) for arm in others]
    behind = [0.0, *(pair.interval.value for pair in pairs)]
    found = [
        Improving(arm=arm.name, rise=arm.late_rise, behind=distance)
        for arm, distance in zip(arms, behind, strict=True)
        if arm.span(names.STEP)[1] < _FEW_STEPS
        and arm.fall < _FALL
        and arm.late_rise is not None
        and arm.late_rise >= max(_LATE_RISE, _LATE_SHARE * distance)
    ]
    return [] if [one.arm for one in found] == [first.name] and pairs[0].interval.low > 0 else found


def _trained(comparison: Comparison) -> list[Arm]:
    """Return the ranked configurations with a run that trained; empty if their data differ."""
    arms = [] if comparison.warnings else ranked(comparison)
    return [arm for arm in arms if len(comparison.random_runs(arm)) < len(arm.runs)]


def improving_words(comparison: Comparison) -> tuple[str, str, str]:
    """Return which configurations were still improving; by how much, or why that is not known; and what to do."""
    found = still_improving(comparison)
    if not found:
        return "", *_doubt(comparison)
    arms = [arm for arm in comparison.arms if arm.name in {one.arm for one in found}]
    listed = joined([one.arm for one in found], "and")
    if len(found) == len(comparison.arms):
        listed = "both configurations" if len(found) == 2 else "all configurations"
    was, its = ("was", "its") if len(found) == 1 else ("were", "their")
    places = [f"{one.behind:.3f} behind" if one.behind else "the highest AUC" for one in found]
    rises = joined([f"{one.rise:.3f} for {one.arm} ({of})" for one, of in zip(found, places, strict=True)], "and")
    # Either may end a training, so that both have to grow.
    bounds = {
        key: max(arm.settings.get(key) or -1 for arm in arms) for key in ("trainer.max_steps", "trainer.max_epochs")
    }
    longer = [f"--{key} {_LONGER * bound}" for key, bound in bounds.items() if bound > 0]
    return (
        f"But {listed} {was} still improving when {its} training ended.",
        f"In the last part of the training the validation AUC rose by {rises}.",
        f"Before you trust this ranking, train all configurations longer{_with(comparison, longer)}.",
    )


def _doubt(comparison: Comparison) -> tuple[str, str]:
    """Return why validations do not show whether a training of few steps was long enough, and what to do; empty if they
    do, or if a single configuration trained."""
    arms = _trained(comparison)
    short = [arm for arm in arms if arm.span(names.STEP)[1] < _FEW_STEPS]
    unknown = [int(arm.span(names.STEP)[1]) for arm in short if arm.late_rise is None]
    if len(arms) > 1 and unknown:
        interval = f"--trainer.val_check_interval {max(1, min(unknown) // 2)}"
        return (
            "Whether a configuration was still improving is not known without a validation in the middle of the "
            "training.",
            f"Train again with such a validation{_with(comparison, [interval])}.",
        )
    if len(arms) > 1 and any(map(_decays, short)) and not fallen(comparison):
        return (
            "Flat curves do not show that the training was long enough, because the learning rate decays: a longer "
            "training can still change the ranking.",
            "",
        )
    return "", ""


def _decays(arm: Arm) -> bool:
    """Return whether the learning rate of a configuration decays until the end of the fit, however long that is."""
    schedule = str(arm.settings.get("model.schedule.class_path")).rpartition(".")[2]
    return schedule in ("Cosine", "WarmupThenDecay") and arm.settings.get("model.schedule.init_args.decay_share") != 0


def _with(comparison: Comparison, options: Sequence[str]) -> str:
    """Return the options of another training, and that an experiment needs another folder for it."""
    how = f", for example with {' '.join(options)}" if options else ""
    return how + f"{' and' if how else ', with'} another --output" * comparison.experiment


@dataclass(frozen=True, kw_only=True)
class Fallen:
    """A configuration whose validation AUC fell before its training ended."""

    arm: str
    fall: float
    """Fall of its validation AUC from the best validation to the last, the mean over its runs."""
    best_steps: Sequence[int]
    """Step of the best validation of each run."""
    steps: int
    """Steps of the training."""

    @property
    def when(self) -> str:
        """Return when it was best, such as "best at step 18 of 114"."""
        least, most = min(self.best_steps), max(self.best_steps)
        return f"best at step{f' {least:,}' if least == most else f's {least:,} to {most:,}'} of {self.steps:,}"


def fallen(comparison: Comparison) -> list[Fallen]:
    """Return the configurations whose last validation AUC is clearly below the best."""
    return [
        Fallen(
            arm=arm.name,
            fall=arm.fall,
            best_steps=[int(run.best[names.STEP]) for run in arm.runs],
            steps=int(arm.span(names.STEP)[1]),
        )
        for arm in ranked(comparison)
        if arm.fall >= _FALL
    ]


def fall_words(comparison: Comparison) -> tuple[str, str]:
    """Return which configurations were best before the end of their training, with the checkpoint that was scored, and
    what to do; empty if none was."""
    found = fallen(comparison)
    if not found:
        return "", ""
    falls = joined([f"{one.fall:.3f} for {one.arm} ({one.when})" for one in found], "and")
    # Other configurations may need a longer training, and all have the same.
    enough = "" if still_improving(comparison) else "A shorter training is enough."
    return (
        f"After its best, the validation AUC fell by {falls}: a sign of overfitting. The scores are those of "
        "checkpoints/best, from before the fall."
    ), enough
