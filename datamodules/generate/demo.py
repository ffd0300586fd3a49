"""Demo data: click logs shaped like Criteo Kaggle whose labels come from a known click model.

The columns and table sizes are those of Criteo Kaggle, the shares of missing values are like them. Everything else
is planted:

- An id (and likewise a count of a dense column) of rank ``r`` is drawn with a chance of about
  ``(1 + r / scale) ** (-1 - 1 / power)``, the Zipf-Mandelbrot law, by inverting its smooth distribution. The most
  frequent ids have the smallest numbers; the tail of a large table is seen once or never.
- A row has two sides, a visitor and an advertisement, and each column belongs to one of them. Every id has a
  linear effect and a short vector of tastes; those of rare ids shrink to one shared value. With u and v the
  sums of these vectors over either side,

      log-odds of a click = BIAS + sum of the linear effects + INTERACTION_DEVIATION / sqrt(FACTORS) * <u, v>

  A linear model cannot see <u, v>, as the mean of u and of v is zero: factors have to be learned. Logistic
  regression ends below 60% of the way from AUC 0.5 to the best.

The true probabilities are known, and so are the best reachable scores on each split.

Ids and counts follow from Philox output by integer arithmetic, +, -, *, / and square roots alone, which IEEE 754
defines to the last bit, so the same settings give the same rows everywhere. (Only logarithms of counts, rounded to
float32, and the sigmoid that a label is drawn with rest on the machine's own functions, whose last bit decides
about a label in 10^15.) Any block of rows can be made alone, and a dataset of fewer rows is the beginning of one
of more.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.generate.draws import stream
from datamodules.generate.folder import SEED_RANGE, cache_folder, check_settings, make_once, rows_of_splits
from datamodules.writer import DatasetWriter
from lightning_dlrm.contracts.schema import (
    CRITEO_CATEGORICAL,
    CRITEO_DENSE,
    CRITEO_LABEL,
    SPLITS,
    DatasetSchema,
    Optimum,
    Split,
    SplitName,
    criteo_columns,
)

GENERATOR_VERSION = 1
"""Incremented if the same settings would give other rows."""

BLOCK_ROWS = 65_536
"""Rows that share a random stream: the smallest piece that can be generated alone."""

KAGGLE_CARDINALITIES = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194,
    27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip

FACTORS = 2
"""Length of a side's taste vector: the rank of the planted interaction."""

# The planted model's size: standard deviations of the linear and of the interaction part of the log-odds, and
# the bias that then gives a base rate near 0.25.
LINEAR_DEVIATION = 0.8
INTERACTION_DEVIATION = 1.2
BIAS = -1.5

# An id drawn in a share c of the rows keeps c / (c + HALF_EFFECT) of its own effect. Ids rarer than RAREST_KNOWN
# share one value: no model could learn their effects from some million rows, so the optimum would be out of reach.
HALF_EFFECT = 3e-3
RAREST_KNOWN = 3e-4

# Visitor or advertisement: the two sides whose tastes multiply.
VISITOR, AD = 0, 1

