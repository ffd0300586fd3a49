"""Settings of Lightning's Trainer that a run of this project refuses, each with what to set instead."""

import inspect
import re
from collections.abc import Mapping
from typing import Any, get_args

import pytorch_lightning as pl
import torch
from jsonargparse import Namespace
from pytorch_lightning.callbacks import EarlyStopping, StochasticWeightAveraging, Timer, WeightAveraging
from pytorch_lightning.strategies import StrategyRegistry

from lightning_dlrm.contracts.errors import UserError, nearest, require
from lightning_dlrm.engine.plateau import ReduceOnPlateau
from lightning_dlrm.engine.strategy import NAME as EMBEDDING_SHARDED_DDP
from lightning_dlrm.engine.strategy import EmbeddingShardedDDP
from lightning_dlrm.tracking import names

_NUMBERS_OR_SHARES = (
    *("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"),
    *("overfit_batches", "val_check_interval"),
)
"""Arguments of the Trainer for which 1 means one batch, and 1.0 all batches."""


def as_list(given: Any) -> list[Any]:
    """Return a list of what Lightning takes as None, as one value, or as several."""
    if given is None:
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]


def validate_trainer_settings(trainer: Mapping[str, Any], stop_at_auc: float | None, grouped: bool) -> None:
    """Check the Trainer's arguments before it is built.

    Args:
        trainer: the arguments; callbacks are instances.
        stop_at_auc: the option.
        grouped: whether validations report the AUC by group.

    Raises:
        UserError: a value is out of range, or does not work with this project.
    """
    for name in _NUMBERS_OR_SHARES:
        require(
            type(trainer[name]) is not float or trainer[name] != 1 or not _is_read_as_share(name),
            f"trainer.{name} is 1.0, which may be meant as 1 batch: another package, such as scikit-learn, was "
            "imported before Lightning and made Python read whole numbers as shares; import "
            f"pytorch_lightning first, or leave {name} out for all batches",
        )
    _check_place(trainer)
    _check_numbers(trainer)
    if str(trainer["precision"]) in ("16", "16-mixed"):
        # On a CPU Lightning would take bf16-mixed in its place.
        raise UserError(
            f"trainer.precision is {trainer['precision']}: float16 needs scaled gradients, which table rows do not "
            "support; use bf16-mixed, or 32-true"
        )
    require(
        stop_at_auc is None or trainer["limit_val_batches"] != 0,
        "stop_at_auc needs validations, and trainer.limit_val_batches is 0: leave one of them out",
    )
    require(
        not trainer["reload_dataloaders_every_n_epochs"],
        "trainer.reload_dataloaders_every_n_epochs: the stream itself makes a new order for every epoch; leave this "
        "setting at 0",
    )
    for callback in as_list(trainer["callbacks"]):
        require(
            not isinstance(callback, Timer) or trainer["max_time"] is None,
            "trainer.max_time has no effect with a Timer in trainer.callbacks: leave one of them out",
        )
        require(
            not isinstance(callback, (StochasticWeightAveraging, WeightAveraging)),
            f"trainer.callbacks: the averages of {type(callback).__name__} would not be in the checkpoints, "
            "which hold the table rows as trained: set model.averaging.decay, such as 0.99, instead",
        )
        if isinstance(callback, (EarlyStopping, ReduceOnPlateau)):
            require(
                trainer["limit_val_batches"] != 0,
                f"trainer.callbacks: {type(callback).__name__} needs validations, and trainer.limit_val_batches is 0: "
                "leave one of them out",
            )
            _check_monitor(callback, grouped)


_SMALLEST = {
    "max_epochs": (-1, "0 or more, or -1 for no limit"),
    "max_steps": (-1, "0 or more, or -1 for no limit"),
    "min_epochs": (0, "0 or more"),
    "min_steps": (0, "0 or more"),
    "num_nodes": (1, "a number of machines, 1 or more"),
    "fast_dev_run": (0, "a number of batches, 0 or more, true or false"),
    "check_val_every_n_epoch": (1, "1 or more, or null to count the batches of val_check_interval across epochs"),
    "num_sanity_val_steps": (-1, "0 or more, or -1 for all batches"),
    "accumulate_grad_batches": (1, "1 or more"),
    "log_every_n_steps": (1, "1 or more"),
    "gradient_clip_val": (0, "0 (no clipping) or more"),
}
"""Argument of the Trainer -> its smallest value, and what is expected."""


