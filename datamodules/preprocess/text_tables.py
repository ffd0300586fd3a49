"""Tables and entries of text that fit a terminal."""

import textwrap
from collections.abc import Sequence

from lightning_dlrm.contracts.terminal import aligned


def filled_below(words: str, width: int, head: str = "", indent: int | None = None) -> list[str]:
    """Return lines of at most a width; further lines begin below the end of the head.

    >>> filled_below("one two three", 12, "  a  ")
    ['  a  one two', '     three']

    Args:
        words: the text.
        width: of a line; 0 for one line.
        head: before the text.
        indent: of further lines, instead of the length of the head.
    """
    if not words:
        return []
    below = " " * (len(head) if indent is None else indent)
    text = f"{head}{words}"
    if not width:
        return [text]
    return textwrap.wrap(text, width, subsequent_indent=below, break_long_words=False, break_on_hyphens=False)


def fitted(rows: Sequence[Sequence[str]], width: int, left: Sequence[int] = (0,)) -> list[str]:
    """Align the cells of a table as ``aligned`` does; if it is too wide, long names take a line above their cells.

    >>> for line in fitted([("name", "rows"), ("a_long_name", "12"), ("b", "3")], 14): print(line)
    name      rows
    a_long_name
                12
    b            3

    Args:
        rows: of cells, the header first; the first cell of a row is its name.
        width: of a line; 0 for no limit.
        left: columns that are flush left.
    """
    lines = aligned(rows, left)
    excess = max(map(len, lines)) - width
    if not width or excess <= 0:
        return lines
    room = max(max(len(row[0]) for row in rows) - excess, len("column"))
    cells = aligned([("" if len(row[0]) > room else row[0].ljust(room), *row[1:]) for row in rows], left)
    return [
        line
        for row, short in zip(rows, cells, strict=True)
        for line in ((row[0], short) if len(row[0]) > room else (short,))
    ]
