"""One command of the Trainer with everything that it needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lightning_dlrm.cli.parser import CommandParser
from lightning_dlrm.engine.metrics_logger import MetricsLogger
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.engine.stopping import StopOnSignal
from lightning_dlrm.tracking.lock import FolderLock
from lightning_dlrm.tracking.run_folder import RunFolder


@dataclass(kw_only=True)
class Job:
    """One command with everything that it needs.

    Args:
        command: fit, validate, test or predict.
        parser: parser of the settings.
        settings: parsed settings, with the chosen checkpoint and seeds.
        module: the model.
        datamodule: the data.
        folder: the run folder; rank 0 chooses its path, and callbacks of other ranks get it in ``setup``.
        metrics_logger: callback with the metrics of a fit; None for evaluations.
        stop: callback that ends the command after a signal.
        made_folder: whether this command has made the run folder.
        lock: lock of the run folder, on rank 0 of a fit.
        fallbacks: checkpoints to open if the chosen one is damaged.
        saved_steps: the ``saved_steps`` of the run to resume, of before the checkpoint was chosen.
    """

    command: str
    parser: CommandParser
    settings: Namespace
    module: CTRModule
    datamodule: Any
    folder: RunFolder
    metrics_logger: MetricsLogger | None
    stop: StopOnSignal
    made_folder: bool = False
    lock: FolderLock | None = None
    fallbacks: Sequence[Path] = ()
    saved_steps: Sequence[float] = ()

    def latest_metrics(self) -> dict[str, float]:
        """Return the newest logged metrics of a fit by name; empty for an evaluation."""
        return {} if self.metrics_logger is None else self.metrics_logger.latest
