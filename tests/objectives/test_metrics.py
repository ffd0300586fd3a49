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

from lightning_dlrm.contracts.batch import NO_GROUP
from lightning_dlrm.objectives.losses import LogLoss
from lightning_dlrm.objectives.metrics import ClickMetrics, click_metrics, exact_auc, group_auc
from tests.ranks import run_ranks


def plain_group_auc(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """The mean AUC over groups with both labels, weighted by their samples; every pair of samples is looked at."""
    weights, aucs, left_out = [], [], 0
    for group in sorted(set(groups.tolist()) - {NO_GROUP}):
        clicks, others = (scores[(groups == group) & (labels == label)] for label in (1, 0))
        if len(clicks) and len(others):
            wins = (clicks[:, None] > others).sum() + (clicks[:, None] == others).sum() / 2
            aucs.append(wins / len(clicks) / len(others))
            weights.append(len(clicks) + len(others))
        else:
            left_out += 1
    auc = np.average(aucs, weights=weights) if aucs else math.nan
    return {"group_auc": auc, "groups": len(aucs), "groups_left_out": left_out}


@given(
    rows=st.lists(
        st.tuples(st.sampled_from([-0.0, 0.0, 1.0, 2.0, math.inf, -math.inf]), st.booleans(), st.integers(-2, 3)),
        min_size=1,
        max_size=60,
    )
)
@settings(max_examples=200)
def test_auc_by_group_with_ties(rows: list[tuple[float, bool, int]]) -> None:
    scores, labels, groups = (np.array(values) for values in zip(*rows, strict=True))
    # Numbers of text are hashes, and missing values are in no group.
    groups = np.array([NO_GROUP, -(2**62), 7, 2**63 - 1, 0, 1])[groups + 2]
    found = group_auc(torch.tensor(scores), torch.tensor(labels), torch.tensor(groups))
    assert found == pytest.approx(plain_group_auc(scores, labels, groups), abs=1e-12, nan_ok=True)
    assert found["groups"] or math.isnan(found["group_auc"])


def test_auc_by_group_of_one_group_is_the_auc_and_of_nan_scores_none() -> None:
    logits, labels, groups = drawn()
    one = click_metrics(logits, labels, groups_N=torch.zeros_like(groups))
    assert one["group_auc"] == one["auc"] and (one["groups"], one["groups_left_out"]) == (1, 0)
    logits[3] = math.nan
    assert math.isnan(group_auc(logits, labels, groups)["group_auc"])


@given(
    pairs=st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=60).filter(
        lambda pairs: len({label for _, label in pairs}) == 2
    )
)
@settings(max_examples=200)
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
    with pytest.raises(ValueError, match="at least one sample"):
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
logits, labels, groups = drawn()
# Uneven shares; the last of several ranks has nothing.
cuts = [0, *(len(logits) * (i * i) // (ranks - 1) ** 2 for i in range(1, ranks)), len(logits)]
for part in torch.arange(cuts[rank], cuts[rank + 1]).split(1000):
    metrics.update(logits[part], labels[part], groups[part])
print("found", json.dumps(metrics.compute()))
dist.destroy_process_group()
"""


def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits with ties, labels, and groups of which some have one label."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(20_000, generator=generator).round(decimals=2)
    groups = (torch.randn(20_000, generator=generator) * 800).long() ** 3
    return logits, (torch.rand(20_000, generator=generator) < torch.sigmoid(logits)).to(torch.int8), groups


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_find_what_one_process_finds(ranks: int) -> None:
    logits, labels, groups = drawn()
    alone = click_metrics(logits, labels, groups_N=groups)
    assert alone["groups"] > 1000 and alone["groups_left_out"] > 100
    plain = plain_group_auc(logits.numpy(), labels.numpy(), groups.numpy())
    assert {name: alone[name] for name in plain} == pytest.approx(plain, abs=1e-12)
    for output in run_ranks(["-c", _RANK], ranks):
        together = json.loads(output.partition("found ")[2])
        assert {name: together[name] for name in ("auc", *plain)} == {name: alone[name] for name in ("auc", *plain)}
        assert together == pytest.approx(alone, abs=1e-12)


def test_infinite_logits_cost_nothing_if_right_and_everything_if_wrong() -> None:
    right = click_metrics(torch.tensor([math.inf, -math.inf, 0.0]), torch.tensor([1, 0, 1]))
    assert right["log_loss"] == pytest.approx(math.log(2) / 3, rel=1e-12) and right["auc"] == 1.0
    wrong = click_metrics(torch.tensor([math.inf, -math.inf, 0.0]), torch.tensor([1, 1, 0]))
    assert wrong["log_loss"] == math.inf and wrong["normalized_entropy"] == math.inf and wrong["auc"] == 0.5
