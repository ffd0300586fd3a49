"""The settings of a column and of the split in the schema of a raw click log. Nothing here imports torch."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from lightning_dlrm.contracts.errors import require
from lightning_dlrm.contracts.schema import SPLITS, SplitName

ColumnRole = Literal["dense", "categorical", "multi_hot", "keep", "leave"]
Transform = Literal[
    "none",
    "log1p",
    "signed_log",
    "log_above_minimum",
    "log_plus_three",
    "standard",
    "minmax",
    "quantile",
    "log_squared",
]
BINS: tuple[Transform, ...] = ("quantile", "log_squared")
"""Transforms that make a category of a number."""
FitKind = Literal["minimum", "edges", "scales"]
_FITTED: Mapping[Transform | None, FitKind] = {
    "log_above_minimum": "minimum",
    "quantile": "edges",
    "standard": "scales",
    "minmax": "scales",
}
Missing = Literal["own", "rare", "zero"]
SplitKind = Literal["position", "time", "days", "random", "tenths", "column", "files"]
Scalar: TypeAlias = bool | int | float | str

MOST_BINS = 256
_DEFAULT_BINS: Mapping[str, int] = {"dense": MOST_BINS, "categorical": 30}
_KEYS_OF_ROLE: Mapping[str, Collection[str]] = {
    "dense": ("transform", "bins", "fill"),
    "categorical": ("type", "transform", "bins", "min_count", "max_rows", "missing"),
    "multi_hot": ("separator", "brackets", "weights", "min_count", "max_rows"),
    "keep": ("time",),
    "leave": ("time",),
}
_KEYS_OF_SPLIT: Mapping[str, Collection[str]] = {
    "position": ("ratios",),
    "time": ("column", "ratios"),
    "days": ("days", "held_out"),
    "random": ("ratios", "seed"),
    "tenths": ("seed",),
    "column": ("column", "train", "validation", "test", "leave"),
    "files": ("train", "validation", "test"),
}


@dataclass(frozen=True, kw_only=True)
class LogColumn:
    """The role and settings of a column of the log, or of one column of the dataset that is made of it."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    role: ColumnRole
    """``keep`` stores the values beside the features, for ``predict`` and AUC by group; ``leave`` ignores the
    column."""
    source: str | None = None
    """The log's column; None for the one with the name of this column."""
    time: str | None = None
    """How a value of ``keep`` or ``leave`` becomes a time: ``unix`` (seconds), ``unix_ms``, ``iso``, or a format of
    strptime; None if it is not a time, or if the file stores it as a time."""
    type: Literal["hash"] | None = None
    """The type of a category's values: ``hash`` for 8 hexadecimal digits, stored as 32 bits; None for text."""
    transform: Transform | None = None
    """The transform of a number. A category takes one of ``BINS``, or None to use its values as they are."""
    bins: int | None = None
    """The largest number of quantile bins; None for 256 (dense) or 30 (categorical)."""
    fill: float | None = None
    """The number that replaces missing numbers, before the transform; None to keep them missing."""
    min_count: int | None = None
    """Rarer values share one row; None for the ``min_count`` of the schema."""
    max_rows: int | None = None
    """Rows of the table: the most frequent values keep their own; None for the ``max_rows`` of the schema."""
    missing: Missing | None = None
    """As ``LogSchema.missing``; None for the schema's ``missing``."""
    separator: str | None = None
    """Between the values of a bag, if it is text; None if it is a list."""
    brackets: bool = False
    """Whether the text of a bag stands in brackets, such as ``[5, 3]``; spaces and quotes around its values are then
    left out."""
    weights: str | None = None
    """The log's column with the weights of the bag, in the same form as the bag."""

    def __post_init__(self) -> None:
        for name in _given(self, "role", "source"):
            takers = [role for role, names in _KEYS_OF_ROLE.items() if name in names]
            require(name in _KEYS_OF_ROLE[self.role], f"{name} is for {' and '.join(takers)}, not for {self.role}")
        require(
            self.role != "categorical" or self.transform in (None, *BINS),
            f"transform {self.transform} does not make categories of numbers; expected {' or '.join(BINS)}, or role "
            "dense",
        )
        require(
            self.bins is None or self.transform == "quantile", "bins is for transform quantile alone; leave bins out"
        )
        require(self.bins is None or 2 <= self.bins <= MOST_BINS, f"bins is {self.bins}, expected 2 to {MOST_BINS}")
        require(
            self.transform is None or self.type is None,
            "type is for categories that are made without a transform, and transform is given: leave one of them out",
        )
        require(
            self.fill is None or self.transform != "log_plus_three",
            "fill is not for transform log_plus_three, which is 0 where a value is missing",
        )
        require(self.fill is None or math.isfinite(self.fill), f"fill is {self.fill}, expected a number")
        require(self.separator != "", "separator is empty; leave it out for a column of lists")
        require(
            self.separator or not self.brackets,
            "brackets is set without separator: add separator, such as ',', or leave brackets out for columns of lists",
        )
        check_limits(self.min_count, self.max_rows)
        if self.time is not None and self.time not in ("unix", "unix_ms", "iso"):
            require(
                "%" in self.time, f"time is {self.time!r}; expected unix, unix_ms, iso, or a format such as '%Y-%m-%d'"
            )

    @property
    def form(self) -> Literal["number", "hash", "text", "bag"]:
        """The form of the values of which features are made."""
        if self.role == "dense" or self.transform is not None:
            return "number"
        return "bag" if self.role == "multi_hot" else self.type or "text"

    @property
    def fit(self) -> FitKind | None:
        """What the transform takes from the rows; None for nothing."""
        return _FITTED.get(self.transform)

    @property
    def quantiles(self) -> int:
        """The largest number of quantile bins: ``bins``, or the default of the role."""
        return self.bins or _DEFAULT_BINS[self.role]


