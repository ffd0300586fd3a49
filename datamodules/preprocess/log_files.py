"""The form of a click log's files, from their beginnings, and the reader of each file."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from datamodules.log_schema import LogSchema, no_header
from datamodules.preprocess.criteo_reader import CriteoReader
from datamodules.preprocess.criteo_tsv import COLUMNS, starts_of_rows
from datamodules.preprocess.file_forms import check_separator, format_of, is_parquet
from datamodules.preprocess.json_lines import checked_object, find_keys, json_type
from datamodules.preprocess.log_reader import NOT_CLOSED, LogReader, is_utf8, open_parquet
from datamodules.preprocess.progress import fields_of
from datamodules.preprocess.quotes import find_quoted
from datamodules.preprocess.sources import RawFile, check_text
from datamodules.preprocess.staging import Reader
from lightning_dlrm.contracts.errors import UserError, one_line, require

_HEADER_BYTES = 1 << 20  # the longest header
_SAMPLED_LINES = 1000  # of JSON, for the types of columns
_BOM = b"\xef\xbb\xbf"


def open_readers(
    sources: Sequence[RawFile], schema: LogSchema, piece_bytes: int, is_new: bool = True
) -> Sequence[Reader]:
    """Return the reader of each file, from its beginning.

    Args:
        sources: the files.
        schema: of the log.
        piece_bytes: the length of a piece.
        is_new: whether a new dataset is made, which needs labels and splits; otherwise rows are encoded like those of
            an existing dataset, and may lack labels.

    Raises:
        UserError: a file's columns are not those of the schema, or it cannot be read, or some files have labels and
            others have not.
    """
    if schema.format == "criteo" and not is_parquet(sources[0]):
        schema.check_columns(COLUMNS, "format criteo", labelled=is_new)
        labelled = is_new or fields_of(sources[0]) != len(COLUMNS) - 1
        return [CriteoReader(labelled=labelled)] * len(sources)
    readers = [_open_reader(source, schema, is_new) for source in sources]
    of_json = [i for i, reader in enumerate(readers) if reader.format == "jsonl"]
    absent = _absent_keys([(sources[i], readers[i]) for i in of_json], schema, is_new)
    for i, reader in enumerate(readers):
        source, names = sources[i], reader.names
        if reader.format == "jsonl":
            texts = tuple((key, kind) for key, kind in absent.items() if kind in ("text", "texts"))
            reader = replace(reader, types=(*reader.types, *(one for one in texts if one[0] not in names)))
            names += tuple(key for key in absent if key not in names)
        schema.check_columns(names, source.path, labelled=is_new)
        readers[i] = replace(_with_starts(source, reader, piece_bytes), names=names, splits=is_new)
        readers[i] = replace(readers[i], labelled=schema.label_in(names).column in names)
        require(
            readers[i].labelled == readers[0].labelled,
            f"{source.path} has {'labels' if readers[i].labelled else 'no labels'}, unlike {sources[0].path}; give "
            "only files with labels, or only files without labels",
        )
    return readers


def _absent_keys(files: Sequence[tuple[RawFile, LogReader]], schema: LogSchema, is_new: bool) -> dict[str, str | None]:
    """Return the keys of the schema that the first lines of some file lack but a later line of any file has, each with
    its type if the type is known."""
    keys: dict[str, str | None] = {}
    for _, reader in files:
        sources = schema.sources(reader.names)
        needed = {name for name, key in sources.items() if is_new or key not in ("label", "split")}
        keys |= dict.fromkeys(needed - set(reader.names))
    known = [(set(reader.names), dict(reader.types)) for _, reader in files]
    found = {key: next((types[key] for _, types in known if key in types), None) for key in keys}
    seen = {key for key in keys if any(key in names for names, _ in known)}
    for source, _ in files:
        if seen.issuperset(keys):
            break
        with _readable(source):
            values = find_keys(source, _foreign(schema), keys.keys() - seen)
        found |= {key: json_type([value]) for key, value in values.items()}
        seen |= values.keys()
    return {key: kind for key, kind in found.items() if key in seen}


def _open_reader(source: RawFile, schema: LogSchema, is_new: bool) -> LogReader:
    # A table in memory is Parquet, even with Criteo's rows.
    start = None if is_parquet(source) else _start(source, schema)
    form = format_of(source, schema, start, is_new)
    if start is None:
        with open_parquet(source.path) as file:
            names = tuple(file.schema_arrow.names)
            groups = tuple(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
        reader = LogReader(schema=schema, format=form, labelled=True, names=names, group_rows=groups)
    else:
        reader = _json_reader(source, schema, start) if form == "jsonl" else _csv_reader(source, schema, start, is_new)
    twice = next((name for name in reader.names if reader.names.count(name) > 1), None)
    found = "seems to have no header" if no_header(reader.names) else f"has two columns named {twice!r}"
    remedy = no_header(reader.names) or "; rename one of them"
    require(twice is None, f"{source.path} {found}{remedy}")
    return reader


def _foreign(schema: LogSchema) -> str | None:
    """Return the encoding of a log; None if it is UTF-8."""
    return None if is_utf8(schema.encoding) else schema.encoding


@contextmanager
def _readable(source: RawFile) -> Iterator[None]:
    """Add the file and a remedy to errors of reading its text."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        is_damaged = one_line(error).startswith(("truncated", "corrupt"))
        remedy = "download the file again" if is_damaged else "download the file again, or set encoding"
        raise UserError(f"{source.path}: {one_line(error)}; {remedy}") from error


