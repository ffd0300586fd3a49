"""The encoding of a click log by its schema: the columns of the dataset, and the split."""

import fnmatch
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate
from typing import Any, get_args

import numpy as np

from datamodules.folder import Folder
from datamodules.log_schema import LogSchema, log_schema
from datamodules.log_settings import LogColumn, Transform, value_text
from datamodules.preprocess.multi_hot import MLPERF_SIZES, mlperf_bags
from datamodules.preprocess.options import OnBadRow, Options
from datamodules.preprocess.progress import CRITEO_ROW_BYTES
from datamodules.preprocess.protocols import PROTOCOLS
from datamodules.preprocess.sources import RawFile
from datamodules.preprocess.splits import Span, SplitRule, spans_of_days
from datamodules.preprocess.staging import StagedRows
from datamodules.preprocess.table_encoding import Fitted, Table
from datamodules.preprocess.transforms import (
    log_above_minimum,
    log_of_positive_part,
    log_plus_three,
    log_squared,
    quantile_ranks,
    scaled,
    signed_log,
    values_at_ranks,
)
from datamodules.values import staged_name
from lightning_dlrm.contracts.documents import parse_json
from lightning_dlrm.contracts.errors import require
from lightning_dlrm.contracts.schema import SCHEMA_FILE, SPLITS, WEIGHTS_SUFFIX, Column, DatasetSchema, SplitName

SCHEMA_PROTOCOL = "schema"
"""Name of the protocol of datasets that are made by a schema which the user gives."""

