"""Segments, the rows as ``staging`` leaves them: their list, their content, and the splits of their rows."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from datamodules.preprocess.journal import written_aside
from datamodules.preprocess.protocols import Table, bucket
from datamodules.preprocess.splits import Span, SplitRule
from lightning_dlrm.contracts.schema import CRITEO_CATEGORICAL, CRITEO_LABEL, SPLITS, SplitName


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
        if CRITEO_LABEL not in self._batch.schema.names:
            return None
        return self._batch.column(CRITEO_LABEL).to_numpy()

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
        binned = pa.array(bucket(values), mask=None if table.missing_as_value else missing).dictionary_encode()
        return binned.dictionary.to_numpy(), binned.indices.fill_null(len(binned.dictionary)).to_numpy()


@lru_cache(maxsize=2)
def load_segments(path: Path) -> list[Segment]:
    """Load the list of segments that ``save_segments`` wrote."""
    content = json.loads(path.read_text())
    return [Segment(**{**entry, "path": path.parent / entry["path"]}) for entry in content]


def save_segments(path: Path, segments: Sequence[Segment]) -> None:
    with written_aside(path) as partial:
        partial.write_text(
            json.dumps([{**vars(segment), "path": os.path.relpath(segment.path, path.parent)} for segment in segments])
        )


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
