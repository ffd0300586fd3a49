"""Stage: turn a piece of a raw file into a segment, which holds its numbers and, for each categorical column, the
distinct values and codes into them; and open segments.

Segments are Arrow files without compression, not Parquet. On one core, 138,000 rows take 19 ms to
write, and no time to map; dictionary-encoded Parquet takes 84 ms to write and 45 ms to read, because
it looks for the distinct values again. With the narrowest integers a row takes 86 bytes, in Parquet
52, as text 244.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from datamodules.preprocess.criteo_tsv import BadLineError
from datamodules.preprocess.journal import record, recorded, written_aside
from datamodules.preprocess.log_columns import segment_of
from datamodules.preprocess.sources import RawFile
from datamodules.preprocess.splits import Span, SplitRule
from datamodules.preprocess.table_encoding import Table
from lightning_dlrm.contracts.errors import require
from lightning_dlrm.contracts.schema import CRITEO_LABEL, SPLITS, SplitName

PIECE_BYTES = 30 << 20
"""Text of a segment: about 125,000 rows, for which a worker needs about 150 MB. glibc would map blocks of 32 MB or more
anew for every piece."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A file of staged rows."""

    path: Path
    start: int
    """Its first row, counted over all files."""
    rows: int
    distinct: Mapping[str, int]
    """Distinct hashes of each categorical column."""


