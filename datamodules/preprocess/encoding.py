"""Encode: write the part files of the splits from segments and the ids of their distinct values.

``Encoding`` says how rows are encoded and where the files are, also to ``counting``.
"""

import os
import shutil
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from datamodules.parquet import weighted_column
from datamodules.preprocess.journal import record, recorded, written_aside
from datamodules.preprocess.recipe import Recipe
from datamodules.preprocess.splits import SplitRule
from datamodules.preprocess.staging import OpenSegment, StagedRows, load_segments, rows_of
from datamodules.preprocess.table_encoding import PLACEHOLDER_IDS, Fitted, Table, hash_modulo
from datamodules.preprocess.transforms import size_of, sum_of_sizes
from datamodules.values import staged_name
from datamodules.writer import ROW_GROUP_ROWS, ROWS_PER_FILE, SplitWriter, arrow_table
from lightning_dlrm.contracts.schema import CRITEO_LABEL, SPLITS, Column, DataFile, SplitName

_LEAST_GROUPS = 4
"""Row groups of a part file, unless the split has fewer: each file takes some milliseconds."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How rows are encoded, and where the files of the stages are."""

    recipe: Recipe
    segments: Path
    """A file that lists the segments; a list would be too long to send with every job."""
    rule: SplitRule
    folder: Path
    """``encode/<options>``."""
    fitted: Fitted = field(default_factory=Fitted)

    @property
    def result(self) -> Path:
        return self.folder / "result"

    @cached_property
    def tables(self) -> tuple[Table, ...]:
        return self.recipe.tables(self.fitted)

    def record_of(self, table: Table) -> Path:
        return Path(f"{self.folder}/ids/{table.name}")  # joining paths part by part takes eight times as long

    def ids(self, table: Table) -> Path:
        return Path(f"{self.folder}/ids/{table.name}.ids")

    def ends(self, table: Table) -> Path:
        """Return the file of int64 [segments + 1]: where the ids of each segment begin, and where the last ones end."""
        return Path(f"{self.folder}/ids/{table.name}.ends")

    def vocabulary(self, table: Table) -> Path:
        return self.result / "vocabulary" / f"{table.name}.parquet"

    def files_of(self, table: Table) -> tuple[Path, Path, Path]:
        """Return the files of a finished column."""
        return self.ids(table), self.ends(table), self.vocabulary(table)


@contextmanager
def scratch_folder(encoding: Encoding, name: str) -> Iterator[Path]:
    """Make a folder for one job of one process. The next run removes what a killed process leaves."""
    folder = encoding.folder / "scratch" / f"{name}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_items(place: Path, kind: np.dtype, begin: int, end: int | None) -> np.ndarray:
    """Read the items ``begin`` to ``end`` of a file; None for its end."""
    return np.fromfile(place, kind, -1 if end is None else end - begin, offset=begin * kind.itemsize)


def distinct_values(table: Table, opened: StagedRows) -> tuple[pa.Array, np.ndarray, np.ndarray | None]:
    """Return the distinct values of a segment as they are counted; see ``OpenSegment.categories``.

    If missing values count as 0, the last value, 0 or the bin of 0, stands for them; else code d does.
    """
    values, codes, ends = opened.categories(table)
    if table.missing_as_value:
        zero = [0] if table.bins is None else table.binned(np.zeros(1))
        values = pa.concat_arrays([values, pa.array(zero).cast(values.type)])
    if table.hash_modulo is not None:
        values = pa.array(hash_modulo(values.to_numpy(), table.hash_modulo))
    return values, codes, ends


def items_of(rows: np.ndarray | slice, ends: np.ndarray | None) -> tuple[np.ndarray | slice, np.ndarray | None]:
    """Return the items of some rows of a segment, and where the bag of each row begins and the last one ends.

    Args:
        rows: int64 [n] or a slice.
        ends: where bags begin and end in the segment, int32 [rows + 1]; None for one item in each row.
    """
    if ends is None:
        return rows, None
    starts, lengths = ends[:-1][rows], np.diff(ends)[rows]
    new_ends = np.append(0, np.cumsum(lengths)).astype(np.int32)
    return np.repeat(starts - new_ends[:-1], lengths) + np.arange(new_ends[-1]), new_ends


def write_ids(encoding: Encoding, table: Table, of_segments: Iterable[np.ndarray]) -> None:
    """Write the ids of the distinct values of one segment after the other, and where the ids of each end.

    That of missing values ends each segment unless these count as a value.

    Args:
        encoding: the encoding.
        table: the column.
        of_segments: for each segment the ids int32 [d], or one of ``PLACEHOLDER_IDS``.
    """
    ends = [0]
    with written_aside(encoding.ids(table)) as partial, partial.open("wb") as file:
        for ids in of_segments:
            assert ids.dtype == np.int32
            file.write(
                (ids if table.missing_as_value else np.append(ids, np.int32(PLACEHOLDER_IDS["missing"]))).tobytes()
            )
            ends.append(ends[-1] + len(ids) + (not table.missing_as_value))
    with written_aside(encoding.ends(table)) as partial:
        np.array(ends, np.int64).tofile(partial)


