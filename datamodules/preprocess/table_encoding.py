"""The tables of a dataset, and the numbers that are fitted for transforms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from datamodules.preprocess.transforms import log_squared_bins, quantile_bins


@dataclass(frozen=True, kw_only=True)
class Table:
    """A categorical or multi-hot column of the dataset."""

    name: str
    source: str
    """The column of segments that it is made of."""
    description: str = ""
    """Description of the encoding, for ``dataset.json``."""
    is_text: bool = False
    """Whether values are texts; otherwise they are uint32."""
    bag: bool = False
    """Whether rows have bags of values."""
    ids_of_bag: int = 1
    """Ids of the bag that ``mlperf_bags`` makes of each value's id."""
    missing_as_value: bool = False
    """Whether a missing value counts as the value 0, rather than as missing."""
    bins: Literal["log_squared", "quantile"] | None = None
    """How numbers become categories; None for values that are categories."""
    edges: tuple[float, ...] = ()
    """Edges of quantile bins."""
    min_count: int = 1
    """Rarer values share the id ``rare``."""
    reserved: Mapping[str, int] = field(default_factory=dict)
    """Ids of ``missing``, ``rare`` and ``unknown`` values; several may share one."""
    lists_rare: bool = False
    """Whether the vocabulary lists rare values, so that they can be told from unknown ones in other rows."""
    hash_modulo: int | None = None
    """Modulus of raw hashes before counting."""
    most_rows: int | None = None
    """Rows of the table: beyond them, less frequent values are rare."""

    def binned(self, values: np.ndarray) -> np.ndarray:
        """Return the bins uint32 [n] of numbers [n]."""
        return log_squared_bins(values) if self.bins == "log_squared" else quantile_bins(values, self.edges)


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Numbers fitted to the counted rows for the transforms, by column; empty if no transform needs them."""

    minimum: Mapping[str, float] = field(default_factory=dict)
    """Minimum over all rows."""
    edges: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Edges of quantile bins."""
    scales: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """For ``standard`` and ``minmax``: the number that is subtracted, and the divisor of the difference."""


PLACEHOLDER_IDS: Mapping[str, int] = {"missing": -1, "rare": -2, "unknown": -3}
"""Stand-ins for the reserved ids of a table, until it is counted."""


def trained_ids(reserved: Mapping[str, int], missing_rows: int, rare_rows: int, table_rows: int) -> dict[str, int]:
    """Return reserved ids that all occur in training rows, so that no lookup returns an untrained row.

    Without rare training values, rare and unknown values get the last id, which belongs to the rarest value; without
    missing training values, missing values get the id of rare values.

    Args:
        reserved: ids of ``rare``, ``unknown`` and, except for bags, ``missing``.
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
    # A modulus of 2^32 or more does not change a 32-bit hash, and does not fit its type.
    return values if max_rows is None or max_rows > 0xFFFFFFFF else values % np.uint32(max_rows)


def by_frequency(counts: np.ndarray) -> np.ndarray:
    """Return the order of ids: descending count, ties in the given order (the caller's order is by value).

    Any order gives the same model. This order depends only on the counts, and puts the frequent rows of a table beside
    each other, which helps caches and sharding.

    Args:
        counts: int64 [n], of distinct values in ascending order.

    Returns:
        int64 [n]: the position in ``counts`` of id 0, of id 1, ...
    """
    return np.argsort(-counts, kind="stable")
