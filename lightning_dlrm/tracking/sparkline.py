"""A curve in one line of text, printed at the end of a command."""

import math
import sys
from collections.abc import Iterable

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII = "_.-=+*#@"
LEAST_RANGE = 1e-3
"""Smallest difference of the lowest and the highest value that a curve is scaled to, so that noise looks flat."""


def sparkline(values: Iterable[float | None], width: int = 40, beside: Iterable[float] = ()) -> str:
    """Return a curve of values, scaled from the lowest to the highest, with one character for one or several values.

    Args:
        values: the values in order; None, NaN and infinite values leave a gap.
        width: largest number of characters; if there are more values, each character shows the mean of several.
        beside: values of other curves that have the same scale.

    Returns:
        Block characters, or ASCII if standard output cannot encode them. Empty if no value is finite.

    >>> sparkline([1, 2, 4, 8, math.nan, 8])
    '▁▂▄█ █'
    >>> sparkline(range(1000), width=8)
    '▁▂▃▄▅▆▇█'
    >>> sparkline([0.5, 0.5000001]), sparkline([0.5, 0.6], beside=[0.5, 0.9])
    ('▄▄', '▁▃')
    """
    finite = [value if value is not None and math.isfinite(value) else None for value in values]
    count = min(width, len(finite))
    shares = [finite[i * len(finite) // count : (i + 1) * len(finite) // count] for i in range(count)]
    heights = [_mean([value for value in share if value is not None]) for share in shares]
    known = [height for height in heights if height is not None]
    if not known:
        return ""
    known += [value for value in beside if math.isfinite(value)]
    bars, low, span = _bars(), min(known), max(known) - min(known)
    if span < LEAST_RANGE:
        # Curves without a visible change are in the middle, at one level.
        low, span = (min(known) + max(known)) / 2 - LEAST_RANGE * 3 / 7, LEAST_RANGE
    levels = [None if h is None else round((h - low) / span * 7) for h in heights]
    return "".join(" " if level is None else bars[level] for level in levels)


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _bars() -> str:
    try:
        _BLOCKS.encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return _ASCII
    return _BLOCKS
