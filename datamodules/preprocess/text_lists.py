"""Lists that a column of text holds: what separates their values, and whether they stand in brackets."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from datamodules.preprocess.dialect import is_number

_SEPARATORS = ("|", ";", ",", " ")
_SHARE = 0.2  # of the texts that must have the separator
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
_DECIMAL_SHARE = 0.95  # of the texts with a comma; they are then numbers, not pairs
_TEXTS_PER_WORD = 3
_LONGEST = 40  # characters of a value
_IN_BRACKETS = re.compile(r"\s*(\[[^\[\]]*\]|\([^()]*\)|\{[^{}:]*\})\s*")
_AROUND_ITEMS = " '\""


@dataclass(frozen=True, kw_only=True)
class TextLists:
    """The form of lists in texts."""

    separator: str
    brackets: bool = False
    """Whether a list stands in brackets, such as ``[5, 3]``."""

    def items(self, text: str) -> list[str]:
        """Return the values in a text.

        >>> TextLists(separator="|").items("a|b"), TextLists(separator=",", brackets=True).items("['x', 'y']")
        (['a', 'b'], ['x', 'y'])
        """
        if not self.brackets:
            return text.split(self.separator)
        items = (item.strip(_AROUND_ITEMS) for item in text.strip()[1:-1].split(self.separator))
        return [item for item in items if item]


def find_lists(texts: Sequence[str]) -> TextLists | None:
    """Return the form of the lists that texts hold; None if each text is one value.

    >>> find_lists(["[5, 3]", "[7]", "[]"])
    TextLists(separator=',', brackets=True)

    Args:
        texts: of the rows that have a value.
    """
    different = set(texts)
    if all(_IN_BRACKETS.fullmatch(text) for text in different):
        found = (one for one in (",", ";", "|", " ") if any(one in text.strip()[1:-1].strip() for text in different))
        return TextLists(separator=next(found, ","), brackets=True)
    for separator in _SEPARATORS:
        if sum(separator in text for text in texts) < max(_SHARE * len(texts), 2):
            continue
        if separator == "," and _share_of_decimals(texts) > _DECIMAL_SHARE:
            continue
        items = {item for text in different for item in text.split(separator)}
        if max(map(len, items)) <= _LONGEST and (separator == "|" or _are_values(items, different, separator)):
            spaced = all(item[:1] == " " for text in different for item in text.split(separator)[1:])
            return TextLists(separator=f"{separator} " if spaced and separator != " " else separator)
    return None


def _are_values(items: set[str], texts: set[str], separator: str) -> bool:
    """Return whether the parts of texts are values: titles and addresses also contain commas and spaces."""
    # Their parts hardly recur.
    if any(re.search(r"[\s(){}\[\]]", item.strip()) for item in items) or len(items) >= len(texts):
        return False
    if separator != " " or all(re.search(r"\d|_", item) for item in items if item):
        return True
    # Names have few words, and hardly more names are made of them.
    return len({text.count(" ") for text in texts}) > 2 and len(texts) >= _TEXTS_PER_WORD * len(items)


def _share_of_decimals(texts: Sequence[str]) -> float:
    """Return the share of numbers with a decimal comma among the texts with a comma."""
    with_comma = [text for text in texts if "," in text]
    return sum(bool(_DECIMAL_COMMA.fullmatch(text)) for text in with_comma) / max(len(with_comma), 1)


def are_fractions(items: set[str]) -> bool:
    """Return whether values are numbers, not all whole."""
    return all(map(is_number, items)) and not all(item.lstrip("+-").isdigit() for item in items)