# name: (side, share missing, scale, largest count, share of its side's taste)
KAGGLE_DENSE = {
    "I1": (VISITOR, 0.45, 1.0, 5_775, 0),
    "I2": (AD, 0.0, 4.0, 65_535, 0),
    "I3": (VISITOR, 0.21, 6.0, 65_535, 0),
    "I4": (AD, 0.21, 5.0, 969, 0),
    "I5": (VISITOR, 0.03, 900.0, 65_535, 3),
    "I6": (AD, 0.22, 30.0, 65_535, 0),
    "I7": (VISITOR, 0.04, 3.0, 56_311, 3),
    "I8": (AD, 0.0, 8.0, 6_047, 2),
    "I9": (VISITOR, 0.04, 40.0, 29_019, 2),
    "I10": (AD, 0.45, 0.7, 11, 0),
    "I11": (VISITOR, 0.04, 1.0, 231, 2),
    "I12": (AD, 0.76, 1.0, 4_008, 0),
    "I13": (VISITOR, 0.21, 5.0, 7_393, 0),
}
# name: (side, share missing, scale, share of its side's taste)
KAGGLE_CATEGORICAL = {
    "C1": (VISITOR, 0.0, 2.0, 2),
    "C2": (AD, 0.0, 4.0, 2),
    "C3": (VISITOR, 0.034, 3.0, 1),
    "C4": (AD, 0.034, 3.0, 1),
    "C5": (VISITOR, 0.0, 2.0, 2),
    "C6": (AD, 0.12, 3.0, 2),
    "C7": (VISITOR, 0.0, 6.0, 0),
    "C8": (AD, 0.0, 2.0, 2),
    "C9": (VISITOR, 0.0, 1.0, 2),
    "C10": (AD, 0.0, 4.0, 0),
    "C11": (VISITOR, 0.0, 6.0, 0),
    "C12": (AD, 0.034, 3.0, 1),
    "C13": (VISITOR, 0.0, 6.0, 0),
    "C14": (AD, 0.0, 3.0, 2),
    "C15": (VISITOR, 0.0, 6.0, 0),
    "C16": (AD, 0.034, 3.0, 0),
    "C17": (VISITOR, 0.0, 2.0, 2),
    "C18": (AD, 0.0, 6.0, 0),
    "C19": (VISITOR, 0.44, 4.0, 0),
    "C20": (AD, 0.44, 1.0, 0),
    "C21": (VISITOR, 0.034, 3.0, 1),
    "C22": (AD, 0.76, 2.0, 0),
    "C23": (VISITOR, 0.0, 2.0, 2),
    "C24": (AD, 0.034, 4.0, 0),
    "C25": (VISITOR, 0.44, 3.0, 0),
    "C26": (AD, 0.44, 4.0, 0),
}

