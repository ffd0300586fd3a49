"""Raw Criteo TSV -> Arrow tables, piece by piece, in bounded memory.

A line is ``label \\t I1..I13 \\t C1..C26``: the label is 0 or 1, the integers fit int32, the
categorical values are hashes of 8 hexadecimal digits; an integer or a hash may be empty (missing).
Rows without labels, as in Kaggle's test.txt, lack the first field. Lines end with LF or CRLF, the
last one possibly with nothing.

A file is cut at fixed offsets of its text: a line belongs to the piece in which it begins, so every
piece can be found alone.

There are two parsers: a fast one that only detects that a piece has a bad line, and a slow, exact one
that then finds the line and its fault, so that clear errors cost nothing on good input.

Why pyarrow parses: measured on 1M generated rows (264 MB, 2 cores), ``pyarrow.csv`` with the types
given takes 0.51 s (8 MB pieces in two threads; 1.5 s with guessed types), polars 2.2 s, and polars
decoding the hashes too 1.7 s; pyarrow is needed for Parquet anyway. It has no hexadecimal column
type: hashes are read as 8 fixed bytes, taken for 64-bit integers, and reduced to the distinct ones,
of which numpy turns pairs of digits into bytes by one table lookup each. That takes 0.25 s a million
rows on one core; decoding every hash first 0.5 s, and letting pyarrow's parser make the dictionaries
of 8-byte strings 0.65 s.
"""

import re
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.csv

from datamodules.preprocess.quotes import line_ends
from datamodules.preprocess.sources import RawFile
from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.schema import CRITEO_CATEGORICAL, CRITEO_DENSE, CRITEO_LABEL

COLUMNS = (CRITEO_LABEL, *CRITEO_DENSE, *CRITEO_CATEGORICAL)
RAW_SCHEMA = pa.schema(
    [(CRITEO_LABEL, pa.int8())]
    + [(name, pa.int32()) for name in CRITEO_DENSE]
    + [(name, pa.dictionary(pa.int32(), pa.uint32())) for name in CRITEO_CATEGORICAL]
)
"""What a piece is parsed to; null = missing. A dictionary may have a value twice, spelt ``0a`` and ``0A``."""

_ARROW_BLOCK_BYTES = 1 << 20  # pyarrow's own step: larger ones fall out of the cache and run at half speed
_MAX_LINE_BYTES = 1 << 20  # a Criteo line has about 250; a limit, so that a file without line ends is not read whole
_STEP_BYTES = 1 << 12  # read at a time to find a line's end
_LOOK_AT_EACH = 64  # lines of a piece with a bad one; longer pieces are halved first

_COUNTED_AT_ONCE = 1 << 16
_HASH_DIGITS = 8

_PARSE = pyarrow.csv.ParseOptions(
    delimiter="\t", quote_char=False, double_quote=False, escape_char=False, ignore_empty_lines=False
)
_CONVERT = pyarrow.csv.ConvertOptions(
    column_types={
        field.name: pa.binary(_HASH_DIGITS) if field.name in CRITEO_CATEGORICAL else field.type for field in RAW_SCHEMA
    },
    null_values=[""],
    check_utf8=False,
)


class BadLineError(Exception):
    """The first line that is not a Criteo line: its number (from 0), its fault, and what to do."""

    def __init__(self, line: int, fault: str):
        super().__init__(line, fault)
        self.line, self.fault = line, fault


def piece_of_plain(source: RawFile, index: int, piece_bytes: int, starts: Sequence[int] = ()) -> bytes:
    """Return the lines that begin in a piece of a plain file, each with its line feed.

    Args:
        source: the file.
        index: the piece.
        piece_bytes: its length.
        starts: where the first row of each piece begins, and the end of the file; empty if each line is a row.

    Raises:
        UserError: the file cannot be read.
    """
    if starts:
        start, stop = starts[index : index + 2]
    else:
        start, stop = (_begin_of_line(source, one * piece_bytes) for one in (index, index + 1))
    if start == stop:
        return b""
    text = source.read(start, stop)
    require(
        len(text) >= stop - start,
        f"{source.path} became shorter while it was read; start again with the whole file",
    )
    return text if text.endswith(b"\n") else text + b"\n"


