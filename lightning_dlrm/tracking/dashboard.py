"""W&B workspace and report of a project or group; needs the extra ``dashboards``."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import wandb

from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.tracking.wandb_mode import choose_mode


@dataclass(frozen=True, kw_only=True)
class Dashboard:
    """Runs of a workspace and a report, and the findings of the report.

    Args:
        project: W&B project.
        entity: user or team; empty for the account's default.
        group: group of the runs; None for all runs of the project.
        findings: sentences at the head of the report, such as the verdicts of a comparison.
        comparison: show what compare found: its figures and tables, which one of the runs holds.
        by_tag: draw the mean and the range of runs with equal tags, such as the seeds of an arm, instead of each run.

    Raises:
        UserError: the group's name has characters that wandb-workspaces cannot filter by.
    """

    project: str
    entity: str = ""
    group: str | None = None
    findings: Sequence[str] = ()
    comparison: bool = False
    by_tag: bool = False

    def __post_init__(self) -> None:
        if self.group and set(self.group) & set("'\"\\"):
            raise UserError(
                f"the name of the group {self.group} has quotes or backslashes, which wandb-workspaces cannot filter "
                "by; give the runs another --wandb.group"
            )

    @property
    def title(self) -> str:
        return f"{self.project}: {self.group}" if self.group else self.project


def publish(dashboard: Dashboard) -> dict[str, str]:
    """Save a new workspace and a new report on the W&B server.

    Returns:
        URLs of ``workspace`` and ``report``.

    Raises:
        UserError: the extra is not installed, there is no API key, or the server does not answer or refuses.
    """
    panels = _panels()
    mode, reason = choose_mode("online")
    if mode != "online":
        raise UserError(
            f"dashboards are stored on the W&B server, but this machine is offline: {reason}; set WANDB_API_KEY or run "
            "'wandb login', and check the connection to the server"
        )
    with _raising_user_errors(dashboard):
        entity = dashboard.entity or wandb.Api().default_entity or ""
    located = replace(dashboard, entity=entity)
    workspace, report = panels.build_workspace(located), panels.build_report(located)
    with _raising_user_errors(dashboard):
        return {"workspace": workspace.save().url, "report": report.save().url}


def write_page(dashboard: Dashboard, path: Path) -> None:
    """Write what a dashboard shows, without its data, as an HTML page.

    Raises:
        UserError: the extra is not installed, or the file cannot be written.
    """
    _panels().write_page(dashboard, path)


def _panels() -> ModuleType:
    try:
        from lightning_dlrm.tracking import panels
    except ModuleNotFoundError as error:
        raise UserError(
            "a dashboard needs wandb-workspaces: install it with: pip install 'lightning-dlrm[dashboards]'"
        ) from error
    return panels


@contextmanager
def _raising_user_errors(dashboard: Dashboard) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # W&B's clients raise many classes, including Exception itself
        message = " ".join(str(error).split())
        raise UserError(
            f"W&B refuses the dashboard of {dashboard.project} ({message}); check that the project exists, and that "
            "the API key may write to it"
        ) from error
