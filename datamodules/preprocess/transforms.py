"""Transforms of numbers over numpy arrays: dense values, log-squared bins and quantile bins."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from datamodules.values import from_ordered_bits, ordered_bits

_FEW_VALUES = 1 << 22
_DIGIT = 12
"""Bits that a pass of ``values_at_ranks`` counts: 8 MB of counts at most for 256 values."""


def log_of_positive_part(values: np.ndarray) -> np.ndarray:
    # In float64 and then rounded, so that the bytes do not depend on the processor's float32 logarithm.
    return np.log(np.maximum(values, 0).astype(np.float64) + 1.0).astype(np.float32)


def log_above_minimum(values: np.ndarray, minimum: float) -> np.ndarray:
    # Only rows that are encoded later, with this dataset's vocabulary, can be below the minimum.
    return np.log(np.maximum(values, minimum).astype(np.float64) - minimum + 2.0).astype(np.float32)


def log_plus_three(values: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(values.astype(np.float64) + 3.0, 1.0)).astype(np.float32)


def scaled(values: np.ndarray, subtracted: float, divisor: float) -> np.ndarray:
    return (values - subtracted) / divisor


def signed_log(values: np.ndarray) -> np.ndarray:
    wide = values.astype(np.float64)
    return np.copysign(np.log(np.abs(wide) + 1.0), wide).astype(np.float32)


def log_squared(values: np.ndarray) -> np.ndarray:
    """Return floor(log(x)^2) of numbers above 2, others without their fraction, float64 [n] of float64 [n]."""
    return np.where(values > 2, np.floor(np.square(np.log(np.maximum(values, 2)))), np.trunc(values))


def log_squared_bins(values: np.ndarray) -> np.ndarray:
    """Return ``log_squared`` of values as ids of bins, within the range of int32.

    Args:
        values: int32 [n], or float64 [n] of a log.

    Returns:
        uint32 [n], negative values in two's complement.
    """
    return np.clip(log_squared(values.astype(np.float64)), -(2**31), 2**31 - 1).astype(np.int32).view(np.uint32)


def quantile_edges(passes: Callable[[], Iterable[np.ndarray]], bins: int) -> list[float]:
    """Return the edges of quantile bins: exact, in memory that does not grow with the values.

    The upper edge of bin k of K is the least value v for which at least k / K of all values are at most v. Equal edges
    count once, and the greatest value is not an edge, so that each bin holds values and equal values share one.

    Args:
        passes: returns all values in pieces, int32 [n] or float64 [n] each; called several times.
        bins: K, the largest number of bins.

    Returns:
        At most K - 1 edges in ascending order, of the type of the values; none if there are fewer than two different
        values.
    """
    kind = next((values.dtype for values in passes()), np.dtype(np.int32))
    if kind == np.float64:
        pieces = lambda: map(ordered_bits, passes())  # noqa: E731
        return from_ordered_bits(np.array(values_at_ranks(pieces, bins)[:-1], np.int64)).tolist()
    return [*values_at_ranks(passes, bins)[:-1]]


def values_at_ranks(passes: Callable[[], Iterable[np.ndarray]], shares: int | Sequence[float]) -> list[int]:
    """Return the least values up to which shares of all values lie, in bounded memory; none if there are no values.

    Few values are kept. Of many, each pass counts ``_DIGIT`` bits of the values that begin as a wanted value does.

    Args:
        passes: returns all values in pieces, int32 [n] or int64 [n] each; called for each pass.
        shares: more than 0 and at most 1; or a number K for 1/K, 2/K, ..., 1, of which equal values are given once.
    """
    few = _few_values(passes())
    if few is not None:
        places = _ranks(shares, len(few)) - 1 if len(few) else np.zeros(0, np.int64)
        wanted = np.partition(few, np.unique(places))[places].tolist() if len(few) else []
        return sorted(set(wanted)) if isinstance(shares, int) else wanted
    kind = next(values.dtype for values in passes())
    sign = np.uint64(1 << 8 * kind.itemsize - 1)
    shifts = range((8 * kind.itemsize - 1) // _DIGIT * _DIGIT, -1, -_DIGIT)
    maps: list[np.ndarray] = []
    """Of each pass done: block << _DIGIT | digit -> block of the next pass, -1 for none."""
    ranks = blocks = np.zeros(0, np.int64)
    """Of each wanted value: its rank, from 1, in its block of values that begin alike."""
    found: np.ndarray = np.zeros(0, np.uint64)
    for shift in shifts:
        counts = np.zeros((int(blocks.max(initial=0)) + 1) << _DIGIT, np.int64)
        for values in passes():
            keys = values.astype(np.int64).view(np.uint64) + sign
            block = np.zeros(len(keys), np.int64)
            for done, of_pass in zip(shifts, maps, strict=False):
                block = of_pass[block << _DIGIT | _digit(keys, done)]
                keys, block = keys[block >= 0], block[block >= 0]
            counts += np.bincount(block << _DIGIT | _digit(keys, shift), minlength=len(counts))
        if not maps:
            ranks = _ranks(shares, int(counts.sum()))
            blocks, found = np.zeros(len(ranks), np.int64), np.zeros(len(ranks), np.uint64)
        ends = np.cumsum(counts.reshape(-1, 1 << _DIGIT), axis=1)
        digits = np.array([np.searchsorted(ends[block], rank) for block, rank in zip(blocks, ranks, strict=True)])
        ranks = ranks - np.where(digits > 0, ends[blocks, digits - 1], 0)
        found = found << np.uint64(_DIGIT) | digits.astype(np.uint64)
        continued, blocks = np.unique(blocks << _DIGIT | digits, return_inverse=True)
        maps.append(np.full(len(counts), -1, np.int64))
        maps[-1][continued] = np.arange(len(continued))
    wanted = (found - sign).view(np.int64).tolist()
    return sorted(set(wanted)) if isinstance(shares, int) else wanted


def _few_values(pieces: Iterable[np.ndarray]) -> np.ndarray | None:
    """Return all values; None if there are more than ``_FEW_VALUES``."""
    found, count = [np.zeros(0, np.int64)], 0
    for values in pieces:
        found.append(values)
        count += len(values)
        if count > _FEW_VALUES:
            return None
    return np.concatenate(found)


def _digit(keys: np.ndarray, shift: int) -> np.ndarray:
    return ((keys >> np.uint64(shift)) & np.uint64((1 << _DIGIT) - 1)).astype(np.int64)


def _ranks(shares: int | Sequence[float], total: int) -> np.ndarray:
    """Return the ranks, from 1, of the last values of shares of all values."""
    if isinstance(shares, int):
        return -(-np.arange(1, shares + 1) * total // shares)
    return np.clip(np.ceil(np.array(shares) * total - 1e-9).astype(np.int64), 1, total)


def standard_scale(pieces: Iterable[np.ndarray]) -> tuple[float, float]:
    """Return mean and standard deviation (of the whole, not a sample) of float64 pieces; 1 if all are equal.

    Pieces are added by Chan's formula, which loses nothing if numbers are large beside their deviation.
    """
    count, mean, squares = 0, 0.0, 0.0
    for values in pieces:
        if len(values):
            of_piece = float(values.mean())
            more, change = len(values), of_piece - mean
            mean += change * more / (count + more)
            squares += float(np.square(values - of_piece).sum()) + change**2 * count * more / (count + more)
            count += more
    return mean, (squares / count) ** 0.5 or 1.0 if count else 1.0


def range_scale(pieces: Iterable[np.ndarray]) -> tuple[float, float]:
    """Return the minimum and the width of the range of float64 pieces; the width is 1 if all values are equal."""
    bounds = [(float(values.min()), float(values.max())) for values in pieces if len(values)]
    low, high = min((low for low, _ in bounds), default=0.0), max((high for _, high in bounds), default=0.0)
    return low, (high - low) or 1.0


def size_of(values: np.ndarray) -> tuple[int, float, float]:
    """Return the number of finite values float32 [n], the sum of their squares, and the largest absolute value."""
    found = values[np.isfinite(values)].astype(np.float64)
    return len(found), float(np.square(found).sum()), float(np.abs(found).max(initial=0.0))


def sum_of_sizes(some: Iterable[tuple[int, float, float]]) -> tuple[int, float, float]:
    """Return ``size_of`` of the values of several arrays."""
    counts, squares, largest = zip((0, 0.0, 0.0), *some, strict=True)
    return sum(counts), sum(squares), max(largest)


def quantile_ranks(values: np.ndarray, edges: Sequence[float]) -> np.ndarray:
    """Return the bins of values as shares of the last bin, float64 [n]; see ``quantile_bins``."""
    return quantile_bins(values, edges) / max(len(edges), 1)


def quantile_bins(values: np.ndarray, edges: Sequence[float]) -> np.ndarray:
    """Return the bins of values: bin k holds those above edge k - 1, up to edge k.

    Args:
        values: int32 [n] or float64 [n].
        edges: as ``quantile_edges`` returns them.

    Returns:
        uint32 [n], 0 to the number of edges.
    """
    return np.searchsorted(np.asarray(edges, values.dtype), values).astype(np.uint32)
