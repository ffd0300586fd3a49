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
_MARKERS = ("o", "s", "^", "D", "v")
_LABELS = {"bottom MLP": ((-8, -3), "right"), "update": ((5, -13), "left")}
"""Part of the model -> offset of its label in points, and alignment; other labels are on the right."""
DEVICES = {"cpu": "on the CPU", "cuda": "on the GPU"}
_TITLE: dict[str, Any] = {"fontsize": 12, "weight": "bold", "x": 0.01, "ha": "left"}


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
        device: ``cpu`` or ``cuda``.
        title: name of the benchmark.
        path: file of the figure; its suffix is the format.
    """
    figure = Figure(figsize=(8.5, 1.9 + 0.55 * len(columns)), layout="constrained")
    axes = figure.subplots()
    longest = max(sum(column.values()) for column in columns.values()) * 1e3
    begins = dict.fromkeys(list(columns)[::-1], 0.0)
    for (colour, hatch), operator in zip(_FILLS, next(iter(columns.values())), strict=True):
        widths = {name: columns[name][operator] * 1e3 for name in begins}
        look: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "black", "linewidth": 0.6}
        axes.barh(list(widths), list(widths.values()), left=list(begins.values()), label=operator, **look)
        for row, (name, width) in enumerate(widths.items()):
            if width > 0.07 * longest:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
                middle = begins[name] + width / 2
                axes.text(middle, row, duration(width / 1e3), ha="center", va="center", fontsize=8, bbox=box)
        begins = {name: begin + widths[name] for name, begin in begins.items()}
    for row, end in enumerate(begins.values()):
        axes.text(end, row, f" {duration(end / 1e3)}", va="center")
    axes.set(xlim=(0, longest * 1.12), xlabel="milliseconds of a training step, under the profiler")
    axes.set_title(f"{title}, {DEVICES[device]}", fontsize=9, color="0.35", loc="left")
    figure.suptitle("Where the time of a training step goes", **_TITLE)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    _save(figure, path)


def draw_roofline(
    precisions: Mapping[str, Mapping[Part, tuple[Cost, float]]],
    rates: MachineRates,
    device: str,
    title: str,
    path: Path,
) -> None:
    """Draw the machine's roofs, and below them each part of our model.

    Args:
        precisions: precision -> part -> its cost and the seconds that it takes.
        rates: rates of the machine.
        device: ``cpu`` or ``cuda``.
        title: name of the benchmark.
        path: file of the figure; its suffix is the format.
    """
    figure = Figure(figsize=(8.5, 4.4), layout="constrained")
    panels = figure.subplots(1, len(precisions), sharey=True, squeeze=False)[0]
    intensities = [cost.intensity for parts in precisions.values() for cost, _ in parts.values()]
    low, high = min(intensities) / 3, max(intensities) * 5
    highest = 0.0
    for axes, (precision, parts) in zip(panels, precisions.items(), strict=True):
        peak = rates.flops[precision]
        xs = [low, min(max(peak / rates.bytes, low), high), high]
        axes.plot(xs, [min(peak, x * rates.bytes) / 1e9 for x in xs], color="black")
        for marker, (part, (cost, seconds)) in zip(_MARKERS, parts.items(), strict=True):
            place = (cost.intensity, cost.flops / seconds / 1e9)
            axes.plot(*place, marker, markersize=8, color="#0072B2")
            reached = rates.floor(cost.flops, cost.bytes, precision) / seconds
            highest = max(highest, reached)
            # In several directions, because the MLPs lie near each other, and so do the tables and their update.
            offset, align = _LABELS.get(part, ((8, -3), "left"))
            text = f"{part} {reached:.0%}"
            axes.annotate(text, place, offset, textcoords="offset points", ha=align, fontsize=8)
        axes.set(xscale="log", yscale="log", xlabel="floating-point operations\nper byte moved to or from memory")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(True, which="major", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{precision}: {rates.bytes / 1e9:.3g} GB/s, {peak / 1e9:,.0f} GFLOP/s", fontsize=9, loc="left")
    panels[0].set_ylabel("GFLOP/s")
    panels[0].yaxis.set_major_formatter("{x:g}")
    figure.suptitle("How near each part of lightning_dlrm comes to the limits of this machine", **_TITLE)
    figure.supxlabel(
        f"{title}, {DEVICES[device]}. Percentages of the line: memory bandwidth where it rises, arithmetic where "
        "it is flat" + ";\nabove 100%, data come from the processor's caches" * (highest > 1),
        fontsize=8,
        color="0.35",
    )
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; write the figure elsewhere") from error