_FITTED = tuple(one.name for one in fields(Fitted))
_ADVICE = "give a dataset folder that preprocess made"
_LOG_SQUARED = "floor(log(x)^2) where x > 2"
_DESCRIPTIONS: Mapping[Transform, str] = {
    "none": "as it is, missing as {missing}",
    "log1p": "log(max(x, 0) + 1), missing as {missing}",
    "signed_log": "sign(x) * log(|x| + 1), missing as {missing}",
    "log_above_minimum": "log(x - ({minimum}) + 2), missing as {missing}, below the minimum as the minimum",
    "log_plus_three": "log(x + 3), 0 where missing or below -2",
    "standard": "(x - mean) / standard deviation, of {rows}, missing as {missing}",
    "minmax": "(x - minimum) / (maximum - minimum), of {rows}, missing as {missing}",
    "quantile": "rank in 0..1 by up to {bins} quantiles of {rows}, missing as {missing}",
    "log_squared": f"{_LOG_SQUARED}, missing as {{missing}}",
}
_TRANSFORMS: Mapping[Transform, Callable[[np.ndarray, Fitted, str], np.ndarray]] = {
    "none": lambda values, fitted, name: values,
    "log1p": lambda values, fitted, name: log_of_positive_part(values),
    "signed_log": lambda values, fitted, name: signed_log(values),
    "log_above_minimum": lambda values, fitted, name: log_above_minimum(values, fitted.minimum[name]),
    "log_plus_three": lambda values, fitted, name: log_plus_three(values),
    "standard": lambda values, fitted, name: scaled(values, *fitted.scales[name]),
    "minmax": lambda values, fitted, name: scaled(values, *fitted.scales[name]),
    "quantile": lambda values, fitted, name: quantile_ranks(values, fitted.edges[name]),
    "log_squared": lambda values, fitted, name: log_squared(values),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that the bytes of a dataset depend on, apart from the rows."""

    schema: LogSchema
    options: Options | None = None
    """The options that the schema was made of; None if the user gave the schema itself."""
    on_bad_row: OnBadRow = "fail"
    encoding_of: str | None = None
    """The encoding fingerprint of the dataset whose vocabulary is used."""

    def __post_init__(self) -> None:
        known = get_args(OnBadRow)
        require(self.on_bad_row in known, f"unknown on_bad_row {self.on_bad_row!r}; known: {', '.join(known)}")

    @property
    def protocol(self) -> str:
        return SCHEMA_PROTOCOL if self.options is None else self.options.protocol

    @property
    def of_criteo(self) -> bool:
        """Whether rows are of Criteo's form: integers and hashes, in the text that ``CriteoReader`` reads."""
        return self.schema.format == "criteo"

    @property
    def row_bytes(self) -> tuple[int, int]:
        """About the bytes of disk of a row: staged with its ids, and in the dataset; measured on Criteo's rows."""
        columns = len(self.schema.columns)
        return CRITEO_ROW_BYTES[self.schema.mlperf_bags is not None] if self.of_criteo else (12 * columns, 8 * columns)

    @property
    def files_of_split(self) -> int:
        """The least number of part files of a split that has enough row groups; more can be written in parallel."""
        # Criteo's splits are large and few; other numbers would change the files of datasets of earlier releases.
        return 1 if self.of_criteo else 8

    @property
    def dense_dictionaries(self) -> bool:
        """Whether dense values are written as dictionaries, which are short if values recur, as integers do."""
        # Not for the integers of other logs, which would change the files of datasets of earlier releases.
        return self.of_criteo

    @property
    def counted(self) -> tuple[SplitName, ...]:
        """The splits over which vocabularies are counted and transforms are fitted."""
        return ("train",) if self.schema.counts == "train" else SPLITS

    @property
    def _rows(self) -> str:
        return "the training split" if self.schema.counts == "train" else "all rows"

    @property
    def fitted_columns(self) -> tuple[str, ...]:
        """The columns whose transforms are fitted to the counted rows."""
        return tuple(name for name, column in self.schema.columns.items() if column.fit in ("edges", "scales"))

    @property
    def unscaled(self) -> tuple[str, ...]:
        """The dense columns whose numbers are not scaled."""
        return tuple(
            name
            for name, column in self.schema.columns.items()
            if column.role == "dense" and column.transform in (None, "none", "log_squared")
        )

    def minimum(self, facts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return the minimum of each column whose transform takes it, over all rows, from the facts of segments."""
        found = {}
        for name, column in self.schema.columns.items():
            if column.fit == "minimum":
                source = staged_name("number", column.source or name)
                of_segments = [of_segment["minimum"][source] for of_segment in facts]
                if column.fill is not None and any(of_segment["missing"][source] for of_segment in facts):
                    of_segments.append(column.fill)
                low = min((one for one in of_segments if one is not None), default=0)
                found[name] = int(low) if int(low) == low else low
        return found

    def dense(self, fitted: Fitted) -> tuple[Column, ...]:
        """Return the dense columns of the dataset."""
        return tuple(
            Column(name=name, role="dense", transform=self._dense_description(name, column, fitted))
            for name, column in self.schema.columns.items()
            if column.role == "dense"
        )

    def _dense_description(self, name: str, column: LogColumn, fitted: Fitted) -> str:
        missing = "null" if column.fill is None else column.fill
        if self.options is not None and column.fill is not None:
            missing = value_text(column.fill)  # the words of datasets of earlier releases: 0, not 0.0
        return _DESCRIPTIONS[column.transform or "none"].format(
            rows=self._rows, bins=column.quantiles, minimum=fitted.minimum.get(name, ""), missing=missing
        )

    def dense_values(
        self, fitted: Fitted, staged: StagedRows, rows: np.ndarray | slice = slice(None)
    ) -> dict[str, np.ndarray]:
        """Return the values of each dense column: float32 [n], NaN for a missing value without ``fill``."""
        return {
            name: _transformed(
                name, column, fitted, *staged.numbers(staged_name("number", column.source or name), rows)
            )
            for name, column in self.schema.columns.items()
            if column.role == "dense"
        }

    def tables(self, fitted: Fitted) -> tuple[Table, ...]:
        """Return the categorical and multi-hot columns, in the order of the dataset."""
        return tuple(
            self._table(name, column, fitted.edges.get(name, ()))
            for name, column in self.schema.columns.items()
            if column.role in ("categorical", "multi_hot")
        )

    def _table(self, name: str, column: LogColumn, edges: Sequence[float]) -> Table:
        schema, source, form = self.schema, column.source or name, column.form
        missing = None if form == "bag" else schema.missing_of(column)
        table = Table(
            name=name,
            source=staged_name(form, name if form == "bag" else source),
            is_text=form in ("text", "bag"),
            bag=form == "bag",
            ids_of_bag=MLPERF_SIZES.get(source, 1) if schema.mlperf_bags else 1,
            missing_as_value=missing == "zero",
            bins=column.transform,  # type: ignore[arg-type]
            edges=tuple(edges),
            min_count=schema.min_count if column.min_count is None else column.min_count,
            lists_rare=schema.list_rare,
            hash_modulo=schema.hash_modulo if form == "hash" else None,
            most_rows=schema.max_rows if column.max_rows is None else column.max_rows,
        )
        first = int(missing == "own")
        reserved = {"missing": 0, "rare": first, "unknown": first + (schema.unknown == "own")}
        without = {"missing"} if missing in ("zero", None) else set()
        if schema.unknown == "none":
            without |= {"unknown"} if table.min_count > 1 or table.most_rows is not None else {"unknown", "rare"}
        table = replace(table, reserved={kind: row for kind, row in reserved.items() if kind not in without})
        return replace(table, description=self._table_description(column, table))

    def _table_description(self, column: LogColumn, table: Table) -> str:
        schema, zero = self.schema, table.missing_as_value
        words = f"id by descending count over {self._rows}"
        if zero and table.bins is None:
            words += f", missing as {'hash ' if column.type else ''}0"
        words += self._reserved_description(table.reserved)
        if table.min_count > 1:
            words += f"; rare is below {table.min_count}"
        if table.most_rows is not None:
            words += f"; at most {table.most_rows} rows"
        if table.bins == "quantile":
            edges = f": bins of {self._rows} up to each of settings.edges;" if self.options else ","
            words = f"quantile({column.quantiles}){edges} {words}"
        elif table.bins is not None:
            words = f"{_LOG_SQUARED}, {words}"
        if zero and table.bins is not None:
            words = f"missing as 0, {words}"
        if table.hash_modulo is not None:
            words = f"hash % {table.hash_modulo}, {words}"
        if schema.id_modulo is not None:
            words += f", id % {schema.id_modulo}"
        if schema.mlperf_bags and table.ids_of_bag > 1:
            words += f"; a bag of {table.ids_of_bag}: the id and {schema.mlperf_bags.distribution} ones"
        return words

    def _reserved_description(self, reserved: Mapping[str, int]) -> str:
        """Describe which of missing, rare and unknown values share a row of a table.

        Args:
            reserved: the row of each kind that has one.
        """
        unknown = self.schema.unknown
        if unknown == "rare":
            return "; unknown as rare"
        if self.options is not None:  # the words of datasets of earlier releases
            return "; missing, rare and unknown values share one" if unknown == "reserved" else ""
        if "rare" in reserved:
            reserved = {"unknown": reserved["rare"], **reserved}
        of_rows: dict[int, list[str]] = {}
        for kind in sorted(reserved):  # missing, rare, unknown
            of_rows.setdefault(reserved[kind], []).append(kind)
        described = "".join(
            f"; {', '.join(kinds[:-1])} and {kinds[-1]} values share one row"
            for kinds in of_rows.values()
            if len(kinds) > 1
        )
        if unknown == "own":
            described += "; unknown values have a row of their own"
        elif "unknown" not in reserved:
            described += "; unknown values get the last row"
        return described

    def with_bags(
        self, table: Table, ids: np.ndarray, ends: np.ndarray | None, table_rows: int
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Return ids with the ends of their bags, or the bags that are made of single ids.

        Args:
            table: the column.
            ids: int32 [n].
            ends: where bags begin and end, int32 [rows + 1]; None for one id in each row.
            table_rows: rows of the table.
        """
        bags = self.schema.mlperf_bags
        if bags is not None and table.ids_of_bag > 1:
            return mlperf_bags(bags, table.source.partition("/")[2], ids, table_rows)
        return ids if ends is None else (ids, ends)

    def weights(self) -> tuple[Column, ...]:
        """Return the columns of weights."""
        weighted = (name for name, column in self.schema.columns.items() if column.weights)
        return tuple(Column(name=name + WEIGHTS_SUFFIX, role="weights") for name in weighted)

    def missing_sources(self) -> dict[str, str]:
        """Return the columns whose missing values, or empty lists, are reported, each with its column of segments."""
        # For Criteo, the log's columns: I1 is reported once, and not again as B1, which is made of it.
        return {
            (column.source or name) if self.of_criteo else name: staged_name(
                column.form, name if column.form == "bag" else column.source or name
            )
            for role in ("dense", "categorical", "multi_hot")
            for name, column in self.schema.columns.items()
            if column.role == role
        }

    def wanted_splits(self) -> tuple[SplitName, ...]:
        """Return the splits that the schema asks for."""
        split = self.schema.split
        if split.by in ("column", "files"):
            return tuple(name for name in SPLITS if name in split.values)
        return tuple(name for name, ratio in zip(SPLITS, split.ratios, strict=True) if ratio)

    def rule(
        self, files: Sequence[RawFile], rows: Sequence[int], times: Callable[[], Iterable[np.ndarray]]
    ) -> SplitRule:
        """Return the rule that assigns rows to splits.

        Args:
            files: the inputs.
            rows: of each file.
            times: returns ``OpenSegment.split_keys`` of all segments; called several times.

        Raises:
            UserError: a file belongs to no split, or to several, or there are too few rows.
        """
        split, total = self.schema.split, sum(rows)
        rule = SplitRule(seed=split.seed, negative_sampling_rate=split.negative_sampling_rate)
        ends = list(accumulate(split.ratios))[:-1]
        if split.by == "column":
            return replace(rule, by_value=True)
        if split.by == "random":
            return replace(rule, ratios=split.ratios)
        if split.by == "time":
            return replace(rule, cuts=tuple(values_at_ranks(times, ends)))
        if split.by == "tenths":
            require(
                total >= 10,
                f"too few rows: {total} in all; a split 8:1:1 needs at least 10: give more input",
            )
            return rule
        if split.by == "days":
            return replace(rule, spans=spans_of_days(rows, split.days == "files", split.held_out))
        if split.by == "position":
            cuts = [0, *(round(total * end) for end in ends), total]
            spans = [Span(split=s, start=a, stop=b) for s, a, b in zip(SPLITS, cuts, cuts[1:], strict=False)]
        else:
            starts = [0, *accumulate(rows)]
            spans = [
                Span(split=self._split_of_file(file), start=start, stop=start + count)
                for file, start, count in zip(files, starts, rows, strict=False)
            ]
        return replace(rule, spans=tuple(span for span in spans if span.stop > span.start))

    def _split_of_file(self, file: RawFile) -> SplitName:
        patterns = self.schema.split.values
        found = [name for name in SPLITS if any(fnmatch.fnmatch(file.name, one) for one in patterns.get(name, ()))]
        require(
            len(found) == 1,
            f"{file.path} belongs to {' and '.join(found) or 'no split'}; name it under exactly one of train, "
            "validation and test in split",
        )
        return found[0]

    def settings(self, fitted: Fitted) -> dict[str, Any]:
        """Return what shapes the encoding, as the schema of the dataset keeps it."""
        kept = {name: values for name, values in json.loads(json.dumps(asdict(fitted))).items() if values}
        if self.options is None:
            return {**kept, "schema": self.schema.document()}
        of_sources = {fit: {self._source(name): value for name, value in of.items()} for fit, of in kept.items()}
        return {**self.options.settings(), **of_sources}

    def fitted_of(self, settings: Mapping[str, Any], where: str) -> Fitted:
        """Return what the dataset with some settings was fitted to.

        Args:
            settings: as ``settings`` returned them.
            where: the file with them, for messages.

        Raises:
            UserError: they are damaged.
        """
        given = {name: settings[name] for name in _FITTED if name in settings}
        kept = asdict(parse_json(json.dumps(given), Fitted, where, _ADVICE))
        found: dict[str, dict[str, Any]] = {}
        for name, column in self.schema.columns.items():
            if column.fit is not None:
                key = name if self.options is None else self._source(name)
                require(key in kept[column.fit], f"{where} has no {column.fit} of the column {key}; {_ADVICE}")
                found.setdefault(column.fit, {})[name] = kept[column.fit][key]
        return Fitted(**found)

    def _source(self, name: str) -> str:
        """Return the log's column that a column of the dataset is made of."""
        return self.schema.columns[name].source or name

    def document(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        made_of = {"schema": self.schema.document()} if self.options is None else self.options.document()
        return {**made_of, "on_bad_row": self.on_bad_row, "encoding_of": self.encoding_of}


def known_recipe(known: DatasetSchema, folder: Folder, on_bad_row: OnBadRow = "fail") -> tuple[Recipe, Fitted]:
    """Return the recipe of a dataset, to encode new rows in the same way, and the numbers fitted to its rows.

    Raises:
        UserError: it was not made of raw files, or its settings are damaged.
    """
    where = str(folder / SCHEMA_FILE)
    require(
        known.protocol == SCHEMA_PROTOCOL or (known.protocol in PROTOCOLS and known.vocabulary),
        f"{folder} has the protocol {known.protocol!r} and {len(known.vocabulary)} vocabularies; {_ADVICE}",
    )
    given = {name: value for name, value in known.settings.items() if name not in _FITTED}
    if known.protocol == SCHEMA_PROTOCOL:
        options, schema = None, log_schema(parse_json(json.dumps(given), _Settings, where, _ADVICE).schema, where)
    else:
        given |= {"dataset": known.dataset, "protocol": known.protocol}
        options = parse_json(json.dumps(given), Options, where, _ADVICE)
        schema = options.schema()
    recipe = Recipe(schema=schema, options=options, on_bad_row=on_bad_row, encoding_of=known.encoding_fingerprint)
    return recipe, recipe.fitted_of(known.settings, where)


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What ``Recipe.settings`` wrote, apart from what transforms were fitted to."""

    schema: Mapping[str, Any]


def _transformed(name: str, column: LogColumn, fitted: Fitted, values: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """Return the transform of the numbers float64 or int32 [n] of a column, which are 0 where missing."""
    fill = -2.0 if column.transform == "log_plus_three" else column.fill  # log(-2 + 3) is 0
    if fill:
        values = np.where(missing, fill, values)
    with np.errstate(over="ignore"):  # the writer refuses infinite values
        found = _TRANSFORMS[column.transform or "none"](values, fitted, name).astype(np.float32, copy=False)
    if fill is None:
        found[missing] = np.nan
    return found
