"""``predict`` writes ``predictions.parquet``, batch by batch: memory does not grow with the rows."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytorch_lightning as pl
from numpy.typing import NDArray
from pytorch_lightning.callbacks import BasePredictionWriter
from torch import Tensor

from lightning_dlrm.contracts.errors import UserError, one_line, require
from lightning_dlrm.tracking.run_folder import PREDICTIONS, RunFolder, set_aside

log = logging.getLogger("lightning_dlrm")

SCHEMA = pa.schema([("row", pa.int64()), ("probability", pa.float32())])


class PredictionWriter(BasePredictionWriter):
    """Callback that writes the columns ``row`` (position in the split, int64) and ``probability`` (float32).

    Each rank writes its rows in order to a file of its own; at the end rank 0 merges the files in row order.

    Args:
        folder: the run folder.
        allow_nonfinite: whether to write probabilities that are NaN, which end the command by default.
    """

    def __init__(self, folder: RunFolder, allow_nonfinite: bool = False) -> None:
        super().__init__(write_interval="batch")
        self._folder = folder
        self._allow_nonfinite = allow_nonfinite
        self._writer: pq.ParquetWriter | None = None

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._writer = pq.ParquetWriter(self._partial(trainer.global_rank), SCHEMA)

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: dict[str, Tensor],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        assert self._writer is not None
        columns = [prediction[name].cpu().numpy() for name in SCHEMA.names]
        bad = columns[0][np.isnan(columns[1])]
        if len(bad) and not self._allow_nonfinite:
            raise UserError(
                f"the probability of row {bad[0]} is NaN: values of the row are, or the model overflows on it; look "
                "for outliers in its dense columns, or write all rows with --allow_nonfinite true"
            )
        self._writer.write_table(pa.table(columns, schema=SCHEMA))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._writer is not None
        self._writer.close()
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            parts = [self._partial(rank) for rank in range(trainer.world_size)]
            merge_by_row(parts, self._folder.path / PREDICTIONS)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._writer is not None:
            self._writer.close()
            self._partial(trainer.global_rank).unlink(missing_ok=True)

    def _partial(self, rank: int) -> Path:
        return self._folder.path / f"{PREDICTIONS}.partial-{rank}"


def merge_by_row(parts: Sequence[Path], target: Path) -> None:
    """Merge files that are each in row order into one, and remove them; an earlier ``target`` is set aside.

    Raises:
        UserError: a part is missing.
    """
    missing = [part for part in parts if not part.is_file()]
    if missing:
        raise UserError(
            f"the predictions {missing[0]} of another rank are not visible to rank 0: "
            "put the run folder on a file system that all nodes share"
        )
    if len(parts) > 1:
        partial = parts[0].with_name(f"{target.name}.partial")
        with pq.ParquetWriter(partial, SCHEMA) as writer:
            for table in _merged([_Source(part) for part in parts]):
                writer.write_table(table)
        for part in parts:
            part.unlink()
    else:
        partial = parts[0]
    if target.exists():
        log.info("the previous %s is kept as %s", target, set_aside(target))
    partial.replace(target)


def read_predictions(path: Path, rows: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return rows int64 [N] and probabilities float32 [N] that ``predict`` wrote.

    Args:
        path: the file.
        rows: N, the number of rows that it should have.

    Raises:
        UserError: the file is missing, was not written by ``predict``, or has another number of rows.
    """
    try:
        # Not read_table, which takes names of parent folders for columns.
        with pq.ParquetFile(path) as file:
            found, columns = file.metadata.num_rows, file.schema_arrow
            require(found == rows, f"{path} has {found:,} rows, the data {rows:,}: remove it, and compare again")
            is_whole = columns.names == SCHEMA.names and columns.types == SCHEMA.types
            require(is_whole, f"{path} has the columns {columns.names}, expected {SCHEMA.names}: make it with predict")
            table = file.read()
    except UserError:
        raise
    except Exception as error:  # pyarrow has many kinds for a damaged file
        raise UserError(f"cannot read {path}: {one_line(error)}; make it again with predict") from error
    require(
        len(table) == rows and not any(column.null_count for column in table.columns),
        f"{path} lacks values: make it again with predict",
    )
    # torch warns about Arrow's memory, which is read-only.
    return table["row"].to_numpy(), table["probability"].to_numpy().copy()


class _Source:
    """The rows of one part in order, read a row group at a time."""

    def __init__(self, path: Path) -> None:
        self._batches = self._read(path)
        self._rest: pa.RecordBatch | None = next(self._batches, None)

    @property
    def next_row(self) -> int | None:
        return None if self._rest is None else self._rest["row"][0].as_py()

    def take_below(self, row: int | None) -> pa.RecordBatch:
        """Return the loaded rows below ``row``; all of them if it is None."""
        assert self._rest is not None
        found = self._rest
        count = len(found) if row is None else int((found["row"].to_numpy() < row).sum())
        self._rest = found.slice(count) if count < len(found) else next(self._batches, None)
        return found.slice(0, count)

    @staticmethod
    def _read(path: Path) -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(path) as file:
            yield from (batch for batch in file.iter_batches() if len(batch))


def _merged(sources: Sequence[_Source]) -> Iterator[pa.Table]:
    while True:
        waiting = sorted(
            ((source.next_row, i) for i, source in enumerate(sources) if source.next_row is not None),
        )
        if not waiting:
            return
        after = waiting[1][0] if len(waiting) > 1 else None
        yield pa.Table.from_batches([sources[waiting[0][1]].take_below(after)])
