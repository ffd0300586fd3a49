"""The logits, labels and metrics of an evaluation."""

import numpy as np
from torch import Tensor, nn

from lightning_dlrm.contracts.schema import DatasetSchema
from lightning_dlrm.engine.guards import warn_of_chance
from lightning_dlrm.objectives.metrics import ClickCurves, ClickMetrics, click_curves
from lightning_dlrm.sharding.collectives import Ranks


class Evaluation(nn.Module):
    """The logits and labels of an evaluation, and the metrics of all ranks together.

    Args:
        stage: prefix of the metrics' names, ``validation`` or ``test``.
    """

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage
        self.metrics = ClickMetrics(Ranks)

    def update(self, logits_B: Tensor, labels_B: Tensor) -> None:
        """Take the logits and labels of one batch, both [B]."""
        self.metrics.update(logits_B, labels_B)

    def results(self) -> dict[str, float]:
        """Return the metrics over all ranks, in full precision; all ranks call it together."""
        return {f"{self.stage}/{name}": value for name, value in self.metrics.compute().items()}

    def curves(self) -> ClickCurves:
        """Return the curves over all ranks; all ranks call it together."""
        return click_curves(self.metrics.logits, self.metrics.labels, Ranks())

    def warn_of_chance(
        self, results: dict[str, float], schema: DatasetSchema, batch_size: int, learning_rates: dict[str, float]
    ) -> None:
        """Call ``guards.warn_of_chance`` with the counts of all ranks, on rank 0; all ranks call it together."""
        optimum = schema.optimum.get("validation")
        if optimum is not None and optimum.auc <= 0.5:
            # The labels depend on nothing.
            return
        labels = self.metrics.labels
        here = [sum(len(part) for part in labels), sum(int((part > 0).sum()) for part in labels)]
        ranks = Ranks()
        samples, clicks = np.sum(ranks.all_gather(np.array(here)), axis=0).tolist()
        if ranks.rank == 0:
            warn_of_chance(results[f"{self.stage}/auc"], clicks, samples, batch_size, learning_rates)

    def reset(self) -> None:
        """Forget every batch."""
        self.metrics.reset()
