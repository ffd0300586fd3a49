"""Types of the values of JSON lines, and keys that only later lines have."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa

from datamodules.preprocess.sources import RawFile

_READ_AT_ONCE = 1 << 20

JSON_TYPES: Mapping[str, pa.DataType] = {
    "text": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "texts": pa.list_(pa.string()),
    "ints": pa.list_(pa.int64()),
    "floats": pa.list_(pa.float64()),
}
JSON_WORDS: Mapping[str, str] = {
    "text": "text",
    "int": "numbers",
    "float": "numbers",
    "bool": "true or false",
    "texts": "lists of text",
    "ints": "lists of numbers",
    "floats": "lists of numbers",
}


def json_type(found: Sequence[Any]) -> str | None:
    """Return the common type of JSON values, None if they are all null or not of one type."""
    kinds = {type(value) for value in found if value is not None}
    if kinds == {list}:
        inner = json_type([item for value in found if value for item in value])
        return f"{inner}s" if inner in ("text", "int", "float") else None
    for kind, name in ((str, "text"), (bool, "bool"), (int, "int")):
        if kinds == {kind}:
            return name
    return "float" if kinds and kinds <= {int, float} else None


def find_keys(source: RawFile, encoding: str | None, keys: Collection[str]) -> dict[str, Any]:
    """Return those of some keys that lines of a file have, each with its first value that is not null.

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
