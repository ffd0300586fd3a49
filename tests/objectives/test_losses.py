"""Contract: each loss is its published formula, from logits, with true gradients, finite at any logit."""

import math

import pytest
import torch

from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.objectives.losses import FocalLoss, LogLoss, Loss, WeightedLogLoss

LOGITS = torch.tensor([-3.0, -0.4, 0.0, 0.9, 4.0, 2.0], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 1, 0, 1, 0], dtype=torch.int8)


def by_formula(loss: Loss) -> float:
    """From probabilities, sample by sample."""
    total = 0.0
    for logit, label in zip(LOGITS.tolist(), LABELS.tolist(), strict=True):
        p = 1 / (1 + math.exp(-logit))
        if loss.clamp:
            p = min(max(p, loss.clamp), 1 - loss.clamp)
        y = label * (1 - loss.label_smoothing) + loss.label_smoothing / 2
        click, none = -math.log(p), -math.log(1 - p)
        if isinstance(loss, WeightedLogLoss):
            click, none = loss.click * click, loss.no_click * none
        if isinstance(loss, FocalLoss):
            click, none = loss.alpha * (1 - p) ** loss.gamma * click, (1 - loss.alpha) * p**loss.gamma * none
        total += y * click + (1 - y) * none
    return total


LOSSES = [
    LogLoss(),
    LogLoss(label_smoothing=0.1),
    LogLoss(clamp=0.2),
    WeightedLogLoss(click=3.0),
    WeightedLogLoss(click=3.0, no_click=0.5, label_smoothing=0.2, clamp=0.1),
    FocalLoss(),
    FocalLoss(gamma=0.5, alpha=0.6, label_smoothing=0.1),
    FocalLoss(gamma=0, alpha=0.5),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{type(loss).__name__} {vars(loss)}")
def test_loss_is_the_published_formula(loss: Loss) -> None:
    assert loss.summed(LOGITS, LABELS).item() == pytest.approx(by_formula(loss), rel=1e-12)
    assert torch.autograd.gradcheck(lambda z: loss.summed(z, LABELS), LOGITS.clone().requires_grad_())
    far = torch.tensor([-200.0, 200.0, -200.0, 200.0], requires_grad=True)
    value = loss.summed(far, torch.tensor([0, 1, 1, 0]))
    value.backward()
    assert value.isfinite() and far.grad.isfinite().all()
    # Half precision is summed in float32.
    assert loss.summed(LOGITS.bfloat16(), LABELS).dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogLoss(label_smoothing=1.0), "label_smoothing is 1.0"),
        (lambda: LogLoss(clamp=0.5), "clamp is 0.5"),
        (lambda: WeightedLogLoss(click=0.0), "click is 0.0"),
        (lambda: FocalLoss(gamma=-1.0), "gamma is -1.0"),
        (lambda: FocalLoss(alpha=1.0), "alpha is 1.0"),
    ],
)
def test_settings_out_of_range_are_refused(make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