# Random streams: keys of the planted effects and of the rows.
_PLANT, _ROWS = 0, 1
# 32-bit uniforms that a row takes: one per feature and one for the label, drawn two by two.
_WORDS_PER_ROW = (len(KAGGLE_DENSE) + len(KAGGLE_CATEGORICAL) + 1 + 1) // 2


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Settings of demo data. The defaults are those of ``--data.path demo``.

    Args:
        train_rows: Rows of the training split.
        validation_rows: Rows of the validation split.
        test_rows: Rows of the test split.
        seed: Seed of the planted model and of the rows, from 0 to 2**64 - 1.
        max_table_rows: Most rows of a table; None for the sizes of Criteo Kaggle.
    """

    train_rows: int = 2_097_152
    validation_rows: int = 262_144
    test_rows: int = 131_072
    seed: int = 0
    max_table_rows: int | None = None

    def __post_init__(self) -> None:
        counts = ("train_rows", "validation_rows", "test_rows")
        checks = {name: (getattr(self, name) >= 100, "at least 100, so that both labels occur") for name in counts}
        checks["seed"] = (0 <= self.seed < 2**64, SEED_RANGE)
        largest = self.max_table_rows
        checks["max_table_rows"] = (largest is None or largest >= 2, "at least 2, or leave it out for full tables")
        check_settings("demo data", self, checks)

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """Rows of each table, C1 to C26."""
        return tuple(min(size, self.max_table_rows or size) for size in KAGGLE_CARDINALITIES)


def demo_schema(settings: DemoSettings) -> DatasetSchema:
    """Return the schema of demo data without generating them: without files, positives and optimum."""
    return DatasetSchema(
        dataset="demo",
        protocol="demo",
        columns=_columns(settings),
        splits={name: Split(rows=rows) for name, rows in rows_of_splits(settings).items()},
        # Row counts are left out of the settings: a model may score any rows of the same planted model.
        settings={
            "generator_version": GENERATOR_VERSION,
            "seed": settings.seed,
            "max_table_rows": settings.max_table_rows,
        },
    )


def demo_folder(settings: DemoSettings) -> Path:
    """Return the folder of this demo dataset in the cache, whether it exists or not."""
    return cache_folder("demo", [GENERATOR_VERSION, dataclasses.asdict(settings)])


def generate_demo(settings: DemoSettings, folder: Path, progress: bool = True) -> DatasetSchema:
    """Write a demo dataset, whole or not at all, or find it written already; see ``make_once``."""

    def write(writer: DatasetWriter, bar: Any) -> dict[str, Any]:
        model = PlantedModel.plant(settings)
        optimum = {}
        for split, rows in rows_of_splits(settings).items():
            labels, probabilities = [], []
            for start in range(0, rows, BLOCK_ROWS):
                block = model.block(split, start // BLOCK_ROWS, min(BLOCK_ROWS, rows - start))
                writer.write(split, block.columns)
                labels.append(block.columns[CRITEO_LABEL])
                probabilities.append(block.probability)
                bar.update(len(block.probability))
            optimum[split] = best_scores(np.concatenate(labels), np.concatenate(probabilities))
        return {"optimum": optimum}

    return make_once(demo_schema(settings), folder, write, progress)


def best_scores(label: NDArray[np.int8], probability: NDArray[np.float64]) -> Optimum:
    """Return AUC and log loss of the true click probabilities: no model can expect better scores on these rows."""
    positive, negative = np.sort(probability[label == 1]), np.sort(probability[label == 0])
    # A pair of equal probabilities counts one half.
    below = np.searchsorted(negative, positive, "left") + np.searchsorted(negative, positive, "right")
    log_likelihood = np.log(positive).sum() + np.log1p(-negative).sum()
    return Optimum(
        auc=float(below.sum() / (2 * len(positive) * len(negative))), log_loss=float(-log_likelihood / len(label))
    )


@dataclass(frozen=True)
class DemoBlock:
    """Consecutive rows."""

    columns: dict[str, NDArray[Any]]
    """Label int8, dense float32 and categorical int32 values, each [rows], by column name."""
    probability: NDArray[np.float64]
    """The true probability of a click, [rows]."""


@dataclass(frozen=True)
class Feature:
    """How the values of a column are drawn: ids of a table or, in a dense column, counts."""

    size: int
    """Values are 0 ... size - 1, the most frequent first."""
    side: int
    """VISITOR or AD."""
    missing: float
    """Share of rows without a value: id 0 stands for those, or a count of 0."""
    scale: float
    """Values below it are about equally common."""
    taste: int
    """Weight in the side's taste; at 0 the column has a linear effect only."""
    dense: bool
    squarings: int
    """The power of the law is 2 ** squarings: more squarings give a heavier tail."""

    @property
    def first(self) -> int:
        """The most frequent value that is not missing."""
        return 1 if self.missing and not self.dense else 0

    @cached_property
    def cut(self) -> float:
        """The last point of the distribution, where the values end; 0 < cut < 1."""
        root = 1.0 + (self.size - self.first) / self.scale
        for _ in range(self.squarings):
            root = math.sqrt(root)
        return 1.0 / root

    def draw(self, uniform: NDArray[np.float64]) -> NDArray[np.int32]:
        """Turn uniforms in (0, 1) into values; the lowest uniforms become missing values.

        With v = (uniform - missing) / (1 - missing) in (0, 1), the value is
        first + floor(scale * ((1 - v * (1 - cut)) ** -power - 1)).
        """
        slope = (1.0 - self.cut) / (1.0 - self.missing)
        value = uniform * -slope
        value += 1.0 + self.missing * slope
        np.divide(1.0, value, out=value)
        for _ in range(self.squarings):
            value *= value
        value *= self.scale
        value += self.first - self.scale
        # A missing value has v < 0, so it is below ``first`` and becomes 0.
        return np.clip(value, 0, self.size - 1, out=value).astype(np.int32)

    def chances(self, values: int) -> NDArray[np.float64]:
        """Return the probability of each of the values 0 ... values - 1, missing ones included."""
        root = 1.0 + np.arange(values - self.first + 1) / self.scale
        for _ in range(self.squarings):
            root = np.sqrt(root)
        chances = np.diff((1.0 - 1.0 / root) / (1.0 - self.cut)) * (1.0 - self.missing)
        if self.first:
            return np.concatenate([[self.missing], chances])
        chances[0] += self.missing
        return chances


