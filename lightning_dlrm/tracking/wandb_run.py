"""Weights & Biases: the only place that knows it."""

import netrc
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import wandb
from pytorch_lightning.loggers import WandbLogger

from lightning_dlrm.tracking import names

Mode = Literal["auto", "online", "offline", "disabled"]


def choose_mode(mode: Mode, seconds: float = 3.0) -> tuple[Literal["online", "offline", "disabled"], str]:
    """Whether the run goes online, and why not.

    W&B itself would prompt for a missing key and wait minutes for a missing network, so this is
    decided before it starts.

    Args:
        mode: ``auto`` goes online where there is a key and the server answers; WANDB_MODE, where
            set, takes the place of ``auto``.
        seconds: how long the server may take to answer.

    Returns:
        The mode, and the reason for ``offline`` in a few words.
    """
    if mode == "auto":
        wanted = os.environ.get("WANDB_MODE", "").lower()
        if wanted == "disabled":
            return "disabled", ""
        if wanted in ("offline", "dryrun"):
            return "offline", "WANDB_MODE asks for it"
    if mode in ("offline", "disabled"):
        return mode, "asked for" if mode == "offline" else ""
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host = server.hostname or "api.wandb.ai"
    if not _has_key(host):
        return "offline", "no API key"
    try:
        socket.create_connection((host, server.port or (80 if server.scheme == "http" else 443)), seconds).close()
    except OSError:
        return "offline", f"{host} does not answer"
    return "online", ""


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def start_wandb(
    folder: Path,
    *,
    mode: Literal["online", "offline"],
    reason: str,
    project: str,
    name: str,
    group: str | None,
    tags: Sequence[str],
    config: Mapping[str, Any],
) -> tuple[WandbLogger, str]:
    """Starts a run with Lightning's WandbLogger; its files lie in the run folder.

    Where the server refuses the run, it goes on offline: a fit is worth more than its page.

    Args:
        folder: the run folder.
        mode: see ``choose_mode``.
        reason: see ``choose_mode``.
        project: W&B project.
        name: of the run.
        group: of the run, such as an experiment of several runs.
        tags: of the run.
        config: what the run's page shows as its configuration.

    Returns:
        The logger, and the reason for being offline; empty where the run is online.
    """

    def start(mode: Literal["online", "offline"]) -> WandbLogger:
        run = wandb.init(
            project=project,
            name=name,
            group=group,
            tags=list(tags),
            dir=folder,
            mode=mode,
            config=dict(config),
            # Console output would fill an offline run with every redraw of a progress bar.
            settings=wandb.Settings(console="off", silent=True, init_timeout=30),
        )
        # Runs of different batch sizes are compared by the samples they have seen.
        run.define_metric(names.SAMPLES)
        run.define_metric("*", step_metric=names.SAMPLES)
        return WandbLogger(experiment=run)

    if mode == "online":
        try:
            return start("online"), ""
        except (wandb.Error, OSError) as error:
            reason = " ".join(str(error).split())
    return start("offline"), reason


def offline_folder(logger: WandbLogger) -> Path:
    """Where an offline run's files lie, for ``wandb sync``."""
    return Path(logger.experiment.dir).parent


def finish_wandb(succeeded: bool) -> None:
    """Closes the run that this process has open, if any: its files are complete, its state is told."""
    if wandb.run is not None:
        wandb.finish(exit_code=0 if succeeded else 1)