@dataclass(frozen=True, kw_only=True)
class LogSplit:
    """The assignment of rows to the training, validation and test splits."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    by: SplitKind
    ratios: tuple[float, ...] = (0.8, 0.1, 0.1)
    """Shares of train, validation and test; they sum to 1, and one may be 0."""
    column: str | None = None
    """The log's column of times or of names of splits."""
    days: Literal["position", "files"] = "position"
    """What a day is: one of seven equal parts of all rows, or a file; a single file is cut into seven."""
    held_out: tuple[SplitName, SplitName] = ("test", "validation")
    """The splits of the first and of the second half of the last day."""
    seed: int = 0
    """The seed of random splits and of negative sampling."""
    negative_sampling_rate: float = 1.0
    """The share of the training rows with label 0 that is kept."""
    train: tuple[Scalar, ...] = ()
    """Values of the column, or patterns of file names."""
    validation: tuple[Scalar, ...] = ()
    test: tuple[Scalar, ...] = ()
    leave: tuple[Scalar, ...] = ()
    """Values whose rows are left out."""

    def __post_init__(self) -> None:
        taken = [*_KEYS_OF_SPLIT[self.by], "negative_sampling_rate"]
        if self.negative_sampling_rate < 1:
            taken.append("seed")
        for name in _given(self, "by"):
            require(name in taken, f"{name} is not for a split by {self.by}, which takes {', '.join(taken)}")
        require("column" not in taken or self.column, f"column is missing; a split by {self.by} needs it")
        shares = ", ".join(map(str, self.ratios))
        require(
            len(self.ratios) == 3 and min(self.ratios) >= 0 and abs(sum(self.ratios) - 1) < 1e-6 and self.ratios[0],
            f"ratios are {shares}; expected shares of train, validation and test that sum to 1",
        )
        require(
            {*self.held_out} == {*SPLITS[1:]},
            f"held_out is {' and '.join(self.held_out)}; expected test and validation, each once",
        )
        check_seed(self.seed)
        require(
            0 < self.negative_sampling_rate <= 1,
            f"negative_sampling_rate is {self.negative_sampling_rate}, expected a share of the rows to keep, more "
            "than 0 and at most 1",
        )
        values = [value_text(value) for value in (*self.train, *self.validation, *self.test, *self.leave)]
        require("train" not in taken or self.train, "train is missing; name the rows of the training split")
        twice = next((value for value in values if values.count(value) > 1), None)
        require(twice is None, f"{twice} is given twice; each value belongs to one split")

    @property
    def values(self) -> dict[str, tuple[str, ...]]:
        """The values or file names of each split, as text; splits without any are left out."""
        given = {
            "train": self.train,
            "validation": self.validation,
            "test": self.test,
            "leave": self.leave,
        }
        return {name: tuple(map(value_text, values)) for name, values in given.items() if values}


def value_text(value: Scalar) -> str:
    """Return a value as the text that it has as a category: ``true``, ``5`` (also of 5.0), ``0.5``, ``x``."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


@dataclass(frozen=True, kw_only=True)
class MlperfBags:
    """Bags of the sizes of MLPerf DLRM v2, made of the single ids of Criteo's rows; see ``mlperf_bags``."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    distribution: Literal["uniform", "pareto"] = "uniform"
    """The distribution of the ids that are added to a row's own id."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)


def check_limits(min_count: int | None, max_rows: int | None) -> None:
    require(
        min_count is None or min_count >= 1, f"min_count is {min_count}, expected at least 1, which keeps every value"
    )
    require(
        max_rows is None or 3 <= max_rows < 2**31,
        f"max_rows is {max_rows}, expected at least 3 (missing, rare and one more), or null for no limit",
    )


def check_seed(seed: int) -> None:
    require(0 <= seed < 2**63, f"seed is {seed}; expected 0 to 2**63 - 1")


def _given(settings: LogColumn | LogSplit, *apart: str) -> list[str]:
    """Return the fields that are not at their default."""
    fields = (one for one in dataclasses.fields(settings) if one.name not in apart)
    return [one.name for one in fields if getattr(settings, one.name) != one.default]
