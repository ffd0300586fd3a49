"""``fit``, ``validate``, ``test`` and ``predict``: parse, check, build, run, report, in this order.

``run`` calls, from top to bottom:

1. parse: ``build_trainer_parser`` and ``parse`` (parser.py)
2. check: ``resume_requeued_job``, ``choose_checkpoint`` (resuming.py)
3. build: ``instantiate``, ``build_callbacks``, ``build_trainer``; ``is_finished`` ends the command here;
   ``prepare_run_folder``
4. run: ``log_start``, ``call_trainer``
5. report: ``report_fit``, ``report_evaluation``
"""

import inspect
import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from jsonargparse import Namespace
from pytorch_lightning.callbacks import EarlyStopping, ProgressBar, Timer
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException

from lightning_dlrm.cli.configs import flat
from lightning_dlrm.cli.job import Job
from lightning_dlrm.cli.launchers import check_started_processes, requeue, slurm_job, slurm_plugins
from lightning_dlrm.cli.loggers import check_api_key, finish_loggers, make_loggers, wandb_address
from lightning_dlrm.cli.parser import (
    CommandParser,
    build_trainer_parser,
    configure_logging,
    fill_data_seed,
    parse,
    plain_document,
)
from lightning_dlrm.cli.predictions import PredictionWriter
from lightning_dlrm.cli.report import (
    cells_note,
    demo_note,
    early_stop_note,
    evaluation_report,
    final_report,
    precision_note,
    prediction_report,
    published_notes,
    setup_note,
    size_note,
)
from lightning_dlrm.cli.resuming import (
    choose_checkpoint,
    configuration_text,
    is_finished,
    log_how_to_resume,
    log_what_is_left,
    resume_requeued_job,
)
from lightning_dlrm.cli.short_help import EVALUATIONS
from lightning_dlrm.cli.trainer_settings import (
    as_list,
    check_early_stopping_after_validation,
    check_processes,
    validate_trainer_settings,
)
from lightning_dlrm.cli.version import code_version, versions
from lightning_dlrm.contracts.errors import UserError, require, shown_path
from lightning_dlrm.contracts.interrupts import exit_on_signals
from lightning_dlrm.engine.batch_norm import SyncBatchNorm
from lightning_dlrm.engine.checkpoint_state import check_encoding
from lightning_dlrm.engine.checkpointing import FolderCheckpointIO, RunCheckpoints, saved_steps
from lightning_dlrm.engine.fit_length import fit_length
from lightning_dlrm.engine.metrics_logger import CurveWriter, EvaluationWriter, MetricsLogger, NormLogger
from lightning_dlrm.engine.plateau import ReduceOnPlateau
from lightning_dlrm.engine.progress import RunProgress
from lightning_dlrm.engine.stopping import FinalValidation, StopAtAUC, StopOnSignal
from lightning_dlrm.engine.strategy import EmbeddingShardedDDP
from lightning_dlrm.sharding.checkpoint import CheckpointReader
from lightning_dlrm.sharding.collectives import is_lost_rank
from lightning_dlrm.tracking import names
from lightning_dlrm.tracking.lock import FolderLock
from lightning_dlrm.tracking.run_folder import CONFIG, PREDICTIONS, RunFolder

log = logging.getLogger("lightning_dlrm")


def run(command: str, arguments: Sequence[str]) -> int:
    """Run a command of the Trainer; return its exit code.

    Args:
        command: fit, validate, test or predict.
        arguments: its options.

    Raises:
        UserError: a setting is wrong, the data or a checkpoint do not fit, or another rank was lost.
        SystemExit: with 128 + signal after SIGTERM, SIGHUP or SIGINT.
    """
    configure_logging()
    parser = build_trainer_parser(command)
    settings = parse(parser, arguments)
    fill_data_seed(settings)
    if command == "fit":
        resume_requeued_job(parser, settings)
    steps = [] if settings.run_dir is None else saved_steps(RunFolder(Path(settings.run_dir)).checkpoints)
    older = choose_checkpoint(command, settings)
    job, trainer_settings = instantiate(command, parser, settings)
    job.fallbacks, job.saved_steps = older, steps
    trainer = build_trainer(job, trainer_settings, build_callbacks(job, trainer_settings))
    # Before the run folder is made, and loggers start.
    check_api_key(command, trainer_settings["logger"], settings.wandb)
    if settings.ckpt_path is not None and not older:
        check_encoding(job.module.schema, CheckpointReader(Path(settings.ckpt_path)))
    if is_finished(job, trainer):
        return 0
    with finishing(job, trainer):
        if trainer.is_global_zero:
            prepare_run_folder(job, trainer, trainer_settings["logger"])
        log_start(job, trainer)
        call_trainer(job, trainer)
        if command == "fit":
            report_fit(job, trainer)
        else:
            report_evaluation(job, trainer)
    return 0


