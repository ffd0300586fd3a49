"""The figures of a comparison, as PNG files: learning, results, and costs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from lightning_dlrm.compare.anatomy import Anatomy
from lightning_dlrm.compare.cost_figures import CostDrawing
from lightning_dlrm.compare.drawing import NARROW_WIDTH, Drawing, Picture
from lightning_dlrm.compare.results import METRIC_TITLES, Comparison
from lightning_dlrm.compare.runs import Arm
from lightning_dlrm.compare.statistics import HIGHER_IS_BETTER, Score
from lightning_dlrm.tracking import names

FIRST_SHOWN = 0.05
"""Share of a run at its beginning that curves do not show."""
SHOWN_MARKS = 8
"""Markers along a curve."""
_OPERATIONS = "floating-point operations"
_COMMON_SCALE = 50
"""Largest ratio of the operations of two configurations that one axis shows."""
_LEVEL_LOOK: dict[str, Any] = {"color": "0.45", "linestyle": (0, (1, 1.5)), "linewidth": 1.2}
"""Style of the line of a score that is reached without a model."""


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
    # The narrow figures first: the page looks for them beside the files of the wide figures.
    for narrow in (True, False):
        drawing, costs = _ResultDrawing(comparison, folder, narrow), CostDrawing(comparison, folder, narrow)
        pictures = [drawing.differences(), drawing.curves("auc"), drawing.results()]
        pictures += [drawing.figure5(), drawing.curves("accuracy"), drawing.curves("log_loss")]
        pictures += [drawing.calibration(), costs.cost(), costs.parameters(anatomies)]
        if operators:
            pictures.append(costs.operators(operators))
    return pictures + costs.plans(anatomies)


class _ResultDrawing(Drawing):
    """The figures of learning and of results."""

    # --- learning ---------------------------------------------------------------------------------

    def figure5(self) -> Picture:
        """Draw training and validation accuracy against samples, with a panel for each optimizer."""
        panels = self._panels()
        figure, axes = self.panels(len(panels), 3.2 if self.narrow else 4.4, sharey=True)
        for panel, (title, arms) in zip(axes, panels.items(), strict=True):
            for arm in arms:
                self._course(panel, arm, names.SAMPLES, f"{names.VALIDATION}/accuracy", f"{arm.name}, validation")
                self._course(panel, arm, names.SAMPLES, "train/accuracy", f"{arm.name}, training", thin=True)
            self._constant_answer(panel)
            panel.set(title=title, xlabel="samples seen")
            panel.xaxis.set_major_formatter(EngFormatter())
            panel.legend(frameon=False, fontsize=6 if self.narrow else 8)
            if self.narrow or panel is axes[0]:
                panel.set_ylabel("accuracy")
        return self.save(
            figure,
            "figure5",
            "Accuracy while training",
            "As in Figure 5 of Naumov et al. (2019): accuracy on the training samples (thin, over the last 65,536 "
            "of them, each scored before its step) and on the validation split (thick), after the first twentieth of "
            f"the run. {self._lines()}",
        )

    def curves(self, metric: Score) -> Picture:
        """Draw a metric, training and validation, against samples, time and operations."""
        abscissae = self._abscissae()
        figure = Figure(figsize=(self.width, 4.0 * len(abscissae) if self.narrow else 6.2), layout="constrained")
        # A row for each split; in a narrow figure a row for each split of each x-axis.
        grid = np.array(figure.subplots(2 * len(abscissae), 1) if self.narrow else
                        figure.subplots(2, len(abscissae), sharey="row")).reshape(2, -1)  # fmt: skip
        for row, split in zip(grid, (names.TRAIN, names.VALIDATION), strict=True):
            for axes, (x, label) in zip(row, abscissae, strict=True):
                for arm in self.arms:
                    factor = float(arm[names.FLOPS_TRAINING]) if label == _OPERATIONS else 1.0
                    self._course(axes, arm, x, f"{split}/{metric}", arm.name, factor=factor)
                if metric == "accuracy":
                    self._constant_answer(axes)
                axes.xaxis.set_major_formatter(EngFormatter())
                axes.locator_params(axis="x", nbins=4)
                if split == names.VALIDATION or self.narrow:
                    axes.set_xlabel(label)
                if axes is row[0] or self.narrow:
                    axes.set_ylabel(f"{'training' if split == names.TRAIN else split} {METRIC_TITLES[metric]}")
        self.legend(figure, grid[0][0])
        against = " and ".join(filter(None, [", ".join(label for _, label in abscissae[:-1]), abscissae[-1][1]]))
        return self.save(
            figure,
            metric,
            f"{METRIC_TITLES[metric][0].upper()}{METRIC_TITLES[metric][1:]} against {against}",
            "Above: the last 65,536 training samples, each scored before its step; below: the validation split. "
            "The first twentieth of the run is not shown. "
            + (
                "Time is that of training, without validations and checkpoints. "
                if len({x for x, _ in abscissae}) > 1
                else ""
            )
            + self._lines(),
        )

    def _abscissae(self) -> list[tuple[str, str]]:
        """Return metric and label of each x-axis: no time if it varies too much, no operations if they are unknown or
        have no common scale."""
        found = [(names.SAMPLES, "samples seen")]
        if self.comparison.steady(names.TRAINING_SECONDS):
            found.append((names.TRAINING_SECONDS, "seconds of training"))
        operations = [arm[names.FLOPS_TRAINING] for arm in self.comparison.arms]
        if 0 < max(operations) <= _COMMON_SCALE * min(operations):
            found.append((names.SAMPLES, _OPERATIONS))
        return found

    def _constant_answer(self, axes: Axes) -> None:
        """Draw the accuracy on the validation split of a model that always gives the more frequent answer."""
        final = self.comparison.runs[0].final
        loss, normalized = (final.get(f"{names.VALIDATION}/{metric}") for metric in ("log_loss", "normalized_entropy"))
        if loss and normalized and not self.comparison.warnings:
            answer = "never" if self.comparison.click_rate < 0.5 else "always"
            axes.axhline(majority(loss / normalized), label=f"{answer} a click, validation", **_LEVEL_LOOK)

    def _panels(self) -> dict[str, list[Arm]]:
        """Group configurations by optimizer, if each optimizer has several; else all in one panel."""
        panels: dict[str, list[Arm]] = {}
        for arm in self.arms:
            rule = str(arm.settings.get("model.table_optimizer.class_path")).rpartition(".")[2]
            panels.setdefault(rule, []).append(arm)
        if len(panels) > 1 and all(len(arms) > 1 for arms in panels.values()):
            return panels
        return {"": self.arms}

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
        style = dict(self.styles[arm.name])
        if thin:
            style |= {"marker": "" if length > 1 else ".", "linewidth": 0.9, "alpha": 0.75}
        else:
            style |= {"linewidth": 1.8, "markersize": 4, "markevery": max(1, length // SHOWN_MARKS)}
        if length == 1 and not thin:
            # One validation each, often at the same place: markers of several sizes do not hide each other.
            style |= {"fillstyle": "none", "markersize": 7 + 2 * list(self.styles).index(arm.name)}
            axes.vlines(xs, ys.min(0), ys.max(0), color=style["color"], alpha=0.15, linewidth=style["markersize"])
        axes.plot(xs, ys.mean(0), label=label, **style)
        if len(arm.runs) > 1:
            axes.fill_between(xs, ys.min(0), ys.max(0), color=style["color"], alpha=0.15, linewidth=0)

    # --- results ----------------------------------------------------------------------------------

    def differences(self) -> Picture:
        """Draw the interval of every difference."""
        comparison = self.comparison
        newline = "\n"
        figure, panels = self.panels(
            len(comparison.judged), 1.9 + 0.42 * len(comparison.pairs) / len(comparison.judged)
        )
        for axes, metric in zip(panels, comparison.judged, strict=True):
            pairs = [pair for pair in comparison.pairs if pair.metric == metric]
            for row, pair in enumerate(pairs):
                interval = pair.interval
                axes.errorbar(
                    interval.value,
                    row,
                    xerr=[[interval.value - interval.low], [interval.high - interval.value]],
                    fmt="o" if pair.decided else "s",
                    color="black" if pair.decided else "0.45",
                    markerfacecolor="black" if pair.decided else "white",
                    capsize=3,
                )
            axes.axvline(0, color="0.6", linewidth=0.8)
            higher = HIGHER_IS_BETTER[metric]
            only = len(pairs) == 1
            sides = tuple(
                f"{side} is better"
                for side in ((pairs[0].loser, pairs[0].winner) if only else ("the other", "the first"))
            )
            left, right = sides if higher else sides[::-1]
            self.rows(
                axes,
                [f"{pair.winner}\nminus {pair.loser}" for pair in pairs],
                f"difference in {METRIC_TITLES[metric]}\n← {left}{newline if self.narrow else '   |   '}{right} →",
            )
            axes.tick_params(labelsize=8)
            axes.locator_params(axis="x", nbins=5)
            # The axis includes 0, with room on its other side.
            low, high = axes.get_xlim()
            axes.set_xlim(min(low, -0.12 * high), max(high, -0.12 * low))
        return self.save(
            figure,
            "differences",
            "Differences",
            f"Each row is the mean of its first configuration minus that of its second, on the {comparison.split} "
            "split, with a 95% interval over "
            + (
                "the samples only, because each side has one seed; all markers are open, without a verdict."
                if comparison.one_seed
                else "seeds and samples (the samples only if a side has one seed). A filled marker: the verdict is "
                "that the two differ. Verdicts are adjusted for their number by Holm's method; the intervals are not "
                "adjusted."
            ),
        )

    def results(self) -> Picture:
        """Draw every run's result, with mean and interval."""
        comparison = self.comparison
        shown: tuple[Score, ...] = ("auc", "log_loss", "accuracy")
        figure, panels = self.panels(len(shown), (0.8 if self.narrow else 1.6) + 0.42 * len(self.arms), sharey=True)
        for axes, metric in zip(panels, shown, strict=True):
            for row, arm in enumerate(self.arms):
                style = self.styles[arm.name]
                values = comparison.values(arm, metric)
                axes.plot(
                    values, [row] * len(values), style["marker"], color=style["color"], markersize=6, fillstyle="none"
                )
                if len(values) > 1:
                    axes.plot(np.mean(values), row, "|", color=style["color"], markersize=18, markeredgewidth=2)
            if metric == "accuracy":
                rate = comparison.click_rate
                axes.axvline(max(rate, 1 - rate), **_LEVEL_LOOK)
            self.rows(axes, [arm.name for arm in self.arms], METRIC_TITLES[metric])
            axes.tick_params(axis="x", labelsize=8)
            axes.locator_params(axis="x", nbins=6)
        return self.save(
            figure,
            "results",
            "Results of every seed",
            f"On the {comparison.split} split: a mark for each run"
            + ("." if comparison.one_seed else ", a bar for the mean of a configuration.")
            + " Dotted: the accuracy of always giving the more frequent answer.",
        )

    def calibration(self) -> Picture:
        """Draw the share of clicks among samples of about the same predicted probability."""
        groups = {arm.name: self.comparison.reliability[arm.name] for arm in self.arms}
        columns = min(2 if self.narrow else 4, len(groups))
        rows = -(-len(groups) // columns)
        side = (NARROW_WIDTH - 0.4) / 2 if self.narrow else 2.6
        figure = Figure(figsize=(self.width if self.narrow else 0.6 + side * columns, 0.6 + side * rows),
                        layout="constrained")  # fmt: skip
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        highest = max(max(found.predicted.max(), found.high.max()) for found in groups.values())
        for axes, (name, found) in zip(panels.flat, groups.items(), strict=False):
            reach = [found.clicked - found.low, found.high - found.clicked]
            axes.plot([0, highest], [0, highest], color="0.6", linewidth=0.8)
            axes.errorbar(
                found.predicted, found.clicked, yerr=reach, **self.styles[name] | {"linestyle": "none"}, markersize=3
            )
            axes.set_title(name, fontsize=9)
            axes.tick_params(labelsize=8)
        for axes in panels.flat[len(groups) :]:
            axes.set_visible(False)
        figure.supxlabel("mean predicted probability", fontsize=9)
        figure.supylabel("share of clicks", fontsize=9)
        return self.save(
            figure,
            "calibration",
            "Calibration",
            f"The samples of the {self.comparison.split} split in 20 groups of equal size by their probability"
            + ("; " if self.comparison.one_seed else ", the mean over the seeds; ")
            + "bars are Wilson's 95% intervals. On the grey line clicks are as frequent as predicted; below it there "
            "are fewer clicks than predicted.",
        )

    def _lines(self) -> str:
        """Return a description of the lines of curves."""
        if self.comparison.one_seed:
            return "Each line is of one run."
        return "Lines are means over the seeds, bands reach from the lowest seed to the highest."


def majority(entropy: float) -> float:
    """Return the accuracy of always giving the more frequent answer, from the entropy of the answers in nats.

    >>> round(majority(0.562335), 4)
    0.75
    """
    low, high = 0.5, 1.0
    for _ in range(50):  # bisection: the entropy falls as the share grows
        share = (low + high) / 2
        above = -share * np.log(share) - (1 - share) * np.log(1 - share) > entropy
        low, high = (share, high) if above else (low, share)
    return low
