"""``fit``, ``validate``, ``test``, ``predict`` and ``params``: LightningCLI, shaped for this project."""

import copy
import importlib.metadata
import json
import logging
import os
import shlex
import signal
import subprocess
import warnings
from argparse import SUPPRESS
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import pytorch_lightning as pl
from jsonargparse import ActionConfigFile
from pytorch_lightning.callbacks import EarlyStopping, StochasticWeightAveraging, WeightAveraging
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException
from pytorch_lightning.utilities.rank_zero import rank_zero_only

import lightning_dlrm
from lightning_dlrm.cli.configs import flat, resolve_config_arguments
from lightning_dlrm.cli.mistakes import explain, known_keys
from lightning_dlrm.cli.predictions import PredictionWriter
from lightning_dlrm.cli.report import demo_note, early_stop_note, final_report, size_note
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import DatasetSchema
from lightning_dlrm.engine.checkpointing import FolderCheckpointIO, RunCheckpoints, newest_checkpoint
from lightning_dlrm.engine.metrics_logger import MetricsLogger
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.engine.norms import NormLogger
from lightning_dlrm.engine.overhead import NoProfiler
from lightning_dlrm.engine.progress import RunProgress, total_steps
from lightning_dlrm.engine.result_files import CurveWriter, EvaluationWriter
from lightning_dlrm.engine.stopping import FinalValidation, StayStopped, StopAtAUC, StopOnSigterm
from lightning_dlrm.engine.strategy import NAME as EMBEDDING_SHARDED_DDP
from lightning_dlrm.engine.strategy import EmbeddingShardedDDP
from lightning_dlrm.sharding.checkpoint import resolve_checkpoint
from lightning_dlrm.sharding.collectives import lost_rank
from lightning_dlrm.tracking import names
from lightning_dlrm.tracking.run_folder import CONFIG, PREDICTIONS, JsonLinesLogger, RunFolder
from lightning_dlrm.tracking.wandb_run import (
    Mode,
    RunPlace,
    WandbExtras,
    choose_mode,
    finish_wandb,
    offline_folders,
    start_wandb,
    training_run_id,
    whereabouts,
)

log = logging.getLogger("lightning_dlrm")

