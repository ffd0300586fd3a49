"""Columns of a click log -> labels, numbers, categories and bags, as the schema of the log says.

Each function takes an Arrow column as a reader made it, of any type, and names the first row with a value that it does
not take. Nothing here imports torch.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datamodules.log_schema import Label
from datamodules.log_settings import value_text
from lightning_dlrm.contracts.errors import one_line

_OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
BOOLEANS: Mapping[str, int] = {"0": 0, "1": 1, "false": 0, "true": 1, "0.0": 0, "1.0": 1}
"""Labels without a condition."""
YES = ("yes", "true", "y", "t", "ja", "oui", "si", "click", "clicked")
"""Texts that likely mean a click, for proposed conditions."""
_SHOWN = 5
_NUMBER = "a number; correct the line, list texts of missing values under nulls, or give the column another role"
_LARGEST = np.finfo(np.float32).max  # dense values are stored as float32


class BadValueError(Exception):
    """Values that a column does not take.

    Args:
        bad: bool [n], whether the value of each row is one.
        fault: returns what is wrong with the value of a row, and what to do.
    """

    def __init__(self, bad: np.ndarray | pa.BooleanArray, fault: Callable[[int], str]):
        self.rows = np.flatnonzero(bad)
        """Their rows, from 0."""
        self.fault = fault
        super().__init__(fault(int(self.rows[0])) if len(self.rows) else "")


def texts(column: pa.ChunkedArray) -> pa.DictionaryArray:
    """Return values as the texts that they have as categories: ``5`` of 5 and 5.0, ``true``, ``x``.

    Returns:
        Codes into a dictionary of strings, which may hold equal ones; null where a value is missing or NaN.
    """
    if pa.types.is_dictionary(column.type):
        encoded = column.unify_dictionaries().combine_chunks()
    else:
        encoded = column.dictionary_encode().combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.chunk(0) if encoded.num_chunks else pa.array([], pa.string()).dictionary_encode()
    values = encoded.dictionary
    if pa.types.is_floating(values.type):
        named = pa.array([None if value != value else value_text(value) for value in values.to_pylist()], pa.string())
    else:
        named = values.cast(pa.string())
    if named.null_count:
        whole = named.take(encoded.indices).dictionary_encode()
        return pa.DictionaryArray.from_arrays(whole.indices, whole.dictionary)
    return pa.DictionaryArray.from_arrays(encoded.indices.cast(pa.int32()), named)


def without_nulls(column: pa.ChunkedArray, nulls: Sequence[str]) -> pa.ChunkedArray:
    """Return a column without texts that mean a missing value; columns of other types are returned as they are."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not nulls or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return column
    plain = column.cast(kind)
    is_null = pc.is_in(plain, value_set=pa.array(nulls, kind))
    return pc.if_else(is_null, pa.scalar(None, kind), plain) if pc.any(is_null).as_py() else column


def check_single(name: str, column: pa.ChunkedArray) -> None:
    """Check that a column holds single values.

    Raises:
        BadValueError: it holds lists or objects.
    """
    is_extension = isinstance(column.type, pa.BaseExtensionType)
    if pa.types.is_nested(column.type) or is_extension:
        is_object = is_extension or pa.types.is_struct(column.type)
        what, remedy = ("objects", "give it the role leave") if is_object else ("lists", "give it the role multi_hot")
        raise bad_column(column, f"{name} holds {what} ({column.type}), expected single values; {remedy}")


def numbers(name: str, column: pa.ChunkedArray, decimal: str = ".") -> pa.DoubleArray:
    """Return numbers float64, null where a value is missing or NaN.

    Args:
        name: of the column, for messages.
        column: numbers, or texts of numbers.
        decimal: the decimal point of texts.

    Raises:
        BadValueError: a text is not a number, or a number is infinite or beyond float32.
    """
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        encoded = texts(column)
        values = _numbers(encoded.dictionary, decimal)
        found = values.take(encoded.indices)
        if found.null_count > encoded.null_count:
            raise BadValueError(
                pc.and_(found.is_null(), encoded.is_valid()),
                lambda row: f"{name} is {shown(encoded[row].as_py())}, expected {_NUMBER}",
            )
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind):
        found = whole(column if kind == column.type else column.cast(kind)).cast(pa.float64(), safe=False)
    elif pa.types.is_decimal(kind):
        found = whole(column).cast(pa.float64())
    else:
        raise bad_column(column, f"{name} has the type {kind}, expected numbers; give the column another role")
    array = found.to_numpy(zero_copy_only=False)
    too_large = np.abs(array) > _LARGEST
    if too_large.any():
        raise BadValueError(
            too_large, lambda row: f"{name} is {array[row]}, expected a number of at most 3.4e38; correct the line"
        )
    return pa.array(array, from_pandas=True)


