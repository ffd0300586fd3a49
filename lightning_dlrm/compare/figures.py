"""The figures of a comparison, as PNG files.

Colours are those of Okabe and Ito. Each configuration also has its own line style and marker, so figures are readable
in black and white and for colour-blind people.
"""

import base64
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from lightning_dlrm.bench.breakdown import KINDS
from lightning_dlrm.cli.palette import OKABE_ITO, TOL_MUTED, filling
from lightning_dlrm.cli.plan_report import PLOT_WIDTH as PLAN_WIDTH
from lightning_dlrm.cli.plan_report import draw as draw_plan
from lightning_dlrm.compare.anatomy import ROUNDS, STEPS, Anatomy, merge_equal
from lightning_dlrm.compare.results import METRIC_TITLES, Comparison
from lightning_dlrm.compare.runs import Arm
from lightning_dlrm.compare.statistics import Score
from lightning_dlrm.tracking import names

LINES = ("-", "--", "-.", ":", (0, (8, 2, 1, 2, 1, 2)), (0, (2, 1)), (0, (5, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
FIRST_SHOWN = 0.05
"""Share of a run at its beginning that curves do not show."""
PAGE_WIDTH = 11.0
"""Inches of a figure as wide as the report; narrower figures are scaled alike, so that letters have one size."""
SHOWN_MARKS = 8
"""Markers along a curve."""
_OPERATIONS = "floating-point operations"
_ABSCISSAE = (
    (names.SAMPLES, "samples seen"),
    (names.TRAINING_SECONDS, "seconds of training"),
    (names.SAMPLES, _OPERATIONS),
)
"""Metric and label of each x-axis; operations are those of the samples."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure and what it shows."""

    name: str
    """In ``names.COMPARISON_FIGURES``."""
    path: Path
    width: float
    """Inches."""
    title: str
    caption: str

    @property
    def data(self) -> str:
        """The file in base64, to be embedded in HTML."""
        return base64.b64encode(self.path.read_bytes()).decode()


def draw_all(
    comparison: Comparison,
    anatomies: Mapping[str, Anatomy],
    operators: Mapping[str, Mapping[str, float]],
    folder: Path,
) -> list[Picture]:
    """Draw every figure.

    Args:
        comparison: result of the comparison.
        anatomies: configuration -> its anatomy.
        operators: measured configuration -> kind of operator -> milliseconds of a step.
        folder: folder of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawing = _Drawing(comparison, folder)
    pictures = [drawing.figure5(), drawing.differences(), drawing.results()]
    pictures += [drawing.curves(metric) for metric in ("accuracy", "log_loss", "auc")]
    pictures += [drawing.calibration(), drawing.cost(), drawing.parameters(anatomies)]
    if operators:
        pictures.append(drawing.operators(operators))
    pictures += drawing.plans(anatomies)
    return pictures


class _Drawing:
    """The figures of one comparison, with one style for each of its configurations."""

    def __init__(self, comparison: Comparison, folder: Path) -> None:
        self._comparison = comparison
        self._folder = folder
        self._styles: dict[str, dict[str, Any]] = {
            arm.name: {
                "color": OKABE_ITO[i % len(OKABE_ITO)],
                "linestyle": LINES[i % len(LINES)],
                "marker": MARKERS[i % len(MARKERS)],
            }
            for i, arm in enumerate(comparison.arms)
        }

    # --- learning ---------------------------------------------------------------------------------

    def figure5(self) -> Picture:
        """Draw training and validation accuracy against samples, with a panel for each optimizer."""
        panels = self._panels()
        figure = Figure(figsize=(max(PAGE_WIDTH, 5.2 * len(panels) + 0.4), 4.4), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for panel, (title, arms) in zip(axes, panels.items(), strict=True):
            for arm in arms:
                self._course(panel, arm, names.SAMPLES, f"{names.VALIDATION}/accuracy", f"{arm.name}, validation")
                self._course(panel, arm, names.SAMPLES, "train/accuracy", f"{arm.name}, training", thin=True)
            panel.set(title=title, xlabel="samples seen")
            panel.xaxis.set_major_formatter(EngFormatter())
            panel.legend(frameon=False, fontsize=8)
        axes[0].set_ylabel("accuracy")
        return self._save(
            figure,
            "figure5",
            "Accuracy while training",
            "As in Figure 5 of Naumov et al. (2019): accuracy on the training samples (thin, over the last 65,536 "
            "of them, each scored before its step) and on the validation split (thick), after the first twentieth of "
            f"the run. {self._lines()}",
        )

    def curves(self, metric: Score) -> Picture:
        """Draw a metric, training and validation, against samples, time and operations."""
        figure = Figure(figsize=(PAGE_WIDTH, 6.2), layout="constrained")
        rows = figure.subplots(2, 3, sharey="row")
        for row, split in zip(rows, (names.TRAIN, names.VALIDATION), strict=True):
            for axes, (x, label) in zip(row, _ABSCISSAE, strict=True):
                for arm in self._comparison.arms:
                    factor = float(arm[names.FLOPS_TRAINING]) if label == _OPERATIONS else 1.0
                    self._course(axes, arm, x, f"{split}/{metric}", arm.name, factor=factor)
                axes.xaxis.set_major_formatter(EngFormatter())
                axes.locator_params(axis="x", nbins=4)
                if split == names.VALIDATION:
                    axes.set_xlabel(label)
            row[0].set_ylabel(f"{'training' if split == names.TRAIN else split} {METRIC_TITLES[metric]}")
        self._legend(figure, rows[0][0])
        return self._save(
            figure,
            metric,
            f"{METRIC_TITLES[metric][0].upper()}{METRIC_TITLES[metric][1:]} against samples, time and operations",
            "Above over the last 65,536 training samples, below on the validation split. Time is that of training, "
            "without validations and checkpoints, on the machine of the runs; operations are those of matrix products "
            "and interactions, forward and backward. After the first twentieth of the run. "
            f"{self._lines()}",
        )

    def _panels(self) -> dict[str, list[Arm]]:
        """Group configurations by optimizer, if each optimizer has several; else all in one panel."""
        panels: dict[str, list[Arm]] = {}
        for arm in self._comparison.arms:
            rule = str(arm.settings.get("model.table_optimizer.class_path")).rpartition(".")[2]
            panels.setdefault(rule, []).append(arm)
        if len(panels) > 1 and all(len(arms) > 1 for arms in panels.values()):
            return panels
        return {"": list(self._comparison.arms)}

    def _course(
        self, axes: Axes, arm: Arm, x: str, y: str, label: str, *, thin: bool = False, factor: float = 1.0
    ) -> None:
        """Draw the mean over the runs of a configuration, and the band from the lowest to the highest."""
        curves = [run.curve(x, y) for run in arm.runs]
        length = min(len(ys) for _, ys in curves)
        if not length:
            return
        xs = np.mean([curve[0][:length] for curve in curves], axis=0) * factor
        ys = np.array([curve[1][:length] for curve in curves])
        # The first values come from few samples, and would take most of the axis.
        shown = xs >= FIRST_SHOWN * xs[-1]
        xs, ys, length = xs[shown], ys[:, shown], int(shown.sum())
        style = dict(self._styles[arm.name])
        if thin:
            style |= {"marker": "" if length > 1 else ".", "linewidth": 0.9, "alpha": 0.75}
        else:
            style |= {"linewidth": 1.8, "markersize": 4, "markevery": max(1, length // SHOWN_MARKS)}
        if length == 1 and not thin:
            # One validation each, often at the same place: markers of several sizes do not hide each other.
            style |= {"fillstyle": "none", "markersize": 7 + 2 * list(self._styles).index(arm.name)}
            axes.vlines(xs, ys.min(0), ys.max(0), color=style["color"], alpha=0.15, linewidth=style["markersize"])
        axes.plot(xs, ys.mean(0), label=label, **style)
        if len(arm.runs) > 1:
            axes.fill_between(xs, ys.min(0), ys.max(0), color=style["color"], alpha=0.15, linewidth=0)

    # --- results ----------------------------------------------------------------------------------

    def differences(self) -> Picture:
        """Draw the interval of every difference."""
        comparison = self._comparison
        height = 1.7 + 0.42 * len(comparison.pairs) / len(comparison.judged)
        figure = Figure(figsize=(PAGE_WIDTH, height), layout="constrained")
        panels = figure.subplots(1, len(comparison.judged))
        for axes, metric in zip(panels, comparison.judged, strict=True):
            pairs = [pair for pair in comparison.pairs if pair.metric == metric]
            for row, pair in enumerate(pairs):
                interval = pair.difference.interval
                decided = pair.verdict in ("a_better", "b_better")
                axes.errorbar(
                    interval.value,
                    row,
                    xerr=[[interval.value - interval.low], [interval.high - interval.value]],
                    fmt="o" if decided else "s",
                    color="black" if decided else "0.45",
                    markerfacecolor="black" if decided else "white",
                    capsize=3,
                )
            axes.axvline(0, color="0.6", linewidth=0.8)
            self._rows(axes, [f"{pair.a}\nminus {pair.b}" for pair in pairs], f"difference in {METRIC_TITLES[metric]}")
            axes.tick_params(labelsize=8)
            axes.locator_params(axis="x", nbins=5)
        for axes in panels[1:]:
            axes.set_yticklabels([])
        return self._save(
            figure,
            "differences",
            "Differences",
            f"On the {comparison.split} split, with 95% intervals that count "
            + (
                "the samples only, because each side has one seed; all markers are open, without a verdict."
                if comparison.one_seed
                else "seeds and samples (the samples only if a side has one seed). Markers are filled if the verdict, "
                "adjusted for the number of verdicts by Holm's method, is that the two differ; the intervals are not "
                "adjusted."
            ),
        )

    def results(self) -> Picture:
        """Draw every run's result, with mean and interval."""
        comparison = self._comparison
        shown: tuple[Score, ...] = ("auc", "log_loss", "accuracy")
        figure = Figure(figsize=(PAGE_WIDTH, 1.6 + 0.42 * len(comparison.arms)), layout="constrained")
        panels = figure.subplots(1, len(shown), sharey=True)
        for axes, metric in zip(panels, shown, strict=True):
            for row, arm in enumerate(comparison.arms):
                style = self._styles[arm.name]
                values = comparison.values(arm, metric)
                axes.plot(
                    values, [row] * len(values), style["marker"], color=style["color"], markersize=6, fillstyle="none"
                )
                interval = comparison.intervals[arm.name, metric]
                if interval is not None:
                    reach = [[interval.value - interval.low], [interval.high - interval.value]]
                    axes.errorbar(interval.value, row + 0.22, xerr=reach, fmt="|", color=style["color"], capsize=3)
            self._rows(axes, list(self._styles), METRIC_TITLES[metric])
            axes.tick_params(axis="x", labelsize=8)
            axes.locator_params(axis="x", nbins=6)
        return self._save(
            figure,
            "results",
            "Results of every seed",
            f"On the {comparison.split} split: a mark for each run"
            + ("." if comparison.one_seed else "; below it the mean and its 95% interval over seeds and samples."),
        )

    def calibration(self) -> Picture:
        """Draw the share of clicks among samples of about the same predicted probability."""
        figure = Figure(figsize=(9.5, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        groups = self._comparison.reliability
        for name, found in groups.items():
            reach = [found.clicked - found.low, found.high - found.clicked]
            look = {"markersize": 4, "linewidth": 1.2, **self._styles[name]}
            left.errorbar(found.predicted, found.clicked, yerr=reach, label=name, **look)
            right.errorbar(found.predicted, found.clicked - found.predicted, yerr=reach, **look)
        highest = max(max(found.predicted.max(), found.high.max()) for found in groups.values())
        left.plot([0, highest], [0, highest], color="0.6", linewidth=0.8)
        right.axhline(0, color="0.6", linewidth=0.8)
        left.set(xlabel="mean predicted probability", ylabel="share of clicks")
        right.set(xlabel="mean predicted probability", ylabel="share of clicks minus predicted")
        self._legend(figure, left)
        return self._save(
            figure,
            "calibration",
            "Calibration",
            f"The samples of the {self._comparison.split} split in 20 groups of equal size by their probability"
            + ("; " if self._comparison.one_seed else ", the mean over the seeds; ")
            + "bars are Wilson's 95% intervals. On the grey line clicks are as frequent as predicted.",
        )

    # --- cost -------------------------------------------------------------------------------------

    def cost(self) -> Picture:
        """Draw time and memory of every run."""
        arms = self._comparison.arms
        shown = [
            (names.TRAINING_SECONDS, "seconds of training", 1.0),
            (names.SAMPLES_PER_SECOND, "samples/s", 1.0),
            (names.PEAK_MEMORY, "peak memory of the process, GiB", 2.0**30),
        ]
        shown = [panel for panel in shown if panel[0] == names.PEAK_MEMORY or self._comparison.steady(panel[0])]
        figure = Figure(figsize=(PAGE_WIDTH, 1.5 + 0.42 * len(arms)), layout="constrained")
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, (name, label, unit) in zip(panels, shown, strict=True):
            for row, arm in enumerate(arms):
                values = [run.final[name] / unit for run in arm.runs if run.final.get(name) is not None]
                if values:
                    axes.barh(row, np.median(values), color=self._styles[arm.name]["color"], alpha=0.45, height=0.6)
                    axes.plot(
                        values, [row] * len(values), self._styles[arm.name]["marker"], color="black", markersize=4
                    )
            self._rows(axes, list(self._styles), label)
            axes.set_xlim(left=0)
            if name == names.SAMPLES_PER_SECOND:
                axes.xaxis.set_major_formatter(EngFormatter())
        return self._save(
            figure,
            "cost",
            "Time and memory",
            "A mark for each run, bars are medians. Runs at the same time share cores. Times that differ more than 1.5 "
            "times between the runs of a configuration are not shown.",
        )

    def parameters(self, anatomies: Mapping[str, Anatomy]) -> Picture:
        """Draw the parameters of each table, and of the dense parts as a stacked bar."""
        distinct = merge_equal(anatomies)
        most: dict[str, int] = {}
        for anatomy in distinct.values():
            most |= {name: max(count, most.get(name, 0)) for name, count in anatomy.tables.items()}
        shown = list(most) if len(most) <= 40 else sorted(most, key=lambda name: -most[name])[:40]
        figure = Figure(figsize=(PAGE_WIDTH, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
        width = 0.8 / len(distinct)
        for i, (title, anatomy) in enumerate(distinct.items()):
            at = np.arange(len(shown)) + (i - (len(distinct) - 1) / 2) * width
            left.bar(at, [anatomy.tables.get(name, 0) for name in shown], width, label=title, **filling(i))
        left.set_xticks(range(len(shown)), shown, rotation=90, fontsize=8)
        left.set(yscale="log", xlabel="table", ylabel="parameters", xmargin=0.01)
        if len(distinct) > 1:
            # Above the axes: inside they would hide bars.
            left.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(distinct), frameon=False, fontsize=8)
        parts = dict.fromkeys(name for anatomy in distinct.values() for name in anatomy.dense)
        amounts = {part: [anatomy.dense.get(part, 0) for anatomy in distinct.values()] for part in parts}
        _stack(right, list(distinct), amounts, "{:,.0f}")
        right.set(xlabel="dense parts", ylabel="parameters")
        right.yaxis.set_major_formatter(EngFormatter())
        return self._save(
            figure,
            "parameters",
            "Parameters",
            "Of each embedding table, on a logarithmic scale, and of the dense parts.",
        )

    def operators(self, operators: Mapping[str, Mapping[str, float]]) -> Picture:
        """Draw the time of a training step by kind of operator as a stacked bar."""
        figure = Figure(figsize=(2.2 + 1.7 * len(operators) + 2.2, 4.4), layout="constrained")
        axes = figure.subplots()
        amounts = {kind: [operators[arm][kind] for arm in operators] for kind in KINDS}
        _stack(axes, list(operators), amounts, "{:.2f}")
        axes.set_ylabel("milliseconds of a training step")
        return self._save(
            figure,
            "operators",
            "Time of a step by operator",
            "One training step by kind of operator, forward, backward and update together, from PyTorch's profiler: "
            f"for each kind the least time of {ROUNDS * STEPS} steps with the runs' batch size, on the machine that "
            "made this report, outside Lightning.",
        )

    def plans(self, anatomies: Mapping[str, Anatomy]) -> list[Picture]:
        """Draw the load of each rank for configurations with sharded tables."""
        pictures = []
        for arm, anatomy in anatomies.items():
            found = anatomy.sharding
            if found is None:
                continue
            path = self._folder / f"plan_{_file_name(arm)}.png"
            draw_plan(found.plan, found.loads, found.costs, found.batch_size, path, self._warning())
            pictures.append(
                Picture(
                    name="load",
                    path=path,
                    width=PLAN_WIDTH,
                    title=f"Load of each rank: {arm}",
                    caption="Bytes and requested rows of each rank, and bytes sent in a training step, by the plan.",
                )
            )
        return pictures

    # --- all --------------------------------------------------------------------------------------

    @staticmethod
    def _rows(axes: Axes, labels: Sequence[str], xlabel: str) -> None:
        """Label the rows of a panel from top to bottom, and its x-axis."""
        axes.set_yticks(range(len(labels)), labels)
        axes.set(xlabel=xlabel, ylim=(len(labels) - 0.5, -0.5))

    def _legend(self, figure: Figure, axes: Axes) -> None:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)

    def _lines(self) -> str:
        """Return a description of the lines of curves."""
        if self._comparison.one_seed:
            return "Each line is of one run."
        return "Lines are means over the seeds, bands reach from the lowest seed to the highest."

    def _warning(self) -> str:
        warnings = self._comparison.warnings
        return f"WARNING: different data ({'; '.join(warnings)})" if warnings else ""

    def _save(self, figure: Figure, name: str, title: str, caption: str) -> Picture:
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="0.92", linewidth=0.7)
            axes.set_axisbelow(True)
        if warning := self._warning():
            figure.text(0.5, 0.5, "DIFFERENT DATA", color="#D55E00", alpha=0.25, fontsize=40, ha="center", va="center",
                        rotation=20)  # fmt: skip
            figure.suptitle(
                "\n".join(textwrap.wrap(warning, int(figure.get_figwidth() * 13))), color="#D55E00", fontsize=8
            )
        path = self._folder / f"{name}.png"
        figure.savefig(path, dpi=150)
        if self._comparison.warnings:
            caption += " The runs are of different data: each is scored on its own."
        return Picture(name=name, path=path, width=figure.get_figwidth(), title=title, caption=caption)


def _stack(axes: Axes, bars: Sequence[str], amounts: Mapping[str, Sequence[float]], text: str) -> None:
    """Draw stacked bars; large parts show their number."""
    bottom = np.zeros(len(bars))
    highest = np.sum(list(amounts.values()), axis=0).max()
    for i, (name, values) in enumerate(amounts.items()):
        # Configurations have the colours of the other palette.
        look: dict[str, Any] = filling(i, TOL_MUTED)
        axes.bar(range(len(bars)), values, 0.6, bottom, label=name, **look)
        for x, value in enumerate(values):
            if value > 0.06 * highest:
                box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
                axes.text(x, bottom[x] + value / 2, text.format(value), ha="center", va="center", fontsize=8, bbox=box)
        bottom += np.array(values)
    axes.set_ylim(0, 1.05 * highest)
    axes.set_xticks(range(len(bars)), bars, fontsize=8)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)


def _file_name(arm: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in arm)
