"""The split of each row: arithmetic on the row's position (and, for sampling, its label).

It does not depend on how the rows are cut into pieces, so any worker can compute it for any piece.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np

from datamodules.mixing import GOLDEN, mix
from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.schema import SPLITS, SplitName

Dataset = Literal["kaggle", "terabyte"]
DATASETS: tuple[Dataset, ...] = get_args(Dataset)

DAYS = 7  # a file split by position is cut into so many days

_TRAIN = SPLITS.index("train")
_TEST = SPLITS.index("test")
_VALIDATION = SPLITS.index("validation")

# Streams of random numbers, so that the split and the sampling of a row are independent.
_SPLIT_STREAM, _SAMPLING_STREAM = 1, 2


@dataclass(frozen=True, kw_only=True)
class Span:
    """Rows ``start`` to ``stop`` (not included) of all input files together, which go to one split."""

    split: SplitName
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """Assigns every row to a split."""

    spans: tuple[Span, ...] = ()
    """Rows by position; empty for random 8:1:1: of every ten rows, one goes to test and one to validation."""
    seed: int = 0
    negative_sampling_rate: float = 1.0
    """The share of training rows with label 0 that is kept."""

    @property
    def arithmetic(self) -> bool:
        """Whether the rows of each split follow from the spans alone."""
        return bool(self.spans) and self.negative_sampling_rate == 1.0

    def split_of(self, start: int, rows: int, labels: np.ndarray | None) -> np.ndarray:
        """Return the split of some rows.

        Args:
            start: the position of the first, counted over all input files.
            rows: how many they are.
            labels: int8 [rows]; needed for negative sampling only.

        Returns:
            int8 [rows]: the position of the split in ``SPLITS``, -1 for rows that are left out.
        """
        if self.spans:
            codes = np.full(rows, -1, np.int8)
            for span in self.spans:
                codes[max(span.start - start, 0) : max(span.stop - start, 0)] = SPLITS.index(span.split)
        else:
            codes = self._random_split(np.arange(start, start + rows, dtype=np.uint64))
        if self.negative_sampling_rate < 1.0:
            assert labels is not None
            negatives = np.flatnonzero((codes == _TRAIN) & (labels == 0))
            drawn = mixed(self.seed, _SAMPLING_STREAM, negatives.astype(np.uint64) + np.uint64(start))
            kept = (drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53 < self.negative_sampling_rate
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


Splitter: TypeAlias = Callable[[Dataset, Sequence[int]], tuple[Span, ...]]
"""(dataset, rows per input file) -> which rows go to which split, none for random 8:1:1."""


def halves_of_last_day(first: SplitName, second: SplitName) -> Splitter:
    """Return a splitter: all days but the last train; the halves of the last go to the given splits, the first half
    with one more row if they are odd.

    Terabyte's days are its files. Kaggle, and a single file of Terabyte, are cut by position into
    seven days of n // 7 rows, of which the first n % 7 have one more.

    The splitter raises UserError if a split would be empty.
    """

    def split(dataset: Dataset, file_rows: Sequence[int]) -> tuple[Span, ...]:
        rows = sum(file_rows)
        by_files = dataset == "terabyte" and len(file_rows) > 1
        held_out = file_rows[-1] if by_files else rows // DAYS
        if held_out < 2:
            least = "2 rows in the last file" if by_files else f"{2 * DAYS} rows ({DAYS} days of 2)"
            raise UserError(
                f"too few rows: {held_out if by_files else rows} in {'the last file' if by_files else 'all'}; "
                f"with fewer than {least} the test or validation split would be empty: give more input"
            )
        middle = rows - held_out // 2
        return (
            Span(split="train", start=0, stop=rows - held_out),
            Span(split=first, start=rows - held_out, stop=middle),
            Span(split=second, start=middle, stop=rows),
        )

    return split


def one_in_ten(dataset: Dataset, file_rows: Sequence[int]) -> tuple[Span, ...]:
    """Split at random 8:1:1; this needs ten rows, so that no split is empty.

    Raises:
        UserError: there are fewer.
    """
    require(
        sum(file_rows) >= 10,
        f"too few rows: {sum(file_rows)} in all; a split 8:1:1 needs at least 10: give more input",
    )
    return ()


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
