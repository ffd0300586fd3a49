"""The choice of the checkpoint from which a command continues, and the continuation of an interrupted fit."""

import logging
from pathlib import Path

import pytorch_lightning as pl
from jsonargparse import Namespace

from lightning_dlrm.cli.job import Job
from lightning_dlrm.cli.launchers import is_requeued, run_of_requeued_job
from lightning_dlrm.cli.parser import CommandParser
from lightning_dlrm.cli.short_help import EVALUATIONS
from lightning_dlrm.cli.trust import trusting_command
from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.terminal import wrapped
from lightning_dlrm.engine.checkpointing import newest_checkpoint, whole_checkpoints
from lightning_dlrm.engine.stopping import what_ended
from lightning_dlrm.sharding.checkpoint import CheckpointReader, resolve_checkpoint
from lightning_dlrm.tracking import names
from lightning_dlrm.tracking.run_folder import CONFIG, RunFolder

log = logging.getLogger("lightning_dlrm")


def configuration_text(parser: CommandParser, settings: Namespace) -> str:
    """Return the ``config.yaml`` of a run, which later commands open with --config; it does not say what to resume."""
    settings = settings.clone()
    settings.ckpt_path = settings.resume = settings.run_dir = None
    settings.allow_nonfinite = False
    return parser.dump(settings, skip_unset=False, skip_validation=True)


def resume_requeued_job(parser: CommandParser, settings: Namespace) -> None:
    """Let a fit that SLURM has started again continue where it was; it is started with the command of the first time.

    Args:
        parser: the parser of the fit.
        settings: of the fit; its ``run_dir``, ``resume`` and ``ckpt_path`` are set.
    """
    if not is_requeued():
        return
    if settings.run_dir is None:
        model = settings.model.network.class_path.rpartition(".")[2].lower()
        found = run_of_requeued_job(model, configuration_text(parser, settings))
        settings.run_dir = None if found is None else str(found)
    if settings.run_dir is None:
        return
    run = RunFolder(Path(settings.run_dir))
    # A fit that started from a checkpoint of another run continues from its own.
    if run.path.is_dir() and (settings.ckpt_path is None or run.checkpoints.is_dir()):
        settings.resume, settings.ckpt_path = "auto", None


def choose_checkpoint(command: str, settings: Namespace) -> list[Path]:
    """Set ``ckpt_path`` to the checkpoint folder that the command opens, or to None if a fit starts from scratch.

    Returns:
        The older checkpoints, newest first, that ``--resume auto`` takes if that one turns out to be damaged.

    Raises:
        UserError: the options contradict each other, the checkpoint does not exist, or the run to resume has had
            checkpoints and has no whole one.
    """
    path, run_dir = settings.ckpt_path, settings.run_dir
    in_run = path in ("best", "last") and run_dir is not None
    require(
        in_run or path not in ("best", "last") or Path(path).exists(),
        f"--ckpt_path {path} is a checkpoint of the run in --run_dir, which is missing: give --run_dir RUN, or "
        f"the path RUN/checkpoints/{path}",
    )
    folder = RunFolder(Path(run_dir)).checkpoints if in_run else Path()
    if command in EVALUATIONS:
        require(settings.resume is None, f"--resume is for fit; {command} takes --ckpt_path")
        require(path is not None, f"{command} needs a checkpoint: give --ckpt_path, such as runs/NAME/checkpoints/best")
        settings.ckpt_path = str(resolve_checkpoint(folder / path))
    elif settings.resume is None:
        settings.ckpt_path = None if path is None else str(resolve_checkpoint(folder / path))
        # The run of a checkpoint that is named within it continues.
        settings.resume = "auto" if in_run else None
    elif run_dir is None:
        raise UserError("--resume auto looks for checkpoints in a run folder: give it with --run_dir")
    elif path is not None:
        raise UserError("--resume auto and --ckpt_path both choose a checkpoint: give one of them")
    else:
        run = RunFolder(Path(run_dir))
        found = whole_checkpoints(run.checkpoints)
        if found:
            settings.ckpt_path = str(found[0])
            return found[1:]
        require(
            names.STEP not in run.final(),
            f"{run_dir} has results of step {run.final().get(names.STEP)} but no checkpoint to continue from: restore "
            "its checkpoints, or choose another --run_dir",
        )
        log.info("no checkpoint in %s yet: starting a new run", run_dir)
    return []


def is_finished(job: Job, trainer: pl.Trainer) -> bool:
    """Return whether a fit has no step left after its checkpoint and its results are written; print that in a line.

    Nothing is written to the run folder of a finished run.
    """
    if job.command != "fit" or job.settings.ckpt_path is None:
        return False
    try:
        checkpoint = CheckpointReader(Path(job.settings.ckpt_path)).rest()
    except UserError:
        # The fit skips a damaged checkpoint, or reports the fault.
        return False
    if "loops" not in checkpoint:
        return False
    # As Lightning attaches them at the start of a fit; the length of an epoch depends on the trainer.
    trainer.datamodule, job.datamodule.trainer = job.datamodule, trainer  # type: ignore[attr-defined]
    settings, step = what_ended(trainer, checkpoint), checkpoint["global_step"]
    # A run that was killed after its last checkpoint has no results yet.
    is_resumed = job.settings.resume is not None
    if not settings or (is_resumed and RunFolder(Path(job.settings.run_dir)).final().get(names.STEP) != step):
        return False
    if trainer.is_global_zero:
        # The state of EarlyStopping restores its bounds, such as its patience.
        remedies = ["remove" if name.startswith("EarlyStopping") else "raise or remove" for name in settings]
        ends = zip(settings, remedies, strict=True)
        words = "; ".join(f"{name}: to continue training, {remedy} it" for name, remedy in ends)
        print(wrapped([f"already finished at step {step:,}; nothing to do ({words})"]))
    return True


def resume_command(run: Path) -> str:
    """Return the command that continues the fit of a run folder."""
    return trusting_command("fit", "--config", str(run / CONFIG), "--run_dir", str(run), "--resume", "auto")


def log_what_is_left(job: Job) -> None:
    """Log what the run folder of a fit that failed has."""
    parts = ["metrics"] if job.folder.metrics.exists() else []
    try:
        newest = newest_checkpoint(job.folder.checkpoints)
        parts.append(
            f"a checkpoint of step {CheckpointReader(newest).header[names.STEP]:,}" if newest else "no checkpoint"
        )
    except UserError as error:
        parts.append(str(error))
    log.info("run folder %s is kept; it has %s", job.folder.path, " and ".join(parts))


def log_how_to_resume(job: Job, trainer: pl.Trainer) -> None:
    """Log the command that continues an interrupted fit."""
    if job.command != "fit" or not trainer.is_global_zero:
        return
    step, folder = f"{trainer.global_step:,}", job.folder
    try:
        newest = newest_checkpoint(folder.checkpoints)
    except UserError as error:
        # The exit code stays that of the signal.
        log.warning("interrupted at step %s; %s", step, error)
        return
    if newest is None:
        log.info("interrupted at step %s, before the first checkpoint: --resume auto starts again in this folder", step)
        return
    saved = f"{CheckpointReader(newest).header[names.STEP]:,}"
    behind = "" if saved == step else f", its newest checkpoint at step {saved}"
    log.info("interrupted at step %s%s; continue with: %s", step, behind, resume_command(folder.path))
