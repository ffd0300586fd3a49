"""The three stages from raw files to a dataset folder: each a function of one job, which any worker may do.

1. ``stage_piece`` (or ``stage_text`` for a compressed file) parses a piece of a raw file into a
   segment: its raw integers, and each categorical column as distinct hashes and codes into them.
2. ``count_column`` takes one categorical column: counts its values, orders them into a vocabulary,
   and notes the id of every segment's distinct values. ``look_up_column`` does the last with the
   vocabulary of another dataset.
3. ``encode_part`` writes one part file of one split.

What makes it fast is that only distinct values, not rows, are counted and looked up: of 138,000
skewed rows a column has 7,000 on average. What bounds the memory: a worker holds one piece, or the
share of a column's values that lies between two bounds (the rest waits on disk), or some row groups.
The vocabularies together are never in memory.

Segments are Arrow files without compression rather than Parquet: per 138,000 rows (one core) 19 ms
to write and nothing to map, where dictionary-encoded Parquet takes 84 and 45 ms, as it would look
for the distinct values once more; the narrowest integers make them 86 bytes a row, Parquet 52, the
text itself 244.

Working folder::

    stage/<file>/00000.arrow ...        segments; <file> tells the state of an input
    encode/<options>/ids/C1.ids, .ends  for every segment the ids of its distinct values, and where they end
    encode/<options>/result/            the dataset folder to be

Each finished file has a record beside it, see ``journal``.
"""

import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datamodules.parquet import ROWS_PER_FILE, SplitWriter, arrow_table
from datamodules.preprocess.criteo_tsv import (
    BadLineError,
    count_lines,
    parse,
    parse_good,
    piece_of_plain,
    pieces_of_text,
)
from datamodules.preprocess.journal import record, recorded, written_aside
from datamodules.preprocess.multi_hot import MultiHot
from datamodules.preprocess.protocols import Protocol, Table, bucket, by_frequency, find_protocol, hash_modulo
from datamodules.preprocess.sources import RawFile
from datamodules.preprocess.splits import Span, SplitRule
from lightning_dlrm.contracts.schema import (
    CRITEO_CATEGORICAL,
    CRITEO_DENSE,
    CRITEO_LABEL,
    SPLITS,
    Column,
    DataFile,
    SplitName,
)

PIECE_BYTES = 32 << 20
"""Text of a segment: some 130,000 rows, for which a worker needs about 150 MB."""

_VALUES_AT_ONCE = 1 << 22  # of a column's distinct values in all segments: 200 MB while they are sorted
_IDS_AT_ONCE = 1 << 20  # a row group of a vocabulary
_SAMPLED_VALUES = 1 << 16

_INTEGERS = ((7, pa.int8()), (15, pa.int16()), (31, pa.int32()))
_ENTRY = np.dtype([("value", np.uint32), ("count", np.uint32)])
_RUN = np.dtype([("value", np.uint32), ("count", np.int64)])


# --------------------------------------------------------------------------------------- stage


@dataclass(frozen=True, kw_only=True)
class StageJob:
    """What to make segments of."""

    source: RawFile
    index: int | None
    """The piece of a plain file; None for a whole compressed one."""
    folder: Path
    """Of the file's segments."""
    piece_bytes: int
    labelled: bool
    skip_bad_rows: bool


def segment_path(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}"


def stage_piece(job: StageJob) -> list[dict[str, Any]]:
    """Makes one segment of a plain file.

    Returns:
        The facts of the segment; with ``bad_line``, and nothing written, if rows are not to be skipped
        and one is bad.

    Raises:
        UserError: the file cannot be read.
    """
    assert job.index is not None
    path = segment_path(job.folder, job.index)
    return [recorded(path) or _stage(job, path, piece_of_plain(job.source, job.index, job.piece_bytes))]


