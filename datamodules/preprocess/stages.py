"""The three stages from raw files to a dataset folder, each over all rows in bounded memory.

1. ``stage_file`` parses a raw file once into Parquet of its raw integers and hashes;
2. ``encode_column`` takes one categorical column at a time: counts its values, orders them into a
   vocabulary, and writes each row's id;
3. ``write_dataset`` transforms the dense columns, joins the ids to them and writes the splits.

Ids are written in stage 2, while the column's vocabulary is at hand, so that memory holds the
vocabularies of the columns in work and never those of all: Terabyte's, without ``max_rows``, have
hundreds of millions of values.

Working folder::

    raw/00000.parquet ...     one per input file, RAW_SCHEMA
    vocabulary/C1.parquet ... hash, count, in the order of ids
    ids/C1 ...                the id of every row, in the narrowest unsigned integers that hold them
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datamodules.parquet import DatasetWriter
from datamodules.preprocess.criteo_tsv import BLOCK_BYTES, RAW_SCHEMA, TsvFile, parse
from datamodules.preprocess.protocols import Protocol, Span, by_frequency
from lightning_dlrm.contracts.schema import CRITEO_CATEGORICAL, CRITEO_DENSE, CRITEO_LABEL

CHUNK_ROWS = 1 << 18  # rows handled at once: 40 MB of raw values
_VOCABULARY_SLACK = 1 << 20  # distinct values that may wait for merging, besides as many as are merged already

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Work:
    """The places of a working folder."""

    folder: Path

    def create(self) -> None:
        for name in ("raw", "vocabulary", "ids"):
            (self.folder / name).mkdir(parents=True)

    def raw(self, position: int) -> Path:
        return self.folder / "raw" / f"{position:05d}.parquet"

    def vocabulary(self, column: str) -> Path:
        return self.folder / "vocabulary" / f"{column}.parquet"

    def ids(self, column: str) -> Path:
        return self.folder / "ids" / column


def ordered_map(executor: Executor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """Results in the order of the items, of which at most ``ahead`` are taken beforehand.

    Unlike ``Executor.map``, which would read a whole file to hand out its blocks.
    """
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(executor.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def stage_file(
    source: Path,
    target: Path,
    executor: Executor,
    ahead: int,
    advance: Callable[[int, int], None],
    block_bytes: int = BLOCK_BYTES,
) -> None:
    """Parses a raw file into Parquet.

    Args:
        advance: called with the rows and the stored bytes newly done.

    Raises:
        UserError: something is wrong with the file; names the first bad line.
    """
    raw = TsvFile(source, block_bytes)
    bytes_seen = 0
    pending: list[pa.Table] = []
    pending_rows = 0
    # Per 1M rows: plain pages 151 MB, dictionaries 62 MB; a codec on top of them saves little and takes time.
    with pq.ParquetWriter(target, RAW_SCHEMA, compression="none", use_dictionary=True) as writer:
        for table in ordered_map(executor, parse, raw.blocks(), ahead):
            pending.append(table)
            pending_rows += table.num_rows
            if pending_rows >= CHUNK_ROWS:
                writer.write_table(pa.concat_tables(pending), row_group_size=pending_rows)
                pending, pending_rows = [], 0
            advance(table.num_rows, raw.bytes_read - bytes_seen)
            bytes_seen = raw.bytes_read
        if pending:
            writer.write_table(pa.concat_tables(pending), row_group_size=pending_rows)


def staged_rows(files: Sequence[Path]) -> list[int]:
    """Rows of each staged file."""
    return [pq.read_metadata(file).num_rows for file in files]


def staged_missing(files: Sequence[Path]) -> dict[str, int]:
    """Missing values of each feature column over all staged files, from their footers."""
    missing = dict.fromkeys((*CRITEO_DENSE, *CRITEO_CATEGORICAL), 0)
    for file in files:
        metadata = pq.read_metadata(file)
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                if column.path_in_schema in missing:
                    missing[column.path_in_schema] += column.statistics.null_count
    return missing


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A row group of a staged file."""

    file: Path
    group: int
    start: int
    """Its first row, counted over all files."""
    rows: int
    metadata: pq.FileMetaData
    """The file's footer, which takes as long to parse as the chunk where a file has hundreds."""

    def read(self, columns: Sequence[str]) -> pa.Table:
        with pq.ParquetFile(self.file, metadata=self.metadata, pre_buffer=False) as staged:
            return staged.read_row_group(self.group, columns=list(columns), use_threads=False)


def _chunks(files: Sequence[Path]) -> Iterator[Chunk]:
    start = 0
    for file in files:
        metadata = pq.read_metadata(file)
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            yield Chunk(file=file, group=group, start=start, rows=rows, metadata=metadata)
            start += rows


