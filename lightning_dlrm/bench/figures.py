"""Figures of ``bench paper``, which are also readable in black and white."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from lightning_dlrm.bench.roofline import Cost, MachineRates, Part
from lightning_dlrm.contracts.figures import save_figure

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
_SIDES = (
    ((8, -3), "left"), ((-8, -3), "right"), ((6, 7), "left"), ((6, -15), "left"), ((-6, 7), "right"),
    ((-6, -15), "right"), ((0, 9), "center"), ((0, -17), "center"),
)  # fmt: skip
"""Offsets of a label from its mark in points, and alignments."""
_THIN = 0.01
"""Share of a bar below which a part is not seen."""
_UPDATE_NOTE = (
    "lightning_dlrm makes the gradients of table rows in the optimizer's update, plain PyTorch in embedding backward"
)
DEVICES = {"cpu": "on the CPU", "cuda": "on the GPU"}
_ABOVE = {
    "memory": "above 100% where it rises: caches, or a limit that was measured too low",
    "arithmetic": "above 100% where it is flat: the peak, of one square product, was measured too low",
}
"""What bounds a part -> why it can be above its bound."""
_DOUBTFUL = "#B34700"
"""Colour of sentences that say why numbers are uncertain."""
_MARK_PX = 6.0
"""Half of a mark's width, pixels."""
_FAR_PX = 8.0
"""Distance from which on a label is far enough from everything else, pixels."""
_TITLE: dict[str, Any] = {"fontsize": 12, "weight": "bold", "x": 0.01, "ha": "left"}


def draw_breakdown(
    columns: Mapping[str, Mapping[str, float]],
    unprofiled: Mapping[str, float],
    title: str,
    doubts: Sequence[str],
    path: Path,
) -> None:
    """Draw the time of a step as stacked bars.

    Args:
        columns: contender -> operator -> seconds of a step under the profiler.
        unprofiled: contender -> seconds of a step without the profiler.
        title: name of the benchmark.
        doubts: sentences that say why the times are uncertain.
        path: file of the figure; its suffix is the format.
    """
    figure = Figure(figsize=(8.5, 2.2 + 0.55 * len(columns)), layout="constrained")
    axes = figure.subplots()
    totals = {name: sum(column.values()) for name, column in list(columns.items())[::-1]}
    longest = max(totals.values())
    unit, words, size = ("s", "seconds", 1.0) if longest >= 1 else ("ms", "milliseconds", 1e-3)
    begins = dict.fromkeys(totals, 0.0)
    for operator, (seconds, (colour, hatch)) in _merged(columns, totals).items():
        widths = {name: seconds[name] / size for name in begins}
        look: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "black", "linewidth": 0.6}
        axes.barh(list(widths), list(widths.values()), left=list(begins.values()), label=operator, **look)
        for row, (name, width) in enumerate(widths.items()):
            if width > 0.08 * longest / size:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
                middle = begins[name] + width / 2
                axes.text(middle, row, f"{width:.3g} {unit}", ha="center", va="center", fontsize=8, bbox=box)
        begins = {name: begin + widths[name] for name, begin in begins.items()}
    for row, (name, end) in enumerate(begins.items()):
        text = f" {end:.3g} {unit} under the profiler\n {unprofiled[name] / size:.3g} {unit} without it"
        axes.text(end, row, text, va="center", fontsize=8)
    axes.set(xlim=(0, longest / size * 1.28), xlabel=f"{words} of a training step, under the profiler")
    axes.set_title(f"{title}\n{_UPDATE_NOTE}", fontsize=8, color="0.35", loc="left")
    _warn(axes, doubts, 2)
    figure.suptitle("Where the time of a training step goes", **_TITLE)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save_figure(figure, path, 150)


def _warn(axes: Axes, doubts: Sequence[str], title_lines: int) -> None:
    """Write doubts above the lines of a panel's title."""
    lines = [line for sentence in doubts for line in textwrap.wrap(sentence, 110)]
    if lines:
        axes.set_title("\n".join([*lines, *[" "] * title_lines]), fontsize=8, color=_DOUBTFUL, loc="right")


def _merged(
    columns: Mapping[str, Mapping[str, float]], totals: Mapping[str, float]
) -> dict[str, tuple[Mapping[str, float], tuple[str, str]]]:
    """Return operator -> (contender -> seconds, fill), with the operators that are too thin in all bars as the last."""
    shown: dict[str, tuple[Mapping[str, float], tuple[str, str]]] = {}
    thin: dict[str, tuple[Mapping[str, float], tuple[str, str]]] = {}
    for operator, fill in zip(next(iter(columns.values())), _FILLS, strict=True):
        seconds = {name: column[operator] for name, column in columns.items()}
        group = thin if all(seconds[name] < _THIN * totals[name] for name in seconds) else shown
        group[operator] = seconds, fill
    if thin:
        label = f"{', '.join(thin)} (below {_THIN:.0%}{' each' * (len(thin) > 1)})"
        sums = {name: sum(seconds[name] for seconds, _ in thin.values()) for name in columns}
        shown[label] = sums, next(iter(thin.values()))[1]
    return shown


