"""Figures of ``bench paper``, which are also readable in black and white."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_dlrm.bench.floors import MachineRates
from lightning_dlrm.bench.measurement import duration
from lightning_dlrm.bench.roofline import Cost, Part
from lightning_dlrm.contracts.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMATS = (".png", ".pdf", ".svg")
# Colours of Okabe and Ito, and hatches.
_FILLS = (
    ("#999999", "...."),
    ("#56B4E9", ""),
    ("#0072B2", "////"),
    ("#E69F00", ""),
    ("#009E73", "xxxx"),
    ("#F0E442", ""),
    ("#CC79A7", "\\\\\\\\"),
)
_LINES = (("#000000", "-"), ("#D55E00", "--"))
_MARKERS = ("o", "s", "^", "D", "v")


def check_figure(path: Path) -> None:
    """Check that a figure can be written, before long work.

    Raises:
        UserError: the file has no suffix of a figure, or its folder does not exist.
    """
    if path.suffix not in _FORMATS:
        raise UserError(f"{path} has no suffix of a figure; end its name with {', '.join(_FORMATS)}")
    if not path.parent.is_dir():
        raise UserError(f"the folder {path.parent} does not exist; make it, or write the figure elsewhere")


def draw_breakdown(columns: Mapping[str, Mapping[str, float]], device: str, title: str, path: Path) -> None:
    """Draw the time of a step as stacked bars.

    Args:
        columns: contender -> operator -> seconds of a step.
        device: device, for the label.
        title: name of the benchmark.
        path: file of the figure; its suffix is the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 1.6 + 0.55 * len(columns)), layout="constrained")
    axes = figure.subplots()
    names = list(columns)[::-1]
    begins = dict.fromkeys(names, 0.0)
    for (colour, hatch), operator in zip(_FILLS, next(iter(columns.values())), strict=True):
        widths = [columns[name][operator] * 1e3 for name in names]
        axes.barh(
            names,
            widths,
            left=[begins[name] for name in names],
            color=colour,
            hatch=hatch,
            edgecolor="black",
            linewidth=0.6,
            label=operator,
        )
        for name, width in zip(names, widths, strict=True):
            begins[name] += width
    for row, name in enumerate(names):
        axes.text(begins[name], row, f" {duration(begins[name] / 1e3)}", va="center")
    axes.set_xlim(0, max(begins.values()) * 1.12)
    axes.set_xlabel(f"milliseconds of a training step on {device}")
    axes.set_title(f"{title}: time of a step by operator")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    _save(figure, path)


def draw_roofline(
    precisions: Mapping[str, Mapping[Part, tuple[Cost, float]]], rates: MachineRates, title: str, path: Path
) -> None:
    """Draw the machine's roofs, and below them each part of our model.

    Args:
        precisions: precision -> part -> its cost and the seconds that it takes.
        rates: rates of the machine.
        title: name of the benchmark.
        path: file of the figure; its suffix is the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5.2), layout="constrained")
    axes = figure.subplots()
    points = [(cost.intensity, cost.flops / s) for parts in precisions.values() for cost, s in parts.values()]
    low, high = min(x for x, _ in points) / 3, max(x for x, _ in points) * 3
    for (colour, style), (precision, parts) in zip(_LINES, precisions.items(), strict=False):
        peak = rates.flops[precision]
        ridge = peak / rates.bytes
        xs = [low, min(max(ridge, low), high), high]
        axes.plot(
            xs,
            [min(peak, x * rates.bytes) / 1e9 for x in xs],
            color=colour,
            linestyle=style,
            label=f"roof, {precision}: {rates.bytes / 1e9:.3g} GB/s, {peak / 1e9:,.0f} GFLOP/s",
        )
        for marker, (part, (cost, seconds)) in zip(_MARKERS, parts.items(), strict=True):
            axes.plot(
                cost.intensity,
                cost.flops / seconds / 1e9,
                marker,
                markersize=8,
                color=colour,
                markerfacecolor=colour if style == "-" else "white",
                linestyle="none",
                label=f"{part}, {precision}",
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte between processor and memory")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"{title}: parts of our model, profiled separately, below the machine's roofs")
    axes.grid(True, which="major", color="0.9")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    _save(figure, path)


def _save(figure: "Figure", path: Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; write the figure elsewhere") from error
