"""Stage: turn a piece of a raw file into a segment, which holds its integers and, for each categorical column, the
distinct hashes and codes into them; and open segments.

Segments are Arrow files without compression rather than Parquet: per 138,000 rows (one core) 19 ms
to write and nothing to map, where dictionary-encoded Parquet takes 84 and 45 ms, as it would look
for the distinct values once more; the narrowest integers make them 86 bytes a row, Parquet 52, the
text itself 244.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datamodules.preprocess.criteo_tsv import (
    BadLineError,
    parse,
    parse_good,
    piece_of_plain,
    pieces_of_text,
)
from datamodules.preprocess.journal import record, recorded, written_aside
from datamodules.preprocess.protocols import Span, SplitRule, Table
from datamodules.preprocess.sources import RawFile
from lightning_dlrm.contracts.errors import require
from lightning_dlrm.contracts.schema import CRITEO_CATEGORICAL, CRITEO_DENSE, CRITEO_LABEL, SPLITS, SplitName

PIECE_BYTES = 30 << 20
"""Text of a segment: about 125,000 rows, for which a worker needs about 150 MB. glibc would map blocks of 32 MB or more
anew for every piece."""

_INTEGERS = ((7, pa.int8()), (15, pa.int16()), (31, pa.int32()))


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A file of staged rows."""

    path: Path
    start: int
    """Its first row, counted over all files."""
    rows: int
    distinct: Mapping[str, int]
    """Distinct hashes of each categorical column."""


class OpenSegment(AbstractContextManager["OpenSegment"]):
    """A segment mapped into memory; only the columns that are used are read."""

    def __init__(self, segment: Segment):
        self.segment = segment
        self._file = pa.memory_map(str(segment.path))
        self._batch = pa.ipc.open_file(self._file).get_batch(0)

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @cached_property
    def labels(self) -> np.ndarray | None:
        """Labels int8 [n]; None if rows have no labels."""
        return self._batch.column(CRITEO_LABEL).to_numpy() if CRITEO_LABEL in self._batch.schema.names else None

    def integers(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return values int32 [n], 0 where missing, and whether each is missing, bool [n]."""
        column = self._batch.column(name)
        missing = column.is_null().to_numpy(zero_copy_only=False)
        return column.fill_null(0).to_numpy().astype(np.int32), missing

    def categories(self, table: Table) -> tuple[np.ndarray, np.ndarray]:
        """Return distinct values uint32 [d] in no order, and codes [n] into them; d stands for missing."""
        if table.source in CRITEO_CATEGORICAL:
            column = self._batch.column(table.source)
            return column.dictionary.to_numpy()[:-1], column.indices.to_numpy()
        values, missing = self.integers(table.source)
        binned = pa.array(table.binned(values), mask=missing).dictionary_encode()
        return binned.dictionary.to_numpy(), binned.indices.fill_null(len(binned.dictionary)).to_numpy()


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
    codes = rule.split_of(segment.start, segment.rows, opened.labels)
    return np.flatnonzero(codes >= 0 if len(splits) == len(SPLITS) else codes == SPLITS.index(splits[0]))


@dataclass(frozen=True, kw_only=True)
class StageJob:
    """A piece of a raw file, or a whole compressed file, to make segments of."""

    source: RawFile
    index: int | None
    """The piece of a plain file; None for a whole compressed one."""
    folder: Path
    """The folder of the file's segments."""
    piece_bytes: int
    labelled: bool
    skip_bad_rows: bool


def segment_path(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}"


def stage(job: StageJob) -> list[dict[str, Any]]:
    """Make one segment of a plain file, or all segments of a compressed file.

    The text of a compressed file can only be read from its beginning: if the file was begun before, it is decompressed
    again, but only its new segments are parsed.

    Returns:
        The facts of the segments, in order. If bad rows are not to be skipped and a segment has one, its facts are only
        ``bad_line``, it is not written, and it is the last.

    Raises:
        UserError: the file is truncated or corrupt, or cannot be read.
    """
    if job.index is not None:
        path = segment_path(job.folder, job.index)
        return [recorded(path) or _stage(job, path, piece_of_plain(job.source, job.index, job.piece_bytes))]
    if done := recorded(job.folder / "whole"):
        found = [recorded(segment_path(job.folder, index)) for index in range(done["segments"])]
        if None not in found:  # None: it was damaged since
            return [facts for facts in found if facts]
    facts: list[dict[str, Any]] = []
    for index, text in enumerate(pieces_of_text(job.source, job.piece_bytes)):
        path = segment_path(job.folder, index)
        facts.append(recorded(path) or _stage(job, path, text))
        if "bad_line" in facts[-1]:
            return facts
    record(job.folder / "whole", {"segments": len(facts)})
    return facts


def _stage(job: StageJob, path: Path, text: bytes) -> dict[str, Any]:
    bad: list[tuple[int, str]] = []
    tables: list[pa.Table] = []
    if text and job.skip_bad_rows:
        tables, bad = parse_good(text, job.labelled)
    elif text:
        try:
            tables = [parse(text, job.labelled)]
        except BadLineError as error:
            return {"bad_line": [error.line, error.fault]}
    lines = sum(table.num_rows for table in tables) + len(bad)
    facts: dict[str, Any] = {"lines": lines, "text_bytes": len(text), "bad": bad, "rows": 0}
    del text
    files: tuple[Path, ...] = ()
    if tables:
        batch, more = _segment(pa.concat_tables(tables).unify_dictionaries(), job.labelled)
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


def _segment(table: pa.Table, labelled: bool) -> tuple[pa.RecordBatch, dict[str, Any]]:
    """Return a table of ``RAW_SCHEMA`` in the form of a segment, and its facts.

    Integers have the narrowest type that holds them; hashes are dictionaries of uint32 whose last
    entry, 0, stands for missing values.
    """
    missing, minimum, distinct = {}, {}, {}
    columns = {}
    if labelled:
        columns[CRITEO_LABEL] = table.column(CRITEO_LABEL).combine_chunks()
    for name in CRITEO_DENSE:
        values = table.column(name).combine_chunks()
        missing[name] = values.null_count
        bounds = pc.min_max(values).as_py()
        lowest, highest = min(bounds["min"] or 0, 0), max(bounds["max"] or 0, 0)
        minimum[name] = lowest if values.null_count or bounds["min"] is None else bounds["min"]
        columns[name] = values.cast(next(kind for bits, kind in _INTEGERS if max(highest, ~lowest) < 1 << bits))
    for name in CRITEO_CATEGORICAL:
        encoded = table.column(name).combine_chunks()
        missing[name] = encoded.null_count
        last = len(encoded.dictionary)
        distinct[name] = last
        kind = np.min_scalar_type(last)
        codes = encoded.indices.fill_null(last).to_numpy().astype(kind)
        values = np.append(encoded.dictionary.to_numpy(), np.uint32(0))
        columns[name] = pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(values), safe=False)
    facts = {"rows": table.num_rows, "missing": missing, "minimum": minimum, "distinct": distinct}
    return pa.record_batch(columns), facts