def encode_column(
    column: str,
    files: Sequence[Path],
    work: Work,
    protocol: Protocol,
    max_rows: int | None,
    advance: Callable[[int], None],
) -> int:
    """Counts a categorical column and writes its vocabulary and the ids of all rows.

    Args:
        advance: called with the rows newly done; each row is done twice.

    Returns:
        The number of distinct values, at least 1.
    """
    counter = VocabularyCounter()
    for distinct, codes in _categories(column, files, protocol, max_rows):
        counter.add(distinct, np.bincount(codes, minlength=len(distinct)))
        advance(len(codes))
    values, counts = counter.result()
    order = by_frequency(counts)
    pq.write_table(
        pa.table({"hash": values[order], "count": counts[order]}), work.vocabulary(column), compression="lz4"
    )
    ids = np.empty(len(order), id_type(len(order)))
    ids[order] = np.arange(len(order), dtype=ids.dtype)
    del counter, counts, order
    with work.ids(column).open("wb") as file:
        for distinct, codes in _categories(column, files, protocol, max_rows):
            # Looked up in ascending order: a walk through a large vocabulary, where any other order would jump in it.
            ascending = np.argsort(distinct)
            distinct_ids = np.empty(len(distinct), ids.dtype)
            distinct_ids[ascending] = ids[np.searchsorted(values, distinct[ascending])]
            file.write(distinct_ids[codes].tobytes())
            advance(len(codes))
    return len(ids)


def id_type(cardinality: int) -> np.dtype:
    """The narrowest unsigned type that holds the ids below ``cardinality``."""
    return np.min_scalar_type(cardinality - 1)


def _categories(
    column: str, files: Sequence[Path], protocol: Protocol, max_rows: int | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Per chunk: its distinct values (uint32 [d], in no order) and each row's position in them (int32 [n])."""
    for chunk in _chunks(files):
        hashes = chunk.read([column]).column(column).combine_chunks().fill_null(0).to_numpy()
        encoded = pa.array(protocol.category(hashes, max_rows)).dictionary_encode()
        yield encoded.dictionary.to_numpy(), encoded.indices.to_numpy()


class VocabularyCounter:
    """Distinct values and their counts, merged by sorting whenever as many wait as are merged.

    Memory is a few times the distinct values', however many rows there are.
    """

    def __init__(self) -> None:
        self._values = np.empty(0, np.uint32)
        self._counts = np.empty(0, np.int64)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._waiting_values = 0

    def add(self, values: np.ndarray, counts: np.ndarray) -> None:
        """More values (uint32 [n]) and how often each occurs (int64 [n])."""
        self._waiting.append((values, counts))
        self._waiting_values += len(values)
        if self._waiting_values > len(self._values) + _VOCABULARY_SLACK:
            self._merge()

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """The distinct values, ascending (uint32 [d]), and their counts (int64 [d])."""
        self._merge()
        return self._values, self._counts

    def _merge(self) -> None:
        values = np.concatenate([self._values, *(values for values, _ in self._waiting)])
        counts = np.concatenate([self._counts, *(counts for _, counts in self._waiting)])
        self._waiting, self._waiting_values = [], 0
        order = np.argsort(values)
        values, counts = values[order], counts[order]
        del order
        starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
        self._values = values[starts]
        self._counts = np.add.reduceat(counts, starts)


def write_dataset(
    writer: DatasetWriter,
    files: Sequence[Path],
    work: Work,
    protocol: Protocol,
    spans: Sequence[Span],
    executor: Executor,
    advance: Callable[[int], None],
) -> None:
    """Writes vocabularies and the rows of all splits, in the order of the input.

    Args:
        advance: called with the rows newly done.
    """
    for column in CRITEO_CATEGORICAL:
        writer.write_vocabulary(column, pq.read_table(work.vocabulary(column)))
    cardinalities = {column.name: column.cardinality for column in writer.columns}

    def encode(chunk: Chunk) -> dict[str, np.ndarray]:
        return _encode_chunk(chunk, work, protocol, cardinalities)

    chunks = list(_chunks(files))
    for chunk, arrays in zip(chunks, ordered_map(executor, encode, chunks, ahead=2), strict=True):
        for span in spans:
            part = slice(max(span.start - chunk.start, 0), min(span.stop - chunk.start, chunk.rows))
            if part.start < part.stop:
                writer.write(span.split, {name: array[part] for name, array in arrays.items()})
        advance(chunk.rows)


def _encode_chunk(
    chunk: Chunk, work: Work, protocol: Protocol, cardinalities: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Label int8, dense float32 and ids int32, each [n]."""
    table = chunk.read((CRITEO_LABEL, *CRITEO_DENSE))
    arrays = {CRITEO_LABEL: table.column(CRITEO_LABEL).to_numpy()}
    for name in CRITEO_DENSE:
        raw = table.column(name).combine_chunks()
        arrays[name] = protocol.dense(raw.fill_null(0).to_numpy(), raw.is_null().to_numpy(zero_copy_only=False))
    for name in CRITEO_CATEGORICAL:
        kind = id_type(cardinalities[name])
        ids = np.fromfile(work.ids(name), kind, count=chunk.rows, offset=chunk.start * kind.itemsize)
        arrays[name] = ids.astype(np.int32)
    return arrays
