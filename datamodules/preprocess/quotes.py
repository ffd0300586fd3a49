"""Quoted fields of CSV, found as pyarrow finds them: a quote opens a field only at the beginning of the field.

Other quotes, as in ``5" pipe``, are ordinary characters. A field that is not closed, or that goes on over line ends and
closes amid text, is malformed: it would take later rows into itself. Its line is a row of its own here.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

LONGEST_FIELD = 1 << 20
"""Bytes of the longest quoted field that is looked for beyond the text at hand."""


@dataclass(frozen=True)
class QuotedFields:
    """Quoted fields of a text, in order."""

    starts: np.ndarray
    """Where each opens, int64."""
    stops: np.ndarray
    """Where each closes, int64."""
    malformed: tuple[int, ...] = ()
    """Where malformed fields open, which are not among the others."""

    def outside(self, places: np.ndarray) -> np.ndarray:
        """Return those of ascending places that are in no quoted field."""
        return places[np.searchsorted(self.starts, places) == np.searchsorted(self.stops, places)]


@lru_cache
def _pattern(quote: bytes, separator: bytes, more: bool) -> re.Pattern[bytes]:
    q, after = re.escape(quote), rb"[" + re.escape(separator) + rb"\r\n]"
    within, within_line = rb"[^" + q + rb"]*+", rb"[^" + q + rb"\n]*+"
    before = rb"(?<![^" + re.escape(separator) + rb"\r\n])"
    in_line = within_line + rb"(?:" + q + q + within_line + rb")*+" + q
    in_lines = within + rb"(?:" + q + q + within + rb")*+" + q + rb"(?=" + after + rb"|\Z)"
    unclosed = rb"|" + within + rb"(?:" + q + q + within + rb")*+\Z" if more else b""
    return re.compile(before + q + rb"(?:(?:" + in_line + rb"|" + in_lines + unclosed + rb")|(?P<bad>[^\n]*+))")


def find_quoted(text: bytes, quote: bytes, separator: bytes, more: bool = False) -> QuotedFields:
    """Return the quoted fields of a text that begins with a row.

    Args:
        text: rows.
        quote: one byte.
        separator: of the fields, one byte.
        more: whether the text may end within a field, which is then open up to the end of the text.
    """
    characters = np.frombuffer(text, np.uint8)
    quotes = np.flatnonzero(characters == ord(quote))
    starts, stops = quotes[::2], quotes[1::2]
    ends_field = [ord(separator), ord("\r"), ord("\n")]
    if len(starts) == len(stops):
        before, after = characters[starts - 1], characters[(stops + 1) % len(text)]
        opens = np.isin(before, ends_field) | (before == ord(quote)) & (starts - 1 == np.append(-1, stops[:-1]))
        closes = np.isin(after, [*ends_field, ord(quote)]) | (stops + 1 == len(text))
        if (opens | (starts == 0)).all() and closes.all():
            return QuotedFields(starts, stops)
    found = list(_pattern(quote, separator, more).finditer(text))
    if more and found and found[-1].end() == len(text) and len(text) - found[-1].start() > LONGEST_FIELD:
        found = list(_pattern(quote, separator, False).finditer(text))
    fields = [one.span() for one in found if one["bad"] is None]
    spans = np.array(fields, np.int64).reshape(-1, 2)
    malformed = tuple(one.start() for one in found if one["bad"] is not None)
    return QuotedFields(spans[:, 0], spans[:, 1] - 1, malformed)


def line_ends(text: bytes, quote: bytes | None, separator: bytes, start: int = 0, more: bool = False) -> np.ndarray:
    """Return the places, int64, of line feeds outside quoted fields.

    Args:
        text: as in ``find_quoted``.
        quote: one byte; None if quotes are ordinary characters.
        separator: as in ``find_quoted``.
        start: the first place to look at.
        more: as in ``find_quoted``.
    """
    ends = start + np.flatnonzero(np.frombuffer(text, np.uint8)[start:] == ord("\n"))
    if quote is None or quote not in text:
        return ends
    return find_quoted(text, quote, separator, more).outside(ends)
