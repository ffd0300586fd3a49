"""Columns of a click log -> times, kept values, and keys by which rows are split in the order of time."""

import datetime
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datamodules.values import BadValueError, bad_column, numbers, ordered_bits, shown, texts, whole

_MICROSECONDS, _YEARS = {"unix": 1_000_000, "unix_ms": 1_000}, (1900, 2200)
_MOMENTS = [np.datetime64(str(year), "us").astype(np.int64) for year in _YEARS]  # of numbers that can be times
_LIKELY = {"unix": (6e8, 4e9), "unix_ms": (6e11, 4e12)}
"""Numbers that are likely times of a form: the years 1989 to 2096."""


def times(name: str, column: pa.ChunkedArray, form: str | None) -> pa.TimestampArray:
    """Return times in microseconds, null where one is missing.

    Args:
        name: of the column, for messages.
        column: times, dates, numbers or texts.
        form: ``LogColumn.time``.

    Raises:
        BadValueError: a value is not a time of that form, or a number means a year outside 1900 to 2200.
    """
    kind = pa.timestamp("us")
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        exact = getattr(column.type, "unit", None) != "ns"
        return whole(column.cast(pa.timestamp("us", getattr(column.type, "tz", None)), safe=exact)).cast(kind)
    if form is not None and form in _MICROSECONDS:
        return _of_numbers(name, column, form)
    encoded = texts(column)
    if form is None or form == "iso":
        values = pa.array([_iso(text) for text in encoded.dictionary.to_pylist()], kind)
    else:
        values = pc.strptime(encoded.dictionary, form, "us", error_is_null=True)
    found = values.take(encoded.indices)
    if found.null_count > encoded.null_count:
        expected = "an ISO time such as 2024-05-01 12:00:00" if form in (None, "iso") else f"a time as {form!r}"
        all_wrong = found.null_count == len(found)
        raise BadValueError(
            pc.and_(found.is_null(), encoded.is_valid()),
            lambda row: (
                f"{name} is {shown(encoded[row].as_py())}, expected {expected}; "
                f"{_remedy(encoded[row].as_py(), all_wrong)}"
            ),
        )
    return found


def _of_numbers(name: str, column: pa.ChunkedArray, form: str) -> pa.TimestampArray:
    """Return the times of numbers, as ``times`` does."""
    unit, other = ("seconds", "unix_ms") if form == "unix" else ("milliseconds", "unix")
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    try:
        seconds = numbers(name, column).to_numpy(zero_copy_only=False)
    except BadValueError as error:
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise
        encoded = texts(column)
        all_wrong = len(error.rows) == len(column) - encoded.null_count
        raise BadValueError(
            np.isin(np.arange(len(column)), error.rows),
            lambda row: (
                f"{name} is {shown(encoded[row].as_py())}, expected {unit} since 1970, because its time is {form}; "
                f"{_remedy(encoded[row].as_py(), all_wrong)}"
            ),
        ) from error
    moments = np.nan_to_num(seconds) * _MICROSECONDS[form]
    wrong = (moments < _MOMENTS[0]) | (moments >= _MOMENTS[1])
    if wrong.any():
        remedy = (
            f"try {other}, or correct the line" if wrong.sum() == np.isfinite(seconds).sum() else "correct the line"
        )
        raise BadValueError(
            wrong,
            lambda row: (
                f"{name} is {seconds[row]:.15g}, which is not in the years {_YEARS[0]} to {_YEARS[1]} as time "
                f"{form}; {remedy}"
            ),
        )
    micros = np.round(moments).astype(np.int64)
    return pa.array(micros, mask=np.isnan(seconds)).cast(pa.timestamp("us"))


def _remedy(text: str, all_wrong: bool) -> str:
    """Return what to do with a value that does not have the form of times that the schema gives, as no value has it if
    ``all_wrong``."""
    if not all_wrong:
        return "correct the line"
    found = _form_of(text)
    if found is not None:
        return f"set 'time: {found}' for this column in the schema, which this value has, or correct the line"
    return "set time for this column in the schema to the format of its times, such as '%d.%m.%Y', or correct the line"


def _form_of(text: str) -> str | None:
    """Return the ``time`` that a value likely has; None if it is not clear."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        number = float(text)
        return next((form for form, (least, most) in _LIKELY.items() if least <= number < most), None)
    return None if _iso(text) is None else "iso"


def kept(name: str, column: pa.ChunkedArray, form: str | None) -> pa.Array:
    """Return values of a kept column in a type of ``KEPT_TYPES``; texts as a dictionary, and only nulls as they are.

    Raises:
        BadValueError: see ``times``.
    """
    kind = column.type
    if form is not None or pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return times(name, column, form)
    if pa.types.is_boolean(kind) or pa.types.is_null(kind):
        return whole(column)
    if pa.types.is_integer(kind) and not pa.types.is_uint64(kind):
        return whole(column).cast(pa.int64())
    if pa.types.is_floating(kind):
        return whole(column).cast(pa.float64())
    return texts(column)


def split_keys(name: str, column: pa.ChunkedArray, form: str | None) -> np.ndarray:
    """Return int64 [n] in the order of times.

    Args:
        name: of the column, for messages.
        column: times, or numbers that are in the order of time.
        form: ``LogColumn.time``.

    Raises:
        BadValueError: a time is missing or has another form, or text is found and no form given.
    """
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if form is None and (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        found: pa.Array = numbers(name, column)
        keys = ordered_bits(found.to_numpy(zero_copy_only=False))
    elif form is None and not (pa.types.is_timestamp(kind) or pa.types.is_date(kind)):
        first = next((text for text in texts(column).dictionary.to_pylist() if text), "")
        raise bad_column(
            column,
            f"{name} is text, such as {shown(first)}, which a split by time cannot order; set in the schema how it "
            f"becomes a time: columns: {name}: {{role: leave, time: {_form_of(first) or '...'}}}",
        )
    else:
        found = times(name, column, form)
        keys = found.cast(pa.int64()).fill_null(0).to_numpy()
    if found.null_count:
        fault = f"{name} is missing, expected a time in every row to split by; remove the row"
        raise BadValueError(found.is_null(), lambda row: fault)
    return keys


def _iso(text: str) -> datetime.datetime | None:
    try:
        time = datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
    return time if time.tzinfo is None else time.astimezone(datetime.UTC).replace(tzinfo=None)
