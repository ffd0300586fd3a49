"""Figures of what the configurations of a comparison cost: time, memory, parameters, operators, load of each rank."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter

from lightning_dlrm.bench.breakdown import KINDS
from lightning_dlrm.cli.palette import TOL_MUTED, filling
from lightning_dlrm.cli.plan_report import PLOT_WIDTH as PLAN_WIDTH
from lightning_dlrm.cli.plan_report import draw as draw_plan
from lightning_dlrm.compare.anatomy import ROUNDS, STEPS, Anatomy, StepTimes, merge_equal
from lightning_dlrm.compare.drawing import Drawing, Picture
from lightning_dlrm.compare.numbers import decimals
from lightning_dlrm.contracts.terminal import counted
from lightning_dlrm.tracking import names

_TABLES_SHOWN = 10
_PARTS_LISTED = 4
"""Most small dense parts that a legend lists by name."""


class CostDrawing(Drawing):
    """The figures of costs."""

    def cost(self, steps: StepTimes) -> Picture:
        """Draw time and memory of every run; times that are not comparable in grey.

        With one seed, no other run shows that the machine was quiet, so a disturbed measurement counts for both times.
        """
        one_seed = any(len(arm.runs) < 2 for arm in self.arms)
        comparable = not (steps.slow_in_training or (one_seed and steps.slow_alone))
        shown = [
            (names.TRAINING_SECONDS, "seconds of training", 1.0),
            (names.SAMPLES_PER_SECOND, "samples/s", 1.0),
            (names.PEAK_MEMORY, "peak memory of the process, GiB", 2.0**30),
        ]
        shown = [panel for panel in shown if panel[0] == names.PEAK_MEMORY or self.comparison.steady(panel[0])]
        figure, panels = self.panels(len(shown), 0.6 + 0.26 * len(self.arms), sharey=True)
        for axes, (name, label, unit) in zip(panels, shown, strict=True):
            grey = {} if comparable or name == names.PEAK_MEMORY else {"color": "0.7"}
            for row, arm in enumerate(self.arms):
                values = [run.final[name] / unit for run in arm.runs if run.final.get(name) is not None]
                if values:
                    look = {"color": self.styles[arm.name]["color"], "alpha": 0.45} | grey
                    axes.barh(row, np.median(values), height=0.6, **look)
                    axes.plot(values, [row] * len(values), self.styles[arm.name]["marker"], color="black", markersize=3)
            self.rows(axes, [arm.name for arm in self.arms], label)
            axes.set_xlim(left=0)
            axes.locator_params(axis="x", nbins=5)
            if name == names.SAMPLES_PER_SECOND:
                axes.xaxis.set_major_formatter(EngFormatter())
        return self.save(
            figure,
            "cost",
            "Time and memory" if len(shown) > 1 else "Memory",
            "A mark for each run; bars are medians."
            + " Grey: times that do not rank the configurations." * (len(shown) > 1 and not comparable)
            + (
                ""
                if len(shown) == 3
                else " Times are not shown: they differ by a factor of more than 1.5 between seeds of a configuration"
                ", so they are not comparable."
            ),
        )

    def parameters(self, anatomies: Mapping[str, Anatomy]) -> Picture:
        """Draw the parameters of the largest tables, unless all have the same, and the dense parts as stacked bars."""
        groups = merge_equal({arm.name: anatomies[arm.name].tables for arm in self.arms})
        dense = merge_equal({arm.name: anatomies[arm.name].dense for arm in self.arms})
        heights = [(1.2 if self.narrow else 0.8) + 0.3 * len(dense)]
        if len(groups) > 1:
            rows = min(_TABLES_SHOWN, len({name for _, tables in groups for name in tables}))
            heights.insert(0, 0.7 + rows * max(0.16, 0.11 * len(groups)))
        figure = Figure(figsize=(self.width, sum(heights)), layout="constrained")
        *above, right = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False).flat
        if above:
            caption = f"Above: {self._tables(above[0], groups)}; below: the dense parts."
        else:
            (_, of_tables), *_ = groups
            caption = (
                f"Of the dense parts. The tables are the same in all configurations: {len(of_tables)} with "
                f"{sum(of_tables.values()):,} parameters in all."
            )
        # Parts that are too small to be seen are one.
        least = 0.01 * max(sum(parts.values()) for _, parts in dense)
        large = dict.fromkeys(name for _, parts in dense for name, count in parts.items() if count >= least)
        amounts = {part: [float(parts.get(part, 0)) for _, parts in dense] for part in large}
        rest = [float(sum(n for part, n in parts.items() if part not in large)) for _, parts in dense]
        if any(rest):
            small = [part for part in dict.fromkeys(name for _, parts in dense for name in parts) if part not in large]
            amounts[", ".join(small) if len(small) <= _PARTS_LISTED else "smaller parts"] = rest
        labels = [("\n" if self.narrow else ", ").join(members) for members, _ in dense]
        self._stack(right, labels, amounts, "{:,.0f}", "parameters of the dense parts")
        right.xaxis.set_major_formatter(EngFormatter())
        return self.save(figure, "parameters", "Parameters", caption)

    def _tables(self, axes: Axes, groups: Sequence[tuple[list[str], Mapping[str, int]]]) -> str:
        """Draw the parameters of the largest tables, a bar for each group of configurations with equal tables.

        Returns:
            A description: which tables are shown, and which configurations have none of them.
        """
        most: dict[str, int] = {}
        for _, tables in groups:
            most |= {name: max(count, most.get(name, 0)) for name, count in tables.items()}
        shown = sorted(most, key=lambda name: -most[name])[:_TABLES_SHOWN]
        handles, hidden = [], []
        for number, (members, tables) in enumerate(groups):
            # No configuration's colour stands for several.
            colour = self.styles[members[0]]["color"] if len(members) == 1 else "0.55"
            look: dict[str, Any] = filling(number) | {"color": colour}
            size = f"{counted(len(tables), 'table')} with {counted(sum(tables.values()), 'parameter')} in all"
            label = f"{', '.join(members)}: {size}"
            if not tables.keys() & set(shown):
                hidden.append(f"; {label}, all smaller than these")
                continue
            handles.append(Patch(facecolor=look.pop("color"), label=label, **look))
            for row, name in enumerate(shown):
                if name in tables:
                    # Bars of the configurations that have the table are centred on its name.
                    owners = [n for n, (_, of_group) in enumerate(groups) if name in of_group]
                    height = 0.8 / len(owners)
                    y = row + (owners.index(number) - (len(owners) - 1) / 2) * height
                    axes.barh(y, tables[name], height, facecolor=handles[-1].get_facecolor(), **look)
                    axes.text(tables[name], y, f" {tables[name]:,}", va="center", fontsize=7 if height > 0.3 else 5)
        every = len(shown) == len(most)
        self.rows(axes, shown, f"parameters of the {'' if every else 'largest '}tables")
        axes.set_xlim(0, (1.3 if self.narrow else 1.12) * most[shown[0]])
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.locator_params(axis="x", nbins=5)
        # Above the axes: inside, the legend would hide bars.
        axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize=7 if self.narrow else 8)
        return f"{'all' if every else f'the {len(shown)} largest of'} {len(most)} tables{''.join(hidden)}"

    def operators(self, operators: Mapping[str, Mapping[str, float]]) -> Picture:
        """Draw the time of a training step by kind of operator as a stacked bar."""
        figure, (axes,) = self.panels(1, (1.5 if self.narrow else 0.9) + 0.3 * len(operators))
        measured = [arm.name for arm in self.arms if arm.name in operators]
        amounts = {kind: [operators[arm][kind] for arm in measured] for kind in KINDS}
        digits = decimals([sum(operators[arm].values()) for arm in measured])
        self._stack(axes, measured, amounts, f"{{:,.{digits}f}}", "milliseconds of a training step")
        return self.save(
            figure,
            "operators",
            "Time of a step by operator",
            "One training step by kind of operator, forward, backward and update together, from PyTorch's profiler: "
            f"the step of median time of {ROUNDS * STEPS} with the runs' batch size, on the machine that "
            "made this report, outside Lightning.",
        )

    def _stack(
        self, axes: Axes, bars: Sequence[str], amounts: Mapping[str, Sequence[float]], text: str, xlabel: str
    ) -> None:
        """Draw a stacked bar in each row, its sum at its end; parts with enough room show their number."""
        left = np.zeros(len(bars))
        longest = np.sum(list(amounts.values()), axis=0).max() or 1.0
        room = self.width - 0.3 - 0.07 * max(len(line) for bar in bars for line in bar.splitlines())
        size = 7
        for i, (name, values) in enumerate(amounts.items()):
            # The colours of configurations are from another palette.
            look: dict[str, Any] = filling(i, TOL_MUTED)
            axes.barh(range(len(bars)), values, 0.6, left, label=name, **look)
            for y, value in enumerate(values):
                number = text.format(value)
                if value / longest * room / 1.2 > 0.065 * len(number) + 0.04:
                    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1}
                    axes.text(left[y] + value / 2, y, number, ha="center", va="center", fontsize=size, bbox=box)
            left += np.array(values)
        for y, total in enumerate(left):
            axes.text(total, y, f" {text.format(total)}", va="center", fontsize=size, weight="bold")
        axes.set_xlim(0, (1.25 if self.narrow else 1.12) * longest)
        axes.locator_params(axis="x", nbins=5)
        self.rows(axes, bars, xlabel)
        assert isinstance(axes.figure, Figure)
        self.legend(axes.figure, axes.get_legend_handles_labels()[0], "lower")

    def plans(self, anatomies: Mapping[str, Anatomy]) -> list[Picture]:
        """Draw the load of each rank for configurations with sharded tables."""
        pictures = []
        for arm, anatomy in anatomies.items():
            found = anatomy.sharding
            if found is None:
                continue
            path = self.folder / f"plan_{_file_name(arm)}.png"
            draw_plan(found.plan, found.loads, found.costs, anatomy.batch_size, path, self.warning() or arm)
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