def dense_features(laws: Mapping[str, tuple[int, float, float, int, int]]) -> dict[str, Feature]:
    """Return columns of counts from their (side, share missing, scale, largest count, taste)."""
    return {
        name: Feature(largest + 1, side, missing, scale, taste, dense=True, squarings=1)
        for name, (side, missing, scale, largest, taste) in laws.items()
    }


def id_features(laws: Mapping[str, tuple[int, float, float, int]], sizes: Mapping[str, int]) -> dict[str, Feature]:
    """Return columns of ids from their (side, share missing, scale, taste) and table sizes."""
    return {
        name: Feature(sizes[name], side, missing, scale, taste, dense=False, squarings=3)
        for name, (side, missing, scale, taste) in laws.items()
    }


@dataclass(frozen=True)
class Draw:
    """Consecutive rows before they are encoded."""

    values: dict[str, NDArray[np.int32]]
    """Counts and ids, each [rows], by column name; 0 where missing."""
    missing: dict[str, NDArray[np.bool_]]
    """Where a column has no value, each [rows], by column name."""
    label: NDArray[np.int8]
    probability: NDArray[np.float64]
    """The true chance of a click, [rows]."""


@dataclass(frozen=True)
class PlantedModel:
    """The click model of a seed, and the rows drawn from it."""

    seed: int
    bias: float
    """Log-odds of a click where all effects are zero."""
    features: dict[str, Feature]
    """Dense and categorical columns, in the order of their draws."""
    effects: dict[str, NDArray[np.float32]]
    """For each column [known values + 1, 1 + FACTORS]: linear effect and tastes; the last row is for all the
    values beyond."""

    @classmethod
    def plant(cls, settings: DemoSettings) -> "PlantedModel":
        """Return the model of ``settings.seed`` over tables of ``settings.cardinalities``."""
        sizes = dict(zip(CRITEO_CATEGORICAL, settings.cardinalities, strict=True))
        return cls.plant_features(
            settings.seed, dense_features(KAGGLE_DENSE) | id_features(KAGGLE_CATEGORICAL, sizes), BIAS
        )

    @classmethod
    def plant_features(cls, seed: int, features: dict[str, Feature], bias: float) -> "PlantedModel":
        """Return the model of a seed over the given columns: dense ones, then categorical ones."""
        side_taste = {side: sum(f.taste for f in features.values() if f.side == side) for side in (VISITOR, AD)}
        effects = {}
        for number, (name, feature) in enumerate(features.items()):
            chances, drawn = _draw_effects(seed, number, feature)
            linear = LINEAR_DEVIATION * math.sqrt(1 / len(features))
            taste = math.sqrt(feature.taste / side_taste[feature.side])
            deviations = (linear, *[taste] * FACTORS)
            effects[name] = np.stack(
                [_standardised(part, chances) * deviation for part, deviation in zip(drawn, deviations, strict=True)],
                axis=1,
            ).astype(np.float32)
        return cls(seed, bias, features, effects)

    def block(self, split: SplitName, number: int, rows: int = BLOCK_ROWS) -> DemoBlock:
        """Return the first ``rows`` rows of a block: those from ``number * BLOCK_ROWS`` on of a split of any length."""
        drawn = self.draw(split, number, rows)
        columns: dict[str, NDArray[Any]] = {CRITEO_LABEL: drawn.label}
        columns |= {name: _log_counts()[drawn.values[name]] for name in CRITEO_DENSE}
        columns |= {name: drawn.values[name] for name in CRITEO_CATEGORICAL}
        return DemoBlock(columns, drawn.probability)

    def draw(self, split: SplitName, number: int, rows: int = BLOCK_ROWS) -> Draw:
        """Return the rows of ``block`` as counts and ids."""
        raw = stream(self.seed, _ROWS, SPLITS.index(split), number).random_raw(_WORDS_PER_ROW * BLOCK_ROWS)
        raw = raw.reshape(_WORDS_PER_ROW, BLOCK_ROWS)[:, :rows]
        uniforms = [
            (half + 0.5) * 2.0**-32 for word in raw for half in (word & np.uint64(2**32 - 1), word >> np.uint64(32))
        ]
        values = {name: feature.draw(uniforms[i]) for i, (name, feature) in enumerate(self.features.items())}
        missing = {name: uniforms[i] < feature.missing for i, (name, feature) in enumerate(self.features.items())}
        probability = 1.0 / (1.0 + np.exp(-self.log_odds(values).astype(np.float64)))
        label = (uniforms[len(self.features)] < probability).astype(np.int8)
        return Draw(values, missing, label, probability)

    def log_odds(self, values: dict[str, NDArray[np.int32]]) -> NDArray[np.float32]:
        """Return the log-odds of a click, [rows], from counts and ids by column name."""
        rows = len(values[CRITEO_DENSE[0]])
        log_odds = np.full(rows, self.bias, dtype=np.float32)
        tastes = np.zeros((2, FACTORS, rows), dtype=np.float32)
        for name, feature in self.features.items():
            effects = self.effects[name]
            index = np.minimum(values[name], len(effects) - 1)
            log_odds += effects[:, 0][index]
            if feature.taste:
                for factor in range(FACTORS):
                    tastes[feature.side, factor] += effects[:, 1 + factor][index]
        for factor in range(FACTORS):
            product = tastes[VISITOR, factor] * tastes[AD, factor]
            log_odds += product * np.float32(INTERACTION_DEVIATION / math.sqrt(FACTORS))
        return log_odds


