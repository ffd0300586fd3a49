"""What the stages ``counting`` and ``parts`` share: what they are to do, and where their files lie."""

import os
import shutil
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datamodules.preprocess.multi_hot import MultiHot
from datamodules.preprocess.protocols import Protocol, Table, find_protocol
from datamodules.preprocess.splits import SplitRule


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


@contextmanager
def scratch_folder(encoding: Encoding, name: str) -> Iterator[Path]:
    """A folder for one job of one process. What a killed process leaves is removed when the run goes on."""
    folder = encoding.folder / "scratch" / f"{name}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_items(place: Path, kind: np.dtype, begin: int, end: int | None) -> np.ndarray:
    """Items ``begin`` to ``end`` of a file, None for its end."""
    return np.fromfile(place, kind, -1 if end is None else end - begin, offset=begin * kind.itemsize)
