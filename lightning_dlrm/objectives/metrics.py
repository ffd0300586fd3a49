"""Metrics of click predictions, exact and in float64.

Shape suffix: N samples.
"""

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


def exact_auc(scores_N: Tensor, labels_N: Tensor) -> float:
    """Area under the ROC curve by sorting; a tie counts one half (Mann-Whitney U).

    Args:
        scores_N: any monotone score, such as the logit.
        labels_N: 0 or 1.

    Returns:
        The AUC in [0, 1]; NaN where one of the classes is missing, or a score is NaN.

    >>> exact_auc(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0, 0, 1, 1]))
    0.875
    """
    positives = int(labels_N.sum())
    negatives = labels_N.numel() - positives
    if positives == 0 or negatives == 0 or bool(scores_N.isnan().any()):
        return float("nan")
    sorted_scores_N, order_N = torch.sort(scores_N)
    sorted_labels_N = labels_N[order_N].to(torch.int64)
    _, counts = torch.unique_consecutive(sorted_scores_N, return_counts=True)
    ends = torch.cumsum(counts, 0)
    positives_below = torch.cumsum(sorted_labels_N, 0)[ends - 1]
    positives_here = positives_below.diff(prepend=positives_below.new_zeros(1))
    negatives_here = counts - positives_here
    negatives_before = torch.cumsum(negatives_here, 0) - negatives_here
    # Twice U in integers, so that ties lose nothing.
    twice_wins = (positives_here * (2 * negatives_before + negatives_here)).sum()
    return int(twice_wins) / (2 * positives * negatives)


def click_metrics(logits_N: Tensor, labels_N: Tensor) -> dict[str, float]:
    """Every metric of the project, by name.

    - ``log_loss``: mean cross-entropy in nats.
    - ``auc``: see ``exact_auc``.
    - ``accuracy``: share of samples where probability >= 0.5 agrees with the label.
    - ``normalized_entropy``: log loss divided by that of always predicting the samples' own click
      rate (He et al. 2014, section 2.2, equation 1); NaN where one of the classes is missing.
    - ``calibration``: predicted clicks divided by clicks (He et al. 2014, section 2.2).

    Raises:
        ValueError: there are no samples.
    """
    if logits_N.numel() == 0:
        raise ValueError("metrics of no samples")
    logits, labels = logits_N.double(), labels_N.double()
    log_loss = float(functional.binary_cross_entropy_with_logits(logits, labels))
    rate = float(labels.mean())
    base_entropy = float(torch.special.entr(torch.tensor([rate, 1 - rate], dtype=torch.float64)).sum())
    return {
        "log_loss": log_loss,
        "auc": exact_auc(logits_N, labels_N),
        "accuracy": float(((logits >= 0) == (labels > 0.5)).double().mean()),
        "normalized_entropy": log_loss / base_entropy if base_entropy > 0 else float("nan"),
        "calibration": float(logits.sigmoid().sum() / labels.sum()) if rate > 0 else float("nan"),
    }


class ClickMetrics(Metric):
    """Collects logits and labels of a whole evaluation, over all ranks: 5 bytes a sample."""

    full_state_update = False
    logits: list[Tensor]
    labels: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("logits", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")

    def update(self, logits_B: Tensor, labels_B: Tensor) -> None:
        """Adds a batch; logits are kept in float32 at least, labels as int8."""
        logits_B = logits_B.detach()
        self.logits.append(logits_B if logits_B.dtype == torch.float64 else logits_B.float())
        self.labels.append(labels_B.to(torch.int8))

    def compute(self) -> dict[str, float]:
        """See ``click_metrics``."""
        return click_metrics(dim_zero_cat(self.logits), dim_zero_cat(self.labels))