# --- build -----------------------------------------------------------------------------------------


def instantiate(command: str, parser: CommandParser, settings: Namespace) -> tuple[Job, dict[str, Any]]:
    """Build the model, the data, and the objects among the Trainer's arguments; return these arguments.

    Raises:
        UserError: a setting is out of range, or the model does not fit the data.
    """
    to_build = settings.clone()
    check_early_stopping_after_validation(to_build.trainer)
    built = parser.build(to_build)
    # Checkpoints keep it, so that the module can be built from them.
    built.model.configuration = plain_document(parser, settings)["model"]
    trainer_settings = built.trainer.as_dict()
    if trainer_settings["precision"] == "bf16":
        # Lightning warns of this short name.
        trainer_settings["precision"] = "bf16-mixed"
    # Other datamodules may give batches with groups.
    grouped = getattr(built.data, "group", "") is not None
    validate_trainer_settings(trainer_settings, settings.stop_at_auc, grouped)
    folder = RunFolder(Path())
    metrics_logger = checkpoints = None
    if command == "fit":
        if trainer_settings["enable_checkpointing"] is not False and not trainer_settings["fast_dev_run"]:
            checkpoints = RunCheckpoints(folder, settings.checkpoint.every_n_steps)
        metrics_logger = MetricsLogger(folder, checkpoints)
    job = Job(
        command=command,
        parser=parser,
        settings=settings,
        module=built.model,
        datamodule=built.data,
        folder=folder,
        metrics_logger=metrics_logger,
        stop=StopOnSignal(checkpoints),
    )
    return job, trainer_settings


def build_callbacks(job: Job, trainer_settings: dict[str, Any]) -> list[pl.Callback]:
    """Return the callbacks of a command, in the order in which Lightning calls them."""
    settings, metrics_logger = job.settings, job.metrics_logger
    callbacks: list[pl.Callback] = as_list(trainer_settings["callbacks"])
    if metrics_logger is not None:
        if settings.stop_at_auc is not None:
            callbacks.append(StopAtAUC(settings.stop_at_auc, metrics_logger))
        callbacks += [FinalValidation(), metrics_logger]
        if settings.log_norms:
            callbacks.append(NormLogger(metrics_logger))
        if metrics_logger.checkpoints is not None:
            callbacks.append(metrics_logger.checkpoints)
    else:
        callbacks.append(EvaluationWriter(job.folder))
    own_bar = any(isinstance(given, ProgressBar) for given in callbacks)
    if trainer_settings["enable_progress_bar"] is not False and not own_bar:
        callbacks.append(RunProgress(metrics_logger))
    if job.command == "predict":
        # After the bar, which ends before it writes and reports.
        beside = getattr(job.datamodule, "read_beside", None)
        callbacks.append(PredictionWriter(job.folder, beside, settings.allow_nonfinite))
    else:
        callbacks.append(CurveWriter(job.folder))
    return [*callbacks, job.stop]


class RunTrainer(pl.Trainer):
    """A Trainer whose files are in the run folder, which is chosen after its settings have been checked.

    Args:
        folder: the run folder; its path may be set later.
        settings: arguments of ``pl.Trainer``.
    """

    def __init__(self, folder: RunFolder, **settings: Any) -> None:
        self._run_folder = None if settings["default_root_dir"] else folder
        self.max_time = settings["max_time"]
        super().__init__(**settings)

    @property
    def default_root_dir(self) -> str:
        return super().default_root_dir if self._run_folder is None else str(self._run_folder.path)


def build_trainer(job: Job, trainer_settings: dict[str, Any], callbacks: list[pl.Callback]) -> pl.Trainer:
    """Build the Trainer, without loggers: they need the run folder, which only one rank makes.

    Raises:
        UserError: Lightning refuses the settings, or they ask for training in several processes without sharding.
    """
    ours = {
        "callbacks": callbacks,
        "plugins": [
            *(given := as_list(trainer_settings["plugins"])),
            *slurm_plugins(given),
            FolderCheckpointIO(job.settings.allow_nonfinite, job.fallbacks),
            *([SyncBatchNorm()] if trainer_settings["sync_batchnorm"] else []),
        ],
        "sync_batchnorm": False,
        "logger": False,
    }
    try:
        trainer = RunTrainer(job.folder, **(trainer_settings | ours))
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
    # Lightning appends the timer of max_time; the step at which it stops a fit is to be logged and validated.
    trainer.callbacks.sort(key=lambda callback: not isinstance(callback, Timer))  # type: ignore[attr-defined]
    check_started_processes(trainer.world_size, trainer.num_devices, trainer.num_nodes)
    check_processes(trainer, job.command)
    if isinstance(trainer.strategy, EmbeddingShardedDDP):
        trainer.strategy.facts = facts_of_all_ranks(job)
    return trainer


