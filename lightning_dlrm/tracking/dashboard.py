"""The W&B workspace and report of a project or group, as code; with W&B's own package (extra ``dashboards``)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.tracking import names
from lightning_dlrm.tracking.wandb_mode import choose_mode
from lightning_dlrm.tracking.wandb_run import default_entity

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import Report
    from wandb_workspaces.workspaces import Workspace

_SAMPLES, _TIME = names.SAMPLES, "RelativeTime(Process)"
_TITLES = {
    "auc": "AUC",
    "log_loss": "log loss, nats per sample",
    "normalized_entropy": "normalised entropy",
    "accuracy": "accuracy",
    "calibration": "predicted clicks / clicks",
}


@dataclass(frozen=True, kw_only=True)
class Dashboard:
    """Which runs, and what is said of them.

    Args:
        project: W&B project.
        entity: user or team; empty for the account's own.
        group: the runs of this group only; None for all of the project.
        findings: sentences at the head of the report, such as the verdicts of a comparison.

    Raises:
        UserError: W&B's package cannot filter by the group's name.
    """

    project: str
    entity: str = ""
    group: str | None = None
    findings: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.group and set(self.group) & set("'\"\\"):
            raise UserError(
                f"the group {self.group} has quotes or backslashes in its name, by which wandb-workspaces cannot "
                "filter; give the runs another --wandb.group"
            )

    @property
    def title(self) -> str:
        return f"{self.project}: {self.group}" if self.group else self.project


def build_workspace(dashboard: Dashboard) -> "Workspace":
    """The workspace, not saved yet: comparison, quality, training, speed, system, parallel.

    Raises:
        UserError: the extra is not installed.
    """
    _require_extra()
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    sections = [
        ws.Section(name=name, panels=panels, is_open=name in ("comparison", "quality", "training"))
        for name, panels in _panels().items()
    ]
    return ws.Workspace(
        name=dashboard.title,
        entity=dashboard.entity,
        project=dashboard.project,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis=_SAMPLES, tooltip_number_of_runs="all_runs"),
        runset_settings=ws.RunsetSettings(
            filters=_filters(dashboard),
            order=[expr.Ordering(expr.Summary(f"{names.VALIDATION}/auc.max"), ascending=False)],
            pinned_columns=[
                f"summary:{names.VALIDATION}/auc.max",
                f"summary:{names.VALIDATION}/log_loss.min",
                f"config:{names.PARAMETERS_TABLES}",
                f"config:{names.PARAMETERS_DENSE}",
                f"config:{names.FLOPS_TRAINING}",
            ],
        ),
    )


def build_report(dashboard: Dashboard) -> "Report":
    """The report, not saved yet: the findings, then the panels of the workspace, section by section.

    Raises:
        UserError: the extra is not installed.
    """
    _require_extra()
    import wandb_workspaces.reports.v2 as wr

    runs = wr.Runset(
        # With an entity, W&B is asked for the project's number: that is the case when the report is saved.
        entity=dashboard.entity,
        project=dashboard.project,
        name=dashboard.group or "all runs",
        filters=_filters(dashboard),
    )
    blocks: list[Any] = [wr.TableOfContents()]
    if dashboard.findings:
        blocks += [wr.H1("Findings"), wr.UnorderedList(list(dashboard.findings))]
    for name, panels in _panels().items():
        blocks += [wr.H1(name.capitalize()), wr.PanelGrid(runsets=[runs], panels=panels)]
    blocks += [
        wr.H1("Settings and figures of each run"),
        wr.PanelGrid(runsets=[runs], panels=[wr.RunComparer(diff_only="split", layout=wr.Layout(w=24, h=15))]),
    ]
    return wr.Report(
        project=dashboard.project, entity=dashboard.entity, title=dashboard.title, blocks=blocks, width="fluid"
    )


def publish(dashboard: Dashboard) -> dict[str, str]:
    """Saves the workspace and the report at the W&B server, both as new ones.

    Returns:
        Their addresses: ``workspace`` and ``report``.

    Raises:
        UserError: the extra is not installed, there is no API key, or the server does not answer or refuses.
    """
    _require_extra()
    mode, reason = choose_mode("online")
    if mode != "online":
        raise UserError(
            f"a dashboard is kept at the W&B server, and this machine is offline: {reason}; give WANDB_API_KEY or run "
            "'wandb login', and see that the server can be reached"
        )
    with _refusals_told(dashboard):
        entity = dashboard.entity or default_entity()
    located = replace(dashboard, entity=entity)
    workspace, report = build_workspace(located), build_report(located)
    with _refusals_told(dashboard):
        return {"workspace": workspace.save().url, "report": report.save().url}


@contextmanager
def _refusals_told(dashboard: Dashboard) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # W&B's clients raise many classes, Exception itself among them
        words = " ".join(str(error).split())
        raise UserError(
            f"W&B refuses the dashboard of {dashboard.project} ({words}); see that the project is there, and that "
            "the API key may write to it"
        ) from error


def _filters(dashboard: Dashboard) -> Any:
    from wandb_workspaces import expr

    return "" if dashboard.group is None else expr.And(expr.Metric("Group") == dashboard.group)


def _panels() -> dict[str, list[Any]]:
    """Section -> its panels."""
    import wandb_workspaces.reports.v2 as wr

    def lines(title: str, *metrics: str, x: str = _SAMPLES, **options: Any) -> Any:
        axis = "samples trained on" if x == _SAMPLES else "time"
        return wr.LinePlot(title=title, x=x, y=list(metrics), title_x=axis, **options)

    def all_of(title: str, prefix: str) -> Any:
        return wr.LinePlot(title=title, x=_SAMPLES, metric_regex=f"{prefix}/.*", title_x="samples trained on")

    def course(metric: str, **options: Any) -> Any:
        both = (f"{names.VALIDATION}/{metric}", f"{names.TRAIN}/{metric}")
        title = f"{metric.replace('_', ' ')}, validation and training"
        return lines(title, *both, title_y=_TITLES[metric], **options)

    best_auc = wr.SummaryMetric(f"{names.VALIDATION}/auc.max")
    return {
        # Of the run that compare itself logs.
        "comparison": [
            *(
                wr.MediaBrowser(
                    title=title, num_columns=1, media_keys=[names.comparison_figure(name)], layout=wr.Layout(w=12, h=12)
                )
                for name, title in names.COMPARISON_FIGURES.items()
            ),
            *(
                wr.WeavePanelSummaryTable(table_name=names.comparison_table(name), layout=wr.Layout(w=12, h=12))
                for name in names.COMPARISON_TABLES
            ),
        ],
        "quality": [
            *(course(metric) for metric in names.METRICS),
            wr.BarPlot(title="best validation AUC", metrics=[best_auc], title_x="AUC"),
            _curve(
                names.PRECISION_RECALL, "wandb/area-under-curve/v0", x="recall", y="precision", **{"class": "class"}
            ),
            _curve(names.CALIBRATION_CURVE, "wandb/lineseries/v0", step="step", lineKey="lineKey", lineVal="lineVal"),
            wr.ScatterPlot(
                title="best validation AUC against FLOPs per sample",
                x=wr.Config(names.FLOPS_TRAINING),
                y=best_auc,
            ),
        ],
        "training": [
            lines("training loss", names.TRAIN_LOSS, title_y="nats per sample"),
            all_of("learning rates", names.LEARNING_RATE),
            all_of("norms of gradients", names.GRADIENT_NORM),
            all_of("norms of touched table rows, mean", names.ROW_NORM),
            all_of("norms of their gradients, mean", names.ROW_GRADIENT_NORM),
        ],
        "speed": [
            lines("speed", names.SAMPLES_PER_SECOND, title_y="samples/s"),
            lines("share of the time waiting for data", names.DATA_WAIT_SHARE, range_y=(0.0, None)),
            course("auc", x=_TIME),
            wr.BarPlot(title="time of training", metrics=[names.TRAINING_SECONDS], title_x="s"),
            wr.BarPlot(title="most memory held", metrics=[names.PEAK_MEMORY], title_x="bytes"),
            wr.BarPlot(title="most GPU memory held", metrics=[names.PEAK_DEVICE_MEMORY], title_x="bytes"),
        ],
        "system": [
            lines("processor", "system/cpu", x=_TIME, title_y="%"),
            lines("memory of the process", "system/proc.memory.rssMB", x=_TIME, title_y="MB"),
            wr.LinePlot(title="GPU", x=_TIME, metric_regex=r"system/gpu\.\d+\.gpu", title_x="time", title_y="%"),
            wr.LinePlot(
                title="GPU memory",
                x=_TIME,
                metric_regex=r"system/gpu\.\d+\.memoryAllocatedBytes",
                title_x="time",
                title_y="bytes",
            ),
        ],
        "parallel": [
            lines("exchanges of a step", names.EXCHANGE_MS, title_y="ms"),
            lines("sent in a step", names.SENT_BYTES, title_y="bytes"),
            lines("work of the busiest rank / mean", names.WORK_IMBALANCE),
            wr.BarPlot(title="table rows of the fullest rank", metrics=[names.ROWS_PER_RANK]),
            wr.BarPlot(
                title="tables and their state on the fullest rank", metrics=[names.BYTES_PER_RANK], title_x="bytes"
            ),
        ],
    }


def _curve(name: str, chart: str, **fields: str) -> Any:
    """A plot that ``WandbExtras`` logs, of all runs together."""
    import wandb_workspaces.reports.v2 as wr

    key = f"{names.VALIDATION}/{name}"
    return wr.CustomChart(
        query={"id": {}, "name": {}, "summaryTable": {"tableKey": f"Custom Chart Tables/{key}_table"}},
        chart_name=chart,
        chart_fields=fields,
        chart_strings={"title": key.replace("_", " ").replace("/", ": ")},
    )


def _require_extra() -> None:
    try:
        import wandb_workspaces  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            "a dashboard needs wandb-workspaces: install it with: pip install 'lightning-dlrm[dashboards]'"
        ) from error