def _draw_effects(seed: int, number: int, feature: Feature) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the probabilities [V] of a column's known values and of the rest together, and their raw effects [1 +
    FACTORS, V]."""
    draws = stream(seed, _PLANT, 0, number)
    if feature.dense:
        signs = np.where(draws.random_raw(1 + FACTORS) >> np.uint64(63), 1.0, -1.0)
        return feature.chances(feature.size), signs[:, None] * _log_counts()[: feature.size].astype(np.float64)
    chances = feature.chances(min(feature.size, round(1 / RAREST_KNOWN)))
    chances = chances[chances >= RAREST_KNOWN]
    # The sum of four uniforms is nearly normal. They have 51 bits, so that their sum is exact in any order.
    raw = draws.random_raw((1 + FACTORS) * 4 * len(chances)) >> np.uint64(13)
    drawn = (raw * 2.0**-51).reshape(1 + FACTORS, 4, len(chances)).sum(axis=1) - 2.0
    drawn *= chances / (chances + HALF_EFFECT)
    if len(chances) == feature.size:
        return chances, drawn
    return np.append(chances, 1.0 - math.fsum(chances)), np.pad(drawn, ((0, 0), (0, 1)))


def _standardised(values: NDArray[np.float64], chances: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shift and scale values to mean 0 and variance 1 under the probabilities. fsum rounds once: the same on every
    machine."""
    centred = values - math.fsum(values * chances)
    return centred / math.sqrt(math.fsum(centred * centred * chances))


@cache
def _log_counts() -> NDArray[np.float32]:
    """Return log(count + 1) of every count that a dense column may have."""
    largest = max(largest for _, _, _, largest, _ in KAGGLE_DENSE.values())
    return np.array([math.log(count + 1) for count in range(largest + 1)], dtype=np.float32)


def _columns(settings: DemoSettings) -> tuple[Any, ...]:
    reserved = {name: {"missing": 0} for name, (_, missing, _, _) in KAGGLE_CATEGORICAL.items() if missing}
    return criteo_columns(settings.cardinalities, "missing to 0, log(x + 1)", reserved)