def facts_of_all_ranks(job: Job) -> dict[str, Any]:
    """Return every setting by its full key, without those that may differ from rank to rank."""
    document = plain_document(job.parser, job.settings)
    return {k: v for k, v in flat(document).items() if not k.startswith(("config", "wandb.", "run_dir"))}


def prepare_run_folder(job: Job, trainer: pl.Trainer, logger: Any) -> None:
    """Open the run folder and its loggers, on rank 0.

    A refusal reaches ranks that were started beside this one when they ask for the folder: see ``RunFolder.agree``.

    Raises:
        UserError: see ``open_run_folder``.
    """
    try:
        open_run_folder(job)
        attach_loggers(job, trainer, logger)
    except UserError as error:
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if environment is None or not environment.creates_processes_externally:
            raise
        job.folder.refusal = str(error)


def open_run_folder(job: Job) -> None:
    """Choose the run folder, on rank 0; a fit locks it.

    Raises:
        UserError: the folder belongs to another run or to no run, cannot be made, or another process holds its lock.
    """
    settings = job.settings
    path = None if settings.run_dir is None else Path(settings.run_dir)
    if job.command in EVALUATIONS:
        owner = Path(settings.ckpt_path).resolve().parent.parent
        if path is None and (owner / CONFIG).is_file():
            path = owner
        if path is not None and path.is_dir():
            job.folder.path = path
            return
    elif settings.resume is not None and path is not None and path.is_dir():
        job.folder.path = RunFolder.reopen(path).path
        job.lock = FolderLock(path).acquire()
        require(
            saved_steps(job.folder.checkpoints) == job.saved_steps,
            f"another process has trained in {path} meanwhile: start this command again to continue",
        )
        return
    elif path is not None and path.is_dir():
        # Lock first, so that the message names the process that trains here.
        job.lock = FolderLock(path).acquire()
    model = settings.model.network.class_path.rpartition(".")[2].lower()
    folder = RunFolder.create(path, model, slurm_job())
    job.folder.path = folder.path
    if job.command not in EVALUATIONS and job.lock is None:
        job.lock = FolderLock(folder.path).acquire()
        if not folder.is_new:
            # Another process made it meanwhile, and may have trained in it.
            RunFolder.create(folder.path, model)
    # Not earlier: a command that is refused the lock leaves the folder to the process that holds it.
    job.made_folder = folder.is_new


