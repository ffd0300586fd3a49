"""The logits and labels that metrics are computed from: of an evaluation, and of the last training samples."""

import logging
import math
from collections import deque
from collections.abc import Iterator
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.schema import DatasetSchema
from lightning_dlrm.engine.guards import words_of_chance
from lightning_dlrm.objectives.metrics import ClickCurves, ClickMetrics, click_curves, click_metrics
from lightning_dlrm.sharding.collectives import Ranks
from lightning_dlrm.tracking import names

log = logging.getLogger("lightning_dlrm")


class Evaluation(nn.Module):
    """The logits and labels of an evaluation, and the metrics of all ranks together.

    Args:
        stage: prefix of the metrics' names, ``validation`` or ``test``.
    """

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage
        self.metrics = ClickMetrics(Ranks)

    def update(self, logits_B: Tensor, labels_B: Tensor, groups_B: Tensor | None) -> None:
        """Take the logits, labels and, if the batch has them, groups of one batch, all [B]."""
        self.metrics.update(logits_B, labels_B, groups_B)

    def results(self) -> dict[str, float]:
        """Return the metrics over all ranks, in full precision; all ranks call it together."""
        found = self.metrics.compute()
        if math.isnan(found["auc"]) and math.isfinite(found["log_loss"]) and Ranks().rank == 0:
            log.warning(
                "all labels of the %s split are equal, so its AUC is not defined (nan): evaluate on rows with clicks "
                "and rows without",
                self.stage,
            )
        elif math.isnan(found.get(names.GROUP_AUC, 0.0)) and math.isfinite(found["log_loss"]) and Ranks().rank == 0:
            log.warning(
                "no group of the %s split has rows with clicks and rows without, so its AUC by group is not defined "
                "(nan): group by another column (data.group)",
                self.stage,
            )
        return {f"{self.stage}/{name}": value for name, value in found.items()}

    def curves(self) -> ClickCurves:
        """Return the curves over all ranks; all ranks call it together."""
        return click_curves(self.metrics.logits, self.metrics.labels, Ranks())

    def refuse_log_loss(self) -> NoReturn:
        """
        Raises:
            UserError: always; the log loss is NaN or infinite.
        """
        raise UserError(
            f"the log loss of the {self.stage} split is NaN or infinite: some values of its rows are NaN or infinite, "
            "or the model overflows on them; look for outliers in its dense columns"
        )

    def warn_of_chance(
        self,
        results: dict[str, float],
        schema: DatasetSchema,
        batch_size: int,
        learning_rates: dict[str, float],
        fault: str = "",
    ) -> str:
        """Log and return ``guards.words_of_chance`` with the counts of all ranks, on rank 0; all ranks call it
        together."""
        optimum = schema.optimum.get("validation")
        if optimum is not None and optimum.auc <= 0.5:
            # The labels are independent of the features.
            return ""
        labels = self.metrics.labels
        here = [sum(len(part) for part in labels), sum(int((part > 0).sum()) for part in labels)]
        ranks = Ranks()
        samples, clicks = np.sum(ranks.all_gather(np.array(here)), axis=0).tolist()
        if ranks.rank != 0:
            return ""
        auc, log_loss = results[f"{self.stage}/auc"], results[f"{self.stage}/log_loss"]
        words = words_of_chance(auc, clicks, samples, batch_size, learning_rates, schema.large_numbers, log_loss, fault)
        if words:
            log.warning("%s %s", self.stage, words)
        return words

    def reset(self) -> None:
        """Forget every batch."""
        self.metrics.reset()


class TrainingWindow:
    """Logits and labels of the last ``names.WINDOW_SAMPLES`` training samples of all ranks.

    Each sample is scored in its own step, before the update. New batches stay on their rank and device until they
    are gathered.
    """

    def __init__(self) -> None:
        self._gathered = [torch.empty(0), torch.empty(0, dtype=torch.int8)]
        """Logits float32 [N] and labels int8 [N] on the CPU: batch after batch, in each of them rank after rank."""
        self._new: deque[tuple[Tensor, Tensor, int]] = deque()
        """Logits and labels of this rank's slice, and the global size, of each batch since the last ``gather``."""
        self._new_samples = 0

    def load(self, gathered: list[Tensor]) -> None:
        """Continue from what ``gather`` returned; an empty list is an empty window."""
        if gathered:
            self._gathered = list(gathered)

    def add(self, logits_B: Tensor, labels_B: Tensor, global_size: int) -> None:
        """Add this rank's slice of a batch; drop batches that lie wholly before the window."""
        self._new.append((logits_B.float(), labels_B, global_size))
        self._new_samples += global_size
        while self._new_samples - self._new[0][2] >= names.WINDOW_SAMPLES:
            self._new_samples -= self._new.popleft()[2]

    def gather(self) -> list[Tensor]:
        """Return the logits and labels of the window over all ranks; all ranks call it together.

        Raises:
            UserError: a label is neither 0 nor 1.
        """
        if self._new:
            ranks = Ranks()
            logits, labels = (torch.cat(parts).cpu() for parts in list(zip(*self._new, strict=True))[:2])
            counts = ranks.all_gather(np.array([len(part) for part, *_ in self._new]))
            self._new.clear()
            self._new_samples = 0
            self._gathered = [
                torch.cat([old, *_by_batch(ranks.all_gather_uneven(new.numpy()), counts)])[-names.WINDOW_SAMPLES :]
                for old, new in zip(self._gathered, (logits, labels), strict=True)
            ]
            # Here, because all ranks have the labels of all ranks, and no step waits for the device.
            values = self._gathered[1].unique().tolist()
            require(set(values) <= {0, 1}, f"the labels are {values}; expected 0 (no click) and 1 (click)")
        return list(self._gathered)

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the gathered samples by name."""
        logits, labels = self._gathered
        found = click_metrics(logits, labels)
        return {f"{names.TRAIN}/{name}": found[name] for name in names.TRAIN_METRICS}


def _by_batch(of_ranks: list[NDArray], counts: list[NDArray]) -> Iterator[Tensor]:
    """Cut each rank's samples into batches and yield them batch after batch, rank after rank."""
    cut = [np.split(samples, np.cumsum(count)[:-1]) for samples, count in zip(of_ranks, counts, strict=True)]
    return (torch.from_numpy(part) for batch in zip(*cut, strict=True) for part in batch)
