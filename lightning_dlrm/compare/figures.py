"""The figures of a comparison, as PNG files: learning, results, and costs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray

from lightning_dlrm.compare.anatomy import Anatomy, StepTimes
from lightning_dlrm.compare.cost_figures import CostDrawing
from lightning_dlrm.compare.drawing import SETTINGS, Drawing, Picture
from lightning_dlrm.compare.pairs import METRIC_TITLES, Pair
from lightning_dlrm.compare.ranking import is_figure5
from lightning_dlrm.compare.results import CLICK_RATE_ALONE, Comparison
from lightning_dlrm.compare.runs import Arm
from lightning_dlrm.compare.statistics import HIGHER_IS_BETTER, Score
from lightning_dlrm.objectives.metrics import click_rate_log_loss
from lightning_dlrm.tracking import names

FIRST_SHOWN = 0.05
"""Share of the shortest run; curves begin after so many samples, because the first values come from few samples."""
SHOWN_MARKS = 8
"""Markers along a curve."""
_THIN, _MARK = 0.9, 4.0
"""Line width of training beside validation, and size of markers, in points."""
_ASIDE = 0.09
"""Inches between marks beside each other."""
_OPERATIONS = "floating-point operations"
_COMMON_SCALE = 50
"""Largest ratio of the operations of two configurations that one axis shows."""
_LEVEL_LOOK: dict[str, Any] = {"color": "0.45", "linestyle": (0, (1, 1.5)), "linewidth": 1.2}
"""Style of the line of a score that is reached without a model."""


def draw_all(
    comparison: Comparison,
    anatomies: Mapping[str, Anatomy],
    steps: StepTimes,
    folder: Path,
) -> list[Picture]:
    """Draw every figure.

    Args:
        comparison: result of the comparison.
        anatomies: configuration -> its anatomy.
        steps: times of a step.
        folder: folder of the files.
    """
    # The narrow figures first: the page looks for them beside the files of the wide figures.
    with matplotlib.rc_context(SETTINGS):
        for narrow in (True, False):
            drawing, costs = ResultDrawing(comparison, folder, narrow), CostDrawing(comparison, folder, narrow)
            pictures = [drawing.differences(), drawing.curves("auc"), drawing.results()]
            pictures += [drawing.figure5(), drawing.curves("log_loss")]
            pictures += [
                drawing.calibration(),
                costs.cost(steps),
                costs.parameters(anatomies),
            ]
            if steps.shown:
                pictures.append(costs.operators(steps.shown))
    return pictures + costs.plans(anatomies)


class ResultDrawing(Drawing):
    """The figures of learning and of results."""

    # --- learning ---------------------------------------------------------------------------------

    def figure5(self) -> Picture:
        """Draw training and validation accuracy against samples, with a panel for each optimizer."""
        panels = self._panels()
        figure, axes = self.panels(len(panels), 2.4, sharex=True, sharey=True)
        answer: list[Artist] = []
        for panel, (title, arms) in zip(axes, panels.items(), strict=True):
            for arm in arms:
                self._course(panel, arm, names.SAMPLES, f"{names.TRAIN}/accuracy", thin=True)
                self._course(panel, arm, names.SAMPLES, f"{names.VALIDATION}/accuracy")
            answer = self._click_rate_alone(panel, "accuracy")
            panel.set(title=title)
            self._begin_at_0(panel, 1 if self.narrow else len(panels))
            panel.xaxis.set_major_formatter(EngFormatter())
            if self.narrow or panel is axes[0]:
                panel.set_ylabel("accuracy")
            if not self.narrow or panel is axes[-1]:
                panel.set_xlabel("samples seen")
        self.legend(figure, [*self.marks(fillstyle=self._fill, **self._points), *self._splits(), *answer])
        paper = is_figure5(self.comparison.arms)
        return self.save(
            figure,
            "figure5",
            "Accuracy while training",
            f"{'As in Figure 5 of Naumov et al. (2019): accuracy against samples seen. ' * paper}{self._lines()}"
            + f" Dotted: the accuracy of the {CLICK_RATE_ALONE} on the validation split." * bool(answer),
            file="figure5" if paper else "accuracy",
        )

    def curves(self, metric: Score) -> Picture:
        """Draw a metric, training and validation, against samples, time and operations."""
        abscissae = self._abscissae()
        both = [names.TRAIN, names.VALIDATION]
        # With one validation a run, its marks are in the panels of the training samples.
        rows = [both] if self._one_validation else [[split] for split in both]
        title = METRIC_TITLES[metric]
        figure, grid = self._grid(len(rows), len(abscissae))
        alone: list[Artist] = []
        for row, splits in zip(grid, rows, strict=True):
            for axes, (x, label) in zip(row, abscissae, strict=True):
                for arm in self.arms:
                    factor = float(arm[names.FLOPS_TRAINING]) if label == _OPERATIONS else 1.0
                    for split in splits:
                        self._course(axes, arm, x, f"{split}/{metric}", thin=split != splits[-1], factor=factor)
                if metric == "log_loss":
                    alone = self._click_rate_alone(axes, metric, splits[0]) or alone
                axes.xaxis.set_major_formatter(EngFormatter())
                axes.locator_params(axis="x", nbins=4)
                self._begin_at_0(axes, 1 if self.narrow else len(abscissae))
                if self.narrow or splits is rows[-1]:
                    axes.set_xlabel(label)
                if self.narrow or axes is row[0]:
                    of = "" if len(splits) > 1 else "training " if splits == [names.TRAIN] else f"{splits[0]} "
                    axes.set_ylabel(f"{of}{title}")
        marks = self.marks(fillstyle=self._fill, **self._points)
        self.legend(figure, [*marks, *(self._splits() if self._one_validation else []), *alone])
        timed = "Time on an x-axis is that of training, without validations and checkpoints. "
        return self.save(
            figure,
            metric,
            f"{title[0].upper()}{title[1:]} while training",
            f"{'' if self._one_validation else 'Above: training; below: validation. '}"
            f"{timed * (len({x for x, _ in abscissae}) > 1)}{self._lines()}"
            + f" Dotted: the log loss of the {CLICK_RATE_ALONE}, which every model should get below."
            * bool(alone),
        )

    def _grid(self, rows: int, columns: int) -> tuple[Figure, NDArray[Any]]:
        """Return a figure and its panels by row and column, with a common y-axis in each row; all panels are below each
        other in a narrow figure."""
        height = 1.9 * rows * (columns if self.narrow else 1)
        figure = Figure(figsize=(self.width, 0.6 + height), layout="constrained")
        if not self.narrow:
            return figure, figure.subplots(rows, columns, sharex="col", sharey="row", squeeze=False)
        grid = figure.subplots(rows * columns, 1, squeeze=False).reshape(rows, columns)
        for first, *others in grid:
            for axes in others:
                axes.sharey(first)
        return figure, grid

    @property
    def _first(self) -> float:
        """Samples after which curves begin."""
        return FIRST_SHOWN * min(float(run.final[names.SAMPLES]) for run in self.comparison.runs)

    @property
    def _one_validation(self) -> bool:
        """Whether no run has several validations, so there is no curve of them."""
        return all(len(run.curve(names.SAMPLES, f"{names.VALIDATION}/auc")[0]) < 2 for run in self.comparison.runs)

    @property
    def _fill(self) -> Literal["none", "full"]:
        """How markers of validations are filled: open marks show what is behind them."""
        return "none" if self._one_validation else "full"

    @property
    def _points(self) -> dict[str, Any]:
        """How legends look if no run has several logged steps, so that figures have points alone; else empty."""
        courses = [
            run.curve(names.SAMPLES, f"{names.TRAIN}/auc", self._first)[0] if self._one_validation else [0.0, 0.0]
            for run in self.comparison.runs
        ]
        return {"linestyle": "none"} if all(len(course) < 2 for course in courses) else {}

    def _splits(self) -> list[Artist]:
        """Return how training and validation look in a common panel, for a legend."""
        training = self._points | {"marker": "."} if self._points else {}
        look: dict[str, Any] = {"linestyle": "none" if self._one_validation else "-", "fillstyle": self._fill}
        return [
            Line2D([], [], color="0.4", linewidth=_THIN, label="training", **training),
            Line2D([], [], color="0.4", marker="o", markersize=_MARK, label="validation", **look),
        ]

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

    def _click_rate_alone(
        self, axes: Axes, metric: Literal["accuracy", "log_loss"], split: str = names.VALIDATION
    ) -> list[Artist]:
        """Draw the accuracy or the log loss of the click rate alone on a split.

        Returns:
            Its line, for a legend; none if it is not known.
        """
        entropy = 0.0 if self.comparison.warnings else self._entropy(split)
        if not entropy:
            return []
        level = majority(entropy) if metric == "accuracy" else entropy
        return [axes.axhline(level, label=CLICK_RATE_ALONE, **_LEVEL_LOOK)]

    def _entropy(self, split: str) -> float:
        """Return the log loss of the click rate alone on a split; 0 if it is not known."""
        run = self.comparison.runs[0]
        if split == names.TRAIN:
            rate = self.comparison.scores[run.name].samples.train_click_rate
            return click_rate_log_loss(rate) if rate else 0.0
        loss, normalized = (run.final.get(f"{split}/{name}") for name in ("log_loss", "normalized_entropy"))
        return loss / normalized if loss and normalized else 0.0

    def _panels(self) -> dict[str, list[Arm]]:
        """Group configurations by optimizer, if each optimizer has several; else all in one panel."""
        panels: dict[str, list[Arm]] = {}
        for arm in self.arms:
            rule = str(arm.settings.get("model.table_optimizer.class_path")).rpartition(".")[2]
            panels.setdefault(rule, []).append(arm)
        if len(panels) > 1 and all(len(arms) > 1 for arms in panels.values()):
            return panels
        return {"": self.arms}

    def _begin_at_0(self, axes: Axes, columns: int) -> None:
        """Begin the x-axis of one of several panels in a row at 0, and leave room for marks beside each other."""
        last, width = axes.dataLim.x1, self.width / columns - 0.7
        room = _ASIDE * len(self.arms) / 2 + 0.05 if self._one_validation else 0.0
        axes.set_xlim(0, last * max(1.05, width / (width - room)))

    def _course(self, axes: Axes, arm: Arm, x: str, y: str, *, thin: bool = False, factor: float = 1.0) -> None:
        """Draw the mean over the runs of a configuration, and the band from the lowest to the highest."""
        curves = [run.curve(x, y, self._first) for run in arm.runs]
        length = min(len(ys) for _, ys in curves)
        if not length:
            return
        xs = np.mean([curve[0][:length] for curve in curves], axis=0) * factor
        ys = np.array([curve[1][:length] for curve in curves])
        style = dict(self.styles[arm.name])
        if length == 1 and not thin:
            # One validation each, often at the same place: marks beside each other.
            figure = axes.get_figure()
            assert figure is not None
            aside = (self.arms.index(arm) - (len(self.arms) - 1) / 2) * _ASIDE
            style |= {"transform": axes.transData + ScaledTranslation(aside, 0, figure.dpi_scale_trans)}
            style |= {"linestyle": "-", "linewidth": _THIN, "clip_on": False}
            axes.update_datalim([(xs[0], ys.min()), (xs[0], ys.max())])
            axes.plot(np.repeat(xs, 2), [ys.min(), ys.max()], **style | {"marker": ""})
            axes.plot(xs, ys.mean(0), **style | {"fillstyle": self._fill, "markersize": _MARK + 1})
            return
        if thin:
            style |= {"marker": "" if length > 1 else ".", "linewidth": _THIN}
        else:
            style |= {"linewidth": 1.4, "markersize": _MARK, "markevery": max(1, length // SHOWN_MARKS)}
        axes.plot(xs, ys.mean(0), **style)
        if len(arm.runs) > 1:
            axes.fill_between(xs, ys.min(0), ys.max(0), color=style["color"], alpha=0.15, linewidth=0)

    # --- results ----------------------------------------------------------------------------------

    def differences(self) -> Picture:
        """Draw the interval of every difference."""
        comparison = self.comparison
        count = len(comparison.judged)
        figure, panels = self.panels(count, 1.0 + 0.3 * len(comparison.pairs) / count)
        looks: dict[bool, dict[str, Any]] = {
            True: {"fmt": "o", "color": "black", "markerfacecolor": "black"},
            False: {"fmt": "s", "color": "0.45", "markerfacecolor": "white"},
        }
        for axes, metric in zip(panels, comparison.judged, strict=True):
            pairs = [pair for pair in comparison.pairs if pair.metric == metric]
            for row, pair in enumerate(pairs):
                interval = pair.interval
                reach = [[interval.value - interval.low], [interval.high - interval.value]]
                axes.errorbar(interval.value, row, xerr=reach, capsize=2, markersize=4, **looks[_filled(pair)])
            axes.axvline(0, color="0.6", linewidth=0.8)
            sides = ("second", "first") if len(pairs) > 1 else (pairs[0].loser, pairs[0].winner)
            left, right = sides if HIGHER_IS_BETTER[metric] else sides[::-1]
            above: dict[str, Any] = {
                "xy": (0, 1),
                "xycoords": axes.get_xaxis_transform(),
                "textcoords": "offset points",
            }
            axes.annotate(f"\u2190 {left} better", xytext=(-4, 3), ha="right", color="0.35", **above)
            axes.annotate(f"{right} better \u2192", xytext=(4, 3), ha="left", color="0.35", **above)
            labels = [
                f"{pair.winner}\nminus {pair.loser}" + "\n(did not train)" * bool(pair.untrained) for pair in pairs
            ]
            self.rows(axes, labels, f"difference in {METRIC_TITLES[metric]}")
            axes.tick_params(axis="y", labelsize=7)
            axes.locator_params(axis="x", nbins=4)
            # The axis includes 0, with room on its other side.
            low, high = axes.get_xlim()
            axes.set_xlim(min(low, -0.3 * high), max(high, -0.3 * low))
        self.legend(
            figure,
            [
                Line2D([], [], marker=look["fmt"], color=look["color"], markerfacecolor=look["markerfacecolor"],
                       markersize=4, linewidth=1, label=f"{'filled' if filled else 'open'}: {'; or '.join(kinds)}")
                for filled, look in looks.items()
                if (kinds := dict.fromkeys(pair.kind for pair in comparison.pairs if _filled(pair) == filled))
            ],
            "lower",
        )  # fmt: skip
        return self.save(
            figure,
            "differences",
            "Differences",
            f"Each row is the mean of its first configuration minus that of its second, on the {comparison.split} "
            f"split, with a 95% interval over {self._varying()}",
        )

    def _varying(self) -> str:
        """Return what the intervals of differences are over, and what the markers mean."""
        if self.comparison.one_seed:
            return "the samples only, because each side has one seed; all markers are open, without a verdict."
        single = [arm.name for arm in self.arms if len(arm.runs) == 1]
        seeds = f"the seeds of each side that has several ({', '.join(single)}: one)" if single else "the seeds"
        return (
            f"{seeds} and over the samples. A filled marker: the verdict is that the two differ. Verdicts are adjusted "
            "for their number by Holm's method; the intervals are not adjusted."
        )

    def results(self) -> Picture:
        """Draw every run's result, with mean and interval."""
        comparison = self.comparison
        shown: tuple[Score, ...] = ("auc", "log_loss", "accuracy")
        figure, panels = self.panels(len(shown), 0.6 + 0.26 * len(self.arms), sharey=True)
        for axes, metric in zip(panels, shown, strict=True):
            for row, arm in enumerate(self.arms):
                style = self.styles[arm.name]
                values = comparison.values(arm, metric)
                axes.plot(
                    values, [row] * len(values), style["marker"], color=style["color"], markersize=5, fillstyle="none"
                )
                if len(values) > 1:
                    axes.plot(np.mean(values), row, "|", color=style["color"], markersize=12, markeredgewidth=1.5)
            if metric == "accuracy" and comparison.click_rate_alone:
                axes.axvline(comparison.click_rate_alone[metric], **_LEVEL_LOOK)
            self.rows(axes, [arm.name for arm in self.arms], METRIC_TITLES[metric])
            axes.locator_params(axis="x", nbins=4)
        return self.save(
            figure,
            "results",
            "Results of every seed",
            f"On the {comparison.split} split: a mark for each run"
            + ("." if comparison.one_seed else ", a bar for the mean of a configuration.")
            + " Higher is better for AUC and accuracy, lower for log loss."
            + f" Dotted: the accuracy of the {CLICK_RATE_ALONE}." * bool(comparison.click_rate_alone),
        )

    def calibration(self) -> Picture:
        """Draw the share of clicks among samples of about the same predicted probability."""
        groups = {arm.name: self.comparison.reliability[arm.name] for arm in self.arms}
        columns = min(2 if self.narrow else 4, len(groups))
        rows = -(-len(groups) // columns)
        side = (self.width - 0.3) / (2 if self.narrow else 4)
        figure = Figure(figsize=(0.3 + side * columns, 0.4 + side * rows), layout="constrained")
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        highest = max(max(found.predicted.max(), found.high.max()) for found in groups.values())
        for axes, (name, found) in zip(panels.flat, groups.items(), strict=False):
            reach = [found.clicked - found.low, found.high - found.clicked]
            axes.plot([0, highest], [0, highest], color="0.6", linewidth=0.8)
            axes.errorbar(
                found.predicted,
                found.clicked,
                yerr=reach,
                **self.styles[name] | {"linestyle": "none"},
                markersize=2.5,
                elinewidth=1,
            )
            axes.set_title(name)
        for axes in panels.flat[len(groups) :]:
            axes.set_visible(False)
        figure.supxlabel("mean predicted probability", fontsize=8)
        figure.supylabel("share of clicks", fontsize=8)
        return self.save(
            figure,
            "calibration",
            "Calibration",
            f"The samples of the {self.comparison.split} split in 20 groups of equal size by their probability"
            + (
                "; "
                if self.comparison.one_seed
                else " of each seed. A mark is the mean of a group over the seeds, so errors of seeds in opposite "
                "directions cancel here; "
            )
            + "bars are Wilson's 95% intervals, hidden by the mark if they are shorter. On the grey line clicks are as "
            "frequent as predicted; below it there are fewer clicks than predicted.",
        )

    def _lines(self) -> str:
        """Return a description of the lines of curves."""
        runs = "Each line is of one run."
        if not self.comparison.one_seed:
            bars = ", and so do the bars of validations" * self._one_validation
            runs = f"Lines are means over the seeds; bands reach from the lowest seed to the highest{bars}."
        if self._one_validation:
            runs += " Each run has one validation, at its end; marks are moved apart, so that none hides another."
        logged = [run.curve(names.SAMPLES, f"{names.TRAIN}/auc")[0] for run in self.comparison.runs]
        ends = [samples[0] for samples in logged if samples]
        begin = ""
        if ends and min(ends) < self._first:
            begin = f" The first {self._first:,.0f} samples are not shown."
        elif ends:
            # One end, if all runs have the same.
            at = " to ".join(f"{end:,.0f}" for end in dict.fromkeys((min(ends), max(ends))))
            begin = f" It is first logged at {at} samples."
        return (
            f"Training: over all samples so far, up to the last {names.WINDOW_SAMPLES:,}, each scored in its own step, "
            f"before the update.{begin} Validation: over the validation split. {runs}"
        )


def _filled(pair: Pair) -> bool:
    """Return whether a marker is filled: the sides differ by a verdict, and both trained."""
    return pair.decided and not pair.untrained


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
