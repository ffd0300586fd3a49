"""Callback and plugin through which Lightning saves and opens checkpoint folders."""

import logging
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import CheckpointIO

from lightning_dlrm.contracts.errors import UserError, one_line, require
from lightning_dlrm.contracts.terminal import binary_size
from lightning_dlrm.engine.checkpoint_state import dense_tensors, optimizer_of, table_pieces
from lightning_dlrm.engine.fit_length import all_micro_batches
from lightning_dlrm.engine.loading import load_parameters
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.engine.plateau import ReduceOnPlateau
from lightning_dlrm.optim.dense import dense_state_bytes
from lightning_dlrm.sharding.checkpoint import (
    MANIFEST,
    CheckpointReader,
    link_checkpoint,
    resolve_checkpoint,
    save_checkpoint,
    staging_bytes,
)
from lightning_dlrm.sharding.collectives import Ranks
from lightning_dlrm.tracking import names
from lightning_dlrm.tracking.run_folder import RunFolder, set_aside

log = logging.getLogger("lightning_dlrm")

LAST, BEST = "last", "best"
MONITOR = f"{names.VALIDATION}/auc"


class FolderCheckpointIO(CheckpointIO):
    """Lightning plugin for checkpoint folders; every rank saves its table rows.

    Args:
        allow_nonfinite: whether to open checkpoints with NaN or infinite values, which are refused by default.
        fallbacks: checkpoints to try in this order if the checkpoint to open is damaged.
    """

    HOLDS_TABLES = True
    """Whether tables are written piece by piece; CTRModule needs such a plugin."""

    def __init__(self, allow_nonfinite: bool = False, fallbacks: Sequence[Path] = ()) -> None:
        self.allow_nonfinite = allow_nonfinite
        self.fallbacks = fallbacks

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        rest = {key: value for key, value in checkpoint.items() if key not in ("tables", "header")}
        save_checkpoint(Path(path), checkpoint["tables"], rest, checkpoint["header"], Ranks(long_timeout=True))

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        reader = CheckpointReader(Path(path), self.allow_nonfinite)
        for fallback in self.fallbacks:
            try:
                reader.verify_files(Ranks(long_timeout=True))
                break
            except UserError as error:
                log.warning("skipping a damaged or incomplete checkpoint: %s", one_line(error))
                reader = CheckpointReader(fallback, self.allow_nonfinite)
        return reader.rest() | {"tables": reader}

    def remove_checkpoint(self, path: Any) -> None:
        shutil.rmtree(path, ignore_errors=True)


