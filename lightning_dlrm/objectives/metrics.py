"""Metrics of click predictions, exact and in float64, over the samples of all ranks; curves in bounded memory.

Shape suffixes: N samples of this rank, P thresholds, G groups of samples, T groups of samples with equal scores,
H cells of a histogram.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from lightning_dlrm.contracts.batch import NO_GROUP

# Samples of a chunk. Its copies stay in the caches, and torch computes so few values on one thread: on a busy machine,
# threads that wait for each other take several times as long.
_CHUNK = 1 << 15
_RANGE = 16.0  # logits beyond it, with probabilities within 1.1e-7 of 0 or 1, are counted in the outermost cells
_CELLS = 4096
_POINTS = 100
_GROUPS = 20


class Peers(Protocol):
    """The ranks that hold the samples of a metric; each rank makes the same calls in the same order."""

    rank: int
    ranks: int

    def all_gather(self, values: NDArray) -> list[NDArray]:
        """Return the array of every rank; all arrays have the same shape and dtype."""

    def broadcast(self, values: NDArray, source: int) -> NDArray:
        """Return the array [n] of rank ``source``; lengths may differ between ranks, dtypes are the same."""


class SingleRank:
    """The ranks of a process without others."""

    rank, ranks = 0, 1

    def all_gather(self, values: NDArray) -> list[NDArray]:
        return [values]

    def broadcast(self, values: NDArray, source: int) -> NDArray:
        return values


SINGLE_RANK = SingleRank()

Samples = Tensor | Sequence[Tensor]
"""[N], one tensor or several parts."""


def exact_auc(scores_N: Samples, labels_N: Samples, peers: Peers = SINGLE_RANK) -> float:
    """Return the exact area under the ROC curve; a tie counts one half (Mann-Whitney U).

    Every rank sorts its samples. Then each rank broadcasts its scores of the rarer class, and every rank counts its
    scores of the other class below each. Counts are integers, so the value does not depend on the number of ranks. It
    takes 4 bytes a sample (8 for float64), and memory for the rarer class of one rank.

    Args:
        scores_N: any monotone score, such as the logit.
        labels_N: 0 or 1.
        peers: the ranks that hold the samples.

    Returns:
        The AUC in [0, 1]; NaN if a class has no samples or a score is NaN.

    >>> exact_auc(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0, 0, 1, 1]))
    0.875
    """
    scores, labels = _parts(scores_N), _parts(labels_N)
    (doubles,) = _total(peers, np.array([any(part.dtype == torch.float64 for part in scores)], np.int64))
    negatives, positives = _sorted_by_class(scores, labels, torch.float64 if doubles else torch.float32)
    # Sorting puts NaN at the end.
    has_nan = any(len(class_) and math.isnan(class_[-1]) for class_ in (negatives, positives))
    all_negatives, all_positives, nans = _total(peers, np.array([len(negatives), len(positives), has_nan], np.int64))
    if nans or not all_negatives or not all_positives:
        return float("nan")
    positives_rarer = all_positives <= all_negatives
    rare, common = (positives, negatives) if positives_rarer else (negatives, positives)
    # Counted twice, so that half a tie is an integer.
    twice_below = 0
    for source in range(peers.ranks):
        received = peers.broadcast(rare, source)
        for start in range(0, len(received), _CHUNK):
            chunk = received[start : start + _CHUNK]
            twice_below += sum(int(np.searchsorted(common, chunk, side).sum()) for side in ("left", "right"))
    (twice_below,) = _total(peers, np.array([twice_below], np.int64))
    pairs = all_positives * all_negatives
    return (twice_below if positives_rarer else 2 * pairs - twice_below) / (2 * pairs)


def click_rate_log_loss(rate: float) -> float:
    """Return the log loss of predicting the click rate of all samples for each, in nats per sample: its entropy.

    >>> round(click_rate_log_loss(0.5), 4), click_rate_log_loss(1.0) == 0
    (0.6931, True)
    """
    return -sum(p * math.log(p) for p in (rate, 1 - rate) if p > 0)


def chance_deviation(clicks: int, others: int) -> float:
    """Return the standard deviation of the AUC of random predictions (Mann and Whitney 1947).

    >>> round(chance_deviation(4_000, 12_000), 4)
    0.0053
    """
    return math.sqrt((clicks + others + 1) / (12 * clicks * others))


class GroupAUCs(NamedTuple):
    """The AUC of each group of samples."""

    samples: NDArray[np.int64]
    """[G] Number of samples, by ascending number of the group."""
    auc: NDArray[np.float64]
    """[G] NaN if all samples of the group have the same label."""


def group_aucs(scores_N: NDArray[np.floating], labels_N: NDArray, groups_N: NDArray[np.int64]) -> GroupAUCs:
    """Return the exact AUC of each group of samples; a tie counts one half.

    Args:
        scores_N: any monotone score, without NaN.
        labels_N: 0 or 1.
        groups_N: number of each sample's group; samples with ``NO_GROUP`` are left out.
    """
    in_group = groups_N != NO_GROUP
    scores, labels, groups = (values[in_group] for values in (scores_N, labels_N, groups_N))
    if not len(groups):
        return GroupAUCs(np.empty(0, np.int64), np.empty(0))
    order = np.lexsort((scores, groups))
    scores, labels, groups = scores[order], labels[order] > 0, groups[order]
    begins_group = np.append(True, groups[1:] != groups[:-1])
    ties = np.flatnonzero(begins_group | np.append(True, scores[1:] != scores[:-1]))
    size_T = np.diff(ties, append=len(groups))
    clicks_T = np.add.reduceat(labels.astype(np.int64), ties)
    others_T = size_T - clicks_T
    firsts = np.flatnonzero(begins_group[ties])
    # Of the same group, with lower scores.
    below_T = others_T.cumsum() - others_T
    below_T -= np.repeat(below_T[firsts], np.diff(firsts, append=len(ties)))
    # Counted twice, so that half a tie is an integer.
    twice_below_G = np.add.reduceat(clicks_T * (2 * below_T + others_T), firsts)
    clicks_G, others_G = np.add.reduceat(clicks_T, firsts), np.add.reduceat(others_T, firsts)
    with np.errstate(invalid="ignore"):
        return GroupAUCs(clicks_G + others_G, twice_below_G / (2 * clicks_G * others_G))


def group_auc(scores_N: Samples, labels_N: Samples, groups_N: Samples, peers: Peers = SINGLE_RANK) -> dict[str, float]:
    """Return the mean AUC over groups of samples, such as those of a user, weighted by their number of samples (GAUC,
    Zhou et al. 2018, Deep Interest Network, section 5.3).

    A group whose samples all have the same label has no AUC, and is left out, as are samples with ``NO_GROUP``. Each
    rank takes the groups whose number has its remainder; the weighted AUCs are added up exactly, so the value does not
    depend on the number of ranks. It takes 13 bytes a sample (17 for float64) of one other rank at a time.

    Args:
        scores_N: any monotone score, such as the logit.
        labels_N: 0 or 1.
        groups_N: int64, number of each sample's group: see ``Batch.group``.
        peers: the ranks that hold the samples.

    Returns:
        ``group_auc``, NaN if no group has both labels or a score is NaN; ``groups``, the number of groups that it is
        the mean of; and ``groups_left_out``.
    """
    scores, labels, groups = (list(_parts(samples)) for samples in (scores_N, labels_N, groups_N))
    (doubles,) = _total(peers, np.array([any(part.dtype == torch.float64 for part in scores)], np.int64))
    types = (torch.float64 if doubles else torch.float32, torch.int8, torch.int64)
    here = [
        torch.cat([torch.empty(0, dtype=dtype), *(part.cpu().to(dtype) for part in parts)]).numpy()
        for parts, dtype in zip((scores, labels, groups), types, strict=True)
    ]
    received = ([peers.broadcast(values, source) for values in here] for source in range(peers.ranks))
    owned = [[values[of_one[2] % peers.ranks == peers.rank] for values in of_one] for of_one in received]
    found = group_aucs(*(np.concatenate(values) for values in zip(*owned, strict=True)))
    counted = ~np.isnan(found.auc)
    samples = found.samples[counted]
    whole, fraction, remainder = _fixed_point(found.auc[counted] * samples)
    has_nan = np.isnan(here[0]).any()
    counts = [whole, fraction, remainder, samples.sum(), len(samples), len(counted) - len(samples), has_nan]
    whole, fraction, remainder, weight, groups_counted, left_out, nans = _total(peers, np.array(counts, np.int64))
    weighted = (whole << 64) + (fraction << 32) + remainder
    auc = weighted / (weight << 64) if weight and not nans else float("nan")
    return {"group_auc": auc, "groups": groups_counted, "groups_left_out": left_out}


def _fixed_point(values: NDArray[np.float64]) -> tuple[int, int, int]:
    """Return the sum of values of at least 0, cut off below 2**-64, as a number of units, of 2**-32 and of 2**-64."""
    whole = np.floor(values)
    fraction = np.floor((values - whole) * 2.0**32)
    remainder = np.floor(((values - whole) * 2.0**32 - fraction) * 2.0**32)
    return tuple(int(part.astype(np.int64).sum()) for part in (whole, fraction, remainder))  # type: ignore[return-value]


def click_metrics(
    logits_N: Samples, labels_N: Samples, peers: Peers = SINGLE_RANK, groups_N: Samples = ()
) -> dict[str, float]:
    """Return the metrics of the samples of all ranks by name; all samples have the same weight.

    - ``log_loss``: mean cross-entropy in nats; infinite if an infinite logit is wrong.
    - ``auc``: see ``exact_auc``.
    - ``accuracy``: share of samples whose label is 1 if and only if the probability is at least 0.5.
    - ``normalized_entropy``: log loss divided by the log loss of the samples' click rate as a constant prediction (He
      et al. 2014, section 2.2, equation 1); NaN if a class has no samples.
    - ``calibration``: predicted clicks divided by clicks (He et al. 2014, section 2.2).
    - ``group_auc``, ``groups``, ``groups_left_out``: see ``group_auc``; only of samples with groups.

    Args:
        logits_N: float32 or float64.
        labels_N: 0 or 1.
        peers: the ranks that hold the samples.
        groups_N: int64, number of each sample's group; empty on every rank for samples without groups.

    Raises:
        ValueError: no rank has samples.
    """
    sums = np.zeros(6)
    for logits, labels in sample_chunks(logits_N, labels_N):
        logits, labels = logits.double(), labels.double()
        sums += (
            len(labels),
            float(labels.sum()),
            # -log p of the label, 0 or infinite for an infinite logit: not NaN, as torch's cross-entropy would be.
            float(torch.where(labels > 0.5, -logits, logits).logaddexp(logits.new_zeros(())).sum()),
            float(((logits >= 0) == (labels > 0.5)).sum()),
            float(logits.sigmoid().sum()),
            0.0,
        )
    sums[5] = sum(len(part) for part in _parts(groups_N))
    samples, clicks, loss, correct, predicted, in_groups = _total(peers, sums)
    if not samples:
        raise ValueError("metrics need at least one sample")
    rate = clicks / samples
    base_entropy = click_rate_log_loss(rate)
    return {
        "log_loss": loss / samples,
        "auc": exact_auc(logits_N, labels_N, peers),
        "accuracy": correct / samples,
        "normalized_entropy": loss / samples / base_entropy if base_entropy > 0 else float("nan"),
        "calibration": predicted / clicks if clicks else float("nan"),
        **(group_auc(logits_N, labels_N, groups_N, peers) if in_groups else {}),
    }


class ClickMetrics(Metric):
    """Metric that collects logits and labels of a whole evaluation, 5 bytes a sample (9 for float64 logits), and 8 more
    for its group.

    Each rank keeps its own samples: see ``exact_auc``.

    Args:
        peers: returns the ranks; called by ``compute``.
    """

    full_state_update = False
    logits: list[Tensor]
    labels: list[Tensor]
    groups: list[Tensor]

    def __init__(self, peers: Callable[[], Peers] = SingleRank) -> None:
        # With sync_on_compute, torchmetrics would gather all samples on every rank.
        super().__init__(sync_on_compute=False)
        self._peers = peers
        self.add_state("logits", default=[], dist_reduce_fx=None)
        self.add_state("labels", default=[], dist_reduce_fx=None)
        self.add_state("groups", default=[], dist_reduce_fx=None)

    def update(self, logits_B: Tensor, labels_B: Tensor, groups_B: Tensor | None = None) -> None:
        """Add a batch; logits are stored as float32 or float64, labels as int8, and the numbers of groups as int64."""
        logits_B = logits_B.detach()
        self.logits.append(logits_B if logits_B.dtype == torch.float64 else logits_B.float())
        self.labels.append(labels_B.to(torch.int8))
        if groups_B is not None:
            self.groups.append(groups_B)

    def compute(self) -> dict[str, float]:
        """Return the metrics: see ``click_metrics``."""
        return click_metrics(self.logits, self.labels, self._peers(), self.groups)


def _total(peers: Peers, values: NDArray) -> list[Any]:
    """Return the sum of each value over the ranks, as Python numbers."""
    return [sum(of_ranks) for of_ranks in zip(*(part.tolist() for part in peers.all_gather(values)), strict=True)]


def _parts(samples: Samples) -> Sequence[Tensor]:
    return [samples] if isinstance(samples, Tensor) else samples


def sample_chunks(scores: Samples, labels: Samples) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the samples on the CPU in chunks of bounded size."""
    for scores_n, labels_n in zip(_parts(scores), _parts(labels), strict=True):
        yield from zip(scores_n.cpu().split(_CHUNK), labels_n.cpu().split(_CHUNK), strict=True)


def _sorted_by_class(scores: Sequence[Tensor], labels: Sequence[Tensor], dtype: torch.dtype) -> tuple[NDArray, NDArray]:
    """Return the ascending scores of the samples with label 0, and of those with label 1."""
    positives = sum(int((labels_n > 0).sum()) for _, labels_n in sample_chunks(scores, labels))
    negatives = sum(len(labels_n) for labels_n in labels) - positives
    classes = tuple(torch.empty(count, dtype=dtype).numpy() for count in (negatives, positives))
    filled = [0, 0]
    for scores_n, labels_n in sample_chunks(scores, labels):
        values = scores_n.to(dtype).numpy()
        for label, mask in enumerate((labels_n <= 0, labels_n > 0)):
            chosen = values[mask.numpy()]
            classes[label][filled[label] : filled[label] + len(chosen)] = chosen
            filled[label] += len(chosen)
    for class_ in classes:
        class_.sort()
    return classes[0], classes[1]


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
