"""W&B run of a comparison, with its figures, tables and report, beside the compared runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import wandb

from lightning_dlrm.tracking import names
from lightning_dlrm.tracking.run_folder import RunFolder
from lightning_dlrm.tracking.wandb_run import RunPlace, finish_wandb, run_address, start_wandb, training_run_id

JOB_TYPE = "compare"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with numbers and names."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True, kw_only=True)
class ComparisonPage:
    """Figures, tables and files of a comparison.

    Args:
        figures: name in ``names.COMPARISON_FIGURES`` -> PNG files, each with its caption.
        tables: name in ``names.COMPARISON_TABLES`` -> table.
        files: files of an artifact, such as the report.
    """

    figures: Mapping[str, Sequence[tuple[Path, str]]]
    tables: Mapping[str, Table]
    files: Sequence[Path]


def send_comparison(
    page: ComparisonPage, output: Path, place: RunPlace, mode: Literal["online", "offline"], reason: str = ""
) -> tuple[str, str]:
    """Log a page in one run, which later calls for the same folder continue.

    Args:
        page: the page.
        output: folder of the comparison, which also holds W&B's files.
        place: project, group and name of the run; its job type is ``compare``.
        mode: see ``choose_mode``.
        reason: see ``choose_mode``.

    Returns:
        The URL of the page, or the command that sends it; and the reason of the offline mode, empty if online.
    """
    folder = RunFolder(output)
    logger, reason = start_wandb(
        output, place, mode=mode, reason=reason, run_id=training_run_id(folder), config={"comparison": place.name}
    )
    succeeded = False
    try:
        _log(page, logger.experiment)
        where = run_address([logger], folder) or ""
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
