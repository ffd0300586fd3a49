"""How the schema of a click log encodes it: the columns of the dataset and the split; ``options`` does this for
Criteo's protocols."""

import fnmatch
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, get_args

import numpy as np

from datamodules.folder import Folder
from datamodules.log_schema import FITTED, LogColumn, LogSchema, log_schema
from datamodules.preprocess.options import Fitted, MultiHot, OnBadRow
from datamodules.preprocess.protocols import Dense, Fit, Table
from datamodules.preprocess.sources import RawFile
from datamodules.preprocess.splits import Span, SplitRule
from datamodules.preprocess.transforms import (
    log_of_positive_part,
    log_squared,
    quantile_bins,
    signed_log,
    values_at_ranks,
)
from datamodules.values import staged_name
from lightning_dlrm.contracts.documents import parse_json
from lightning_dlrm.contracts.errors import require
from lightning_dlrm.contracts.schema import SCHEMA_FILE, SPLITS, WEIGHTS_SUFFIX, Column, DatasetSchema, SplitName

LOG_PROTOCOL = "schema"
"""Name of the protocol of datasets that are made by the schema of a log."""

_WORDS: Mapping[str, str] = {
    "none": "as it is",
    "log1p": "log(max(x, 0) + 1)",
    "signed_log": "sign(x) * log(|x| + 1)",
    "standard": "(x - mean) / standard deviation, of {rows}",
    "minmax": "(x - minimum) / (maximum - minimum), of {rows}",
    "quantile": "rank in 0..1 by up to {bins} quantiles of {rows}",
    "log_squared": "floor(log(x)^2) where x > 2",
}


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """Everything that the bytes of a dataset of a log depend on, apart from the rows; see ``options.Options``."""

    schema: LogSchema
    on_bad_row: OnBadRow = "fail"
    encoding_of: str | None = None
    """The encoding fingerprint of the dataset whose vocabulary is used."""

    def __post_init__(self) -> None:
        known = get_args(OnBadRow)
        require(self.on_bad_row in known, f"unknown on_bad_row {self.on_bad_row!r}; known: {', '.join(known)}")

    @property
    def dataset(self) -> str:
        return self.schema.dataset

    protocol = LOG_PROTOCOL

    @property
    def bags(self) -> MultiHot | None:
        return None

    @property
    def files_of_split(self) -> int:
        return 8

    @property
    def dense_dictionaries(self) -> bool:
        return False

    @property
    def counted(self) -> tuple[SplitName, ...]:
        return ("train",) if self.schema.counts == "train" else SPLITS

    @property
    def fitted_on(self) -> tuple[SplitName, ...]:
        return self.counted

    @property
    def _rows(self) -> str:
        return "the training split" if self.schema.counts == "train" else "all rows"

    def fits(self) -> tuple[Fit, ...]:
        """Return the transforms to fit."""
        return tuple(
            Fit(
                name=name,
                source=staged_name("number", column.source or name),
                transform=column.transform,  # type: ignore[arg-type]
                bins=column.quantiles,
                fill=column.fill,
            )
            for name, column in self.schema.columns.items()
            if column.transform in FITTED
        )

    def dense(self, fitted: Fitted) -> tuple[Dense, ...]:
        """Return the dense columns."""
        return tuple(
            Dense(
                name=name,
                source=staged_name("number", column.source or name),
                words=self._dense_words(column),
                transform=partial(
                    _transformed, column, fitted.edges.get(name, ()), fitted.scales.get(name, (0.0, 1.0))
                ),
            )
            for name, column in self.schema.columns.items()
            if column.role == "dense"
        )

    def _dense_words(self, column: LogColumn) -> str:
        words = _WORDS[column.transform or "none"].format(rows=self._rows, bins=column.quantiles)
        return f"{words}, missing as {'null' if column.fill is None else column.fill}"

    def tables(self, fitted: Fitted) -> tuple[Table, ...]:
        """Return the categorical and multi-hot columns, in the order of the dataset."""
        return tuple(
            self._table(name, column, fitted.edges.get(name, ()))
            for name, column in self.schema.columns.items()
            if column.role in ("categorical", "multi_hot")
        )

    def _table(self, name: str, column: LogColumn, edges: Sequence[float]) -> Table:
        schema, source = self.schema, column.source or name
        min_count = schema.min_count if column.min_count is None else column.min_count
        most_rows = schema.max_rows if column.max_rows is None else column.max_rows
        is_bag = column.role == "multi_hot"
        words = f"id by descending count over {self._rows}; unknown as rare"
        if min_count > 1:
            words += f"; rare is below {min_count}"
        if most_rows is not None:
            words += f"; at most {most_rows} rows"
        if column.transform is not None:
            bins = f"quantile({column.quantiles})" if column.transform == "quantile" else _WORDS["log_squared"]
            words = f"{bins}, {words}"
        own = {"missing": 0, "rare": 1, "unknown": 1}
        shared = {"missing": 0, "rare": 0, "unknown": 0}
        reserved = own if (column.missing or schema.missing) == "own" else shared
        kind = "bag" if is_bag else "text" if column.transform is None else "number"
        return Table(
            name=name,
            source=staged_name(kind, name if is_bag else source),
            words=words,
            is_text=column.transform is None,
            bag=is_bag,
            bins=column.transform,  # type: ignore[arg-type]
            edges=tuple(edges),
            min_count=min_count,
            reserved={"rare": 0, "unknown": 0} if is_bag else reserved,
            trained_rows=True,
            most_rows=most_rows,
        )

    def weights(self) -> tuple[Column, ...]:
        """Return the columns of weights."""
        weighted = (name for name, column in self.schema.columns.items() if column.weights)
        return tuple(Column(name=name + WEIGHTS_SUFFIX, role="weights") for name in weighted)

    def missing_sources(self) -> dict[str, str]:
        """Return the columns whose missing values are reported, each with its column of segments."""
        found = {dense.name: dense.source for dense in self.dense(Fitted())}
        return found | {table.name: table.source for table in self.tables(Fitted()) if not table.bag}

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
            UserError: a file belongs to no split, or to several.
        """
        split = self.schema.split
        ends = list(accumulate(split.ratios))[:-1]
        if split.by == "column":
            return SplitRule(by_value=True)
        if split.by == "random":
            return SplitRule(ratios=split.ratios, seed=split.seed)
        if split.by == "time":
            return SplitRule(cuts=tuple(values_at_ranks(times, ends)))
        spans = []
        if split.by == "position":
            total = sum(rows)
            cuts = [0, *(round(total * end) for end in ends), total]
            spans = [Span(split=s, start=a, stop=b) for s, a, b in zip(SPLITS, cuts, cuts[1:], strict=False)]
        else:
            starts = [0, *accumulate(rows)]
            for file, start, count in zip(files, starts, rows, strict=False):
                spans.append(Span(split=self._split_of_file(file), start=start, stop=start + count))
        return SplitRule(spans=tuple(span for span in spans if span.stop > span.start))

    def _split_of_file(self, file: RawFile) -> SplitName:
        patterns = self.schema.split.values
        found = [name for name in SPLITS if any(fnmatch.fnmatch(file.name, one) for one in patterns.get(name, ()))]
        require(
            len(found) == 1,
            f"{file.path} belongs to {' and '.join(found) or 'no split'}; name it under exactly one of train, "
            f"validation and test in split",
        )
        return found[0]

    def settings(self, fitted: Fitted) -> dict[str, Any]:
        """Return what shapes the encoding, as the schema of the dataset keeps it."""
        fits = {"edges": fitted.edges, "scales": fitted.scales}
        kept = {name: {column: list(values) for column, values in of.items()} for name, of in fits.items()}
        kept["schema"] = self.schema.document()
        return {name: values for name, values in kept.items() if values}

    def document(self) -> dict[str, Any]:
        """Return all options as JSON values."""
        return {"schema": self.schema.document(), "on_bad_row": self.on_bad_row, "encoding_of": self.encoding_of}


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What ``LogOptions.settings`` wrote."""

    schema: Mapping[str, Any]
    edges: Mapping[str, list[float]] | None = None
    scales: Mapping[str, tuple[float, float]] | None = None


