"""What the figures of a comparison have in common: styles of the configurations, labels, warnings, files.

Each figure is drawn for a page and for a column of print, as PNG for the report and as PDF.

Colours are those of Okabe and Ito. Each configuration also has its own line style and marker, so figures are readable
in black and white and for colour-blind people.
"""

import base64
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_dlrm.cli.palette import OKABE_ITO
from lightning_dlrm.compare.results import Comparison, ranked
from lightning_dlrm.contracts.terminal import counted

LINES = ("-", "--", "-.", ":", (0, (8, 2, 1, 2, 1, 2)), (0, (2, 1)), (0, (5, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
PAGE_WIDTH = 7.0
"""Inches of a figure as wide as the report, or as a page of print; narrower figures are scaled alike, so that letters
have one size."""
NARROW_WIDTH = 3.4
"""Inches of the same figure for a phone, or for a column of print."""
_SCORED = ("differences", "results", "calibration")
"""Figures of the scored split."""
_OF_ONE_RUN = ("parameters", "operators")
"""Figures that do not depend on seeds."""
SETTINGS: Any = {
    "font.size": 8, "axes.titlesize": 8, "legend.frameon": False, "hatch.linewidth": 0.6, "pdf.fonttype": 42,
    "figure.autolayout": False, "figure.constrained_layout.use": False,
}  # fmt: skip
"""Matplotlib's settings for all figures: letters that can be read in print, and fonts that PDF readers can search."""


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

    @property
    def narrow_data(self) -> str:
        """The same of the narrow figure; empty if there is none."""
        path = self.path.parent / "narrow" / self.path.name
        return base64.b64encode(path.read_bytes()).decode() if path.is_file() else ""


class Drawing:
    """A comparison and the folder of its figures, with one style for each of its configurations.

    Args:
        comparison: result of the comparison.
        folder: folder of the figures.
        narrow: whether figures have the width of a phone, with their panels below each other.
    """

    def __init__(self, comparison: Comparison, folder: Path, narrow: bool = False) -> None:
        self.comparison = comparison
        self.folder = folder / "narrow" if narrow else folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.narrow = narrow
        self.width = NARROW_WIDTH if narrow else PAGE_WIDTH
        self.arms = ranked(comparison)
        # Colours follow the order of the experiment, which stays when results change.
        self.styles: dict[str, dict[str, Any]] = {
            arm.name: {
                "color": OKABE_ITO[i % len(OKABE_ITO)],
                "linestyle": LINES[i % len(LINES)],
                "marker": MARKERS[i % len(MARKERS)],
            }
            for i, arm in enumerate(comparison.arms)
        }

    def panels(self, count: int, height: float, **sharing: Any) -> tuple[Figure, list[Axes]]:
        """Return a figure with panels of a height in inches, beside each other; below each other in a narrow figure."""
        rows, columns = (count, 1) if self.narrow else (1, count)
        figure = Figure(figsize=(self.width, rows * height), layout="constrained")
        return figure, list(figure.subplots(rows, columns, squeeze=False, **sharing).flat)

    @staticmethod
    def rows(axes: Axes, labels: Sequence[str], xlabel: str) -> None:
        """Label the rows of a panel from top to bottom, and its x-axis."""
        axes.set_yticks(range(len(labels)), labels)
        axes.set(xlabel=xlabel, ylim=(len(labels) - 0.5, -0.5))

    def legend(self, figure: Figure, handles: Sequence[Artist], side: Literal["upper", "lower"] = "upper") -> None:
        """Add a legend above or below a figure, in as few rows of about equal length as its width allows."""
        lengths, columns = [len(str(handle.get_label())) for handle in handles], 1
        for rows in range(1, len(handles) + 1):
            columns = -(-len(handles) // rows)
            if sum(0.5 + 0.06 * max(column) for column in np.array_split(lengths, columns)) < self.width:
                break
        figure.legend(
            handles=handles, loc="outside upper center" if side == "upper" else "outside lower center", ncols=columns
        )

    def marks(self, **changes: Any) -> list[Line2D]:
        """Return a line with a marker for each configuration, for a legend."""
        return [Line2D([], [], label=arm.name, markersize=4, **self.styles[arm.name] | changes) for arm in self.arms]

    def warning(self) -> str:
        warnings = self.comparison.warnings
        return f"WARNING: different data ({'; '.join(warnings)})" if warnings else ""

    def _source(self, name: str) -> str:
        """Return data, split and number of seeds of a figure, as far as it depends on them."""
        parts = [f"{' and '.join(dict.fromkeys(arm['dataset'] for arm in self.comparison.arms))} data"]
        if name in _SCORED:
            parts.append(f"{self.comparison.split} split")
        if name not in _OF_ONE_RUN:
            fewest, most = (f(len(arm.runs) for arm in self.arms) for f in (min, max))
            parts.append(counted(most, "seed") if fewest == most else f"{fewest} to {most} seeds")
        return ", ".join(parts)

    def save(self, figure: Figure, name: str, title: str, caption: str, file: str = "") -> Picture:
        """Write a figure, with a small line that says what it is of, because it may be shown on its own.

        Args:
            figure: the figure.
            name: its name, in ``names.COMPARISON_FIGURES``.
            title: its title in the report.
            caption: text below it in the report.
            file: name of its files without suffix, if not its name.
        """
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="0.92", linewidth=0.7)
            axes.set_axisbelow(True)
        if warning := self.warning():
            figure.text(0.5, 0.5, "DIFFERENT DATA", color="#D55E00", alpha=0.25, fontsize=40, ha="center", va="center",
                        rotation=20)  # fmt: skip
            figure.suptitle(
                "\n".join(textwrap.wrap(warning, int(figure.get_figwidth() * 13))), color="#D55E00", fontsize=8
            )
        figure.align_ylabels()
        # The legend stays where the layout puts it, although what is saved includes a line below the figure.
        figure.draw_without_rendering()
        figure.set_layout_engine(None)
        for legend in figure.legends:
            legend.set_bbox_to_anchor((0, 0, 1, 1), figure.transFigure)
        figure.text(
            1, -0.04 / figure.get_figheight(), self._source(name), ha="right", va="top", fontsize=6, color="0.4"
        )
        path = self.folder / f"{file or name}.png"
        # Computed once for both files: it takes as long as drawing one of them.
        box = figure.get_tightbbox().padded(0.04)
        for each in (path, path.with_suffix(".pdf")):
            figure.savefig(each, dpi=220, bbox_inches=box)
        if self.comparison.warnings:
            caption += " The runs are of different data: each is scored on its own."
        return Picture(name=name, path=path, width=figure.get_figwidth(), title=title, caption=caption)
