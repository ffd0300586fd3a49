"""Colours of all figures: those of Okabe and Ito, safe for colour-blind readers, and hatches for black and white."""

from collections.abc import Sequence

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
TOL_MUTED = ("#DDCC77", "#882255", "#44AA99", "#332288", "#999933", "#CC6677", "#88CCEE", "#117733")
"""Colours of Paul Tol's muted scheme, for parts of bars whose wholes have colours of OKABE_ITO."""
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++", "ooo", "---")


def filling(number: int, colors: Sequence[str] = OKABE_ITO) -> dict[str, str]:
    """Return Matplotlib's options for the n-th bar: colour, hatch and edge."""
    return {
        "color": colors[number % len(colors)], "hatch": HATCHES[number % len(HATCHES)], "edgecolor": "white"
    }  # fmt: skip
