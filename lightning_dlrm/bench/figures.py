"""Figures of ``bench paper``, which are also readable in black and white."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lightning_dlrm.bench.measurement import duration
from lightning_dlrm.bench.roofline import Cost, MachineRates, Part
from lightning_dlrm.contracts.errors import UserError

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
    figure = Figure(figsize=(8.5, 1.6 + 0.55 * len(columns)), layout="constrained")
    axes = figure.subplots()
    begins = dict.fromkeys(list(columns)[::-1], 0.0)
    for (colour, hatch), operator in zip(_FILLS, next(iter(columns.values())), strict=True):
        widths = {name: columns[name][operator] * 1e3 for name in begins}
        look: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "black", "linewidth": 0.6}
        axes.barh(list(widths), list(widths.values()), left=list(begins.values()), label=operator, **look)
        begins = {name: begin + widths[name] for name, begin in begins.items()}
    for row, end in enumerate(begins.values()):
        axes.text(end, row, f" {duration(end / 1e3)}", va="center")
    axes.set(
        xlim=(0, max(begins.values()) * 1.12),
        xlabel=f"milliseconds of a training step on {device}",
        title=f"Time of a step by operator, measured apart from the totals, with the profiler\n{title}",
    )
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
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
    figure = Figure(figsize=(8.5, 4.4), layout="constrained")
    axes = figure.subplots()
    intensities = [cost.intensity for parts in precisions.values() for cost, _ in parts.values()]
    low, high = min(intensities) / 3, max(intensities) * 3
    for (colour, style), (precision, parts) in zip(_LINES, precisions.items(), strict=False):
        peak = rates.flops[precision]
        xs = [low, min(max(peak / rates.bytes, low), high), high]
        roof = f"roof in {precision}: {rates.bytes / 1e9:.3g} GB/s, {peak / 1e9:,.0f} GFLOP/s"
        axes.plot(xs, [min(peak, x * rates.bytes) / 1e9 for x in xs], color=colour, linestyle=style, label=roof)
        for marker, (part, (cost, seconds)) in zip(_MARKERS, parts.items(), strict=True):
            axes.plot(
                cost.intensity,
                cost.flops / seconds / 1e9,
                marker,
                markersize=8,
                color=colour,
                markerfacecolor=colour if style == "-" else "white",
                linestyle="none",
            )
            # To both sides, as the MLPs lie near each other.
            side: dict[str, Any] = (
                {"xytext": (-8, -3), "ha": "right"} if part == "bottom MLP" else {"xytext": (8, -3), "ha": "left"}
            )
            place = (cost.intensity, cost.flops / seconds / 1e9)
            axes.annotate(part, place, textcoords="offset points", fontsize=8, color=colour, **side)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte between processor and memory",
        ylabel="GFLOP/s",
        title=f"Parts of our model below the machine's roofs, measured apart, with marks in the profiler\n{title}",
    )
    axes.grid(True, which="major", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; write the figure elsewhere") from error
