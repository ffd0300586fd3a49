"""Encode: write the part files of the splits from segments and the ids of their distinct values."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.preprocess.encoding import Encoding, read_items, scratch_folder
from datamodules.preprocess.journal import record, recorded
from datamodules.preprocess.protocols import Table
from datamodules.preprocess.segments import OpenSegment, load_segments, rows_of
from datamodules.writer import ROWS_PER_FILE, SplitWriter, arrow_table
from lightning_dlrm.contracts.schema import CRITEO_DENSE, CRITEO_LABEL, SPLITS, Column, DataFile, SplitName


def rows_per_split(encoding: Encoding, numbers: range) -> np.ndarray:
    """Count the rows of each segment in each split of ``SPLITS``: int64 [segments, splits]."""
    result = np.zeros((len(numbers), len(SPLITS)), np.int64)
    for i, segment in enumerate(load_segments(encoding.segments)[numbers.start : numbers.stop]):
        with OpenSegment(segment) as opened:
            for j, split in enumerate(SPLITS):
                rows = rows_of(encoding.rule, opened, (split,))
                result[i, j] = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
    return result


@dataclass(frozen=True, kw_only=True)
class PartJob:
    """A part file to write, and its rows."""

    encoding: Encoding
    columns: tuple[Column, ...]
    split: SplitName
    part: int
    pieces: tuple[tuple[int, int, int], ...]
    """(segment, how many of its rows in the split to skip, how many to take), in order."""

    @property
    def record_path(self) -> Path:
        return self.encoding.folder / "parts" / f"{self.split}-{self.part:05d}"


def part_jobs(encoding: Encoding, columns: tuple[Column, ...], rows: np.ndarray) -> Iterator[PartJob]:
    """Yield the part files of all splits.

    Args:
        rows: int64 [segments, splits], as ``rows_per_split``.
    """
    for split, of_split in zip(SPLITS, rows.T, strict=True):
        ends = np.cumsum(of_split)
        total = int(ends[-1])
        for part, start in enumerate(range(0, total, ROWS_PER_FILE)):
            stop = min(start + ROWS_PER_FILE, total)
            pieces = []
            segment = int(np.searchsorted(ends, start, side="right"))
            while start < stop:
                take = min(stop, int(ends[segment])) - start
                if take:
                    pieces.append((segment, int(start - (ends[segment] - of_split[segment])), take))
                start, segment = start + take, segment + 1
            yield PartJob(encoding=encoding, columns=columns, split=split, part=part, pieces=tuple(pieces))


def encode_part(job: PartJob) -> tuple[DataFile, int | None]:
    """Write one part file.

    Returns:
        The file, and its rows with label 1, None of rows without labels.
    """
    encoding = job.encoding
    if (facts := recorded(job.record_path)) is None:
        segments = load_segments(encoding.segments)
        with scratch_folder(encoding, job.record_path.name) as scratch, ExitStack() as stack:
            writer = SplitWriter(scratch, job.split, job.columns, first_part=job.part)
            stack.callback(writer.abandon)
            ids = _Ids(encoding)
            for number, skip, take in job.pieces:
                with OpenSegment(segments[number]) as opened:
                    rows = rows_of(encoding.rule, opened, (job.split,))
                    rows = (
                        slice(rows.start + skip, rows.start + skip + take)
                        if isinstance(rows, slice)
                        else rows[skip : skip + take]
                    )
                    writer.append(arrow_table(job.columns, _encoded(encoding, opened, number, rows, ids, job.columns)))
            split = writer.close()
            (file,) = split.files
            place = encoding.result / file.path
            place.parent.mkdir(parents=True, exist_ok=True)
            (scratch / file.path).replace(place)
        facts = {"file": asdict(file), "positives": split.positives}
        record(job.record_path, facts, (place,), {place: file.sha256})
    file = DataFile(**{**facts["file"], "row_groups": tuple(facts["file"]["row_groups"])})
    return file, facts["positives"]


class _Ids:
    """Reads the ids of the segments' distinct values."""

    def __init__(self, encoding: Encoding):
        self._encoding = encoding
        self._ends = {table.name: np.fromfile(encoding.ends(table), np.int64) for table in encoding.protocol.tables()}

    def of(self, table: Table, segment: int) -> np.ndarray:
        """Return the ids of a segment's distinct values, int32 [d + 1]."""
        begin, end = self._ends[table.name][segment : segment + 2]
        return read_items(self._encoding.ids(table), np.dtype(np.int32), begin, end)


def _encoded(
    encoding: Encoding,
    opened: OpenSegment,
    number: int,
    rows: np.ndarray | slice,
    ids: _Ids,
    columns: Sequence[Column],
) -> dict[str, Any]:
    """Return the columns of some rows of a segment, as ``writer.arrow_table`` takes them."""
    protocol = encoding.protocol
    arrays: dict[str, Any] = {}
    if opened.labels is not None:
        arrays[CRITEO_LABEL] = opened.labels[rows]
    for name in CRITEO_DENSE if protocol.dense else ():
        values, missing = opened.integers(name)
        assert protocol.dense is not None
        arrays[name] = protocol.dense(values[rows], missing[rows], encoding.minimum.get(name, 0))
    tables = {column.name: column for column in columns}
    for table in protocol.tables():
        _, codes = opened.categories(table)
        of_rows = ids.of(table, number).take(codes[rows])
        column = tables[table.name]
        if column.role == "multi_hot":
            assert encoding.options.bags is not None
            arrays[table.name] = encoding.options.bags.bags(table.name, of_rows, column.cardinality)
        else:
            arrays[table.name] = of_rows
    return arrays