def _begin_of_line(source: RawFile, offset: int) -> int:
    """Return where the first line begins from an offset on; an endless line ends where it became too long."""
    if offset == 0 or offset >= source.size:
        return min(offset, source.size)
    place = offset - 1  # a line begins here if the byte before it ends another
    while place < source.size and place - offset <= _MAX_LINE_BYTES:
        found = source.read(place, place + _STEP_BYTES).find(b"\n")
        if found >= 0:
            return place + found + 1
        place += _STEP_BYTES
    return min(place, source.size)


def starts_of_rows(
    source: RawFile, piece_bytes: int, quote: bytes, separator: bytes, header_bytes: int
) -> tuple[int, ...]:
    """Return where the first row of each piece of a plain file begins, and the end of the file.

    Args:
        source: the file.
        piece_bytes: the length of a piece.
        quote: the character that quotes line ends.
        separator: of the fields.
        header_bytes: where rows begin.

    Raises:
        UserError: the file cannot be read.
    """
    starts, start = [0], header_bytes
    for boundary in range(piece_bytes, source.size, piece_bytes):
        if start < boundary:
            text = source.read(start, boundary + _MAX_LINE_BYTES)
            end = find_row_end(text, boundary - 1 - start, quote, separator, more=start + len(text) < source.size)
            start += end + 1 if end >= 0 else len(text)
        starts.append(start)
    return (*starts, source.size)


def find_row_end(text: bytes, start: int, quote: bytes | None, separator: bytes, more: bool = False) -> int:
    """Return the place of the first line feed outside quoted fields, from ``start`` on; -1 if there is none.

    Args:
        text, quote, separator, start, more: as in ``quotes.line_ends``.
    """
    if quote is None or quote not in text:
        return text.find(b"\n", start)
    ends = line_ends(text, quote, separator, start, more)
    return int(ends[0]) if len(ends) else -1


def pieces_of_text(
    source: RawFile,
    piece_bytes: int,
    quote: bytes | None = None,
    separator: bytes = b"\t",
    encoding: str | None = None,
) -> Iterator[bytes]:
    """Yield the same pieces of a file that can only be read from its beginning.

    Args:
        source: the file.
        piece_bytes: the length of a piece.
        quote: the character that quotes line ends; None for none.
        separator: of the fields.
        encoding: of the text, which then becomes UTF-8; None to leave it as it is.

    Raises:
        UserError: the file is truncated or corrupt, or cannot be read.
    """
    remedy = "download the file again" if encoding is None else "download the file again, or set another encoding"
    rest, offset, boundary, lines = b"", 0, piece_bytes, 0  # rest begins at the text's offset
    with source.text(encoding) as text:
        ended = False
        while not ended:
            try:
                chunk = text.read(piece_bytes)
            except UserError:
                raise
            except ValueError as error:
                lines += rest.count(b"\n")
                raise UserError(f"{source.path}, after line {lines:,}: {error}; {remedy}") from error
            ended = len(chunk) < piece_bytes
            rest += chunk
            if ended and rest and not rest.endswith(b"\n"):
                rest += b"\n"
            # A line that begins before the boundary is cut off at the first line end from boundary - 1 on.
            while boundary <= offset + len(rest):
                least = max(boundary - 1 - offset, 0)
                end = find_row_end(rest, least, quote, separator, not ended) + 1 if boundary > offset else 0
                if boundary > offset and not end:
                    if len(rest) - rest.rfind(b"\n") <= _MAX_LINE_BYTES:
                        break
                    rest, end = rest + b"\n", len(rest) + 1
                piece, rest = rest[:end], rest[end:]
                offset, boundary = offset + end, boundary + piece_bytes
                lines += piece.count(b"\n")
                yield piece
        if rest:
            yield rest


