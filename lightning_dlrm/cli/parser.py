"""The options of a fit, which all commands with a model share, on Lightning's public argument parser."""

import argparse
import contextlib
import json
import logging
import os
import re
import sys
import warnings
from argparse import SUPPRESS
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TextIO

import pytorch_lightning as pl
import yaml
from jsonargparse import ActionConfigFile, Namespace
from lightning_utilities.core.enums import StrEnum
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from tqdm import tqdm

from lightning_dlrm.cli.class_help import name_class_of_help
from lightning_dlrm.cli.configs import replaced_settings, resolve_config_arguments
from lightning_dlrm.cli.help_text import HelpFormatter, only_settings, readable_help
from lightning_dlrm.cli.mistakes import explain, known_keys, with_place
from lightning_dlrm.cli.own_classes import require_arguments, schema_of
from lightning_dlrm.cli.short_help import EVALUATIONS, SHORT_HELP, TRUST_HELP
from lightning_dlrm.cli.trust import admit_arguments, check_values
from lightning_dlrm.contracts.errors import UserError, in_yaml, require
from lightning_dlrm.contracts.own_code import place_in_own_code
from lightning_dlrm.contracts.terminal import wrapped
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.tracking.wandb_mode import Mode

log = logging.getLogger("lightning_dlrm")

# Defaults of Lightning's callbacks may be enums, such as the interval of a Timer.
yaml.SafeDumper.add_multi_representer(StrEnum, lambda dumper, value: dumper.represent_str(value.value))

