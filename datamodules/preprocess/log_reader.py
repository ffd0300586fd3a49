"""Click logs (CSV, JSON lines, Parquet) -> segments, piece by piece, in bounded memory, by the schema of the log.

Text is cut at fixed offsets, as Criteo's is: a row belongs to the piece in which it begins. A field in quotes may hold
line ends: in files with quotes, the first row of each piece is found beforehand. Parquet is cut at row groups.

pyarrow reads all three. What it refuses is looked at again, slowly, for the line and the fault.
"""

import codecs
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from datamodules import values
from datamodules.folder import consistent, file_system, is_remote
from datamodules.log_schema import Format, LogSchema
from datamodules.preprocess.criteo_tsv import BadLineError, count_lines, piece_of_plain, pieces_of_text
from datamodules.preprocess.json_lines import JSON_TYPES, JSON_WORDS, json_type
from datamodules.preprocess.quotes import find_quoted, line_ends
from datamodules.preprocess.sources import RawFile
from datamodules.preprocess.staging import dictionary_with_missing
from datamodules.values import BadValueError, staged_name
from lightning_dlrm.contracts.errors import UserError, one_line
from lightning_dlrm.contracts.schema import CRITEO_LABEL, SPLITS

SPLIT = "split"
"""Name of the column of segments by which rows are split."""

_BLOCK_BYTES = 1 << 20
_STAND_IN = b"\x1f"  # for a separator of several characters: the unit separator, which text does not have
_PARQUET_ROWS = 1 << 17
_REMEDY = "correct or remove the line"
NOT_CLOSED = (
    "a field begins with a quote that no quote closes at the end of a field; close it, or set 'quote: null' in the "
    "schema if quotes are ordinary characters"
)