def parse(text: bytes, labelled: bool = True) -> pa.Table:
    """Parse whole lines, each with its line feed, to rows of ``RAW_SCHEMA``.

    Args:
        labelled: whether lines begin with the label; if not, the table lacks it.

    Raises:
        BadLineError: a line is not a Criteo line.
    """
    # pyarrow reads '0x1F' and ' 31' as integers and a lone carriage return as a line end; Criteo's format has none of
    # them.
    if any(byte in text for byte in (b" ", b"x", b"X")):
        raise _first_bad_line(text, labelled)
    try:
        table = pyarrow.csv.read_csv(
            pa.BufferReader(text),
            read_options=pyarrow.csv.ReadOptions(
                column_names=COLUMNS if labelled else COLUMNS[1:], use_threads=False, block_size=_ARROW_BLOCK_BYTES
            ),
            parse_options=_PARSE,
            convert_options=_CONVERT,
        )
    except pa.ArrowInvalid as error:
        raise _first_bad_line(text, labelled) from error
    # Quotes are off and empty lines are kept, so only a lone carriage return changes the number of lines.
    if b"\r" in text and table.num_rows != count_lines(text):
        raise _first_bad_line(text, labelled)
    if labelled:
        label = table.column(CRITEO_LABEL)
        if label.null_count or not np.isin(label.to_numpy(), (0, 1)).all():
            raise _first_bad_line(text, labelled)
    columns = {name: table.column(name) for name in table.column_names}
    for name in CRITEO_CATEGORICAL:
        if (hashes := _dictionary_of_hashes(columns[name].combine_chunks())) is None:
            raise _first_bad_line(text, labelled)
        columns[name] = hashes
    return pa.table(columns, schema=RAW_SCHEMA if labelled else RAW_SCHEMA.remove(0))


def parse_good(text: bytes, labelled: bool = True, first: int = 0) -> tuple[list[pa.Table], list[tuple[int, str]]]:
    """Parse the good rows of whole lines, and return the place and fault of each bad one.

    A piece with a bad line is halved until it has few lines, so that the slow, exact parser does not read millions of
    good lines.

    Args:
        first: the number of the first line.
    """
    try:
        return [parse(text, labelled)], []
    except BadLineError as bad:
        lines = text.split(b"\n")[:-1]
        if len(lines) > _LOOK_AT_EACH:
            middle = len(lines) // 2
            cut = len(b"\n".join(lines[:middle])) + 1
            tables, faults = parse_good(text[:cut], labelled, first)
            more_tables, more_faults = parse_good(text[cut:], labelled, first + middle)
            return tables + more_tables, faults + more_faults
        found = [_fault(line.removesuffix(b"\r"), labelled) for line in lines]
        faults = [(first + number, fault) for number, fault in enumerate(found) if fault]
        if not faults:
            raise bad
        good = b"".join(line + b"\n" for line, fault in zip(lines, found, strict=True) if not fault)
        return ([parse(good, labelled)] if good else []), faults


def _pair_values() -> np.ndarray:
    """Return uint16 [65536]: the byte that two hexadecimal digits spell, at the two characters read as one uint16 of
    this machine's byte order; 0xFFFF if they are not hexadecimal."""
    table = np.full(1 << 16, 0xFFFF, np.uint16)
    digits = "0123456789abcdefABCDEF"
    pairs = [high + low for high in digits for low in digits]
    table[np.frombuffer("".join(pairs).encode(), np.uint16)] = [int(pair, 16) for pair in pairs]
    return table


_PAIR_VALUES = _pair_values()


def _dictionary_of_hashes(digits: pa.FixedSizeBinaryArray) -> pa.DictionaryArray | None:
    """Return uint32 values of 8 hexadecimal digits each, nulls kept; None if a digit is not hexadecimal."""
    words = pa.Array.from_buffers(pa.uint64(), len(digits), digits.buffers(), digits.null_count, digits.offset)
    encoded = words.dictionary_encode()
    pairs = np.take(_PAIR_VALUES, encoded.dictionary.to_numpy().view(np.uint16))
    if pairs.max(initial=0) > 0xFF:
        return None
    values = pairs.astype(np.uint8).view(">u4").astype(np.uint32)
    return pa.DictionaryArray.from_arrays(encoded.indices, pa.array(values), safe=False)


