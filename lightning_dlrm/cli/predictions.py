"""``predict`` writes ``predictions.parquet``, batch by batch: memory does not grow with the rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytorch_lightning as pl
from pytorch_lightning.callbacks import BasePredictionWriter
from torch import Tensor

from lightning_dlrm.tracking.run_folder import PREDICTIONS, RunFolder

SCHEMA = pa.schema([("row", pa.int64()), ("probability", pa.float32())])


class PredictionWriter(BasePredictionWriter):
    """Columns ``row`` (position in the split, int64) and ``probability`` (float32), in row order.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        super().__init__(write_interval="batch")
        self._target = folder.path / PREDICTIONS
        self._partial = Path(f"{self._target}.partial")
        self._writer: pq.ParquetWriter | None = None

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._writer = pq.ParquetWriter(self._partial, SCHEMA)

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
        self._writer.write_table(pa.table(columns, schema=SCHEMA))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._writer is not None
        self._writer.close()
        self._partial.replace(self._target)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._writer is not None:
            self._writer.close()
            self._partial.unlink(missing_ok=True)
