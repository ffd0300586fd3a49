"""A curve in one line of text, for the end of a command."""

import math
import sys
from collections.abc import Iterable

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII = "_.-=+*#@"


def sparkline(values: Iterable[float | None], width: int = 40) -> str:
    """The course of some values, lowest to highest, one character for each, or for each share of them.

    Args:
        values: in their order; None, NaN and infinities leave a gap.
        width: characters at most; more values than these are averaged.

    Returns:
        Block characters; where standard output cannot print them, ASCII ones. Empty where there is nothing to show.

    >>> sparkline([1, 2, 4, 8, math.nan, 8])
    '▁▂▄█ █'
    >>> sparkline(range(1000), width=8)
    '▁▂▃▄▅▆▇█'
    """
    given = [value if value is not None and math.isfinite(value) else None for value in values]
    count = min(width, len(given))
    shares = [given[i * len(given) // count : (i + 1) * len(given) // count] for i in range(count)]
    heights = [_mean([value for value in share if value is not None]) for share in shares]
    known = [height for height in heights if height is not None]
    if not known:
        return ""
    bars, low, span = _bars(), min(known), max(known) - min(known)
    # A flat course lies in the middle.
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