EVALUATIONS = ("validate", "test", "predict")
JOB_TYPES = {"fit": "train", "validate": "validate", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """When ``checkpoints/last`` is saved.

    Args:
        every_n_steps: every so many optimiser steps, besides after each validation; 0 for after
            validations only.
    """

    every_n_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class WandbSettings:
    """Weights & Biases.

    Args:
        project: W&B project.
        mode: auto goes online where there is an API key and the server answers, else offline.
        entity: user or team; by default the account's own.
        name: of the run; by default that of the run folder.
        group: of the run, such as an experiment of several runs.
        job_type: what the run does; by default train, validate or test.
        tags: of the run, such as [baseline, night].
        log_model: upload the best checkpoint as an artifact at the end of a fit.
    """

    project: str = "lightning_dlrm"
    mode: Mode = "auto"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: tuple[str, ...] = ()
    log_model: bool = False


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line, and that takes no abbreviations: they hide misspelt keys."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allow_abbrev = False

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(explain(message, known_keys(self)))


class CTRCommand(LightningCLI):
    """Adds the run folder, resuming, W&B and our checkpoints to LightningCLI."""

    run_folder: RunFolder | None = None
    metrics: MetricsLogger | None = None
    _made_folder = False

    def __init__(self, arguments: Sequence[str], run: bool = True) -> None:
        _quieten()
        super().__init__(
            CTRModule,
            pl.LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=1,
            auto_configure_optimizers=False,
            trainer_defaults={
                # The stream gives each rank its own rows, and validation needs no rehearsal.
                "use_distributed_sampler": False,
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
            },
            args=resolve_config_arguments(arguments),
            run=run,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = OneLineParser(**kwargs)
        parser.add_argument(
            "-c", "--config", action=ActionConfigFile, help="YAML file, here or one shipped; later ones overlay earlier"
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str | None, default=None, help="default runs/<date>-<model>-<n>")
        parser.add_argument(
            "--resume",
            type=Literal["auto"] | None,
            default=None,
            help="auto: go on from the newest whole checkpoint in --run_dir, or start afresh where there is none",
        )
        parser.add_argument(
            "--stop_at_auc",
            type=float | None,
            default=None,
            help="end the fit after the first validation with this AUC or more; the summary says how long that took",
        )
        parser.add_argument(
            "--log_norms",
            type=bool,
            default=False,
            help="log the norms of every gradient, and of the table rows that a step touches and of their gradients",
        )
        parser.add_class_arguments(CheckpointSettings, "checkpoint")
        parser.add_class_arguments(WandbSettings, "wandb")
        parser.link_arguments("data.schema", "model.schema", apply_on="instantiate")
        parser.link_arguments("seed_everything", "model.seed", compute_fn=_as_seed)

    # --- before anything is built -------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        settings = self._settings()
        data = settings.data.init_args
        if data.get("seed", 0) is None:
            data.seed = _as_seed(settings.seed_everything)
        if self.subcommand in EVALUATIONS:
            if settings.resume is not None:
                raise UserError(f"--resume is for fit; {self.subcommand} takes --ckpt_path")
            settings.ckpt_path = str(self._evaluated_checkpoint(settings.ckpt_path, settings.run_dir))
        elif self.subcommand == "fit":
            self._prepare_resume(settings)

    def _prepare_resume(self, settings: Any) -> None:
        if settings.resume is None:
            if settings.ckpt_path is not None:
                settings.ckpt_path = str(resolve_checkpoint(Path(settings.ckpt_path)))
            return
        if settings.run_dir is None:
            raise UserError("--resume auto looks for checkpoints in a run folder: give it with --run_dir")
        if settings.ckpt_path is not None:
            raise UserError("--resume auto and --ckpt_path both choose a checkpoint: give one of them")
        newest = newest_checkpoint(RunFolder(Path(settings.run_dir)).checkpoints)
        if newest is None:
            log.info("no checkpoint in %s yet: starting afresh", settings.run_dir)
        else:
            settings.ckpt_path = str(newest)

    def _evaluated_checkpoint(self, given: str | None, run_dir: str | None) -> Path:
        if given is None:
            raise UserError(
                f"{self.subcommand} needs trained weights: give --ckpt_path, such as runs/NAME/checkpoints/best"
            )
        if given in ("best", "last") and run_dir is not None:
            return resolve_checkpoint(RunFolder(Path(run_dir)).checkpoints / given)
        return resolve_checkpoint(Path(given))

    # --- building -------------------------------------------------------------------------------

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        settings = self._settings()
        assert isinstance(self.model, CTRModule)
        trainer = dict(self._get(self.config_init, "trainer", default={}))
        is_rank_zero = self._rehearse(trainer).is_global_zero
        self.run_folder = RunFolder(Path())
        callbacks: list[pl.Callback]
        if self.subcommand == "fit":
            checkpoints = None
            if trainer.get("enable_checkpointing") is not False:
                checkpoints = RunCheckpoints(self.run_folder, settings.checkpoint.every_n_steps)
            self.metrics = MetricsLogger(self.run_folder, checkpoints)
            callbacks = [FinalValidation(), self.metrics, *([checkpoints] if checkpoints else [])]
            if settings.log_norms:
                callbacks.insert(2, NormLogger(self.metrics))
            if settings.stop_at_auc is not None:
                callbacks.insert(0, StopAtAUC(settings.stop_at_auc, self.metrics))
            stopping = [given for given in _listed(trainer.get("callbacks")) if isinstance(given, EarlyStopping)]
            callbacks = [*(StayStopped(given) for given in stopping), *callbacks]
        else:
            callbacks = [EvaluationWriter(self.run_folder), PredictionWriter(self.run_folder)]
        if trainer.get("enable_progress_bar") is not False:
            callbacks.append(RunProgress(self.metrics))
        if self.subcommand != "predict":
            callbacks.append(CurveWriter(self.run_folder))
        callbacks.append(StopOnSigterm())
        # Rank 0 chooses the run folder, once every setting is known to be in range; the callbacks of the other
        # ranks hear of it when the ranks can talk.
        if is_rank_zero:
            self.run_folder.path = self._open_run_folder(settings).path
        trainer["logger"] = self._loggers(trainer.get("logger"), settings) if is_rank_zero else False
        wandb_loggers = [logger for logger in _listed(trainer["logger"]) if isinstance(logger, WandbLogger)]
        callbacks += [
            WandbExtras(self.run_folder, logger, self._final_figures, settings.wandb.log_model)
            for logger in wandb_loggers
        ]
        trainer["callbacks"] = [*_listed(trainer.get("callbacks")), *callbacks]
        trainer["plugins"] = [*_listed(trainer.get("plugins")), FolderCheckpointIO()]
        trainer["default_root_dir"] = trainer.get("default_root_dir") or str(self.run_folder.path)
        trainer["profiler"] = trainer.get("profiler") or NoProfiler()
        built: pl.Trainer = self._instantiate_trainer(trainer | kwargs, [])
        if isinstance(built.strategy, EmbeddingShardedDDP):
            built.strategy.facts = self._facts_of_all_ranks()
        return built

    def _rehearse(self, settings: dict[str, Any]) -> pl.Trainer:
        """Builds a trainer only to see that it can be built, before there is a run folder.

        Raises:
            UserError: Lightning refuses the settings, or they ask for training in several processes
                without sharding.
        """
        if settings["accumulate_grad_batches"] < 1:
            raise UserError(f"trainer.accumulate_grad_batches is {settings['accumulate_grad_batches']}; give 1 or more")
        if settings["log_every_n_steps"] is not None and settings["log_every_n_steps"] < 1:
            raise UserError(f"trainer.log_every_n_steps is {settings['log_every_n_steps']}; give 1 or more")
        if (settings["gradient_clip_val"] or 0) < 0:
            raise UserError(
                f"trainer.gradient_clip_val is {settings['gradient_clip_val']}; give 0 (no clipping) or more"
            )
        if str(settings["precision"]) in ("16", "16-mixed"):
            # On a CPU Lightning would take bf16-mixed in its place.
            raise UserError(f"trainer.precision {settings['precision']} scales the loss; use bf16-mixed")
        if self._settings().get("stop_at_auc") is not None and settings["limit_val_batches"] == 0:
            raise UserError(
                "stop_at_auc looks at validations, and trainer.limit_val_batches is 0: leave one of them out"
            )
        if settings["reload_dataloaders_every_n_epochs"]:
            raise UserError(
                "trainer.reload_dataloaders_every_n_epochs: the stream orders every epoch by itself; leave it at 0"
            )
        for callback in _listed(settings["callbacks"]):
            if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)):
                raise UserError(
                    f"trainer.callbacks: the averages of {type(callback).__name__} would not be in the checkpoints, "
                    "which take table rows where they are: set model.averaging.decay, such as 0.99, instead"
                )
            if isinstance(callback, EarlyStopping):
                _check_early_stopping(callback, settings["limit_val_batches"])
        try:
            # Of a strategy a copy: a trainer sets the accelerator in it, which the next trainer would refuse.
            strategy = copy.copy(settings["strategy"])
            trainer = pl.Trainer(**(settings | {"logger": False, "callbacks": None, "strategy": strategy}))
        except (MisconfigurationException, ValueError) as error:
            raise UserError(f"trainer: {' '.join(str(error).split())}") from error
        if settings["sync_batchnorm"] and trainer.world_size > 1 and trainer.strategy.root_device.type != "cuda":
            raise UserError(
                "trainer.sync_batchnorm works on GPUs only; without it each rank normalises over its own slice"
            )
        sharded = isinstance(trainer.strategy, EmbeddingShardedDDP)
        if trainer.world_size > 1 and self.subcommand == "fit" and not sharded:
            raise UserError(
                f"training in {trainer.world_size} processes needs --trainer.strategy {EMBEDDING_SHARDED_DDP}: "
                "give it, or set --trainer.devices 1 and --trainer.num_nodes 1"
            )
        return trainer

    def _open_run_folder(self, settings: Any) -> RunFolder:
        path = None if settings.run_dir is None else Path(settings.run_dir)
        if self.subcommand in EVALUATIONS:
            owner = Path(settings.ckpt_path).resolve().parent.parent
            if path is None and (owner / CONFIG).is_file():
                path = owner
            if path is not None and path.is_dir():
                return RunFolder(path)
        elif settings.resume is not None and path is not None and path.is_dir():
            return RunFolder.reopen(path)
        self._made_folder = True
        return RunFolder.create(path, settings.model.network.class_path.rpartition(".")[2].lower())

    def _loggers(self, given: Any, settings: Any) -> list[Any] | bool:
        """W&B and, in a fit, the run folder; a logger of the user's takes W&B's place."""
        assert self.run_folder is not None
        if self.subcommand not in JOB_TYPES:
            return False
        ours = [JsonLinesLogger(self.run_folder)] if self.subcommand == "fit" else []
        if given is False:
            return ours
        if given not in (None, True):
            return [*ours, *_listed(given)]
        mode, reason = choose_mode(settings.wandb.mode)
        if mode == "disabled":
            return ours
        chosen, folder = settings.wandb, self.run_folder
        place = RunPlace(
            project=chosen.project,
            entity=chosen.entity,
            name=chosen.name or folder.path.name,
            group=chosen.group,
            job_type=chosen.job_type or JOB_TYPES[self.subcommand],
            tags=chosen.tags,
        )
        run_id = training_run_id(folder) if self.subcommand == "fit" else None
        logger, reason = start_wandb(folder.path, place, mode=mode, reason=reason, run_id=run_id, config=self._facts())
        if reason:
            log.info("W&B: offline (%s); send it later with: wandb sync %s", reason, offline_folders(folder))
        return [*ours, logger]

    def _final_figures(self) -> dict[str, float]:
        return {} if self.metrics is None else self.metrics.latest

    def _facts_of_all_ranks(self) -> dict[str, Any]:
        """Every setting by its key; what may differ from rank to rank is left out."""
        document = json.loads(self._parser(self.subcommand).dump(self._settings(), format="json", skip_unset=False))
        facts = flat(document)
        return {key: value for key, value in facts.items() if not key.startswith(("config", "wandb.", "run_dir"))}

    def _facts(self) -> dict[str, Any]:
        """The resolved configuration and where the code comes from."""
        text = self._parser(self.subcommand).dump(self._settings(), format="json", skip_unset=False)
        return {**json.loads(text), "lightning_dlrm": code_version()}

    # --- running --------------------------------------------------------------------------------

    def before_fit(self) -> None:
        assert self.run_folder is not None and self.metrics is not None
        if not self.trainer.is_global_zero:
            return
        # What this call resumed from is no part of the configuration: others take it back with --config.
        settings = self._settings().clone()
        settings.ckpt_path = settings.resume = settings.run_dir = None
        self.metrics.configuration = self._parser(self.subcommand).dump(settings, skip_unset=False)
        log.info("run folder: %s", self.run_folder.path)
        assert isinstance(self.model, CTRModule)
        log.info(size_note(self.model.size))
        if self._schema().dataset == "demo":
            log.info(demo_note())

    def after_fit(self) -> None:
        assert self.metrics is not None and self.run_folder is not None
        if self.metrics.samples == 0:
            raise UserError(
                f"nothing was trained: trainer.max_steps is {self.trainer.max_steps} and trainer.max_epochs is "
                f"{self.trainer.max_epochs}; ask for at least one step"
            )
        if self.trainer.is_global_zero and not self.trainer.interrupted:
            best = self.metrics.checkpoints.best if self.metrics.checkpoints else {}
            final = {names.SAMPLES: self.metrics.samples, **self.metrics.latest}
            if not self.metrics.trained:
                print(f"already finished at step {self.trainer.global_step:,}; nothing to do")
            for callback in self.trainer.early_stopping_callbacks:
                if note := early_stop_note(callback, self.trainer.global_step, total_steps(self.trainer)):
                    print(note)
            wandb = whereabouts(self.trainer.loggers, self.run_folder)
            print(final_report(self.run_folder, final, best, self._schema(), wandb))

    def after_validate(self) -> None:
        self._print_results()

    def after_test(self) -> None:
        self._print_results()

    def before_predict(self) -> None:
        assert self.run_folder is not None
        log.info("predictions go to %s", self.run_folder.path / PREDICTIONS)

    def _print_results(self) -> None:
        assert isinstance(self.model, CTRModule) and self.run_folder is not None
        if self.trainer.is_global_zero:
            print("\n".join(f"{name:32s} {value:.6f}" for name, value in self.model.results.items()))
            print(f"kept in {self.run_folder.path}")

    def _run_subcommand(self, subcommand: str) -> None:
        succeeded = False
        try:
            super()._run_subcommand(subcommand)
            succeeded = True
        # Lightning leaves with 0 after SIGTERM and with 1 after Ctrl-C; schedulers and shells expect 128 + signal.
        except SIGTERMException:
            self._say_how_to_go_on()
            raise SystemExit(128 + signal.SIGTERM) from None
        except SystemExit:
            if self.trainer.interrupted:
                self._say_how_to_go_on()
                raise SystemExit(128 + signal.SIGINT) from None
            raise
        except RuntimeError as error:
            if not lost_rank(error):
                raise
            raise UserError(
                f"another rank has ended or does not answer ({' '.join(str(error).split())[:200]}): "
                "see what it said; checkpoints saved before are whole: resume with --resume auto"
            ) from error
        finally:
            finish_wandb(succeeded)
            if not succeeded and self._made_folder and self.run_folder is not None:
                self.run_folder.remove_unless_begun()

    def _say_how_to_go_on(self) -> None:
        if self.subcommand != "fit" or self.run_folder is None or not self.trainer.is_global_zero:
            return
        step, folder = f"{self.trainer.global_step:,}", self.run_folder
        if newest_checkpoint(folder.checkpoints) is None:
            log.info("interrupted at step %s, before the first checkpoint", step)
            return
        config, path = (shlex.quote(str(given)) for given in (folder.path / CONFIG, folder.path))
        log.info(
            "interrupted at step %s; go on with: python -m lightning_dlrm fit --config %s --run_dir %s --resume auto",
            *(step, config, path),
        )

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        # They are in predictions.parquet; Lightning would keep them all in memory as well.
        return kwargs | {"return_predictions": False} if subcommand == "predict" else kwargs

    def _settings(self) -> Any:
        return self.config if self.subcommand is None else self.config[self.subcommand]

    def _schema(self) -> DatasetSchema:
        return self.datamodule.schema


