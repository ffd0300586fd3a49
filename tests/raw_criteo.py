"""Raw Criteo rows with every oddity, and every preprocessing protocol in plain Python: split, dicts, math.log."""

import gzip
import math
import random
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datamodules.folder import verify
from datamodules.log_schema import LogSchema, log_schema, read_log_schema
from lightning_dlrm.contracts.schema import CRITEO_CATEGORICAL, CRITEO_DENSE, SPLITS, DatasetSchema

SAMPLE = Path(__file__).parents[2] / "shared/criteo_terabyte_sample/day_0"

Line = list[str]


def generated_lines(rows: int, seed: int = 0) -> list[Line]:
    """Rows with missing values, negatives, extremes, hash 0, values seen once and values only in the last rows."""
    rng = random.Random(seed)
    lines = []
    for row in range(rows):
        integers = [rng.choice(["", "-1", "-3", "0", "1", "2147483647", "-2147483648", str(rng.randrange(10**6))])]
        integers += [rng.choice(["", str(int(rng.random() ** 4 * 200) - 2)]) for _ in range(11)]
        integers += ["" if row < 90 else str(row)]  # first seen late
        hashes = [f"{hash_of(rng, row, column):08x}" for column in range(26)]
        hashes = [text if rng.random() > 0.1 else rng.choice(["", "00000000", text.upper()]) for text in hashes]
        lines.append([rng.choice("01"), *integers, *hashes])
    return lines


def hash_of(rng: random.Random, row: int, column: int) -> int:
    if column == 0:
        return row * 2654435761 % 2**32  # each seen once
    if column == 1:
        return 0xFFFFFFFF if row % 2 else 7  # ties
    if column == 2 and row > 90:
        return 0xABCDEF01  # first seen late
    return int(rng.random() ** 3 * 50) * 0x9E3779B1 % 2**32


def written(path: Path, lines: list[Line], end: str = "\n", last_end: bool = True) -> Path:
    """Writes rows, compressed as the suffix says."""
    text = (end.join("\t".join(line) for line in lines) + (end if last_end else "")).encode()
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text))
    elif path.suffix == ".zst":
        path.write_bytes(pa.compress(text, "zstd", asbytes=True))
    else:
        path.write_bytes(text)
    return path


def schema_of_some(protocol: str, names: Sequence[str], **changes: Any) -> LogSchema:
    """The schema of a protocol with some of its columns: a run takes as long as it has columns."""
    document = read_log_schema(f"datasets/criteo_{protocol}.yaml").document()
    left = {name: {"role": "leave"} for name in (*CRITEO_DENSE, *CRITEO_CATEGORICAL)}
    columns = {**left, **{name: document["columns"][name] for name in names}}
    return log_schema({**document, "columns": columns, **changes})


