"""Random data: tables of any number and size, ids by a law, and clicks independent of the features.

For benchmarks, not for learning: no model can do better than the share of clicks. Dense features are standard normal.
Ids follow a uniform, a Gaussian or a Zipf law *within each table's size*. Ids are drawn independently, so a bag may
hold an id twice.

Each column draws from random streams of its own, block by block of rows, so any block of any column can be made alone,
and a dataset of fewer rows is the beginning of one of more. The same settings give the same rows everywhere (see
``datamodules.generate.draws``).
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from datamodules.generate.demo import KAGGLE_CARDINALITIES
from datamodules.generate.draws import Gaussian, Uniform, Zipf, halves, integers, normal_quantile, stream, uniforms
from datamodules.generate.folder import SEED_RANGE, cache_folder, check_settings, make_once, rows_of_splits
from datamodules.preprocess.multi_hot import MLPERF_SIZES
from datamodules.writer import DatasetWriter
from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.schema import (
    SPLITS,
    WEIGHTS_SUFFIX,
    Column,
    DatasetSchema,
    Optimum,
    Split,
    SplitName,
)

GENERATOR_VERSION = 1
"""Incremented if the same settings would give other rows."""

BLOCK_ROWS = 16_384
"""Rows that share a random stream."""

Law = Literal["uniform", "gaussian", "zipf"]
Preset = Literal["paper", "kaggle", "mlperf"]

MLPERF_CARDINALITIES = (
    40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10,
    2209, 11938, 155, 4, 976, 14, 40000000, 40000000, 40000000, 590152, 12973, 108, 36,
)  # fmt: skip

PRESETS: dict[Preset, dict[str, Any]] = {
    # The single-socket benchmark of Naumov et al. 2019, section 5.2.
    "paper": {"tables": (1_000_000,) * 8, "dense": 512, "indices": 100, "min_indices": 1},
    "kaggle": {"tables": KAGGLE_CARDINALITIES, "dense": 13, "indices": 1},
    # MLPerf's DLRM v2 on Criteo Terabyte with multi-hot bags.
    "mlperf": {"tables": MLPERF_CARDINALITIES, "dense": 13, "indices": tuple(MLPERF_SIZES.values())},
}

# Random streams by what they are for; 0 and 1 are those of demo data.
_LABEL, _DENSE, _LENGTHS, _IDS, _WEIGHTS = 2, 3, 4, 5, 6


@dataclass(frozen=True, kw_only=True)
class RandomSettings:
    """Settings of random data."""

    tables: Sequence[int] = (100_000,) * 26
    """Rows of each table, C1 and on."""
    dense: int = 13
    """Dense features, I1 and on."""
    indices: int | Sequence[int] = 1
    """Ids of a bag, in all tables or in each; the most of them where ``min_indices`` is given."""
    min_indices: int | Sequence[int] | None = None
    """Fewest ids of a bag, in all tables or in each: bags hold any number between with the same chance. None for
    bags that are all full."""
    law: Law = "uniform"
    """How ids are drawn: ``uniform``; ``gaussian``, a bell over the table, cut off at its ends; ``zipf``, id k with a
    chance proportional to (k + 1) ** -exponent."""
    exponent: float = 1.05
    """Of ``zipf``."""
    mean: float = 0.5
    """Of ``gaussian``, as a share of the table's rows."""
    deviation: float = 0.15
    """Of ``gaussian``, as a share of the table's rows."""
    weights: bool = False
    """A weight, uniform in (0, 1], for each id of a bag; all columns are then of bags."""
    click_rate: float = 0.25
    """Chance of label 1."""
    train_rows: int = 1_048_576
    """Rows of the training split."""
    validation_rows: int = 65_536
    """Rows of the validation split; 0 for none."""
    test_rows: int = 65_536
    """Rows of the test split; 0 for none."""
    seed: int = 0
    """Of the rows, 0 to 2**64 - 1."""

    def __post_init__(self) -> None:
        # A YAML's lists, so that equal settings are equal.
        for name in ("tables", "indices", "min_indices"):
            if isinstance(value := getattr(self, name), Sequence):
                object.__setattr__(self, name, tuple(value))
        counts = ("train_rows", "validation_rows", "test_rows", "dense")
        check_settings("random data", self, {name: (getattr(self, name) >= 0, "0 or more") for name in counts})
        require(rows_of_splits(self), "random data: no split has rows; give train_rows, validation_rows or test_rows")
        require(self.tables or self.dense, "random data: no tables and no dense features; give at least one of them")
        self._check_tables()
        checks = {
            "law": (self.law in get_args(Law), f"one of {', '.join(get_args(Law))}"),
            "exponent": (0 < self.exponent <= 10, "a number above 0, at most 10"),
            "mean": (0 <= self.mean <= 1, "a share of the table's rows, 0 to 1"),
            "deviation": (1e-9 <= self.deviation <= 1e9, "a share of the table's rows above 0, such as 0.15"),
            "click_rate": (0 < self.click_rate < 1, "a probability between 0 and 1"),
            "seed": (0 <= self.seed < 2**64, SEED_RANGE),
        }
        check_settings("random data", self, checks)

    def _check_tables(self) -> None:
        for number, rows in enumerate(self.tables, 1):
            require(1 <= rows < 2**31, f"random data: table C{number} has {rows} rows; give each 1 to {2**31 - 1}")
        for name in ("indices", "min_indices"):
            if isinstance(value := getattr(self, name), tuple) and len(value) != len(self.tables):
                raise UserError(
                    f"random data: {name} has {len(value)} numbers for {len(self.tables)} tables; "
                    "give one for each, or one for all"
                )
        for number, (rows, (least, most)) in enumerate(zip(self.tables, self.bag_sizes, strict=True), 1):
            require(
                0 <= least <= most and most >= 1,
                f"random data: bags of table C{number} hold {least} to {most} ids; "
                "expected 0 <= min_indices <= indices and indices at least 1",
            )
            require(
                most <= rows,
                f"random data: bags of table C{number} hold up to {most} ids, but it has only {rows} rows; "
                "give fewer indices, or a number for each table",
            )

    @classmethod
    def of(cls, preset: Preset | None = None, **given: Any) -> "RandomSettings":
        """Return the settings of a preset, in which given values replace its values; None counts as not given.

        Raises:
            UserError: there is no such preset, or something was given that has no effect or is out of range.
        """
        require(
            preset is None or preset in PRESETS, f"random data: preset {preset!r} is not one of {', '.join(PRESETS)}"
        )
        settings = cls(
            **{
                **(PRESETS[preset] if preset else {}),
                **{name: value for name, value in given.items() if value is not None},
            }
        )
        for name, law in (("exponent", "zipf"), ("mean", "gaussian"), ("deviation", "gaussian")):
            require(
                given.get(name) is None or settings.law == law,
                f"random data: {name} is an option of law {law}, but law is {settings.law}; leave one of them out",
            )
        return settings

    @property
    def bag_sizes(self) -> tuple[tuple[int, int], ...]:
        """Fewest and most ids of each table's bags."""
        most = self.indices if isinstance(self.indices, tuple) else (self.indices,) * len(self.tables)
        least = self.min_indices if self.min_indices is not None else most
        least = least if isinstance(least, tuple) else (least,) * len(self.tables)
        return tuple(zip(least, most, strict=True))