def _start(source: RawFile, schema: LogSchema) -> bytes:
    """Return the beginning of a text file in UTF-8, and whole lines of it unless they are very long.

    Raises:
        UserError: it is empty, or not text.
    """
    with source.text(_foreign(schema)) as text, _readable(source):
        start = text.read(_HEADER_BYTES)
    require(start.removeprefix(_BOM).strip(), f"{source.path} is empty; give files with rows")
    check_text(source.path, start)
    return start if len(start) < _HEADER_BYTES else start[: start.rfind(b"\n") + 1] or start


def _csv_reader(source: RawFile, schema: LogSchema, start: bytes, is_new: bool) -> LogReader:
    separator = schema.separator or ("\t" if ".tsv" in Path(source.name).suffixes else ",")
    bom = len(_BOM) if start.startswith(_BOM) else 0
    reader = LogReader(
        schema=schema, format="csv", labelled=True, names=schema.names, separator=separator, header_bytes=bom
    )
    end = start.find(b"\n")
    if schema.names:
        first = start[bom : end if end >= 0 else None].decode(errors="replace").rstrip("\r")
        check_separator(source.path, first, schema, separator, is_new)
        return reader
    try:
        start[bom : end if end >= 0 else None].decode()
    except UnicodeDecodeError as error:
        example = "utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin-1"
        raise UserError(
            f"{source.path}, line 1: the text is not UTF-8; set encoding in the schema, such as {example}"
        ) from error
    rows = start[bom:] if start.endswith(b"\n") else start[bom:] + b"\n"
    require(
        len(start) < _HEADER_BYTES or start.endswith(b"\n"),
        f"{source.path}, line 1: no line end in the first {len(start):,} bytes; expected a header, which names the "
        "columns",
    )
    quote = reader.quote
    # A header may hold line ends in quotes.
    length = int(reader.row_ends(rows)[0])
    header = rows[:length]
    lines = header.count(b"\n")
    text = header.decode(errors="replace").strip("\r\n")
    check_separator(source.path, text, schema, separator, is_new)
    if quote is None:
        names = text.split(separator)
    else:
        broken = find_quoted(header, quote, separator.encode()).malformed
        require(not broken, f"{source.path}, line {lines:,}: {NOT_CLOSED}")
        try:
            rows_of_header = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quotechar=quote.decode())
            names = next(rows_of_header, [])
        except csv.Error as error:
            raise UserError(
                f"{source.path}, line {lines:,}: {one_line(error)}; expected a header, which names the columns"
            ) from error
    return replace(reader, names=tuple(names), header_bytes=bom + length, header_lines=lines)


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
        except (ValueError, AttributeError, RecursionError) as error:
            fault = checked_object(line, {}, (), None)
            raise UserError(
                f"{source.path}, line {number + 1:,}: {fault if isinstance(fault, str) else one_line(error)}"
            ) from error
    numeric = {c.source or name for name, c in schema.columns.items() if c.role == "dense" or c.transform}
    types = {name: kind for name, some in found.items() if (kind := json_type(some))}
    types = {name: "float" if kind in ("int", "long") and name in numeric else kind for name, kind in types.items()}
    bom = len(_BOM) if start.startswith(_BOM) else 0
    return replace(reader, names=tuple(found), types=tuple(types.items()), header_bytes=bom)


def _with_starts(source: RawFile, reader: LogReader, piece_bytes: int) -> LogReader:
    """Return the reader of a plain file with quotes, which knows where rows of pieces begin; any other as it is."""
    piece_bytes = source.piece_bytes(piece_bytes)
    if reader.quote is None or reader.jobs(source, piece_bytes) == [(None, None)]:
        return reader
    if not source.contains(reader.quote, reader.header_bytes):
        return reader
    separator = reader.separator.encode()
    return replace(reader, starts=starts_of_rows(source, piece_bytes, reader.quote, separator, reader.header_bytes))
