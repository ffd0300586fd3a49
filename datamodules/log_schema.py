"""The schema of a raw click log: the columns of its files, and the role of each column. Nothing here imports torch.

A YAML file of this form goes to ``preprocess --schema``::

    dataset: avazu
    label: click
    columns:
      hour: {role: leave, time: "%y%m%d%H"}
      C1: {role: categorical}
      price: {role: dense, transform: log1p}
    split: {by: time, column: hour}
"""

import dataclasses
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from lightning_dlrm.contracts.documents import is_name, parse_settings, read_yaml
from lightning_dlrm.contracts.errors import UserError, listed, nearest_first, require
from lightning_dlrm.contracts.schema import CRITEO_LABEL, PREDICTION_COLUMNS, WEIGHTS_SUFFIX
from lightning_dlrm.contracts.shipped import SCHEMAS, shipped_configs, shipped_names, yaml_files_beside

Format = Literal["csv", "parquet", "jsonl"]
ColumnRole = Literal["dense", "categorical", "multi_hot", "keep", "leave"]
Transform = Literal["none", "log1p", "signed_log", "standard", "minmax", "quantile", "log_squared"]
BINS: tuple[Transform, ...] = ("quantile", "log_squared")
"""Transforms that make a category of a number."""
FITTED: tuple[Transform, ...] = ("standard", "minmax", "quantile")
"""Transforms that depend on the counted rows."""
SplitKind = Literal["position", "time", "random", "column", "files"]
Scalar: TypeAlias = bool | int | float | str

LABEL = CRITEO_LABEL
"""Name of the label in the dataset, whatever the log calls it."""
MOST_BINS = 256
_DEFAULT_BINS: Mapping[str, int] = {"dense": MOST_BINS, "categorical": 30}

_STRICT = {"extra": "forbid"}
_CONDITION = re.compile(r"(?P<column>.+?)\s*(?P<operator>>=|<=|==|!=|>|<)\s*(?P<value>.+)", re.DOTALL)
_NO_CONDITION = re.compile(r"(?P<column>.+?)\s*(?P<operator>=>|=<|<>|=(?!=))\s*(?P<value>.+)", re.DOTALL)
_MEANT = {"=": "==", "=>": ">=", "=<": "<=", "<>": "!="}
_SEPARATORS = (",", ";", "\t", "|", "::")
_EXPECTED = "expected the schema of a click log: keys such as 'label:' and 'columns:' (see docs/own-data.md)"
_KEYS_OF_ROLE: Mapping[str, Collection[str]] = {
    "dense": ("transform", "bins", "fill"),
    "categorical": ("transform", "bins", "min_count", "max_rows", "missing"),
    "multi_hot": ("separator", "weights", "min_count", "max_rows"),
    "keep": ("time",),
    "leave": ("time",),
}
_KEYS_OF_SPLIT: Mapping[str, Collection[str]] = {
    "position": ("ratios",),
    "time": ("column", "ratios"),
    "random": ("ratios", "seed"),
    "column": ("column", "train", "validation", "test", "leave"),
    "files": ("train", "validation", "test"),
}


@dataclass(frozen=True, kw_only=True)
class LogColumn:
    """The role and settings of a column of the log, or of one column of the dataset that is made of it."""

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    role: ColumnRole
    """``keep`` stores the values beside the features, for ``predict`` and AUC by group; ``leave`` ignores the
    column."""
    source: str | None = None
    """The log's column; None for the one with the name of this column."""
    time: str | None = None
    """How a value of ``keep`` or ``leave`` becomes a time: ``unix`` (seconds), ``unix_ms``, ``iso``, or a format of
    strptime; None if it is no time, or is one in the file."""
    transform: Transform | None = None
    """Of a number; for a category one of ``BINS``, or None for the value itself."""
    bins: int | None = None
    """The largest number of quantiles; None for 256 (dense) or 30 (categorical)."""
    fill: float | None = None
    """The number that replaces missing numbers, before the transform; None to keep them missing."""
    min_count: int | None = None
    """Rarer values share one row; None for the ``min_count`` of the schema."""
    max_rows: int | None = None
    """Rows of the table: the most frequent values keep their own; None for the ``max_rows`` of the schema."""
    missing: Literal["own", "rare"] | None = None
    """Whether missing values have their own row or share the row of rare values; None for the schema's ``missing``."""
    separator: str | None = None
    """Between the values of a bag, if it is text; None if it is a list."""
    weights: str | None = None
    """The log's column with the weights of the bag, in the same form as the bag."""

    def __post_init__(self) -> None:
        for name in _given(self, "role", "source"):
            takers = [role for role, names in _KEYS_OF_ROLE.items() if name in names]
            require(name in _KEYS_OF_ROLE[self.role], f"{name} is for {' and '.join(takers)}, not for {self.role}")
        require(
            self.role != "categorical" or self.transform in (None, *BINS),
            f"transform {self.transform} makes no category of a number; expected {' or '.join(BINS)}, or role dense",
        )
        require(self.bins is None or self.transform == "quantile", "bins is for transform quantile")
        require(self.bins is None or 2 <= self.bins <= MOST_BINS, f"bins is {self.bins}, expected 2 to {MOST_BINS}")
        require(self.fill is None or math.isfinite(self.fill), f"fill is {self.fill}, expected a number")
        require(self.separator != "", "separator is empty; leave it out for a column of lists")
        _check_limits(self)
        if self.time is not None and self.time not in ("unix", "unix_ms", "iso"):
            require(
                "%" in self.time, f"time is {self.time!r}; expected unix, unix_ms, iso, or a format such as '%Y-%m-%d'"
            )

    @property
    def quantiles(self) -> int:
        """The largest number of quantiles in force."""
        return self.bins or _DEFAULT_BINS[self.role]


