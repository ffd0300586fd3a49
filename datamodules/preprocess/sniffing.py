"""A sample of a click log and the form of its files, found by reading parts of them.

Of large files of text, parts at even distances are read, because a log is often sorted by time; of compressed files the
beginning. Nothing here imports torch.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from datamodules.folder import consistent, failures_as_user_errors, file_system, is_remote
from datamodules.log_schema import Format
from datamodules.preprocess.dialect import decimal_of, fields_of, find_separator, has_header, nulls_of
from datamodules.preprocess.json_lines import lines_of_json
from datamodules.preprocess.sources import RawFile, check_no_nulls, check_text, find_files
from lightning_dlrm.contracts.documents import printable
from lightning_dlrm.contracts.errors import UserError, one_line, require

Value: TypeAlias = Any
"""A cell: None if it is missing, text in a file of text, else what Parquet or JSON hold."""

_SAMPLE_BYTES = 8 << 20  # of text, over all files
_SAMPLE_ROWS = 50_000  # of Parquet
_MOST_FILES = 8
_PIECES = 8  # of a large file


_BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}

_CRITEO = ", which need no schema: preprocess --dataset kaggle --protocol dlrm"


@dataclass(frozen=True, kw_only=True)
class Form:
    """The form of a log's files, in the words of a schema file."""

    format: Format
    separator: str = ","
    header: bool = True
    quote: str | None = '"'
    """None if quotes are ordinary characters."""
    decimal: str = "."
    encoding: str = "utf-8"
    nulls: tuple[str, ...] = ("",)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Some rows of a log."""

    form: Form
    columns: dict[str, list[Value]]
    """Name -> a value of each row, in the order of the files."""
    rows: int
    estimated_rows: int
    """Rows of the whole log, exact for Parquet and if ``whole``."""
    whole: bool
    """Whether the sample is the whole log."""
    read_as_missing: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Of text of fields: column -> how often it holds each of the form's ``nulls``."""


@dataclass(frozen=True)
class _Piece:
    """A part of a text file."""

    path: str
    text: bytes
    at_start: bool
    at_end: bool


