"""The form of a click log's files, from their beginnings, and the reader of each file."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from datamodules.log_schema import Format, LogSchema
from datamodules.preprocess.criteo_tsv import count_bytes
from datamodules.preprocess.log_reader import LogReader, is_utf8, json_type, open_parquet
from datamodules.preprocess.sources import RawFile
from lightning_dlrm.contracts.errors import UserError, one_line, require

_HEADER_BYTES = 1 << 20  # the longest header
_SAMPLED_LINES = 1000  # of JSON, for the types of columns
_BOM = b"\xef\xbb\xbf"
_PARQUET = b"PAR1"
_SUFFIXES: Mapping[str, Format] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}


def open_reader(source: RawFile, schema: LogSchema, is_new: bool = True) -> LogReader:
    """Return the reader of a file, from its beginning.

    Args:
        source: the file.
        schema: of the log.
        is_new: whether a dataset is made, which needs labels and splits; otherwise rows are encoded like those of
            another one.

    Raises:
        UserError: the file's columns are not those of the schema, or it cannot be read.
    """
    # New rows may have another form than those of the dataset.
    form = (schema.format if is_new else None) or _format_of(source, schema.format)
    if form == "parquet":
        with open_parquet(source.path) as file:
            names = tuple(file.schema_arrow.names)
            groups = tuple(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
        reader = LogReader(schema=schema, format=form, labelled=True, names=names, group_rows=groups)
    else:
        start = _start(source, schema.encoding)
        require(start.strip(), f"{source.path} is empty; give files with rows")
        reader = _json_reader(source, schema, start) if form == "jsonl" else _csv_reader(source, schema, start)
    twice = next((name for name in reader.names if reader.names.count(name) > 1), None)
    require(twice is None, f"{source.path}: {twice!r} stands twice in the header; rename one of the two columns")
    schema.check_columns(reader.names, source.path, labelled=is_new)
    return replace(reader, labelled=schema.label_in(reader.names).column in reader.names, splits=is_new)


def _format_of(source: RawFile, default: Format | None) -> Format:
    """Return the format of a file by its first bytes and its name."""
    if source.read(0, len(_PARQUET)) == _PARQUET:
        return "parquet"
    stem = Path(source.name)
    stem = stem.with_suffix("") if stem.suffix in (".gz", ".zst") else stem
    return _SUFFIXES.get(stem.suffix, default or "csv")


def _start(source: RawFile, encoding: str) -> bytes:
    """Return the beginning of a text file in UTF-8, and whole lines of it unless they are very long."""
    with source.text(None if is_utf8(encoding) else encoding) as text:
        try:
            start = text.read(_HEADER_BYTES)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{source.path}: {one_line(error)}; download the file again, or set encoding") from error
    return start if len(start) < _HEADER_BYTES else start[: start.rfind(b"\n") + 1] or start


def _csv_reader(source: RawFile, schema: LogSchema, start: bytes) -> LogReader:
    separator = schema.separator or ("\t" if ".tsv" in Path(source.name).suffixes else ",")
    bom = len(_BOM) if start.startswith(_BOM) else 0
    reader = LogReader(
        schema=schema, format="csv", labelled=True, names=schema.names, separator=separator, header_bytes=bom
    )
    if schema.names:
        return reader
    end = start.find(b"\n")
    try:
        start[bom : end if end >= 0 else None].decode()
    except UnicodeDecodeError as error:
        example = "utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin-1"
        raise UserError(
            f"{source.path}, line 1: the text is not UTF-8; set encoding in the schema, such as {example}"
        ) from error
    text = start[bom:].decode(errors="replace")
    first = text.partition("\n")[0].rstrip("\r")
    quote = reader.quote
    if quote is None:
        length = len(text.partition("\n")[0].encode()) + 1
        return replace(reader, names=tuple(first.split(separator)), header_bytes=bom + length, header_lines=1)
    header = io.StringIO(text, newline="")
    names = next(csv.reader(header, delimiter=separator, quotechar=quote.decode()))
    # A header may hold line ends in quotes.
    ends = reader.row_ends(start[bom:] if start.endswith(b"\n") else start[bom:] + b"\n")
    lines = start.count(b"\n", 0, bom + int(ends[0]))
    return replace(reader, names=tuple(names), header_bytes=bom + int(ends[0]), header_lines=lines)


def _json_reader(source: RawFile, schema: LogSchema, start: bytes) -> LogReader:
    found: dict[str, list[Any]] = {}
    reader = LogReader(schema=schema, format="jsonl", labelled=True, names=())
    for number, line in enumerate(start.removeprefix(_BOM).split(b"\n")[:_SAMPLED_LINES]):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            for name, value in row.items():
                found.setdefault(name, []).append(value)
        except (ValueError, AttributeError) as error:
            bad = reader.bad_json(line, one_line(error))
            raise UserError(f"{source.path}, line {number + 1:,}: {bad.fault}") from error
    numeric = {c.source or name for name, c in schema.columns.items() if c.role == "dense" or c.transform}
    types = {name: kind for name, some in found.items() if (kind := json_type(some))}
    types = {name: "float" if kind == "int" and name in numeric else kind for name, kind in types.items()}
    bom = len(_BOM) if start.startswith(_BOM) else 0
    return replace(reader, names=tuple(found), types=tuple(types.items()), header_bytes=bom)


def count_quotes(source: RawFile, reader: LogReader, piece_bytes: int) -> LogReader:
    """Return the reader of a plain file, which knows where quotes are open; see the top of this file."""
    if reader.quote is None or source.compression != "none" or reader.jobs(source, piece_bytes) == [(None, None)]:
        return reader
    quote, total, opened = ord(reader.quote), 0, [False]
    for start in range(0, source.size, piece_bytes):
        # A row may end at the last byte before the piece.
        text = source.read(max(start - 1, 0), min(start + piece_bytes, source.size) - 1)
        total += count_bytes(text, quote)
        opened.append(total % 2 == 1)
    return replace(reader, open_quotes=tuple(opened) if any(opened) else ())
