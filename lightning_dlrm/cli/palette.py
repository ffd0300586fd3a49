"""Looks that figures share: colours of Okabe and Ito, which colour-blind people can tell apart, and a hatch beside each
for black and white."""

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++", "ooo", "---")


def filling(number: int) -> dict[str, str]:
    """Options of the n-th bar."""
    return {
        "color": OKABE_ITO[number % len(OKABE_ITO)], "hatch": HATCHES[number % len(HATCHES)], "edgecolor": "white"
    }  # fmt: skip
