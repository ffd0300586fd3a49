"""Writing a checkpoint again with other pieces of its tables."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_dlrm.contracts.errors import require
from lightning_dlrm.sharding.checkpoint import CheckpointReader, PieceTensors, save_checkpoint
from lightning_dlrm.tables.table import TablePiece


def rewrite_checkpoint(source: Path, folder: Path, bounds: Mapping[str, Sequence[int]] | None = None) -> None:
    """Write a checkpoint again with other pieces of its tables; each thread has one piece in memory at a time.

    Args:
        source: folder of the checkpoint.
        folder: folder of the new checkpoint.
        bounds: table name -> the first row of each piece, then the number of the table's rows; None for whole
            tables.

    Raises:
        UserError: ``source`` is incomplete, or ``folder`` exists or cannot be written.
    """
    require(not Path(folder).exists(), f"{folder} exists; give another folder for the new checkpoint")
    reader = CheckpointReader(source, allow_nonfinite=True)
    pieces = []
    for name, entry in reader.manifest.tables.items():
        rows = entry.shapes["weight"][0]
        for start, stop in itertools.pairwise((0, rows) if bounds is None else bounds[name]):
            piece = TablePiece(name=name, table_rows=rows, start=start, stop=stop, offset=0)
            pieces.append(PieceTensors(piece, _StoredRows(reader, piece)))
    save_checkpoint(folder, pieces, reader.rest(), reader.header)


class _StoredRows(Mapping[str, Tensor]):
    """The rows of a piece in a checkpoint; each slot is read at its access."""

    def __init__(self, reader: CheckpointReader, piece: TablePiece) -> None:
        self._reader, self._piece = reader, piece
        self._shapes = reader.manifest.tables[piece.name].shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, slot: str) -> Tensor:
        rows = self._piece.stop - self._piece.start
        dtype = self._reader.dtype(self._piece.name, slot)
        out = torch.empty(rows, *self._shapes[slot][1:], dtype=dtype)
        self._reader.read_rows(self._piece, slot, out)
        return out
