"""The schema of a dataset folder: columns, splits, files and fingerprints.

Imports no torch, so that preprocessing and planning start fast; what checks a file is imported when one is read.

A dataset folder looks like this::

    dataset.json                      the DatasetSchema
    vocabulary/C1.parquet ...         a file for each categorical column with a vocabulary
    train/part-00000.parquet ...      Parquet parts: one column per feature
    validation/  test/                likewise; a split may be missing

Part files store the label as int8, dense columns as float32, categorical columns as int32 row ids
of their table, multi-hot columns as list<int32>, and weights columns as list<float32>: a multi-hot
column ``X`` may have a column ``X_weights``, which holds a per-sample weight for each of its ids.
Kept columns (role ``keep``) are not features: raw values such as users and times, stored beside the features in a type
of ``KeptType``.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from lightning_dlrm.contracts.documents import is_inner_path, is_name, parse_json, read_bounded
from lightning_dlrm.contracts.errors import UserError, listed, nearest_path, one_line, require

FORMAT_VERSION = 1
SCHEMA_FILE = "dataset.json"

Role = Literal["label", "dense", "categorical", "multi_hot", "weights", "keep"]
ROLE_NAMES: Mapping[str, str] = {
    "label": "label", "dense": "dense", "categorical": "categorical", "multi_hot": "multi-hot", "weights": "weights",
    "keep": "kept",
}  # fmt: skip
"""Role of a column -> its name in sentences."""
ROLE_MEANINGS: Mapping[str, str] = {
    "dense": "numbers",
    "categorical": "ids or names, with a table of embeddings",
    "multi_hot": "several ids a row, with a table of embeddings",
    "keep": "not features, stored beside them",
    "leave": "ignored",
}
"""Role of a column of a log -> what it means."""
KeptType = Literal["text", "int64", "float64", "bool", "timestamp"]
"""Types of kept columns; timestamps count microseconds."""
SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
WEIGHTS_SUFFIX = "_weights"
"""Suffix of the name of a weights column, after the name of its multi-hot column."""

LARGE_NUMBERS = "large_numbers"
"""Key of ``DatasetSchema.report``: dense columns whose numbers are too large for some models."""

PREDICTION_COLUMNS = ("split", "row", "label", "probability")
"""Columns of predictions, which kept columns may not be named after."""

# The columns of the Criteo click logs, in the order of their raw files.
CRITEO_LABEL = "label"
CRITEO_DENSE = tuple(f"I{i}" for i in range(1, 14))
CRITEO_CATEGORICAL = tuple(f"C{i}" for i in range(1, 27))


_NO_OTHER_KEYS = {"extra": "forbid"}
"""Configuration of pydantic for classes of which a file may not have further keys."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One feature (or the label) of a dataset."""

    __pydantic_config__: ClassVar[dict[str, str]] = _NO_OTHER_KEYS

    name: str
    role: Role
    cardinality: int = 0
    """Rows of the column's table, reserved ids included; 0 for columns without a table."""
    transform: str = ""
    """Description of how preprocessing changed the raw values; the ``KeptType`` of a kept column."""
    reserved: Mapping[str, int] = field(default_factory=dict)
    """Meaning -> id of the reserved ids: ``missing``, ``rare``, ``unknown``; empty if there are none."""


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """One file of a dataset folder."""

    __pydantic_config__: ClassVar[dict[str, str]] = _NO_OTHER_KEYS

    path: str
    """Relative to the dataset folder, with forward slashes."""
    sha256: str
    bytes: int
    row_groups: tuple[int, ...] = ()
    """Rows of each Parquet row group, in order."""

    def __post_init__(self) -> None:
        require(is_inner_path(self.path), f"the path {self.path!r} leads out of its folder")
        require(
            self.bytes >= 0 and min(self.row_groups, default=0) >= 0,
            f"{self.path} has a negative size or number of rows",
        )

    @property
    def rows(self) -> int:
        return sum(self.row_groups)


