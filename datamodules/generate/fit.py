"""How well a generated trace repeats its original column: as numbers and as a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.generate.profiles import CLASS_LOW, Profile, phase_end
from lightning_dlrm.contracts.errors import UserError, require

CACHE_SHARES = (0.001, 0.01, 0.1, 0.5)
"""Sizes of the LRU caches whose hit rates are compared, as shares of the original's distinct rows."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A column's trace, original against generated, over the accesses that both have."""

    column: str
    accesses: int
    distinct: tuple[int, int]
    """Rows accessed by the original and by the generated trace."""
    distance_error: float
    """Largest difference between the two distribution functions of stack distances (Kolmogorov-Smirnov), first
    accesses counting as infinite distances."""
    variation: float
    """Share of the accesses that would have to move to another octave of distances (total variation)."""
    caches: tuple[tuple[int, float, float], ...]
    """Rows of an LRU cache, and its hit rates for the original and for the generated trace."""


def measure(original: Profile, generated: Profile) -> Fit:
    """Compare two profiles over the accesses of the shorter one."""
    accesses = min(original.accesses, generated.accesses)
    counts = [profile.beginning(accesses) for profile in (original, generated)]
    distribution = [np.cumsum(part[1:]) / accesses for part in counts]
    octave = np.frexp(CLASS_LOW)[1]  # 0 for first accesses
    octaves = [np.bincount(octave, part) / accesses for part in counts]
    caches: dict[int, tuple[int, float, float]] = {}
    for share in CACHE_SHARES:
        # A class ends just below the beginning of the next: a cache of that size hits all accesses of the class.
        last = int(np.searchsorted(CLASS_LOW, max(share * counts[0][0], 1), side="right")) - 1
        rows = int(CLASS_LOW[last + 1]) - 1 if last + 1 < len(CLASS_LOW) else int(CLASS_LOW[last])
        caches[rows] = (rows, float(distribution[0][last - 1]), float(distribution[1][last - 1]))
    return Fit(
        column=original.column,
        accesses=accesses,
        distinct=(round(counts[0][0]), round(counts[1][0])),
        distance_error=float(np.abs(distribution[0] - distribution[1]).max()),
        variation=float(np.abs(octaves[0] - octaves[1]).sum() / 2),
        caches=tuple(caches.values()),
    )


def render(fits: Sequence[Fit]) -> str:
    """Format the fits as text, one block a column."""
    lines = []
    for fit in fits:
        lines += [
            f"{fit.column}: {fit.accesses:,} accesses; original / generated",
            f"  distinct rows     {fit.distinct[0]:>13,} / {fit.distinct[1]:,}",
            f"  stack distances   largest difference of the distribution functions {fit.distance_error:.4f}, "
            f"total variation over octaves {fit.variation:.4f}",
            *(
                f"  LRU hit rate      {first:>13.2%} / {second:.2%} with {rows:,} rows"
                for rows, first, second in fit.caches
            ),
        ]
    return "\n".join(lines)


def check_plot(path: Path) -> None:
    """Check that ``plot`` can write a picture of this kind.

    Raises:
        UserError: matplotlib is not installed, or knows no such kind of picture.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError as error:
        raise UserError(
            f"--plot needs {error.name}, which is not installed; install it with: pip install 'lightning-dlrm[trace]'"
        ) from error
    kinds = sorted(FigureCanvasBase.filetypes)
    require(
        path.suffix.removeprefix(".") in kinds,
        f"{path} is no kind of picture that can be drawn; give it one of the endings {', '.join(kinds)}",
    )


def plot(originals: Sequence[Profile], generated: Sequence[Profile], path: Path) -> None:
    """Draw stack distances, hit rates and distinct rows of each column, original and generated.

    Args:
        originals, generated: profiles of the same columns, in the same order.
        path: the picture, such as a .png or .pdf.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(13, 3.6 * len(originals)), layout="constrained")
    axes = figure.subplots(len(originals), 3, squeeze=False)
    for row, original, copy in zip(axes, originals, generated, strict=True):
        accesses = min(original.accesses, copy.accesses)
        for profile, name, style in (
            (original, "original", {"color": "tab:blue", "linewidth": 4, "alpha": 0.4}),
            (copy, "generated", {"color": "tab:orange", "linewidth": 1.4}),
        ):
            _draw(row, profile, accesses, {"label": name, **style})
        distances, hits, distinct = row
        distances.set(
            xscale="log", ylim=(0, None), xlabel="stack distance, rows", ylabel="share of accesses in an octave"
        )
        hits.set(xscale="log", ylim=(0, 1), xlabel="LRU cache, rows", ylabel="hit rate")
        distinct.set(xscale="log", yscale="log", xlabel="accesses", ylabel="distinct rows")
        distinct.yaxis.set_minor_formatter(LogFormatter())  # of a small table: 24, not 2.4 times ten to the 1
        distances.set_title(f"{original.column}: stack distances", loc="left")
        hits.set_title("LRU hit rate", loc="left")
        distinct.set_title("growth", loc="left")
        for ax in row:
            ax.grid(alpha=0.3)
        hits.legend()
    figure.savefig(path, dpi=110)


def _draw(row: Sequence[Any], profile: Profile, accesses: int, style: dict[str, Any]) -> None:
    counts = profile.beginning(accesses)
    octave = np.frexp(CLASS_LOW[1:])[1]
    shares = np.bincount(octave, counts[1:])[1:] / accesses
    shown = np.flatnonzero(counts[1:])[-1] + 1 if counts[1:].any() else 1
    octaves = int(octave[shown - 1])
    row[0].step(2.0 ** np.arange(octaves + 1), np.append(shares[:octaves], shares[octaves - 1]), where="post", **style)
    ends = CLASS_LOW[2 : shown + 2] - 1
    row[1].plot(ends, np.cumsum(counts[1 : len(ends) + 1]) / accesses, **style)
    knots = [phase_end(phase) for phase in range(len(profile.counts)) if phase_end(phase) < accesses]
    row[2].plot([*knots, accesses], [profile.beginning(knot)[0] for knot in (*knots, accesses)], **style)