class RunCheckpoints(Checkpoint):
    """Callback that saves the checkpoints ``last``, and ``best`` by validation AUC, in a run folder.

    With the callback ReduceOnPlateau, its rule chooses ``best``, and the module has these parameters at the end of a
    fit.

    Args:
        run_folder: the run folder; checkpoints are in its ``checkpoints``.
        every_n_steps: number of optimizer steps between two saves of ``last``; each validation saves it too. 0 saves
            after validations only.

    Raises:
        UserError: the number is negative.
    """

    def __init__(self, run_folder: RunFolder, every_n_steps: int) -> None:
        require(every_n_steps >= 0, f"checkpoint.every_n_steps is {every_n_steps}; expected 0 or more")
        self._run_folder = run_folder
        self.every_n_steps = every_n_steps
        self.best: dict[str, float] = {}
        """Metrics of the best validation so far, with its step."""
        self.seconds = 0.0
        """Time spent saving."""
        self._saved_step = 0

    @property
    def folder(self) -> Path:
        return self._run_folder.checkpoints

    def state_dict(self) -> dict[str, Any]:
        return {"best": dict(self.best)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = dict(state_dict["best"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: CTRModule) -> None:  # type: ignore[override]
        self._saved_step = trainer.global_step
        # Not earlier: if the checkpoint is refused, the run folder stays as it is.
        Ranks(long_timeout=True).run_on_rank_zero(self._set_later_aside)
        pieces = table_pieces(pl_module)
        here = sum(tensor.nbytes for piece in pieces for tensor in piece.tensors.values())
        sizes = np.stack(Ranks().all_gather(np.array([here, staging_bytes(pieces)])))
        # Rank 0 also writes the dense parameters and their optimizer state.
        rest = sum(tensor.nbytes for tensor in dense_tensors(pl_module))
        if not optimizer_of(pl_module).state:
            # Optimizers make it in their first step.
            rest += dense_state_bytes(pl_module.dense_optimizer, pl_module.network.dense_parameters())
        taken = binary_size(int(sizes[:, 0].sum()) + rest)
        log.info("the tensors of a checkpoint take %s; last and best are kept", taken)
        if staging := int(sizes[:, 1].max()):
            log.info("saving it takes up to %s of page-locked memory in each rank", binary_size(staging))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # Also at the end of a fit without validations: after that, Lightning counts an unfinished epoch as finished.
        due = (self.every_n_steps and step % self.every_n_steps == 0) or _ends_now(trainer)
        if due and not validates_now(trainer, batch_idx):
            self.save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: CTRModule) -> None:  # type: ignore[override]
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        score, best, rule = pl_module.results[MONITOR], self.best.get(MONITOR), _plateau(trainer)
        # The first validation is the best so far, even if its AUC is NaN.
        improved = best is None or score > best or (best != best and score == score)
        if rule is not None:
            improved = rule.improved
        if improved:
            self.best = {names.STEP: trainer.global_step, **pl_module.results}
        self._save(trainer)
        if improved:
            Ranks(long_timeout=True).run_on_rank_zero(lambda: link_checkpoint(self.folder / LAST, self.folder / BEST))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Only the end of a fit without the callback FinalValidation has not been saved yet.
        self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Save ``last`` between two steps, unless the step is saved already; all ranks call it together."""
        if trainer.global_step != self._saved_step:
            self._save(trainer)

    def _set_later_aside(self) -> None:
        """Rename damaged checkpoints, and checkpoints of later steps than the step from which the fit continues.

        Raises:
            UserError: one cannot be renamed.
        """
        for path in (self.folder / LAST, self.folder / BEST):
            if path.exists() and _step_of(path) > self._saved_step:
                try:
                    aside = set_aside(path)
                except OSError as error:
                    raise UserError(
                        f"{path} cannot be renamed ({error.strerror}): check the permissions of {self.folder}"
                    ) from error
                log.warning("%s, damaged or of a later step, is set aside as %s", path, aside)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: CTRModule) -> None:  # type: ignore[override]
        if _plateau(trainer) is None or not self.best:
            return
        best = self.folder / BEST
        if best.exists():
            load_parameters(pl_module, CheckpointReader(resolve_checkpoint(best)))
        else:
            log.warning(
                "%s does not exist, because the best validation (step %s) was in the run that this fit continues: the "
                "model keeps the parameters of the last step",
                *(best, f"{self.best[names.STEP]:,}"),
            )

    def _save(self, trainer: pl.Trainer) -> None:
        start = time.perf_counter()
        trainer.save_checkpoint(self.folder / LAST)
        self._saved_step = trainer.global_step
        self.seconds += time.perf_counter() - start


def _plateau(trainer: pl.Trainer) -> ReduceOnPlateau | None:
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, ReduceOnPlateau)), None)


def _step_of(folder: Path) -> float:
    """Return the step of a checkpoint; infinite if it is damaged."""
    try:
        return float(CheckpointReader(folder).header[names.STEP]) if (folder / MANIFEST).is_file() else math.inf
    except (UserError, KeyError, TypeError, ValueError):
        return math.inf


def saved_steps(folder: Path) -> list[float]:
    """Return the steps of ``last`` and ``best`` in a run's ``checkpoints`` folder; infinite if missing or damaged."""
    return [_step_of(folder / name) for name in (LAST, BEST)]


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the first of ``whole_checkpoints``; None if there is none."""
    return next(iter(whole_checkpoints(folder)), None)


def whole_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a run's ``checkpoints`` folder that have all their files, by descending step.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    found: list[tuple[int, Path]] = []
    damaged: list[str] = []
    for name in (LAST, BEST):
        try:
            path = resolve_checkpoint(folder / name)
        except UserError:
            if (folder / name).exists():
                damaged.append(f"checkpoint {folder / name} has no manifest")
            continue
        try:
            found.append((int(CheckpointReader(path).header[names.STEP]), path))
        except (UserError, KeyError, TypeError, ValueError) as error:
            damaged.append(one_line(error) if isinstance(error, UserError) else f"checkpoint {path} has no step")
    if damaged and not found:
        raise UserError(
            f"all checkpoints in {folder} are damaged or incomplete ({'; '.join(damaged)}): restore one, or start "
            "again with another --run_dir"
        )
    for problem in damaged:
        log.warning("skipping a damaged or incomplete checkpoint: %s", problem)
    return [path for _, path in sorted(found, reverse=True)]


def _ends_now(trainer: pl.Trainer) -> bool:
    """Return whether the fit ends with this step; a request to end it waits for the smallest number of steps or
    epochs."""
    return trainer.should_stop and not trainer.fit_loop.min_epochs and not trainer.fit_loop.min_steps


def validates_now(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Return whether a validation, which saves too, follows this step."""
    interval = trainer.val_check_batch
    epochs = trainer.check_val_every_n_epoch
    if not trainer.enable_validation or (epochs is not None and (trainer.current_epoch + 1) % epochs):
        return False
    if _ends_now(trainer):
        return True
    counted = trainer.fit_loop.total_batch_idx if epochs is None else batch_idx
    return isinstance(interval, int) and interval > 0 and (counted + 1) % interval == 0


def refuse_validation_amid_a_step(trainer: pl.Trainer) -> None:
    """Check that no validation is between the micro-batches of a step: it saves, and would lose their gradients.

    Raises:
        UserError: a validation is between micro-batches.
    """
    interval, batches = trainer.val_check_batch, trainer.num_training_batches
    if not trainer.enable_validation or not isinstance(interval, int) or interval == batches:
        return
    counts_on = trainer.check_val_every_n_epoch is None
    for micro in sorted(all_micro_batches(trainer)):
        if interval % micro or (counts_on and batches % micro):
            raise UserError(
                f"trainer.val_check_interval is {interval} of {batches} batches in an epoch, but a step "
                f"takes {micro} batches (accumulate_grad_batches): validate between steps, at a multiple of {micro}"
                + (" batches of an epoch, with trainer.check_val_every_n_epoch at 1" if counts_on else "")
            )