class StagedRows:
    """Rows in the form of a segment."""

    def __init__(self, batch: pa.RecordBatch):
        self._batch = batch

    @cached_property
    def labels(self) -> np.ndarray | None:
        """Labels int8 [n]; None if rows have no labels."""
        return self._batch.column(CRITEO_LABEL).to_numpy() if CRITEO_LABEL in self._batch.schema.names else None

    def numbers(self, name: str, rows: np.ndarray | slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Return values int32 [n], or float64 [n] of a log, 0 where missing, and whether each is missing, bool [n]."""
        column = self.column(name, rows)
        missing = column.is_null().to_numpy(zero_copy_only=False)
        values = column.fill_null(0).to_numpy()
        return values if values.dtype == np.float64 else values.astype(np.int32), missing

    @cached_property
    def split_keys(self) -> np.ndarray | None:
        """What a log is split by: int64 [n] times, or int8 [n] positions in ``SPLITS``; None if by neither."""
        return self._batch.column("split").to_numpy() if "split" in self._batch.schema.names else None

    def column(self, name: str, rows: np.ndarray | slice = slice(None)) -> pa.Array:
        column = self._batch.column(name)
        return column[rows] if isinstance(rows, slice) else column.take(pa.array(rows))

    def categories(self, table: Table) -> tuple[pa.Array, np.ndarray, np.ndarray | None]:
        """Return the values of a table's column.

        Returns:
            Distinct values [d] in no order, which may repeat: uint32 or strings; codes [n] into them, d for missing;
            and, if the column has bags, where the bag of each row begins and the last one ends, int32 [rows + 1].
        """
        if table.bins is not None:
            values, missing = self.numbers(table.source)
            binned = pa.array(table.binned(values), mask=missing).dictionary_encode()
            return binned.dictionary, binned.indices.fill_null(len(binned.dictionary)).to_numpy(), None
        column, ends = self._batch.column(table.source), None
        if table.bag:
            ends, column = column.offsets.to_numpy(), column.values
        return column.dictionary[:-1], column.indices.to_numpy(), ends


class OpenSegment(StagedRows, AbstractContextManager["OpenSegment"]):
    """A segment mapped into memory; only the columns that are used are read."""

    def __init__(self, segment: Segment):
        self.segment = segment
        self._file = pa.memory_map(str(segment.path))
        super().__init__(pa.ipc.open_file(self._file).get_batch(0))

    def __exit__(self, *_: object) -> None:
        self._file.close()


@lru_cache(maxsize=2)
def load_segments(path: Path) -> list[Segment]:
    """Load the list of segments that ``save_segments`` wrote."""
    found = recorded(path)
    require(found is not None, f"{path} is damaged; start the command again")
    assert found is not None
    return [Segment(**{**entry, "path": path.parent / entry["path"]}) for entry in found["segments"]]


def save_segments(path: Path, segments: Sequence[Segment]) -> None:
    entries = [{**vars(segment), "path": os.path.relpath(segment.path, path.parent)} for segment in segments]
    record(path, {"segments": entries})


def rows_of(rule: SplitRule, opened: OpenSegment, splits: Sequence[SplitName]) -> np.ndarray | slice:
    """Return the rows of a segment that belong to some splits, in order."""
    segment = opened.segment
    if rule.arithmetic:
        if len(splits) == len(SPLITS):
            return slice(0, segment.rows)
        span = next((span for span in rule.spans if span.split == splits[0]), Span(split=splits[0], start=0, stop=0))
        start = min(max(span.start - segment.start, 0), segment.rows)
        return slice(start, max(min(span.stop - segment.start, segment.rows), start))
    codes = rule.split_of(segment.start, segment.rows, opened.labels, opened.split_keys)
    rows = np.flatnonzero(codes >= 0 if len(splits) == len(SPLITS) else codes == SPLITS.index(splits[0]))
    # Slices of columns are views.
    return slice(rows[0], rows[-1] + 1) if len(rows) and rows[-1] - rows[0] == len(rows) - 1 else rows


class Reader(ABC):
    """Reader of the pieces of a file, which become segments."""

    labelled: bool
    """Whether rows have labels."""
    header_lines: int = 0
    """Lines before those of the first piece."""
    expected: ClassVar[str]
    """What rows should be, for messages."""

    @property
    def rows(self) -> int | None:
        """Rows of the file, if they are known."""
        return None

    @property
    def unit(self) -> str:
        """What messages count: lines of text, or rows."""
        return "line"

    @property
    @abstractmethod
    def key(self) -> list[Any]:
        """What segments depend on apart from the file, as JSON values."""

    def jobs(self, source: RawFile, piece_bytes: int) -> list[tuple[int | None, range | None]]:
        """Return the pieces that can be read alone, and the numbers of the segments of each; None and None for a file
        that can only be read from its beginning."""
        if source.compression != "none":
            return [(None, None)]
        return [(index, range(index, index + 1)) for index in range(-(-source.size // piece_bytes))]

    @abstractmethod
    def pieces(self, source: RawFile, index: int | None, piece_bytes: int) -> Iterator[Any]:
        """Yield the parts of a piece, each of which becomes a segment."""

    @abstractmethod
    def parse(self, piece: Any) -> list[pa.Table]:
        """Return the rows of a part as columns of segments, or raise BadLineError."""

    @abstractmethod
    def parse_good(self, piece: Any) -> tuple[list[pa.Table], list[tuple[int, str]]]:
        """Return the good rows of a part, and the line and fault of each bad one."""

    @abstractmethod
    def count_lines(self, piece: Any, rows: int) -> int:
        """Return the lines of a part, given its rows."""


@dataclass(frozen=True, kw_only=True)
class StageJob:
    """A piece of a raw file, or a whole file that can only be read from its beginning, to make segments of."""

    source: RawFile
    reader: Reader
    index: int | None
    """The piece; None for the whole file."""
    segments: range | None
    """Numbers of the piece's segments; None for the whole file."""
    folder: Path
    """The folder of the file's segments."""
    piece_bytes: int
    skip_bad_rows: bool


def segment_path(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}"


def stage(job: StageJob) -> list[dict[str, Any]]:
    """Make the segments of a piece of a file, or all segments of a file that can only be read from its beginning.

    If a job was begun before, it is read again, but only its new segments are parsed.

    Returns:
        The facts of the segments, in order. If bad rows are not to be skipped and a segment has one, its facts are only
        ``bad_line``, it is not written, and it is the last.

    Raises:
        UserError: the file is truncated or corrupt, or cannot be read.
    """
    whole, numbers = job.folder / "whole", job.segments
    if numbers is None and (done := recorded(whole)):
        numbers = range(done["segments"])
    if numbers is not None:
        found = [recorded(segment_path(job.folder, number)) for number in numbers]
        if None not in found:  # None: it was damaged since
            return [facts for facts in found if facts]
    facts: list[dict[str, Any]] = []
    first = job.segments.start if job.segments else 0
    for number, piece in enumerate(job.reader.pieces(job.source, job.index, job.piece_bytes), first):
        path = segment_path(job.folder, number)
        facts.append(recorded(path) or _stage(job, path, piece, job.reader.header_lines if number == 0 else 0))
        if "bad_line" in facts[-1]:
            return facts
    if job.segments is None:
        record(whole, {"segments": len(facts)})
    return facts


def _stage(job: StageJob, path: Path, piece: Any, header_lines: int) -> dict[str, Any]:
    try:
        tables, bad = job.reader.parse_good(piece) if job.skip_bad_rows else (job.reader.parse(piece), [])
    except BadLineError as error:
        return {"bad_line": [header_lines + error.line, error.fault]}
    bad = [(header_lines + line, fault) for line, fault in bad]
    size = len(piece) if isinstance(piece, bytes) else piece.nbytes
    lines = header_lines + job.reader.count_lines(piece, sum(table.num_rows for table in tables) + len(bad))
    facts: dict[str, Any] = {"lines": lines, "text_bytes": size, "bad": bad, "rows": 0}
    del piece
    files: tuple[Path, ...] = ()
    if tables:
        batch, more = segment_of(tables)
        facts.update(more)
        arrow = path.with_suffix(".arrow")
        with (
            written_aside(arrow) as partial,
            pa.OSFile(str(partial), "wb") as file,
            pa.ipc.new_file(file, batch.schema) as writer,
        ):
            writer.write_batch(batch)
        files = (arrow,)
    return record(path, facts, files)
