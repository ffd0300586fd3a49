"""Losses of logits; probabilities would lose precision near 0 and 1.

Every loss gives a cost for each sample, in nats, from its logit z and its target y in [0, 1].
``softplus(-z)`` = -log p and ``softplus(z)`` = -log(1 - p), p = 1 / (1 + exp(-z)).

Shape suffix: B samples.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.own_code import with_place


class Loss:
    """Base of the losses, with label smoothing and limits of the predictions.

    Args:
        label_smoothing: e; the target is y (1 - e) + e / 2 (Szegedy et al. 2016, section 7, two classes).
        clamp: t; probabilities are clamped to [t, 1 - t], and the gradient outside is zero, as with loss_threshold
            of facebookresearch/dlrm. 0 for no clamp.
    """

    def __init__(self, label_smoothing: float = 0.0, clamp: float = 0.0) -> None:
        require(0 <= label_smoothing < 1, f"label_smoothing is {label_smoothing}; expected 0 or more, below 1")
        require(0 <= clamp < 0.5, f"clamp is {clamp}; expected 0 or more, below 0.5")
        self.label_smoothing = label_smoothing
        self.clamp = clamp

    def summed(self, logits_B: Tensor, labels_B: Tensor) -> Tensor:
        """Return the sum over the samples; 0-dim, float32 at least.

        Args:
            logits_B: any floating-point dtype.
            labels_B: 0 or 1.
        """
        if logits_B.dtype in (torch.bfloat16, torch.float16):
            logits_B = logits_B.float()
        if self.clamp:
            limit = math.log((1 - self.clamp) / self.clamp)
            logits_B = logits_B.clamp(-limit, limit)
        targets_B = labels_B.to(logits_B.dtype)
        if self.label_smoothing:
            targets_B = targets_B * (1 - self.label_smoothing) + self.label_smoothing / 2
        costs_B: object = self.costs(logits_B, targets_B)
        if not isinstance(costs_B, Tensor) or costs_B.shape != logits_B.shape:
            found = f"shape {tuple(costs_B.shape)}" if isinstance(costs_B, Tensor) else f"a {type(costs_B).__name__}"
            raise UserError(
                f"{with_place(type(self).costs)} returns {found}; expected the cost of each sample, "
                f"({len(logits_B)},): return a tensor of the shape of the logits"
            )
        return costs_B.sum()

    def costs(self, logits_B: Tensor, targets_B: Tensor) -> Tensor:
        """Return the cost of each sample: [B], [B] -> [B]."""
        raise TypeError(f"{type(self).__name__} does not define costs")


class LogLoss(Loss):
    """Binary cross-entropy: -y log p - (1 - y) log(1 - p).

    Args:
        label_smoothing: e; the target is y (1 - e) + e / 2.
        clamp: probabilities are clamped to [clamp, 1 - clamp]; 0 for no clamp.
    """

    def costs(self, logits_B: Tensor, targets_B: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(logits_B, targets_B, reduction="none")


class ProbabilityLogLoss(Loss):
    """Binary cross-entropy of probabilities rounded to the logits' dtype, each logarithm at least -100, as in FuxiCTR.

    It differs from LogLoss by this rounding. A probability in float32 is exactly 1 for logits of 17 or more, and 0 for
    those below -88: its wrong label costs 100, and it has no gradient.

    Args:
        label_smoothing: e; the target is y (1 - e) + e / 2.
        clamp: probabilities are clamped to [clamp, 1 - clamp]; 0 for no clamp.
    """

    def costs(self, logits_B: Tensor, targets_B: Tensor) -> Tensor:
        with torch.autocast(logits_B.device.type, enabled=False):
            return functional.binary_cross_entropy(logits_B.sigmoid(), targets_B, reduction="none")


class WeightedLogLoss(Loss):
    """Binary cross-entropy with weights of the classes: -c y log p - n (1 - y) log(1 - p).

    The mean is over the samples and not over the weights, as in facebookresearch/dlrm (wbce).

    Args:
        click: c, the weight of label 1.
        no_click: n, the weight of label 0.
        label_smoothing: e; the target is y (1 - e) + e / 2.
        clamp: probabilities are clamped to [clamp, 1 - clamp]; 0 for no clamp.
    """

    def __init__(self, click: float, no_click: float = 1.0, label_smoothing: float = 0.0, clamp: float = 0.0) -> None:
        super().__init__(label_smoothing, clamp)
        require(
            0 < click < math.inf and 0 < no_click < math.inf,
            f"WeightedLogLoss: click is {click} and no_click {no_click}; expected numbers above 0",
        )
        self.click = click
        self.no_click = no_click

    def costs(self, logits_B: Tensor, targets_B: Tensor) -> Tensor:
        if_click_B = -self.click * functional.logsigmoid(logits_B)
        if_no_click_B = -self.no_click * functional.logsigmoid(-logits_B)
        return targets_B * if_click_B + (1 - targets_B) * if_no_click_B


class FocalLoss(Loss):
    """Focal loss, in which well-classified samples count less (Lin et al. 2017, equation 5).

    -a y (1 - p)^g log p - (1 - a) (1 - y) p^g log(1 - p).

    Args:
        gamma: g; 0 gives a weighted cross-entropy.
        alpha: a, the weight of label 1 against that of label 0.
        label_smoothing: e; the target is y (1 - e) + e / 2.
        clamp: probabilities are clamped to [clamp, 1 - clamp]; 0 for no clamp.
    """

    def __init__(
        self, gamma: float = 2.0, alpha: float = 0.25, label_smoothing: float = 0.0, clamp: float = 0.0
    ) -> None:
        super().__init__(label_smoothing, clamp)
        require(0 <= gamma < math.inf, f"FocalLoss: gamma is {gamma}; expected 0 or more")
        require(0 < alpha < 1, f"FocalLoss: alpha is {alpha}; expected a number between 0 and 1")
        self.gamma = gamma
        self.alpha = alpha

    def costs(self, logits_B: Tensor, targets_B: Tensor) -> Tensor:
        log_click_B, log_no_click_B = functional.logsigmoid(logits_B), functional.logsigmoid(-logits_B)
        if_click_B = -self.alpha * torch.exp(self.gamma * log_no_click_B) * log_click_B
        if_no_click_B = -(1 - self.alpha) * torch.exp(self.gamma * log_click_B) * log_no_click_B
        return targets_B * if_click_B + (1 - targets_B) * if_no_click_B