@dataclass(frozen=True, kw_only=True)
class Split:
    """The rows of one split, in order, and the files that hold them."""

    __pydantic_config__: ClassVar[dict[str, str]] = _NO_OTHER_KEYS

    rows: int
    positives: int | None = None
    """Rows whose label is 1; None if the rows have no labels or are not counted yet."""
    files: tuple[DataFile, ...] = ()

    def __post_init__(self) -> None:
        require(
            0 <= (self.positives or 0) <= self.rows,
            f"a split has {self.rows} rows, {self.positives} of them with label 1",
        )


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The best expected scores on a split: those of the true probabilities, known for generated data only."""

    __pydantic_config__: ClassVar[dict[str, str]] = _NO_OTHER_KEYS

    auc: float
    log_loss: float
    """In nats per sample."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """The part of a schema that shapes a model: how many dense inputs and which tables."""

    dense: int
    tables: Mapping[str, int]
    """Table name -> rows, in the order of the ids of a batch."""
    dense_names: tuple[str, ...] = ()
    """Names of the dense inputs; empty if they are not known."""

    @property
    def table_rows(self) -> tuple[int, ...]:
        return tuple(self.tables.values())


@dataclass(frozen=True, kw_only=True)
class DatasetSchema:
    """Description of a dataset without its rows, stored as ``dataset.json``."""

    dataset: str
    """``kaggle``, ``terabyte``, ``demo`` or a name that the user gave."""
    protocol: str
    """Name of the rules that turn raw values into features; scores of different protocols cannot be compared."""
    columns: tuple[Column, ...]
    splits: Mapping[str, Split]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The options that shape the encoding (JSON values), such as ``max_rows``."""
    vocabulary: Mapping[str, DataFile] = field(default_factory=dict)
    """Column name -> its vocabulary file."""
    optimum: Mapping[str, Optimum] = field(default_factory=dict)
    """Split name -> the best expected scores; empty for real data."""
    indices: Mapping[str, float] = field(default_factory=dict)
    """Multi-hot column -> mean number of ids in a sample's bag, for plans; empty if it is not known."""
    cells: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)
    """Split name -> table -> number of values that are ``missing``, ``rare`` or ``unknown``, and for multi-hot columns
    of all ``values``; empty if not counted."""
    report: Mapping[str, Any] = field(default_factory=dict)
    """Counts of preprocessing (JSON values), for readers only."""

    def __post_init__(self) -> None:
        names = [column.name for column in self.columns]
        for name in (self.dataset, self.protocol, *names):
            require(
                is_name(name), f"{name[:40]!r} is not a name: expected 1 to 200 characters, none of them / or control"
            )
        require(names, "there are no columns")
        require(len(set(names)) == len(names), f"column names must differ; got {names}")
        for column in self.columns:
            require(
                column.role in get_args(Role),
                f"column {column.name}: role {column.role!r} is not one of {get_args(Role)}",
            )
            require(
                column.cardinality < 2**31 and all(0 <= row < column.cardinality for row in column.reserved.values()),
                f"column {column.name}: its table has {column.cardinality} rows and the reserved ids "
                f"{dict(column.reserved)}; ids are below the number of rows, which is below 2**31",
            )
            require(
                column.role != "keep" or column.transform in get_args(KeptType),
                f"column {column.name} (keep): transform {column.transform!r} is not one of "
                f"{', '.join(get_args(KeptType))}",
            )
            require(
                column.role != "keep" or column.name not in PREDICTION_COLUMNS,
                f"column {column.name} (keep): predictions have a column of this name; choose another one",
            )
            has_table = column.role in ("categorical", "multi_hot")
            require(
                has_table == (column.cardinality > 0),
                f"column {column.name} ({column.role}): cardinality {column.cardinality}; "
                "categorical and multi-hot columns need at least 1, others 0",
            )
        bags = {column.name + WEIGHTS_SUFFIX for column in self.by_role("multi_hot")}
        for column in self.by_role("weights"):
            require(
                column.name in bags,
                f"column {column.name} (weights) does not belong to a multi-hot column; expected one of "
                f"{sorted(bags)}: a multi-hot column's name and {WEIGHTS_SUFFIX}",
            )
        for name, split in self.splits.items():
            require(name in SPLITS, f"split {name!r} is not one of {', '.join(SPLITS)}")
            require(
                not split.files or sum(file.rows for file in split.files) == split.rows,
                f"split {name}: its files hold {sum(f.rows for f in split.files)} rows, the schema says {split.rows}",
            )

    @property
    def large_numbers(self) -> str:
        """The dense columns with large numbers that preprocessing found, such as ``price (up to 12,000)``; empty if
        there are none."""
        found = self.report.get(LARGE_NUMBERS)
        known = found.items() if isinstance(found, Mapping) else ()
        return ", ".join(f"{name} (up to {most:,.6g})" for name, most in known if isinstance(most, float))

    def by_role(self, *roles: Role) -> tuple[Column, ...]:
        """Return the columns of some roles, in the order of the schema."""
        return tuple(column for column in self.columns if column.role in roles)

    def cell_shares(self, split: str) -> dict[str, float]:
        """Return the shares of the ids of a split that stand for ``unknown``, ``rare`` and ``missing`` values; empty if
        they are not counted."""
        tables = self.cells.get(split, {})
        values = sum(self.counted_values(split, table) for table in tables)
        return {
            kind: sum(counts.get(kind, 0) for counts in tables.values()) / values
            for kind in (("unknown", "rare", "missing") if values else ())
        }

    def counted_values(self, split: str, table: str) -> int:
        """Return the number of values of a table in a split over which its ``cells`` are counted."""
        return self.cells[split][table].get("values", self.splits[split].rows)

    @cached_property
    def features(self) -> Features:
        """Dense inputs and tables, as a model needs them."""
        tables = self.by_role("categorical", "multi_hot")
        dense = tuple(column.name for column in self.by_role("dense"))
        return Features(dense=len(dense), tables={c.name: c.cardinality for c in tables}, dense_names=dense)

    @cached_property
    def encoding_fingerprint(self) -> str:
        """Fingerprint of the meaning of a model's inputs: columns, transforms, settings, vocabulary.

        A model may score all rows that are encoded in the same way, so rows, files, kept columns and the presence of
        labels do not change it.
        """
        label = () if self.by_role("label") else (Column(name=CRITEO_LABEL, role="label"),)
        return _fingerprint(
            {
                "protocol": self.protocol,
                "columns": [dataclasses.asdict(c) for c in (*label, *self.columns) if c.role != "keep"],
                "settings": dict(self.settings),
                "vocabulary": {name: file.sha256 for name, file in self.vocabulary.items()},
            }
        )

    @cached_property
    def data_fingerprint(self) -> str:
        """Fingerprint of the rows and their order, which resumed runs and comparisons check."""
        return _fingerprint(
            {
                "encoding": self.encoding_fingerprint,
                "splits": {
                    name: {"rows": split.rows, "files": [[f.sha256, list(f.row_groups)] for f in split.files]}
                    for name, split in self.splits.items()
                },
            }
        )

    def save(self, folder: Path) -> None:
        """Write ``folder/dataset.json``, the last file of a finished dataset, atomically."""
        partial = folder / f".{SCHEMA_FILE}.partial"
        partial.write_text(self.to_json())
        partial.replace(folder / SCHEMA_FILE)

    @classmethod
    def load(cls, folder: Path) -> "DatasetSchema":
        """Read ``folder/dataset.json``.

        Raises:
            UserError: the folder or file does not exist or cannot be read, the file is not a schema of this version,
                or it was altered after it was written.
        """
        folder = Path(folder)
        path = folder / SCHEMA_FILE
        try:
            require(not folder.is_file(), f"{folder} is a file; give the dataset folder that holds {SCHEMA_FILE}")
            if not folder.is_dir():
                make = (
                    f": expected a folder with {SCHEMA_FILE}; make one with 'python -m lightning_dlrm preprocess', or "
                    "one of demo data with 'python -m lightning_dlrm generate demo'"
                )
                raise UserError(f"no dataset folder at {folder}{nearest_path(folder) or make}")
            if not path.is_file():
                raise UserError(f"{folder} is not a dataset folder: it has no {SCHEMA_FILE}{_what_to_give(folder)}")
            text = read_bounded(path, "check the path and its permissions")
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror or error}); check the path and its permissions"
            ) from error
        return cls.from_json(text, str(path))

    def to_json(self) -> str:
        """Return the content of ``dataset.json``."""
        document = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        document["fingerprints"] = {"encoding": self.encoding_fingerprint, "data": self.data_fingerprint}
        return json.dumps(document, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "DatasetSchema":
        """Return the schema of the content of a ``dataset.json``.

        Args:
            text: content of the file.
            where: path or URL of the file, for messages.

        Raises:
            UserError: the content is not a schema of this version, or it was altered after it was written.
        """
        advice = "restore it or preprocess the data again"
        version = parse_json(text, _Version, where, advice).format_version
        require(
            version == FORMAT_VERSION,
            f"{where} has format version {version}; this release reads {FORMAT_VERSION}: "
            "preprocess the data again, or use the release that wrote it",
        )
        stored = parse_json(text, _Document, where, advice)
        schema = cls(**{field.name: getattr(stored, field.name) for field in dataclasses.fields(cls)})
        try:
            found = {"encoding": schema.encoding_fingerprint, "data": schema.data_fingerprint}
        except ValueError as error:
            raise UserError(f"{where} is damaged or was changed ({one_line(error)}); {advice}") from error
        require(
            stored.fingerprints == found,
            f"{where} was altered after it was written (fingerprints differ); restore it or preprocess again",
        )
        return schema


@dataclass(frozen=True, kw_only=True)
class _Version:
    format_version: int


@dataclass(frozen=True, kw_only=True)
class _Document(DatasetSchema):
    """The content of ``dataset.json``. A later version may have other keys; a file of this one may not."""

    __pydantic_config__: ClassVar[dict[str, str]] = _NO_OTHER_KEYS

    format_version: int
    fingerprints: Mapping[str, str]


def _what_to_give(folder: Path) -> str:
    """Return what to give in place of a folder without a schema: a dataset folder in it, or a new one."""
    inside = sorted(str(one.parent) for one in (*folder.glob(f"*/{SCHEMA_FILE}"), *folder.glob(f"*/*/{SCHEMA_FILE}")))
    if inside:
        return f"; dataset folders in it: {listed(inside)}"
    if any(folder.iterdir()):
        return "; give a folder that preprocess or generate has finished"
    return f"; make it with 'python -m lightning_dlrm preprocess --output {folder}'"


def file_sha256(path: Path) -> str:
    """Return the checksum of a file's bytes, as hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def criteo_columns(
    cardinalities: Mapping[str, int] | tuple[int, ...],
    transform: str,
    reserved: Mapping[str, Mapping[str, int]] | None = None,
) -> tuple[Column, ...]:
    """Return the 40 columns of Criteo's click logs: ``label``, ``I1..I13``, ``C1..C26``.

    Args:
        cardinalities: rows of each categorical column's table, by name or in order.
        transform: description of what preprocessing did to the dense columns.
        reserved: reserved ids of each categorical column: see ``Column.reserved``.
    """
    if not isinstance(cardinalities, Mapping):
        cardinalities = dict(zip(CRITEO_CATEGORICAL, cardinalities, strict=True))
    reserved = reserved or {}
    return (
        Column(name=CRITEO_LABEL, role="label"),
        *(Column(name=name, role="dense", transform=transform) for name in CRITEO_DENSE),
        *(
            Column(
                name=name, role="categorical", cardinality=cardinalities[name], reserved=dict(reserved.get(name, {}))
            )
            for name in CRITEO_CATEGORICAL
        ),
    )


def _fingerprint(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
