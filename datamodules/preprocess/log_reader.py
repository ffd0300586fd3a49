"""Click logs (CSV, JSON lines, Parquet) -> segments, piece by piece, in bounded memory, by the schema of the log.

Text is cut at fixed offsets, as Criteo's is: a row belongs to the piece in which it begins. A field in quotes may hold
line ends: in files with quotes, the first row of each piece is found beforehand. Parquet is cut at row groups.

pyarrow reads all three. A piece that pyarrow refuses is read again, slowly, to find all bad lines and their faults.
"""

import codecs
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from datamodules.folder import consistent, file_system, is_remote
from datamodules.log_schema import Format, LogSchema
from datamodules.preprocess.criteo_tsv import BadLineError, count_lines, piece_of_plain, pieces_of_text
from datamodules.preprocess.json_lines import JSON_TYPES, SET_ENCODING, checked_object, not_utf8
from datamodules.preprocess.log_columns import staged_columns
from datamodules.preprocess.quotes import find_quoted, line_ends
from datamodules.preprocess.sources import RawFile
from datamodules.preprocess.staging import Reader
from datamodules.values import BadValueError
from lightning_dlrm.contracts.errors import UserError, listed, one_line

_BLOCK_BYTES = 1 << 20
_STAND_IN = b"\x1f"  # for a separator of several characters: the unit separator, which text does not have
_PARQUET_ROWS = 1 << 17
_REMEDY = "correct or remove the line"
_NO_RETURN = f"a carriage return amid the line; {_REMEDY}"
_NO_CONTROL = f"a control character (0x1f); {_REMEDY}"
NOT_CLOSED = (
    "a field begins with a quote that no quote closes at the end of a field; close it, or set 'quote: null' in the "
    "schema if quotes are ordinary characters"
)


