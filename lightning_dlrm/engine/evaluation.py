"""What one evaluation of a split finds."""

import numpy as np
from torch import Tensor, nn

from lightning_dlrm.objectives.curves import ClickCurves, click_curves
from lightning_dlrm.objectives.metrics import ClickMetrics
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

    def counts(self) -> tuple[int, int]:
        """Return the numbers of samples and of clicks over all ranks; all ranks call it together."""
        labels = self.metrics.labels
        here = [sum(len(part) for part in labels), sum(int((part > 0).sum()) for part in labels)]
        samples, clicks = np.sum(Ranks().all_gather(np.array(here)), axis=0).tolist()
        return samples, clicks

    def reset(self) -> None:
        """Forget every batch."""
        self.metrics.reset()