class RandomRows:
    """Random rows in memory, block by block.

    Args:
        settings: what to generate; row counts have no effect.
    """

    def __init__(self, settings: RandomSettings) -> None:
        self.settings = settings
        self.columns = _columns(settings)
        """What ``block`` gives."""
        self._bags = settings.bag_sizes
        self._laws = [_law(settings, rows) for rows in settings.tables]

    def block(self, split: SplitName, number: int, rows: int = BLOCK_ROWS) -> dict[str, Any]:
        """Return the first ``rows`` rows of a block: those from ``number * BLOCK_ROWS`` on of a split of any length.

        More rows than BLOCK_ROWS are possible too; no dataset has such a block.

        Returns:
            By column name: label int8, dense float32 and categorical int32, each [rows]; bags as pairs of int32 ids
            [N] and int64 offsets [rows + 1], their weights of float32 weights [N] and the same offsets.
        """
        place = SPLITS.index(split), number
        columns: dict[str, Any] = {
            "label": label_block(self.settings.click_rate, self.settings.seed, *place, rows),
            **{f"I{i + 1}": dense_block(self.settings.seed, i, *place, rows) for i in range(self.settings.dense)},
        }
        for table in range(len(self.settings.tables)):
            columns |= self._table_block(table, *place, rows)
        return columns

    def _table_block(self, table: int, split: int, number: int, rows: int) -> dict[str, Any]:
        seed, name, (least, most) = self.settings.seed, f"C{table + 1}", self._bags[table]
        lengths = np.full(rows, most, dtype=np.int64)
        if least < most:
            lengths = least + integers(halves(stream(seed, _LENGTHS, table, split, number), rows), most - least + 1)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        count = int(offsets[-1])
        ids = self._laws[table](uniforms(stream(seed, _IDS, table, split, number), count))
        if not _has_bags(self.settings, table):
            return {name: ids}
        columns: dict[str, Any] = {name: (ids, offsets)}
        if self.settings.weights:
            # Up to 2**24, a float32 is exact.
            bits = (halves(stream(seed, _WEIGHTS, table, split, number), count) >> np.uint64(8)) + np.uint64(1)
            columns[name + WEIGHTS_SUFFIX] = (bits.astype(np.float32) * np.float32(2.0**-24), offsets)
        return columns