def count_lines(text: bytes) -> int:
    """Count line feeds."""
    return count_bytes(text, ord("\n"))


def count_bytes(text: bytes, byte: int) -> int:
    """Count a byte, twice as fast as ``bytes.count``, in steps that stay in the cache."""
    characters = np.frombuffer(text, np.uint8)
    steps = range(0, len(text), _COUNTED_AT_ONCE)
    return sum(int(np.count_nonzero(characters[at : at + _COUNTED_AT_ONCE] == byte)) for at in steps)


def _first_bad_line(text: bytes, labelled: bool) -> BadLineError:
    """Find the fault of the first bad line by a slow and exact check of each."""
    for number, line in enumerate(text.removesuffix(b"\n").split(b"\n")):
        if fault := _fault(line.removesuffix(b"\r"), labelled):
            return BadLineError(number, fault)
    return BadLineError(
        0, f"this or one of the next {text.count(10):,} lines is not a Criteo line; download the file again"
    )


_FAULT_REMEDY = "correct or remove the line, or download the file again"


def _fault(line: bytes, labelled: bool) -> str | None:
    """Return what is wrong with a line and what to do; None for a good line."""
    if b"\0" in line:
        return "binary data, expected text; unpack the archive or download the file again"
    fields = line.split(b"\t")
    columns = COLUMNS if labelled else COLUMNS[1:]
    if len(fields) == 1 and line.count(b",") >= len(columns) - 2:
        return (
            f"{line.count(b',') + 1} fields between commas, expected {len(columns)} between tabs and no header; "
            "convert the file: tr , '\\t', and tail -n +2 if its first line has names"
        )
    if len(fields) != len(columns):
        unlabelled = labelled and len(fields) == len(COLUMNS) - 1
        hint = " (rows without labels, such as Kaggle's test.txt, are encoded with --vocabulary)" if unlabelled else ""
        if len(fields) == 1 and line:
            separated = f"{line.count(b',') + 1} fields between commas" if b"," in line else "1 field"
            return (
                f"{separated}, expected {len(columns)} between tabs. A log of another form needs a schema, which "
                "preprocess --infer FILE.yaml --label COLUMN --input FILE writes"
            )
        found = "1 field" if len(fields) == 1 else f"{len(fields)} fields"
        return (
            f"{found}, expected {len(columns)} between tabs: {'label, ' if labelled else ''}13 integers, 26 hashes"
            f"{hint}; {_FAULT_REMEDY}"
        )
    for name, field in zip(columns, fields, strict=True):
        if name == CRITEO_LABEL:
            good, expected = field in (b"0", b"1"), "the label 0 or 1"
        elif name in CRITEO_DENSE:
            # Criteo's numbers have a few digits; the limit keeps int() from a field of millions of digits.
            digits = re.fullmatch(rb"-?[0-9]{1,20}", field)
            good, expected = bool(digits) and -(1 << 31) <= int(field) < 1 << 31, "an integer of 32 bits, or nothing"
        else:
            good, expected = bool(re.fullmatch(rb"[0-9a-fA-F]{8}", field)), "8 hexadecimal digits, or nothing"
        if not good and (field or name == CRITEO_LABEL):
            header = " (Criteo's files have no header line)" if name == CRITEO_LABEL and field[:1].isalpha() else ""
            return f"{name} is {_shown(field)}, expected {expected}{header}; {_FAULT_REMEDY}"
    return None


def _shown(field: bytes) -> str:
    text = repr(field.decode("utf-8", "replace"))
    return text if len(text) <= 42 else f"{text[:40]}...' ({len(field):,} bytes)"
