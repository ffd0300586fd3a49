"""Panels of the W&B workspace and report; needs the extra ``dashboards``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr

from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.tracking import names
from lightning_dlrm.tracking.dashboard import Dashboard

_SAMPLES, _TIME = names.SAMPLES, "RelativeTime(Process)"
_SHARES = (
    names.FORWARD_SHARE, names.BACKWARD_SHARE, names.UPDATE_SHARE, names.LIGHTNING_SHARE, names.DATA_WAIT_SHARE
)  # fmt: skip
_UNITS = {
    "auc": "AUC (random predictions: 0.5)",
    "log_loss": "nats per sample",
    "normalized_entropy": "log loss / log loss of the click rate",
    "accuracy": "share of the samples, from 0 to 1",
    "calibration": "predicted clicks / clicks",
}
"""Metric -> its unit, as the title of an axis."""
_SHARE = "share of the time, from 0 to 1"

_WORDS = {
    "comparison": "The results of compare: which configuration is better, by how much, and how certain that is.",
    "quality": "How well the runs predict the clicks of the validation rows. Higher is better for AUC and accuracy, "
    "lower for log loss and normalized entropy; calibration is best at 1.",
    "training": "Loss and scores on the training rows. The loss of a stable training falls; if it rises, try a "
    "lower learning rate. AUC, log loss and accuracy are of all samples so far, up to the last "
    f"{names.WINDOW_SAMPLES:,}, each scored before the update of its own step.",
    "norms": "Sizes of gradients and table rows. A norm that keeps growing is a sign that training diverges. Logged by "
    "runs with `--log_norms true` only.",
    "speed": "How many samples a run trains on per second, and what takes its time. Compare times only between runs on "
    "equal machines without other work.",
    "system": "CPU time and memory of the process of each run.",
    "GPUs": "Time and memory of the GPUs of each run. Logged by runs on GPUs only.",
    "parallel": "What the ranks send to each other, and how evenly tables and requested rows are spread over them. "
    "Logged by runs on several ranks only, and the load of each rank by comparisons of runs whose tables are sharded.",
}
"""Section -> a sentence on what it shows, with code between backticks."""


def build_workspace(dashboard: Dashboard) -> ws.Workspace:
    """Return the workspace, not saved yet, with a section for each of ``_WORDS``; ``comparison`` if asked for."""
    sections = [
        ws.Section(
            name=name,
            panels=[wr.MarkdownPanel(markdown=_WORDS[name]), *panels],
            is_open=name in ("comparison", "quality", "training"),
        )
        for name, panels in panels_of(dashboard).items()
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
    for name, panels in panels_of(dashboard).items():
        blocks += [
            wr.H1(f"{name[0].upper()}{name[1:]}"),
            wr.P([wr.InlineCode(part) if at % 2 else part for at, part in enumerate(_WORDS[name].split("`"))]),
            wr.PanelGrid(runsets=[runs], panels=panels),
        ]
    blocks += [
        wr.H1("Settings and metrics of each run"),
        wr.PanelGrid(runsets=[runs], panels=[wr.RunComparer(diff_only="split", layout=wr.Layout(w=24, h=15))]),
    ]
    return wr.Report(
        project=dashboard.project, entity=dashboard.entity, title=dashboard.title, blocks=blocks, width="fluid"
    )


def _filters(dashboard: Dashboard) -> Any:
    return "" if dashboard.group is None else expr.And(expr.Metric("Group") == dashboard.group)


def panels_of(dashboard: Dashboard) -> dict[str, list[Any]]:
    """Return the panels of each section; if asked for, lines and bars are means and ranges of runs with equal tags."""
    sections = _panels()
    if dashboard.comparison:
        shown = [name for name in names.COMPARISON_FIGURES if name != names.LOAD]
        tables = [name for name in names.COMPARISON_TABLES if name != names.LOAD]
        sections = {"comparison": _comparison_panels(shown, tables), **sections}
        sections["parallel"] += _comparison_panels([names.LOAD], [names.LOAD])
    if dashboard.by_tag:
        for panel in (panel for panels in sections.values() for panel in panels):
            if isinstance(panel, (wr.LinePlot, wr.BarPlot)):
                panel.groupby, panel.groupby_aggfunc, panel.groupby_rangefunc = "Tags", "mean", "minmax"
    return sections


def _panels() -> dict[str, list[Any]]:
    return {
        "quality": _quality_panels(),
        "training": [
            _lines(
                "training loss, smoothed",
                names.TRAIN_LOSS,
                unit="nats per sample",
                smoothing_factor=0.9,
                smoothing_type="exponentialTimeWeighted",
            ),
            *(_metric_lines(names.TRAIN, metric) for metric in names.TRAIN_METRICS),
            _lines(
                "learning rate of each optimizer",
                unit="learning rate (no unit)",
                metric_regex=f"{names.LEARNING_RATE}/.*",
            ),
        ],
        "norms": [
            _lines("norms of gradients", unit="Euclidean norm", metric_regex=f"{names.GRADIENT_NORM}/.*"),
            _lines("mean norms of updated table rows", unit="Euclidean norm", metric_regex=f"{names.ROW_NORM}/.*"),
            _lines(
                "mean norms of the gradients of table rows",
                unit="Euclidean norm",
                metric_regex=f"{names.ROW_GRADIENT_NORM}/.*",
            ),
        ],
        "speed": [
            _lines("training speed", names.SAMPLES_PER_SECOND, unit="samples per second"),
            _lines("share of the time waiting for data", names.DATA_WAIT_SHARE, unit=_SHARE, range_y=(0.0, None)),
            _lines("shares of the training time", *_SHARES, unit=_SHARE, range_y=(0.0, 1.0)),
            _lines("validation AUC over time", f"{names.VALIDATION}/auc", x=_TIME, unit=_UNITS["auc"]),
            _bars("training time", names.TRAINING_SECONDS, "seconds"),
            _bars("peak memory of the process", names.in_gib(names.PEAK_MEMORY), "GiB"),
        ],
        "system": [
            _lines("use of all CPU cores", "system/cpu", x=_TIME, unit="% of the time of all cores"),
            _lines("memory of the process", "system/proc.memory.rssMB", x=_TIME, unit="MiB"),
        ],
        "GPUs": [
            _bars("peak GPU memory", names.in_gib(names.PEAK_DEVICE_MEMORY), "GiB"),
            _lines("use of each GPU", x=_TIME, metric_regex=r"system/gpu\.\d+\.gpu", unit="% of the time"),
            _lines(
                "GPU memory in use", x=_TIME, metric_regex=r"system/gpu\.\d+\.memoryAllocated", unit="% of its memory"
            ),
        ],
        "parallel": [
            _lines("time of the exchanges of a step", names.EXCHANGE_MS, unit="milliseconds"),
            _lines("data that the busiest rank sends in a step", names.SENT_MIB, unit="MiB"),
            _lines("imbalance of requested rows", names.WORK_IMBALANCE, unit="busiest rank / mean of the ranks"),
            _bars("table rows of the fullest rank", names.ROWS_PER_RANK, "rows"),
            _bars("tables and their state on the fullest rank", names.in_gib(names.BYTES_PER_RANK), "GiB"),
        ],
    }


def _comparison_panels(figures: Sequence[str], tables: Sequence[str]) -> list[Any]:
    """Return panels of figures and tables of the run that ``compare`` logs."""
    layout = wr.Layout(w=12, h=12)
    keys = {names.comparison_figure(name): names.COMPARISON_FIGURES[name] for name in figures}
    panels: list[Any] = [
        wr.MediaBrowser(title=title, num_columns=1, media_keys=[key], layout=layout) for key, title in keys.items()
    ]
    for name in tables:
        # A panel of a table has no title of its own.
        title = wr.MarkdownPanel(markdown=f"**{names.COMPARISON_TABLES[name]}**", layout=wr.Layout(w=24, h=3))
        panels += [title, wr.WeavePanelSummaryTable(table_name=names.comparison_table(name), layout=layout)]
    return panels


def _quality_panels() -> list[Any]:
    best_auc = wr.SummaryMetric(f"{names.VALIDATION}/auc.max")
    return [
        *(_metric_lines(names.VALIDATION, metric) for metric in names.METRICS),
        # From 0.5, the AUC of random predictions: AUCs differ in the second digit.
        _bars("best validation AUC", best_auc, _UNITS["auc"], range_x=(0.5, None)),
        _curve(
            names.PRECISION_RECALL,
            "wandb/area-under-curve/v0",
            {"x": "recall", "y": "precision", "class": "class"},
            title="precision and recall, shares from 0 to 1",
            **{"x-axis-title": "recall", "y-axis-title": "precision"},
        ),
        _curve(
            names.CALIBRATION_CURVE,
            "wandb/lineseries/v0",
            {"step": "step", "lineKey": "lineKey", "lineVal": "lineVal"},
            title="observed against predicted click rate, shares from 0 to 1",
            xname="predicted click rate",
        ),
        wr.ScatterPlot(
            title="best validation AUC against training FLOPs per sample", x=wr.Config(names.FLOPS_TRAINING), y=best_auc
        ),
    ]


def _lines(title: str, *metrics: str, unit: str, x: str = _SAMPLES, **options: Any) -> Any:
    axis = "samples trained on" if x == _SAMPLES else "time since the start of the run"
    if metrics:
        options["y"] = list(metrics)
    return wr.LinePlot(title=title, x=x, title_x=axis, title_y=unit, **options)


def _metric_lines(stage: str, metric: str) -> Any:
    """Return a plot of a metric during training."""
    title, words = names.title_of(metric), {names.TRAIN: "training"}.get(stage, stage)
    return _lines(f"{words} {title}", f"{stage}/{metric}", unit=_UNITS[metric])


def _bars(title: str, metric: Any, unit: str, **options: Any) -> Any:
    return wr.BarPlot(title=title, metrics=[metric], title_x=unit, **options)


def _curve(name: str, chart: str, fields: dict[str, str], *, title: str, **axes: str) -> Any:
    """Return the plot of all runs of a curve that ``WandbExtras`` logs; ``axes`` are titles of the chart's axes."""
    key = f"{names.VALIDATION}/{name}"
    return wr.CustomChart(
        query={"id": {}, "name": {}, "summaryTable": {"tableKey": f"Custom Chart Tables/{key}_table"}},
        chart_name=chart,
        chart_fields=fields,
        chart_strings={"title": f"{names.VALIDATION}: {title}", **axes},
    )


