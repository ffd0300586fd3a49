"""Types of the values of JSON lines, faults of lines, and keys that only later lines have."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa

from datamodules.preprocess.sources import RawFile
from lightning_dlrm.contracts.errors import one_line

_READ_AT_ONCE = 1 << 20

JSON_TYPES: Mapping[str, pa.DataType] = {
    "text": pa.string(),
    "int": pa.int64(),
    "long": pa.decimal128(38, 0),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "texts": pa.list_(pa.string()),
    "ints": pa.list_(pa.int64()),
    "longs": pa.list_(pa.decimal128(38, 0)),
    "floats": pa.list_(pa.float64()),
    "bools": pa.list_(pa.bool_()),
}
"""``long`` are integers of which some need more than 64 bits with a sign, as hashes do."""
_WORDS: Mapping[str, str] = {
    "text": "text",
    "int": "whole numbers",
    "long": "whole numbers of more than 64 bits",
    "float": "numbers with fractions",
    "bool": "true or false",
    "texts": "lists of text",
    "ints": "lists of whole numbers",
    "longs": "lists of whole numbers of more than 64 bits",
    "floats": "lists of numbers with fractions",
    "bools": "lists of true or false",
}
_FITTING = {
    ("int", "long"),
    ("int", "float"),
    ("long", "float"),
    ("ints", "longs"),
    ("ints", "floats"),
    ("longs", "floats"),
}
"""Types of a value that are read as the type of earlier ones."""
_REMEDY = "correct or remove the line"
SET_ENCODING = "set encoding in the schema, such as latin-1"


def json_type(found: Sequence[Any]) -> str | None:
    """Return the common type of JSON values, None if they are all null or not of one type."""
    kinds = {type(value) for value in found if value is not None}
    if kinds == {list}:
        inner = json_type([item for value in found if value for item in value])
        return f"{inner}s" if f"{inner}s" in JSON_TYPES else None
    for kind, name in ((str, "text"), (bool, "bool")):
        if kinds == {kind}:
            return name
    if kinds == {int}:
        largest = max(abs(value) for value in found if value is not None)
        return "int" if largest < 2**63 else "long" if largest < 10**38 else "float"
    return "float" if kinds and kinds <= {int, float} else None


def checked_object(
    line: bytes, kinds: dict[str, str], needed: Collection[str], known: Collection[str] | None
) -> dict[str, Any] | str:
    """Return the needed keys of the object of a line that is not empty, or what is wrong with it and what to do.

    Args:
        line: the line.
        kinds: the type of each needed key, a name of ``JSON_TYPES``, to which keys of good lines are added.
        needed: the keys that are read; the values of others may be anything.
        known: the keys that a line may have; None for any.
    """
    try:
        pairs = json.loads(line.decode(), object_pairs_hook=tuple)  # arrays are lists
    except UnicodeDecodeError as error:
        return not_utf8(line[error.start])
    except (ValueError, RecursionError) as error:
        remedy = lines_of_json(line) or f": {_REMEDY}"
        return f"not JSON ({one_line(error)}); expected one object in each line{remedy}"
    if not isinstance(pairs, tuple):
        remedy = lines_of_json(line) or f": {_REMEDY}"
        return f"not a JSON object; expected one, such as {{...}}, in each line{remedy}"
    row: dict[str, Any] = {}
    for name, value in pairs:
        if name in row:
            return f"the key {name} occurs twice; {_REMEDY}"
        if name in needed:
            row[name] = value
    found = {}
    for name, value in row.items():
        if kind := json_type([value]):
            found[name] = kind
        elif isinstance(value, tuple):
            return f"{name} holds an object, expected a value or a list; {_REMEDY}, or give it the role leave"
        elif isinstance(value, list) and any(item is not None for item in value):
            return f"{name} holds a list of objects, of lists or of several types, expected values of one; {_REMEDY}"
    for name, kind in found.items():
        earlier = kinds.get(name, kind)
        if kind != earlier and (kind, earlier) not in _FITTING:
            remedy = "quote the numbers" if "long" in kind else "write one of the two"
            return (
                f"{name} is {json.dumps(row[name])[:40]} ({_WORDS[kind]}), where earlier lines have {_WORDS[earlier]}; "
                f"{remedy} in every line"
            )
    if others := [name for name, _ in pairs if known is not None and name not in known]:
        return f"the key {others[0]} is not in the schema; name it, or set rest: leave"
    kinds |= {name: kind for name, kind in found.items() if name not in kinds}
    return row


def lines_of_json(line: bytes) -> str:
    """Return a remedy if a line is part of an array of objects, or of an object of several lines."""
    start = line.strip().replace(b" ", b"")
    if start == b"{":
        return ": make one line of each object, such as with jq -c ."
    return ": make lines of the array, such as with jq -c '.[]'" if start == b"[" or start[:2] == b"[{" else ""


def not_utf8(byte: int | None, remedy: str = SET_ENCODING) -> str:
    """Return the fault of text with a byte that is not UTF-8."""
    return f"the byte 0x{byte:02x} is not UTF-8; {remedy}"


def find_keys(source: RawFile, encoding: str | None, keys: Collection[str]) -> dict[str, Any]:
    """Find keys in the lines of a file, and return each found key with its first value that is not null.

    The file is read up to the line by which all are found.

    Args:
        source: the file.
        encoding: of the text; None for UTF-8.
        keys: to look for.

    Raises:
        UserError: the file cannot be read.
        ValueError: the file is truncated or corrupt, or has another encoding.
    """
    spelt = {key: {json.dumps(key, ensure_ascii=ascii).encode() for ascii in (True, False)} for key in keys}
    found: dict[str, Any] = {}
    rest = b""
    with source.text(encoding) as text:
        while chunk := text.read(_READ_AT_ONCE):
            lines, end, rest = (rest + chunk).rpartition(b"\n")
            if len(chunk) < _READ_AT_ONCE:
                lines, rest = lines + end + rest, b""
            wanted = {key: some for key, some in spelt.items() if found.get(key) is None}
            if not any(one in lines for some in wanted.values() for one in some):
                continue
            for line in lines.split(b"\n"):
                if any(one in line for some in wanted.values() for one in some):
                    found |= {key: value for key, value in _object(line).items() if key in wanted}
                    wanted = {key: some for key, some in wanted.items() if found.get(key) is None}
            if not wanted:
                break
    return found


def _object(line: bytes) -> dict[str, Any]:
    """Return the object of a line; an empty one of a line that is not JSON, which is found when it is read."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}