@dataclass(frozen=True, kw_only=True)
class LogSplit:
    """The assignment of rows to the training, validation and test splits."""

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    by: SplitKind
    ratios: tuple[float, ...] = (0.8, 0.1, 0.1)
    """Shares of train, validation and test; they sum to 1, and one may be 0."""
    column: str | None = None
    """The log's column of times or of names of splits."""
    seed: int = 0
    train: tuple[Scalar, ...] = ()
    """Values of the column, or patterns of file names."""
    validation: tuple[Scalar, ...] = ()
    test: tuple[Scalar, ...] = ()
    leave: tuple[Scalar, ...] = ()
    """Values whose rows are left out."""

    def __post_init__(self) -> None:
        taken = _KEYS_OF_SPLIT[self.by]
        for name in _given(self, "by"):
            require(name in taken, f"{name} is not for a split by {self.by}, which takes {', '.join(taken)}")
        require("column" not in taken or self.column, f"column is missing; a split by {self.by} needs it")
        shares = ", ".join(map(str, self.ratios))
        require(
            len(self.ratios) == 3 and min(self.ratios) >= 0 and abs(sum(self.ratios) - 1) < 1e-6 and self.ratios[0],
            f"ratios are {shares}; expected shares of train, validation and test that sum to 1",
        )
        require(0 <= self.seed < 2**63, f"seed is {self.seed}; expected 0 to 2**63 - 1")
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


@dataclass(frozen=True, kw_only=True)
class Label:
    """The label of a row: a column of 0 and 1 (false and true), or a condition on a column."""

    column: str
    operator: str | None = None
    value: str = ""


