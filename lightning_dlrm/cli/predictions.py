"""``predict`` writes ``predictions.parquet``, batch by batch: memory does not grow with the rows."""

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytorch_lightning as pl
from numpy.typing import NDArray
from pytorch_lightning.callbacks import BasePredictionWriter
from torch import Tensor

from datamodules.folder import consistent
from lightning_dlrm.contracts.errors import UserError, one_line, require, shown_path
from lightning_dlrm.sharding.collectives import Ranks
from lightning_dlrm.tracking.run_folder import PREDICTIONS, RunFolder, set_aside

log = logging.getLogger("lightning_dlrm")

SCHEMA = pa.schema([("row", pa.int64()), ("probability", pa.float32())])
"""Columns that each rank writes, and that every file of predictions has."""


@dataclass(kw_only=True)
class SplitPredictions:
    """Numbers of the predictions of a split."""

    rows: int = 0
    probabilities: float = 0.0
    """Sum of the predicted probabilities."""
    labels: int = 0
    """Rows that have a label."""
    clicks: int = 0
    """Rows with the label 1."""

    def add(self, table: pa.Table) -> None:
        """Add the rows of a table."""
        self.rows += len(table)
        self.probabilities += pc.sum(table["probability"]).as_py() or 0.0
        if "label" in table.column_names:
            self.labels += len(table) - table["label"].null_count
            self.clicks += pc.sum(table["label"]).as_py() or 0


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The content of a file of predictions."""

    columns: Sequence[str]
    splits: Mapping[str, SplitPredictions]
    """Split -> its numbers; without a column ``split`` all rows have an empty name."""


class PredictionWriter(BasePredictionWriter):
    """Callback that writes the columns ``split``, ``row`` (position in the data that are scored, int64), the label if
    there is one, ``probability`` (float32) and kept columns.

    Each rank writes its rows in order to a file of its own; at the end rank 0 merges the files in row order. After an
    error none of these files is left.

    Args:
        folder: the run folder.
        read_beside: yields the columns other than features of all rows, in order: ``split``, the label if there is one,
            and kept columns. With None, only ``row`` and ``probability`` are written.
        allow_nonfinite: whether to write probabilities that are NaN, which end the command by default: at once with one
            rank, else on all ranks together when all rows are scored.
    """

    def __init__(
        self,
        folder: RunFolder,
        read_beside: Callable[[], Iterator[pa.Table]] | None = None,
        allow_nonfinite: bool = False,
    ) -> None:
        super().__init__(write_interval="batch")
        self._folder, self._read_beside = folder, read_beside
        self._allow_nonfinite = allow_nonfinite
        self._writer: pq.ParquetWriter | None = None
        self.written = Predictions(columns=[], splits={})
        """What the merged file has, on rank 0."""
        self._nan_row: int | None = None
        """The first row of this rank whose probability is NaN."""

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._writer, self._nan_row = pq.ParquetWriter(self._partial(trainer.global_rank), SCHEMA), None

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
        if len(bad) and self._nan_row is None:
            self._nan_row = int(bad[0])
            if trainer.world_size == 1:
                self._refuse_nan()
        self._writer.write_table(pa.table(columns, schema=SCHEMA))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._writer is not None
        self._writer.close()
        Ranks().run_on_all_ranks(self._refuse_nan)
        Ranks(long_timeout=True).run_on_rank_zero(lambda: self._merge(trainer.world_size))

    def _refuse_nan(self) -> None:
        """
        Raises:
            UserError: a probability of this rank is NaN, and ``allow_nonfinite`` is false.
        """
        require(
            self._nan_row is None or self._allow_nonfinite,
            f"the probability of row {self._nan_row} is NaN: some values of the row are NaN or infinite, or the model "
            "overflows on it; look "
            "for outliers in its dense columns, or write all rows with --allow_nonfinite true",
        )

    def _merge(self, ranks: int) -> None:
        target = self._folder.path / PREDICTIONS
        beside = None if self._read_beside is None else self._read_beside()
        self.written = merge_by_row([self._partial(rank) for rank in range(ranks)], target, beside)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._writer is None:
            return
        with contextlib.suppress(OSError):
            # On a full disk it cannot write its end.
            self._writer.close()
        # Another rank may be killed before it removes its file.
        ranks = range(trainer.world_size) if trainer.is_global_zero else [trainer.global_rank]
        for rank in ranks:
            self._partial(rank).unlink(missing_ok=True)

    def _partial(self, rank: int) -> Path:
        return self._folder.path / f"{PREDICTIONS}.partial-{rank}"


def merge_by_row(parts: Sequence[Path], target: Path, beside: Iterator[pa.Table] | None = None) -> Predictions:
    """Merge files that are each in row order into one, and remove them; an earlier ``target`` is set aside.

    Args:
        parts: the files.
        target: the file to write.
        beside: further columns of all rows from row 0 on: see ``PredictionWriter``.

    Returns:
        The content of the merged file.

    Raises:
        UserError: a part is missing.
    """
    missing = [part for part in parts if not part.is_file()]
    if missing:
        raise UserError(
            f"the predictions {missing[0]} of another rank are not visible to rank 0: "
            "put the run folder on a file system that all nodes share"
        )
    partial = parts[0].with_name(f"{target.name}.partial")
    tables = _with_beside(_merged([_Source(part) for part in parts]), beside)
    first, splits = next(tables, SCHEMA.empty_table()), dict[str, SplitPredictions]()
    try:
        with pq.ParquetWriter(partial, first.schema) as writer:
            for table in itertools.chain([first], tables):
                writer.write_table(table)
                for name, of_split in _by_split(table).items():
                    splits.setdefault(name, SplitPredictions()).add(of_split)
        if target.exists():
            log.info("the previous %s is kept as %s", shown_path(target), shown_path(set_aside(target)))
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    for part in parts:
        part.unlink()
    return Predictions(columns=first.column_names, splits=splits)


def _by_split(table: pa.Table) -> dict[str, pa.Table]:
    if "split" not in table.column_names:
        return {"": table}
    names = table["split"].unique().to_pylist()
    return {name: table.filter(pc.equal(table["split"], name)) for name in names}


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
        with consistent(pq.ParquetFile(path), path, "make it again with predict") as file:
            found, columns = file.metadata.num_rows, file.schema_arrow
            require(found == rows, f"{path} has {found:,} rows, the data {rows:,}: remove it, and compare again")
            is_whole = all(field in list(columns) for field in SCHEMA)
            require(is_whole, f"{path} has the columns {columns.names}, expected {SCHEMA.names}: make it with predict")
            table = file.read(SCHEMA.names)
    except UserError:
        raise
    except Exception as error:  # pyarrow raises many classes of errors for a damaged file
        raise UserError(f"cannot read {path}: {one_line(error)}; make it again with predict") from error
    require(
        len(table) == rows and not any(column.null_count for column in table.columns),
        f"{path} has empty values or too few rows; make it again with predict",
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


def _with_beside(scored: Iterator[pa.Table], beside: Iterator[pa.Table] | None) -> Iterator[pa.Table]:
    """Yield tables of ascending rows with the further columns of these rows."""
    if beside is None:
        yield from scored
        return
    first, loaded = 0, next(beside, None)
    for table in scored:
        rows, found = table["row"].to_numpy(), []
        while len(rows):
            assert loaded is not None, "rows beyond the data were scored"
            inside = int(np.searchsorted(rows, first + len(loaded)))
            found.append(loaded.take(rows[:inside] - first))
            rows = rows[inside:]
            if len(rows):
                first, loaded = first + len(loaded), next(beside, None)
        of_rows = pa.concat_tables(found)
        names = of_rows.column_names
        columns = {"split": of_rows["split"], "row": table["row"]}
        columns |= {name: of_rows[name] for name in names if name == "label"} | {"probability": table["probability"]}
        yield pa.table({**columns, **{name: of_rows[name] for name in names if name not in columns}})
