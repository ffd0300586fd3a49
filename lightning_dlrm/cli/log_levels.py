"""Levels of the loggers: all messages of this project, and warnings of Lightning."""

import logging
import warnings

from pytorch_lightning.utilities.rank_zero import rank_zero_only

SPOKEN_AT_INFO = ("lightning_fabric.strategies.launchers.subprocess_script", "pytorch_lightning.profilers")
"""Loggers of Lightning whose INFO messages are shown: a rank that died, and the report of a profiler."""


def configure_logging() -> None:
    """Set the levels of loggers; Lightning's INFO messages are advice for authors of training code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log = logging.getLogger("lightning_dlrm")
    log.setLevel(logging.INFO)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in SPOKEN_AT_INFO:
        logging.getLogger(name).setLevel(logging.INFO)
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        log.setLevel(logging.WARNING)
