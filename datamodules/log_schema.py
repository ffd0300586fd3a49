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
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from datamodules.log_settings import (
    ColumnRole,
    LogColumn,
    LogSplit,
    Missing,
    MlperfBags,
    SplitKind,
    check_limits,
)
from lightning_dlrm.contracts.documents import is_name, parse_settings, read_yaml
from lightning_dlrm.contracts.errors import UserError, listed, nearest, nearest_first, require
from lightning_dlrm.contracts.schema import (
    CRITEO_CATEGORICAL,
    CRITEO_DENSE,
    CRITEO_LABEL,
    PREDICTION_COLUMNS,
    WEIGHTS_SUFFIX,
)
from lightning_dlrm.contracts.shipped import SCHEMAS, shipped_configs, shipped_names, yaml_files_beside

Format = Literal["csv", "parquet", "jsonl", "criteo"]

LABEL = CRITEO_LABEL
"""Name of the label in the dataset, for any name in the log."""

_CONDITION = re.compile(r"(?P<column>.+?)\s*(?P<operator>>=|<=|==|!=|>|<)\s*(?P<value>.+)", re.DOTALL)
_NO_CONDITION = re.compile(r"(?P<column>.+?)\s*(?P<operator>=>|=<|<>|=(?!=))\s*(?P<value>.+)", re.DOTALL)
_MEANT = {"=": "==", "=>": ">=", "=<": "<=", "<>": "!="}
_TO_WRITE = {
    "dataset": "a name of your choice: 'dataset: ads'",
    "label": "what the model predicts: a column of 0 and 1, such as 'label: clicked', or a condition, such as "
    "'label: rating >= 4'",
    "columns": "the role of each column: 'columns: {user: {role: categorical}, price: {role: dense}}'",
    "split": "how rows are split: 'split: {by: random}', or 'split: {by: time, column: time}'",
    "by": f"one of {', '.join(get_args(SplitKind))}: 'split: {{by: random}}'",
    "role": f"one of {', '.join(get_args(ColumnRole))}: '{{role: categorical}}'",
}
"""Key of a schema that cannot be left out, and what to write."""
_EXPECTED = "expected the schema of a click log: keys such as 'label:' and 'columns:' (see docs/own-data.md)"


@dataclass(frozen=True, kw_only=True)
class Label:
    """The label of a row: a column of 0 and 1 (false and true), or a condition on a column."""

    column: str
    operator: str | None = None
    value: str = ""


@dataclass(frozen=True, kw_only=True)
class LogSchema:
    """The schema of a raw log."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    dataset: str
    label: str
    """A column of 0 and 1 (false and true), or a condition such as ``rating >= 4`` or ``clicked == yes``."""
    columns: Mapping[str, LogColumn]
    """By their names in the dataset, in its order."""
    split: LogSplit
    format: Format | None = None
    """None to find it in the content of the files; ``criteo`` is the text of Criteo's logs, without a header."""
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
    missing: Missing = "own"
    """Whether missing values of tables have their own row, share the row of rare values, or count as the value 0."""
    unknown: Literal["rare", "reserved", "own", "none"] = "rare"
    """The row of values that the vocabulary does not have.

    ``rare``: the row of rare values. If no training row has a rare value, rare and unknown values get the last row,
    which belongs to the rarest value; if no training row has a missing value, missing values get the row of rare
    values. So each of these rows is trained. ``reserved``: the row of rare values, even if it is not trained. ``own``:
    a row of their own, which is never trained. ``none``: the row of rare values if ``min_count`` or ``max_rows`` makes
    values rare; else no row is reserved, and unknown values get the last row, which belongs to the rarest value."""
    list_rare: bool = False
    """Whether the vocabulary lists rare values, so that rare and unknown values of new rows can be told apart."""
    hash_modulo: int | None = None
    """Hashes are taken modulo this number before they are counted."""
    id_modulo: int | None = None
    """Ids are taken modulo this number after values are counted."""
    mlperf_bags: MlperfBags | None = None
    """Bags that are made of single ids; None to keep single ids."""
    counts: Literal["train", "all"] = "train"
    """The rows over which vocabularies are counted and transforms are fitted."""

    def __post_init__(self) -> None:
        require(is_name(self.dataset), f"dataset is {self.dataset[:40]!r}; expected a name of up to 200 characters")
        require(self.label.strip(), "label is empty; expected a column, or a condition such as 'rating >= 4'")
        check_limits(self.min_count, self.max_rows)
        self._check_text()
        self._check_tables()
        if self.format == "criteo":
            self._check_criteo()
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

    def _check_tables(self) -> None:
        """Check settings of tables that depend on each other."""
        for name in ("hash_modulo", "id_modulo"):
            modulo = getattr(self, name)
            require(modulo is None or modulo >= 1, f"{name} is {modulo}, expected at least 1")
        tables = [column for column in self.columns.values() if column.role == "categorical"]
        forms = {column.form for column in tables}
        require(self.hash_modulo is None or "hash" in forms, "hash_modulo is for columns of type hash; there are none")
        plain = self.unknown == "none" and all(self.missing_of(column) == "zero" for column in tables)
        require(
            self.id_modulo is None or plain,
            "id_modulo needs 'unknown: none', and 'missing: zero' of every categorical column: set both, or leave "
            "id_modulo out",
        )
        require(
            not self.list_rare or self.unknown != "none",
            "list_rare is true, and 'unknown: none' keeps no row for rare values: set unknown to another value, or "
            "leave list_rare out",
        )
        require(
            self.mlperf_bags is None or self.format == "criteo", "mlperf_bags is for format criteo alone; leave it out"
        )

    def _check_criteo(self) -> None:
        """Check that the schema asks only for what Criteo's text has."""
        require(self.label == CRITEO_LABEL, f"label is {self.label!r}; of format criteo it is {CRITEO_LABEL!r}")
        others = {"separator", "header", "names", "decimal", "quote", "encoding", "nulls"}.intersection(_document(self))
        require(not others, f"{', '.join(sorted(others))} is for other formats than criteo; leave it out")
        require(
            self.split.column is None,
            "format criteo has no column to split by; split by days, files, position, random or tenths",
        )
        for name, column in self.columns.items():
            source = column.source or name
            form = "number" if source in CRITEO_DENSE else "hash" if source in CRITEO_CATEGORICAL else None
            require(form, f"columns: {name}: format criteo has no column {source}; it has I1 to I13 and C1 to C26")
            as_form = "role dense, or a transform" if form == "number" else "role categorical and type hash"
            require(
                column.role == "leave" or (column.role in ("dense", "categorical") and column.form == form),
                f"columns: {name}: {source} of format criteo is a {form}; give it {as_form}, or role leave",
            )

    def missing_of(self, column: LogColumn) -> Missing:
        """Return ``missing`` of a column."""
        return column.missing or self.missing

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
        """Check that a file has the columns that the schema names, and no others unless ``rest`` is ``leave``.

        Args:
            names: the columns of the file.
            where: the file, for messages.
            labelled: whether the file must have the label, and what it is split by.

        Raises:
            UserError: the file lacks a column, or has a column that the schema does not name.
        """
        sources = self.sources(names)
        for name, key in sources.items():
            if name not in names and (labelled or key not in ("label", "split")):
                raise UserError(
                    f"{where} has no column {name!r}, which the schema names ({key})"
                    f"{no_header(names) or nearest_first(name, names, 'its columns are')}"
                    f"{'; for rows without labels use --vocabulary DIR' if key == 'label' else ''}"
                )
        label = self.label_in(names).column
        for name, column in self.columns.items():
            made_of = (column.source or name, column.weights)
            require(
                not labelled or column.role in ("keep", "leave") or label not in made_of,
                f"columns: {name} is made of the label's column {label}, so it reveals the label; give it the role "
                f"keep or leave{', or other weights' if column.weights == label else ''}",
            )
        others = [name for name in names if name not in sources]
        require(
            self.rest == "leave" or not others,
            f"{where} has columns that the schema does not name: {listed(others)}; name them in columns (role leave "
            "ignores a column), or set 'rest: leave'",
        )

    def document(self) -> dict[str, Any]:
        """Return the schema as JSON values, without values at their default."""
        return json.loads(json.dumps(_document(self)))


