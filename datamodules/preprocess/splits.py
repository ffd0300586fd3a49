"""Assignment of rows to splits: arithmetic on positions, times, labels and seeds, without a second look at the
data, so that any worker can compute it for any piece."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from datamodules.mixing import GOLDEN, mix
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import SPLITS, SplitName

_TRAIN = SPLITS.index("train")
_TEST = SPLITS.index("test")
_VALIDATION = SPLITS.index("validation")

DAYS = 7  # the days into which rows are cut by position

# Streams of random numbers, so that the split and the sampling of a row are independent.
_SPLIT_STREAM, _SAMPLING_STREAM = 1, 2


@dataclass(frozen=True, kw_only=True)
class Span:
    """Rows ``start`` to ``stop`` (not included) of all input files together, which go to one split."""

    split: SplitName
    start: int
    stop: int


def spans_of_days(file_rows: Sequence[int], by_files: bool, held_out: tuple[SplitName, SplitName]) -> tuple[Span, ...]:
    """Return the spans of a split by days: all days but the last train, and the halves of the last are held out.

    If the last day has an odd number of rows, its first half has one more row. Days by position have n // 7 rows; the
    first n % 7 days have one more.

    Args:
        file_rows: rows of each file.
        by_files: whether each file is a day; a single file is cut by position in either case.
        held_out: the splits of the halves.

    Raises:
        UserError: a split would be empty.
    """
    rows, by_files = sum(file_rows), by_files and len(file_rows) > 1
    last = file_rows[-1] if by_files else rows // DAYS
    if last < 2:
        least = "2 rows in the last file" if by_files else f"{2 * DAYS} rows ({DAYS} days of 2)"
        raise UserError(
            f"too few rows: {last if by_files else rows} in {'the last file' if by_files else 'all'}; "
            f"with fewer than {least} the test or validation split would be empty: give more input"
        )
    middle = rows - last // 2
    return (
        Span(split="train", start=0, stop=rows - last),
        Span(split=held_out[0], start=rows - last, stop=middle),
        Span(split=held_out[1], start=middle, stop=rows),
    )


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """Assigns every row to a split."""

    spans: tuple[Span, ...] = ()
    """Rows by position. Without spans, ratios, cuts and values, random 8:1:1: of every ten rows, one goes to test and
    one to validation."""
    ratios: tuple[float, ...] = ()
    """At random by these shares of ``SPLITS``."""
    cuts: tuple[int, ...] = ()
    """By time: the last one of the training split, and of the validation split."""
    by_value: bool = False
    """By what segments have staged: positions in ``SPLITS``."""
    seed: int = 0
    negative_sampling_rate: float = 1.0
    """The share of training rows with label 0 that is kept."""

    @property
    def arithmetic(self) -> bool:
        """Whether the rows of each split follow from the spans alone."""
        return bool(self.spans) and self.negative_sampling_rate == 1.0

    def split_of(self, start: int, rows: int, labels: np.ndarray | None, keys: np.ndarray | None = None) -> np.ndarray:
        """Return the split of some rows.

        Args:
            start: the position of the first, counted over all input files.
            rows: how many they are.
            labels: int8 [rows]; needed for negative sampling only.
            keys: what a log is split by, see ``OpenSegment.split_keys``.

        Returns:
            int8 [rows]: the position of the split in ``SPLITS``, -1 for rows that are left out.
        """
        if self.spans:
            codes = np.full(rows, -1, np.int8)
            for span in self.spans:
                codes[max(span.start - start, 0) : max(span.stop - start, 0)] = SPLITS.index(span.split)
        elif self.cuts or self.by_value:
            assert keys is not None
            codes = keys.copy() if self.by_value else _count_true(rows, (keys > cut for cut in self.cuts))
        elif self.ratios:
            drawn = _uniform(mixed(self.seed, _SPLIT_STREAM, np.arange(start, start + rows, dtype=np.uint64)))
            codes = _count_true(rows, (drawn >= end for end in np.cumsum(self.ratios[:-1])))
        else:
            codes = self._random_split(np.arange(start, start + rows, dtype=np.uint64))
        if self.negative_sampling_rate < 1.0:
            assert labels is not None
            negatives = np.flatnonzero((codes == _TRAIN) & (labels == 0))
            drawn = mixed(self.seed, _SAMPLING_STREAM, negatives.astype(np.uint64) + np.uint64(start))
            kept = _uniform(drawn) < self.negative_sampling_rate
            codes[negatives[~kept]] = -1
        return codes

    def _random_split(self, positions: np.ndarray) -> np.ndarray:
        ten = np.uint64(10)
        drawn = mixed(self.seed, _SPLIT_STREAM, positions // ten)
        test = drawn % ten
        validation = (test + np.uint64(1) + (drawn >> np.uint64(32)) % np.uint64(9)) % ten
        codes = np.full(len(positions), _TRAIN, np.int8)
        codes[positions % ten == test] = _TEST
        codes[positions % ten == validation] = _VALIDATION
        return codes


def _count_true(rows: int, conditions: Iterable[np.ndarray]) -> np.ndarray:
    """Return int8 [rows]: how many of some conditions, bool [rows] each, are true. A search takes ten times as long."""
    codes = np.zeros(rows, np.int8)
    for condition in conditions:
        codes += condition
    return codes


def mixed(seed: int, stream: int, values: np.ndarray) -> np.ndarray:
    """Return random bits of each value by integer mixing (the finaliser of SplitMix64, twice).

    Args:
        seed: 0 to 2**63 - 1.
        stream: number of the use.
        values: uint64 [n].

    Returns:
        uint64 [n], the same everywhere.
    """
    key = mix(np.array([(seed * GOLDEN + stream) % 2**64], np.uint64))
    return mix(mix(values * np.uint64(GOLDEN) + key))


def _uniform(bits: np.ndarray) -> np.ndarray:
    """Return numbers float64 [n] from 0 to 1 (not included) of random bits uint64 [n]."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
