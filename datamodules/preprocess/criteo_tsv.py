"""Raw Criteo TSV -> Arrow tables, block by block, in bounded memory.

A line is ``label \\t I1..I13 \\t C1..C26``: the label is 0 or 1, the integers fit int32, the
categorical values are hashes of 8 hexadecimal digits; an integer or a hash may be empty (missing).
Files are plain or gzip (told by their first bytes), lines end with LF or CRLF, the last one
possibly with nothing.

Parsing is done twice over: a fast way that only notices that something is wrong with a block, and
a slow, exact one that then says what and where, so that good input pays nothing for clear errors.

Why pyarrow parses: measured on 1M generated rows (264 MB, 2 cores), ``pyarrow.csv`` with the types
given takes 0.51 s (8 MB pieces in two threads; 1.5 s with guessed types), polars 2.2 s, and polars
decoding the hashes too 1.7 s; pyarrow is needed for Parquet anyway. It has no hexadecimal column
type: hashes are read as 8 fixed bytes, and numpy turns pairs of digits into bytes by one table
lookup each (26M hashes in 0.2 s).
"""

import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np
import pyarrow as pa
import pyarrow.csv

from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import CRITEO_CATEGORICAL, CRITEO_DENSE, CRITEO_LABEL

COLUMNS = (CRITEO_LABEL, *CRITEO_DENSE, *CRITEO_CATEGORICAL)
RAW_SCHEMA = pa.schema(
    [(CRITEO_LABEL, pa.int8())]
    + [(name, pa.int32()) for name in CRITEO_DENSE]
    + [(name, pa.uint32()) for name in CRITEO_CATEGORICAL]
)
"""What a block is parsed to; null = missing."""

BLOCK_BYTES = 8 << 20  # what one thread parses at a time
_ARROW_BLOCK_BYTES = 1 << 20  # pyarrow's own step within it: larger ones fall out of the cache and run at half speed
_MAX_LINE_BYTES = 1 << 20  # a Criteo line has about 250; a limit, so that a file without line ends is not read whole

_GZIP_MAGIC = b"\x1f\x8b"
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


@dataclass(frozen=True, kw_only=True)
class Block:
    """Whole lines of a file, each ending with a line feed."""

    path: Path
    first_line: int
    """1-based."""
    lines: int
    data: bytes


class TsvFile:
    """A raw file, opened for reading block by block.

    Args:
        path: plain text or gzip.
        block_bytes: size of a block of uncompressed text; a longer line makes a longer block.
    """

    def __init__(self, path: Path, block_bytes: int = BLOCK_BYTES):
        self.path = path
        self.bytes = path.stat().st_size
        self.bytes_read = 0
        """Of the file as stored, so of the compressed bytes in gzip: what progress is measured in."""
        self._block_bytes = block_bytes

    def blocks(self) -> Iterator[Block]:
        """The file's lines, in order.

        Raises:
            UserError: the file is empty, truncated or corrupt gzip, or has no line ends.
        """
        rest = b""
        line = 1
        with self.path.open("rb") as stored, _decompressed(stored, self.path) as text:
            while chunk := self._read(text, line):
                self.bytes_read = stored.tell()
                end = chunk.rfind(b"\n") + 1
                if not end and len(rest) + len(chunk) > _MAX_LINE_BYTES:
                    raise explain(Block(path=self.path, first_line=line, lines=1, data=rest + chunk))
                data, rest = (rest + chunk[:end], chunk[end:]) if end else (b"", rest + chunk)
                if data:
                    yield (block := self._block(line, data))
                    line += block.lines
            if rest:
                yield self._block(line, rest + b"\n")
            elif line == 1:
                raise UserError(
                    f"{self.path} is empty; expected Criteo lines of {len(COLUMNS)} fields: download it again"
                )

    def _block(self, first_line: int, data: bytes) -> Block:
        return Block(path=self.path, first_line=first_line, lines=data.count(b"\n"), data=data)

    def _read(self, text: IO[bytes], line: int) -> bytes:
        try:
            return text.read(self._block_bytes)
        except EOFError:
            fault = "truncated gzip: its end is missing"
        except (gzip.BadGzipFile, zlib.error) as error:
            fault = f"corrupt gzip ({error})"
        raise UserError(f"{self.path}, after line {line - 1:,}: {fault}; download the file again")


@contextmanager
def _decompressed(stored: IO[bytes], path: Path) -> Iterator[IO[bytes]]:
    magic = stored.read(len(_GZIP_MAGIC))
    stored.seek(0)
    if magic == _GZIP_MAGIC:
        with gzip.GzipFile(fileobj=stored) as text:
            yield cast(IO[bytes], text)
    elif path.suffix == ".gz" and magic:
        raise UserError(f"{path} is named .gz but is not gzip; rename it if it is plain text, or download it again")
    else:
        yield stored