def _check_numbers(trainer: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: a number is out of range, or the name of a rule or a profiler is unknown.
    """
    for name, (smallest, expected) in _SMALLEST.items():
        value = trainer[name]
        require(value is None or value >= smallest, f"trainer.{name} is {value}; expected {expected}")
    for name in _NUMBERS_OR_SHARES:
        value = trainer[name]
        if not isinstance(value, (int, float)):
            continue
        may_be_zero = name != "val_check_interval"
        require(
            (value > 0 or (value == 0 and may_be_zero)) and (isinstance(value, int) or value <= 1),
            f"trainer.{name} is {value}; expected a number of batches, {'0 or more' if may_be_zero else 'above 0'}, or "
            "a share of them, at most 1.0",
        )
    time = trainer["max_time"]
    require(
        not isinstance(time, str) or re.fullmatch(r"\d+:\d\d:\d\d:\d\d", time.strip()),
        f"trainer.max_time is {time}; expected days:hours:minutes:seconds, such as 00:01:30:00",
    )
    for name, known in (
        ("gradient_clip_algorithm", ("norm", "value")),
        ("profiler", ("simple", "advanced", "pytorch")),
    ):
        value = trainer[name]
        require(
            not isinstance(value, str) or value.lower() in known,
            f"trainer.{name} is {value}; expected one of {', '.join(known)}",
        )


_SPLIT_BY_LIGHTNING = ("fsdp", "deepspeed", "model_parallel")
"""Beginnings of the names of strategies that split a model themselves, and do not know its tables."""


def _check_place(trainer: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: the accelerator, the strategy or the devices are unknown, or not there.
    """
    accelerator, strategy, devices = trainer["accelerator"], trainer["strategy"], trainer["devices"]
    if isinstance(accelerator, str):
        require(
            accelerator in ("auto", "cpu", "gpu", "cuda", "mps"),
            f"trainer.accelerator is {accelerator}; expected auto, cpu or gpu",
        )
        require(
            accelerator not in ("gpu", "cuda") or torch.cuda.is_available(),
            f"trainer.accelerator is {accelerator}, but torch finds no CUDA device here; use cpu",
        )
    is_known = strategy in ("auto", *StrategyRegistry.available_strategies())
    if isinstance(strategy, str) and (not is_known or strategy.startswith(_SPLIT_BY_LIGHTNING)):
        ours = ("auto", EMBEDDING_SHARDED_DDP)
        expected = f"; expected auto for one process, or {EMBEDDING_SHARDED_DDP}"
        raise UserError(f"trainer.strategy is {strategy}{nearest(strategy, ours) or expected}")
    is_count = str(devices).isdecimal() and int(devices) >= 1
    # Lists and -1 choose GPUs; Lightning checks them.
    on_cpu = accelerator == "cpu" or not torch.cuda.is_available()
    is_choice = isinstance(devices, list) or re.fullmatch(r"-1|\d+(,\d*)*", str(devices)) is not None
    require(
        devices == "auto" or is_count or (is_choice and not on_cpu and str(devices) != "0"),
        f"trainer.devices is {devices}; expected auto, or a number of ranks, 1 or more",
    )


def _is_read_as_share(name: str) -> bool:
    """Return whether the command line reads 1 as 1.0.

    ``typing`` keeps one object for Union[int, float] and Union[float, int]: the first that a process makes.
    """
    kinds = get_args(inspect.signature(pl.Trainer).parameters[name].annotation)
    return kinds.index(float) < kinds.index(int)


def check_early_stopping_after_validation(trainer: Namespace) -> None:
    """Make every EarlyStopping of a configuration look at validations, before their checkpoints are saved.

    By default Lightning moves the check to the end of an epoch whose last step validates, after the checkpoint.

    Args:
        trainer: the Trainer's arguments, parsed and not instantiated; modified in place.

    Raises:
        UserError: a configuration asks for the check at the end of an epoch.
    """
    for callback in as_list(trainer.callbacks):
        options = callback.get("init_args")
        if options is None or "check_on_train_epoch_end" not in options:
            continue
        require(
            not options.check_on_train_epoch_end,
            "trainer.callbacks: EarlyStopping has check_on_train_epoch_end true, and would count after the checkpoint "
            "of a validation is saved, so checkpoints would lack the count: leave check_on_train_epoch_end out",
        )
        options.check_on_train_epoch_end = False


def check_processes(trainer: pl.Trainer, command: str) -> None:
    """
    Raises:
        UserError: several processes are asked for, and they do not work together.
    """
    if trainer.world_size == 1:
        return
    require(
        command != "fit" or isinstance(trainer.strategy, EmbeddingShardedDDP),
        f"training in {trainer.world_size} processes needs --trainer.strategy {EMBEDDING_SHARDED_DDP}: "
        "give it, or set --trainer.devices 1 and --trainer.num_nodes 1",
    )


def _check_monitor(callback: EarlyStopping | ReduceOnPlateau, grouped: bool) -> None:
    """
    Raises:
        UserError: a monitored metric does not exist, or the callback would stop when it should continue.
    """
    weights = callback.weights if isinstance(callback, ReduceOnPlateau) else {callback.monitor: 1.0}
    where = f"trainer.callbacks: {type(callback).__name__}'s"
    modes = {f"{names.VALIDATION}/{metric}": mode for metric, mode in names.BETTER.items()}
    by_group = f"{names.VALIDATION}/{names.GROUP_AUC}"
    require(
        grouped or by_group not in weights,
        f"{where} monitor is {by_group}, but no column is given to group by: give --data.group",
    )
    for monitor, weight in weights.items():
        require(monitor in modes, f"{where} monitor is {monitor}; expected one of {', '.join(modes)}")
        is_more_better = modes[monitor] == "max"
        wanted = "max" if is_more_better == (weight >= 0) else "min"
        remedy = f"set mode to {wanted}" if len(weights) == 1 else f"give it the weight {-weight:g}"
        require(
            callback.mode == wanted,
            f"{where} mode is {callback.mode}, but {'higher' if is_more_better else 'lower'} values of {monitor} "
            f"(weight {weight:g}) are better: {remedy}",
        )
