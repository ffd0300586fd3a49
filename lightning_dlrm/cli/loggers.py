"""The loggers of a run: the run folder, and W&B or the loggers of the configuration."""

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

from jsonargparse import Namespace
from pytorch_lightning.loggers import Logger, WandbLogger

from lightning_dlrm.cli.trainer_settings import as_list
from lightning_dlrm.contracts.errors import require
from lightning_dlrm.tracking.run_folder import JsonLinesLogger, RunFolder
from lightning_dlrm.tracking.wandb_mode import NO_KEY, choose_mode

log = logging.getLogger("lightning_dlrm")

JOB_TYPES = {"fit": "train", "validate": "validate", "test": "test"}


def check_api_key(command: str, given: Any, wandb: Namespace) -> None:
    """
    Args:
        command: fit, validate, test, or predict.
        given: ``trainer.logger``.
        wandb: options of W&B.

    Raises:
        UserError: W&B is to be online and has no API key.
    """
    if command not in JOB_TYPES or given not in (None, True) or wandb.mode != "online":
        return
    require(
        choose_mode("online") != ("offline", NO_KEY),
        "wandb.mode is online, but there is no API key: run wandb login, set WANDB_API_KEY, or choose another mode",
    )


def make_loggers(
    command: str, folder: RunFolder, given: Any, wandb: Namespace, configuration: Mapping[str, Any]
) -> list[Logger]:
    """Return the loggers of a run, for rank 0.

    Args:
        command: fit, validate, test, or predict, which logs nothing.
        folder: the run folder; a fit logs to its ``metrics.jsonl``.
        given: ``trainer.logger``: loggers that take W&B's place, false for none, or None.
        wandb: options of W&B.
        configuration: shown by W&B.
    """
    if command not in JOB_TYPES:
        return []
    loggers: list[Logger] = [JsonLinesLogger(folder)] if command == "fit" else []
    if given is False:
        return loggers
    if given not in (None, True):
        return [*loggers, *as_list(given)]
    mode, reason = choose_mode(wandb.mode)
    if mode == "disabled":
        return loggers
    # W&B takes long to load.
    from lightning_dlrm.tracking.wandb_run import RunPlace, start_wandb, training_run_id

    place = RunPlace(
        # W&B reads its other variables, such as WANDB_ENTITY, itself.
        project=wandb.project,
        entity=wandb.entity,
        name=wandb.name or os.environ.get("WANDB_NAME") or folder.path.name,
        group=wandb.group,
        job_type=wandb.job_type or os.environ.get("WANDB_JOB_TYPE") or JOB_TYPES[command],
        tags=wandb.tags,
    )
    run_id = training_run_id(folder) if command == "fit" else None
    logger, reason = start_wandb(folder.path, place, mode=mode, reason=reason, run_id=run_id, config=configuration)
    if reason:
        log.info("W&B: offline (%s)", reason)
    return [*loggers, logger]


def wandb_address(loggers: list[Logger], folder: RunFolder) -> str | None:
    """Return the address of the run at W&B, or the command that sends it there; None without W&B."""
    if not any(isinstance(logger, WandbLogger) for logger in loggers):
        return None
    from lightning_dlrm.tracking.wandb_run import run_address

    return run_address(loggers, folder)


def finish_loggers(succeeded: bool) -> None:
    """Close the W&B run that this process has open, if any."""
    if "wandb" in sys.modules:
        from lightning_dlrm.tracking.wandb_run import finish_wandb

        finish_wandb(succeeded)