def parse(block: Block) -> pa.Table:
    """The rows of a block as ``RAW_SCHEMA``.

    Raises:
        UserError: a line is not a Criteo line; names the first such line of the block.
    """
    # pyarrow reads '0x1F' and ' 31' as integers and a lone carriage return as a line end: none of these is Criteo.
    if any(byte in block.data for byte in (b" ", b"x", b"X")):
        raise explain(block)
    try:
        table = pyarrow.csv.read_csv(
            pa.BufferReader(block.data),
            read_options=pyarrow.csv.ReadOptions(
                column_names=COLUMNS, use_threads=False, block_size=_ARROW_BLOCK_BYTES
            ),
            parse_options=_PARSE,
            convert_options=_CONVERT,
        )
    except pa.ArrowInvalid as error:
        raise explain(block) from error
    label = table.column(CRITEO_LABEL)
    if table.num_rows != block.lines or label.null_count or not np.isin(label.to_numpy(), (0, 1)).all():
        raise explain(block)
    columns = {name: table.column(name) for name in COLUMNS}
    for name in CRITEO_CATEGORICAL:
        hashes = _decode_hashes(columns[name].combine_chunks())
        if hashes is None:
            raise explain(block)
        columns[name] = hashes
    return pa.table(columns, schema=RAW_SCHEMA)


def _pair_values() -> np.ndarray:
    """uint16 [65536]: the byte that two hexadecimal digits spell, at the two characters read as
    one uint16 of this machine's byte order; 0xFFFF where they are not hexadecimal."""
    table = np.full(1 << 16, 0xFFFF, np.uint16)
    digits = "0123456789abcdefABCDEF"
    pairs = [high + low for high in digits for low in digits]
    table[np.frombuffer("".join(pairs).encode(), np.uint16)] = [int(pair, 16) for pair in pairs]
    return table


_PAIR_VALUES = _pair_values()


def _decode_hashes(digits: pa.FixedSizeBinaryArray) -> pa.Array | None:
    """uint32 values of 8 hexadecimal digits each, nulls kept; None if a digit is not hexadecimal."""
    first = digits.offset * _HASH_DIGITS
    chars = np.frombuffer(digits.buffers()[1], np.uint8)[first : first + len(digits) * _HASH_DIGITS]
    missing = None
    if digits.null_count:
        missing = digits.is_null().to_numpy(zero_copy_only=False)
        chars = chars.reshape(-1, _HASH_DIGITS).copy()
        chars[missing] = ord("0")
        chars = chars.reshape(-1)
    pairs = np.take(_PAIR_VALUES, chars.view(np.uint16))
    if pairs.max(initial=0) > 0xFF:
        return None
    return pa.array(pairs.astype(np.uint8).view(">u4").astype(np.uint32), mask=missing)


def explain(block: Block) -> UserError:
    """What is wrong with the first bad line of a block, by a slow and exact look at each line."""
    for number, line in enumerate(block.data.removesuffix(b"\n").split(b"\n"), block.first_line):
        fault = _fault(line.removesuffix(b"\r"))
        if fault:
            return UserError(f"{block.path}, line {number:,}: {fault}")
    last = block.first_line + block.lines - 1
    return UserError(f"{block.path}, lines {block.first_line:,} to {last:,}: not Criteo lines; download the file again")


_FAULT_REMEDY = "correct or remove the line, or download the file again"


def _fault(line: bytes) -> str | None:
    """What is wrong with a line and what to do; None for a good one."""
    if b"\0" in line:
        return "binary data, expected text; unpack the archive or download the file again"
    fields = line.split(b"\t")
    if len(fields) != len(COLUMNS):
        hint = " (rows without labels, such as Kaggle's test.txt, cannot be preprocessed)" if len(fields) == 39 else ""
        return (
            f"{len(fields)} fields, expected {len(COLUMNS)} between tabs: label, 13 integers, 26 hashes{hint}; "
            f"{_FAULT_REMEDY}"
        )
    for name, field in zip(COLUMNS, fields, strict=True):
        expected = None
        if name == CRITEO_LABEL:
            if field not in (b"0", b"1"):
                expected = "the label 0 or 1"
        elif not field:
            continue
        elif name in CRITEO_DENSE:
            # Criteo's numbers have a few digits; the limit keeps int() from a line of millions.
            if not re.fullmatch(rb"-?[0-9]{1,20}", field) or not -(1 << 31) <= int(field) < 1 << 31:
                expected = "an integer of 32 bits, or nothing"
        elif not re.fullmatch(rb"[0-9a-fA-F]{8}", field):
            expected = "8 hexadecimal digits, or nothing"
        if expected:
            return f"{name} is {_shown(field)}, expected {expected}; {_FAULT_REMEDY}"
    return None


def _shown(field: bytes) -> str:
    text = repr(field.decode("utf-8", "replace"))
    return text if len(text) <= 42 else f"{text[:40]}...' ({len(field):,} bytes)"