TRAINER_DEFAULTS = {
    # The stream gives each rank its own rows, and fits need no validation before their first step.
    "use_distributed_sampler": False,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """When ``checkpoints/last`` is saved.

    Args:
        every_n_steps: number of optimizer steps between two checkpoints; each validation saves one too. 0 saves
            after validations only.
    """

    every_n_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class WandbSettings:
    """Weights & Biases.

    Args:
        project: W&B project; by default WANDB_PROJECT, or lightning_dlrm.
        mode: auto goes online if there is an API key and the server answers, else offline.
        entity: user or team; by default that of the account.
        name: name of the run; by default WANDB_NAME, or the name of the run folder.
        group: group of the run, such as an experiment of several runs.
        job_type: kind of the run; by default WANDB_JOB_TYPE, or train, validate or test.
        tags: tags of the run, such as [baseline, night].
        log_model: upload the best checkpoint as an artifact at the end of a fit.
    """

    project: str = field(default_factory=lambda: os.environ.get("WANDB_PROJECT") or "lightning_dlrm")
    mode: Mode = "auto"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: tuple[str, ...] = ()
    log_model: bool = False


@dataclass(frozen=True, kw_only=True)
class PublishedScore:
    """A published score that a configuration is compared with, at the end of its runs and in reports.

    Args:
        metric: name of the metric, as in a run's summary without its split.
        value: published value.
        source: where it is published, and on what it was measured.
    """

    metric: Literal["auc", "log_loss", "accuracy", "normalized_entropy", "calibration"]
    value: float
    source: str


class CommandParser(LightningArgumentParser):
    """A parser that raises ``UserError`` with one line, and accepts no abbreviations, because they hide misspelt
    keys."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": HelpFormatter} | kwargs)
        self.allow_abbrev = False

    def listed_actions(self) -> list[argparse.Action]:
        """Return the options that the help lists."""
        # jsonargparse makes its groups of the methods of this class: an own ``add_argument`` would be theirs too.
        return [action for action in self._actions if action.option_strings and action.help != SUPPRESS]

    def print_help(self, file: Any = None) -> None:
        print(readable_help(self.format_help()), end="", file=file)

    def hide(self, keys: Sequence[str]) -> None:
        """Leave options out of the help: those of some keys, and of sections with these keys."""
        for action in self.listed_actions():
            if _first_key(action.dest) in keys:
                action.help = SUPPRESS

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(" ".join(explain(message, known_keys(self)).split()))

    def build(self, settings: Namespace) -> Namespace:
        """Return the settings with all classes instantiated.

        Raises:
            UserError: a class refuses its arguments or lacks one, or needs a package that is not installed.
        """
        require_arguments(settings)
        try:
            return self.instantiate(settings)
        except ValueError as error:
            root: BaseException = error
            while root.__cause__ is not None:
                root = root.__cause__
            if isinstance(root, UserError):
                raise root from None
            refused = re.search(r"Problem with given class_path '([\w.]+)':\n\s*(.*)", str(error))
            if refused is None or place_in_own_code(root) is not None:
                raise
            raise UserError(f"{refused[1]}: {refused[2]}") from error


_CHECKPOINT_HELP = dict.fromkeys(EVALUATIONS, "checkpoint to score: a folder such as RUN/checkpoints/best")
_CHECKPOINT_HELP["fit"] = (
    "checkpoint to continue from. A folder: a new run starts from it; best or last: the run in --run_dir continues "
    "from its own. --resume auto takes the newest"
)
_GROUP_TITLES = {
    "trainer": "Lightning's Trainer",
    "model": "model, loss and optimizers",
    "data": "data",
    "checkpoint": "checkpoints",
    "wandb": "Weights & Biases",
}
"""Section -> its title in ``--help.all``, in place of the first line of a docstring."""


def build_trainer_parser(command: str) -> CommandParser:
    """Return the parser of ``fit``, ``validate``, ``test`` or ``predict``."""
    parser = _build_parser(command)
    # With help of their own: Lightning's is about its own checkpoints.
    parser.add_argument("--ckpt_path", type=str | Path | None, default=None, help=_CHECKPOINT_HELP[command])
    parser.add_argument("--weights_only", type=bool | None, default=None, help=SUPPRESS)
    skip = {"ckpt_path", "weights_only", *LightningCLI.subcommands()[command]}
    parser.add_method_arguments(pl.Trainer, command, skip=skip, as_group=False)
    if command in ("validate", "test"):
        # Lightning's table has the metrics that this command prints in full precision.
        parser.set_defaults({"verbose": False})
    return parser


def build_model_parser(command: str, **options: Any) -> CommandParser:
    """Return the parser of a command that needs a configuration's model and data, and builds no Trainer.

    Args:
        command: its name.
        options: options of the parser, such as ``epilog``.
    """
    parser = _build_parser(command, **options)
    # The config.yaml of a run has all options of fit; these do not concern model and data.
    parser.add_argument("--ckpt_path", type=str | None, default=None, help=SUPPRESS)
    parser.add_argument("--weights_only", type=bool | None, default=None, help=SUPPRESS)
    parser.hide(_RUN_KEYS)
    return parser


def _build_parser(command: str, **options: Any) -> CommandParser:
    prog = f"python -m lightning_dlrm {command}"
    description, _, _ = SHORT_HELP[command].partition("\noptions:")
    parser = CommandParser(prog=prog, usage=f"{prog} [options]", description=description, **options)
    parser.add_argument(
        "-c", "--config", action=ActionConfigFile, help="YAML file, here or shipped; later files overlay earlier ones"
    )
    parser.add_argument(
        "--seed_everything",
        type=bool | int,
        default=1,
        help="seed of initial parameters and data; true takes PL_GLOBAL_SEED, or 0",
    )
    parser.add_argument_group("custom classes", f"{'--trust MODULE':22s}{TRUST_HELP}")
    parser.add_lightning_class_args(pl.Trainer, "trainer")
    parser.set_defaults({f"trainer.{name}": value for name, value in TRAINER_DEFAULTS.items()})
    parser.add_lightning_class_args(CTRModule, "model")
    parser.add_lightning_class_args(pl.LightningDataModule, "data", subclass_mode=True)
    _add_run_options(parser)
    for section, group in (parser.groups or {}).items():
        group.title = _GROUP_TITLES.get(section, section)
    parser.link_arguments("data", "model.schema", compute_fn=schema_of, apply_on="instantiate")
    parser.link_arguments("seed_everything", "model.seed", compute_fn=seed_from)
    return parser


def _add_run_options(parser: CommandParser) -> None:
    parser.add_argument(
        "--run_dir", type=str | None, default=None, help="run folder; by default runs/<date>-<model>-<n>"
    )
    parser.add_argument(
        "--resume",
        type=Literal["auto"] | None,
        default=None,
        help="auto: continue from the newest complete checkpoint in --run_dir, or start a new run if there is none",
    )
    parser.add_argument(
        "--allow_nonfinite",
        type=bool,
        default=False,
        help="also open a checkpoint with NaN or infinite values, to inspect a diverged run",
    )
    parser.add_argument(
        "--stop_at_auc",
        type=float | None,
        default=None,
        help="end the fit after the first validation with this AUC or more; the summary has the time until then",
    )
    parser.add_argument(
        "--log_norms",
        type=bool,
        default=False,
        help="log the norms of every gradient, and of the table rows that a step updates and of their gradients",
    )
    parser.add_argument(
        "--published",
        type=list[PublishedScore] | None,
        default=None,
        help="published scores (metric, value, source); the report of a run shows the difference from them",
    )
    parser.add_class_arguments(CheckpointSettings, "checkpoint")
    parser.add_class_arguments(WandbSettings, "wandb")


def parse(parser: CommandParser, arguments: Sequence[str]) -> Namespace:
    """Return the settings that configurations and options give, and seed the random generators with them.

    Raises:
        UserError: a configuration or an option is wrong.
    """
    part = next((found[1] for argument in arguments if (found := re.fullmatch(r"--(data\.\w+)\.help", argument))), None)
    arguments = name_class_of_help(arguments)
    admit_arguments(arguments)
    resolved = resolve_config_arguments(arguments)
    for sentence in replaced_settings(arguments):
        log.warning(sentence)
    try:
        with only_settings(part):
            settings = parser.parse_args(resolved)
        for section in ("model", "trainer", "checkpoint", "wandb"):
            found = settings[section]
            require(isinstance(found, Namespace), f"{section} is {in_yaml(found)}; expected keys with values")
        check_values(settings)
    except UserError as error:
        words = with_place(str(error), parser.prog.rpartition(" ")[2], arguments)
        raise UserError(re.sub(r"\bNone\b", "null", words)) from error
    if settings.seed_everything is not False:
        given = None if settings.seed_everything is True else settings.seed_everything
        settings.seed_everything = pl.seed_everything(given, workers=True)
    return settings


def fill_data_seed(settings: Namespace) -> None:
    """Set the datamodule's seed to ``seed_everything`` if it has a seed that is not set."""
    data = settings.data.init_args
    if data.get("seed", 0) is None:
        data.seed = seed_from(settings.seed_everything)


def seed_from(given: bool | int) -> int:
    """Return the seed of an option ``seed_everything``: true and false stand for PL_GLOBAL_SEED, or 0.

    Raises:
        UserError: the seed is out of NumPy's range.
    """
    seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if isinstance(given, bool) else given
    require(0 <= seed < 2**32, f"seed_everything is {seed}; give a number from 0 to {2**32 - 1}")
    return seed


SPOKEN_AT_INFO = ("lightning_fabric.strategies.launchers.subprocess_script", "pytorch_lightning.profilers")
"""Loggers of Lightning whose INFO messages are shown: a rank that died, and the report of a profiler."""


class _Wrapped(logging.Formatter):
    """A formatter of messages without their source that fit into the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return wrapped(super().format(record).split("\n"), sys.stderr)


class _BesideBars(logging.StreamHandler[TextIO]):
    """A handler whose messages do not run into a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        # Elsewhere bars are lines, with nothing to clear.
        beside = tqdm.external_write_mode(self.stream) if self.stream.isatty() else contextlib.nullcontext()
        with beside:
            super().emit(record)


def _log_handler() -> logging.Handler:
    handler = _BesideBars()
    handler.setFormatter(_Wrapped("%(message)s"))
    return handler


def configure_logging() -> None:
    """Set the levels of loggers; Lightning's INFO messages are advice for authors of training code."""
    logging.basicConfig(level=logging.WARNING, handlers=[_log_handler()])
    log.setLevel(logging.INFO)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in SPOKEN_AT_INFO:
        logging.getLogger(name).setLevel(logging.INFO)
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        log.setLevel(logging.WARNING)


def plain_document(parser: CommandParser, settings: Namespace) -> dict[str, Any]:
    """Return settings with all defaults as plain values."""
    # They were validated when they were parsed.
    text = parser.dump(settings, format="json", skip_unset=False, skip_validation=True)
    document: dict[str, Any] = json.loads(text)
    return document


@dataclass(frozen=True, kw_only=True)
class ModelAndData:
    """The model and the data of a configuration.

    Args:
        settings: all settings, as parsed.
        parser: parser of the settings.
        module: the model; its network has not been built.
        datamodule: the data; they have not been prepared.
    """

    settings: Namespace
    parser: CommandParser
    module: CTRModule
    datamodule: Any

    def document(self) -> dict[str, Any]:
        """Return the whole configuration with all defaults, as plain values."""
        return plain_document(self.parser, self.settings)


_RUN_KEYS = ("run_dir", "resume", "allow_nonfinite", "stop_at_auc", "log_norms", "published", "checkpoint")
"""Options of runs that have no effect on commands that build a model and data only."""


def _first_key(option: str) -> str:
    return re.split(r"[.+=]", option, maxsplit=1)[0]


def refuse_options_of_runs(command: str, arguments: Sequence[str]) -> None:
    """
    Raises:
        UserError: an option names a checkpoint, which the command would not open, or has no effect on it.
    """
    for option in (argument.partition("=")[0] for argument in arguments if argument.startswith("--")):
        require(option != "--ckpt_path", f"{command} opens no checkpoint: leave --ckpt_path out")
        require(
            _first_key(option.removeprefix("--")) not in _RUN_KEYS,
            f"{option} has no effect on {command}, which trains nothing: leave it out",
        )


def build_model_and_data(arguments: Sequence[str], parser: CommandParser | None = None) -> ModelAndData:
    """Parse options and build the model and the data that they describe.

    Args:
        arguments: options, such as ``--config dlrm.yaml --data.path DIR``.
        parser: made by ``build_model_parser``; by default one without further options.

    Raises:
        UserError: a configuration, an option, or a setting of model or data is wrong.
    """
    configure_logging()
    parser = parser or build_model_parser("params")
    settings = parse(parser, arguments)
    to_build = settings.clone()
    fill_data_seed(to_build)
    # Callbacks, loggers and strategies belong to a Trainer.
    to_build.pop("trainer")
    built = parser.build(to_build)
    assert isinstance(built.model, CTRModule) and isinstance(built.data, pl.LightningDataModule)
    return ModelAndData(settings=settings, parser=parser, module=built.model, datamodule=built.data)