def read_sample(paths: Sequence[str], names: Sequence[str] | None = None) -> Sample:
    """Read a sample of a log.

    Args:
        paths: CSV (of any separator), JSON-lines or Parquet files, all of one form; paths or URLs.
        names: of the columns of a text file without a header.

    Raises:
        UserError: a file cannot be read, is empty or of another form than the others; a row has more or fewer fields
            than the first one; a file has no header and no names are given.
    """
    require(paths, "no input files; give at least one")
    with failures_as_user_errors(paths[0]):
        if _is_parquet(paths[0]):
            require(names is None, "--columns names the columns of text without a header; Parquet files have names")
            return _sample_of_parquet(paths)
    files = find_files(_spread(paths, _MOST_FILES), of_criteo=False)
    pieces = [piece for file in files for piece in _pieces(file, _SAMPLE_BYTES // len(files))]
    read_as_missing: dict[str, Counter[str]] = {}
    require(any(piece.text.strip() for piece in pieces), f"{paths[0]} is empty; give files with rows")
    for piece in pieces:
        if piece.at_start:
            check_text(piece.path, piece.text)
    share = sum(len(piece.text) for piece in pieces) / max(_total_bytes(paths, files, pieces), 1)
    if pieces[0].text.lstrip(b"\xef\xbb\xbf \r\n\t")[:1] in (b"{", b"["):
        require(names is None, "--columns names the columns of text without a header; JSON has names")
        form, columns = _json_columns(pieces)
    else:
        form, texts = _csv_columns(pieces, names)
        nulls = set(form.nulls)
        read_as_missing = {name: Counter(cell for cell in cells if cell in nulls) for name, cells in texts.items()}
        columns = {name: [None if cell in nulls else cell for cell in cells] for name, cells in texts.items()}
    rows = len(next(iter(columns.values()), []))
    require(rows, f"{paths[0]} has no rows; give files with rows")
    whole = len(files) == len(paths) and all(piece.at_start and piece.at_end for piece in pieces)
    return Sample(
        form=form,
        columns=columns,
        rows=rows,
        estimated_rows=rows if whole else round(rows / share),
        whole=whole,
        read_as_missing=read_as_missing,
    )


def _spread(things: Sequence[Any], most: int) -> list[Any]:
    """Return at most so many of some things, at even distances, the first and the last one among them."""
    if len(things) <= most:
        return list(things)
    return [things[number * (len(things) - 1) // (most - 1)] for number in range(most)]


def _is_parquet(path: str) -> bool:
    if not is_remote(path):
        place = Path(path)
        if not place.is_file():
            return False  # find_files raises the error that names the fault
        with place.open("rb") as file:
            return file.read(4) == b"PAR1"
    system, inner = file_system(path)
    return bool(system.cat_file(inner, start=0, end=4) == b"PAR1")


def _total_bytes(paths: Sequence[str], files: Sequence[RawFile], pieces: Sequence[_Piece]) -> float:
    """Estimate the bytes of the text of all files; of compressed files it is taken to be four times as long."""
    total = 0.0
    for file in files:
        read = [piece for piece in pieces if piece.path == file.path]
        entire = all(piece.at_start and piece.at_end for piece in read)
        expansion = 1 if file.compression == "none" else 4
        total += sum(len(piece.text) for piece in read) if entire else file.size * expansion
    return total * len(paths) / len(files)


def _pieces(file: RawFile, most_bytes: int) -> Iterator[_Piece]:
    """Read parts of a text file, most_bytes together."""
    if file.compression != "none":
        try:
            with file.text() as reader:
                text = reader.read(most_bytes)
        except ValueError as error:
            raise UserError(f"{file.path}: {error}; download it again") from error
        yield _Piece(file.path, text, True, len(text) < most_bytes)
        return
    start = file.read(0, 4)
    # In UTF-16 a part may begin in the middle of a character.
    in_one = file.size <= most_bytes or start[:2] in _BYTE_ORDER_MARKS
    length = most_bytes if in_one else most_bytes // _PIECES
    for number in range(1 if in_one else _PIECES):
        at = 0 if in_one else number * (file.size - length) // (_PIECES - 1)
        yield _Piece(file.path, file.read(at, at + length), at == 0, at + length >= file.size)


def _encoding(pieces: Sequence[_Piece]) -> str:
    """Return the encoding of text: by its mark, UTF-8 if it is valid, else that of Western European spreadsheets."""
    start = pieces[0].text[:3]
    for mark, name in _BYTE_ORDER_MARKS.items():
        if start.startswith(mark):
            return name
    for piece in pieces:
        check_no_nulls(piece.path, piece.text)
    for name in ("utf-8", "cp1252"):
        try:
            for piece in pieces:
                # A part's first and last line may begin or end within a character.
                lines = piece.text if piece.at_start and piece.at_end else piece.text.partition(b"\n")[2]
                (lines if piece.at_end else lines.rpartition(b"\n")[0]).decode(name)
        except UnicodeDecodeError:
            continue
        return name
    return "latin-1"


def _whole_lines(piece: _Piece, encoding: str) -> str:
    """Return the whole lines of a part of a file, decoded."""
    if encoding == "utf-16":
        text = piece.text[: len(piece.text) // 2 * 2].decode(encoding, errors="replace")
        return text if piece.at_end else text.rpartition("\n")[0]
    lines = piece.text if piece.at_start else piece.text.partition(b"\n")[2]
    lines = lines if piece.at_end else lines.rpartition(b"\n")[0]
    return lines.decode(encoding)


def _json_columns(pieces: Sequence[_Piece]) -> tuple[Form, dict[str, list[Value]]]:
    encoding = _encoding(pieces)
    columns: dict[str, list[Value]] = {}
    rows = 0
    for piece in pieces:
        for number, line in enumerate(_whole_lines(piece, encoding).split("\n"), 1):
            if not line.strip():
                continue
            where = f"{piece.path}, line {number}" if piece.at_start else piece.path
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{where} is not JSON ({one_line(error)}); expected one JSON object in each line"
                    f"{lines_of_json(line.encode())}"
                ) from error
            require(
                isinstance(row, dict),
                f"{where} is not a JSON object; expected one object, such as {{...}}, in each line"
                f"{lines_of_json(line.encode())}",
            )
            for name, value in row.items():
                columns.setdefault(name, [None] * rows).append(None if value == "" else value)
            rows += 1
            for values in columns.values():
                values.extend([None] * (rows - len(values)))
    return Form(format="jsonl", encoding=encoding), columns


def _csv_columns(pieces: Sequence[_Piece], names: Sequence[str] | None) -> tuple[Form, dict[str, list[str]]]:
    """Return the form of text of fields, and the texts of each column."""
    encoding = _encoding(pieces)
    path = pieces[0].path
    with _naming(path):
        separator, quote = find_separator(_whole_lines(pieces[0], encoding))
    firsts, rows = _rows(pieces, encoding, separator, quote)
    decimal = decimal_of([*firsts.values(), *rows], separator)
    header = has_header(firsts[path], rows or list(firsts.values())[1:], decimal)
    if header:
        require(names is None, f"{path} has a header, {separator.join(firsts[path])[:80]!r}; leave --columns out")
        names = firsts[path]
        for other, row in firsts.items():
            require(
                row == names,
                f"{other} begins with {separator.join(row)[:80]!r}, and {path} with {separator.join(names)[:80]!r}; "
                "give files with the same header",
            )
    else:
        rows = [*firsts.values(), *rows]
    _check_names(path, names, firsts[path], separator)
    assert names is not None
    columns = {name: [row[number] for row in rows] for number, name in enumerate(names)}
    form = Form(
        format="csv",
        separator=separator,
        header=header,
        quote=quote,
        decimal=decimal,
        encoding=encoding,
        nulls=nulls_of(columns, decimal),
    )
    return form, columns


def _rows(
    pieces: Sequence[_Piece], encoding: str, separator: str, quote: str | None
) -> tuple[dict[str, list[str]], list[list[str]]]:
    """Return the first row of each file, and all others."""
    firsts: dict[str, list[str]] = {}
    rows: list[list[str]] = []
    for piece in pieces:
        with _naming(piece.path):
            found = list(fields_of(_whole_lines(piece, encoding), separator, quote))
            # The last line of a part may end, and the first one of a later part begin, within a quoted field.
            for number, row in found if piece.at_end else found[:-1]:
                first, head = next(iter(firsts.items()), (piece.path, row))
                expected = len(head)
                require(
                    len(row) == expected or not piece.at_start or piece.path in firsts,
                    f"its first line, {separator.join(row)[:80]!r}, has other columns than that of {first}, "
                    f"{separator.join(head)[:80]!r}; give files with the same header",
                )
                require(
                    len(row) == expected or not piece.at_start,
                    f"line {number} has {len(row)} fields and the first line {expected}; correct this line, or quote "
                    "fields that contain the separator",
                )
                if piece.at_start and piece.path not in firsts:
                    firsts[piece.path] = row
                elif len(row) == expected:
                    rows.append(row)
    return firsts, rows


def _check_names(path: str, names: Sequence[str] | None, first: Sequence[str], separator: str) -> None:
    start = separator.join(first)[:80]
    if names is None:
        require(
            len(first) != 40,
            f"{path} has no header, and 40 fields in its first line, as Criteo's own files have{_CRITEO}; if it is "
            "another log, name its columns with --columns",
        )
        example = "user,item,rating,time" if len(first) == 4 else ",".join(f"c{i + 1}" for i in range(len(first)))
        raise UserError(
            f"{path} has no header: its first line is {start!r}; name its {len(first)} columns, such as "
            f"--columns {example}"
        )
    require(
        len(names) == len(first),
        f"--columns names {len(names)} columns, and the first line of {path} has {len(first)}: {start!r}",
    )
    for name in names:
        require(
            printable(name) == name and "\n" not in name,
            f"{path}: the column {name!r} has control characters in its name; rename it",
        )
    _check_unique(path, names)


def _check_unique(path: str, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if list(names).count(name) > 1})
    require(not twice, f"{path}: two columns are named {', '.join(twice)!r}; rename one of them")


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Put a file's path before the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _sample_of_parquet(paths: Sequence[str]) -> Sample:
    read = _spread(paths, _MOST_FILES)
    columns: dict[str, list[Value]] = {}
    total = 0
    rows = 0
    for path in read:
        with failures_as_user_errors(path, remedy="check the file, or write it again"):
            system, inner = file_system(path) if is_remote(path) else (None, path)
            file = consistent(pq.ParquetFile(inner, filesystem=system), path, "write the file again")
            total += file.metadata.num_rows
            groups = _spread(range(file.num_row_groups), _PIECES)
            most = _SAMPLE_ROWS // (len(read) * max(len(groups), 1))
            firsts = (islice(file.iter_batches(most, row_groups=[group]), 1) for group in groups)
            tables = [pa.Table.from_batches(batches) for batches in map(list, firsts) if batches]
        table = pa.concat_tables(tables) if tables else file.schema_arrow.empty_table()
        _check_unique(path, table.column_names)
        require(
            not columns or list(columns) == table.column_names,
            f"{path} has the columns {', '.join(table.column_names)}, and {read[0]} {', '.join(columns)}; give files "
            "with the same columns",
        )
        for name, column in zip(table.column_names, table.columns, strict=True):
            columns.setdefault(name, []).extend(_python_values(column))
        rows += table.num_rows
    require(rows, f"{paths[0]} has no rows; give files with rows")
    total = round(total * len(paths) / len(read))
    return Sample(form=Form(format="parquet"), columns=columns, rows=rows, estimated_rows=total, whole=total == rows)


def _python_values(column: pa.ChunkedArray) -> list[Value]:
    if pa.types.is_timestamp(column.type):
        # Nanoseconds would need pandas.
        column = column.cast(pa.timestamp("us", column.type.tz), safe=False)
    return [None if value == "" else value for value in column.to_pylist()]