class SettingsCommand(CTRCommand):
    """Builds data and model of a configuration, and nothing else."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        # A run's config.yaml has these, as fit takes them; they say nothing of data and model.
        for key in ("ckpt_path", "weights_only"):
            parser.add_argument(f"--{key}", type=Any, default=None, help=SUPPRESS)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None


class ParamsCommand(SettingsCommand):
    """Also says whether figures are wanted as JSON."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.prog = "python -m lightning_dlrm params"
        parser.add_argument("--json", action="store_true", help="print JSON")
        add_matching_arguments(parser)


def add_matching_arguments(parser: Any) -> None:
    """Options of ``params`` that make one model cost what another does."""
    parser.add_argument(
        "--match",
        nargs="+",
        default=None,
        help="configuration whose hidden layers are to be widened or narrowed, with its overlays: params --match "
        "dcn.yaml --to dlrm.yaml --by dense --output matched.yaml (other options, such as --data.path, go to both)",
    )
    parser.add_argument(
        "--to", nargs="+", default=None, help="configuration whose cost is to be met, with its overlays"
    )
    parser.add_argument(
        "--by", default="dense", help="what is to be met: total, dense (parameters), or flops (forward)"
    )
    parser.add_argument("--output", default=None, help="the new configuration's file")


def _check_early_stopping(callback: EarlyStopping, limit_val_batches: float | None) -> None:
    """
    Raises:
        UserError: it would look for a metric that there is not, or stop where it should go on.
    """
    if limit_val_batches == 0:
        raise UserError(
            "trainer.callbacks: EarlyStopping looks at validations, and trainer.limit_val_batches is 0: leave one of "
            "them out"
        )
    if callback._check_on_train_epoch_end:
        raise UserError(
            "trainer.callbacks: EarlyStopping's check_on_train_epoch_end comes after a validation's checkpoint is "
            "saved, which would be without its count: leave it out"
        )
    modes = {f"{names.VALIDATION}/{metric}": mode for metric, mode in names.BETTER.items()}
    if callback.monitor not in modes:
        raise UserError(
            f"trainer.callbacks: EarlyStopping's monitor is {callback.monitor}; expected one of {', '.join(modes)}"
        )
    mode = modes[callback.monitor]
    if callback.mode != mode:
        raise UserError(
            f"trainer.callbacks: EarlyStopping's mode is {callback.mode}, and of {callback.monitor} "
            f"{'more' if mode == 'max' else 'less'} is better: set mode to {mode}"
        )