@dataclass(frozen=True, kw_only=True)
class LogReader(Reader):
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

    expected = "rows as the schema says"

    # --- pieces ---

    def jobs(self, source: RawFile, piece_bytes: int) -> list[tuple[int | None, range | None]]:
        if self.format == "parquet":
            ends = np.cumsum([-(-rows // _PARQUET_ROWS) for rows in self.group_rows]).tolist()
            return [(group, range(*span)) for group, span in enumerate(itertools.pairwise([0, *ends]))]
        return [(None, None)] if self._transcodes else super().jobs(source, piece_bytes)

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
    def key(self) -> list[Any]:
        return [self.schema.document(), self.splits]

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
        tables, faults = self.parse_good(piece)
        if faults:
            line, fault = faults[0]
            # If no row is good, the schema is more likely wrong.
            raise BadLineError(line, f"{fault}; --on-bad-row skip leaves bad {self.unit}s out" if tables else fault)
        return tables

    def parse_good(self, piece: Any, first: int = 0) -> tuple[list[pa.Table], list[tuple[int, str]]]:
        """Parse the good rows of a piece, and return the line (or row of Parquet) and fault of each bad one, in order.

        Args:
            piece: the piece.
            first: the number of its first line.
        """
        try:
            if isinstance(piece, bytes):
                table = self._csv(piece) if self.format == "csv" else self._json(piece)
            else:
                table = piece
            return ([self._staged(table)] if len(table) else []), []
        except (BadLineError, BadValueError, pa.ArrowException):
            return self._find_faults(piece, first)

    def _find_faults(self, piece: Any, first: int) -> tuple[list[pa.Table], list[tuple[int, str]]]:
        """Return what ``parse_good`` does of a piece with bad rows.

        It is parsed again once for each kind of fault, not for each bad row.
        """
        remedy = "write the column {name} as text" if self.format == "parquet" else SET_ENCODING
        faults: dict[int, str] = {}
        tables = []
        try:
            if not isinstance(piece, bytes):
                table, lines = piece, np.arange(len(piece))
            else:
                table, lines = (self._good_csv if self.format == "csv" else self._good_json)(piece, faults)
            while len(table):
                try:
                    tables = [self._staged(_decoded(table, remedy))]
                    break
                except BadValueError as error:
                    faults |= {int(lines[row]): error.fault(int(row)) for row in error.rows}
                    good = np.delete(np.arange(len(table)), error.rows)
                    table, lines = table.take(good), lines[good]
        except pa.ArrowException as error:
            return self._good_halves(piece, first, one_line(error))
        return tables, [(first + line, faults[line]) for line in sorted(faults)]

    def _good_halves(self, piece: Any, first: int, message: str) -> tuple[list[pa.Table], list[tuple[int, str]]]:
        """Return what ``parse_good`` does of a piece that pyarrow refuses for another reason than those known here."""
        is_text = isinstance(piece, bytes)
        ends = self.row_ends(piece) if is_text else np.arange(1, len(piece) + 1)
        if len(ends) < 2:
            return [], [(first, f"this {self.unit} cannot be read ({message}); {_REMEDY}")]
        cut = int(ends[len(ends) // 2 - 1])
        left, right = (piece[:cut], piece[cut:]) if is_text else (piece.slice(0, cut), piece.slice(cut))
        tables, faults = self.parse_good(left, first)
        more, more_faults = self.parse_good(right, first + (left.count(b"\n") if is_text else cut))
        return tables + more, faults + more_faults

    def _staged(self, table: pa.Table) -> pa.Table:
        nulls = () if self.format == "csv" else self.schema.nulls  # pyarrow's reader of CSV has taken them
        return staged_columns(self.schema, table, self.names, labelled=self.labelled, splits=self.splits, nulls=nulls)

    def count_lines(self, piece: Any, rows: int) -> int:
        return count_lines(piece) if isinstance(piece, bytes) else len(piece)

    def row_ends(self, text: bytes) -> np.ndarray:
        """Return where each row ends, int64; empty lines belong to the row after them."""
        return self._rows(text)[1] + 1

    def _rows(self, text: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Return where each row begins and where its line feed is, int64, without empty lines."""
        characters = np.frombuffer(text, np.uint8)
        ends = line_ends(text, self.quote, self.separator.encode())
        starts = np.append(0, ends[:-1] + 1)
        filled = (ends - starts > 1) | ((ends > starts) & (characters[starts] != ord("\r")))
        return starts[filled], ends[filled]

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
        """Return the needed columns of text.

        Raises:
            ArrowException: pyarrow refuses a row; see ``_good_csv``.
            BadLineError: a field in quotes is not closed, or a line holds the character that stands for a separator.
        """
        separator = self.separator.encode()
        if len(separator) > 1 and _STAND_IN in text:
            raise BadLineError(0, _NO_CONTROL)
        if not text[:_BLOCK_BYTES].strip() and not text.strip():
            return pa.table({})
        if self.quote is not None and self.quote in text and find_quoted(text, self.quote, separator).malformed:
            raise BadLineError(0, NOT_CLOSED)
        # Dictionaries are made later, at once: pyarrow's own, one for each block, take a quarter longer.
        numeric = self._numeric
        types = {name: pa.float64() if name in numeric else pa.string() for name in self._needed}
        return self._read_csv(*self._with_short_separators(text), types, _BLOCK_BYTES)

    def _with_short_separators(self, text: bytes) -> tuple[bytes, bytes]:
        """Return a text with a separator of one byte, and this."""
        separator = self.separator.encode()
        return (text, separator) if len(separator) == 1 else (text.replace(separator, _STAND_IN), _STAND_IN)

    def _read_csv(self, text: bytes, separator: bytes, types: Mapping[str, pa.DataType], block_bytes: int) -> pa.Table:
        return pyarrow.csv.read_csv(
            pa.BufferReader(text),
            pyarrow.csv.ReadOptions(column_names=self.names, use_threads=False, block_size=block_bytes),
            pyarrow.csv.ParseOptions(
                delimiter=separator.decode(),
                quote_char=self.quote.decode() if self.quote else False,
                newlines_in_values=self.quote is not None and self.quote in text,
            ),
            pyarrow.csv.ConvertOptions(
                column_types=types,
                include_columns=[name for name in self.names if name in types],
                null_values=self.schema.nulls,
                strings_can_be_null=True,
                decimal_point=self.schema.decimal,
                check_utf8=not text.isascii(),  # to look for UTF-8 in every field takes a seventh of the time
            ),
        )

    def _good_csv(self, text: bytes, faults: dict[int, str]) -> tuple[pa.Table, np.ndarray]:
        """Return the columns of the rows that have as many fields as the header, as bytes, and the line of each row;
        add the others to ``faults``."""
        starts, _ = self._rows(text)
        lines = np.searchsorted(_places(text, b"\n"), starts)
        controls = _places(text, _STAND_IN) if len(self.separator.encode()) > 1 else np.zeros(0, np.int64)
        wrong = dict.fromkeys((np.searchsorted(starts, controls, "right") - 1).tolist(), _NO_CONTROL)  # by rows
        text, separator = self._with_short_separators(text)
        starts, ends = self._rows(text)
        separators, returns = _places(text, separator), _places(text, b"\r")
        # Others end a line, or are lines without content.
        returns = returns[~np.isin(np.frombuffer(text, np.uint8)[returns + 1], list(b"\r\n"))]
        has_quotes = self.quote is not None and self.quote in text
        if self.quote is not None and has_quotes:
            quoted = find_quoted(text, self.quote, separator)
            separators, returns = quoted.outside(separators), quoted.outside(returns)
            malformed = np.searchsorted(starts, quoted.malformed, "right") - 1
            wrong |= dict.fromkeys(malformed.tolist(), NOT_CLOSED)
        wrong |= dict.fromkeys((np.searchsorted(starts, returns, "right") - 1).tolist(), _NO_RETURN)
        hint = ", or set 'quote: null' in the schema if quotes are ordinary characters" if has_quotes else ""
        wanted = f"expected {len(self.names)} between {self.separator!r}: {listed(self.names[:4])}..."
        counts = np.searchsorted(separators, ends) - np.searchsorted(separators, starts) + 1
        for row in np.flatnonzero(counts != len(self.names)).tolist():
            fault = f"{counts[row]} fields, {wanted}; {_REMEDY}, or quote fields that hold the separator{hint}"
            wrong.setdefault(row, fault)
        faults |= {int(lines[row]): fault for row, fault in wrong.items()}
        good = np.delete(np.arange(len(starts)), list(wrong))
        if not len(good):
            return pa.table({}), good
        rows = b"".join(text[start : end + 1] for start, end in zip(starts[good], ends[good], strict=True))
        return self._read_csv(rows, separator, dict.fromkeys(self._needed, pa.binary()), len(rows)), lines[good]

    def _json(self, text: bytes) -> pa.Table:
        """Return the keys of JSON lines as columns.

        Raises:
            ArrowException: pyarrow refuses a line; see ``_good_json``.
            BadLineError: a line has a key that the schema does not name.
        """
        if not text.strip():
            return pa.table({})
        types = {name: JSON_TYPES[kind] for name, kind in self.types}
        table = self._read_json(text, types)
        # pyarrow takes texts of unknown columns for times if they look like times.
        if times := [name for name in table.column_names if pa.types.is_timestamp(table.column(name).type)]:
            table = self._read_json(text, types | dict.fromkeys(times, pa.string()))
        if self.schema.rest == "error" and (others := [n for n in table.column_names if n not in self._sources]):
            raise BadLineError(0, others[0])
        return table

    def _read_json(self, text: bytes, types: Mapping[str, pa.DataType]) -> pa.Table:
        # Other keys are read past if that is allowed, and if it is known how to read the needed ones.
        reads_past = self.schema.rest == "leave" and self._needed <= types.keys()
        some = {name: kind for name, kind in types.items() if not reads_past or name in self._needed}
        return pyarrow.json.read_json(
            pa.BufferReader(text),
            pyarrow.json.ReadOptions(use_threads=False, block_size=len(text)),
            pyarrow.json.ParseOptions(
                explicit_schema=pa.schema(some.items()), unexpected_field_behavior="ignore" if reads_past else "infer"
            ),
        )

    def _good_json(self, text: bytes, faults: dict[int, str]) -> tuple[pa.Table, np.ndarray]:
        """Return the columns of the lines that are objects of the known types, and the number of each line; add the
        others to ``faults``."""
        kinds, needed, good, lines = dict(self.types), self._needed, [], []
        known = self._sources if self.schema.rest == "error" else None
        for number, line in enumerate(text.split(b"\n")):
            if line.strip():
                row = checked_object(line, kinds, needed, known)
                if isinstance(row, str):
                    faults[number] = row
                else:
                    lines.append(json.dumps(row))
                    good.append(number)
        return self._json("\n".join(lines).encode()), np.array(good, np.int64)


def is_utf8(encoding: str) -> bool:
    return codecs.lookup(encoding).name in ("utf-8", "utf-8-sig", "ascii")


def open_parquet(path: str) -> pq.ParquetFile:
    """Open a Parquet file of a log.

    Raises:
        UserError: it is damaged.
    """
    try:
        if is_remote(path):
            system, inner = file_system(path)
            return consistent(pq.ParquetFile(inner, filesystem=system), path, "write the file again")
        return consistent(pq.ParquetFile(path, memory_map=True), path, "write the file again")
    except pa.ArrowException as error:
        raise UserError(f"{path} is a damaged Parquet file ({one_line(error)}); write it again") from error


def _decoded(table: pa.Table, remedy: str) -> pa.Table:
    """Return a table of texts, and lists of texts, instead of bytes.

    Args:
        table: rows.
        remedy: what to do with bytes that are not UTF-8; ``{name}`` is the column.

    Raises:
        BadValueError: some bytes are not UTF-8.
    """
    for i, name in enumerate(table.column_names):
        kind = table.column(name).type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        item = kind.value_type if is_list else kind
        item = item.value_type if pa.types.is_dictionary(item) else item
        if pa.types.is_binary(item) or pa.types.is_fixed_size_binary(item) or pa.types.is_large_binary(item):
            column = table.column(name).cast(pa.list_(pa.binary()) if is_list else pa.binary())
            table = table.set_column(i, name, _texts_of_bytes(column, remedy.format(name=name)))
    return table


def _texts_of_bytes(column: pa.ChunkedArray, remedy: str) -> pa.ChunkedArray:
    """Return binary, or list<binary>, as texts."""
    items, rows = pa.concat_arrays(column.chunks), np.arange(len(column))
    is_list = pa.types.is_list(column.type)
    if is_list:
        rows = np.repeat(rows, pc.fill_null(pc.list_value_length(items), 0).to_numpy())
        items = items.flatten()
    encoded = items.dictionary_encode()
    foreign = [_first_byte_not_utf8(value) for value in encoded.dictionary.to_pylist()]
    codes = encoded.indices.fill_null(len(foreign)).to_numpy()
    places = np.flatnonzero(np.array([byte is not None for byte in (*foreign, None)])[codes])
    if len(places):
        first = dict(zip(rows[places[::-1]].tolist(), places[::-1].tolist(), strict=True))  # item of each bad row
        bad = np.isin(np.arange(len(column)), rows[places])
        raise BadValueError(bad, lambda row: not_utf8(foreign[codes[first[row]]], remedy))
    return column.cast(pa.list_(pa.string()) if is_list else pa.string())


def _first_byte_not_utf8(value: bytes) -> int | None:
    """Return the first byte that is not UTF-8."""
    try:
        value.decode()
    except UnicodeDecodeError as error:
        return value[error.start]
    return None


def _places(text: bytes, character: bytes) -> np.ndarray:
    """Return where a character of one byte stands, int64."""
    return np.flatnonzero(np.frombuffer(text, np.uint8) == ord(character))
