"""The files of a dataset folder: how they are written, opened and checked.

``lightning_dlrm.contracts.schema`` says what a dataset folder holds; this module knows Parquet. It
starts without torch.
"""

import hashlib
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from datamodules.filesystems import failures_told, file_system, is_remote
from lightning_dlrm.contracts.errors import UserError, one_line
from lightning_dlrm.contracts.schema import (
    SCHEMA_FILE,
    SPLITS,
    WEIGHTS_SUFFIX,
    Column,
    DataFile,
    DatasetSchema,
    Split,
    file_sha256,
)

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

# A row group is what a lane of the stream decodes at once and shuffles as its window, so 48 lanes
# hold 48 of them: 130 MB at 165 bytes a row. Groups of 8,192 rows decode at 80% of the best speed
# (per-chunk overhead), these at 96%; groups of 65,536 decode no faster, would hold 0.5 GB and would
# need 0.8 s of decoding before a shuffled stream can serve its first batch.
ROW_GROUP_ROWS = 16_384
# 64 row groups: a footer takes 2 ms to parse, and Kaggle makes 44 files, Terabyte 4,171.
ROWS_PER_FILE = 64 * ROW_GROUP_ROWS

_TYPES: Mapping[str, pa.DataType] = {
    "label": pa.int8(),
    "dense": pa.float32(),
    "categorical": pa.int32(),
    "multi_hot": pa.list_(pa.int32()),
    "weights": pa.list_(pa.float32()),
}

# What to do about nulls.
_WITHOUT_NULLS: Mapping[str, str] = {
    "label": "give every row the label 0 or 1",
    "categorical": "give missing values an id of their own",
    "multi_hot": "leave missing ids out of the bags, or give them an id of their own",
}

_PIECE_BYTES = 1 << 20

_REMEDY = "restore the file, or make the dataset again"

Values: TypeAlias = Any  # np.ndarray | pa.ListArray | tuple[np.ndarray, np.ndarray]


