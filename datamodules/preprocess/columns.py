"""Facts about the columns of a sample, and the role of each column in an inferred schema."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from decimal import Decimal
from itertools import compress
from typing import Any, Literal

from datamodules.preprocess.dialect import is_formatted_number, is_number
from datamodules.preprocess.sniffing import Sample, Value
from datamodules.preprocess.text_lists import TextLists, are_fractions, find_lists

Kind = Literal["empty", "boolean", "integer", "number", "text", "time", "list", "numbers", "object"]
"""``list`` is a list of categories, ``numbers`` a list of numbers with fractions."""

_ISO = re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d([.,]\d+)?)?(Z|[+-]\d\d:?\d\d)?)?")
_TIME_FORMATS = (
    "%Y/%m/%d %H:%M:%S", "%Y/%m/%d %H:%M", "%Y/%m/%d", "%d.%m.%Y %H:%M:%S", "%d.%m.%Y %H:%M", "%d.%m.%Y",
    "%m/%d/%Y %H:%M:%S", "%m/%d/%Y %H:%M", "%m/%d/%Y", "%d/%m/%Y %H:%M:%S", "%d/%m/%Y %H:%M", "%d/%m/%Y",
)  # fmt: skip
_TIME_DIGITS = {
    8: ("%Y%m%d", "%y%m%d%H"),
    10: ("%Y%m%d%H",),
    12: ("%Y%m%d%H%M",),
    14: ("%Y%m%d%H%M%S",),
    6: ("%y%m%d",),
}
"""Formats of times that are written as whole numbers, by their digits."""
_UNIX = {"unix": 1.0, "unix_ms": 1e3}
_UNIX_RANGE = (6e8, 2.2e9)  # seconds: 1989 to 2039
_YEARS = (1990, 2040)
_VALUES_PARSED = 2_000

_TIME_WORDS = frozenset(
    (
        "time",
        "timestamp",
        "ts",
        "date",
        "datetime",
        "day",
        "hour",
        "dt",
        "at",
        "when",
        "created",
        "datum",
        "zeit",
        "tag",
    )
)
_ID_WORDS = frozenset(
    """
    id ids uuid guid key hash code zip ip user item ad site app device product sku category cat type brand model store
    shop seller city country region lang language position pos slot zone segment group class channel os browser campaign
    advertiser publisher domain nutzer artikel kunde anzeige
    """.split()  # noqa: SIM905
)
_QUANTITY_WORDS = frozenset(
    """
    age price cost amount count counts num number cnt qty quantity duration ms sec seconds length len size width height
    score views clicks impressions distance balance income weight days hours minutes ratio rate avg mean sum total bid
    budget alter preis anzahl dauer
    """.split()  # noqa: SIM905
)

_UNIQUE_SHARE = 0.98
_FEW = 100  # different values
_MANY = 1_000
_MANY_SHARE = 0.05  # of the rows of the sample
_LONG_TEXT = 80
_LARGE_LOG = 1_000_000
_LARGEST_EXACT = 1 << 53
"""Larger whole numbers are not exact in float64: different ones would become equal."""
_MISSING_WORDS = frozenset(("na", "n/a", "nan", "none", "null", "nil", "\\n", "-", "--", "?"))
_EXAMPLES = 3
_EXAMPLE_LENGTH = 24


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a sample shows about one column."""

    name: str
    kind: Kind
    values: Sequence[Value]
    """The values that are present: numbers as float or int, others as they are."""
    missing: int
    counts: Counter[Any]
    """How often each value occurs; of lists, each item."""
    time: str | None = None
    """Format of times in text or numbers: ``unix``, ``unix_ms``, ``iso`` or of strptime; None for values of a time
    type."""
    lists: TextLists | None = None
    """The form of lists in text."""
    present: Sequence[bool]
    """Whether each row has a value."""

    @property
    def cells(self) -> list[Value]:
        """The value of each row, None where it is missing."""
        values = iter(self.values)
        return [next(values) if present else None for present in self.present]

    @property
    def distinct(self) -> int:
        return len(self.counts)

    @property
    def words(self) -> set[str]:
        return words_of(self.name)

    @property
    def is_unique(self) -> bool:
        """Whether nearly every row has a different value."""
        return len(self.values) >= _FEW and self.distinct > _UNIQUE_SHARE * len(self.values)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The settings of a column in a schema, and why."""

    settings: Mapping[str, Any]
    reason: str


def words_of(name: str) -> set[str]:
    """Return the words of a column's name, lower case.

    >>> sorted(words_of("userId")), sorted(words_of("time_ms")), sorted(words_of("uid"))
    (['id', 'user'], ['ms', 'time'], ['id', 'uid'])
    """
    parts = re.findall(r"[A-ZÄÖÜ]+(?![a-zäöü])|[A-ZÄÖÜ]?[a-zäöüß]+|\d+", name)
    words = {part.lower() for part in parts}
    return words | {"id" for word in words if word.endswith(("id", "ids")) and len(word) <= 8}


def facts_of(sample: Sample) -> list[Facts]:
    """Return the facts of each column, in order."""
    decimal = sample.form.decimal
    return [_facts(name, cells, decimal) for name, cells in sample.columns.items()]


def _facts(name: str, cells: Sequence[Value], decimal: str) -> Facts:
    # A value that differs from itself is NaN.
    has_value = [cell is not None and cell == cell for cell in cells]
    present = list(compress(cells, has_value))
    kind, values = _kind(present, decimal)
    if kind in ("list", "numbers"):
        counts = Counter(item for value in values for item in value if item is not None)
    elif kind == "object":
        counts = Counter()
    else:
        counts = Counter(values)
    missing = len(cells) - len(present)
    facts = Facts(name=name, kind=kind, values=values, missing=missing, counts=counts, present=has_value)
    if (form := _time_format(facts)) is not None:
        return replace(facts, kind="time", time=form)
    return _with_lists(facts) if kind == "text" else facts


def _with_lists(facts: Facts) -> Facts:
    """Return the facts of a column of text as those of a column of lists, if its texts hold lists."""
    lists = find_lists(facts.values)
    if lists is None:
        return facts
    items = {text: lists.items(text) for text in facts.counts}
    values = [items[text] for text in facts.values]
    counts = Counter(item for value in values for item in value if item)
    kind: Kind = "numbers" if counts and are_fractions(set(counts)) else "list"
    return replace(facts, kind=kind, values=values, counts=counts, lists=lists)


def _kind(present: Sequence[Value], decimal: str) -> tuple[Kind, Sequence[Value]]:
    """Return what kind of values the cells are, and the values."""
    if not present:
        return "empty", present
    if all(isinstance(cell, bool) for cell in present):
        return "boolean", present
    if all(isinstance(cell, (int, float, Decimal)) and not isinstance(cell, bool) for cell in present):
        whole = all(isinstance(cell, int) for cell in present)
        return "integer" if whole else "number", present if whole else [float(cell) for cell in present]
    if all(isinstance(cell, (datetime, date)) for cell in present):
        return "time", present
    if all(isinstance(cell, list) for cell in present):
        items = [item for cell in present for item in cell if item is not None]
        if not all(isinstance(item, str) for item in items) and not all(
            isinstance(item, (int, float)) for item in items
        ):
            return "object", present
        fractions = any(isinstance(item, float) and not item.is_integer() for item in items)
        return "numbers" if fractions else "list", present
    if all(isinstance(cell, str) for cell in present):
        if not all(is_number(cell, decimal) for cell in present):
            return "text", present
        if all(cell.lstrip("+-").isdigit() for cell in present):
            return "integer", [int(cell) for cell in present]
        return "number", [float(cell.replace(decimal, ".")) for cell in present]
    return "object", present


def _time_format(facts: Facts) -> str | None:
    """Return the format of times in text or whole numbers; None if they are not times."""
    if facts.kind == "text":
        values = list(facts.counts)[:_VALUES_PARSED]
        if all(_is_iso(value) for value in values):
            return "iso"
        return next((form for form in _TIME_FORMATS if _all_parse(values, form)), None)
    if facts.kind != "integer":
        return None
    sorted_unique = facts.distinct > len(facts.values) / 2 and list(facts.values) == sorted(facts.values)
    if not (facts.words & _TIME_WORDS or sorted_unique):
        return None
    values = [str(value) for value in list(facts.counts)[:_VALUES_PARSED]]
    lengths = {len(value) for value in values}
    if len(lengths) == 1 and facts.words & _TIME_WORDS:
        for form in _TIME_DIGITS.get(lengths.pop(), ()):
            if _all_parse(values, form):
                return form
    for name, scale in _UNIX.items():
        if all(_UNIX_RANGE[0] <= value / scale <= _UNIX_RANGE[1] for value in facts.counts):
            return name
    return None


def _is_iso(value: str) -> bool:
    # fromisoformat also takes 20240101, which may be an id.
    if not _ISO.fullmatch(value):
        return False
    try:
        datetime.fromisoformat(value)
    except ValueError:
        return False
    return True


def _all_parse(values: Iterable[str], form: str) -> bool:
    try:
        return all(_YEARS[0] <= datetime.strptime(value, form).year <= _YEARS[1] for value in values)
    except ValueError:
        return False


def in_order(time: Facts) -> list[Any]:
    """Return the values of a column of times in a form that sorts by time."""
    form = time.time or ""
    # Other forms begin with the year.
    if form.startswith(("%d", "%m")):
        parsed = {value: datetime.strptime(value, form) for value in time.counts}
        return [parsed[value] for value in time.values]
    return list(time.values)


def choose(facts: Facts, sample: Sample, leak: str | None) -> Choice:
    """Return the role of a column that is not the label.

    Args:
        facts: of the column.
        sample: the log.
        leak: how the column gives the label away, if it does.
    """
    if not facts.name:
        return Choice(settings={"role": "leave"}, reason="a column without a name, such as the index of a data frame")
    if facts.kind == "empty" or (facts.kind == "list" and not facts.distinct):
        return Choice(settings={"role": "leave"}, reason="no values in the sample")
    if facts.distinct == 1 and sample.whole and not facts.missing:
        return Choice(settings={"role": "leave"}, reason="the same value in every row")
    if facts.kind == "object":
        return Choice(settings={"role": "leave"}, reason="values of several kinds, or objects with keys")
    if leak is not None:
        return Choice(settings={"role": "leave"}, reason=f"it {leak}, so it is probably known only afterwards")
    if facts.kind == "time":
        time = {} if facts.time is None else {"time": facts.time}
        return Choice(settings={"role": "keep", **time}, reason="a time")
    if facts.kind == "list":
        return _choose_lists(facts, sample)
    if facts.kind == "numbers":
        return Choice(
            settings={"role": "leave"}, reason="lists of numbers; they can be `weights` of a list of categories"
        )
    # Integers beside missing values become 3.0 in a data frame.
    whole = facts.kind == "number" and all(value.is_integer() for value in facts.values)
    if facts.kind == "integer" or (whole and facts.words & _ID_WORDS):
        return _choose_integer(facts, sample)
    if facts.kind == "number":
        return _numbers(facts, "numbers with fractions")
    if facts.kind == "text":
        return _choose_text(facts, sample)
    return _categories(facts, sample, {"role": "categorical"}, "true and false")


def _choose_integer(facts: Facts, sample: Sample) -> Choice:
    ids, quantity = facts.words & _ID_WORDS, facts.words & _QUANTITY_WORDS
    if facts.is_unique and (ids or not quantity):
        return Choice(settings={"role": "leave"}, reason="a different number in nearly every row, such as a row id")
    if quantity and not ids and facts.distinct > 2 and max(map(abs, facts.values)) < _LARGEST_EXACT:
        return _numbers(facts, f"whole numbers, and the word `{min(quantity)}` in the name suggests an amount")
    if ids or facts.distinct <= _FEW:
        named = f"whole numbers, and the word `{min(ids)}` in the name suggests a category" if ids else ""
        reason = named or "few different whole numbers"
        return _categories(facts, sample, {"role": "categorical"}, reason)
    reason = "many whole numbers, assumed to be ids (if they are amounts: {role: dense, transform: log1p})"
    return _categories(facts, sample, {"role": "categorical"}, reason)


def _choose_lists(facts: Facts, sample: Sample) -> Choice:
    if facts.lists is None:
        return _categories(facts, sample, {"role": "multi_hot"}, "lists of categories")
    settings: dict[str, Any] = {"role": "multi_hot", "separator": facts.lists.separator}
    settings |= {"brackets": True} if facts.lists.brackets else {}
    form = "lists in brackets" if facts.lists.brackets else "text"
    return _categories(facts, sample, settings, f"{form} with several values between {facts.lists.separator!r}")


def _choose_text(facts: Facts, sample: Sample) -> Choice:
    if formatted := formatted_number(facts):
        reason = f"numbers with other characters, such as {formatted!r}; to use them as numbers, write plain ones"
        if not facts.is_unique:
            return _categories(facts, sample, {"role": "categorical"}, reason)
        return Choice(settings={"role": "leave"}, reason=reason)
    if facts.is_unique:
        return Choice(settings={"role": "leave"}, reason="a different text in nearly every row, such as a row id")
    if sum(map(len, facts.counts)) > _LONG_TEXT * facts.distinct:
        return Choice(settings={"role": "leave"}, reason="long text")
    words = Counter(word for value in facts.counts for word in str(value).split(" "))
    recur = words.total() > 2 * len(words) and len(words) < facts.distinct
    hint = " (if spaces separate several values: {role: multi_hot, separator: ' '})" if recur else ""
    return _categories(facts, sample, {"role": "categorical"}, f"text{hint}")


def formatted_number(facts: Facts) -> str | None:
    """Return a number with other characters, such as ``$9.56``, if all values of a column of text are numbers."""
    formatted = [value for value in facts.counts if is_formatted_number(value)] if facts.kind == "text" else []
    rest = facts.counts.keys() - set(formatted)
    return str(formatted[0]) if formatted and all(map(is_number, rest)) else None


def _categories(facts: Facts, sample: Sample, settings: dict[str, Any], reason: str) -> Choice:
    """Return a column of categories, with a threshold if it has many."""
    if facts.distinct > min(_MANY, _MANY_SHARE * sample.rows):
        settings = {**settings, "min_count": 10 if sample.estimated_rows >= _LARGE_LOG else 2}
        reason += "; rare values share a row"
    return Choice(settings=settings, reason=reason)


def _numbers(facts: Facts, reason: str) -> Choice:
    """Return a column of numbers, with a transform by their range and skew."""
    ordered = sorted(facts.values)
    least, low, median, high, top, most = (
        ordered[round(share * (len(ordered) - 1))] for share in (0, 0.25, 0.5, 0.75, 0.99, 1)
    )
    if least >= -1 and most <= 1:
        return Choice(settings={"role": "dense"}, reason=reason)
    transform = "standard"
    if least >= 0 and top > 10 * median:
        transform = "log1p"
        reason += "; log1p, because the largest 1% are more than 10 times the median"
    elif least < 0 and max(-least, most) > 100 * max(high - low, 1e-9):
        transform = "signed_log"
        reason += "; signed_log, because some are far larger than most"
    return Choice(settings={"role": "dense", "transform": transform}, reason=reason)


def missing_words(facts: Facts) -> list[str]:
    """Return texts of a column that may mean a missing value, and that are read as values."""
    if facts.kind == "text":
        found = [value for value in facts.counts if value.lower() in _MISSING_WORDS]
        return found if len(found) < facts.distinct else []
    if facts.lists is None:
        return []
    return sorted({value[0] for value in facts.values if len(value) == 1 and value[0].lower() in _MISSING_WORDS})


def examples(column: Facts) -> str:
    """Return the most frequent values of a column, with their shares unless all values are rare."""
    total = sum(column.counts.values())
    common = column.counts.most_common(_EXAMPLES)
    if not common:
        return "no values"
    if common[0][1] < 0.01 * total:
        return "such as " + ", ".join(shortened(value) for value, _ in common)
    return ", ".join(f"{shortened(value)} ({count / total:.1%})" for value, count in common)


def shortened(value: Value) -> str:
    """Return a value as text that fits in a line with others between commas."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    if not text or "," in text or text != text.strip():
        text = repr(text)
    return text if len(text) <= _EXAMPLE_LENGTH else text[: _EXAMPLE_LENGTH - 3] + "..."
