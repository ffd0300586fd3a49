"""How often each id of a table is looked up: from the counts of the vocabulary, or counted in the rows.

``draw`` makes the figure of ``inspect --plot``: the sizes of the tables and the skew of their ids. Tables and shares
differ in shape and line style, so that the figure is readable in black and white.
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from tqdm import tqdm

from datamodules.folder import REMEDY, Folder, part_files
from datamodules.parquet import read_part
from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.figures import check_figure_file, save_figure
from lightning_dlrm.contracts.schema import Column, DatasetSchema

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHARES = (0.5, 0.9, 0.99)
_CURVE_POINTS = 200

_MOST_TABLES = 60  # of which the figure still has readable rows
_NAMED_CURVES = 6
_INCHES = 4.0  # width of the figure
_FONT = 7.5
_LABELS = 0.45  # inches of the labels below axes
_SHOWN_SHARE = 0.005  # of the lookups, from which on curves are of interest
_LEAST = 0.7  # of an axis of ids, so that a mark at 1 is whole
# Marker, colour inside, and height in the bar for each of SHARES, so that marks at one number are all seen.
_MARKS = (("o", "white", -0.25), ("^", "0.75", 0.0), ("D", "black", 0.25))
_MARK_SIZE = 3.2
_NARROW = 20  # ratio of the ends of an axis, below which it has more numbers than powers of ten
_MOSTLY_ONCE = 0.5  # share of ids that occur once, from which on a table is marked
# Colours of Okabe and Ito, which differ in lightness too; each with a line style of its own.
_CURVES = (
    ("#000000", "-"),
    ("#0072B2", "--"),
    ("#D55E00", "-."),
    ("#009E73", ":"),
    ("#CC79A7", (0, (8, 2, 1, 2, 1, 2))),
    ("#E69F00", (0, (2, 1))),
)


@dataclass(frozen=True, kw_only=True)
class Skew:
    """How the lookups of a table are spread over its ids; without numbers if there are no lookups."""

    column: Column
    lookups: int
    most_frequent: float | None
    """The share of the lookups that go to the most frequent id."""
    most_frequent_id: int | None
    """The id that most lookups go to; the smallest of them if there are several."""
    ids_for: Mapping[float, int]
    """For each of ``SHARES``, the least number of ids that this share of the lookups goes to."""
    once: float
    """The share of the ids in use that are looked up once."""
    curve: tuple[NDArray[np.float64], NDArray[np.float64]]
    """Shares of the table's rows, in logarithmic steps up to the ids in use, and the share of the lookups that go to
    that many of the most frequent ids."""


def skew_of(column: Column, counts: NDArray[np.int64]) -> Skew:
    """Return the skew of a table.

    Args:
        counts: lookups of each id, [cardinality], by id; overwritten, as a table may have hundreds of millions.
    """
    most_frequent_id = int(counts.argmax())
    counts.sort()
    unused, used_once = np.searchsorted(counts, [1, 2])
    in_use = len(counts) - int(unused)
    once = float(used_once - unused) / max(in_use, 1)
    covered = counts[::-1]
    np.cumsum(covered, out=covered)
    lookups = int(covered[-1])
    if not lookups:
        return Skew(
            column=column,
            lookups=0,
            most_frequent=None,
            most_frequent_id=None,
            ids_for={},
            once=0.0,
            curve=(np.empty(0), np.empty(0)),
        )
    ids = np.unique(np.geomspace(1, in_use, _CURVE_POINTS).round().astype(np.int64))
    return Skew(
        column=column,
        lookups=lookups,
        most_frequent=float(covered[0] / lookups),
        most_frequent_id=most_frequent_id,
        once=once,
        ids_for={share: int(np.searchsorted(covered, share * lookups)) + 1 for share in SHARES},
        curve=(ids / len(counts), covered[ids - 1] / lookups),
    )


def vocabulary_skew(folder: str | Path | Folder, schema: DatasetSchema, column: Column) -> Skew | None:
    """Return the skew of a column from its vocabulary; None if the vocabulary has no counts, see
    ``_vocabulary_counts``."""
    counts = _vocabulary_counts(folder, schema, column)
    return None if counts is None else skew_of(column, counts)


def lookup_counts(folder: str | Path | Folder, schema: DatasetSchema, column: Column) -> NDArray[np.int64]:
    """Count how often each id of a column is looked up, [cardinality]: from the vocabulary, or in all rows if it has no
    counts.

    Raises:
        UserError: a file is missing or altered.
    """
    counts = _vocabulary_counts(folder, schema, column)
    return _counted(folder, schema, column) if counts is None else counts


def _vocabulary_counts(folder: str | Path | Folder, schema: DatasetSchema, column: Column) -> NDArray[np.int64] | None:
    """Return ``count`` of each ``id`` (the position, if there is no such column). None if there is no vocabulary, or
    one without counts, or the column has several ids a row, which the vocabulary does not count.

    Raises:
        UserError: the vocabulary is not a readable Parquet file.
    """
    if column.name not in schema.vocabulary or column.role != "categorical":
        return None
    where, path = Folder(folder), schema.vocabulary[column.name].path
    counts = np.zeros(column.cardinality, np.int64)
    start = 0
    with where.open_vocabulary(path) as vocabulary:
        names = [name for name in ("count", "id") if name in vocabulary.schema_arrow.names]
        if "count" not in names:
            return None
        for group in range(vocabulary.num_row_groups):
            table = vocabulary.read_row_group(group, columns=names)
            stop = start + table.num_rows
            require(
                all(pa.types.is_integer(column.type) and not column.null_count for column in table.columns),
                f"{where / path} has counts or ids that are not whole numbers; {REMEDY}",
            )
            ids = table.column("id").to_numpy() if "id" in names else np.arange(start, stop)
            try:
                np.add.at(counts, ids, table.column("count").to_numpy())
            except IndexError:
                beyond = f"{where / path} has ids beyond the {column.cardinality} rows of its table"
                raise UserError(f"{beyond}; {REMEDY}") from None
            start = stop
    return counts


def all_skews(folder: str | Path | Folder, schema: DatasetSchema, progress: bool = True) -> Iterator[Skew]:
    """Yield the skew of every table, in schema order; from the rows of all splits if the vocabulary has no counts.

    Takes 8 bytes of memory for each row of the largest table.

    Raises:
        UserError: a file is missing or altered.
    """
    columns = schema.by_role("categorical", "multi_hot")
    for column in tqdm(columns, desc="Reading ids", unit=" tables", disable=None if progress else True):
        yield skew_of(column, lookup_counts(folder, schema, column))


def _counted(folder: str | Path | Folder, schema: DatasetSchema, column: Column) -> NDArray[np.int64]:
    counts = np.zeros(column.cardinality, np.int64)
    for file in part_files(schema):
        for table in read_part(folder, schema, file, [column]):
            ids = table.column(column.name)
            np.add.at(counts, (pc.list_flatten(ids) if column.role == "multi_hot" else ids).to_numpy(), 1)
    return counts


def check_figure(schema: DatasetSchema, path: Path) -> None:
    """Check before long work that ``draw`` will have something to draw.

    Raises:
        UserError: there are no tables, or see ``check_figure_file``.
    """
    require(
        schema.features.tables,
        "the dataset has no categorical or multi-hot columns, so there are no tables to plot",
    )
    check_figure_file(path)


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
    from matplotlib.ticker import LogLocator, NullFormatter

    largest = sorted(skews, key=lambda skew: -skew.column.cardinality)
    shown = [skew for skew in skews if skew in largest[:_MOST_TABLES]]
    heights = (max(1.2, 0.17 * len(shown)), 2.3)
    # A column of a printed page is about this wide, so that text keeps its size there.
    figure = Figure(figsize=(_INCHES, sum(heights) + 3.2), layout="constrained")
    figure.suptitle(textwrap.fill(title, 44), fontsize=10, weight="bold", x=0.01, ha="left")
    above, below = figure.subplots(2, 1, height_ratios=heights)
    _draw_sizes(above, shown, len(skews))
    _draw_curves(below, skews, largest[:_NAMED_CURVES])
    handles, labels = above.get_legend_handles_labels()
    # Below the axes: inside them they would hide bars or curves of some dataset.
    style = {"fontsize": _FONT, "frameon": False, "loc": "upper left", "borderaxespad": 0.0}
    above.legend(handles, labels, bbox_to_anchor=(0, -_LABELS / heights[0]), handlelength=1.5, **style)
    names = below.get_legend_handles_labels()
    below.legend(*names, bbox_to_anchor=(0, -_LABELS / heights[1]), ncols=3, handlelength=3.5, columnspacing=1, **style)
    for axes in (above, below):
        axes.tick_params(labelsize=_FONT)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}")
        left, right = axes.get_xlim()
        if right < _NARROW * left:
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_axisbelow(True)
    save_figure(figure, path, 220)


def _draw_sizes(axes: "Axes", shown: Sequence[Skew], tables: int) -> None:
    sizes = [skew.column.cardinality for skew in shown]
    rows = range(len(shown))
    axes.barh(rows, sizes, color="0.88", edgecolor="0.35", linewidth=0.6)
    for row, size in zip(rows, sizes, strict=True):
        axes.annotate(
            f"{size:,}{' *' * (shown[row].once > _MOSTLY_ONCE)}",
            (size, row),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=_FONT,
        )
    for share, (marker, fill, height) in zip(SHARES, _MARKS, strict=True):
        counted = [(skew.ids_for[share], row) for row, skew in zip(rows, shown, strict=True) if skew.lookups]
        axes.plot(
            [ids for ids, _ in counted],
            [row + height for _, row in counted],
            marker,
            color="black",
            markerfacecolor=fill,
            markersize=_MARK_SIZE,
            markeredgewidth=0.6,
            label=f"number of ids that get {share:.0%} of the lookups",
        )
    if any(skew.once > _MOSTLY_ONCE for skew in shown):
        axes.plot([], [], " ", label="* most ids occur once: more rows bring more ids")
    # The numbers to the right of the bars take a quarter of the width.
    right = max(sizes) * (max(sizes) / _LEAST) ** 0.25
    axes.set(
        xscale="log",
        xlim=(_LEAST, right),
    )
    axes.set_xlabel("number of ids (logarithmic)", fontsize=_FONT)
    axes.set_yticks(rows, [skew.column.name for skew in shown])
    # Bars of few tables are no thicker than those of six.
    ends = max(0.6, (6 - len(shown)) / 2)
    axes.set_ylim(len(shown) - 1 + ends, -ends)
    which = "each table" if len(shown) == tables else f"the {len(shown)} largest of {tables} tables"
    axes.set_title(f"Rows of {which} (bars)", fontsize=_FONT + 1, loc="left")
    axes.grid(axis="x", color="0.92")


def _draw_curves(axes: "Axes", skews: Sequence[Skew], named: Sequence[Skew]) -> None:
    others = [skew for skew in skews if skew not in named and skew.lookups]
    for number, skew in enumerate(others):
        x, y = skew.curve
        label = f"the other {len(others)} tables" if number == 0 else None
        axes.plot(100 * x, 100 * y, color="0.75", linewidth=0.7, label=label, zorder=1)
    for number, (skew, (colour, style)) in enumerate(zip(named, _CURVES, strict=False)):
        if skew.lookups:
            x, y = skew.curve
            # Curves at one place are all seen: the first ones are wider.
            width = 1.0 + 0.4 * (len(named) - 1 - number)
            axes.plot(
                100 * x, 100 * y, color=colour, linestyle=style, linewidth=width, label=skew.column.name, zorder=2
            )
    # Shares close to 0 are left out, because they would take empty decades.
    begins = [x[np.searchsorted(y, _SHOWN_SHARE)] for x, y in (skew.curve for skew in skews if skew.lookups)]
    least = min(begins, default=_SHOWN_SHARE)
    axes.set(
        xscale="log",
        xlim=(100 * least * _LEAST, 100 / _LEAST),
        ylim=(0, 102),
    )
    axes.set_xlabel("most frequent ids, % of the table's rows (logarithmic)", fontsize=_FONT)
    axes.set_ylabel("lookups, %", fontsize=_FONT)
    words = f"\n(named: the {len(named)} largest tables)" if others else ""
    axes.set_title(f"Lookups that go to the most frequent ids{words}", fontsize=_FONT + 1, loc="left")
    axes.grid(color="0.92")