def _listed(given: Any) -> list[Any]:
    """What Lightning takes as one, as several, or not at all."""
    if given is None:
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _as_seed(given: bool | int) -> int:
    """What LightningCLI makes of ``seed_everything``: true means the environment's choice.

    Raises:
        UserError: NumPy takes no such seed.
    """
    seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if isinstance(given, bool) else given
    if not 0 <= seed < 2**32:
        raise UserError(f"seed_everything is {seed}; give a number from 0 to {2**32 - 1}")
    return seed


def _quieten() -> None:
    """Lightning's general advice is for people who write their own training code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # These say at this level that a rank has died, before it ends the others, and what a profiler has found.
    for name in ("lightning_fabric.strategies.launchers.subprocess_script", "pytorch_lightning.profilers"):
        logging.getLogger(name).setLevel(logging.INFO)
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        log.setLevel(logging.WARNING)


def code_version() -> dict[str, str | None]:
    """Of this project: which release, and of a checkout which commit."""
    return {"version": _version(), "git_commit": _git_commit()}


def _version() -> str:
    try:
        return importlib.metadata.version("lightning-dlrm")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git_commit() -> str | None:
    """Of the checkout this code runs from; None where it is installed from a wheel."""
    command = ["git", "-C", str(Path(lightning_dlrm.__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
