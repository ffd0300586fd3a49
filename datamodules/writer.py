"""Write a dataset folder whole or not at all: rows to Parquet part files of fixed sizes. Nothing here imports torch."""

import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datamodules.parquet import arrow_type, check_values, check_weights, weighted_column
from lightning_dlrm.contracts.disk import flush
from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.schema import SPLITS, Column, DataFile, DatasetSchema, Split, file_sha256

# A lane of the stream decodes and shuffles one row group at a time, so 48 lanes hold 48 of them: 130 MB at 165 bytes
# a row. Groups of 8,192 rows decode at 80% of the best speed (overhead of each chunk), these at 96%. Groups of 65,536
# decode no faster, hold 0.5 GB, and take 0.8 s to decode before a shuffled stream serves its first batch.
ROW_GROUP_ROWS = 16_384
# 64 row groups: a footer takes 2 ms to parse, and Kaggle makes 44 files, Terabyte 4,171.
ROWS_PER_FILE = 64 * ROW_GROUP_ROWS

Values: TypeAlias = Any  # np.ndarray | pa.Array | tuple[np.ndarray, np.ndarray]


class DatasetWriter:
    """Writes a dataset folder whole or not at all.

    Rows go to a hidden working folder beside the target. ``finish`` writes and flushes everything and renames the
    working folder to the target. Leaving the context without ``finish`` removes it. Equal input gives equal bytes
    (with one pyarrow version).

        with DatasetWriter(Path("data/mine"), columns) as writer:
            writer.write("train", {"label": labels, "I1": floats, "C1": ids})
            schema = writer.finish(dataset="mine", protocol="own")

    Args:
        folder: the dataset folder to make; it must not exist, or be empty.
        columns: every column of every row, in the order in which they are stored. Without a label column the
            dataset has no labels.

    Raises:
        UserError: ``folder`` is a file, or a folder that is not empty.
    """

    def __init__(self, folder: Path, columns: Sequence[Column]) -> None:
        self.folder = Path(folder).absolute()
        self.columns = tuple(columns)
        self._splits: dict[str, SplitWriter] = {}
        self._vocabulary: dict[str, DataFile] = {}
        self._check_target()
        # The process id separates processes that make the same dataset at the same time.
        self._prefix = f".{self.folder.name}.partial-{socket.gethostname()}-"
        self._partial = self.folder.with_name(f"{self._prefix}{os.getpid()}")

    def __enter__(self) -> "DatasetWriter":
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            self._partial.mkdir()
        except OSError as error:
            raise UserError(
                f"cannot write beside {self.folder}: {error.strerror}; choose a folder that you may write to "
                "(the variable LIGHTNING_DLRM_CACHE names the folder of demo and random data)"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for split in self._splits.values():
            split.abandon()
        shutil.rmtree(self._partial, ignore_errors=True)

    def write(self, split: str, arrays: Mapping[str, Values]) -> None:
        """Append rows to a split; the arrays may be reused afterwards.

        Args:
            split: ``train``, ``validation`` or ``test``.
            arrays: for every column B values: label int8; dense float32 (NaN is stored as null); categorical int32;
                multi-hot a list<int32> array, or a pair of int32 values [N] and offsets [B + 1]; weights likewise,
                with float32 values; kept columns an Arrow array.

        Raises:
            UserError: the numbers of weights and ids of a bag differ, or see ``parquet.check_values``.
        """
        assert split in SPLITS, f"split {split!r} is not one of {SPLITS}"
        if split not in self._splits:
            self._splits[split] = SplitWriter(self._partial, split, self.columns)
        self._splits[split].append(arrow_table(self.columns, arrays))

    @property
    def rows_on_disk(self) -> int:
        """Rows in finished row groups."""
        return sum(sum(split.groups) + sum(file.rows for file in split.files) for split in self._splits.values())

    @property
    def bytes_on_disk(self) -> int:
        """Bytes written so far."""
        return sum(path.stat().st_size for path in self._partial.rglob("*") if path.is_file())

    def write_vocabulary(self, name: str, table: pa.Table) -> None:
        """Write ``vocabulary/<name>.parquet``, the raw values of a categorical column's ids."""
        (self._partial / "vocabulary").mkdir(exist_ok=True)
        path = f"vocabulary/{name}.parquet"
        pq.write_table(table, self._partial / path, compression="zstd", store_schema=False)
        self._vocabulary[name] = data_file(self._partial, path)

    def finish(self, **schema_fields: Any) -> DatasetSchema:
        """Complete the dataset and rename its working folder to the target.

        Args:
            schema_fields: ``dataset``, ``protocol`` and, if the dataset has them, ``settings``, ``optimum`` and
                ``report`` of the DatasetSchema.

        Raises:
            UserError: the target was created in the meantime.
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
        require(
            not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())),
            f"{self.folder} exists and is not an empty folder; name a new folder, or remove it if it is not needed",
        )

    def _remove_leftovers(self) -> None:
        """Remove working folders of processes that were killed on this machine."""
        import psutil  # preprocess starts sooner without it

        for leftover in self.folder.parent.glob(f"{self._prefix}*"):
            process = leftover.name.removeprefix(self._prefix)
            if process.isdigit() and (int(process) == os.getpid() or not psutil.pid_exists(int(process))):
                shutil.rmtree(leftover, ignore_errors=True)


class SplitWriter:
    """Cuts appended rows into row groups and files of the fixed sizes.

    Args:
        root: the folder of the split's folder, which is made if it is missing.
        split: its name.
        columns: as of the DatasetWriter.
        first_part: the number of the first file; earlier files are written elsewhere.
        repeating: whether dense values repeat so often that dictionaries make them smaller.
    """

    def __init__(
        self, root: Path, split: str, columns: Sequence[Column], first_part: int = 0, repeating: bool = True
    ) -> None:
        self.root, self.split, self.first_part, self.columns = root, split, first_part, columns
        self.arrow = _arrow_schema(columns)
        self.label = next((column.name for column in columns if column.role == "label"), None)
        # Earlier releases compare the largest id with the table; statistics of other columns only grow the footer.
        self.ids = [_leaf(column) for column in columns if column.cardinality]
        self.others = [_leaf(column) for column in columns if not column.cardinality]
        # A dictionary that grows too large is given up: three times the CPU of these codings.
        self.codings = dict.fromkeys(self.ids, "BYTE_STREAM_SPLIT")
        if not repeating:
            kinds = {"dense": "BYTE_STREAM_SPLIT", "keep": "DELTA_BINARY_PACKED"}
            plain = {
                c.name: kinds[c.role] for c in columns if c.role == "dense" or c.transform in ("int64", "timestamp")
            }
            self.codings |= plain
            self.others = [name for name in self.others if name not in plain]
        self.pending: list[pa.Table] = []
        self.pending_rows = self.positives = 0
        self.files: list[DataFile] = []
        self.groups: list[int] = []
        self.writer: pq.ParquetWriter | None = None
        (root / split).mkdir(exist_ok=True)

    def append(self, table: pa.Table) -> None:
        """Append rows as ``arrow_table`` makes them."""
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
        """Write the remaining rows and return what this writer has written of the split."""
        if self.pending_rows:
            self._write_group(pa.concat_tables(self.pending))
        self._close_file()
        return Split(
            rows=sum(file.rows for file in self.files),
            positives=None if self.label is None else self.positives,
            files=tuple(self.files),
        )

    def abandon(self) -> None:
        """Close an unfinished file."""
        if self.writer is not None:
            with suppress(OSError):  # a full disk cannot hold its footer either
                self.writer.close()
            self.writer = None

    def _write_group(self, rows: pa.Table) -> None:
        if self.writer is None:
            self.writer = pq.ParquetWriter(
                self.root / self._path(),
                self.arrow,
                compression="zstd",
                # BYTE_STREAM_SPLIT for ids: half the time of dictionaries to write, nine tenths to read, and a sixth
                # less disk in all. Dense features repeat few values and are smaller with dictionaries.
                use_dictionary=self.others,
                column_encoding=self.codings,
                write_statistics=self.ids,
                store_schema=False,
                write_page_checksum=True,
            )
        for batch in rows.to_batches():
            check_values(f"{self.split} split", self.columns, batch, sum(self.groups))
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
            self.files.append(data_file(self.root, self._path(), tuple(self.groups)))
            self.groups = []

    def _path(self) -> str:
        return f"{self.split}/part-{self.first_part + len(self.files):05d}.parquet"


def arrow_table(columns: Sequence[Column], arrays: Mapping[str, Values]) -> pa.Table:
    """Return rows in the types of part files; see ``DatasetWriter.write`` for the arrays."""
    names = [column.name for column in columns]
    assert set(arrays) == set(names), f"columns {sorted(arrays)} given, {sorted(names)} expected"
    table = pa.table([_to_arrow(column, arrays[column.name]) for column in columns], schema=_arrow_schema(columns))
    for column in columns:
        if column.role == "weights":
            check_weights(column.name, table.column(column.name), table.column(weighted_column(column)))
    return table


def _arrow_schema(columns: Sequence[Column]) -> pa.Schema:
    """Return the types of part files. Labels and single ids are required (not nullable): without the levels that mark
    nulls they are a tenth faster to write and to read."""
    return pa.schema(
        [
            pa.field(column.name, arrow_type(column), nullable=column.role not in ("label", "categorical"))
            for column in columns
        ]
    )


def _to_arrow(column: Column, values: Values) -> pa.Array:
    kind = arrow_type(column)
    if column.role == "keep":
        return values.cast(kind)
    if pa.types.is_list(kind):
        if not isinstance(values, tuple):
            assert values.type.equals(kind), f"column {column.name}: {values.type} given, {kind} expected"
            return values
        items = np.array(values[0], dtype=_dtype(kind.value_type))
        return pa.ListArray.from_arrays(pa.array(np.array(values[1], dtype=np.int32)), pa.array(items), type=kind)
    assert isinstance(values, np.ndarray) and values.dtype == _dtype(kind), (
        f"column {column.name}: {getattr(values, 'dtype', type(values))} given, {kind} expected"
    )
    values = values.copy()
    return pa.array(values, mask=np.isnan(values)) if column.role == "dense" else pa.array(values)


def _dtype(kind: pa.DataType) -> np.dtype:
    """Return NumPy's dtype of an Arrow type. (``to_pandas_dtype`` of pyarrow 21 needs pandas.)"""
    return pa.nulls(0, kind).to_numpy(zero_copy_only=False).dtype


def _leaf(column: Column) -> str:
    """Return the name of the Parquet leaf that holds a column's values."""
    return f"{column.name}.list.element" if pa.types.is_list(arrow_type(column)) else column.name


def data_file(root: Path, path: str, groups: tuple[int, ...] = ()) -> DataFile:
    """Return the schema's entry of a finished file below ``root``."""
    return DataFile(path=path, sha256=file_sha256(root / path), bytes=(root / path).stat().st_size, row_groups=groups)
