"""Losses, from logits: a probability would lose digits near 0 and 1."""

from torch import Tensor
from torch.nn import functional


def summed_log_loss(logits_B: Tensor, labels_B: Tensor) -> Tensor:
    """Binary cross-entropy in nats, summed over the samples; 0-dim.

    -sum(y log p + (1 - y) log(1 - p)), p = 1 / (1 + exp(-logit)).
    """
    return functional.binary_cross_entropy_with_logits(logits_B, labels_B.to(logits_B.dtype), reduction="sum")