@dataclass(frozen=True, kw_only=True)
class LogSchema:
    """The schema of a raw log."""

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    dataset: str
    label: str
    """A column of 0 and 1 (false and true), or a condition such as ``rating >= 4`` or ``clicked == yes``."""
    columns: Mapping[str, LogColumn]
    """By their names in the dataset, in its order."""
    split: LogSplit
    format: Format | None = None
    """None to infer it from the names of the files."""
    separator: str | None = None
    """Between the fields of CSV, any text; None for a tab in .tsv and a comma in other files."""
    header: bool | None = None
    """Whether the first line of a CSV file has the names; None for true unless ``names`` are given."""
    names: tuple[str, ...] = ()
    """The columns of CSV files without a header."""
    decimal: str = "."
    quote: str | None = '"'
    """Around fields of CSV that hold separators or line ends; None if quotes are ordinary characters."""
    encoding: str = "utf-8"
    nulls: tuple[str, ...] = ("",)
    """Texts that mean a missing value, in text columns of all formats."""
    rest: Literal["error", "leave"] = "error"
    """What to do with columns that the schema does not name: raise an error, or ignore them."""
    min_count: int = 1
    max_rows: int | None = None
    missing: Literal["own", "rare"] = "own"
    """Whether missing values of tables have their own row or share the row of rare values."""
    counts: Literal["train", "all"] = "train"
    """The rows over which vocabularies are counted and transforms are fitted."""

    def __post_init__(self) -> None:
        require(is_name(self.dataset), f"dataset is {self.dataset[:40]!r}; expected a name of up to 200 characters")
        require(self.label.strip(), "label is empty; expected a column, or a condition such as 'rating >= 4'")
        _check_limits(self)
        self._check_text()
        made = self.made
        require(
            any(column.role not in ("keep", "leave") for column in self.columns.values()),
            "columns has no dense, categorical or multi_hot column; a model needs at least one",
        )
        for name in PREDICTION_COLUMNS:
            require(
                name not in self.columns or self.columns[name].role != "keep",
                f"columns: predictions have a column {name} already; choose another name, and give 'source: {name}'",
            )
        for name in made:
            require(
                is_name(name),
                f"columns: {name[:40]!r} cannot name files (1 to 200 characters, no / or control character); choose "
                f"another name, and give 'source: {name[:40]}'",
            )
            require(
                made.count(name) == 1 and name != LABEL,
                f"columns: {name} would occur twice in the dataset (the label is named {LABEL}, weights of X are named "
                f"X{WEIGHTS_SUFFIX}); choose another name, and give 'source: {name}'",
            )

    def _check_text(self) -> None:
        require(
            self.separator is None or self.separator not in ("", "\n", self.quote),
            "separator is empty, a line end or the quote; expected the text between two fields, such as ';'",
        )
        require(self.decimal in (".", ","), f"decimal is {self.decimal!r}; expected '.' or ','")
        require(self.decimal != self.separator, "decimal and separator are the same; expected two characters")
        require(
            self.quote is None or (len(self.quote) == 1 and self.quote.isascii()),
            f"quote is {self.quote!r}; expected one character, or null",
        )
        require(not (self.header and self.names), "header is true and names are given; leave one of them out")
        require(
            self.header is not False or self.names, "header is false; give the columns as 'names: [user, item, ...]'"
        )
        twice = next((name for name in self.names if self.names.count(name) > 1), None)
        require(twice is None, f"names: {twice} occurs twice; expected different names")
        try:
            "".encode(self.encoding)
        except LookupError as error:
            raise UserError(f"encoding is {self.encoding!r}; expected a codec of Python, such as latin-1") from error

    @property
    def made(self) -> list[str]:
        """Names of the dataset's columns, apart from the label."""
        return [
            made
            for name, column in self.columns.items()
            if column.role != "leave"
            for made in (name, *((name + WEIGHTS_SUFFIX,) if column.weights else ()))
        ]

    def label_in(self, names: Collection[str]) -> Label:
        """Return the label, given the log's columns: a column of that name, else a condition."""
        return parse_label(self.label, names)

    def sources(self, names: Collection[str]) -> dict[str, str]:
        """Return the log's columns that the schema names, each with the key that names it.

        Args:
            names: the columns of a file.
        """
        found = {self.label_in(names).column: "label"}
        if self.split.column is not None:
            found.setdefault(self.split.column, "split")
        for name, column in self.columns.items():
            found.setdefault(column.source or name, f"columns: {name}")
            if column.weights is not None:
                found.setdefault(column.weights, f"columns: {name}: weights")
        return found

    def check_columns(self, names: Collection[str], where: str, labelled: bool = True) -> None:
        """Check that a file has the columns that the schema names, and no others unless they may be left.

        Args:
            names: the columns of the file.
            where: the file, for messages.
            labelled: whether the file must have the label, and what it is split by.

        Raises:
            UserError: a column is missing, or is not named.
        """
        sources = self.sources(names)
        self._check_separator(list(names), sources, where)
        for name, key in sources.items():
            if name not in names and (labelled or key not in ("label", "split")):
                raise UserError(
                    f"{where} has no column {name!r}, which the schema names ({key})"
                    f"{nearest_first(name, names, 'its columns are')}"
                )
        label = self.label_in(names).column
        for name, column in self.columns.items():
            made_of = (column.source or name, column.weights)
            require(
                not labelled or column.role in ("keep", "leave") or label not in made_of,
                f"columns: {name} is made of the label's column {label}, so it reveals the label; give it the role "
                f"keep "
                f"or leave{', or other weights' if column.weights == label else ''}",
            )
        others = [name for name in names if name not in sources]
        require(
            self.rest == "leave" or not others,
            f"{where} has columns that the schema does not name: {listed(others)}; name them in columns (role leave "
            f"ignores a column), or set 'rest: leave'",
        )

    def _check_separator(self, names: Sequence[str], sources: Collection[str], where: str) -> None:
        """Refuse a header that another separator would split into columns that the schema names."""
        if len(names) == 1 and names[0] not in sources:
            found = next((one for one in _SEPARATORS if len(set(names[0].split(one)) & set(sources)) > 1), None)
            require(
                found is None,
                f"{where}: the header is one field, {names[0][:80]!r}: is the separator {found!r}? set separator in "
                "the schema",
            )

    def document(self) -> dict[str, Any]:
        """Return the schema as JSON values, without values at their default."""
        return json.loads(json.dumps(_document(self)))


