"""Figures of what the configurations of a comparison cost: time, memory, parameters, operators, load of each rank."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from lightning_dlrm.bench.breakdown import KINDS
from lightning_dlrm.cli.palette import TOL_MUTED, filling
from lightning_dlrm.cli.plan_report import PLOT_WIDTH as PLAN_WIDTH
from lightning_dlrm.cli.plan_report import draw as draw_plan
from lightning_dlrm.compare.anatomy import ROUNDS, STEPS, Anatomy, merge_equal
from lightning_dlrm.compare.drawing import PAGE_WIDTH, Drawing, Picture
from lightning_dlrm.tracking import names


class CostDrawing(Drawing):
    """The figures of costs."""

    def cost(self) -> Picture:
        """Draw time and memory of every run."""
        arms = self.comparison.arms
        shown = [
            (names.TRAINING_SECONDS, "seconds of training", 1.0),
            (names.SAMPLES_PER_SECOND, "samples/s", 1.0),
            (names.PEAK_MEMORY, "peak memory of the process, GiB", 2.0**30),
        ]
        shown = [panel for panel in shown if panel[0] == names.PEAK_MEMORY or self.comparison.steady(panel[0])]
        figure = Figure(figsize=(PAGE_WIDTH, 1.5 + 0.42 * len(arms)), layout="constrained")
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, (name, label, unit) in zip(panels, shown, strict=True):
            for row, arm in enumerate(arms):
                values = [run.final[name] / unit for run in arm.runs if run.final.get(name) is not None]
                if values:
                    axes.barh(row, np.median(values), color=self.styles[arm.name]["color"], alpha=0.45, height=0.6)
                    axes.plot(values, [row] * len(values), self.styles[arm.name]["marker"], color="black", markersize=4)
            self.rows(axes, list(self.styles), label)
            axes.set_xlim(left=0)
            if name == names.SAMPLES_PER_SECOND:
                axes.xaxis.set_major_formatter(EngFormatter())
        return self.save(
            figure,
            "cost",
            "Time and memory",
            "A mark for each run; bars are medians. Runs at the same time share cores."
            + (
                ""
                if len(shown) == 3
                else " Times are not shown: they differ more than 1.5 times between the seeds of a configuration, so "
                "other work slowed the machine down."
            ),
        )

    def parameters(self, anatomies: Mapping[str, Anatomy]) -> Picture:
        """Draw the parameters of each table, and of the dense parts as a stacked bar."""
        distinct = merge_equal(anatomies)
        equal_tables = len({repr(sorted(anatomy.tables.items())) for anatomy in anatomies.values()}) == 1
        figure = Figure(figsize=(6.0 if equal_tables else PAGE_WIDTH, 4.6), layout="constrained")
        if equal_tables:
            right = figure.subplots()
            of_tables = next(iter(anatomies.values())).tables
            caption = (
                f"Of the dense parts. The tables are the same in all configurations: {len(of_tables)} with "
                f"{sum(of_tables.values()):,} parameters."
            )
        else:
            left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
            self._tables(left, distinct)
            caption = "Of each embedding table, on a logarithmic scale, and of the dense parts."
        parts = dict.fromkeys(name for anatomy in distinct.values() for name in anatomy.dense)
        amounts = {part: [anatomy.dense.get(part, 0) for anatomy in distinct.values()] for part in parts}
        _stack(right, list(distinct), amounts, "{:,.0f}")
        right.set(xlabel="dense parts", ylabel="parameters")
        right.yaxis.set_major_formatter(EngFormatter())
        return self.save(
            figure,
            "parameters",
            "Parameters",
            caption,
        )

    @staticmethod
    def _tables(axes: Axes, distinct: Mapping[str, Anatomy]) -> None:
        """Draw the parameters of each table; of more than 40 the largest."""
        most: dict[str, int] = {}
        for anatomy in distinct.values():
            most |= {name: max(count, most.get(name, 0)) for name, count in anatomy.tables.items()}
        shown = list(most) if len(most) <= 40 else sorted(most, key=lambda name: -most[name])[:40]
        width = 0.8 / len(distinct)
        for i, (title, anatomy) in enumerate(distinct.items()):
            look: dict[str, Any] = filling(i)
            at = np.arange(len(shown)) + (i - (len(distinct) - 1) / 2) * width
            axes.bar(at, [anatomy.tables.get(name, 0) for name in shown], width, label=title, **look)
        axes.set_xticks(range(len(shown)), shown, rotation=90, fontsize=8)
        axes.set(yscale="log", xlabel="table", ylabel="parameters", xmargin=0.01)
        if len(distinct) > 1:
            # Above the axes: inside they would hide bars.
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(distinct), frameon=False, fontsize=8)

    def operators(self, operators: Mapping[str, Mapping[str, float]]) -> Picture:
        """Draw the time of a training step by kind of operator as a stacked bar."""
        figure = Figure(figsize=(2.2 + 1.7 * len(operators) + 2.2, 4.4), layout="constrained")
        axes = figure.subplots()
        amounts = {kind: [operators[arm][kind] for arm in operators] for kind in KINDS}
        _stack(axes, list(operators), amounts, "{:.2f}")
        axes.set_ylabel("milliseconds of a training step")
        return self.save(
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
            path = self.folder / f"plan_{_file_name(arm)}.png"
            draw_plan(found.plan, found.loads, found.costs, found.batch_size, path, self.warning() or arm)
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
