"""The dialect of text of rows and fields, found from its rows: separator, quotes, header, decimal point, nulls."""

import csv
import io
import re
from collections.abc import Iterator, Sequence

from lightning_dlrm.contracts.errors import UserError, one_line, require

_LINES = 200  # of which the separator is found

SEPARATORS = ("\t", ";", "::", "|", ",")
"""In the order in which they are taken if several split all lines into equally many fields."""
_SURE_NULLS = ("\\N", "NULL", "null", "NaN", "nan", "<NA>", "#N/A", "N/A", "n/a")
"""Texts that mean a missing value in any column."""
_NUMERIC_NULLS = ("NA", "na", "None", "none", "-", "--", "?", ".")
"""Texts that mean a missing value if all other values of their column are numbers."""
_NULL_WORDS = ("missing", "unknown")
"""The same, if they are a value of no other column: there they can be a category."""

_NUMBER = {
    ".": re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"),
    ",": re.compile(r"[+-]?(\d+,?\d*|,\d+)([eE][+-]?\d+)?"),
}
_FORMATTED = re.compile(r"(?=.*[\s%$€£¥])[\s$€£¥]*[+-]?\d+([.,]\d+)?[\s%$€£¥]*|[+-]?\d{1,3}([,.' ]\d{3})+([.,]\d+)?")
_LEADING_ZERO = re.compile(r"[+-]?0\d")


def is_number(text: str, decimal: str = ".") -> bool:
    """Return whether a text is a number; one with leading zeros is not, because it is the text of an id.

    >>> is_number("-1.5e3"), is_number("7,93", ","), is_number("007"), is_number("1,000")
    (True, True, False, False)
    """
    return bool(_NUMBER[decimal].fullmatch(text)) and not _LEADING_ZERO.match(text)


def is_formatted_number(text: str) -> bool:
    """Return whether a text is a number with spaces, a currency, a percent sign or separators of thousands.

    >>> [is_formatted_number(text) for text in ("$7.93", "12 %", "1,234.50", "7.93")]
    [True, True, True, False]
    """
    return bool(_FORMATTED.fullmatch(text))


def fields_of(text: str, separator: str, quote: str | None = '"') -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the last line of each row, and the row's fields; a longer separator cannot be quoted."""
    if len(separator) > 1 or quote is None:
        for number, line in enumerate(text.split("\n"), 1):
            if line.rstrip("\r"):
                yield number, line.rstrip("\r").split(separator)
        return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quotechar=quote)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"line {reader.line_num}: {one_line(error)}; correct the quotes of this line") from error


def find_separator(text: str) -> tuple[str, str | None]:
    r"""Return what separates the fields of a text, and what quotes them; None if quotes are ordinary characters.

    The separator is the one that splits the first lines into the most fields, equally many in each.

    >>> find_separator("a;b\n1,5;2\n"), find_separator("1::2::3\n4::5::6\n"), find_separator('a,b\n"x,y",1\n')
    ((';', '"'), ('::', '"'), (',', '"'))
    >>> find_separator('a\tb\n"x\t1\ny\t2\n')
    ('\t', None)

    Raises:
        UserError: there is no such separator.
    """
    start = "".join(text.splitlines(keepends=True)[:_LINES])
    quoted, plain = _best_separator(start, '"'), _best_separator(start, None)
    # A single quote that is an ordinary character joins lines.
    joined = plain[0] == 1 and quoted[1:3] == plain[1:3] and quoted[3] < plain[3]
    quote = '"' if (quoted[0] == 1 or plain[0] < 1) and not joined else None
    share, _, separator, _ = plain if quote is None else quoted
    # If some rows have other numbers of fields, the message about them names their lines.
    require(
        share > 0.5,
        f"no separator found: expected one of {', '.join(map(repr, SEPARATORS))} between fields, equally many in each "
        "line",
    )
    return separator, quote


def _best_separator(text: str, quote: str | None) -> tuple[float, int, str, int]:
    """Return the separator that splits a text best, the first of equals.

    Returns:
        The share of rows with the common number of fields, this number, the separator, and the number of rows.
    """
    found: list[tuple[float, int, str, int]] = [(0.0, 0, "", 0)]
    for separator in SEPARATORS:
        counts = [len(row) for _, row in fields_of(text, separator, quote)]
        common = max(set(counts), key=counts.count, default=1)
        if common > 1:
            found.append((counts.count(common) / len(counts), common, separator, len(counts)))
    return max(found, key=lambda one: (one[0] == 1, one[1] if one[0] == 1 else one[0]))


def has_header(first: Sequence[str], rows: Sequence[Sequence[str]], decimal: str) -> bool:
    """Return whether a first row holds names: texts that differ, and do not recur as values."""
    if list(first) == [str(number) for number in range(len(first))]:
        return True  # as pandas names columns without names
    if any(is_number(cell, decimal) for cell in first):
        return False
    numbers = any(all(is_number(row[i], decimal) or not row[i] for row in rows) for i in range(len(first)))
    recurs = any(row[i] == cell for i, cell in enumerate(first) if cell for row in rows)
    return (bool(rows) and numbers) or (len(set(first)) == len(first) and not recurs)


def decimal_of(rows: Sequence[Sequence[str]], separator: str) -> str:
    """Return a comma if numbers are written with one, else a point."""
    if separator == ",":
        return "."
    for cells in zip(*rows[1:], strict=True):
        # Nulls such as NA also stand between decimal numbers.
        found = [cell for cell in cells if cell not in ("", *_SURE_NULLS, *_NUMERIC_NULLS)]
        if any("," in cell for cell in found) and all(is_number(cell, ",") for cell in found):
            return ","
    return "."


def nulls_of(columns: dict[str, list[str]], decimal: str) -> tuple[str, ...]:
    """Return the texts that mean a missing value, the empty one always among them."""
    found, categories = {""}, set[str]()
    for cells in columns.values():
        different = set(cells)
        found |= different & set(_SURE_NULLS)
        others = different - {"", *_SURE_NULLS, *_NUMERIC_NULLS, *_NULL_WORDS}
        if others and all(is_number(cell, decimal) for cell in others):
            found |= different & {*_NUMERIC_NULLS, *_NULL_WORDS}
        else:
            categories |= different & set(_NULL_WORDS)
    return tuple(sorted(found - categories))
