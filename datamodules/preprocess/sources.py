"""Raw input files, given as paths or as URLs that fsspec knows."""

import codecs
import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

import pyarrow as pa

from datamodules.folder import failures_as_user_errors, file_system, is_remote
from datamodules.preprocess.journal import fingerprint
from lightning_dlrm.contracts.errors import UserError, nearest_path, one_line, require

Compression = Literal["none", "gzip", "zstd"]

_MAGIC: dict[bytes, Compression] = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_TAR, _TAR_AT = b"ustar", 257
_FOREIGN = {
    b"PAR1": "a Parquet file",
    b"PK\x03\x04": "a zip archive",
    b"\xd0\xcf\x11\xe0": "an Excel workbook",
    b"SQLite format 3": "an SQLite database",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x89HDF": "an HDF5 file",
    b"ORC": "an ORC file",
    b"ARROW1": "an Arrow file",
    b"\xef\xbb\xbf": "text with a byte order mark",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}
"""First bytes of files that are often given instead of raw text."""
_OF_LOGS = ("a Parquet file", "text with a byte order mark", "text in UTF-16")
"""Formats of ``_FOREIGN`` that the schema of a log can read."""
_REMEDIES = {
    "a zip archive": "unpack it",
    "compressed by bzip2": "unpack it: bunzip2",
    "compressed by xz": "unpack it: unxz",
    "an Excel workbook": "save its sheet as CSV",
    "an SQLite database": "export its table as CSV",
}
"""What to do with files of ``_FOREIGN``, if it is not to convert them."""
_CRITEO_REMEDY = "convert it to text, or use a schema without 'format: criteo'"
_FIRST_BYTES = 16
_SUFFIX: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
_NAMES = {"gzip": "gzip", "zstd": "Zstandard"}
_PIECE = 1 << 20
_LEAST_PIECE = 8 << 20
_PIECES = 8
"""Of a file that is large enough: the first pieces take longest, as their memory is new to the process."""


