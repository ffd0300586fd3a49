"""Files of a column's distinct values by ranges, each of which fits into memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datamodules.preprocess.encoding import read_items


class ValueRanges:
    """Arrays of a column by ranges of value: the distinct values of every segment, and what is computed from them.

    ``entries`` and ``counts`` (int64) of a range are in the order of the segments; ``inverse`` and ``ids`` have one
    item for each entry. Each array is a file; those of a single range stay in memory, in the pieces that were added.
    """

    def __init__(self, scratch: Path, bounds: pa.Array):
        self.scratch, self.bounds = scratch, bounds
        self.parts = len(bounds) + 1
        self.lengths: list[int] = []
        """Entries of each segment."""
        self._held: dict[str, list[Any]] | None = {} if self.parts == 1 else None

    def add(self, part: int, name: str, items: np.ndarray) -> None:
        """Append items to an array of a range."""
        if self._held is not None:
            self._held.setdefault(name, []).append(items)
            return
        # Opened anew: of Terabyte's large columns there are hundreds, and the threads of a Dask worker share
        # what a process may have open.
        with self._place(part, name).open("ab") as file:
            items.tofile(file)

    def get(self, part: int, name: str, kind: np.dtype, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Return the items ``begin`` to ``end`` of an array of a range."""
        if self._held is not None:
            pieces = self._held[name]
            self._held[name] = pieces if len(pieces) == 1 else [np.concatenate(pieces)]
            return self._held[name][0][begin:end]
        return read_items(self._place(part, name), kind, begin, end)

    def take(self, part: int, name: str, kind: np.dtype) -> np.ndarray:
        """Return all of an array of a range and forget it."""
        items = self.get(part, name, kind)
        self._forget(part, name)
        return items

    def _forget(self, part: int, name: str) -> None:
        if self._held is not None:
            del self._held[name]
        else:
            self._place(part, name).unlink()

    def add_values(self, part: int, name: str, values: pa.Array) -> None:
        """Append values to an array of a range."""
        if self._held is not None:
            self._held.setdefault(name, []).append(values)
            return
        batch = pa.record_batch([values], ["value"])
        with self._place(part, name).open("ab") as file, pa.ipc.new_stream(file, batch.schema) as writer:
            writer.write_batch(batch)

    def get_values(self, part: int, name: str) -> pa.Array:
        """Return all values of an array of a range, mapped into memory if they were added at once."""
        chunks: list[pa.Array] = []
        if self._held is not None:
            chunks = self._held[name]
            return chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)
        with pa.memory_map(str(self._place(part, name))) as file:
            while file.tell() < file.size():
                chunks += pa.ipc.open_stream(file).read_all().column(0).chunks
        return chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)

    def take_values(self, part: int, name: str) -> pa.Array:
        """Return all values of an array of a range and forget it."""
        values = self.get_values(part, name)
        self._forget(part, name)
        return values

    def _place(self, part: int, name: str) -> Path:
        return self.scratch / f"{part:04d}.{name}"

    def order(self, values: pa.Array | range) -> tuple[np.ndarray | slice, np.ndarray]:
        """Return the order that sorts values by range, and where each range then ends."""
        if self.parts == 1:
            return slice(None), np.array([len(values)])
        assert not isinstance(values, range)
        if pa.types.is_string(self.bounds.type):
            above = (pc.greater_equal(values, bound).cast(pa.int32()).to_numpy() for bound in self.bounds)
            part = np.sum(list(above), axis=0)
        else:
            part = np.searchsorted(self.bounds.to_numpy(), values.to_numpy(), side="right")
        return np.argsort(part, kind="stable"), np.cumsum(np.bincount(part, minlength=self.parts))
