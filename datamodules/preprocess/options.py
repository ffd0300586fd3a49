"""The options of ``preprocess`` that the dataset depends on, and their checks.

One of them makes MLPerf DLRM v2's synthetic multi-hot rows: each id becomes a bag of a fixed size per column. As in
torchrec_dlrm, a bag begins with the id itself, and the rest depends on the id alone, so that equal ids have equal bags.
The rest is uniform over the table, or floor(Pareto(0.25)) modulo its rows. torchrec draws a whole table of bags from
numpy's global generator; here each id is mixed with the seed, so that any row can be made anywhere, without tables of
40M bags.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from datamodules.folder import Folder
from datamodules.preprocess.protocols import DATASETS, PROTOCOLS, Dataset, Dense, Fit, Protocol, Table, find_protocol
from datamodules.preprocess.splits import mixed
from datamodules.preprocess.transforms import MOST_QUANTILE_BINS, DenseTransform
from lightning_dlrm.contracts.documents import parse_json
from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.schema import (
    CRITEO_CATEGORICAL,
    CRITEO_DENSE,
    SCHEMA_FILE,
    SPLITS,
    Column,
    DatasetSchema,
    SplitName,
)

Distribution = Literal["uniform", "pareto"]
DISTRIBUTIONS: tuple[Distribution, ...] = get_args(Distribution)

MLPERF_SIZES = dict(
    zip(
        CRITEO_CATEGORICAL,
        (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1),
        strict=True,
    )
)
"""Ids of each column's bag in MLPerf DLRM v2; 214 a row."""

_STREAM = 16  # of random numbers, plus the column's position; apart from those of ``splits``

OF_COLUMNS = ("minimum", "edges")
"""Settings of a schema that are no options: of each integer column its minimum, and the edges of its quantile bins."""

OnBadRow = Literal["fail", "skip"]