def draw_roofline(
    precisions: Mapping[str, Mapping[Part, tuple[Cost, float]]],
    rates: MachineRates,
    device: str,
    title: str,
    doubts: Sequence[str],
    path: Path,
) -> None:
    """Draw the machine's roofs, and below them each part of our model.

    Args:
        precisions: precision -> part -> its cost and the seconds that it takes.
        rates: rates of the machine.
        device: ``cpu`` or ``cuda``.
        title: name of the benchmark.
        doubts: sentences that say why the times are uncertain.
        path: file of the figure; its suffix is the format.
    """
    figure = Figure(figsize=(8.5, 4.4 + 0.15 * len(doubts)), layout="constrained")
    panels = figure.subplots(1, len(precisions), sharey=True, squeeze=False)[0]
    intensities = [cost.intensity for parts in precisions.values() for cost, _ in parts.values()]
    low, high = min(intensities) / 6, max(intensities) * 12
    above: set[str] = set()
    labelled: list[tuple[Axes, dict[str, tuple[float, float]], list[tuple[float, float]]]] = []
    for axes, (precision, parts) in zip(panels, precisions.items(), strict=True):
        peak = rates.flops[precision]
        xs = [low, min(max(peak / rates.bytes, low), high), high]
        roof = [(x, min(peak, x * rates.bytes) / 1e9) for x in xs]
        axes.plot(*zip(*roof, strict=True), color="black")
        marks = {}
        for marker, (part, (cost, seconds)) in zip(_MARKERS, parts.items(), strict=False):
            place = (cost.intensity, cost.flops / seconds / 1e9)
            axes.plot(*place, marker, markersize=8, color="#0072B2")
            reached = rates.floor_of(part, cost, precision) / seconds
            marks[f"{part} {reached:.{0 if reached >= 0.01 else 1}%}"] = place
            if reached > 1:
                above.add(rates.bound_of(part, cost, precision))
        labelled.append((axes, marks, roof))
        axes.set(xscale="log", yscale="log", xlabel="floating-point operations\nper byte moved to or from memory")
        axes.margins(y=0.2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(True, which="major", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(precision, fontsize=9, loc="left")
    panels[0].set_ylabel("billions of operations per second\n(GFLOP/s)")
    panels[0].yaxis.set_major_formatter("{x:g}")
    figure.suptitle("How near each part of lightning_dlrm comes to the limits of this machine", **_TITLE)
    notes = [
        f"{title}, {DEVICES[device]}, under the profiler. Percentages of the line:\n"
        "memory bandwidth where it rises, arithmetic where it is flat",
        *(reason for bound, reason in _ABOVE.items() if bound in above),
    ]
    figure.supxlabel(";\n".join(notes), fontsize=8, color="0.35")
    _warn(panels[-1], doubts, 1)
    figure.draw_without_rendering()
    for (axes, marks, roof), precision in zip(labelled, precisions, strict=True):
        _label(axes, marks, roof, _limits(axes, rates, precision, roof))
    save_figure(figure, path, 150)


def _limits(axes: Axes, rates: MachineRates, precision: str, roof: Sequence[tuple[float, float]]) -> Sequence[Text]:
    """Write the limits of the machine along its roof: memory where it rises, arithmetic where it is flat."""
    (low, below), (ridge, peak), (high, _) = roof
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": "0.35"}
    words = f"arithmetic: {rates.flops[precision] / 1e9:.3g} GFLOP/s"
    limits = [axes.annotate(words, (high, peak), (0, 4), ha="right", **style)] if ridge < high else []
    if ridge > low:
        begin, end = axes.transData.transform(roof[:2])
        turned = math.degrees(math.atan2(end[1] - begin[1], end[0] - begin[0]))
        words = f"memory: {rates.bytes / 1e9:.3g} GB/s"
        limits.append(axes.annotate(words, (low, below), (-3, 5), rotation=turned, rotation_mode="anchor", **style))
    return limits


_Box = tuple[float, float, float, float]
"""Left, bottom, right, top, pixels."""


def _box(text: Text) -> _Box:
    left, bottom, right, top = map(float, text.get_window_extent().extents)
    return left, bottom, right, top


def _gap(box: _Box, other: _Box) -> float:
    """Return the pixels between two boxes, at most ``_FAR_PX``; below 0 if they overlap."""
    sides = (box[0] - other[2], other[0] - box[2], box[1] - other[3], other[1] - box[3])
    return min(_FAR_PX, max(sides))


def _label(
    axes: Axes, marks: Mapping[str, tuple[float, float]], roof: Sequence[tuple[float, float]], limits: Sequence[Text]
) -> None:
    """Write the label of each mark on the side where all are farthest from each other, from marks, from the roof and
    from its limits."""
    frame = axes.bbox.padded(-_FAR_PX)
    corners = axes.transData.transform(roof)
    line = [begin + share * (end - begin) for begin, end in pairwise(corners) for share in np.linspace(0, 1, 100)]
    spots = [
        (x - _MARK_PX, y - _MARK_PX, x + _MARK_PX, y + _MARK_PX) for x, y in axes.transData.transform([*marks.values()])
    ]
    texts = [_box(text) for text in limits]
    options: list[list[tuple[float, _Box, dict[str, Any]]]] = []
    for number, (text, place) in enumerate(marks.items()):
        others = [*((x, y, x, y) for x, y in line), *spots[:number], *spots[number + 1 :], *texts]
        options.append([])
        for offset, align in _SIDES:
            look: dict[str, Any] = {
                "text": text,
                "xy": place,
                "xytext": offset,
                "textcoords": "offset points",
                "ha": align,
            }
            label = axes.annotate(**look, fontsize=8)
            box = left, bottom, right, top = _box(label)
            label.remove()
            inside = frame.x0 < left and right < frame.x1 and frame.y0 < bottom and top < frame.y1
            options[-1].append((min(_gap(box, other) for other in others) if inside else -_FAR_PX, box, look))

    def distances(chosen: Sequence[tuple[float, _Box, Any]]) -> tuple[float, float]:
        gaps = [gap for gap, _, _ in chosen] + [_gap(a[1], b[1]) for a, b in combinations(chosen, 2)]
        return min(gaps), sum(gaps)

    for _, _, look in max(product(*options), key=distances):
        axes.annotate(**look, fontsize=8)
