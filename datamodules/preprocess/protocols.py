"""What a preprocessing protocol is: a few words and pure functions over numpy arrays.

Scores reached under different protocols cannot be compared, so a dataset names its protocol. A new
one is a new ``Protocol`` in ``PROTOCOLS``; the stages stay as they are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np

from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import SplitName

Dataset = Literal["kaggle", "terabyte"]
DATASETS: tuple[Dataset, ...] = get_args(Dataset)

DAYS = 7  # that a file split by position is cut into


@dataclass(frozen=True, kw_only=True)
class Span:
    """Rows ``start`` to ``stop`` (not included) of all input files together, which go to one split."""

    split: SplitName
    start: int
    stop: int


DenseTransform: TypeAlias = Callable[[np.ndarray, np.ndarray], np.ndarray]
HashTransform: TypeAlias = Callable[[np.ndarray, int | None], np.ndarray]
Splitter: TypeAlias = Callable[[Dataset, Sequence[int]], tuple[Span, ...]]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How raw values become features."""

    name: str
    dense_words: str
    """The dense transform for people, as the schema stores it."""
    dense: DenseTransform
    """(values int32 [n], anything where missing; missing bool [n]) -> float32 [n]."""
    category_words: str
    """The same of categorical values."""
    category: HashTransform
    """(hashes uint32 [n], 0 where missing; max_rows or None) -> uint32 [n], the values to count."""
    split: Splitter
    """(dataset, rows per input file) -> which rows go to which split."""


def _log_of_positive_part(values: np.ndarray, missing: np.ndarray) -> np.ndarray:
    positive = np.where(missing | (values < 0), 0, values)
    # In float64 and then rounded, so that the bytes do not depend on the processor's float32 logarithm.
    return np.log(positive.astype(np.float64) + 1.0).astype(np.float32)


def _hash_modulo(hashes: np.ndarray, max_rows: int | None) -> np.ndarray:
    # From 2^32 on the modulo of a 32-bit hash changes nothing, nor would it fit the type.
    return hashes if max_rows is None or max_rows > 0xFFFFFFFF else hashes % np.uint32(max_rows)


def by_frequency(counts: np.ndarray) -> np.ndarray:
    """The order of ids: descending count, ties as they come (the caller's order is by value).

    Any order is right; this one depends on nothing but the counts, and puts the often used rows of
    a table beside each other, where caches and later shards find them.

    Args:
        counts: int64 [n], of distinct values in ascending order.

    Returns:
        int64 [n]: the position in ``counts`` of id 0, of id 1, ...
    """
    return np.argsort(-counts, kind="stable")


def split_by_last_day(dataset: Dataset, file_rows: Sequence[int]) -> tuple[Span, ...]:
    """All days but the last train; of the last, the first half tests (one more row, if they are
    odd) and the second validates.

    Terabyte's days are its files. Kaggle, and a single file of Terabyte, are cut by position into
    seven days of n // 7 rows, of which the first n % 7 have one more.

    Raises:
        UserError: a split would be empty.
    """
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
        Span(split="test", start=rows - held_out, stop=middle),
        Span(split="validation", start=middle, stop=rows),
    )


_DLRM = Protocol(
    name="dlrm",
    dense_words="log(max(x, 0) + 1), missing as 0",
    dense=_log_of_positive_part,
    category_words="id by descending count over all rows, missing as hash 0",
    category=_hash_modulo,
    split=split_by_last_day,
)

PROTOCOLS: Mapping[str, Protocol] = {protocol.name: protocol for protocol in (_DLRM,)}


def find_protocol(name: str) -> Protocol:
    """The protocol of a name.

    Raises:
        UserError: there is none of this name.
    """
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol {name!r}; known: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
