"""Contract: metrics equal scikit-learn's, ties and extremes included, however the samples are batched and spread
over ranks."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

from lightning_dlrm.objectives.losses import LogLoss
from lightning_dlrm.objectives.metrics import ClickMetrics, click_metrics, exact_auc
from tests.ranks import run_ranks


@given(
    pairs=st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=60).filter(
        lambda pairs: len({label for _, label in pairs}) == 2
    )
)
@settings(max_examples=200, deadline=None)
def test_auc_with_ties(pairs: list[tuple[int, bool]]) -> None:
    scores = torch.tensor([float(s) for s, _ in pairs])
    labels = torch.tensor([int(y) for _, y in pairs])
    assert exact_auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    # The class that is rarer is the one that is counted from.
    assert exact_auc(-scores, 1 - labels) == exact_auc(scores, labels)


def test_all_metrics_of_many_samples_in_batches() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(100_000, generator=generator).round(decimals=2) * 3
    labels = (torch.rand(100_000, generator=generator) < torch.sigmoid(logits - 1)).to(torch.int8)
    metrics = ClickMetrics()
    for part in torch.split(torch.arange(100_000), [1, 0, 2047, 60_000, 37_952]):
        metrics.update(logits[part], labels[part])
    ours = metrics.compute()
    y, p = labels.numpy(), torch.sigmoid(logits.double()).numpy()
    rate = y.mean()
    assert ours["auc"] == pytest.approx(roc_auc_score(y, p), abs=1e-12)
    assert ours["log_loss"] == pytest.approx(log_loss(y, p), abs=1e-12)
    assert ours["accuracy"] == pytest.approx(accuracy_score(y, p >= 0.5), abs=1e-12)
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    assert ours["normalized_entropy"] == pytest.approx(log_loss(y, p) / entropy, abs=1e-12)
    assert ours["calibration"] == pytest.approx(p.sum() / y.sum(), abs=1e-12)
    metrics.reset()
    metrics.update(logits[:100], labels[:100])
    assert metrics.compute() == click_metrics(logits[:100], labels[:100])


def test_extreme_logits_keep_their_digits() -> None:
    loss = click_metrics(torch.tensor([200.0, -200.0]), torch.tensor([0, 1]))["log_loss"]
    assert loss == 200.0
    assert LogLoss().summed(torch.tensor([200.0, -200.0]), torch.tensor([1, 0])).item() == 0.0


def test_one_class_has_no_auc() -> None:
    ours = click_metrics(torch.tensor([0.3, -0.2]), torch.tensor([0, 0]))
    assert math.isnan(ours["auc"]) and math.isnan(ours["normalized_entropy"]) and math.isnan(ours["calibration"])
    assert np.isfinite(ours["log_loss"])


def test_nan_scores_have_no_auc() -> None:
    assert math.isnan(exact_auc(torch.tensor([0.1, math.nan, 0.3, 0.2]), torch.tensor([0, 1, 1, 0])))


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        click_metrics(torch.zeros(0), torch.zeros(0))


def test_float64_logits_keep_their_order() -> None:
    # Equal in float32.
    assert exact_auc(torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64), torch.tensor([0, 1])) == 1.0


_RANK = """
import json, torch, torch.distributed as dist
from lightning_dlrm.objectives.metrics import ClickMetrics
from lightning_dlrm.sharding.collectives import Ranks
from tests.objectives.test_metrics import drawn

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
metrics = ClickMetrics(Ranks)
logits, labels = drawn()
# Uneven shares; the last of several ranks has nothing.
cuts = [0, *(len(logits) * (i * i) // (ranks - 1) ** 2 for i in range(1, ranks)), len(logits)]
for part in torch.arange(cuts[rank], cuts[rank + 1]).split(1000):
    metrics.update(logits[part], labels[part])
print("found", json.dumps(metrics.compute()))
dist.destroy_process_group()
"""


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with ties, and labels."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(20_000, generator=generator).round(decimals=2)
    return logits, (torch.rand(20_000, generator=generator) < torch.sigmoid(logits)).to(torch.int8)


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_find_what_one_process_finds(ranks: int) -> None:
    alone = click_metrics(*drawn())
    for output in run_ranks(["-c", _RANK], ranks):
        together = json.loads(output.partition("found ")[2])
        assert together["auc"] == alone["auc"]
        assert together == pytest.approx(alone, abs=1e-12)


def test_infinite_logits_cost_nothing_if_right_and_everything_if_wrong() -> None:
    right = click_metrics(torch.tensor([math.inf, -math.inf, 0.0]), torch.tensor([1, 0, 1]))
    assert right["log_loss"] == pytest.approx(math.log(2) / 3, rel=1e-12) and right["auc"] == 1.0
    wrong = click_metrics(torch.tensor([math.inf, -math.inf, 0.0]), torch.tensor([1, 1, 0]))
    assert wrong["log_loss"] == math.inf and wrong["normalized_entropy"] == math.inf and wrong["auc"] == 0.5