def write_page(dashboard: Dashboard, path: Path) -> None:
    """Write what the dashboard shows as an HTML page, without its data: sections, panels, axes and metrics.

    Raises:
        UserError: the file cannot be written.
    """
    sections = [
        (
            f"{name[0].upper()}{name[1:]}",
            _WORDS[name].split("`"),
            [_describe(panel) for panel in panels if not isinstance(panel, wr.MarkdownPanel)],
        )
        for name, panels in panels_of(dashboard).items()
    ]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    text = environment.from_string(_PAGE).render(dashboard=dashboard, sections=sections)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --output") from error


def _describe(panel: Any) -> tuple[str, list[str]]:
    """Return the title of a panel, and in words its kind and metrics, and each of its axes."""
    if isinstance(panel, wr.WeavePanelSummaryTable):
        titles = {names.comparison_table(name): title for name, title in names.COMPARISON_TABLES.items()}
        return titles[panel.table_name], ["a table of the comparison's run"]
    if isinstance(panel, wr.MediaBrowser):
        return panel.title or "", ["a figure of the comparison's report"]
    if isinstance(panel, wr.CustomChart):
        return panel.chart_strings["title"], ["a curve for each run"]
    if isinstance(panel, wr.ScatterPlot):
        return panel.title or "", ["a point for each run; FLOPs are floating-point operations"]
    drawn = panel.y if isinstance(panel, wr.LinePlot) else panel.metrics
    metrics = [str(getattr(metric, "name", metric)) for metric in drawn]
    if pattern := getattr(panel, "metric_regex", None):
        # In words: N for any number, NAME for any name.
        metrics.append(pattern.replace(r"\d+", "N").replace(".*", "NAME").replace("\\", ""))
    kind = "lines" if isinstance(panel, wr.LinePlot) else "bars"
    axes = {"vertical axis": panel.title_y, "horizontal axis": panel.title_x}
    mean = "; mean and range of the runs with equal tags" if panel.groupby else ""
    described = [f"{name}: {title}" for name, title in axes.items() if title]
    return panel.title or "", [f"{kind}: {', '.join(metrics)}{mean}", *described]


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Outline of the dashboard of {{ dashboard.title }}</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: .8rem; }
.panels div { border: 1px solid #ccc; border-radius: .4rem; padding: .6rem .8rem; min-height: 5rem; }
.panels span { color: #444; font-size: .85rem; overflow-wrap: anywhere; display: block; }
code { white-space: nowrap; }
</style></head><body><h1>Outline of the dashboard of {{ dashboard.title }}</h1>
<p>The layout of the W&amp;B workspace and report of
{{ "the group " ~ dashboard.group ~ " in " if dashboard.group }}the project {{ dashboard.project }} of
{{ dashboard.entity or "your own account" }}: title, kind and metrics of each panel, without data.
<code>python -m lightning_dlrm dashboard</code> with the same options, without <code>--output</code>, saves both
at W&amp;B, with the data.</p>
{% if dashboard.findings %}<ul>{% for line in dashboard.findings %}<li>{{ line }}</li>{% endfor %}</ul>{% endif %}
{% for name, words, panels in sections %}<h2>{{ name }}</h2><p>{% for part in words %}
{{- part if loop.index0 is even else "<code>"|safe ~ part ~ "</code>"|safe }}{% endfor %}</p><div class="panels">
{% for title, about in panels %}<div><strong>{{ title }}</strong>
{% for line in about %}<span>{{ line }}</span>{% endfor %}</div>
{% endfor %}</div>{% endfor %}</body></html>
"""
