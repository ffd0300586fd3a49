"""Sizes and traffic of embedding tables, the input of plans."""

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lightning_dlrm.contracts.errors import UserError, require


@dataclass(frozen=True, kw_only=True)
class TableLoad:
    """Size and traffic of one embedding table."""

    name: str
    rows: int
    width: int
    """D, elements of a row's vector."""
    bytes_per_row: int
    """Parameters and optimizer state."""
    indices_per_sample: float = 1.0
    """Mean number of rows that a sample looks up."""
    factors: bool = False
    """Whether the table's ids have per-sample weights."""
    may_pool: bool = True
    """Whether the rank that holds the rows may sum them: see EmbeddingTables.may_pool."""
    on_host: bool = False
    """Whether the rows stay in host memory when the model is on another device."""
    skew: float = 1.0
    """Exponent of Zipf's law: row i is drawn in proportion to (i + 1)^-skew; 0 for uniform draws."""
    counts: NDArray | None = field(default=None, compare=False, repr=False)
    """[rows]: counted lookups of each row, used instead of ``skew``."""

    def __post_init__(self) -> None:
        require(
            self.rows >= 1 and self.width >= 1 and self.bytes_per_row >= 1,
            f"table {self.name}: {self.rows} rows of width {self.width}; expected 1 or more of each",
        )
        require(
            self.skew >= 0 and self.indices_per_sample >= 0,
            f"table {self.name}: skew {self.skew} and {self.indices_per_sample} indices a sample; "
            "expected numbers of 0 or more",
        )

    @property
    def bytes(self) -> int:
        return self.rows * self.bytes_per_row


class UniqueRows:
    """Expected number of unique rows that a batch looks up, for any range of a table's rows.

    n draws miss row i with probability exp(-n p_i). The first rows are summed one by one, the others in blocks that
    grow by a few percent; unless rows were counted, each row of a block has the probability of its middle row.

    Args:
        table: the table.
        samples: samples of the batch, or of one rank's slice of it.
    """

    def __init__(self, table: TableLoad, samples: float) -> None:
        edges = list(range(min(64, table.rows) + 1))
        while edges[-1] < table.rows:
            edges.append(min(table.rows, edges[-1] + max(1, edges[-1] // 32)))
        middles = [(a + b + 1) / 2 for a, b in itertools.pairwise(edges)]
        shares = [middle**-table.skew for middle in middles]
        sizes = [b - a for a, b in itertools.pairwise(edges)]
        total = math.fsum(size * share for size, share in zip(sizes, shares, strict=True))
        draws = samples * table.indices_per_sample
        if table.counts is not None:
            lookups = max(int(table.counts.sum()), 1)
            missed = np.expm1(table.counts * (-draws / lookups))
            found = (-np.add.reduceat(missed, edges[:-1])).tolist()
            drawn = (np.add.reduceat(table.counts, edges[:-1]) / lookups).tolist()
        else:
            found = [-size * math.expm1(-draws * share / total) for size, share in zip(sizes, shares, strict=True)]
            drawn = [size * share / total for size, share in zip(sizes, shares, strict=True)]
        self._edges = edges
        self._below = [0.0, *itertools.accumulate(found)]
        self._share_below = [0.0, *itertools.accumulate(drawn)]

    def below(self, row: int) -> float:
        """Return the expected unique rows among rows 0 to ``row`` - 1."""
        return self._at(self._below, row)

    def between(self, start: int, stop: int) -> float:
        """Return the expected unique rows among rows ``start`` to ``stop`` - 1."""
        return self.below(stop) - self.below(start)

    def share(self, start: int, stop: int) -> float:
        """Return the expected share of the draws that hit rows ``start`` to ``stop`` - 1."""
        return self._at(self._share_below, stop) - self._at(self._share_below, start)

    def _at(self, sums: Sequence[float], row: int) -> float:
        i = min(bisect.bisect_right(self._edges, row) - 1, len(self._edges) - 2)
        a, b = self._edges[i], self._edges[i + 1]
        return sums[i] + (sums[i + 1] - sums[i]) * (row - a) / (b - a)

    def row_after(self, start: int, count: float) -> int:
        """Return the largest row r > ``start`` with at most ``count`` expected unique rows in ``start`` to r - 1."""
        goal = self.below(start) + count
        i = bisect.bisect_right(self._below, goal) - 1
        if i >= len(self._edges) - 1:
            return self._edges[-1]
        step = self._below[i + 1] - self._below[i]
        inside = int((goal - self._below[i]) / step * (self._edges[i + 1] - self._edges[i])) if step > 0 else 0
        return max(start + 1, self._edges[i] + inside)


def imbalance(values: Sequence[float]) -> float:
    """Return the largest value divided by the mean; 1 if all are equal or zero."""
    mean = sum(values) / len(values)
    return max(values) / mean if mean else 1.0


def parse_bytes(text: str) -> int:
    """Parse an amount of memory such as ``80GiB``, ``512 MB`` or a plain number of bytes.

    Raises:
        UserError: the text has another form.

    >>> parse_bytes("1.5GiB"), parse_bytes("2 GB"), parse_bytes("100")
    (1610612736, 2000000000, 100)
    """
    units = {"": 1, "b": 1}
    for power, letter in enumerate("kmgt", start=1):
        units |= {f"{letter}b": 1000**power, f"{letter}ib": 1024**power}
    compact = text.strip().lower().replace(" ", "")
    number = compact.rstrip("bikmgt")
    try:
        value = float(number) * units[compact[len(number) :]]
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{text!r} is not an amount of memory; expected text such as 80GiB, 512MB or 1000000"
        ) from error
    require(math.isfinite(value) and value >= 0, f"{text!r} is not an amount of memory; expected 0 or more")
    return int(value)


def parse_memory(text: str) -> int | list[int]:
    """Parse memory per rank: one amount for all ranks, or one for each, separated by commas."""
    amounts = [parse_bytes(part) for part in text.split(",")]
    return amounts[0] if len(amounts) == 1 else amounts


def format_bytes(amount: float) -> str:
    """Return an amount of memory with four digits and a binary unit."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.4g} {unit}"
        amount /= 1024
    return f"{amount:.4g} TiB"