def known_options(known: DatasetSchema, folder: Folder, on_bad_row: OnBadRow) -> tuple[LogOptions, Fitted]:
    """Return the options of a dataset made by the schema of a log, to encode further rows alike.

    Raises:
        UserError: its settings are damaged.
    """
    where = str(folder / SCHEMA_FILE)
    settings = parse_json(json.dumps(known.settings), _Settings, where, "give a dataset folder that preprocess made")
    options = LogOptions(
        schema=log_schema(settings.schema, where), on_bad_row=on_bad_row, encoding_of=known.encoding_fingerprint
    )
    return options, Fitted(edges=settings.edges or {}, scales=settings.scales or {})


def _transformed(
    column: LogColumn, edges: Sequence[float], scale: tuple[float, float], values: np.ndarray, missing: np.ndarray
) -> np.ndarray:
    """Return the transform of numbers: float32 [n] of float64 [n], NaN where one is missing and stays so."""
    if column.fill is not None:
        values, missing = np.where(missing, column.fill, values), np.zeros_like(missing)
    transform = column.transform or "none"
    if transform == "log1p":
        found = log_of_positive_part(values, missing, 0)
    elif transform == "signed_log":
        found = signed_log(values, missing, 0)
    elif transform in ("standard", "minmax"):
        found = (values - scale[0]) / scale[1]
    elif transform == "quantile":
        found = quantile_bins(values, edges) / max(len(edges), 1)
    else:
        found = log_squared(values) if transform == "log_squared" else values
    with np.errstate(over="ignore"):  # the writer refuses infinite values
        found = found.astype(np.float32)
    found[missing] = np.nan
    return found
