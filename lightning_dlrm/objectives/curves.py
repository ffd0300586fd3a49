"""Curves of precision against recall, and of clicks against predictions, in bounded memory.

Shape suffixes: N samples of this rank, P thresholds, G groups of samples, H cells of the histogram.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_dlrm.objectives.metrics import SINGLE_RANK, Peers, Samples, sample_chunks

_RANGE = 16.0  # logits beyond it, with probabilities within 1.1e-7 of 0 or 1, are counted in the outermost cells
_CELLS = 4096
_POINTS = 100
_GROUPS = 20


@dataclass(frozen=True, kw_only=True)
class ClickCurves:
    """Precision and recall at every threshold, and predicted and observed click rates."""

    threshold: NDArray[np.float64]
    """[P] Thresholds of the probability, ascending; a sample at or above counts as a click."""
    precision: NDArray[np.float64]
    """[P] Share of clicks among the samples at or above the threshold."""
    recall: NDArray[np.float64]
    """[P] Share of all clicks that are at or above the threshold."""
    predicted: NDArray[np.float64]
    """[G] Mean predicted probability of each group of samples with similar probabilities, ascending."""
    observed: NDArray[np.float64]
    """[G] Share of clicks in each group."""
    samples: NDArray[np.int64]
    """[G] Number of samples in each group, as equal as ties allow."""

    def document(self) -> dict[str, list[float]]:
        """Return the curves as JSON values, by the names of the fields."""
        return {name: values.tolist() for name, values in vars(self).items()}


def click_curves(logits_N: Samples, labels_N: Samples, peers: Peers = SINGLE_RANK) -> ClickCurves:
    """Return the curves of all samples of all ranks; except for rounding, they do not depend on the number of ranks.

    Samples are counted in 4,096 cells of equal width in the logit: every point is exact for its threshold, and the
    exchange between ranks does not grow with the samples. The result has at most 100 thresholds, evenly spread over the
    recall, and 20 groups.

    Args:
        logits_N: float32 or float64; NaN is ignored.
        labels_N: 0 or 1.
        peers: the ranks that hold the samples.
    """
    cells_3H = np.zeros((3, _CELLS))
    for logits, labels in sample_chunks(logits_N, labels_N):
        if (is_nan := logits.isnan()).any():
            logits, labels = logits[~is_nan], labels[~is_nan]
        logits = logits.double()
        cell = ((logits + _RANGE) * (_CELLS / (2 * _RANGE))).clamp(0, _CELLS - 1).long()
        for i, weight in enumerate((None, labels, logits.sigmoid())):
            cells_3H[i] += torch.bincount(cell, weight, _CELLS).numpy()
    samples_H, clicks_H, predicted_H = np.sum(peers.all_gather(cells_3H), axis=0)

    at_or_above_H, hits_H = (counts[::-1].cumsum()[::-1] for counts in (samples_H, clicks_H))
    # The threshold of an empty cell gives the same point as the next cell.
    candidates = np.flatnonzero(samples_H)
    chosen = candidates[_evenly_spread(hits_H[candidates], _POINTS)]
    edges_H = np.linspace(-_RANGE, _RANGE, _CELLS, endpoint=False)

    group_H = np.ceil(samples_H.cumsum() / max(samples_H.sum(), 1) * _GROUPS).astype(np.int64)
    sums_3G = np.array([np.bincount(group_H, counts) for counts in (samples_H, clicks_H, predicted_H)])
    samples_G, clicks_G, predicted_G = sums_3G[:, sums_3G[0] > 0]
    return ClickCurves(
        threshold=1 / (1 + np.exp(-edges_H[chosen])),
        precision=hits_H[chosen] / at_or_above_H[chosen],
        recall=hits_H[chosen] / max(hits_H[0], 1),
        predicted=predicted_G / samples_G,
        observed=clicks_G / samples_G,
        samples=samples_G.astype(np.int64),
    )


def _evenly_spread(falling: NDArray[np.float64], points: int) -> NDArray[np.int64]:
    """Return ascending indices of at most ``points`` values that are about evenly spread from the first to the last."""
    if len(falling) <= points:
        return np.arange(len(falling))
    targets = np.linspace(falling[0], falling[-1], points)
    # The last value that is at or above the target.
    return np.unique(len(falling) - 1 - np.searchsorted(falling[::-1], targets))
