"""The callback that logs norms of gradients and table rows."""

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray

from lightning_dlrm.engine.metrics_logger import MetricsLogger
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.models.network import CTRNetwork
from lightning_dlrm.optim.optimizer import CTROptimizer
from lightning_dlrm.sharding.collectives import Ranks
from lightning_dlrm.tracking import names


class NormLogger(pl.Callback):
    """Callback that logs 2-norms at each logged step, before clipping and before the update.

    These are the norms of every gradient, and of each table's rows and their gradients, averaged over the rows that
    the step updates.

    Args:
        metrics: the callback that counts the samples; must come earlier in the list of callbacks.
    """

    def __init__(self, metrics: MetricsLogger) -> None:
        self._metrics = metrics
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
            logger.log_metrics({names.SAMPLES: self._metrics.samples, **found}, step=trainer.global_step)


@torch.no_grad()
def norms(network: CTRNetwork, optimizer: CTROptimizer) -> dict[str, float]:
    """Return the norms by name; with sharded tables all ranks call it together.

    The names are ``gradient_norm/total``, ``gradient_norm/PARAMETER``, ``row_norm/TABLE`` and
    ``row_gradient_norm/TABLE``. Tables without updated rows are left out.
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
    """Return sums over this rank's updated rows, [3, tables]: of their norms, of their gradients' norms, of ones."""
    sums = np.zeros((3, len(tables)))
    for lookup in network.lookups():
        gradient = lookup.gradient()
        if gradient is None:
            continue
        ends = torch.tensor([piece.offset + piece.stop - piece.start for piece in lookup.pieces])
        piece_U = torch.searchsorted(ends, gradient.rows.cpu(), right=True)
        # Rows of tables on the host may still be in flight.
        lookup.flush()
        touched = lookup.weight.index_select(0, gradient.rows.to(lookup.weight.device))
        weights = touched.float().norm(dim=1), gradient.values.float().norm(dim=1), torch.ones(len(touched))
        for i, weight in enumerate(weights):
            of_pieces = torch.bincount(piece_U, weight.double().cpu(), len(lookup.pieces))
            for piece, total in zip(lookup.pieces, of_pieces.tolist(), strict=True):
                sums[i, tables.index(piece.name)] += total
    return sums
