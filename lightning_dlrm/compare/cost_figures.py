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
from lightning_dlrm.compare.drawing import Drawing, Picture
from lightning_dlrm.tracking import names


class CostDrawing(Drawing):
    """The figures of costs."""

    def cost(self) -> Picture:
        """Draw time and memory of every run."""
        shown = [
            (names.TRAINING_SECONDS, "seconds of training", 1.0),
            (names.SAMPLES_PER_SECOND, "samples/s", 1.0),
            (names.PEAK_MEMORY, "peak memory of the process, GiB", 2.0**30),
        ]
        shown = [panel for panel in shown if panel[0] == names.PEAK_MEMORY or self.comparison.steady(panel[0])]
        figure, panels = self.panels(len(shown), (0.8 if self.narrow else 1.5) + 0.42 * len(self.arms), sharey=True)
        for axes, (name, label, unit) in zip(panels, shown, strict=True):
            for row, arm in enumerate(self.arms):
                values = [run.final[name] / unit for run in arm.runs if run.final.get(name) is not None]
                if values:
                    axes.barh(row, np.median(values), color=self.styles[arm.name]["color"], alpha=0.45, height=0.6)
                    axes.plot(values, [row] * len(values), self.styles[arm.name]["marker"], color="black", markersize=4)
            self.rows(axes, [arm.name for arm in self.arms], label)
            axes.set_xlim(left=0)
            if name == names.SAMPLES_PER_SECOND:
                axes.xaxis.set_major_formatter(EngFormatter())
        return self.save(
            figure,
            "cost",
            "Time and memory" if len(shown) > 1 else "Memory",
            "A mark for each run; bars are medians. Runs at the same time share cores."
            + (
                ""
                if len(shown) == 3
                else " Times are not shown: they differ by a factor of more than 1.5 between seeds of a configuration"
                ", so other work slowed the machine down."
            ),
        )

    def parameters(self, anatomies: Mapping[str, Anatomy]) -> Picture:
        """Draw the parameters of each table, and of the dense parts as a stacked bar."""
        distinct = merge_equal({arm.name: anatomies[arm.name] for arm in self.arms})
        equal_tables = len({repr(sorted(anatomy.tables.items())) for anatomy in anatomies.values()}) == 1
        bars = 1.4 + 0.5 * len(distinct)
        if equal_tables:
            figure, (right,) = self.panels(1, bars)
            of_tables = next(iter(anatomies.values())).tables
            caption = (
                f"Of the dense parts. The tables are the same in all configurations: {len(of_tables)} with "
                f"{sum(of_tables.values()):,} parameters."
            )
        else:
            figure = Figure(figsize=(self.width, 3.4 + bars), layout="constrained")
            left, right = figure.subplots(2, 1, height_ratios=(3.4, bars))
            self._tables(left, distinct)
            caption = "Of each embedding table, on a logarithmic scale, and of the dense parts."
        parts = dict.fromkeys(name for anatomy in distinct.values() for name in anatomy.dense)
        amounts = {part: [anatomy.dense.get(part, 0) for anatomy in distinct.values()] for part in parts}
        self._stack(right, list(distinct), amounts, "{:,.0f}", "parameters of the dense parts")
        right.xaxis.set_major_formatter(EngFormatter())
        return self.save(
            figure,
            "parameters",
            "Parameters",
            caption,
        )

    @staticmethod
    def _tables(axes: Axes, distinct: Mapping[str, Anatomy]) -> None:
        """Draw the parameters of each table; if there are more than 40, of the largest."""
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
            # Above the axes: inside, the legend would hide bars.
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(distinct), frameon=False, fontsize=8)

    def operators(self, operators: Mapping[str, Mapping[str, float]]) -> Picture:
        """Draw the time of a training step by kind of operator as a stacked bar."""
        figure, (axes,) = self.panels(1, 1.4 + 0.5 * len(operators))
        measured = [arm.name for arm in self.arms if arm.name in operators]
        amounts = {kind: [operators[arm][kind] for arm in measured] for kind in KINDS}
        self._stack(axes, measured, amounts, "{:.2f}", "milliseconds of a training step")
        return self.save(
            figure,
            "operators",
            "Time of a step by operator",
            "One training step by kind of operator, forward, backward and update together, from PyTorch's profiler: "
            f"for each kind the least time of {ROUNDS * STEPS} steps with the runs' batch size, on the machine that "
            "made this report, outside Lightning.",
        )

    def _stack(
        self, axes: Axes, bars: Sequence[str], amounts: Mapping[str, Sequence[float]], text: str, xlabel: str
    ) -> None:
        """Draw a stacked bar in each row; large parts show their number."""
        left = np.zeros(len(bars))
        longest = np.sum(list(amounts.values()), axis=0).max()
        for i, (name, values) in enumerate(amounts.items()):
            # The colours of configurations are from another palette.
            look: dict[str, Any] = filling(i, TOL_MUTED)
            axes.barh(range(len(bars)), values, 0.6, left, label=name, **look)
            for y, value in enumerate(values):
                if value > (0.2 if self.narrow else 0.06) * longest:
                    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
                    axes.text(
                        left[y] + value / 2, y, text.format(value), ha="center", va="center", fontsize=8, bbox=box
                    )
            left += np.array(values)
        axes.set_xlim(0, 1.02 * longest)
        self.rows(axes, bars, xlabel)
        handles, labels = axes.get_legend_handles_labels()
        axes.figure.legend(
            handles, labels, loc="outside lower center", ncols=2 if self.narrow else 5, frameon=False, fontsize=8
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


def _file_name(arm: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in arm)