def label_block(click_rate: float, seed: int, split: int, number: int, rows: int) -> NDArray[np.int8]:
    """Return the labels of a block's first rows, 1 with a probability of ``click_rate``."""
    return (halves(stream(seed, _LABEL, 0, split, number), rows) < round(click_rate * 2**32)).astype(np.int8)


def chance_scores(click_rate: float) -> Optimum:
    """Return the best scores if labels are independent of the features: predict the click rate for every sample."""
    other = 1 - click_rate
    return Optimum(auc=0.5, log_loss=-click_rate * math.log(click_rate) - other * math.log(other))


def dense_block(seed: int, column: int, split: int, number: int, rows: int) -> NDArray[np.float32]:
    """Return standard normal values of a block's first rows."""
    return normal_quantile(uniforms(stream(seed, _DENSE, column, split, number), rows)).astype(np.float32)


def random_schema(settings: RandomSettings) -> DatasetSchema:
    """Return the schema of random data without generating them: without files and positives."""
    return DatasetSchema(
        dataset="random",
        protocol="random",
        columns=_columns(settings),
        splits={name: Split(rows=rows) for name, rows in rows_of_splits(settings).items()},
        settings={
            "generator_version": GENERATOR_VERSION,
            **{
                name: list(value) if isinstance(value, tuple) else value
                for name, value in dataclasses.asdict(settings).items()
                if name not in ("train_rows", "validation_rows", "test_rows")
            },
        },
        indices={f"C{i}": (least + most) / 2 for i, (least, most) in enumerate(settings.bag_sizes, start=1)},
    )


def random_folder(settings: RandomSettings) -> Path:
    """Return the folder of this dataset in the cache, whether it exists or not."""
    return cache_folder("random", [GENERATOR_VERSION, dataclasses.asdict(settings)])


def generate_random(settings: RandomSettings, folder: Path, progress: bool = True) -> DatasetSchema:
    """Write a dataset of random rows, whole or not at all, or find it written already; see ``make_once``."""

    def write(writer: DatasetWriter, bar: Any) -> dict[str, Any]:
        source = RandomRows(settings)
        for split, total in rows_of_splits(settings).items():
            for start in range(0, total, BLOCK_ROWS):
                rows = min(BLOCK_ROWS, total - start)
                writer.write(split, source.block(split, start // BLOCK_ROWS, rows))
                bar.update(rows)
        return {"optimum": dict.fromkeys(rows_of_splits(settings), chance_scores(settings.click_rate))}

    return make_once(random_schema(settings), folder, write, progress)


def _law(settings: RandomSettings, rows: int) -> Uniform | Gaussian | Zipf:
    if settings.law == "gaussian":
        return Gaussian(rows, settings.mean, settings.deviation)
    return Zipf(rows, settings.exponent) if settings.law == "zipf" else Uniform(rows)


def _has_bags(settings: RandomSettings, table: int) -> bool:
    return settings.weights or settings.bag_sizes[table] != (1, 1)


def _columns(settings: RandomSettings) -> tuple[Column, ...]:
    columns = [Column(name="label", role="label")]
    columns += [Column(name=f"I{i + 1}", role="dense", transform="standard normal") for i in range(settings.dense)]
    for table, rows in enumerate(settings.tables):
        bags = _has_bags(settings, table)
        columns.append(Column(name=f"C{table + 1}", role="multi_hot" if bags else "categorical", cardinality=rows))
        if settings.weights:
            columns.append(Column(name=f"C{table + 1}{WEIGHTS_SUFFIX}", role="weights"))
    return tuple(columns)