def no_header(names: Collection[str]) -> str:
    """Return a remedy if names of columns look like values, so that the file seems to have no header."""
    if not seem_values(names):
        return ""
    return (
        f"; its first line looks like values ({listed(list(map(repr, names))[:4])}, ...): if the file has no header, "
        f"give the columns as names: [...] in the schema{if_criteo(names)}"
    )


def seem_values(names: Collection[str]) -> bool:
    """Return whether a third of some names of columns look like values."""
    values = [name for name in names if not name or name.replace(".", "", 1).removeprefix("-").isdecimal()]
    return len(values) * 3 >= len(names)


def if_criteo(fields: Collection[str]) -> str:
    """Return a remedy for fields that are as many as Criteo's."""
    if len(fields) != 1 + len(CRITEO_DENSE) + len(CRITEO_CATEGORICAL):
        return ""
    return "; Criteo's raw text needs no schema of your own: give --dataset and --protocol"


def parse_label(text: str, names: Collection[str]) -> Label:
    """Return the label that a text means, given the log's columns: a column of that name, else a condition.

    Raises:
        UserError: the text has a wrong operator, or compares by order with a value that is not a number.
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
        UserError: there is no such file, it cannot be read, or it is not the schema of a log.
    """
    found = next((place for place in (Path(path), shipped_configs() / path) if place.is_file()), None)
    if found is None:
        beside = [name for name in yaml_files_beside(path) if _is_schema(Path(name))]
        known = [*beside, *(name for name in shipped_names() if name.startswith(SCHEMAS))]
        what = f"{path} is a folder, not a schema" if Path(path).is_dir() else f"no schema {path} here"
        hint = nearest(str(path), known, cutoff=0.8) or f"; schemas here and shipped are {listed(known, most=40)};"
        raise UserError(f"{what}{hint} 'preprocess --infer' writes one")
    return log_schema(read_yaml(found, _EXPECTED), str(path))


def _is_schema(path: Path) -> bool:
    """Whether a YAML file has the keys of a schema."""
    return re.search(r"(?m)^label:", path.read_text(errors="replace")) is not None


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
        for key, words in _TO_WRITE.items() if isinstance(values, Mapping) else ():
            require(key not in known or values.get(key) is not None, f"{where}: {place}{key} is missing; write {words}")
    return parse_settings(content, LogSchema, where)


def _document(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _document(item) for name, item in value.items()}
    if not dataclasses.is_dataclass(value):
        return value
    fields = {one.name: (getattr(value, one.name), one.default) for one in dataclasses.fields(value)}
    return {name: _document(item) for name, (item, default) in fields.items() if item != default}