def parse_label(text: str, names: Collection[str]) -> Label:
    """Return the label that a text means, given the log's columns: a column of that name, else a condition.

    Raises:
        UserError: the text has no operator of conditions, or orders by what is not a number.
    """
    condition = _CONDITION.fullmatch(text.strip())
    wrong = None if text in names else _NO_CONDITION.fullmatch(text.strip())
    if wrong and wrong["column"] in names:
        raise UserError(
            f"label {text!r}: a condition needs ==, !=, >=, >, <= or <: write '{wrong['column']} "
            f"{_MEANT[wrong['operator']]} {wrong['value']}'"
        )
    if text in names or condition is None:
        return Label(column=text.strip())
    value = condition["value"].strip()
    if value[0] == value[-1] and value[0] in "'\"" and len(value) > 1:
        value = value[1:-1]
    column, order = condition["column"].strip(), condition["operator"]
    require(
        column not in names or order in ("==", "!=") or _is_number(value),
        f"label {text!r}: {value!r} is not a number, which {order} needs; write a number, or compare by == or !=",
    )
    return Label(column=column, operator=order, value=value)


def _is_number(text: str) -> bool:
    try:
        return "_" not in text and not math.isnan(float(text))
    except ValueError:
        return False


def read_log_schema(path: str | Path) -> LogSchema:
    """Read the schema of a log from a YAML file: the file of this name, else a shipped one.

    Raises:
        UserError: there is none, it cannot be read or is not such a schema.
    """
    found = next((place for place in (Path(path), shipped_configs() / path) if place.is_file()), None)
    if found is None:
        known = [*yaml_files_beside(path), *(name for name in shipped_names() if name.startswith(SCHEMAS))]
        raise UserError(
            f"no schema {path} here{nearest_first(str(path), known, 'schemas here and shipped are')}; preprocess "
            "--infer writes one"
        )
    return log_schema(read_yaml(found, _EXPECTED), str(path))


def log_schema(content: Mapping[str, Any], where: str = "schema") -> LogSchema:
    """Return the schema of a log from the values of its keys.

    Args:
        content: as the YAML file holds them.
        where: the file, for messages.

    Raises:
        UserError: a key is unknown or missing, or a value is of another type or out of range.
    """
    columns = content.get("columns")
    parts: list[tuple[str, Any, type]] = [("", content, LogSchema), ("split: ", content.get("split"), LogSplit)]
    if isinstance(columns, Mapping):
        for name in columns:
            require(
                type(name) in (str, int),
                f"{where}: columns: YAML reads a name as {name!r}, not as text; put it in quotes",
            )
            column = columns[name]
            require(
                isinstance(column, Mapping),
                f"{where}: columns: {name}: found {column!r}; write {name}: "
                f"{{role: {column if column in get_args(ColumnRole) else 'categorical'}}}",
            )
        parts += [(f"columns: {name}: ", column, LogColumn) for name, column in columns.items()]
    for place, values, form in parts:
        known = [one.name for one in dataclasses.fields(form)]
        for key in values if isinstance(values, Mapping) else ():
            if key not in known:
                keys = nearest_first(str(key), known, "known keys are")
                raise UserError(f"{where}: {place}unknown key {key}{keys}")
    return parse_settings(content, LogSchema, where)


def value_text(value: Scalar) -> str:
    """Return a value as the text that it has as a category: ``true``, ``5`` (also of 5.0), ``0.5``, ``x``."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _check_limits(limits: LogColumn | LogSchema) -> None:
    require(limits.min_count is None or limits.min_count >= 1, f"min_count is {limits.min_count}, expected at least 1")
    require(
        limits.max_rows is None or 3 <= limits.max_rows < 2**31,
        f"max_rows is {limits.max_rows}, expected at least 3 (missing, rare and one more), or null for no limit",
    )


def _given(settings: LogColumn | LogSplit, *apart: str) -> list[str]:
    """Return the fields that are not at their default."""
    fields = (one for one in dataclasses.fields(settings) if one.name not in apart)
    return [one.name for one in fields if getattr(settings, one.name) != one.default]


def _document(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _document(item) for name, item in value.items()}
    if not dataclasses.is_dataclass(value):
        return value
    fields = {one.name: (getattr(value, one.name), one.default) for one in dataclasses.fields(value)}
    return {name: _document(item) for name, (item, default) in fields.items() if item != default}
