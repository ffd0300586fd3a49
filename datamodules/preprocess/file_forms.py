"""The format of a log's file by its content, and errors if its content is not what the schema says."""

import json
from collections.abc import Mapping
from pathlib import Path

from datamodules.log_schema import Format, LogSchema, if_criteo, seem_values
from datamodules.preprocess.dialect import SEPARATORS, fields_of
from datamodules.preprocess.sources import RawFile
from lightning_dlrm.contracts.errors import UserError, require

_PARQUET = b"PAR1"
_SUFFIXES: Mapping[str, Format] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
_WORDS: Mapping[Format, str] = {
    "csv": "text of separated fields",
    "jsonl": "text of JSON objects",
    "parquet": "a Parquet file",
}


def is_parquet(source: RawFile) -> bool:
    return source.read(0, len(_PARQUET)) == _PARQUET


def format_of(source: RawFile, schema: LogSchema, start: bytes | None, is_new: bool) -> Format:
    """Return the format of a file.

    Args:
        source: the file.
        schema: of the log.
        start: the beginning of its text; None of a Parquet file.
        is_new: whether a new dataset is made; new rows for a dataset may have another format than it.

    Raises:
        UserError: the schema, or the name of the file, says that it has another format.
    """
    given = schema.format if is_new and schema.format != "criteo" else None
    stem = Path(source.name)
    stem = stem.with_suffix("") if stem.suffix in (".gz", ".zst") else stem
    named = given or _SUFFIXES.get(stem.suffix, schema.format or "csv")
    found: Format = "parquet" if start is None else _format_of_text(start, named)
    require(
        given in (None, found),
        f"{source.path} is {_WORDS[found]}, and the schema has 'format: {given}': set 'format: {found}'",
    )
    require(
        found == "parquet" or given is not None or stem.suffix not in (".parquet", ".pq"),
        f"{source.path} is {_WORDS[found]}, not the Parquet file that its name says: rename it",
    )
    return found


def _format_of_text(start: bytes, named: Format) -> Format:
    """Return the format of a text by its first line, which may be damaged if the schema or the name says JSON lines."""
    line = start.lstrip(b"\xef\xbb\xbf \t\r\n").partition(b"\n")[0].strip()
    if line.startswith(b"{"):
        try:
            json.loads(line)
            return "jsonl"
        except (ValueError, RecursionError):
            pass
    damaged = line[:1] in (b"{", b"[") or not any(one.encode() in line for one in SEPARATORS)
    return "jsonl" if named == "jsonl" and damaged else "csv"


def check_separator(path: str, line: str, schema: LogSchema, separator: str, is_new: bool) -> None:
    """Check that no other separator splits the first line of a file better than the schema's.

    Args:
        path: of the file.
        line: the header, or the first row if the schema has ``names``.
        schema: of the log.
        separator: of the schema.
        is_new: whether a new dataset is made, so that the schema can be changed.

    Raises:
        UserError: another separator does.
    """
    splits = {one: _fields(line, one, schema.quote) for one in (separator, *SEPARATORS)}

    def fit(one: str) -> int:
        """Return how many columns of the schema the fields are; of a row, whether it has as many fields."""
        fields = splits[one]
        return len(fields) == len(schema.names) if schema.names else len(set(fields) & set(schema.sources(fields)))

    other = max(splits, key=lambda one: (fit(one), len(splits[one])))
    is_one_field = not schema.names and len(splits[separator]) == 1 < len(splits[other])
    if fit(other) == fit(separator) and (fit(other) or not is_one_field):
        return
    fields = splits[other]
    require(
        schema.names or not seem_values(fields),
        f"{path} has no header: its first line looks like {len(fields)} values between {other!r}; set separator in "
        f"the schema, and give the columns as names: [...]{if_criteo(fields)}",
    )
    whose = "the schema's separator is" if schema.separator else "the schema names no separator, which means"
    remedy = f"set 'separator: {json.dumps(other)}' in the schema" if is_new else f"write the file with {separator!r}"
    raise UserError(f"{path}: its first line has {other!r} between fields, and {whose} {separator!r}: {remedy}")


def _fields(line: str, separator: str, quote: str | None) -> list[str]:
    try:
        return next((row for _, row in fields_of(line, separator, quote)), [])
    except UserError:
        return []