def stage_text(job: StageJob) -> list[dict[str, Any]]:
    """Makes all segments of a compressed file, whose text can only be read from its beginning.

    A file that was begun before is decompressed again, but only its new segments are parsed.

    Returns:
        The facts of all segments; the last is as in ``stage_piece`` if it has a bad line.

    Raises:
        UserError: the file is truncated or corrupt, or cannot be read.
    """
    done = recorded(job.folder / "whole")
    if done:
        found = [recorded(segment_path(job.folder, index)) for index in range(done["segments"])]
        if None not in found:  # one is missing if it was damaged since
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
    facts: dict[str, Any] = {"lines": count_lines(text), "text_bytes": len(text), "bad": bad, "rows": 0}
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
    """A table of ``RAW_SCHEMA`` in the form of a segment, and its facts.

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


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Rows that were staged together."""

    path: Path
    start: int
    """Its first row, counted over all files."""
    rows: int
    distinct: Mapping[str, int]
    """Distinct hashes of each categorical column."""


class OpenSegment:
    """A segment mapped into memory, of which only what is asked for is read."""

    def __init__(self, segment: Segment):
        self.segment = segment
        self._file = pa.memory_map(str(segment.path))
        self._batch = pa.ipc.open_file(self._file).get_batch(0)

    def __enter__(self) -> "OpenSegment":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @cached_property
    def labels(self) -> np.ndarray | None:
        """int8 [n], None of rows without labels."""
        if CRITEO_LABEL not in self._batch.schema.names:
            return None
        labels: np.ndarray = self._batch.column(CRITEO_LABEL).to_numpy()
        return labels

    def integers(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Values int32 [n], 0 where missing, and whether each is missing, bool [n]."""
        column = self._batch.column(name)
        missing = column.is_null().to_numpy(zero_copy_only=False)
        return column.fill_null(0).to_numpy().astype(np.int32), missing

    def categories(self, table: Table) -> tuple[np.ndarray, np.ndarray]:
        """Distinct values uint32 [d] in no order, and codes [n] into them, d standing for missing."""
        if table.source in CRITEO_CATEGORICAL:
            column = self._batch.column(table.source)
            return column.dictionary.to_numpy()[:-1], column.indices.to_numpy()
        values, missing = self.integers(table.source)
        binned = pa.array(bucket(values), mask=None if table.missing_as_value else missing).dictionary_encode()
        return binned.dictionary.to_numpy(), binned.indices.fill_null(len(binned.dictionary)).to_numpy()


# --------------------------------------------------------------------------------------- count


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What count and encode need to know beside the rows."""

    protocol_name: str
    segments: Path
    """A file that lists the segments: too many to send with every job."""
    rule: SplitRule
    folder: Path
    """``encode/<options>``."""
    min_count: int
    max_rows: int | None
    minimum: Mapping[str, int]
    """Of each integer column, over all files."""
    multi_hot: MultiHot | None = None

    @property
    def protocol(self) -> Protocol:
        return find_protocol(self.protocol_name)

    @property
    def result(self) -> Path:
        return self.folder / "result"

    def record_of(self, table: Table) -> Path:
        return self.folder / "ids" / table.name

    def ids(self, table: Table) -> Path:
        return self.folder / "ids" / f"{table.name}.ids"

    def ends(self, table: Table) -> Path:
        """int64 [segments + 1]: where the ids of each segment begin, and the last ones end."""
        return self.folder / "ids" / f"{table.name}.ends"

    def vocabulary(self, table: Table) -> Path:
        return self.result / "vocabulary" / f"{table.name}.parquet"


@lru_cache(maxsize=2)
def load_segments(path: Path) -> list[Segment]:
    """The staged rows, as ``save_segments`` noted them."""
    content = json.loads(path.read_text())
    return [Segment(**{**entry, "path": path.parent / entry["path"]}) for entry in content]


def save_segments(path: Path, segments: Sequence[Segment]) -> None:
    with written_aside(path) as partial:
        partial.write_text(
            json.dumps(
                [
                    {
                        "path": os.path.relpath(segment.path, path.parent),
                        "start": segment.start,
                        "rows": segment.rows,
                        "distinct": dict(segment.distinct),
                    }
                    for segment in segments
                ]
            )
        )


@dataclass(frozen=True, kw_only=True)
class ColumnJob:
    """Which column to count, or to look up."""

    encoding: Encoding
    table: Table
    vocabulary: Path | None = None
    """Of another dataset, whose ids are to be used."""
    column: Column | None = None
    """The column there."""


def count_column(job: ColumnJob) -> dict[str, Any]:
    """Counts a categorical column; writes its vocabulary and the ids of every segment's distinct values.

    The values are spread over files by ranges, so that each range can be sorted in memory; within a
    range ids are known once it is known how many values of each count the ranges before it have.

    Returns:
        ``cardinality`` (rows of the table), ``distinct`` (values counted), ``kept`` (of them with an id
        of their own), ``rare_rows``, ``missing_rows`` (of those counted).
    """
    encoding, table = job.encoding, job.table
    done = recorded(encoding.record_of(table))
    if done:
        return done
    reserved = encoding.protocol.reserved_of(table, encoding.min_count)
    with _scratch(encoding, table.name) as scratch:
        spread, missing_rows = _spread_values(encoding, table, scratch)
        totals = [_group(spread.place(part)) for part in range(spread.parts)]
        first_id = max(reserved.values(), default=-1) + 1
        kept, rare_values, rare_rows = _assign(spread, totals, encoding.min_count, first_id, reserved)
        rows = max(first_id + kept, 1)
        modulus = encoding.max_rows if encoding.protocol.modulo == "id" else None
        _write_vocabulary(
            encoding.vocabulary(table), spread, first_id, kept, reserved, missing_rows, rare_rows, modulus
        )
        _write_ids(encoding, table, spread, reserved.get("missing", 0), modulus)
    facts = {
        "cardinality": min(rows, modulus) if modulus else rows,
        "distinct": kept + rare_values,
        "kept": kept,
        "rare_rows": rare_rows,
        "missing_rows": missing_rows,
    }
    return record(
        encoding.record_of(table), facts, (encoding.ids(table), encoding.ends(table), encoding.vocabulary(table))
    )


def look_up_column(job: ColumnJob) -> dict[str, Any]:
    """Writes the ids of every segment's distinct values by the vocabulary of another dataset, and copies that.

    A value that the vocabulary lacks gets the id ``unknown``; without one, ``rare``; without either,
    the last id, that of the rarest value, whose row was trained least.

    Returns:
        ``cardinality`` and ``unknown_rows``.
    """
    encoding, table = job.encoding, job.table
    done = recorded(encoding.record_of(table))
    if done:
        return done
    assert job.vocabulary is not None and job.column is not None
    reserved = job.column.reserved
    unknown = reserved.get("unknown", reserved.get("rare", job.column.cardinality - 1))
    known = pq.read_table(job.vocabulary, columns=["hash", "id"])
    known = known.filter(pc.is_valid(known.column("hash")))
    values, ids = known.column("hash").to_numpy(), known.column("id").to_numpy()
    order = np.argsort(values)
    values, ids = values[order], ids[order]
    del known, order
    unknown_rows = 0
    with _scratch(encoding, table.name) as scratch:
        out = _IdsWriter(scratch)
        for segment in load_segments(encoding.segments):
            with OpenSegment(segment) as opened:
                wanted, codes = _distinct(encoding, table, opened)
                ascending = np.argsort(wanted)  # a walk through a large vocabulary, where any other order would jump
                place = np.minimum(np.searchsorted(values, wanted[ascending]), max(len(values) - 1, 0))
                found = values[place] == wanted[ascending] if len(values) else np.zeros(len(wanted), bool)
                result = np.empty(len(wanted), np.int32)
                result[ascending] = np.where(found, ids[place], unknown) if len(values) else unknown
                absent = np.empty(len(wanted), bool)
                absent[ascending] = ~found
                unknown_rows += int(np.bincount(codes, minlength=len(wanted))[: len(wanted)][absent].sum())
                out.write(result if table.missing_as_value else np.append(result, np.int32(reserved.get("missing", 0))))
        out.finish(encoding, table)
    encoding.vocabulary(table).parent.mkdir(parents=True, exist_ok=True)
    with written_aside(encoding.vocabulary(table)) as partial:
        shutil.copyfile(job.vocabulary, partial)
    return record(
        encoding.record_of(table),
        {"cardinality": job.column.cardinality, "unknown_rows": unknown_rows},
        (encoding.ids(table), encoding.ends(table), encoding.vocabulary(table)),
    )


@contextmanager
def _scratch(encoding: Encoding, name: str) -> Iterator[Path]:
    """A folder for one job of one process. What a killed process leaves is removed when the run goes on."""
    folder = encoding.folder / "scratch" / f"{name}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _IdsWriter:
    """Writes the ids of the distinct values of one segment after the other, each ending with that of missing."""

    def __init__(self, scratch: Path):
        self._place = scratch / "all.ids"
        self._file = self._place.open("wb")
        self._ends = [0]

    def write(self, ids: np.ndarray) -> None:
        """int32 [d + 1]"""
        assert ids.dtype == np.int32
        self._file.write(ids.tobytes())
        self._ends.append(self._ends[-1] + len(ids))

    def finish(self, encoding: Encoding, table: Table) -> None:
        self._file.close()
        self._place.replace(encoding.ids(table))
        with written_aside(encoding.ends(table)) as partial:
            np.array(self._ends, np.int64).tofile(partial)


def _distinct(encoding: Encoding, table: Table, opened: OpenSegment) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values uint32 [d] as they are counted, and codes [n] into them; where missing ones
    count as 0 the last value is that, else code d stands for missing. Values may repeat."""
    values, codes = opened.categories(table)
    if table.missing_as_value:
        values = np.append(values, np.uint32(0))
    if encoding.protocol.modulo == "hash":
        values = hash_modulo(values, encoding.max_rows)
    return values, codes


def _values_of(encoding: Encoding, table: Table, segment: Segment) -> np.ndarray:
    with OpenSegment(segment) as opened:
        return _distinct(encoding, table, opened)[0].copy()


class _Spread:
    """A column's distinct values of every segment, in files by ranges of value.

    File ``part`` has the entries of its range in the order of the segments; ``counts``, ``ids`` and the
    like have one item for each of them.
    """

    def __init__(self, scratch: Path, bounds: np.ndarray):
        self.scratch, self.bounds = scratch, bounds
        self.parts = len(bounds) + 1
        self.lengths: list[int] = []
        """Entries of each segment."""

    def place(self, part: int) -> Path:
        return self.scratch / f"{part:04d}"

    def order(self, values: np.ndarray | range) -> tuple[np.ndarray | slice, np.ndarray]:
        """How to bring values range by range, and where each range then ends."""
        if self.parts == 1:
            return slice(None), np.array([len(values)])
        part = np.searchsorted(self.bounds, values, side="right")
        return np.argsort(part, kind="stable"), np.cumsum(np.bincount(part, minlength=self.parts))


def _spread_values(encoding: Encoding, table: Table, scratch: Path) -> tuple[_Spread, int]:
    """Reads all segments once; also says how many counted rows are missing."""
    segments = load_segments(encoding.segments)
    spread = _Spread(scratch, _bounds(encoding, table, segments))
    missing_rows = 0
    with ExitStack() as stack:
        files = [stack.enter_context(spread.place(part).open("wb")) for part in range(spread.parts)]
        for segment in segments:
            with OpenSegment(segment) as opened:
                values, codes = _distinct(encoding, table, opened)
                rows = counted_rows(encoding, opened)
                counts = np.bincount(codes[rows], minlength=len(values) + 1)
                missing_rows += int(counts[len(values) :].sum())
                entries = np.empty(len(values), _ENTRY)
                entries["value"], entries["count"] = values, counts[: len(values)]
            spread.lengths.append(len(entries))
            order, ends = spread.order(entries["value"])
            entries = entries[order]
            for file, start, end in zip(files, [0, *ends], ends, strict=False):
                file.write(entries[start:end].tobytes())
    return spread, missing_rows


def _bounds(encoding: Encoding, table: Table, segments: Sequence[Segment]) -> np.ndarray:
    """Bounds between ranges of some ``_VALUES_AT_ONCE`` entries each, from a sample of the values."""
    parts = -(-sum(segment.distinct.get(table.source, 0) for segment in segments) // _VALUES_AT_ONCE)
    if parts <= 1:
        return np.empty(0, np.uint32)
    looked_at = segments[:: max(len(segments) // 64, 1)]
    samples = []
    for segment in looked_at:
        values = _values_of(encoding, table, segment)
        if len(values):
            samples.append(values[:: max(len(values) * len(looked_at) // _SAMPLED_VALUES, 1)])
    sample = np.sort(np.concatenate(samples))
    return np.unique(sample[np.arange(1, parts) * len(sample) // parts])


def counted_rows(encoding: Encoding, opened: OpenSegment) -> np.ndarray | slice:
    """Which rows of a segment the vocabulary is counted over."""
    if encoding.protocol.counts == "all rows":
        return rows_of(encoding.rule, opened, SPLITS)
    return rows_of(encoding.rule, opened, ("train",))


def rows_of(rule: SplitRule, opened: OpenSegment, splits: Sequence[SplitName]) -> np.ndarray | slice:
    """Which rows of a segment belong to some splits, in order."""
    segment = opened.segment
    if rule.arithmetic:
        if len(splits) == len(SPLITS):
            return slice(0, segment.rows)
        span = next((span for span in rule.spans if span.split == splits[0]), Span(split=splits[0], start=0, stop=0))
        start = min(max(span.start - segment.start, 0), segment.rows)
        return slice(start, max(min(span.stop - segment.start, segment.rows), start))
    codes = rule.split_of(segment.start, segment.rows, opened.labels)
    return np.flatnonzero(codes >= 0 if len(splits) == len(SPLITS) else codes == SPLITS.index(splits[0]))


def _group(place: Path) -> np.ndarray:
    """Finds equal values of a range.

    Writes ``.groups`` (``_RUN``: the values in ascending order and their counts) and ``.inverse``
    (int32: for each entry the position of its value in them).

    Returns:
        int64: the counts.
    """
    entries = np.fromfile(place, _ENTRY)
    place.unlink()
    # One sort of 64-bit integers, which numpy does with vector instructions, brings values and positions.
    packed = entries["value"].astype(np.uint64) << np.uint64(32) | np.arange(len(entries), dtype=np.uint64)
    packed.sort()
    order = (packed & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    values = (packed >> np.uint64(32)).astype(np.uint32)
    del packed
    first = np.concatenate([np.ones(min(len(values), 1), bool), values[1:] != values[:-1]])
    starts = np.flatnonzero(first)
    groups = np.empty(len(starts), _RUN)
    groups["value"] = values[starts]
    groups["count"] = np.add.reduceat(entries["count"][order], starts, dtype=np.int64) if len(starts) else 0
    inverse = np.empty(len(entries), np.int32)
    inverse[order] = np.cumsum(first, dtype=np.int32) - 1
    groups.tofile(place.with_suffix(".groups"))
    inverse.tofile(place.with_suffix(".inverse"))
    return groups["count"].copy()


def _assign(
    spread: _Spread, totals: list[np.ndarray], min_count: int, first_id: int, reserved: Mapping[str, int]
) -> tuple[int, int, int]:
    """Gives every value its id: by descending count over all ranges, ties by value.

    Writes per range ``.ids`` (int32, of each entry), ``.run`` (``_RUN``, the values in the order of
    their ids) with ``.edges`` (int64, where in it each row group of the vocabulary begins), and ``.rare``.

    Returns:
        Values with an id of their own, other values counted, and rows with these.
    """
    counts = [np.unique(total[total >= min_count], return_counts=True) for total in totals]
    all_counts = np.unique(np.concatenate([values for values, _ in counts]))
    numbers = np.zeros(len(all_counts), np.int64)
    for values, how_many in counts:
        numbers[np.searchsorted(all_counts, values)] += how_many
    kept = int(numbers.sum())
    assert first_id + kept < 1 << 31, "ids are int32"
    next_id = first_id + kept - np.cumsum(numbers)  # of the next value of each count; the largest count comes first
    edges = np.arange(first_id, first_id + kept + _IDS_AT_ONCE, _IDS_AT_ONCE)
    rare_values = rare_rows = 0
    for part, total in enumerate(totals):
        place = spread.place(part)
        groups = np.fromfile(place.with_suffix(".groups"), _RUN)
        chosen = np.flatnonzero(total >= min_count)
        chosen = chosen[by_frequency(total[chosen])]
        position = np.searchsorted(all_counts, total[chosen])
        starts = np.flatnonzero(np.append(True, position[1:] != position[:-1])) if len(position) else position
        lengths = np.diff(np.append(starts, len(position)))
        rank = np.arange(len(position)) - np.repeat(starts, lengths)
        ids = next_id[position] + rank
        next_id[position[starts]] += lengths
        rare = np.flatnonzero((total > 0) & (total < min_count))
        of_group = np.full(len(total), reserved.get("unknown", 0), np.int32)
        of_group[rare] = reserved.get("rare", 0)
        of_group[chosen] = ids
        rare_values, rare_rows = rare_values + len(rare), rare_rows + int(total[rare].sum())
        inverse = np.fromfile(place.with_suffix(".inverse"), np.int32)
        of_group[inverse].tofile(place.with_suffix(".ids"))
        groups[chosen].tofile(place.with_suffix(".run"))
        groups[rare].tofile(place.with_suffix(".rare"))
        np.searchsorted(ids, edges).tofile(place.with_suffix(".edges"))
        np.asarray(ids, np.int32).tofile(place.with_suffix(".run_ids"))
    return kept, rare_values, rare_rows


_VOCABULARY_SCHEMA = pa.schema([("hash", pa.uint32()), ("count", pa.int64()), ("id", pa.int32())])


def _write_vocabulary(
    path: Path,
    spread: _Spread,
    first_id: int,
    kept: int,
    reserved: Mapping[str, int],
    missing_rows: int,
    rare_rows: int,
    modulus: int | None,
) -> None:
    """Writes the values in the order of ids: row i has id i (modulo the table's rows in ``mlperf``).

    Reserved ids come first and have no hash. Where rare values have an id apart from unknown ones,
    they follow at the end, so that they can be told apart in other rows too.
    """
    lists_rare = "unknown" in reserved and reserved["rare"] != reserved["unknown"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        written_aside(path) as partial,
        pq.ParquetWriter(
            partial,
            _VOCABULARY_SCHEMA,
            compression="zstd",
            use_dictionary=["count"],
            column_encoding={"hash": "PLAIN", "id": "DELTA_BINARY_PACKED"},
            store_schema=False,
        ) as writer,
    ):

        def write(values: pa.Array, counts: np.ndarray, ids: np.ndarray) -> None:
            if len(ids):
                ids = (ids % modulus if modulus else ids).astype(np.int32)
                columns = [values, pa.array(counts, pa.int64()), pa.array(ids)]
                writer.write_table(pa.table(columns, schema=_VOCABULARY_SCHEMA))

        of_reserved = np.zeros(first_id, np.int64)
        if "missing" in reserved:
            of_reserved[reserved["missing"]] += missing_rows
        if "rare" in reserved and not lists_rare:
            of_reserved[reserved["rare"]] += rare_rows
        write(pa.nulls(first_id, pa.uint32()), of_reserved, np.arange(first_id))
        edges = [np.fromfile(spread.place(part).with_suffix(".edges"), np.int64) for part in range(spread.parts)]
        for number, start in enumerate(range(first_id, first_id + kept, _IDS_AT_ONCE)):
            window = np.empty(min(_IDS_AT_ONCE, first_id + kept - start), _RUN)
            for part in range(spread.parts):
                begin, end = edges[part][number], edges[part][number + 1]
                ids = _items(spread.place(part).with_suffix(".run_ids"), np.dtype(np.int32), begin, end)
                window[ids - start] = _items(spread.place(part).with_suffix(".run"), _RUN, begin, end)
            write(pa.array(window["value"]), window["count"], np.arange(start, start + len(window)))
        for part in range(spread.parts) if lists_rare else ():
            rare = np.fromfile(spread.place(part).with_suffix(".rare"), _RUN)
            write(pa.array(rare["value"]), rare["count"], np.full(len(rare), reserved["rare"]))


def _write_ids(encoding: Encoding, table: Table, spread: _Spread, missing_id: int, modulus: int | None) -> None:
    """Brings the ids of the entries back into the order of the segments."""
    out = _IdsWriter(spread.scratch)
    with ExitStack() as stack:
        files = [stack.enter_context(spread.place(part).with_suffix(".ids").open("rb")) for part in range(spread.parts)]
        for segment, length in zip(load_segments(encoding.segments), spread.lengths, strict=True):
            order, ends = spread.order(_values_of(encoding, table, segment) if spread.parts > 1 else range(length))
            lengths = np.diff(ends, prepend=0)
            parts = [np.fromfile(file, np.int32, count) for file, count in zip(files, lengths, strict=True)]
            ids = np.empty(length, np.int32)
            ids[order] = np.concatenate(parts)
            if modulus:
                ids %= modulus
            out.write(ids if table.missing_as_value else np.append(ids, np.int32(missing_id)))
    out.finish(encoding, table)


def _items(place: Path, kind: np.dtype, begin: int, end: int) -> np.ndarray:
    """Items ``begin`` to ``end`` of a file."""
    return np.fromfile(place, kind, end - begin, offset=begin * kind.itemsize)


# -------------------------------------------------------------------------------------- encode


@dataclass(frozen=True, kw_only=True)
class RowsJob:
    """Which segments to count the rows of."""

    encoding: Encoding
    start: int
    stop: int


def rows_per_split(job: RowsJob) -> np.ndarray:
    """int64 [segments, splits]: the rows of each segment in each split of ``SPLITS``."""
    result = np.zeros((job.stop - job.start, len(SPLITS)), np.int64)
    for i, segment in enumerate(load_segments(job.encoding.segments)[job.start : job.stop]):
        with OpenSegment(segment) as opened:
            for j, split in enumerate(SPLITS):
                rows = rows_of(job.encoding.rule, opened, (split,))
                result[i, j] = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
    return result


@dataclass(frozen=True, kw_only=True)
class PartJob:
    """Which part file to write, and of what rows."""

    encoding: Encoding
    columns: tuple[Column, ...]
    split: SplitName
    part: int
    pieces: tuple[tuple[int, int, int], ...]
    """(segment, how many of its rows in the split to leave out, and then to take), in order."""

    @property
    def record_path(self) -> Path:
        return self.encoding.folder / "parts" / f"{self.split}-{self.part:05d}"


def part_jobs(encoding: Encoding, columns: tuple[Column, ...], rows: np.ndarray) -> Iterator[PartJob]:
    """The part files of all splits.

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
    """Writes one part file.

    Returns:
        The file, and its rows with label 1, None of rows without labels.
    """
    encoding = job.encoding
    facts = recorded(job.record_path)
    if facts is None:
        segments = load_segments(encoding.segments)
        with _scratch(encoding, job.record_path.name) as scratch:
            writer = SplitWriter(scratch, job.split, job.columns, first_part=job.part)
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
        facts = record(job.record_path, {"file": asdict(file), "positives": split.positives}, (place,))
    file = DataFile(**{**facts["file"], "row_groups": tuple(facts["file"]["row_groups"])})
    return file, facts["positives"]


class _Ids:
    """The ids of the segments' distinct values, as count left them."""

    def __init__(self, encoding: Encoding):
        self._encoding = encoding
        self._ends = {table.name: np.fromfile(encoding.ends(table), np.int64) for table in encoding.protocol.tables()}

    def of(self, table: Table, segment: int) -> np.ndarray:
        """int32 [d + 1]"""
        begin, end = self._ends[table.name][segment : segment + 2]
        return _items(self._encoding.ids(table), np.dtype(np.int32), begin, end)


def _encoded(
    encoding: Encoding,
    opened: OpenSegment,
    number: int,
    rows: np.ndarray | slice,
    ids: _Ids,
    columns: Sequence[Column],
) -> dict[str, Any]:
    """The columns of some rows of a segment, as ``parquet.arrow_table`` takes them."""
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
            assert encoding.multi_hot is not None
            arrays[table.name] = encoding.multi_hot.bags(table.name, of_rows, column.cardinality)
        else:
            arrays[table.name] = of_rows
    return arrays