def attach_loggers(job: Job, trainer: pl.Trainer, given: Any) -> None:
    """Give the Trainer its loggers and W&B's callback, on rank 0; a fast_dev_run logs nothing."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    document = plain_document(job.parser, job.settings)
    configuration = {**document, "lightning_dlrm": code_version()}
    trainer.loggers = make_loggers(job.command, job.folder, given, job.settings.wandb, configuration)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            from lightning_dlrm.tracking.wandb_run import WandbExtras

            extras = WandbExtras(job.folder, logger, job.latest_metrics, job.settings.wandb.log_model)
            trainer.callbacks.append(extras)  # type: ignore[attr-defined]


# --- run -------------------------------------------------------------------------------------------


def log_start(job: Job, trainer: pl.Trainer) -> None:
    """Log the start of a command, and keep the configuration of a fit."""
    if not trainer.is_global_zero or job.folder.refusal is not None:
        return
    if job.metrics_logger is None:
        return
    job.metrics_logger.configuration = configuration_text(job.parser, job.settings)
    job.metrics_logger.versions = versions()
    network, data = job.settings.model.network.class_path.rpartition(".")[2], job.datamodule
    log.info(setup_note(network, data.schema, getattr(data, "batch_size", None), trainer))
    if note := precision_note(trainer):
        log.warning(note)
    log.info("run folder: %s", job.folder.path)
    log.info(size_note(job.module.size))
    if note := cells_note(job.datamodule.schema):
        log.info(note)
    if job.datamodule.schema.dataset == "demo" and job.settings.ckpt_path is None:
        log.info(demo_note())


def call_trainer(job: Job, trainer: pl.Trainer) -> None:
    """Call the Trainer's method of the command's name."""
    method = getattr(trainer, job.command)
    options = inspect.signature(method).parameters.keys() - LightningCLI.subcommands()[job.command]
    arguments = {name: job.settings[name] for name in options}
    if job.command == "predict":
        # They are in predictions.parquet; Lightning would keep them all in memory as well.
        arguments["return_predictions"] = False
    method(job.module, datamodule=job.datamodule, **arguments)


@contextmanager
def finishing(job: Job, trainer: pl.Trainer) -> Iterator[None]:
    """End a command as schedulers and shells expect: exit codes, W&B's run closed, no empty run folder, no lock.

    Lightning exits with 0 after SIGTERM and with 1 after Ctrl-C; they expect 128 + signal.
    """
    succeeded = is_interrupted = False
    wandb: str | None = None
    try:
        with exit_on_signals() as received:
            if slurm_job() is not None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGUSR1, job.stop.receive)
            try:
                yield
                succeeded = True
            finally:
                wandb = wandb_address(trainer.loggers, job.folder)
                finish_loggers(succeeded)
    except (SIGTERMException, KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, SystemExit) and not received and not trainer.interrupted:
            raise
        is_interrupted = True
        log_how_to_resume(job, trainer)
        default = job.stop.agreed or signal.SIGTERM if isinstance(error, SIGTERMException) else signal.SIGINT
        raise SystemExit(128 + (received[0] if received else default)) from None
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        raise UserError(
            f"another rank has ended or does not answer ({' '.join(str(error).split())[:200]}): "
            "see its output; earlier checkpoints are complete: resume with --resume auto"
        ) from error
    finally:
        has_samples = job.metrics_logger is not None and job.metrics_logger.samples > 0
        trained = succeeded and (job.metrics_logger is None or has_samples)
        if not trained and job.made_folder and job.folder.remove_without_results():
            if not is_interrupted:
                log.info("run folder %s is removed: the run has no results", job.folder.path)
        elif has_samples and not (succeeded or is_interrupted) and trainer.is_global_zero:
            log_what_is_left(job)
        if wandb is not None and job.folder.path.exists() and not (succeeded and job.command == "fit"):
            log.info("W&B: %s", wandb)
        if job.lock is not None:
            job.lock.release()
        if job.stop.agreed == signal.SIGUSR1 and trainer.is_global_zero:
            requeue()


# --- report ----------------------------------------------------------------------------------------


def report_fit(job: Job, trainer: pl.Trainer) -> None:
    """Print the scores of a fit and the next commands."""
    metrics_logger = job.metrics_logger
    assert metrics_logger is not None
    if not trainer.is_global_zero or trainer.interrupted:
        return
    if metrics_logger.samples == 0:
        zeros = [name for name in ("max_steps", "max_epochs", "limit_train_batches") if getattr(trainer, name) == 0]
        print("nothing was trained" + "".join(f": trainer.{name} is 0" for name in zeros[:1]))
        return
    best = metrics_logger.checkpoints.best if metrics_logger.checkpoints else {}
    final = {names.SAMPLES: metrics_logger.samples, **metrics_logger.latest}
    if not metrics_logger.trained:
        print(f"already finished at step {trainer.global_step:,}; nothing to do")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, (EarlyStopping, ReduceOnPlateau)):
            continue
        if note := early_stop_note(callback, trainer.global_step, fit_length(trainer).steps):
            print(note)
    wandb = wandb_address(trainer.loggers, job.folder)
    chance = job.module.chance
    print(final_report(job.folder, final, best, job.datamodule.schema, wandb, job.settings.published, chance))


def report_evaluation(job: Job, trainer: pl.Trainer) -> None:
    """Print the metrics of ``validate`` or ``test``, or what ``predict`` has written."""
    if not trainer.is_global_zero:
        return
    schema = job.datamodule.schema
    model = f"{type(job.module.network).__name__} of {shown_path(str(job.settings.ckpt_path))}"
    if job.command == "predict":
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        written = next(callback.written for callback in callbacks if isinstance(callback, PredictionWriter))
        print(prediction_report(model, written, schema, job.folder.path / PREDICTIONS))
        return
    split = names.VALIDATION if job.command == "validate" else names.TEST
    print(evaluation_report(model, split, job.module.results, schema, job.folder.path / f"{job.command}.json"))
    for note in published_notes(job.settings.published, job.module.results, split, schema.dataset):
        print(note)