class Plain:
    """A dataset by the protocol's definition.

    ``splits``: the encoded rows of each split. ``vocabulary``: (value or None, count, id) of each table.
    ``rows``: of each table. ``distinct``: values counted.
    """

    def __init__(
        self,
        protocol: str,
        files: list[list[Line]],
        dataset: str,
        max_rows: int | None = None,
        min_count: int | None = None,
        negative_sampling_rate: float = 1.0,
        seed: int = 0,
        bins: int = 30,
    ) -> None:
        self.protocol, self.max_rows = protocol, max_rows
        thresholds = {"nvidia": 15, "bars": 10, "modern": 2, "quantile": 3}
        self.min_count = thresholds.get(protocol, 1) if min_count is None else min_count
        lines = [line for file in files for line in file]
        where = self._split(files, dataset, seed)
        for position, line in enumerate(lines):
            drawn = mixed(seed, 2, position) >> 11
            if where[position] == "train" and line[0] == "0" and not drawn / 2**53 < negative_sampling_rate:
                where[position] = "left out"
        self.minimum = {
            name: min(int(line[column] or "0") for line in lines) for column, name in enumerate(CRITEO_DENSE, 1)
        }
        train_only = protocol in ("bars", "modern", "quantile")
        counted = [
            line for line, split in zip(lines, where, strict=True) if split in (("train",) if train_only else SPLITS)
        ]
        self.tables: dict[str, tuple[int, bool]] = {}
        self.edges = {
            name: edges_of([line[column] for line in counted], bins) for column, name in enumerate(CRITEO_DENSE, 1)
        }
        for column, name in enumerate(CRITEO_DENSE, 1):
            if train_only:
                self.tables[("I" if protocol == "bars" else "B") + name[1:]] = (column, True)
        for column, name in enumerate(CRITEO_CATEGORICAL, 14):
            self.tables[name] = (column, False)
        self.vocabulary: dict[str, list[tuple[int | None, int, int]]] = {}
        self.rows, self.distinct, self.ids, self.rare = {}, {}, {}, {}
        self.reserved: dict[str, dict[str, int]] = {}
        for name, (column, is_bin) in self.tables.items():
            self._count(name, [line[column] for line in counted], is_bin)
        self.cells = {split: {name: Counter[str]() for name in self.tables} for split in SPLITS}
        for line, split in zip(lines, where, strict=True):
            for name, (column, _) in self.tables.items() if split in SPLITS else ():
                self.cells[split][name].update(self._kinds(name, line[column]))
        self.splits: dict[str, list[dict[str, float | None]]] = {split: [] for split in SPLITS}
        for line, split in zip(lines, where, strict=True):
            if split in SPLITS:
                self.splits[split].append(self.encoded(line))

    def _split(self, files: list[list[Line]], dataset: str, seed: int) -> list[str]:
        rows = sum(len(file) for file in files)
        if self.protocol == "bars":
            where = []
            for row in range(rows):
                drawn = mixed(seed, 1, row // 10)
                test = drawn % 10
                validation = (test + 1 + (drawn >> 32) % 9) % 10
                where.append({test: "test", validation: "validation"}.get(row % 10, "train"))
            return where
        if dataset == "terabyte" and len(files) > 1:
            held_out = len(files[-1])
        else:
            held_out = [rows // 7 + (day < rows % 7) for day in range(7)][-1]
        first, second = ("validation", "test") if self.protocol == "mlperf" else ("test", "validation")
        half = (held_out + 1) // 2
        return ["train"] * (rows - held_out) + [first] * half + [second] * (held_out - half)

    def _value(self, name: str, text: str) -> int | None:
        """What is counted; None for missing."""
        if self.tables[name][1]:
            if not text and self.protocol in ("modern", "quantile"):
                return None
            if self.protocol == "quantile":
                return sum(edge < int(text) for edge in self.edges["I" + name[1:]])
            x = int(text or "0")
            return (math.floor(math.log(x) ** 2) if x > 2 else x) % 2**32
        if self.protocol in ("dlrm", "mlperf"):
            value = int(text or "0", 16)
            return value % self.max_rows if self.max_rows and self.protocol == "dlrm" else value
        return int(text, 16) if text else None

    def _count(self, name: str, texts: list[str], is_bin: bool) -> None:
        values = [self._value(name, text) for text in texts]
        counts = Counter(value for value in values if value is not None)
        missing = sum(value is None for value in values)
        ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        kept = [item for item in ordered if item[1] >= self.min_count]
        rare = [item for item in ordered if item[1] < self.min_count]
        rare_rows = sum(count for _, count in rare)
        listed: list[tuple[int | None, int, int]] = []
        reserved = {}
        if self.protocol == "quantile":
            reserved = {"missing": 0, "rare": 1, "unknown": 1}
            listed = [(None, missing, 0), (None, 0, 1)]
        elif self.protocol == "modern":
            reserved = {"missing": 0, "rare": 1, "unknown": 2}
            listed = [(None, missing, 0), (None, 0, 1), (None, 0, 2)]
        elif self.protocol in ("nvidia", "bars"):
            reserved = {"rare": 0, "unknown": 0} if is_bin else {"missing": 0, "rare": 0, "unknown": 0}
            listed = [(None, missing + rare_rows, 0)]
        elif self.min_count > 1:
            reserved = {"rare": 0}
            listed = [(None, rare_rows, 0)]
        first = len(listed)
        modulus = self.max_rows if self.max_rows and self.protocol == "mlperf" else 2**31
        listed += [(value, count, i % modulus) for i, (value, count) in enumerate(kept, first)]
        if self.protocol in ("modern", "quantile"):
            listed += [(value, count, 1) for value, count in sorted(rare)]
        listed = [(value, count, i % modulus) for value, count, i in listed]
        self.vocabulary[name], self.reserved[name] = listed, reserved
        self.rows[name] = min(max(first + len(kept), 1), modulus)
        if self.protocol == "quantile":  # an id that no training row has gives way
            if not rare:
                reserved["rare"] = reserved["unknown"] = self.rows[name] - 1 if kept else 0
            if not missing:
                reserved["missing"] = reserved["rare"]
        self.distinct[name] = len(ordered)
        self.rare[name] = {value for value, _ in rare}
        self.ids[name] = {value: reserved["rare"] % modulus for value, _ in rare}
        self.ids[name] |= {value: i for value, _, i in listed if value is not None}

    def _kinds(self, name: str, text: str) -> list[str]:
        """What the report counts a value as: nothing if it has an id of its own."""
        value = self._value(name, text)
        if not text:
            return ["missing"]
        return ["rare"] if value in self.rare[name] else [] if value in self.ids[name] else ["unknown"]

    def id_of(self, name: str, text: str) -> int:
        value = self._value(name, text)
        reserved = self.reserved[name]
        if value is None:
            return reserved["missing"]
        unknown = reserved.get("unknown", reserved.get("rare", self.rows[name] - 1))
        return self.ids[name].get(value, unknown)

    def encoded(self, line: Line) -> dict[str, float | None]:
        values: dict[str, float | None] = {"label": int(line[0])} if len(line) == 40 else {}
        line = line if len(line) == 40 else ["", *line]
        for name, text in zip(CRITEO_DENSE, line[1:14], strict=True):
            if self.protocol != "bars":
                values[name] = self._dense(name, text)
        return values | {name: self.id_of(name, line[column]) for name, (column, _) in self.tables.items()}

    def _dense(self, name: str, text: str) -> float | None:
        x = int(text or "0")
        if self.protocol == "dlrm":
            return math.log(max(x, 0) + 1)
        if self.protocol == "mlperf":
            return math.log(max(x, self.minimum[name]) - self.minimum[name] + 2)
        if self.protocol == "nvidia":
            return math.log(x + 3) if text and x + 3 > 0 else 0.0
        return math.copysign(math.log(abs(x) + 1), x) if text else None


def edges_of(texts: list[str], bins: int) -> list[int]:
    """Upper edges of quantile bins: the least values up to which at least 1, 2, ... of ``bins`` parts lie, each once,
    without the greatest value."""
    values = sorted(int(text) for text in texts if text)
    edges = {values[math.ceil(Fraction(k * len(values), bins)) - 1] for k in range(1, bins)} if values else set()
    return sorted(edges - {values[-1]}) if values else []


def mixed(seed: int, stream: int, value: int) -> int:
    """SplitMix64's finaliser over a key and a value, on Python's integers."""

    def finalised(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    key = finalised((seed * 0x9E3779B97F4A7C15 + stream) % 2**64)
    return finalised(finalised((value * 0x9E3779B97F4A7C15 + key) % 2**64))


def assert_equals_plain(folder: Path, plain: Plain) -> DatasetSchema:
    """Every value of every row, and every line of every vocabulary."""
    schema = DatasetSchema.load(folder)
    verify(folder, schema)
    assert schema.protocol == plain.protocol
    assert dict(schema.features.tables) == plain.rows
    assert {column.name: dict(column.reserved) for column in schema.by_role("categorical")} == plain.reserved
    for split in SPLITS:
        assert schema.splits[split].positives == sum(int(row["label"] or 0) for row in plain.splits[split])
        assert_rows(pq.read_table(folder / split), plain.splits[split])
    for name, listed in plain.vocabulary.items():
        stored: list[dict[str, Any]] = pq.read_table(folder / f"vocabulary/{name}.parquet").to_pylist()
        assert [(entry["hash"], entry["count"], entry["id"]) for entry in stored] == listed, name
    assert schema.report["distinct"] == plain.distinct
    assert schema.settings.get("edges") == (plain.edges if plain.protocol == "quantile" else None)
    for split, tables in plain.cells.items():
        assert {name: Counter(counts) for name, counts in schema.cells[split].items()} == tables, split
    return schema


def assert_rows(table: pa.Table, expected: list[dict[str, float | None]]) -> None:
    assert table.num_rows == len(expected)
    assert table.column_names == list(expected[0])
    for column in table.column_names:
        wanted = [row[column] for row in expected]
        if table.schema.field(column).type == pa.float32():
            nulls = [value is None for value in wanted]
            assert table.column(column).is_null().to_pylist() == nulls
            np.testing.assert_array_equal(
                table.column(column).fill_null(0).to_numpy(), np.array([value or 0 for value in wanted], np.float32)
            )
        else:
            assert table.column(column).to_pylist() == wanted, column


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """The files of a dataset, but for the report of times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "report.json"
    }
