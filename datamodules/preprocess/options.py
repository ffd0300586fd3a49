"""The options of ``preprocess`` that say in short which schema Criteo's files have."""

from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal, get_args

from datamodules.log_schema import LogSchema
from datamodules.log_settings import LogColumn, LogSplit, MlperfBags
from datamodules.preprocess.protocols import DATASETS, PROTOCOLS, Dataset
from lightning_dlrm.contracts.documents import read_yaml
from lightning_dlrm.contracts.errors import UserError, nearest_first, require
from lightning_dlrm.contracts.shipped import SCHEMAS, shipped_configs

Distribution = Literal["uniform", "pareto"]
OnBadRow = Literal["fail", "skip"]
DISTRIBUTIONS: tuple[Distribution, ...] = get_args(Distribution)


@dataclass(frozen=True, kw_only=True)
class Options:
    """A dataset and a protocol of Criteo, and what differs from the protocol's schema."""

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
    """The seed of random splits, of sampling and of multi-hot bags; 0 to 2**63 - 1."""

    def __post_init__(self) -> None:
        known = {
            "dataset": DATASETS,
            "protocol": tuple(PROTOCOLS),
            "multi_hot": (None, "mlperf"),
            "multi_hot_distribution": DISTRIBUTIONS,
        }
        for name, values in known.items():
            found = getattr(self, name)
            suggestion = nearest_first(str(found), filter(None, values), "known:")
            require(found in values, f"unknown {name} {found!r}{suggestion}")
        require(
            self.max_rows is None or self.max_rows >= 1,
            f"max_rows is {self.max_rows}, expected at least 1; leave it out to keep every value",
        )
        if self.max_rows is not None and PROTOCOLS[self.protocol].modulo is None:
            takers = " and ".join(name for name, other in PROTOCOLS.items() if other.modulo)
            raise UserError(
                f"protocol {self.protocol} has no max_rows, unlike {takers}; use min_count to shrink tables"
            )
        require(
            not self.multi_hot or self.dataset == "terabyte",
            "multi_hot mlperf is made only of Terabyte's rows; leave it out for Kaggle",
        )
        require(
            self.multi_hot_distribution == "uniform" or self.multi_hot,
            "multi_hot_distribution is given without multi_hot; give both, or neither",
        )
        quantiles = _quantiles(self.schema())
        require(
            self.bins is None or quantiles is not None,
            f"protocol {self.protocol} has no quantile bins; leave bins out, or choose the protocol quantile",
        )

    def schema(self) -> LogSchema:
        """Return the protocol's schema with these options.

        Raises:
            UserError: an option is out of range.
        """
        schema, modulo = _schema_of(self.protocol), PROTOCOLS[self.protocol].modulo
        columns, split = dict(schema.columns), schema.split
        for name, column in columns.items():
            if column.transform == "quantile" and self.bins is not None:
                columns[name] = replace(column, bins=self.bins)
        bags = MlperfBags(distribution=self.multi_hot_distribution, seed=self.seed)
        if split.by == "days":
            split = replace(split, days="files" if self.dataset == "terabyte" else "position")
        if split.by == "tenths" or self.negative_sampling_rate != 1:
            split = replace(split, seed=self.seed, negative_sampling_rate=self.negative_sampling_rate)
        return replace(
            schema,
            dataset=self.dataset,
            columns=columns,
            split=split,
            min_count=schema.min_count if self.min_count is None else self.min_count,
            mlperf_bags=bags if self.multi_hot else None,
            hash_modulo=self.max_rows if modulo == "hash" else None,
            id_modulo=self.max_rows if modulo == "id" else None,
        )

    def settings(self) -> dict[str, Any]:
        """Return what shapes the encoding, as the schema of the dataset keeps it."""
        values, sampled, bags = self.document(), self.negative_sampling_rate < 1, self.multi_hot is not None
        shaping = {
            "max_rows": self.max_rows is not None,
            "bins": values["bins"] is not None,
            "min_count": max(values["min_count"], _schema_of(self.protocol).min_count) > 1,
            "negative_sampling_rate": sampled,
            "multi_hot": bags,
            "multi_hot_distribution": bags,
            "seed": bags or sampled or _schema_of(self.protocol).split.by == "tenths",
        }
        return {name: values[name] for name, shapes in shaping.items() if shapes}

    def document(self) -> dict[str, Any]:
        """Return all options as JSON values."""
        schema = self.schema()
        return {**asdict(self), "min_count": schema.min_count, "bins": _quantiles(schema)}


def _quantiles(schema: LogSchema) -> int | None:
    """Return the largest number of quantile bins; None if there are none."""
    return next((column.quantiles for column in schema.columns.values() if column.transform == "quantile"), None)


def split_of_protocol(protocol: str) -> LogSplit:
    """Return the split of a protocol's schema."""
    return _schema_of(protocol).split


@lru_cache
def _schema_of(protocol: str) -> LogSchema:
    given = read_yaml(shipped_configs() / SCHEMAS / f"criteo_{protocol}.yaml")
    # Without read_log_schema: it imports pydantic, which takes a tenth of a second, and a shipped file needs no check.
    given["columns"] = {name: LogColumn(**column) for name, column in given["columns"].items()}
    split = LogSplit(**given["split"])
    return LogSchema(**{**given, "split": replace(split, held_out=(split.held_out[0], split.held_out[1]))})