class DatasetWriter:
    """Writes a dataset folder whole or not at all.

    Rows go to a hidden working folder beside the target, which takes the target's name only when
    ``finish`` has written and flushed everything. Leaving the context without ``finish``, by an
    error or otherwise, removes it. Equal input gives equal bytes (with one pyarrow version).

        with DatasetWriter(Path("data/mine"), columns) as writer:
            writer.write("train", {"label": labels, "I1": floats, "C1": ids})
            schema = writer.finish(dataset="mine", protocol="own")

    Args:
        folder: the dataset folder to make; must not exist, or be empty.
        columns: every column of every row, in the order in which they are stored. Without a label
            column the dataset has no labels.

    Raises:
        UserError: ``folder`` is something else than a new or empty folder.
    """

    def __init__(self, folder: Path, columns: Sequence[Column]) -> None:
        self.folder = Path(folder).absolute()
        self.columns = tuple(columns)
        self._splits: dict[str, SplitWriter] = {}
        self._vocabulary: dict[str, DataFile] = {}
        self._check_target()
        # The process is part of the name: two processes that make the same dataset do not meet.
        self._prefix = f".{self.folder.name}.partial-{socket.gethostname()}-"
        self._partial = self.folder.with_name(f"{self._prefix}{os.getpid()}")

    def __enter__(self) -> "DatasetWriter":
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            self._partial.mkdir()
        except OSError as error:
            raise UserError(
                f"cannot write beside {self.folder}: {error.strerror}; choose a folder that you may write to"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for split in self._splits.values():
            split.abandon()
        shutil.rmtree(self._partial, ignore_errors=True)

    def write(self, split: str, arrays: Mapping[str, Values]) -> None:
        """Appends rows to a split, in order; the arrays may be reused afterwards.

        Args:
            split: ``train``, ``validation`` or ``test``.
            arrays: for every column B values: label int8; dense float32, NaN being stored as null;
                categorical int32; multi-hot a list<int32> array or a pair of int32 values [N] and
                offsets [B + 1]; weights likewise, with float32 values.

        Raises:
            UserError: a bag has not as many weights as ids, or a weight is null or NaN.
        """
        assert split in SPLITS, f"split {split!r} is none of {SPLITS}"
        if split not in self._splits:
            self._splits[split] = SplitWriter(self._partial, split, self.columns)
        self._splits[split].append(arrow_table(self.columns, arrays))

    @property
    def rows_on_disk(self) -> int:
        """Those of finished row groups."""
        return sum(sum(split.groups) + sum(file.rows for file in split.files) for split in self._splits.values())

    @property
    def bytes_on_disk(self) -> int:
        """What is written so far."""
        return sum(path.stat().st_size for path in self._partial.rglob("*") if path.is_file())

    def write_vocabulary(self, name: str, table: pa.Table) -> None:
        """Writes ``vocabulary/<name>.parquet``, the raw values of a categorical column's ids."""
        (self._partial / "vocabulary").mkdir(exist_ok=True)
        path = f"vocabulary/{name}.parquet"
        pq.write_table(table, self._partial / path, compression="zstd", store_schema=False)
        self._vocabulary[name] = _data_file(self._partial, path)

    def finish(self, **schema_fields: Any) -> DatasetSchema:
        """Completes the dataset and gives it its name.

        Args:
            schema_fields: ``dataset``, ``protocol`` and, where there are any, ``settings``,
                ``optimum`` and ``report`` of the DatasetSchema.

        Raises:
            UserError: the target came into being meanwhile.
        """
        schema = DatasetSchema(
            columns=self.columns,
            splits={name: self._splits[name].close() for name in SPLITS if name in self._splits},
            vocabulary={
                column.name: self._vocabulary[column.name] for column in self.columns if column.name in self._vocabulary
            },
            **schema_fields,
        )
        schema.save(self._partial)
        for path in (*self._partial.rglob("*"), self._partial):
            flush(path)
        self._check_target()
        self._partial.rename(self.folder)
        flush(self.folder.parent)
        return schema

    def _check_target(self) -> None:
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            return
        if self.folder.exists():
            raise UserError(
                f"{self.folder} exists and is not an empty folder; name a new folder, or remove it if it is not needed"
            )

    def _remove_leftovers(self) -> None:
        """Removes working folders of processes that were killed on this machine."""
        for leftover in self.folder.parent.glob(f"{self._prefix}*"):
            process = leftover.name.removeprefix(self._prefix)
            if process.isdigit() and (int(process) == os.getpid() or not _is_running(int(process))):
                shutil.rmtree(leftover, ignore_errors=True)


class SplitWriter:
    """Cuts appended rows into row groups and files of the fixed sizes, below a folder.

    Args:
        root: where the split's folder lies or is made.
        split: its name.
        columns: as of the DatasetWriter.
        first_part: the number of the first file; earlier ones are written elsewhere.
    """

    def __init__(self, root: Path, split: str, columns: Sequence[Column], first_part: int = 0) -> None:
        self.root, self.split, self.first_part = root, split, first_part
        self.arrow = _arrow_schema(columns)
        self.label = next((column.name for column in columns if column.role == "label"), None)
        # Ids: readers compare the largest with the table; statistics of other columns only grow the footer.
        self.ids = [_leaf(column) for column in columns if column.cardinality]
        self.others = [_leaf(column) for column in columns if not column.cardinality]
        self.pending: list[pa.Table] = []
        self.pending_rows = 0
        self.positives = 0
        self.files: list[DataFile] = []
        self.groups: list[int] = []
        self.writer: pq.ParquetWriter | None = None
        (root / split).mkdir(exist_ok=True)

    def append(self, table: pa.Table) -> None:
        """More rows, as ``arrow_table`` makes them."""
        self.pending.append(table)
        self.pending_rows += table.num_rows
        if self.pending_rows < ROW_GROUP_ROWS:
            return
        rows = pa.concat_tables(self.pending)
        whole = self.pending_rows - self.pending_rows % ROW_GROUP_ROWS
        for start in range(0, whole, ROW_GROUP_ROWS):
            self._write_group(rows.slice(start, ROW_GROUP_ROWS))
        self.pending, self.pending_rows = [rows.slice(whole)], self.pending_rows - whole

    def close(self) -> Split:
        """Writes what is left and tells what the split, or this share of it, has."""
        if self.pending_rows:
            self._write_group(pa.concat_tables(self.pending))
        self._close_file()
        return Split(
            rows=sum(file.rows for file in self.files),
            positives=None if self.label is None else self.positives,
            files=tuple(self.files),
        )

    def abandon(self) -> None:
        """Lets go of a file that is not finished."""
        if self.writer is not None:
            with suppress(OSError):  # a full disk holds its footer no more than its rows
                self.writer.close()
            self.writer = None

    def _write_group(self, rows: pa.Table) -> None:
        if self.writer is None:
            self.writer = pq.ParquetWriter(
                self.root / self._path(),
                self.arrow,
                compression="zstd",
                # Ids by bytes of one place: half the time of dictionaries to write, nine tenths to read, and a sixth
                # less of disk in all. Dense features repeat few values, and are smaller with dictionaries.
                use_dictionary=self.others,
                column_encoding=dict.fromkeys(self.ids, "BYTE_STREAM_SPLIT"),
                write_statistics=self.ids,
                store_schema=False,
                write_page_checksum=True,
            )
        self.writer.write_table(rows, row_group_size=ROW_GROUP_ROWS)
        self.groups.append(rows.num_rows)
        if self.label is not None:
            self.positives += int(np.count_nonzero(rows.column(self.label)))
        if sum(self.groups) == ROWS_PER_FILE:
            self._close_file()

    def _close_file(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None
            self.files.append(_data_file(self.root, self._path(), tuple(self.groups)))
            self.groups = []

    def _path(self) -> str:
        return f"{self.split}/part-{self.first_part + len(self.files):05d}.parquet"


def part_files(schema: DatasetSchema, splits: Sequence[str] = SPLITS) -> Iterator[DataFile]:
    """The part files of some splits, in order; a split that the dataset lacks has none."""
    for name in splits:
        if name in schema.splits:
            yield from schema.splits[name].files


class Folder:
    """Where a dataset folder is: a path, or a URL of a file system that fsspec knows.

    Args:
        where: such as ``data/criteo``, ``s3://bucket/criteo``, ``gs://...`` or ``hf://...``; or a Folder.

    Raises:
        UserError: no such file system is known, or its package is not installed.
    """

    def __init__(self, where: "str | Path | Folder") -> None:
        self._name = str(where)
        self._remote: AbstractFileSystem | None = None
        if is_remote(self._name):
            self._remote, self._root = file_system(self._name)
        else:
            self._root = str(Path(self._name).expanduser())

    def __str__(self) -> str:
        return self._name

    def __truediv__(self, path: str) -> str:
        """Full path or URL of a file of the folder, for people."""
        return f"{self._name.rstrip('/')}/{path}"

    @property
    def absolute(self) -> str:
        """Its name wherever a process has its current folder."""
        return str(Path(self._root).absolute()) if self._remote is None else self._name

    @property
    def local(self) -> Path | None:
        """The folder as a path; None behind a URL."""
        return Path(self._root) if self._remote is None else None

    def size(self, path: str) -> int | None:
        """Bytes of a file; None where its server does not tell.

        Raises:
            FileNotFoundError: there is none.
            UserError: it cannot be looked at.
        """
        with self._told(path):
            if self._remote is None:
                return Path(self._root, path).stat().st_size
            size: int | None = self._remote.info(self._inner(path))["size"]
            return size

    def read(self, path: str) -> bytes:
        """All bytes of a file.

        Raises:
            FileNotFoundError: there is none.
            UserError: it cannot be read.
        """
        with self.open(path) as file:
            content: bytes = file.read()
        return content

    @contextmanager
    def open(self, path: str) -> Iterator[IO[bytes]]:
        """A file to be read from its beginning.

        Raises:
            FileNotFoundError: there is none.
            UserError: it cannot be read.
        """
        with self._told(path), self._opened(path) as file:
            yield file

    def open_parquet(self, path: str, verify: bool) -> pq.ParquetFile:
        """A Parquet file to read row group by row group, comparing the checksums of its pages if asked to.

        Raises:
            FileNotFoundError: there is none.
            UserError: it cannot be read, or is no Parquet.
        """
        with self._told(path):
            try:
                if self._remote is None:
                    # The read-ahead of pyarrow would hold more than the row group at hand.
                    return pq.ParquetFile(Path(self._root, path), pre_buffer=False, page_checksum_verification=verify)
                # A row group in one request, as its columns lie side by side; fsspec's cache would fetch its
                # neighbours too.
                source = pa.PythonFile(self._remote.open(self._inner(path), cache_type="none"), mode="r")
                return pq.ParquetFile(source, pre_buffer=True, page_checksum_verification=verify)
            except (pa.ArrowInvalid, OSError) as error:
                if isinstance(error, OSError) and error.errno:
                    raise
                raise UserError(
                    f"{self / path} is altered: it is no readable Parquet file ({one_line(error)}); {_REMEDY}"
                ) from error

    def _opened(self, path: str) -> IO[bytes]:
        if self._remote is None:
            return Path(self._root, path).open("rb")
        remote: IO[bytes] = self._remote.open(self._inner(path), "rb")
        return remote

    def _inner(self, path: str) -> str:
        """A file of the folder, as the file system calls it."""
        return f"{self._root.rstrip('/')}/{path}"

    def _told(self, path: str) -> AbstractContextManager[None]:
        """Tells failures of a file; that there is none is left to the caller."""
        remedy = "check the path and its permissions"
        if self._remote is not None:
            remedy = "check the URL, the network and your credentials"
        return failures_told(self / path, remedy=remedy, passing=(FileNotFoundError,))


def load_schema(folder: str | Path | Folder) -> DatasetSchema:
    """Reads the ``dataset.json`` of a dataset folder, also behind a URL.

    Raises:
        UserError: there is none, it is not a schema of this version, or it was altered.
    """
    where = Folder(folder)
    if where.local is not None:
        return DatasetSchema.load(where.local)
    try:
        text = where.read(SCHEMA_FILE)
    except FileNotFoundError as error:
        raise UserError(
            f"no dataset folder at {where}: there is no {where / SCHEMA_FILE}; copy one there that "
            "'python -m lightning_dlrm preprocess' made"
        ) from error
    return DatasetSchema.from_json(text, where / SCHEMA_FILE)


def check_sizes(folder: str | Path | Folder, files: Sequence[DataFile]) -> None:
    """Sees that files are there and have their size, without opening them.

    Raises:
        UserError: one is missing, shorter or longer than when it was written.
    """
    where = Folder(folder)

    def size(file: DataFile) -> int | None:
        try:
            return where.size(file.path)
        except FileNotFoundError:
            return -1

    # A remote file system takes a while for each answer.
    with ThreadPoolExecutor(16) as pool:
        sizes = list(pool.map(size, files))
    for file, found in zip(files, sizes, strict=True):
        if found == -1:
            raise UserError(f"{where / file.path} is missing; {_REMEDY}")
        if found is not None and found != file.bytes:
            what = "truncated" if found < file.bytes else "altered"
            raise UserError(
                f"{where / file.path} is {what}: it has {found} bytes, its dataset.json says {file.bytes}; {_REMEDY}"
            )


def verify(folder: str | Path | Folder, schema: DatasetSchema, progress: bool = False) -> None:
    """Reads every byte of a dataset and compares the checksums; takes a second per GB or so.

    Args:
        progress: show a progress bar, on a terminal.

    Raises:
        UserError: a file is missing, truncated or altered.
    """
    where = Folder(folder)
    files = (*schema.vocabulary.values(), *part_files(schema))
    check_sizes(where, files)
    with tqdm(
        total=sum(file.bytes for file in files),
        desc="Verifying",
        unit="B",
        unit_scale=True,
        disable=None if progress else True,
    ) as bar:
        for file in files:
            checksum = hashlib.sha256()
            with where.open(file.path) as stored:
                while piece := stored.read(_PIECE_BYTES):
                    checksum.update(piece)
                    bar.update(len(piece))
            if checksum.hexdigest() != file.sha256:
                raise UserError(
                    f"{where / file.path} is altered: its sha256 is {checksum.hexdigest()[:12]}..., its dataset.json "
                    f"says {file.sha256[:12]}...; {_REMEDY}"
                )


def open_part(
    folder: str | Path | Folder, schema: DatasetSchema, file: DataFile, verify: bool = True
) -> pq.ParquetFile:
    """Opens a part file and compares its footer with the schema.

    Args:
        folder: the dataset folder.
        schema: its schema.
        file: one of its part files.
        verify: let reading compare the checksums of pages.

    Raises:
        UserError: the file is missing or not Parquet, or its columns, its rows per row group or its
            ids do not fit the schema.
    """
    where = Folder(folder)
    check_sizes(where, [file])
    path = where / file.path
    part = where.open_parquet(file.path, verify)
    arrow = part.schema_arrow
    for column in schema.columns:
        found = arrow.field(column.name).type if column.name in arrow.names else None
        if found is None or not _fits(found, column):
            state = "is missing" if found is None else f"has type {found}"
            raise UserError(f"{path}: column {column.name} {state}, expected {_TYPES[column.role]}; {_REMEDY}")
    metadata = part.metadata
    groups = tuple(metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))
    if groups != file.row_groups:
        raise UserError(
            f"{path} is altered: it has {sum(groups)} rows in {len(groups)} row groups, its dataset.json says "
            f"{file.rows} in {len(file.row_groups)} (or splits them differently); {_REMEDY}"
        )
    _check_ids(path, schema, metadata)
    return part


def weighted_column(weights: Column) -> str:
    """The multi-hot column that a weights column belongs to."""
    return weights.name.removesuffix(WEIGHTS_SUFFIX)


def check_weights(where: str, weights: pa.Array | pa.ChunkedArray, ids: pa.Array | pa.ChunkedArray) -> None:
    """Sees that every bag has a weight, and no null or NaN, for each of its ids.

    Args:
        where: the column, for the message, and the file where there is one.
        weights: list<float32>.
        ids: list<int32>, as many lists.

    Raises:
        UserError: it has not.
    """
    lengths = pc.list_value_length(weights)
    different = pc.indices_nonzero(pc.fill_null(pc.not_equal(lengths, pc.list_value_length(ids)), True))
    if len(different):
        row = different[0].as_py()
        found, expected = (len(lists[row].as_py() or ()) for lists in (weights, ids))
        raise UserError(
            f"{where}: row {row} has {found} weights for {expected} ids; give each id one weight, "
            "and an empty bag an empty list"
        )
    if pc.any(pc.is_null(pc.list_flatten(weights), nan_is_null=True)).as_py():
        raise UserError(f"{where}: a weight is null or NaN; give each id a number, such as 1")


def count_values(part: pq.ParquetFile, columns: Sequence[Column]) -> int:
    """How many values some columns of a part file have (an empty bag counts as one)."""
    metadata = part.metadata
    positions = _leaves(metadata)
    groups = (metadata.row_group(group) for group in range(metadata.num_row_groups))
    return sum(group.column(positions[column.name]).num_values for group in groups for column in columns)


def read_group(
    where: Folder, file: DataFile, part: pq.ParquetFile, group: int, columns: Sequence[Column], threads: bool = True
) -> pa.Table:
    """Some columns of a row group.

    Args:
        where: the dataset folder.
        file: one of its part files.
        part: the same, open.
        group: which row group.
        columns: which of the schema's columns.
        threads: let pyarrow decode columns side by side.

    Raises:
        UserError: it cannot be read, or has nulls where none can be.
    """
    path = where / file.path
    try:
        table = part.read_row_group(group, columns=[column.name for column in columns], use_threads=threads)
    except Exception as error:  # remote file systems have errors of their own
        raise UserError(
            f"{path} is altered: row group {group} cannot be decoded ({one_line(error)}); {_REMEDY}"
        ) from error
    for column in columns:
        if column.role in _WITHOUT_NULLS and (nulls := _nulls(table.column(column.name))):
            raise UserError(
                f"{path}, row group {group}, column {column.name} has nulls ({nulls:,}); {_WITHOUT_NULLS[column.role]}"
            )
    return table


def read_groups(
    folder: str | Path | Folder, schema: DatasetSchema, file: DataFile, columns: Sequence[Column]
) -> Iterator[pa.Table]:
    """Some columns of a part file, row group by row group.

    Raises:
        UserError: see ``open_part`` and ``read_group``.
    """
    where = Folder(folder)
    with open_part(where, schema, file) as part:
        for group in range(part.num_row_groups):
            yield read_group(where, file, part, group, columns)


def _nulls(values: pa.ChunkedArray) -> int:
    """Nulls among values, of lists among their items; a list that is null is an empty one."""
    if pa.types.is_list(values.type):
        return sum(chunk.flatten().null_count for chunk in values.chunks)
    nulls: int = values.null_count
    return nulls


def _leaves(metadata: pq.FileMetaData) -> dict[str, int]:
    """Where the values of each column are, by its name; writers name the items of lists differently."""
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    return {re.sub(r"\.list\.\w+$", "", path): i for i, path in enumerate(paths)}


def _check_ids(path: str, schema: DatasetSchema, metadata: pq.FileMetaData) -> None:
    positions = _leaves(metadata)
    for column in schema.by_role("categorical", "multi_hot"):
        for group in range(metadata.num_row_groups):
            place = f"{path}: row group {group} of column {column.name}"
            values = metadata.row_group(group).column(positions[column.name])
            statistics = values.statistics
            if column.role == "categorical" and statistics is not None and statistics.null_count:
                raise UserError(f"{place} has nulls ({statistics.null_count:,}); {_WITHOUT_NULLS['categorical']}")
            if statistics is None or not statistics.has_min_max:
                if column.role == "multi_hot" and statistics is not None and statistics.num_values == 0:
                    continue  # all bags are empty
                raise UserError(
                    f"{place} tells no smallest and largest id, so they cannot be checked; write it with statistics, "
                    "as DatasetWriter does"
                )
            if statistics.min < 0 or statistics.max >= column.cardinality:
                raise UserError(
                    f"{place} has ids from {statistics.min} to {statistics.max}, its table has rows 0 to "
                    f"{column.cardinality - 1}; make the dataset again"
                )


def arrow_table(columns: Sequence[Column], arrays: Mapping[str, Values]) -> pa.Table:
    """Rows in the types of part files; see ``DatasetWriter.write`` for the arrays."""
    names = [column.name for column in columns]
    assert set(arrays) == set(names), f"columns {sorted(arrays)} given, {sorted(names)} expected"
    table = pa.table([_to_arrow(column, arrays[column.name]) for column in columns], schema=_arrow_schema(columns))
    for column in columns:
        if column.role == "weights":
            check_weights(column.name, table.column(column.name), table.column(weighted_column(column)))
    return table


def _arrow_schema(columns: Sequence[Column]) -> pa.Schema:
    """Labels and single ids are required: without levels that tell nulls apart they are a tenth faster to write, and to
    read."""
    return pa.schema(
        [
            pa.field(column.name, _TYPES[column.role], nullable=column.role not in ("label", "categorical"))
            for column in columns
        ]
    )


def _to_arrow(column: Column, values: Values) -> pa.Array:
    kind = _TYPES[column.role]
    if pa.types.is_list(kind):
        if not isinstance(values, tuple):
            assert values.type.equals(kind), f"column {column.name}: {values.type} given, {kind} expected"
            return values
        items = np.array(values[0], dtype=kind.value_type.to_pandas_dtype())
        return pa.ListArray.from_arrays(pa.array(np.array(values[1], dtype=np.int32)), pa.array(items), type=kind)
    assert isinstance(values, np.ndarray) and values.dtype == kind.to_pandas_dtype(), (
        f"column {column.name}: {getattr(values, 'dtype', type(values))} given, {kind} expected"
    )
    values = values.copy()
    return pa.array(values, mask=np.isnan(values)) if column.role == "dense" else pa.array(values)


def _leaf(column: Column) -> str:
    """Name of the Parquet leaf that holds a column's values."""
    return f"{column.name}.list.element" if pa.types.is_list(_TYPES[column.role]) else column.name


def _fits(found: pa.DataType, column: Column) -> bool:
    expected = _TYPES[column.role]
    if pa.types.is_list(expected):
        return pa.types.is_list(found) and found.value_type.equals(expected.value_type)
    return found.equals(expected)


def _data_file(root: Path, path: str, groups: tuple[int, ...] = ()) -> DataFile:
    return DataFile(path=path, sha256=file_sha256(root / path), bytes=(root / path).stat().st_size, row_groups=groups)


def flush(path: Path) -> None:
    """Brings a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
