"""The options of ``preprocess`` that the dataset depends on, and their checks."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from datamodules.folder import Folder, load_schema
from datamodules.preprocess.multi_hot import DISTRIBUTIONS, Distribution, MultiHot
from datamodules.preprocess.protocols import PROTOCOLS, Protocol, find_protocol
from datamodules.preprocess.splits import DATASETS, Dataset
from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.schema import DatasetSchema

OnBadRow = Literal["fail", "skip"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything that the bytes of the dataset depend on, apart from the rows."""

    dataset: Dataset
    protocol: str
    max_rows: int | None = None
    """Rows of the largest table: ``dlrm`` takes hashes modulo it before counting, ``mlperf`` takes ids modulo it; None
    keeps every value."""
    min_count: int | None = None
    """Rarer values share one id; None for the protocol's own threshold."""
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
            0 < self.negative_sampling_rate <= 1,
            f"negative_sampling_rate is {self.negative_sampling_rate}, expected a share of the rows to keep, more "
            "than 0 and at most 1",
        )
        require(0 <= self.seed < 2**63, f"seed is {self.seed}; give a number from 0 to 2**63 - 1")
        require(
            not self.multi_hot or self.dataset == "terabyte",
            "multi_hot mlperf is made of Terabyte's rows; with Kaggle's leave it out",
        )
        require(
            self.multi_hot_distribution == "uniform" or self.multi_hot,
            "multi_hot_distribution is given without multi_hot; give both, or neither",
        )

    @property
    def rules(self) -> Protocol:
        return find_protocol(self.protocol)

    @property
    def threshold(self) -> int:
        """The threshold in force: ``min_count``, or the protocol's own."""
        return self.rules.min_count if self.min_count is None else self.min_count

    @property
    def bags(self) -> MultiHot | None:
        return MultiHot(distribution=self.multi_hot_distribution, seed=self.seed) if self.multi_hot else None

    def settings(self) -> dict[str, Any]:
        """Return the options that shape the encoding, as the schema keeps them."""
        values, sampled, bags = self.document(), self.negative_sampling_rate < 1, self.multi_hot is not None
        shaping = {
            "max_rows": self.max_rows is not None,
            "min_count": max(self.threshold, self.rules.min_count) > 1,
            "negative_sampling_rate": sampled,
            "multi_hot": bags,
            "multi_hot_distribution": bags,
            "seed": bags or sampled or self.protocol == "bars",
        }
        return {name: values[name] for name, shapes in shaping.items() if shapes}

    def document(self) -> dict[str, Any]:
        """Return all options as JSON values."""
        return {**asdict(self), "min_count": self.threshold}


def options_of(
    vocabulary: Folder | None, *, dataset: Dataset | None, protocol: str | None, **others: Any
) -> tuple[Options, DatasetSchema | None]:
    """Return the options, and the schema of the dataset whose vocabulary is used.

    With a vocabulary, its dataset decides about every option except ``on_bad_row``.

    Raises:
        UserError: an option is out of range, missing, or contradicts the vocabulary.
    """
    if vocabulary is None:
        for name, value in (("dataset", dataset), ("protocol", protocol)):
            require(value is not None, f"no {name} is given; give one (--{name})")
        return Options(dataset=dataset, protocol=protocol, **others), None  # type: ignore[arg-type]
    schema = load_schema(vocabulary)
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
    known.pop("minimum", None)
    options = Options(**known, on_bad_row=others.get("on_bad_row", "fail"), encoding_of=schema.encoding_fingerprint)
    return options, schema
