"""Transforms of integer columns over numpy arrays: dense values, log-squared bins and quantile bins."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import numpy as np

DenseTransform: TypeAlias = Callable[[np.ndarray, np.ndarray, int], np.ndarray]

MOST_QUANTILE_BINS = 256  # 134 MB of counts at most, see quantile_edges

_HALF = 1 << 16  # values of half an int32


def log_of_positive_part(values: np.ndarray, missing: np.ndarray, minimum: int) -> np.ndarray:
    # In float64 and then rounded, so that the bytes do not depend on the processor's float32 logarithm.
    return np.log(np.maximum(values, 0).astype(np.float64) + 1.0).astype(np.float32)


def log_above_minimum(values: np.ndarray, missing: np.ndarray, minimum: int) -> np.ndarray:
    # Below the minimum lie only rows that are encoded later with this dataset's vocabulary.
    return np.log(np.maximum(values, minimum).astype(np.float64) - minimum + 2.0).astype(np.float32)


def log_plus_three(values: np.ndarray, missing: np.ndarray, minimum: int) -> np.ndarray:
    return np.log(np.where(missing | (values < -2), 1.0, values.astype(np.float64) + 3.0)).astype(np.float32)


def signed_log(values: np.ndarray, missing: np.ndarray, minimum: int) -> np.ndarray:
    wide = values.astype(np.float64)
    result = np.copysign(np.log(np.abs(wide) + 1.0), wide).astype(np.float32)
    result[missing] = np.nan
    return result


def log_squared_bins(values: np.ndarray) -> np.ndarray:
    """Return floor(log(x)^2) of values above 2, other values unchanged.

    Args:
        values: int32 [n].

    Returns:
        uint32 [n], negative values in two's complement.
    """
    large = np.square(np.log(np.maximum(values, 2).astype(np.float64))).astype(np.int32)
    return np.where(values > 2, large, values).view(np.uint32)


def quantile_edges(passes: Callable[[], Iterable[np.ndarray]], bins: int) -> list[int]:
    """Return the edges of quantile bins: exact, in memory that does not grow with the values.

    The upper edge of bin k of K is the least value v for which at least k / K of all values are at most v. Equal edges
    count once, and the greatest value is no edge, so that each bin holds values and equal values share one. A first
    pass counts the upper 16 bits of the values; a second the lower 16 bits of values that may be edges.

    Args:
        passes: returns all values in pieces, int32 [n] each; called twice.
        bins: K, the largest number of bins.

    Returns:
        At most K - 1 edges in ascending order; none if there are fewer than two different values.
    """
    upper = np.zeros(_HALF, np.int64)
    for values in passes():
        upper += np.bincount((values >> 16) + _HALF // 2, minlength=_HALF)
    ends = np.cumsum(upper)
    if not ends[-1]:
        return []
    ranks = -(-np.arange(1, bins + 1) * ends[-1] // bins)  # of the edges among the sorted values, from 1
    blocks, block_of = np.unique(np.searchsorted(ends, ranks), return_inverse=True)
    position = np.full(_HALF, -1)
    position[blocks] = np.arange(len(blocks))
    lower = np.zeros(len(blocks) * _HALF, np.int64)
    for values in passes():
        places = position[(values >> 16) + _HALF // 2]
        counted = places >= 0
        # In place: bincount would allocate as many counts again for each piece.
        np.add.at(lower, places[counted] * _HALF + (values[counted] & _HALF - 1), 1)
    within = lower.reshape(len(blocks), _HALF)
    np.cumsum(within, axis=1, out=within)
    edges = {
        int(blocks[block] - _HALF // 2) * _HALF
        + int(np.searchsorted(within[block], rank - ends[blocks[block]] + upper[blocks[block]]))
        for block, rank in zip(block_of, ranks, strict=True)
    }
    return sorted(edges)[:-1]


def quantile_bins(values: np.ndarray, edges: Sequence[int]) -> np.ndarray:
    """Return the bins of values: bin k holds those above edge k - 1, up to edge k.

    Args:
        values: int32 [n].
        edges: as ``quantile_edges`` returns them.

    Returns:
        uint32 [n], 0 to the number of edges.
    """
    return np.searchsorted(np.asarray(edges, np.int32), values).astype(np.uint32)
