"""What the stages ``counting``, ``lookup`` and ``parts`` share: options, places of files, ids of distinct values."""

import os
import shutil
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datamodules.preprocess.journal import written_aside
from datamodules.preprocess.options import Options
from datamodules.preprocess.protocols import Protocol, Table, hash_modulo
from datamodules.preprocess.segments import OpenSegment
from datamodules.preprocess.splits import SplitRule


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How rows are encoded, and where the files of the stages are."""

    options: Options
    segments: Path
    """A file that lists the segments; a list would be too long to send with every job."""
    rule: SplitRule
    folder: Path
    """``encode/<options>``."""
    minimum: Mapping[str, int]
    """Of each integer column, over all files."""

    @property
    def protocol(self) -> Protocol:
        return self.options.rules

    @property
    def result(self) -> Path:
        return self.folder / "result"

    def record_of(self, table: Table) -> Path:
        return self.folder / "ids" / table.name

    def ids(self, table: Table) -> Path:
        return self.folder / "ids" / f"{table.name}.ids"

    def ends(self, table: Table) -> Path:
        """Return the file of int64 [segments + 1]: where the ids of each segment begin, and where the last ones end."""
        return self.folder / "ids" / f"{table.name}.ends"

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


def distinct_values(encoding: Encoding, table: Table, opened: OpenSegment) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct values uint32 [d] of a segment as the protocol counts them, and codes [n] into them.

    Values may repeat. If missing values count as 0, the last value stands for them; else code d does.
    """
    values, codes = opened.categories(table)
    if table.missing_as_value:
        values = np.append(values, np.uint32(0))
    if encoding.protocol.modulo == "hash":
        values = hash_modulo(values, encoding.options.max_rows)
    return values, codes


class IdsWriter:
    """Writes the ids of the distinct values of one segment after the other, each ending with the id of missing values.

    Args:
        scratch: the folder to write in before ``finish`` moves the file to its place.
        encoding: the encoding.
        table: the column.
        missing_id: the id of missing values, unless these count as a value.
    """

    def __init__(self, scratch: Path, encoding: Encoding, table: Table, missing_id: int) -> None:
        self._encoding, self._table, self._missing_id = encoding, table, np.int32(missing_id)
        self._place = scratch / "all.ids"
        self._file = self._place.open("wb")
        self._ends = [0]

    def write(self, ids: np.ndarray) -> None:
        """Append the ids int32 [d] of a segment's distinct values."""
        assert ids.dtype == np.int32
        if not self._table.missing_as_value:
            ids = np.append(ids, self._missing_id)
        self._file.write(ids.tobytes())
        self._ends.append(self._ends[-1] + len(ids))

    def finish(self) -> None:
        """Move the file to its place and write where the ids of each segment end."""
        self._file.close()
        self._place.replace(self._encoding.ids(self._table))
        with written_aside(self._encoding.ends(self._table)) as partial:
            np.array(self._ends, np.int64).tofile(partial)
