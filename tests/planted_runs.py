"""Many small fits of the real DLRM on clicks of a planted law, for tests of what is concluded from such fits.

Three dense features and six tables of 20 rows; the log-odds of a click are linear in the dense features, have an
effect of each id, and three products of two columns' tastes: of C1 and C2, C3 and C4, C5 and C6.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dlrm.compare.statistics import Components, Metric, components
from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.models.dlrm import DLRM
from lightning_dlrm.objectives.losses import LogLoss
from lightning_dlrm.optim.rules import Adagrad
from tests.toy import optimizer_of

TABLES, ROWS, DENSE = 6, 20, 3
PAIRS = ((0, 1), (2, 3), (4, 5))
UNGROUPED: tuple[Metric, ...] = ("auc", "log_loss")
"""Metrics with verdicts of samples without groups."""
TRAIN, TEST, BATCH = 6_000, 4_000, 120


@dataclass
class PlantedData:
    """Rows of one planted law."""

    dense: Tensor
    ids: Tensor
    labels: Tensor

    @classmethod
    def draw(cls, seed: int) -> "PlantedData":
        """Another law and other rows for each seed: TRAIN rows, then TEST rows."""
        random = np.random.default_rng(seed)
        rows = TRAIN + TEST
        dense = random.normal(size=(rows, DENSE))
        ids = np.minimum(random.exponential(ROWS / 4, (rows, TABLES)).astype(int), ROWS - 1)
        effects, tastes = (_standard(random.normal(size=(TABLES, ROWS))[np.arange(TABLES), ids]) for _ in range(2))
        odds = -1.0 + 0.3 * dense.sum(1) + 0.4 * effects.sum(1)
        for a, b in PAIRS:
            odds += 0.4 * tastes[:, a] * tastes[:, b]
        labels = random.random(rows) < 1 / (1 + np.exp(-odds))
        return cls(
            torch.from_numpy(dense).float(), torch.from_numpy(ids).int(), torch.from_numpy(labels).to(torch.int8)
        )

    def without(self, columns: tuple[int, ...]) -> "PlantedData":
        """The same rows, of which a model cannot see some columns."""
        ids = self.ids.clone()
        ids[:, list(columns)] = 0
        return PlantedData(self.dense, ids, self.labels)


def _standard(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of mean 0 and deviation 1 over the rows, so that every law has the same strength."""
    standard: NDArray[np.float64] = (values - values.mean(0)) / values.std(0)
    return standard


def fit(data: PlantedData, order_seed: int, weights_seed: int) -> NDArray[np.float32]:
    """Trains a DLRM for one pass and returns its probabilities on the test rows."""
    features = Features(dense=DENSE, tables={f"C{i + 1}": ROWS for i in range(TABLES)})
    network = DLRM(features, weights_seed, embedding_dim=8, bottom_mlp=(16, 8), top_mlp=(16,))
    optimizer = optimizer_of(network, Adagrad(0.02), Adagrad(0.1))
    order = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(order_seed))
    loss = LogLoss()
    for rows in order.split(BATCH):
        optimizer.zero_grad()
        logits = network(data.dense[rows], SparseIds(values=data.ids[rows], tables=TABLES))
        (loss.summed(logits, data.labels[rows]) / len(rows)).backward()
        optimizer.step()
    with torch.no_grad():
        logits = network(data.dense[TRAIN:], SparseIds(values=data.ids[TRAIN:], tables=TABLES))
    probabilities: NDArray[np.float32] = logits.double().sigmoid().float().numpy()
    return probabilities


def runs(data: PlantedData, seeds: list[tuple[int, int]]) -> dict[Metric, list[Components]]:
    """Runs of one configuration, for each (order seed, weights seed), as ``difference`` takes them, by metric."""
    labels = data.labels[TRAIN:].numpy()
    fitted = [fit(data, *seed) for seed in seeds]
    return {metric: [components(metric, probabilities, labels) for probabilities in fitted] for metric in UNGROUPED}
