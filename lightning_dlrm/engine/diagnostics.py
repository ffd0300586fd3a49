"""What is not needed to train but to understand: curves of the predictions, norms of gradients and table rows."""

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray

from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.engine.recorder import Recorder
from lightning_dlrm.models.network import CTRNetwork
from lightning_dlrm.optim.optimizer import CTROptimizer
from lightning_dlrm.sharding.collectives import Ranks
from lightning_dlrm.tracking import names
from lightning_dlrm.tracking.run_folder import RunFolder, curves_file


class CurveWriter(pl.Callback):
    """Keeps the curves of each split's last evaluation in the run folder.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(names.VALIDATION, trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(names.TEST, trainer, pl_module)

    def _write(self, stage: str, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, CTRModule)
        if trainer.is_global_zero and not trainer.sanity_checking and pl_module.curves is not None:
            self._folder.write_json(curves_file(stage), pl_module.curves.document())


class NormRecorder(pl.Callback):
    """Logs 2-norms at each logged step: of every gradient, and, averaged over the rows that the step touches, of a
    table's rows and of their gradients. All of them are from before clipping and before the update.

    Args:
        recorder: knows the samples seen; must come earlier in the list of callbacks.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._norms: dict[str, float] = {}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if (trainer.global_step + 1) % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, CTRModule)
        ours: CTROptimizer = getattr(optimizer, "optimizer", optimizer)
        self._norms = norms(pl_module.network, ours)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        found, self._norms = self._norms, {}
        for logger in trainer.loggers if found else ():
            logger.log_metrics({names.SAMPLES: self._recorder.samples, **found}, step=trainer.global_step)


@torch.no_grad()
def norms(network: CTRNetwork, optimizer: CTROptimizer) -> dict[str, float]:
    """The norms by name: ``gradient_norm/total``, ``gradient_norm/WEIGHT``, ``row_norm/TABLE`` and
    ``row_gradient_norm/TABLE``; tables of which no row is touched are left out.

    Where tables are spread over ranks, all of them call it together.
    """
    found = {f"{names.GRADIENT_NORM}/total": optimizer.gradient_norm().item()}
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            found[f"{names.GRADIENT_NORM}/{name}"] = parameter.grad.float().norm().item()
    tables = [table.name for lookup in network.lookups() for table in lookup.tables]
    row_norms, gradient_norms, rows = np.sum(Ranks().all_gather(_sums_over_rows(network, tables)), axis=0)
    for name, row_norm, gradient_norm, count in zip(tables, row_norms, gradient_norms, rows, strict=True):
        if count:
            found[f"{names.ROW_NORM}/{name}"] = float(row_norm / count)
            found[f"{names.ROW_GRADIENT_NORM}/{name}"] = float(gradient_norm / count)
    return found


def _sums_over_rows(network: CTRNetwork, tables: list[str]) -> NDArray[np.float64]:
    """[3, tables]: over the touched rows held here, the sums of their norms and of their gradients' norms, and their
    number."""
    sums = np.zeros((3, len(tables)))
    for lookup in network.lookups():
        gradient = lookup.gradient()
        if gradient is None:
            continue
        ends = torch.tensor([piece.offset + piece.stop - piece.start for piece in lookup.pieces])
        piece_U = torch.searchsorted(ends, gradient.rows.cpu(), right=True)
        # Rows in host memory may still be on their way there.
        lookup.settle()
        touched = lookup.weight.index_select(0, gradient.rows.to(lookup.weight.device))
        weights = touched.float().norm(dim=1), gradient.values.float().norm(dim=1), torch.ones(len(touched))
        for i, weight in enumerate(weights):
            of_pieces = torch.bincount(piece_U, weight.double().cpu(), len(lookup.pieces))
            for piece, total in zip(lookup.pieces, of_pieces.tolist(), strict=True):
                sums[i, tables.index(piece.name)] += total
    return sums
