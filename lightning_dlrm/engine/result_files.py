"""Callbacks that write the results of evaluations into the run folder."""

import pytorch_lightning as pl

from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.tracking import names
from lightning_dlrm.tracking.run_folder import RunFolder, curves_file


class EvaluationWriter(pl.Callback):
    """Callback that writes the metrics of ``validate`` and ``test`` to JSON files.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Rank 0 chose the folder.
        self.folder.path = trainer.strategy.broadcast(self.folder.path)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._write("validate.json", trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write("test.json", trainer, pl_module)

    def _write(self, name: str, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, CTRModule)
        if trainer.is_global_zero:
            self.folder.write_json(name, pl_module.results)


class CurveWriter(pl.Callback):
    """Callback that writes the curves of the last evaluation of each split, also within a fit.

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