@dataclass(frozen=True, kw_only=True)
class LogReader:
    """How the pieces of one file become segments."""

    schema: LogSchema
    format: Format
    labelled: bool
    names: tuple[str, ...]
    """The file's columns."""
    separator: str = ","
    header_bytes: int = 0
    """Of the header in the text, a byte order mark included."""
    header_lines: int = 0
    types: tuple[tuple[str, str], ...] = ()
    """Columns of JSON and their types, as far as the first lines tell."""
    group_rows: tuple[int, ...] = ()
    """Of a Parquet file."""
    splits: bool = True
    """Whether rows are split."""
    starts: tuple[int, ...] = ()
    """Where the first row of each piece of a plain file with quotes begins; see ``criteo_tsv.starts_of_rows``."""

    # --- pieces ---

    def jobs(self, source: RawFile, piece_bytes: int) -> list[tuple[int | None, range | None]]:
        if self.format == "parquet":
            ends = np.cumsum([-(-rows // _PARQUET_ROWS) for rows in self.group_rows]).tolist()
            return [(group, range(*span)) for group, span in enumerate(itertools.pairwise([0, *ends]))]
        if self._transcodes or source.compression != "none":
            return [(None, None)]
        return [(index, range(index, index + 1)) for index in range(-(-source.size // piece_bytes))]

    def pieces(self, source: RawFile, index: int | None, piece_bytes: int) -> Iterator[Any]:
        """Yield the parts of a piece, each of which becomes a segment: text in UTF-8, or a table of Parquet.

        Raises:
            UserError: the file is truncated or corrupt, or cannot be read or decoded.
        """
        quote, separator = self.quote, self.separator.encode()
        if self.format == "parquet":
            assert index is not None
            with open_parquet(source.path) as file:
                needed = [name for name in self.names if name in self._needed]
                for batch in file.iter_batches(_PARQUET_ROWS, row_groups=[index], columns=needed, use_threads=False):
                    yield pa.Table.from_batches([batch])
        elif index is None:
            encoding = self.schema.encoding if self._transcodes else None
            for number, text in enumerate(pieces_of_text(source, piece_bytes, quote, separator, encoding)):
                yield text[self.header_bytes :] if number == 0 else text
        else:
            text = piece_of_plain(source, index, piece_bytes, self.starts)
            yield text[self.header_bytes :] if index == 0 else text

    @property
    def rows(self) -> int | None:
        """Rows of the file, if they are known."""
        return sum(self.group_rows) if self.format == "parquet" else None

    @property
    def unit(self) -> str:
        return "row" if self.format == "parquet" else "line"

    @property
    def _transcodes(self) -> bool:
        return self.format != "parquet" and not is_utf8(self.schema.encoding)

    @property
    def quote(self) -> bytes | None:
        alone = self.format == "csv" and self.schema.quote is not None and len(self.separator.encode()) == 1
        return self.schema.quote.encode() if alone and self.schema.quote else None

    # --- parsing ---

    def parse(self, piece: Any) -> list[pa.Table]:
        """Return the rows of a piece as columns of segments.

        Raises:
            BadLineError: a row is not of the schema.
        """
        try:
            if self.format == "csv":
                table = self._csv(piece)
            elif self.format == "jsonl":
                table = self._json(piece)
            else:
                table = piece
            return [self.staged(table)] if len(table) else []
        except BadValueError as error:
            raise BadLineError(self._line_of(piece, error.row), error.fault) from error
        except pa.ArrowException as error:
            raise BadLineError(
                0, f"this or a later line cannot be read ({one_line(error)}); correct the file"
            ) from error

    def parse_good(self, piece: Any, first: int = 0) -> tuple[list[pa.Table], list[tuple[int, str]]]:
        """Parse the good rows of a piece, and return the line and fault of each bad one; see
        ``criteo_tsv.parse_good``."""
        try:
            return self.parse(piece), []
        except BadLineError as bad:
            is_text = isinstance(piece, bytes)
            ends = self.row_ends(piece) if is_text else np.arange(1, len(piece) + 1)
            if len(ends) == 1:
                return [], [(first, bad.fault)]
            cut = int(ends[len(ends) // 2 - 1])
            left, right = (piece[:cut], piece[cut:]) if is_text else (piece.slice(0, cut), piece.slice(cut))
            tables, faults = self.parse_good(left, first)
            more, more_faults = self.parse_good(right, first + (left.count(b"\n") if is_text else cut))
            return tables + more, faults + more_faults

    def count_lines(self, piece: Any, rows: int) -> int:
        return count_lines(piece) if isinstance(piece, bytes) else len(piece)

    def row_ends(self, text: bytes) -> np.ndarray:
        """Return where each row ends, int64; empty lines belong to the row after them."""
        characters = np.frombuffer(text, np.uint8)
        ends = line_ends(text, self.quote, self.separator.encode())
        starts = np.append(0, ends[:-1] + 1)
        filled = (ends - starts > 1) | ((ends > starts) & (characters[starts] != ord("\r")))
        return ends[filled] + 1

    def _line_of(self, piece: Any, row: int) -> int:
        """Return the line, from 0, in which a row begins; the row itself in Parquet."""
        if not isinstance(piece, bytes):
            return row
        ends = self.row_ends(piece)
        start = int(ends[row - 1]) if row else 0
        skipped = piece[start : int(ends[row]) if row < len(ends) else None]
        return piece.count(b"\n", 0, start) + skipped.count(b"\n", 0, len(skipped) - len(skipped.lstrip(b"\r\n")))

    @property
    def _sources(self) -> dict[str, str]:
        return self.schema.sources(self.names)

    @property
    def _needed(self) -> set[str]:
        """The columns that are read."""
        left = {c.source or name for name, c in self.schema.columns.items() if c.role == "leave"}
        used = {c.source or name for name, c in self.schema.columns.items() if c.role != "leave"}
        used |= {c.weights for c in self.schema.columns.values() if c.weights}
        if self.labelled:
            used.add(self.schema.label_in(self.names).column)
        if self.schema.split.column is not None and self.splits:
            used.add(self.schema.split.column)
        return (set(self._sources) & used) | (left & used)

    @property
    def _numeric(self) -> set[str]:
        """The columns that are read as numbers alone."""
        uses: dict[str, set[bool]] = {}
        for name, column in self.schema.columns.items():
            is_number = column.role == "dense" or column.transform is not None or column.time in ("unix", "unix_ms")
            uses.setdefault(column.source or name, set()).add(is_number)
        text = {self.schema.label_in(self.names).column}
        if self.schema.split.by == "column" and self.schema.split.column is not None:
            text.add(self.schema.split.column)
        return {name for name, kinds in uses.items() if kinds == {True}} - text

    def _csv(self, text: bytes) -> pa.Table:
        plain, separator = text, self.separator.encode()
        if len(separator) > 1:
            if _STAND_IN in text:
                raise BadLineError(
                    text.count(b"\n", 0, text.index(_STAND_IN)), f"a control character (0x1f); {_REMEDY}"
                )
            text, separator = text.replace(separator, _STAND_IN), _STAND_IN
        if not text[:_BLOCK_BYTES].strip() and not text.strip():
            return pa.table({})
        if self.quote is not None and self.quote in text:
            malformed = find_quoted(text, self.quote, separator).malformed
            if malformed:
                raise BadLineError(text.count(b"\n", 0, malformed[0]), NOT_CLOSED)
        try:
            return self._read_csv(text, separator, self._numeric)
        except pa.ArrowInvalid as error:
            if fault := self._ragged_row(plain, one_line(error)):
                raise fault from error
            _check_utf8(plain)
            try:
                return self._read_csv(text, separator, set())  # numbers are looked at one by one
            except pa.ArrowInvalid:
                raise error from None

    def _read_csv(self, text: bytes, separator: bytes, numeric: set[str]) -> pa.Table:
        # Dictionaries are made later, at once: pyarrow's own, one for each block, take a quarter longer.
        kinds = {name: pa.float64() if name in numeric else pa.string() for name in self._needed}
        return pyarrow.csv.read_csv(
            pa.BufferReader(text),
            pyarrow.csv.ReadOptions(column_names=self.names, use_threads=False, block_size=_BLOCK_BYTES),
            pyarrow.csv.ParseOptions(
                delimiter=separator.decode(),
                quote_char=self.quote.decode() if self.quote else False,
                newlines_in_values=self.quote is not None and self.quote in text,
            ),
            pyarrow.csv.ConvertOptions(
                column_types=kinds,
                include_columns=[name for name in self.names if name in self._needed],
                null_values=self.schema.nulls,
                strings_can_be_null=True,
                decimal_point=self.schema.decimal,
            ),
        )

    def _ragged_row(self, text: bytes, message: str) -> BadLineError | None:
        """Return what is wrong with a row of too many or too few fields, which pyarrow's message counts; None if the
        message is another one."""
        found = re.search(r"(?:Row #(\d+): )?Expected (\d+) columns, got (\d+)", message)
        if found is None:
            return None
        row, expected, actual = (int(number or 0) for number in found.groups())
        if not row:
            ends = self.row_ends(text)
            rows = (text[start:end] for start, end in zip((0, *ends), ends, strict=False))
            counts = (one.count(self.separator.encode()) + 1 for one in rows)
            row = next((number for number, count in enumerate(counts, 1) if count == actual), 1)
        quotes = self.quote is not None and self.quote in text
        hint = ", or set 'quote: null' in the schema if quotes are ordinary characters" if quotes else ""
        return BadLineError(
            self._line_of(text, row - 1),
            f"{actual} fields, expected {expected} between {self.separator!r}: {', '.join(self.names[:4])}...; "
            f"{_REMEDY}, quote fields that hold the separator{hint}",
        )

    def _json(self, text: bytes) -> pa.Table:
        if not text.strip():
            return pa.table({})
        known = pa.schema([(name, JSON_TYPES[kind]) for name, kind in self.types])
        try:
            table = pyarrow.json.read_json(
                pa.BufferReader(text),
                pyarrow.json.ReadOptions(use_threads=False, block_size=len(text)),
                pyarrow.json.ParseOptions(explicit_schema=known, unexpected_field_behavior="infer"),
            )
        except pa.ArrowInvalid as error:
            _check_utf8(text)
            raise self.bad_json(text, one_line(error)) from error
        if self.schema.rest == "error" and (others := [n for n in table.column_names if n not in self._sources]):
            lines = text.split(b"\n")
            line = next((i for i, line in enumerate(lines) if line.strip() and others[0] in json.loads(line)), 0)
            raise BadLineError(line, f"the key {others[0]} is not in the schema; name it, or set rest: leave")
        return table

    def bad_json(self, text: bytes, message: str) -> BadLineError:
        kinds = dict(self.types)
        for number, line in enumerate(text.split(b"\n")):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                return BadLineError(
                    number, f"not JSON ({one_line(error)}); expected one object in each line: {_REMEDY}"
                )
            if not isinstance(row, dict):
                return BadLineError(
                    number, f"not a JSON object; expected one, such as {{...}}, in each line: {_REMEDY}"
                )
            for name, value in row.items():
                found = json_type([value])
                if found and found != kinds.setdefault(name, found) and {found, kinds[name]} != {"int", "float"}:
                    return BadLineError(
                        number,
                        f"{name} is {json.dumps(value)[:40]} ({JSON_WORDS[found]}), where earlier lines have "
                        f"{JSON_WORDS[kinds[name]]}; write one of the two in every line",
                    )
        return BadLineError(0, f"this or a later line cannot be read ({message}); {_REMEDY}")

    # --- columns of segments ---

    def staged(self, table: pa.Table) -> pa.Table:
        """Return the columns of segments.

        Raises:
            BadValueError: a value is not of the schema.
        """
        columns: dict[str, pa.Array] = {}
        schema, decimal = self.schema, self.schema.decimal
        nulls = () if self.format == "csv" else schema.nulls  # pyarrow's reader of CSV has taken them

        def column(name: str) -> pa.ChunkedArray:
            given = name in table.column_names
            return (
                values.without_nulls(table.column(name), nulls) if given else pa.chunked_array([pa.nulls(len(table))])
            )

        def single(name: str) -> pa.ChunkedArray:
            values.check_single(name, found := column(name))
            return found

        if self.labelled:
            label = schema.label_in(self.names)
            columns[CRITEO_LABEL] = pa.array(values.labels(label, single(label.column), decimal))
        by = schema.split.column if self.splits else None
        if by is not None and schema.split.by == "time":
            form = values.form_of_time(schema.columns, by)
            columns[SPLIT] = pa.array(values.split_keys(by, single(by), form))
        elif by is not None:
            columns[SPLIT] = pa.array(values.split_codes(by, single(by), schema.split.values, SPLITS))
        for name, one in schema.columns.items():
            source = one.source or name
            if one.role == "keep":
                found = values.kept(source, single(source), one.time)
                columns[staged_name("keep", name)] = found
            elif one.role == "multi_hot":
                bag, keep = values.bags(source, column(source), one.separator)
                columns[staged_name("bag", name)] = bag
                if one.weights:
                    of_bag = values.weights(one.weights, column(one.weights), one.separator, column(source), keep)
                    columns[staged_name("weights", name)] = of_bag
            elif one.role == "dense" or one.transform is not None:
                if (staged := staged_name("number", source)) not in columns:
                    columns[staged] = values.numbers(source, single(source), decimal)
            elif one.role == "categorical" and (staged := staged_name("text", source)) not in columns:
                columns[staged] = values.texts(single(source))
        return pa.table(columns)

    def segment(self, tables: Sequence[pa.Table]) -> tuple[pa.RecordBatch, dict[str, Any]]:
        """Return rows in the form of a segment, and its facts."""
        table = pa.concat_tables(_with_equal_types(tables), promote_options="permissive")
        distinct: dict[str, int] = {}
        missing: dict[str, int] = {}
        columns: dict[str, pa.Array] = {}
        kept: dict[str, str] = {}
        items: dict[str, int] = {}
        for staged in table.column_names:
            kind, _, name = staged.partition("/")
            found = table.column(staged).unify_dictionaries().combine_chunks()
            if isinstance(found, pa.ChunkedArray):
                found = found.chunk(0)
            if kind in ("text", "number"):
                missing[staged] = found.null_count
            if kind == "text":
                found = dictionary_with_missing(found, "")
                distinct[staged] = len(found.dictionary) - 1
            elif kind == "bag":
                found = pa.ListArray.from_arrays(found.offsets, dictionary_with_missing(found.values, ""))
                distinct[staged] = len(found.values.dictionary) - 1
                items[name] = len(found.values)
            elif kind == "keep":
                kept[name] = values.kept_type(found)
            columns[staged] = found
        facts = {
            "rows": len(table),
            "missing": missing,
            "minimum": {},
            "distinct": distinct,
            "kept": kept,
            "items": items,
        }
        return pa.record_batch(columns), facts


def _with_equal_types(tables: Sequence[pa.Table]) -> Sequence[pa.Table]:
    """Return tables of columns of segments, in which kept columns are texts if they have several types.

    Parts of a piece that are read apart, beside a bad row, may have them in JSON.
    """
    for name in tables[0].column_names:
        kinds = {table.column(name).type for table in tables} - {pa.null()}
        if name.startswith(staged_name("keep", "")) and len(kinds) > 1 and kinds != {pa.int64(), pa.float64()}:
            tables = [
                table.set_column(table.column_names.index(name), name, values.texts(table.column(name)))
                for table in tables
            ]
    return tables


def is_utf8(encoding: str) -> bool:
    return codecs.lookup(encoding).name in ("utf-8", "utf-8-sig", "ascii")


def open_parquet(path: str) -> pq.ParquetFile:
    """Open a Parquet file of a log.

    Raises:
        UserError: it is no Parquet file.
    """
    try:
        if is_remote(path):
            system, inner = file_system(path)
            return consistent(pq.ParquetFile(inner, filesystem=system), path, "write the file again")
        return consistent(pq.ParquetFile(path, memory_map=True), path, "write the file again")
    except pa.ArrowException as error:
        raise UserError(f"{path} is not a Parquet file ({one_line(error)}); set format in the schema") from error


def _check_utf8(text: bytes) -> None:
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise BadLineError(
            text.count(b"\n", 0, error.start),
            f"the byte 0x{text[error.start]:02x} is not UTF-8; set encoding in the schema, such as latin-1",
        ) from error