def labels(label: Label, column: pa.ChunkedArray, decimal: str = ".") -> np.ndarray:
    """Return labels int8 [n].

    Args:
        label: the label.
        column: its column.
        decimal: of numbers that are texts.

    Raises:
        BadValueError: a label is missing, or is not one of two values.
    """
    encoded = texts(column)
    if encoded.null_count:
        fault = f"the label {label.column} is missing, expected a value in every row; remove the row"
        raise BadValueError(encoded.is_null(), lambda row: fault)
    values = encoded.dictionary.to_pylist()
    judged = np.array([-1 if (one := label_of(label, value, decimal)) is None else one for value in values], np.int8)
    found = judged[encoded.indices.to_numpy()] if len(values) else np.empty(0, np.int8)
    if (found < 0).any():
        raise BadValueError(found < 0, _fault_of_label(label, encoded, values, decimal))
    return found


def _fault_of_label(
    label: Label, encoded: pa.DictionaryArray, values: Sequence[str], decimal: str
) -> Callable[[int], str]:
    """Return a function that describes the fault of a row's label, given the values of its column."""
    yes = next((one for one in values if one.lower() in YES), None)
    numbers_seen = sorted(number for one in values if (number := _number(one, decimal)) is not None)

    def fault(row: int) -> str:
        value = encoded[row].as_py()
        others = [one for one in values[: _SHOWN + 1] if one != value][:_SHOWN]
        seen = f" (beside {', '.join(map(shown, others))})" if others else ""
        if label.operator is not None:
            expected = f"expected a number, as the label is {label.column} {label.operator} {label.value}"
        else:
            condition = f"'{label.column} == {value if yes is None else yes}'"
            if _number(value, decimal) is not None:
                condition = f"'{label.column} >= {numbers_seen[len(numbers_seen) // 2]:g}'"
            expected = (
                f"expected 0 and 1, or false and true; correct the line, or give a condition such as label: {condition}"
            )
        return f"the label {label.column} is {shown(value)}{seen}, {expected}"

    return fault


def label_of(label: Label, text: str, decimal: str = ".") -> int | None:
    """Return the label, 0 or 1, of a row by the text of its value; None if it cannot be judged, as NaN cannot by a
    number."""
    if label.operator is None:
        return BOOLEANS.get(text.lower())
    left, right = _number(text, decimal), _number(label.value)
    if left is not None and right is not None and not math.isnan(right):
        return None if math.isnan(left) else int(_OPERATORS[label.operator](left, right))
    return int(_OPERATORS[label.operator](text, label.value)) if label.operator in ("==", "!=") else None


def bags(
    name: str, column: pa.ChunkedArray, separator: str | None, brackets: bool = False
) -> tuple[pa.ListArray, np.ndarray]:
    """Return bags of texts, and which items of the column they have.

    Null and empty bags are empty; null and empty items are left out.

    Args:
        name: of the column, for messages.
        column: lists, or texts.
        separator: between the items of a text; None for lists.
        brackets: whether texts stand in brackets.

    Returns:
        list<dictionary<string>> [n], no nulls; bool [items].

    Raises:
        BadValueError: lists are expected and texts found, or the other way round.
    """
    lists = _lists(name, column, separator, brackets)
    items = texts(pa.chunked_array([lists.flatten()]))
    empty = pc.equal(items.dictionary, "").take(items.indices).fill_null(True)
    keep = ~empty.to_numpy(zero_copy_only=False)
    ends = np.cumsum(pc.fill_null(pc.list_value_length(lists), 0).to_numpy())
    kept_ends = np.append(0, np.cumsum(keep))[np.append(0, ends)]
    return pa.ListArray.from_arrays(pa.array(kept_ends.astype(np.int32)), items.filter(pa.array(keep))), keep


def weights(
    name: str,
    column: pa.ChunkedArray,
    separator: str | None,
    bag: pa.ChunkedArray,
    keep: np.ndarray,
    brackets: bool = False,
) -> pa.ListArray:
    """Return the weights of the items of bags: list<double> [n].

    Args:
        name: of the column of weights, for messages.
        column: lists or texts of numbers.
        separator: as of the bags.
        bag: the column of bags.
        keep: which items the bags have, as ``bags`` returns it.
        brackets: as of the bags.

    Raises:
        BadValueError: a bag has another number of weights than items, or a weight is missing or not a number.
    """
    lists, of_bag = (_lists(name, one, separator, brackets) for one in (column, bag))
    lengths = [pc.fill_null(pc.list_value_length(one), 0).to_numpy() for one in (lists, of_bag)]
    if (different := lengths[0] != lengths[1]).any():
        raise BadValueError(
            different,
            lambda row: f"{name} has {lengths[0][row]} weights for {lengths[1][row]} items; give each item one",
        )
    ends, items = np.cumsum(lengths[0]), lists.flatten()
    try:
        values = numbers(name, pa.chunked_array([items])) if len(items) else pa.array([], pa.float64())
        missing = values.is_null().to_numpy(zero_copy_only=False) & keep
        if missing.any():
            raise BadValueError(missing, lambda item: f"{name} lacks a weight; give each item a number")
    except BadValueError as error:
        wrong, first = np.unique(np.searchsorted(ends, error.rows, side="right"), return_index=True)
        faults = dict(zip(wrong.tolist(), error.rows[first].tolist(), strict=True))
        fault = error.fault
        raise BadValueError(np.isin(np.arange(len(ends)), wrong), lambda row: fault(faults[row])) from error
    kept_ends = np.append(0, np.cumsum(keep))[np.append(0, ends)]
    return pa.ListArray.from_arrays(pa.array(kept_ends.astype(np.int32)), values.filter(pa.array(keep)))


