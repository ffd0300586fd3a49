"""The figure of ``inspect --plot``: the sizes of the tables and the skew of their ids.

Tables and shares differ in shape and line style, so that the figure is readable in black and white.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datamodules.preprocess.skew import SHARES, Skew
from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.schema import DatasetSchema

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_TABLES = 60  # of which the figure still has readable rows
_NAMED_CURVES = 6
_SHOWN_SHARE = 0.005  # of the lookups, from which on curves are of interest
_LEAST = 0.7  # of an axis of ids, so that a mark at 1 is whole
# Marker and colour inside, for each of SHARES.
_MARKS = (("o", "white"), ("^", "0.6"), ("D", "black"))
# Colours of Okabe and Ito, which differ in lightness too; each with a line style of its own.
_CURVES = (
    ("#000000", "-"),
    ("#0072B2", "--"),
    ("#D55E00", "-."),
    ("#009E73", ":"),
    ("#CC79A7", (0, (8, 2, 1, 2, 1, 2))),
    ("#E69F00", (0, (2, 1))),
)


_FORMATS = (".png", ".pdf", ".svg")


def check_figure(schema: DatasetSchema, path: Path) -> None:
    """Check before long work that ``draw`` will have something to draw.

    Raises:
        UserError: there are no tables, or the file's suffix is not that of a figure.
    """
    require(
        schema.features.tables,
        "the dataset has no categorical or multi-hot columns, so there are no tables to plot",
    )
    require(
        path.suffix in _FORMATS, f"{path} does not have the suffix of a figure; give it one of {', '.join(_FORMATS)}"
    )


def draw(skews: Sequence[Skew], title: str, path: Path) -> None:
    """Write the figure.

    Args:
        skews: of every table, at least one.
        path: the file to write; its suffix is the format.

    Raises:
        UserError: the file cannot be written.
    """
    # Imported here: commands that draw nothing start without it.
    from matplotlib.figure import Figure

    largest = sorted(skews, key=lambda skew: -skew.column.cardinality)
    shown = [skew for skew in skews if skew in largest[:_MOST_TABLES]]
    figure = Figure(figsize=(13, max(5.0, 2.2 + 0.23 * len(shown))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    figure.suptitle(title, fontsize=11)
    _draw_sizes(left, shown, len(skews))
    _draw_curves(right, skews, largest[:_NAMED_CURVES])
    # Below the axes: inside them they would hide bars or curves of some dataset.
    style = {"fontsize": 8, "handlelength": 4}
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=3, **style)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=4, **style)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}); choose another --plot FILE") from error


def _draw_sizes(axes: "Axes", shown: Sequence[Skew], tables: int) -> None:
    sizes = [skew.column.cardinality for skew in shown]
    rows = range(len(shown))
    axes.barh(rows, sizes, color="0.88", edgecolor="0.35", linewidth=0.8)
    for row, size in zip(rows, sizes, strict=True):
        axes.annotate(f"{size:,}", (size, row), xytext=(8, 0), textcoords="offset points", va="center", fontsize=7.5)
    for share, (marker, fill) in zip(SHARES, _MARKS, strict=True):
        counted = [(skew.ids_for[share], row) for row, skew in zip(rows, shown, strict=True) if skew.lookups]
        axes.plot(
            [ids for ids, _ in counted],
            [row for _, row in counted],
            marker,
            color="black",
            markerfacecolor=fill,
            markersize=5,
            label=f"{share:.0%} of lookups go to so many ids",
        )
    # The numbers to the right of the bars take a sixth of the width.
    right = max(sizes) * (max(sizes) / _LEAST) ** 0.17
    axes.set(xscale="log", xlim=(_LEAST, right), xlabel="rows of the table (bar) and most frequent ids (marks)")
    axes.set_yticks(rows, [skew.column.name for skew in shown])
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_title(
        "Table sizes" if len(shown) == tables else f"The {len(shown)} largest of {tables} tables", fontsize=10
    )
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)


def _draw_curves(axes: "Axes", skews: Sequence[Skew], named: Sequence[Skew]) -> None:
    others = [skew for skew in skews if skew not in named and skew.lookups]
    for number, skew in enumerate(others):
        x, y = skew.curve
        label = "the other tables" if number == 0 else None
        axes.plot(100 * x, 100 * y, color="0.75", linewidth=0.7, label=label, zorder=1)
    for skew, (colour, style) in zip(named, _CURVES, strict=False):
        if skew.lookups:
            x, y = skew.curve
            axes.plot(100 * x, 100 * y, color=colour, linestyle=style, linewidth=1.8, label=skew.column.name, zorder=2)
    # Shares close to 0 are left out, because they would take empty decades.
    begins = [x[np.searchsorted(y, _SHOWN_SHARE)] for x, y in (skew.curve for skew in skews if skew.lookups)]
    least = min(begins, default=_SHOWN_SHARE)
    axes.set(
        xscale="log",
        xlim=(100 * least * _LEAST, 100 / _LEAST),
        ylim=(0, 102),
        xlabel="most frequent ids, % of the table",
        ylabel="lookups that go to them, %",
    )
    axes.set_title(f"Skew of the ids: the {len(named)} largest tables" if others else "Skew of the ids", fontsize=10)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