def rows_per_split(encoding: Encoding, numbers: range) -> np.ndarray:
    """Count the rows of each segment in each split of ``SPLITS``: int64 [segments, splits]."""
    result = []
    for segment in load_segments(encoding.segments)[numbers.start : numbers.stop]:
        with OpenSegment(segment) as opened:
            of_splits = (rows_of(encoding.rule, opened, (split,)) for split in SPLITS)
            result.append([rows.stop - rows.start if isinstance(rows, slice) else len(rows) for rows in of_splits])
    return np.array(result, np.int64)


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
        groups = -(-total // (encoding.recipe.files_of_split * ROW_GROUP_ROWS))
        rows_of_file = min(ROWS_PER_FILE, max(groups, _LEAST_GROUPS) * ROW_GROUP_ROWS)
        for part, start in enumerate(range(0, total, rows_of_file)):
            stop = min(start + rows_of_file, total)
            pieces = []
            segment = int(np.searchsorted(ends, start, side="right"))
            while start < stop:
                take = min(stop, int(ends[segment])) - start
                if take:
                    pieces.append((segment, int(start - (ends[segment] - of_split[segment])), take))
                start, segment = start + take, segment + 1
            yield PartJob(encoding=encoding, columns=columns, split=split, part=part, pieces=tuple(pieces))


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a part file holds."""

    file: DataFile
    positives: int | None
    """Rows with label 1; None of rows without labels."""
    cells: Mapping[str, Mapping[str, int]]
    """For each table the rows of each of ``PLACEHOLDER_IDS``."""
    sizes: Mapping[str, tuple[int, float, float]]
    """For each column of ``Recipe.unscaled`` the ``size_of`` its values."""


def encode_part(job: PartJob) -> Part:
    """Write one part file."""
    encoding = job.encoding
    if (facts := recorded(job.record_path)) is None:
        segments = load_segments(encoding.segments)
        kinds = tuple(PLACEHOLDER_IDS)
        cells = {table.name: dict.fromkeys((*kinds, "values") if table.bag else kinds, 0) for table in encoding.tables}
        sizes = dict.fromkeys(encoding.recipe.unscaled, (0, 0.0, 0.0))
        with scratch_folder(encoding, job.record_path.name) as scratch, ExitStack() as stack:
            writer = SplitWriter(scratch, job.split, job.columns, job.part, encoding.recipe.dense_dictionaries)
            stack.callback(writer.abandon)
            for number, skip, take in job.pieces:
                with OpenSegment(segments[number]) as opened:
                    rows = rows_of(encoding.rule, opened, (job.split,))
                    rows = (
                        slice(rows.start + skip, rows.start + skip + take)
                        if isinstance(rows, slice)
                        else rows[skip : skip + take]
                    )
                    arrays = _encoded(job, opened, number, rows, cells)
                    sizes = {name: sum_of_sizes([size, size_of(arrays[name])]) for name, size in sizes.items()}
                    writer.append(arrow_table(job.columns, arrays))
            split = writer.close()
            (file,) = split.files
            place = encoding.result / file.path
            place.parent.mkdir(parents=True, exist_ok=True)
            (scratch / file.path).replace(place)
        facts = {"file": asdict(file), "positives": split.positives, "cells": cells, "sizes": sizes}
        record(job.record_path, facts, (place,), {place: file.sha256})
    file = DataFile(**{**facts["file"], "row_groups": tuple(facts["file"]["row_groups"])})
    return Part(**{**facts, "file": file})


def _encoded(
    job: PartJob, opened: OpenSegment, number: int, rows: np.ndarray | slice, cells: Mapping[str, dict[str, int]]
) -> dict[str, Any]:
    """Return the columns of some rows of a segment, as ``writer.arrow_table`` takes them; add to ``cells``."""
    encoding = job.encoding
    arrays: dict[str, Any] = {}
    if opened.labels is not None:
        arrays[CRITEO_LABEL] = opened.labels[rows]
    arrays |= encoding.recipe.dense_values(encoding.fitted, opened, rows)
    for column in job.columns:
        if column.role in ("keep", "weights"):
            arrays[column.name] = _beside(column, opened, rows)
    tables = {column.name: column for column in job.columns}
    for table in encoding.tables:
        _, codes, ends = opened.categories(table)
        items, ends = items_of(rows, ends)
        begin, end = read_items(encoding.ends(table), np.dtype(np.int64), number, number + 2)
        ids = read_items(encoding.ids(table), np.dtype(np.int32), begin, end)
        column, codes = tables[table.name], codes[items]
        missing = codes == len(ids) - 1  # whatever value they count as
        ids = ids.take(codes)
        cells[table.name]["missing"] += int(np.count_nonzero(missing))
        if table.bag:
            cells[table.name]["values"] += len(codes)
        for kind, of_kind in PLACEHOLDER_IDS.items():
            cells[table.name][kind] += int(np.count_nonzero((ids == of_kind) & ~missing))
        replace_placeholders(ids, column)
        arrays[table.name] = encoding.recipe.with_bags(table, ids, ends, column.cardinality)
    return arrays


def replace_placeholders(ids: np.ndarray, column: Column) -> None:
    """Replace ``PLACEHOLDER_IDS`` with the reserved ids of a column."""
    # Without an id for unknown values, they get the id of rare values, or else the last id, whose row was trained
    # least.
    unknown = column.reserved.get("unknown", column.reserved.get("rare", column.cardinality - 1))
    for kind, of_kind in PLACEHOLDER_IDS.items():
        ids[ids == of_kind] = column.reserved.get(kind, unknown)


def _beside(column: Column, opened: OpenSegment, rows: np.ndarray | slice) -> Any:
    """Return the values of a kept column or of weights, as ``writer.arrow_table`` takes them."""
    if column.role == "keep":
        return opened.column(staged_name("keep", column.name), rows)
    weights = opened.column(staged_name("weights", weighted_column(column)))
    items, ends = items_of(rows, weights.offsets.to_numpy())
    return weights.values.to_numpy()[items].astype(np.float32), ends