@dataclass(frozen=True, kw_only=True)
class MultiHot:
    """The rule that makes bags of single ids."""

    distribution: Distribution
    seed: int

    def size(self, column: str) -> int:
        """Return the ids of each bag of a column; 1 leaves the column as it is."""
        return MLPERF_SIZES.get(column, 1)

    def bags(self, column: str, ids: np.ndarray, table_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the bags of some rows.

        Args:
            ids: int32 [n].
            table_rows: rows of the column's table.

        Returns:
            int32 values [n * size] and int32 offsets [n + 1].
        """
        size = self.size(column)
        values = np.empty((len(ids), size), np.int32)
        values[:, 0] = ids
        positions = ids.astype(np.uint64)[:, None] * np.uint64(size) + np.arange(1, size, dtype=np.uint64)
        drawn = mixed(self.seed, _STREAM + CRITEO_CATEGORICAL.index(column), positions) >> np.uint64(32)
        if self.distribution == "uniform":
            values[:, 1:] = drawn * np.uint64(table_rows) >> np.uint64(32)
        else:
            # (1 - u) ** (-1 / 0.25) - 1 for u uniform in [0, 1), by multiplication, which is exact everywhere.
            inverse = 2.0**32 / (2.0**32 - drawn.astype(np.float64))
            squared = inverse * inverse
            values[:, 1:] = np.fmod(np.floor(squared * squared - 1.0), float(table_rows))
        return values.reshape(-1), np.arange(len(ids) + 1, dtype=np.int32) * np.int32(size)


@dataclass(frozen=True, kw_only=True)
class _OfColumns:
    """Settings of a schema for integer columns: see ``OF_COLUMNS``."""

    minimum: Mapping[str, int]
    edges: Mapping[str, list[int]]


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Numbers fitted to the counted rows for the transforms, by column; empty if no transform needs them."""

    minimum: Mapping[str, int] = field(default_factory=dict)
    """Over all rows."""
    edges: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Of quantile bins."""
    scales: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Of standard and minmax: what is subtracted, and what the difference is divided by."""


def _with_minimum(transform: DenseTransform, minimum: int, values: np.ndarray, missing: np.ndarray) -> np.ndarray:
    return transform(values, missing, minimum)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything that the bytes of the dataset depend on, apart from the rows."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    dataset: Dataset
    protocol: str
    max_rows: int | None = None
    """Rows of the largest table: ``dlrm`` takes hashes modulo it before counting, ``mlperf`` takes ids modulo it; None
    keeps every value."""
    min_count: int | None = None
    """Rarer values share one id; None for the protocol's own threshold."""
    bins: int | None = None
    """The largest number of quantile bins of an integer column; None for the protocol's own."""
    negative_sampling_rate: float = 1.0
    """The share of the training rows with label 0 that is kept."""
    multi_hot: Literal["mlperf"] | None = None
    multi_hot_distribution: Distribution = "uniform"
    seed: int = 0
    """Of random splits, of sampling and of multi-hot bags; 0 to 2**63 - 1."""
    on_bad_row: OnBadRow = "fail"
    encoding_of: str | None = None
    """The encoding fingerprint of the dataset whose vocabulary is used."""

    def __post_init__(self) -> None:
        protocol = find_protocol(self.protocol)
        known = {
            "dataset": DATASETS,
            "multi_hot": (None, "mlperf"),
            "multi_hot_distribution": DISTRIBUTIONS,
            "on_bad_row": get_args(OnBadRow),
        }
        for name, values in known.items():
            found = getattr(self, name)
            require(found in values, f"unknown {name} {found!r}; known: {', '.join(filter(None, values))}")
        require(
            self.max_rows is None or self.max_rows >= 1,
            f"max_rows is {self.max_rows}, expected at least 1; leave it out to keep every value",
        )
        if self.max_rows is not None and protocol.modulo is None:
            takers = " and ".join(name for name, other in PROTOCOLS.items() if other.modulo)
            raise UserError(f"protocol {protocol.name} has no max_rows, {takers} have; use min_count to shrink tables")
        require(
            self.min_count is None or self.min_count >= 1,
            f"min_count is {self.min_count}, expected at least 1, which keeps every value",
        )
        require(
            self.bins is None or protocol.quantiles is not None,
            f"protocol {protocol.name} has no quantile bins; leave bins out, or choose the protocol quantile",
        )
        require(
            self.bins is None or 2 <= self.bins <= MOST_QUANTILE_BINS,
            f"bins is {self.bins}, expected 2 to {MOST_QUANTILE_BINS}",
        )
        require(
            0 < self.negative_sampling_rate <= 1,
            f"negative_sampling_rate is {self.negative_sampling_rate}, expected a share of the rows to keep, more "
            "than 0 and at most 1",
        )
        require(0 <= self.seed < 2**63, f"seed is {self.seed}; give a number from 0 to 2**63 - 1")
        require(
            not self.multi_hot or self.dataset == "terabyte",
            "multi_hot mlperf is made only of Terabyte's rows; leave it out for Kaggle",
        )
        require(
            self.multi_hot_distribution == "uniform" or self.multi_hot,
            "multi_hot_distribution is given without multi_hot; give both, or neither",
        )

    @property
    def rules(self) -> Protocol:
        return find_protocol(self.protocol)

    @property
    def quantiles(self) -> int | None:
        """The largest number of quantile bins in force: ``bins``, or the protocol's own; None if it has none."""
        return self.rules.quantiles if self.bins is None else self.bins

    @property
    def threshold(self) -> int:
        """The threshold in force: ``min_count``, or the protocol's own."""
        return self.rules.min_count if self.min_count is None else self.min_count

    @property
    def bags(self) -> MultiHot | None:
        return MultiHot(distribution=self.multi_hot_distribution, seed=self.seed) if self.multi_hot else None

    @property
    def files_of_split(self) -> int:
        return 1

    @property
    def dense_dictionaries(self) -> bool:
        return True

    @property
    def counted(self) -> tuple[SplitName, ...]:
        """The splits over which vocabularies are counted."""
        return SPLITS if self.rules.counts == "all rows" else ("train",)

    @property
    def fitted_on(self) -> tuple[SplitName, ...]:
        return ("train",)

    def fits(self) -> tuple[Fit, ...]:
        """Return the transforms to fit."""
        bins = self.quantiles
        names = () if bins is None else CRITEO_DENSE
        return tuple(Fit(name=name, source=name, transform="quantile", bins=bins or 0) for name in names)

    def dense(self, fitted: Fitted) -> tuple[Dense, ...]:
        """Return the dense columns."""
        transform = self.rules.dense
        if transform is None:
            return ()
        minimum = fitted.minimum
        return tuple(
            Dense(
                name=name,
                source=name,
                words=self.rules.dense_words.format(minimum=minimum.get(name, "")),
                transform=partial(_with_minimum, transform, int(minimum.get(name, 0))),
            )
            for name in CRITEO_DENSE
        )

    def tables(self, fitted: Fitted) -> tuple[Table, ...]:
        """Return the categorical columns, in the order of the dataset."""
        tables = self.rules.tables(self.threshold, self.max_rows, fitted.edges)
        return tuple(replace(table, words=self._words(table)) for table in tables)

    def _words(self, table: Table) -> str:
        rules, words, source = self.rules, self.rules.category_words, table.source
        if self.threshold > 1:
            words += f"; rare is below {self.threshold}"
        if table.bins == "quantile":
            return f"quantile({self.quantiles}): bins of the training split up to each of settings.edges; {words}"
        if table.bins is not None:
            missing = "missing as 0, " if rules.missing_bin_as_value else ""
            return f"{missing}floor(log(x)^2) where x > 2, {words}"
        if self.max_rows is not None and rules.modulo:
            modulo = f"{rules.modulo} % {self.max_rows}"
            words = f"{modulo}, {words}" if rules.modulo == "hash" else f"{words}, {modulo}"
        if self.bags and self.bags.size(source) > 1:
            words += f"; a bag of {self.bags.size(source)}: the id and {self.multi_hot_distribution} ones"
        return words

    def weights(self) -> tuple[Column, ...]:
        """Return the columns of weights."""
        return ()

    def wanted_splits(self) -> tuple[SplitName, ...]:
        """Return the splits that must have rows."""
        return SPLITS

    def missing_sources(self) -> dict[str, str]:
        """Return the columns whose missing values are reported, each with its column of segments."""
        return {name: name for name in (*CRITEO_DENSE, *CRITEO_CATEGORICAL)}

    def bag_sizes(self, columns: Sequence[Column]) -> dict[str, float]:
        """Return the ids of a row in each multi-hot column."""
        bags = self.bags
        return {c.name: bags.size(c.name) for c in columns if c.role == "multi_hot"} if bags else {}

    def settings(self, fitted: Fitted) -> dict[str, Any]:
        """Return what shapes the encoding, as the schema keeps it: options, and what is known of integer columns, see
        ``OF_COLUMNS``, as far as the protocol needs it."""
        of_columns = {"minimum": fitted.minimum, "edges": fitted.edges}
        values, sampled, bags = self.document(), self.negative_sampling_rate < 1, self.multi_hot is not None
        shaping = {
            "max_rows": self.max_rows is not None,
            "bins": self.quantiles is not None,
            "min_count": max(self.threshold, self.rules.min_count) > 1,
            "negative_sampling_rate": sampled,
            "multi_hot": bags,
            "multi_hot_distribution": bags,
            "seed": bags or sampled or self.protocol == "bars",
        }
        kept = {name: values[name] for name, shapes in shaping.items() if shapes}
        return kept | {name: dict(values) for name, values in of_columns.items() if values}

    def document(self) -> dict[str, Any]:
        """Return all options as JSON values."""
        return {**asdict(self), "min_count": self.threshold, "bins": self.quantiles}


def options_of(
    schema: DatasetSchema | None,
    vocabulary: Folder | None,
    *,
    dataset: Dataset | None,
    protocol: str | None,
    **others: Any,
) -> tuple[Options, Fitted]:
    """Return the options, and what the dataset whose vocabulary is used was fitted to.

    With a vocabulary, its dataset decides about every option except ``on_bad_row``.

    Raises:
        UserError: an option is out of range, missing, or contradicts the vocabulary.
    """
    if schema is None or vocabulary is None:
        for name, wanted, choices in (("dataset", dataset, DATASETS), ("protocol", protocol, PROTOCOLS)):
            require(
                wanted is not None,
                f"no {name} is given; give --{name}, one of {', '.join(choices)}, or, for your own log, --schema",
            )
        return Options(dataset=dataset, protocol=protocol, **others), Fitted()  # type: ignore[arg-type]
    require(
        schema.protocol in PROTOCOLS and schema.vocabulary,
        f"{vocabulary} has the protocol {schema.protocol!r} and {len(schema.vocabulary)} vocabularies; give a "
        "dataset folder that preprocess made",
    )
    given = {"dataset": dataset, "protocol": protocol, **others}
    known = {"dataset": schema.dataset, "protocol": schema.protocol, **schema.settings}
    default = Options(dataset=schema.dataset, protocol=schema.protocol)  # type: ignore[arg-type]
    for name, value in given.items():
        if name != "on_bad_row" and value is not None and value not in (getattr(default, name), known.get(name)):
            raise UserError(
                f"{name} is {value}, but the vocabulary of {vocabulary} was made with "
                f"{known.get(name, getattr(default, name))}; leave the option out"
            )
    where, advice = vocabulary / SCHEMA_FILE, "give a dataset folder that preprocess made"
    of_columns = parse_json(json.dumps({name: known.pop(name, {}) for name in OF_COLUMNS}), _OfColumns, where, advice)
    known |= {"on_bad_row": others.get("on_bad_row", "fail"), "encoding_of": schema.encoding_fingerprint}
    options = parse_json(json.dumps(known), Options, where, advice)
    needed = {"minimum": options.rules.dense_needs_minimum, "edges": options.quantiles is not None}
    for name, is_needed in needed.items():
        require(
            not is_needed or set(getattr(of_columns, name)) == set(CRITEO_DENSE),
            f"{where} has no {name} of each integer column; {advice}",
        )
    return options, Fitted(minimum=of_columns.minimum, edges=of_columns.edges)