def split_codes(
    name: str, column: pa.ChunkedArray, values: Mapping[str, Sequence[str]], splits: Sequence[str]
) -> np.ndarray:
    """Return int8 [n]: the position in ``splits`` of each row's split, -1 for rows that are left out.

    Raises:
        BadValueError: a value belongs to no split.
    """
    code_of = {text: splits.index(split) if split in splits else -1 for split, some in values.items() for text in some}
    encoded = texts(column)
    codes = np.array([code_of.get(text, -2) for text in (*encoded.dictionary.to_pylist(), "")], np.int8)
    codes[-1] = code_of.get("", -2)
    found = codes[encoded.indices.fill_null(len(encoded.dictionary)).to_numpy()]
    if (found == -2).any():
        raise BadValueError(
            found == -2,
            lambda row: (
                f"{name} is {shown(encoded[row].as_py())}, which belongs to no split; name it under train, "
                "validation, test or leave"
            ),
        )
    return found


def ordered_bits(values: np.ndarray) -> np.ndarray:
    """Return int64 [n] in the order of float64 [n]."""
    bits = (values + 0.0).view(np.int64)  # -0.0 becomes 0.0
    return bits ^ ((bits >> 63) & np.int64(0x7FFFFFFFFFFFFFFF))


def from_ordered_bits(bits: np.ndarray) -> np.ndarray:
    """Return the float64 [n] of ``ordered_bits``."""
    return (bits ^ ((bits >> 63) & np.int64(0x7FFFFFFFFFFFFFFF))).view(np.float64)


def _lists(name: str, column: pa.ChunkedArray, separator: str | None, brackets: bool) -> pa.ListArray:
    kind = column.type
    if pa.types.is_null(kind):
        return pa.array([None] * len(column), pa.list_(pa.string()))
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if is_list and separator is None:
        return whole(column.cast(pa.list_(kind.value_type)))
    if is_list or separator is None:
        remedy = "leave separator out" if is_list else "give the separator of its items in the schema"
        raise bad_column(column, f"{name} holds {'lists' if is_list else 'single values'}; {remedy}")
    encoded = texts(column)
    if not brackets:
        return pc.split_pattern(encoded.dictionary, separator).take(encoded.indices)
    inside = pc.replace_substring_regex(encoded.dictionary, r"^\s*[\[({]\s*|\s*[\])}]\s*$", "")
    split = pc.split_pattern(inside, separator)
    items = pc.utf8_trim(split.values, " '\"")
    return pa.ListArray.from_arrays(split.offsets, items).take(encoded.indices)


def whole(column: pa.ChunkedArray) -> pa.Array:
    """Return a column in one piece."""
    found = column.combine_chunks()
    if isinstance(found, pa.ChunkedArray):
        return found.chunk(0) if found.num_chunks else pa.array([], column.type)
    return found


def bad_column(column: pa.ChunkedArray, fault: str) -> BadValueError:
    """Return the error of a column whose values are all of a wrong type."""
    return BadValueError(np.ones(len(column), bool), lambda row: fault)


def _numbers(texts: pa.StringArray, decimal: str) -> pa.DoubleArray:
    """Return numbers, null for texts that are none."""
    if decimal == ".":
        try:
            return texts.cast(pa.float64())
        except pa.ArrowInvalid:
            pass
    return pa.array([_number(text, decimal) for text in texts.to_pylist()], pa.float64())


def _number(text: str, decimal: str = ".") -> float | None:
    try:
        # Python also takes underscores between digits.
        return None if "_" in text else float(text if decimal == "." else text.replace(".", "x").replace(decimal, "."))
    except ValueError:
        return None


def shown(value: Any) -> str:
    text = one_line(ValueError(repr(value)))
    return text if len(text) <= 42 else f"{text[:40]}...'"


def staged_name(kind: str, name: str) -> str:
    """Return the name of a column of a log in segments, which hold some columns in several forms."""
    return f"{kind}/{name}"
