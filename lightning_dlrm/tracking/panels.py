"""Panels of the W&B workspace and report; needs the extra ``dashboards``."""

from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr

from lightning_dlrm.tracking import names
from lightning_dlrm.tracking.dashboard import Dashboard

_SAMPLES, _TIME = names.SAMPLES, "RelativeTime(Process)"
_TITLES = {
    "auc": "AUC",
    "log_loss": "log loss, nats per sample",
    "normalized_entropy": "normalized entropy",
    "accuracy": "accuracy",
    "calibration": "predicted clicks / clicks",
}


def build_workspace(dashboard: Dashboard) -> ws.Workspace:
    """Return the workspace, not saved yet: comparison, quality, training, speed, system, parallel."""
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


def build_report(dashboard: Dashboard) -> wr.Report:
    """Return the report, not saved yet: the findings, then the panels of the workspace by section."""
    runs = wr.Runset(
        # W&B looks up the project when the report is saved.
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
        wr.H1("Settings and metrics of each run"),
        wr.PanelGrid(runsets=[runs], panels=[wr.RunComparer(diff_only="split", layout=wr.Layout(w=24, h=15))]),
    ]
    return wr.Report(
        project=dashboard.project, entity=dashboard.entity, title=dashboard.title, blocks=blocks, width="fluid"
    )


def _filters(dashboard: Dashboard) -> Any:
    return "" if dashboard.group is None else expr.And(expr.Metric("Group") == dashboard.group)


def _panels() -> dict[str, list[Any]]:
    """Return the panels of each section."""
    return {
        "comparison": _comparison_panels(),
        "quality": _quality_panels(),
        "training": [
            _lines("training loss", names.TRAIN_LOSS, title_y="nats per sample"),
            _lines("learning rates", metric_regex=f"{names.LEARNING_RATE}/.*"),
            _lines("norms of gradients", metric_regex=f"{names.GRADIENT_NORM}/.*"),
            _lines("mean norms of updated table rows", metric_regex=f"{names.ROW_NORM}/.*"),
            _lines("mean norms of their gradients", metric_regex=f"{names.ROW_GRADIENT_NORM}/.*"),
        ],
        "speed": [
            _lines("speed", names.SAMPLES_PER_SECOND, title_y="samples/s"),
            _lines("share of the time waiting for data", names.DATA_WAIT_SHARE, range_y=(0.0, None)),
            _metric_lines("auc", x=_TIME),
            _bars("time of training", names.TRAINING_SECONDS, "s"),
            _bars("peak memory", names.PEAK_MEMORY, "bytes"),
            _bars("peak GPU memory", names.PEAK_DEVICE_MEMORY, "bytes"),
        ],
        "system": [
            _lines("processor", "system/cpu", x=_TIME, title_y="%"),
            _lines("memory of the process", "system/proc.memory.rssMB", x=_TIME, title_y="MB"),
            _lines("GPU", x=_TIME, metric_regex=r"system/gpu\.\d+\.gpu", title_y="%"),
            _lines("GPU memory", x=_TIME, metric_regex=r"system/gpu\.\d+\.memoryAllocatedBytes", title_y="bytes"),
        ],
        "parallel": [
            _lines("exchanges of a step", names.EXCHANGE_MS, title_y="ms"),
            _lines("sent in a step", names.SENT_BYTES, title_y="bytes"),
            _lines("work of the busiest rank / mean", names.WORK_IMBALANCE),
            _bars("table rows of the fullest rank", names.ROWS_PER_RANK),
            _bars("tables and their state on the fullest rank", names.BYTES_PER_RANK, "bytes"),
        ],
    }


def _comparison_panels() -> list[Any]:
    """Return the panels of the run that ``compare`` logs."""
    layout = wr.Layout(w=12, h=12)
    figures = {names.comparison_figure(name): title for name, title in names.COMPARISON_FIGURES.items()}
    return [
        *(wr.MediaBrowser(title=figures[key], num_columns=1, media_keys=[key], layout=layout) for key in figures),
        *(
            wr.WeavePanelSummaryTable(table_name=names.comparison_table(name), layout=layout)
            for name in names.COMPARISON_TABLES
        ),
    ]


def _quality_panels() -> list[Any]:
    best_auc = wr.SummaryMetric(f"{names.VALIDATION}/auc.max")
    return [
        *(_metric_lines(metric) for metric in names.METRICS),
        _bars("best validation AUC", best_auc, "AUC"),
        _curve(
            names.PRECISION_RECALL,
            "wandb/area-under-curve/v0",
            {"x": "recall", "y": "precision", "class": "class"},
        ),
        _curve(
            names.CALIBRATION_CURVE,
            "wandb/lineseries/v0",
            {"step": "step", "lineKey": "lineKey", "lineVal": "lineVal"},
        ),
        wr.ScatterPlot(
            title="best validation AUC against FLOPs per sample", x=wr.Config(names.FLOPS_TRAINING), y=best_auc
        ),
    ]


def _lines(title: str, *metrics: str, x: str = _SAMPLES, **options: Any) -> Any:
    axis = "samples trained on" if x == _SAMPLES else "time"
    if metrics:
        options["y"] = list(metrics)
    return wr.LinePlot(title=title, x=x, title_x=axis, **options)


def _metric_lines(metric: str, **options: Any) -> Any:
    """Return a plot of a metric during training, of the validation split and of the training samples."""
    both = (f"{names.VALIDATION}/{metric}", f"{names.TRAIN}/{metric}")
    title = f"{_TITLES[metric].partition(',')[0]}, validation and training"
    return _lines(title, *both, title_y=_TITLES[metric], **options)


def _bars(title: str, metric: Any, unit: str | None = None) -> Any:
    return wr.BarPlot(title=title, metrics=[metric], title_x=unit)


def _curve(name: str, chart: str, fields: dict[str, str]) -> Any:
    """Return the plot of all runs of a curve that ``WandbExtras`` logs."""
    key = f"{names.VALIDATION}/{name}"
    return wr.CustomChart(
        query={"id": {}, "name": {}, "summaryTable": {"tableKey": f"Custom Chart Tables/{key}_table"}},
        chart_name=chart,
        chart_fields=fields,
        chart_strings={"title": key.replace("_", " ").replace("/", ": ")},
    )
