"""A curve in one line of text, printed at the end of a command."""

import math
import sys
from collections.abc import Iterable

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII = "_.-=+*#@"


def sparkline(values: Iterable[float | None], width: int = 40) -> str:
    """Return a curve of values, scaled from the lowest to the highest, with one character for one or several values.

    Args:
        values: the values in order; None, NaN and infinite values leave a gap.
        width: largest number of characters; if there are more values, each character shows the mean of several.

    Returns:
        Block characters, or ASCII if standard output cannot encode them. Empty if no value is finite.

    >>> sparkline([1, 2, 4, 8, math.nan, 8])
    '▁▂▄█ █'
    >>> sparkline(range(1000), width=8)
    '▁▂▃▄▅▆▇█'
    """
    finite = [value if value is not None and math.isfinite(value) else None for value in values]
    count = min(width, len(finite))
    shares = [finite[i * len(finite) // count : (i + 1) * len(finite) // count] for i in range(count)]
    heights = [_mean([value for value in share if value is not None]) for share in shares]
    known = [height for height in heights if height is not None]
    if not known:
        return ""
    bars, low, span = _bars(), min(known), max(known) - min(known)
    # A constant curve is drawn in the middle.
    levels = [None if h is None else round((h - low) / span * 7) if span else 3 for h in heights]
    return "".join(" " if level is None else bars[level] for level in levels)


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _bars() -> str:
    try:
        _BLOCKS.encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return _ASCII
    return _BLOCKS
