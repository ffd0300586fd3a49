"""Preprocessing protocols: their descriptions, their splits, and their functions over numpy arrays.

Scores under different protocols cannot be compared, so a dataset names its protocol. To add one, add a ``Protocol`` to
``PROTOCOLS``; the stages need no change.

Differences between these protocols and the published systems:

- Ids go by descending count (ties by value) everywhere. facebookresearch/dlrm and torchrec number
  values as they come, NVIDIA and FuxiCTR by count; any order gives the same model.
- torchrec takes one minimum over all 13 columns of a file, so that equal values differ from file
  to file; ``mlperf`` takes each column's over all files.
- NVIDIA's log(x + 3) has no value below x = -2: such values become 0, as missing ones do.
- FuxiCTR keeps a row for padding beside the one for missing, rare and unknown values; no Criteo row
  ever uses it, so ``bars`` has none. Its split is stratified by label with scikit-learn; ours draws
  one of every ten rows for test and another for validation, which needs no second look at the data.
- FuxiCTR takes the integer 0 as missing (``na_value: 0``), so that 0 and missing integers share the
  row of rare ones; in ``bars`` 0 and missing integers share a row of their own. That is one row more
  for each integer column, and keeps rare bins apart from 0: these are 0.0003% of the integers in
  160,000 generated training rows, and 0.7% in 8,000 rows of Terabyte.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import numpy as np

from datamodules.preprocess.splits import Span
from datamodules.preprocess.transforms import (
    DenseTransform,
    log_above_minimum,
    log_of_positive_part,
    log_plus_three,
    log_squared_bins,
    quantile_bins,
    signed_log,
)
from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.schema import CRITEO_CATEGORICAL, CRITEO_DENSE, SplitName

Dataset = Literal["kaggle", "terabyte"]
DATASETS: tuple[Dataset, ...] = get_args(Dataset)

DAYS = 7  # a file split by position is cut into so many days

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


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A transform of numbers to fit to the counted rows."""

    name: str
    """Under which the result is kept."""
    source: str
    """The column of segments."""
    transform: Literal["quantile", "standard", "minmax"]
    bins: int = 0
    """The largest number of quantile bins."""
    fill: float | None = None
    """The number that missing ones count as; None if they do not count."""


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A dense column of the dataset."""

    name: str
    source: str
    """The column of segments that it is made of."""
    words: str
    """Description of the transform."""
    transform: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """(values [n], 0 where missing; missing bool [n]) -> float32 [n], NaN being stored as null."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A categorical or multi-hot column of the dataset."""

    name: str
    source: str
    """The column of segments that it is made of; of Criteo ``C1..C26``, or ``I1..I13`` in bins."""
    words: str = ""
    """Description of the encoding."""
    is_text: bool = False
    """Whether values are texts; otherwise they are uint32."""
    bag: bool = False
    """Whether rows have bags of values."""
    missing_as_value: bool = False
    """Whether a missing value counts as the value 0, rather than as missing."""
    bins: Literal["log_squared", "quantile"] | None = None
    """How numbers become categories; None for values that are categories."""
    edges: tuple[float, ...] = ()
    """Of quantile bins."""
    min_count: int = 1
    """Rarer values share the id ``rare``."""
    reserved: Mapping[str, int] = field(default_factory=dict)
    """Ids of ``missing``, ``rare`` and ``unknown`` values; several may share one."""
    trained_rows: bool = False
    """Whether reserved ids without a row in training give way to others, see ``trained_ids``."""
    lists_rare: bool = False
    """Whether the vocabulary lists rare values, so that they can be told from unknown ones in other rows."""
    hash_modulo: int | None = None
    """Modulus of raw hashes before counting."""
    id_modulo: int | None = None
    """Modulus of ids after counting."""
    most_rows: int | None = None
    """Rows of the table: beyond them, less frequent values are rare."""

    def binned(self, values: np.ndarray) -> np.ndarray:
        """Return the bins uint32 [n] of numbers [n]."""
        return log_squared_bins(values) if self.bins == "log_squared" else quantile_bins(values, self.edges)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How raw values become features."""

    name: str
    summary: str
    """One line for ``--help``."""
    dense_words: str
    """The dense transform for people, as the schema stores it; ``{minimum}`` is filled in."""
    dense: DenseTransform | None
    """(values int32 [n], 0 where missing; missing bool [n]; minimum of the whole column) ->
    float32 [n], NaN being stored as null. None: there are no dense columns."""
    dense_needs_minimum: bool = False
    category_words: str
    """The same for categorical values."""
    bins: str = ""
    """Prefix of the names of the categorical columns made of I1..I13: ``B`` for B1..B13; empty for no such columns."""
    quantiles: int | None = None
    """The default number of quantile bins; None for log-squared bins."""
    missing_as_value: bool = False
    """Whether a missing hash counts as hash 0."""
    missing_bin_as_value: bool = False
    """Whether a missing integer counts as 0 when it is made a category."""
    reserved: Mapping[str, int] = field(default_factory=dict)
    """Ids of ``missing``, ``rare`` and ``unknown`` values; several may share one."""
    trained_rows: bool = False
    """Whether reserved ids without a row in training give way to others, see ``trained_ids``."""
    lists_rare: bool = False
    """Whether the vocabulary lists rare values, so that they can be told from unknown ones in other rows."""
    counts: Literal["all rows", "the training split"]
    """The rows over which the vocabulary is counted."""
    min_count: int = 1
    """The default threshold: rarer values share the id ``rare``."""
    modulo: Literal["hash", "id"] | None = None
    """What ``max_rows`` is the modulus of: the raw hash before counting or the id after it."""
    split: Splitter
    superseded_by: str = ""
    """One line about the protocol that replaces this protocol."""

    def tables(
        self, min_count: int, max_rows: int | None, edges: Mapping[str, Sequence[float]] | None = None
    ) -> tuple[Table, ...]:
        """Return the categorical columns, in the order of the dataset.

        Args:
            min_count: the threshold in force.
            max_rows: what ``modulo`` takes values or ids by.
            edges: of the quantile bins of I1..I13, if they are known.
        """
        sources = [*((self.bins + name[1:], name) for name in (CRITEO_DENSE if self.bins else ()))]
        sources += [(name, name) for name in CRITEO_CATEGORICAL]
        return tuple(self._table(*names, min_count, max_rows, edges or {}) for names in sources)

    def _table(
        self, name: str, source: str, min_count: int, max_rows: int | None, edges: Mapping[str, Sequence[float]]
    ) -> Table:
        is_bin = source in CRITEO_DENSE
        missing_as_value = self.missing_bin_as_value if is_bin else self.missing_as_value
        # A protocol without reserved ids has that of rare values if a threshold is set.
        reserved = self.reserved or ({"rare": 0} if min_count > 1 else {})
        return Table(
            name=name,
            source=source,
            missing_as_value=missing_as_value,
            bins=("log_squared" if self.quantiles is None else "quantile") if is_bin else None,
            edges=tuple(edges.get(source, ())),
            min_count=min_count,
            reserved={kind: row for kind, row in reserved.items() if kind != "missing" or not missing_as_value},
            trained_rows=self.trained_rows,
            lists_rare=self.lists_rare,
            hash_modulo=max_rows if self.modulo == "hash" else None,
            id_modulo=max_rows if self.modulo == "id" else None,
        )


PLACEHOLDER_IDS: Mapping[str, int] = {"missing": -1, "rare": -2, "unknown": -3}
"""Stand-ins for the reserved ids of a table, until it is counted."""


def trained_ids(reserved: Mapping[str, int], missing_rows: int, rare_rows: int, table_rows: int) -> dict[str, int]:
    """Return reserved ids that all occur in training rows, so that no lookup returns an untrained row.

    Without rare training values, rare and unknown values get the last id, which belongs to the rarest value; without
    missing training values, missing values get the id of rare values.

    Args:
        reserved: ids of ``rare``, ``unknown`` and, unless there are none as in bags, ``missing``.
        missing_rows: training rows whose value is missing.
        rare_rows: training rows whose value is rare.
        table_rows: rows of the table; there are no other values if all of them are reserved.
    """
    others = table_rows > max(reserved.values()) + 1
    missing = reserved.get("missing")
    if missing is None:
        rare = table_rows - 1 if others and not rare_rows else reserved["rare"]
        return {"rare": rare, "unknown": rare}
    if missing == reserved["rare"]:
        rare_rows = missing_rows = rare_rows + missing_rows
    rare = reserved["rare"] if rare_rows else table_rows - 1 if others else missing
    return {"missing": missing if missing_rows else rare, "rare": rare, "unknown": rare}


def hash_modulo(values: np.ndarray, max_rows: int | None) -> np.ndarray:
    # From 2^32 on the modulo of a 32-bit hash changes nothing, nor would it fit the type.
    return values if max_rows is None or max_rows > 0xFFFFFFFF else values % np.uint32(max_rows)


def by_frequency(counts: np.ndarray) -> np.ndarray:
    """Return the order of ids: descending count, ties in the given order (the caller's order is by value).

    Any order is right; this one depends on nothing but the counts, and puts the often used rows of
    a table beside each other, where caches and later shards find them.

    Args:
        counts: int64 [n], of distinct values in ascending order.

    Returns:
        int64 [n]: the position in ``counts`` of id 0, of id 1, ...
    """
    return np.argsort(-counts, kind="stable")


_DLRM = Protocol(
    name="dlrm",
    summary="as facebookresearch/dlrm: log(max(x, 0) + 1), missing as 0; every hash has a row of its own, missing "
    "ones count as hash 0; counted over all rows. --max-rows: hash modulo N before counting",
    dense_words="log(max(x, 0) + 1), missing as 0",
    dense=log_of_positive_part,
    category_words="id by descending count over all rows, missing as hash 0",
    missing_as_value=True,
    counts="all rows",
    modulo="hash",
    split=halves_of_last_day("test", "validation"),
)
_MLPERF = Protocol(
    name="mlperf",
    summary="as torchrec_dlrm: log(x - minimum of the whole column + 2), missing as 0; hashes as in dlrm. --max-rows: "
    "id modulo N after counting. --multi-hot mlperf makes DLRM v2's bags",
    dense_words="log(x - ({minimum}) + 2), missing as 0, below the minimum as the minimum",
    dense=log_above_minimum,
    dense_needs_minimum=True,
    category_words="id by descending count over all rows, missing as hash 0",
    missing_as_value=True,
    counts="all rows",
    modulo="id",
    split=halves_of_last_day("validation", "test"),
)
_NVIDIA = Protocol(
    name="nvidia",
    summary="as NVIDIA DeepLearningExamples: log(x + 3), 0 where missing or below -2; hashes seen fewer than 15 times "
    "(published too: --min-count 3, 2), missing and unknown ones share id 0; counted over all rows",
    dense_words="log(x + 3), 0 where missing or below -2",
    dense=log_plus_three,
    category_words="id by descending count over all rows; missing, rare and unknown values share one",
    reserved={"missing": 0, "rare": 0, "unknown": 0},
    counts="all rows",
    min_count=15,
    split=halves_of_last_day("test", "validation"),
)
_BARS = Protocol(
    name="bars",
    summary="as FuxiCTR on Criteo_x4 (_001; --min-count 2 for _002): integers become categories, floor(log(x)^2) above "
    "2, missing as 0; values seen fewer than 10 times, missing and unknown ones share id 0; counted over the training "
    "split; random 8:1:1. No dense columns",
    dense_words="",
    dense=None,
    category_words="id by descending count over the training split; missing, rare and unknown values share one",
    bins="I",
    missing_bin_as_value=True,
    reserved={"missing": 0, "rare": 0, "unknown": 0},
    counts="the training split",
    min_count=10,
    split=one_in_ten,
)
_MODERN = Protocol(
    name="modern",
    summary="our own, losing nothing: sign(x) log(|x| + 1) with missing as null, and the same integers binned as "
    "categories B1..B13; missing 0, rare (seen once in training) 1 and unknown 2 have ids of their own; counted over "
    "the training split",
    dense_words="sign(x) * log(|x| + 1), missing as null",
    dense=signed_log,
    category_words="id by descending count over the training split",
    bins="B",
    reserved={"missing": 0, "rare": 1, "unknown": 2},
    lists_rare=True,
    counts="the training split",
    min_count=2,
    split=halves_of_last_day("test", "validation"),
    superseded_by="protocol modern is superseded by quantile, whose bins have no collisions and whose unknown values "
    "share the row of rare ones; datasets of modern stay usable",
)
_QUANTILE = Protocol(
    name="quantile",
    summary="our own: sign(x) log(|x| + 1) with missing as null, and the same integers as categories B1..B13, in "
    "quantile bins of the training split (--bins, at most 30 by default); missing 0 apart; rare values (seen fewer "
    "than 3 times) and unknown ones share id 1, or the rarest value's id if training has none; counted over the "
    "training split",
    dense_words="sign(x) * log(|x| + 1), missing as null",
    dense=signed_log,
    category_words="id by descending count over the training split; unknown as rare",
    bins="B",
    quantiles=30,
    reserved={"missing": 0, "rare": 1, "unknown": 1},
    trained_rows=True,
    lists_rare=True,
    counts="the training split",
    min_count=3,
    split=halves_of_last_day("test", "validation"),
)

PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol for protocol in (_DLRM, _MLPERF, _NVIDIA, _BARS, _QUANTILE, _MODERN)
}


def find_protocol(name: str) -> Protocol:
    """Return the protocol of a name.

    Raises:
        UserError: there is none of this name.
    """
    require(name in PROTOCOLS, f"unknown protocol {name!r}; known: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
