"""A comparison's page at W&B: its figures, tables and report, as a run beside those that it compares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import wandb

from lightning_dlrm.tracking import names
from lightning_dlrm.tracking.run_folder import RunFolder
from lightning_dlrm.tracking.wandb_run import RunPlace, finish_wandb, start_wandb, training_run_id, whereabouts

JOB_TYPE = "compare"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of numbers and names."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True, kw_only=True)
class ComparisonPage:
    """What is shown.

    Args:
        figures: by their names in ``names.COMPARISON_FIGURES``: PNG files, each with its caption.
        tables: by their names in ``names.COMPARISON_TABLES``.
        files: such as the report, kept as an artifact.
    """

    figures: Mapping[str, Sequence[tuple[Path, str]]]
    tables: Mapping[str, Table]
    files: Sequence[Path]


def send_comparison(
    page: ComparisonPage, output: Path, place: RunPlace, mode: Literal["online", "offline"], reason: str = ""
) -> tuple[str, str]:
    """Logs a page in one run, which a later call goes on with.

    Args:
        page: what is shown.
        output: folder of the comparison; W&B's files lie there.
        place: where the run appears; its job type is ``compare``.
        mode: see ``choose_mode``.
        reason: see ``choose_mode``.

    Returns:
        The page's address, or how it gets there; and the reason for being offline, empty where the run is online.
    """
    folder = RunFolder(output)
    logger, reason = start_wandb(
        output, place, mode=mode, reason=reason, run_id=training_run_id(folder), config={"comparison": place.name}
    )
    succeeded = False
    try:
        _log(page, logger.experiment)
        where = whereabouts([logger], folder) or ""
        succeeded = True
    finally:
        finish_wandb(succeeded)
    return where, reason


def _log(page: ComparisonPage, run: wandb.Run) -> None:
    shown: dict[str, Any] = {
        names.comparison_figure(name): [wandb.Image(str(path), caption=caption) for path, caption in pictures]
        for name, pictures in page.figures.items()
    }
    for name, table in page.tables.items():
        rows = [list(row) for row in table.rows]
        shown[names.comparison_table(name)] = wandb.Table(columns=list(table.columns), data=rows)
    run.log(shown)
    report = wandb.Artifact(f"comparison-{run.id}", "report")
    for path in page.files:
        report.add_file(str(path))
    run.log_artifact(report)