@dataclass(frozen=True, kw_only=True)
class RawFile:
    """A raw file in a certain state: a file with another size or modification time is another raw file."""

    path: str
    name: str
    size: int
    """Bytes, as stored."""
    stamp: str
    """The modification time, or what fsspec has instead."""
    compression: Compression

    @property
    def key(self) -> str:
        """Identifies this state of this file."""
        return fingerprint(asdict(self))[:16]

    def piece_bytes(self, most: int) -> int:
        """Return the length of pieces of the file: at most ``most`` bytes; of a file that is not small, equal ones, an
        even number of them."""
        count = max(-(-self.size // most), min(self.size // _LEAST_PIECE, _PIECES))
        return most if self.size < _LEAST_PIECE else -(-self.size // (count + count % 2))

    def contains(self, byte: bytes, start: int) -> bool:
        """Return whether a byte stands in the stored file from ``start`` on; true if looking would take long."""
        if is_remote(self.path):
            return True
        with _named(self.path), Path(self.path).open("rb") as file:
            file.seek(start)
            return any(byte in piece for piece in iter(lambda: file.read(_PIECE), b""))

    def read(self, start: int, stop: int) -> bytes:
        """Return the stored bytes ``start`` to ``stop``, fewer at the end of the file.

        Raises:
            UserError: the file cannot be read.
        """
        with _named(self.path):
            if is_remote(self.path):
                system, path = file_system(self.path)
                return cast(bytes, system.cat_file(path, start=start, end=min(stop, self.size)))
            with Path(self.path).open("rb") as file:
                file.seek(start)
                return file.read(stop - start)

    @contextmanager
    def text(self, encoding: str | None = None) -> Iterator["TextReader"]:
        """Open the uncompressed text for reading from its beginning.

        Args:
            encoding: of the text, which is read as UTF-8; None to read it as it is.
        """
        with _named(self.path):
            stored = self._opened()
        with closing(stored):
            yield TextReader(self, stored, encoding)

    def _opened(self) -> Any:
        if is_remote(self.path):
            system, path = file_system(self.path)
            return system.open(path, "rb")
        return Path(self.path).open("rb")


class TextReader:
    """The uncompressed text of a file."""

    def __init__(self, source: RawFile, stored: IO[bytes], encoding: str | None = None):
        self.source, self.stored = source, stored
        self._decoder = None if encoding is None else codecs.getincrementaldecoder(encoding)()
        self._decoded = b""
        self._file: Any
        if source.compression == "gzip":
            self._file = gzip.GzipFile(fileobj=stored)
        elif source.compression == "zstd":
            self._file = pa.CompressedInputStream(pa.PythonFile(stored, mode="r"), "zstd")
        else:
            self._file = stored

    def read(self, size: int) -> bytes:
        """Return the next bytes, as many as requested unless the file ends.

        Raises:
            ValueError: the file is truncated or corrupt, or has another encoding.
            UserError: the file cannot be read.
        """
        if self._decoder is None:
            return self._read(size)
        while len(self._decoded) < size:
            stored = self._read(_PIECE)
            self._decoded += self._decoder.decode(stored, final=not stored).encode()
            if not stored:
                break
        found, self._decoded = self._decoded[:size], self._decoded[size:]
        return found

    def _read(self, size: int) -> bytes:
        name = _NAMES.get(self.source.compression)
        pieces, missing = [], size
        while missing:
            try:
                piece = self._file.read(min(missing, _PIECE))
            except EOFError:
                raise ValueError(f"truncated {name}: its end is missing") from None
            except (gzip.BadGzipFile, zlib.error, pa.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno and not isinstance(error, gzip.BadGzipFile):
                    with failures_as_user_errors(self.source.path):
                        raise
                words = one_line(error)
                if "runcated" in words:
                    raise ValueError(f"truncated {name}: its end is missing") from error
                raise ValueError(f"corrupt {name} ({words})") from error
            if not piece:
                break
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)


def find_files(paths: Sequence[str], of_criteo: bool = True) -> list[RawFile]:
    """Find the input files.

    Args:
        paths: of the files.
        of_criteo: whether they should be Criteo's text; otherwise they may be Parquet, and text in any encoding.

    Raises:
        UserError: there are no files, or a file is missing, unreadable, a folder, given twice, or not compressed as its
            suffix says.
    """
    require(paths, "no input files; give at least one")
    seen: dict[str, str] = {}
    files = []
    for path in paths:
        require(path, "an input is an empty text; name a file")
        with _named(path):
            files.append((_find_remote if is_remote(path) else _find_local)(path, of_criteo))
        same = path if is_remote(path) else str(Path(path).resolve())
        require(same not in seen, f"{path} is given twice (as {seen.get(same)}); name each file once")
        seen[same] = path
    return files


def _find_local(path: str, of_criteo: bool) -> RawFile:
    place = Path(path)
    require(not place.is_dir(), f"{path} is a folder; name the files in it")
    if not place.exists():
        raise UserError(f"{path} does not exist{nearest_path(place) or '; check the path, or download the file'}")
    require(
        place.is_file() and os.access(place, os.R_OK),
        f"{path} cannot be read; expected a readable file: check its type and permissions",
    )
    with place.open("rb") as file:
        return RawFile(
            path=str(place.absolute()),
            name=place.name,
            size=place.stat().st_size,
            stamp=str(place.stat().st_mtime_ns),
            compression=_compression(path, file.read(_FIRST_BYTES), of_criteo),
        )


def _find_remote(path: str, of_criteo: bool) -> RawFile:
    system, inner = file_system(path)
    info = system.info(inner)
    require(info["type"] == "file", f"{path} is a folder; name the files in it")
    require(
        info["size"] is not None,
        f"{path}: its server does not report the size of the file; download the file and give its path",
    )
    with system.open(inner, "rb", cache_type="none") as file:
        start = file.read(_FIRST_BYTES)
        # Fails if the server would send the whole file for each part of it.
        file.seek(max(info["size"] - 1, 0))
        file.read(1)
    return RawFile(
        path=path,
        name=inner.rstrip("/").rpartition("/")[2],
        size=info["size"],
        stamp=str(system.checksum(inner)),
        compression=_compression(path, start, of_criteo),
    )


def _foreign(start: bytes) -> str | None:
    """Return what a file is by its first bytes; None for other text, and for what can be read compressed."""
    return next((words for magic, words in _FOREIGN.items() if start.startswith(magic)), None)


def _compression(path: str, start: bytes, of_criteo: bool) -> Compression:
    foreign = _foreign(start)
    if foreign == "a zip archive" and Path(path).suffix in (".xlsx", ".xlsm"):
        foreign = "an Excel workbook"
    if of_criteo:
        expected_form, remedy = "raw Criteo text, plain, gzip or Zstandard", _CRITEO_REMEDY
    else:
        foreign = None if foreign in _OF_LOGS else foreign
        expected_form = "CSV or JSON lines, plain, gzip or Zstandard, or Parquet"
        remedy = _REMEDIES.get(foreign or "", "convert it")
    require(foreign is None, f"{path} is {foreign}; expected {expected_form}: {remedy}")
    found: Compression = next((name for magic, name in _MAGIC.items() if start.startswith(magic)), "none")
    expected = _SUFFIX.get(Path(path).suffix, "none")
    require(
        found != "none" or expected == "none" or not start,
        f"{path} is named {Path(path).suffix} but is not {_NAMES.get(expected)}; rename it if it is plain text, or "
        "download it again",
    )
    return found


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Turn failures of a file system into one line that names the file."""
    with failures_as_user_errors(path):
        try:
            yield
        except FileNotFoundError as error:
            raise UserError(f"{path} does not exist; check the path, or download the file") from error


def check_text(path: str, start: bytes) -> None:
    """Check that the beginning of an uncompressed file is that of text with line feeds.

    Raises:
        UserError: it is that of another kind of file, or has null bytes, or carriage returns as line ends.
    """
    is_tar = start[_TAR_AT : _TAR_AT + len(_TAR)] == _TAR
    inside = "a tar archive" if is_tar else _foreign(start)
    require(
        inside is None or "text" in inside,
        f"{path} holds {inside}; expected CSV or JSON lines: {'unpack it' if is_tar else 'decompress it once'}",
    )
    if inside is None:
        check_no_nulls(path, start.partition(b"\n")[0])
    require(
        b"\n" in start or b"\r" not in start.rstrip(),
        f"{path} has carriage returns as line ends; make them line feeds: tr '\\r' '\\n'",
    )


def check_no_nulls(path: str, text: bytes) -> None:
    """
    Raises:
        UserError: text has null bytes, which other kinds of files and UTF-16 have.
    """
    if b"\0" not in text:
        return
    if path.endswith(".parquet"):
        raise UserError(f"{path} is not a Parquet file, which begins and ends with PAR1; write it again")
    raise UserError(
        f"{path} has null bytes; expected text, or a Parquet file: if it is UTF-16, write it with a byte order mark; "
        "convert another kind of file"
    )
