"""Contract: the curves of predictions are those of the samples themselves, on any number of ranks, in bounded size."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lightning_dlrm.objectives.metrics import click_curves


def drawn(samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(samples, generator=generator) - 1
    return logits, (torch.rand(samples, generator=generator) < logits.sigmoid()).to(torch.int8)


class AllAtOnce:
    """Ranks of which this one has already heard what the others counted."""

    def __init__(self, others: list[NDArray]) -> None:
        self.others = others
        self.mine: list[NDArray] = []

    rank, ranks = 0, 2

    def all_gather(self, values: NDArray) -> list[NDArray]:
        self.mine.append(values)
        return [*self.others, values]

    def broadcast(self, values: NDArray, source: int) -> NDArray:
        raise AssertionError("nothing as large as the samples may travel")


def test_precision_and_recall_are_those_at_their_thresholds() -> None:
    logits, labels = drawn(50_000, 0)
    curves = click_curves(logits, labels)
    assert len(curves.threshold) <= 100
    probabilities, clicks = logits.double().sigmoid().numpy(), labels.numpy()
    for threshold, precision, recall in zip(curves.threshold, curves.precision, curves.recall, strict=True):
        chosen = clicks[probabilities >= threshold]
        assert precision == pytest.approx(chosen.mean(), abs=1e-12)
        assert recall == pytest.approx(chosen.sum() / clicks.sum(), abs=1e-12)
    steps = np.abs(np.diff(curves.recall))
    assert curves.recall[0] == 1 and curves.recall[-1] < 0.001 and steps.max() < 0.02, "even over the recall"


def test_groups_hold_every_sample_and_true_probabilities_are_calibrated() -> None:
    logits, labels = drawn(200_000, 1)
    curves = click_curves(logits, labels)
    assert len(curves.samples) == 20 and curves.samples.sum() == 200_000
    assert curves.samples.min() > 8_000, "as equal as ties allow"
    assert np.all(np.diff(curves.predicted) > 0)
    assert (curves.samples * curves.predicted).sum() == pytest.approx(logits.double().sigmoid().sum().item())
    assert (curves.samples * curves.observed).sum() == labels.sum().item()
    noise = np.sqrt(curves.predicted * (1 - curves.predicted) / curves.samples)
    assert np.all(np.abs(curves.observed - curves.predicted) < 4 * noise)
    doubled = click_curves(2 * logits, labels)
    assert doubled.observed[-1] < doubled.predicted[-1] - 0.005, "overconfidence shows"


def test_ranks_together_find_what_one_finds() -> None:
    logits, labels = drawn(10_000, 2)
    first = AllAtOnce([])
    click_curves([logits[:3], logits[3:4000]], [labels[:3], labels[3:4000]], first)
    together = click_curves(logits[4000:], labels[4000:], AllAtOnce(first.mine))
    for name, values in vars(click_curves(logits, labels)).items():
        np.testing.assert_allclose(vars(together)[name], values, rtol=1e-12, err_msg=name)
    assert first.mine[0].nbytes < 200_000


@pytest.mark.parametrize("clicks", [0, 1], ids=["no clicks", "all clicks"])
def test_one_class_and_equal_predictions(clicks: int) -> None:
    curves = click_curves(torch.full((30,), -40.0), torch.full((30,), clicks))
    assert curves.document() == {
        "threshold": pytest.approx([1.1e-7], rel=0.1),
        "precision": [clicks],
        "recall": [clicks],
        "predicted": pytest.approx([0.0], abs=1e-12),
        "observed": [clicks],
        "samples": [30],
    }
