"""Numbers as text, with the same number of decimals in a column."""

import math
from collections.abc import Sequence


def p_text(p: float | None) -> str:
    """Format a p-value with the decimals of all others; a dash for none.

    >>> p_text(0.0331), p_text(2e-7), p_text(None)
    ('0.0331', '<0.0001', '-')
    """
    if p is None:
        return "-"
    return f"{p:.4f}" if p >= 1e-4 else "<0.0001"


def decimals(values: Sequence[float]) -> int:
    """Return the number of decimals with which the largest of some values has three digits; 0 for larger ones.

    >>> decimals([286.61, 88.75]), decimals([0.06, 30.2]), decimals([1.5]), decimals([])
    (0, 1, 2, 0)
    """
    largest = max(map(abs, values), default=0.0)
    return max(0, 2 - math.floor(math.log10(largest))) if largest > 0 else 0


def in_column(cells: Sequence[Sequence[float]]) -> list[str]:
    """Format the cells of a column with ``decimals``: each a value, or the two ends of a range; a dash for none or NaN.

    >>> in_column([[286.61], [88.75, 91.2], [0.06], [math.nan], []])
    ['287', '89 to 91', '<1', '-', '-']
    """
    cells = [[value for value in cell if not math.isnan(value)] for cell in cells]
    digits = decimals([value for cell in cells for value in cell])
    least = 10.0**-digits
    return [
        " to ".join(
            dict.fromkeys(f"<{least:.{digits}f}" if 0 < value < least / 2 else f"{value:,.{digits}f}" for value in cell)
        )
        or "-"
        for cell in cells
    ]
