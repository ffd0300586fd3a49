"""Contract: ``inspect`` tells what a dataset folder holds, and ``--verify`` finds any altered byte; ``--leakage``
counts rows of equal features as comparing all rows would; skew is that of the ids' counts, and ``--plot`` draws it."""

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.preprocess import inspect_command, leakage
from datamodules.preprocess.inspection import summary
from datamodules.preprocess.inspection_text import render
from datamodules.preprocess.skew import all_skews
from datamodules.preprocess.split_words import split_words
from datamodules.writer import DatasetWriter
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import Column, DatasetSchema, Optimum, Split

COLUMNS = (
    Column(name="label", role="label"),
    Column(name="I1", role="dense", transform="as it is"),
    Column(name="C1", role="categorical", cardinality=1234),
    Column(name="C2", role="categorical", cardinality=3, reserved={"missing": 0}),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """100 rows for training, a quarter of them positive, and 10 for validation, none positive; 220 were read."""
    with DatasetWriter(tmp_path / "data", COLUMNS) as writer:
        for split, rows, every in (("train", 100, 4), ("validation", 10, 99)):
            position = np.arange(1, rows + 1)
            writer.write(
                split,
                {
                    "label": (position % every == 0).astype(np.int8),
                    "I1": position.astype(np.float32),
                    "C1": position.astype(np.int32),
                    "C2": (position % 3).astype(np.int32),
                },
            )
        writer.write_vocabulary("C2", pa.table({"hash": pa.array([9, 8, 7], pa.uint32()), "count": [66, 22, 22]}))
        writer.finish(
            dataset="mine",
            protocol="own",
            settings={"max_rows": 5000},
            optimum={"validation": Optimum(auc=0.8125, log_loss=0.4321)},
            report={"missing": {"I1": 22, "C1": 0}, "rows_per_file": [["raw.txt", 220]]},
        )
    return tmp_path / "data"


def run_inspect(folder: Path | str, *options: str) -> int:
    parser = argparse.ArgumentParser()
    inspect_command.add_arguments(parser)
    return inspect_command.run(parser.parse_args([str(folder), *options]))


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_inspect(folder, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    schema = DatasetSchema.load(folder)
    assert facts["fingerprints"] == {"encoding": schema.encoding_fingerprint, "data": schema.data_fingerprint}
    assert (facts["dataset"], facts["protocol"], facts["settings"]) == ("mine", "own", {"max_rows": 5000})
    assert facts["splits"] == {
        "train": {"rows": 100, "label_mean": 0.25, "files": 1},
        "validation": {"rows": 10, "label_mean": 0.0, "files": 1},
    }
    assert facts["rows"] == 110 and facts["table_rows"] == 1237 and facts["verified"] is False
    columns = {column["name"]: column for column in facts["columns"]}
    names = ("cardinality", "missing", "most_frequent", "ids_for_90")
    assert {name: tuple(column[fact] for fact in names) for name, column in columns.items()} == {
        "label": (0, None, None, None),
        "I1": (0, 0.1, None, None),
        "C1": (1234, 0.0, None, None),
        "C2": (3, None, 0.6, 3),
    }
    assert "leakage" not in facts
    assert facts["optimum"] == {"validation": {"auc": 0.8125, "log_loss": 0.4321}}
    assert [columns[name]["most_frequent_is"] for name in ("I1", "C1", "C2")] == [None, None, "missing"]
    assert facts["split_rule"] is None and facts["left_out"] == []


def test_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_inspect(folder, "--verify") == 0
    out = capsys.readouterr().out
    words = [line.split() for line in out.splitlines()]
    assert words[0][:3] == ["110", "rows", "of"]
    assert ["train", "100", "90.9%", "25.00%"] in words
    assert ["I1", "dense", "10.00%"] in words
    assert ["C1", "categorical", "0.00%", "1,234"] in words
    assert ["C2", "categorical", "3", "60.00%", "(missing)", "3"] in words, "missing values of C2 are not counted"
    assert ["all", "1,237"] in words
    for text in (
        "max_rows 5000",
        "raw.txt (220 rows)",
        "AUC 0.8125",
        "as it is",
        "label; 1 dense (I1); 2 categorical (C1, C2)",
        "reserved rows missing values have a row of their own",
        "90%: number of the most frequent ids that together have 90% of the lookups",
        "positive: share of the rows with label 1",
        "missing values of columns without a share of them are not counted",
        "the checksums of all files match",
    ):
        assert text in out, text
    assert DatasetSchema.load(folder).encoding_fingerprint[:16] in out


def test_long_lists_are_short_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reserved = {"missing": 0, "rare": 1, "unknown": 1}
    columns = [
        Column(name=f"C{i}", role="categorical", cardinality=9, transform="a", reserved=reserved) for i in (1, 2, 3)
    ]
    columns += [Column(name=name, role="categorical", cardinality=9, transform="b") for name in ("C5", "C6", "X")]
    with DatasetWriter(tmp_path / "data", columns) as writer:
        writer.write("train", {column.name: np.zeros(3, np.int32) for column in columns})
        split = {"by": "column", "column": "C5", "train": [1, 2]}
        settings = {"minimum": {"C1": 0, "C2": 5}, "seed": 3, "schema": {"split": split}}
        cells = {"train": {"C2": {"missing": 1, "rare": 0, "unknown": 0}}}
        writer.finish(dataset="mine", protocol="own", settings=settings, cells=cells)
    assert run_inspect(tmp_path / "data") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 rows of dataset mine, protocol own"
    assert "  settings      seed 3" in lines
    assert "  split         by the values of C5: train 1, 2" in lines
    assert next(line for line in lines if line.split()[:1] == ["C2"]).split()[2] == "33.33%"
    at = lines.index("  categorical   C1..C3: a")
    assert lines[at + 1] == "                C5, C6, X: b"
    assert sum("reserved" in line for line in lines) == 1


def test_reserved_rows_are_those_of_the_tables(tmp_path: Path) -> None:
    own, rarest = "have a row of their own", "get the row of the rarest value"
    expected = {
        "a": ((0, 1, 2), f"missing values {own}; rare values {own}; unknown values {own}"),
        "b": ((0, 1, 1), f"missing values {own}; rare and unknown values share a row"),
        "c": ((0, 0, 0), "missing, rare and unknown values share a row"),
        "d": ((501, 501, 501), f"missing, rare and unknown values {rarest}"),
        "e": ((0, 501, 501), f"missing values {own}; rare and unknown values {rarest}"),
        "f": ((0, 501, 501), f"missing values {own}; rare and unknown values {rarest}"),
    }
    columns = [
        Column(
            name=name,
            role="categorical",
            cardinality=502,
            reserved=dict(zip(("missing", "rare", "unknown"), rows, strict=True)),
        )
        for name, (rows, _) in expected.items()
    ]
    # The value of a table of one value has its last row, 1.
    columns.append(Column(name="g", role="categorical", cardinality=2, reserved={"missing": 0, "rare": 1}))
    with DatasetWriter(tmp_path / "data", columns) as writer:
        writer.write("train", {column.name: np.zeros(3, np.int32) for column in columns})
        writer.finish(dataset="mine", protocol="own", report={"distinct": {"g": 1}})
    facts = summary(tmp_path / "data", DatasetSchema.load(tmp_path / "data"))
    words = {column["name"]: column["reserved_rows"] for column in facts["columns"]}
    assert words.pop("g") == f"missing values {own}; rare values {rarest}"
    assert words == {name: said for name, (_, said) in expected.items()}
    text = render(facts)
    assert f"  reserved rows a: {words['a']}\n" in text and f"{' ' * 16}e, f: {words['e']}\n" in text


def test_tables_fit_80_columns_with_long_names(tmp_path: Path) -> None:
    """A name without room in its line stands above its numbers, whole."""
    names = ["C1", "a_very_long_name_of_a_column_of_an_advertiser", "b"]
    reserved = {"missing": 0, "rare": 0, "unknown": 0}
    columns = [Column(name=name, role="categorical", cardinality=9, transform="a", reserved=reserved) for name in names]
    leave = {"columns": {"day": {"role": "leave"}, "C1": {"role": "categorical"}}, "rest": "leave"}
    with DatasetWriter(tmp_path / "data", columns) as writer:
        writer.write("test", {name: np.zeros(5, np.int32) for name in names})
        for name in names:
            writer.write_vocabulary(name, pa.table({"value": ["x", "y", "z"], "count": [1_000_000, 2, 1]}))
        writer.finish(dataset="mine", protocol="schema", settings={"schema": {**leave, "split": {"by": "tenths"}}})
    facts = summary(tmp_path / "data", DatasetSchema.load(tmp_path / "data"))
    assert facts["left_out"] == ["day", "all columns that the schema does not name"]
    lines = render({**facts, "folder": "data"}, 79).splitlines()
    assert max(map(len, lines)) <= 79
    assert lines[0] == "5 rows of dataset mine", "the protocol of all datasets with a schema says nothing"
    assert "  left out      day, all columns that the schema does not name" in lines
    cells = lines[lines.index(names[1]) + 1].split()
    assert cells == ["categorical", "9", "100.00%", "(missing/rare)", "1"]
    text = " ".join(" ".join(lines).split())
    assert "split at random: of every 10 rows 1 is a test and 1 a validation row, seed 0" in text
    assert render(facts).count(names[1]) == 2, "without a terminal, names stay in their lines"


def halves(first: str, second: str) -> str:
    return f"its first half is the {first} split, its second half the {second} split"


@pytest.mark.parametrize(
    ("dataset", "protocol", "settings", "files", "words"),
    [
        (
            "kaggle",
            "dlrm",
            {},
            ["train.txt"],
            "by position: the rows are cut into 7 equal days, of which the last is held out: "
            f"{halves('test', 'validation')}",
        ),
        (
            "terabyte",
            "mlperf",
            {"seed": 3, "negative_sampling_rate": 0.125},
            ["day_0", "day_1"],
            f"by files: day_1, the last one, is held out: {halves('validation', 'test')}; 12.5% of the training rows "
            "with label 0 are kept, drawn from seed 3",
        ),
        (
            "kaggle",
            "bars",
            {"seed": 7},
            ["train.txt"],
            "at random: of every 10 rows 1 is a test and 1 a validation row, seed 7",
        ),
        (
            "log",
            "schema",
            {"schema": {"split": {"by": "time", "column": "hour", "ratios": [0.7, 0.1, 0.2]}}},
            ["a"],
            "by time, in the order of hour: first 70% training, then 10% validation, then 20% test rows",
        ),
        (
            "log",
            "schema",
            {"schema": {"split": {"by": "random", "seed": 1}}},
            ["a"],
            "at random: 80% training, 10% validation, 10% test rows, seed 1",
        ),
        (
            "log",
            "schema",
            {"schema": {"split": {"by": "files", "train": ["a*"], "test": ["b"]}}},
            ["a1", "b"],
            "by the names of the files: train a*; test b",
        ),
        ("demo", "demo", {}, [], "each split is generated on its own"),
        ("mine", "own", {}, [], ""),
        ("mine", "schema", {"schema": 5}, [], ""),
        ("mine", "schema", {"schema": {"split": {"by": "random", "ratios": ["x"]}}}, [], ""),
    ],
)
def test_the_split_is_said_in_words(
    dataset: str, protocol: str, settings: dict[str, object], files: list[str], words: str
) -> None:
    report = {"rows_per_file": [[name, 10] for name in files]}
    schema = DatasetSchema(
        dataset=dataset, protocol=protocol, columns=COLUMNS, splits={}, settings=settings, report=report
    )
    assert split_words(schema) == words
    new = DatasetSchema(
        dataset=dataset, protocol=protocol, columns=COLUMNS, splits={}, settings=settings, report={"unknown": {"C1": 1}}
    )
    assert split_words(new) == "all rows are test rows, because they are encoded with the vocabulary of another dataset"


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_a_split_by_time_with_equal_times_names_its_real_shares(rate: float) -> None:
    """Sampling drops training rows, and does not change how rows were split."""
    split = {"by": "time", "column": "day", "negative_sampling_rate": rate}
    schema = DatasetSchema(
        dataset="log",
        protocol="schema",
        columns=COLUMNS,
        splits={"train": Split(rows=int(800 * rate)), "validation": Split(rows=128), "test": Split(rows=72)},
        settings={"schema": {"split": split}},
        report={"rows_per_file": [["a", 1000]]},
    )
    real = "; rows of equal time stay in one split, so the real shares are 80.0%, 12.8% and 7.2%"
    assert real in split_words(schema)
    equal = {"train": Split(rows=int(800 * rate)), "validation": Split(rows=103), "test": Split(rows=97)}
    assert "real shares" not in split_words(replace(schema, splits=equal))


def test_what_is_suspicious_is_said(tmp_path: Path) -> None:
    """Columns with mostly missing or many unknown values, one value or few bins, and splits with other labels."""
    columns = [COLUMNS[0], *(Column(name=name, role="categorical", cardinality=9) for name in ("C1", "C2"))]
    bins = Column(name="B1", role="categorical", cardinality=9, transform="quantile(30): bins")
    columns += [bins, Column(name="I1", role="dense"), Column(name="M", role="multi_hot", cardinality=9)]
    with DatasetWriter(tmp_path / "data", columns) as writer:
        for split, rows, positives in (("train", 4000, 400), ("validation", 1000, 100), ("test", 1000, 300)):
            arrays = {column.name: np.zeros(rows, np.int32) for column in columns}
            arrays |= {"label": (np.arange(rows) < positives).astype(np.int8), "I1": np.zeros(rows, np.float32)}
            bags = np.zeros(2 * rows, np.int32), np.arange(rows + 1, dtype=np.int32) * 2
            writer.write(split, {**arrays, "M": bags})
        cells = {"test": {"C1": {"unknown": 150}, "C2": {"unknown": 90}, "M": {"unknown": 250, "values": 2000}}}
        writer.finish(
            dataset="mine",
            protocol="own",
            settings={"bins": 30},
            cells=cells,
            report={
                "missing": {"I1": 3100, "M": 1500},
                "distinct": {"B1": 12, "C2": 1},
                "large_numbers": {"I1": 5e6},
            },
        )
    facts = summary(tmp_path / "data", DatasetSchema.load(tmp_path / "data"))
    shares = {column["name"]: (column["missing"], column["unknown"]) for column in facts["columns"]}
    assert shares["M"] == (0.25, 0.125) and shares["C1"] == (0.0, 0.15)
    assert facts["suspicious"] == [
        "30.00% of the test rows are positive, against 10.00% of the training rows",
        "no value in more than half of the rows: I1",
        "over 10% of the validation and test values are unknown in C1, M",
        "one value only: C2",
        "fewer bins than 30, because values repeat: B1 12",
        "large numbers, on which models such as DCN train badly: I1 (up to 5e+06)",
    ]
    lines = render(facts, 79).splitlines()
    assert lines[lines.index("check these:") + 1].startswith("  30.00% of the test rows")
    assert "  top id and 90% of multi-hot columns: not counted here; --plot counts and" in lines


def test_addresses_are_inspected_like_folders(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/inspected", recursive=True)
    options = ("--verify", "--leakage", "--json", "--plot", str(tmp_path / "figure.png"))
    found = []
    for place in (folder, "memory://inspected"):
        assert run_inspect(place, *options) == 0
        found.append(json.loads(capsys.readouterr().out))
        assert found[-1].pop("folder") == str(place)
    assert found[0] == found[1] and (tmp_path / "figure.png").stat().st_size > 10_000
    path = "/inspected/train/part-00000.parquet"
    memory.pipe(path, memory.cat(path)[:-1] + b"x")
    assert run_inspect("memory://inspected") == 0
    assert "--verify compares their checksums too" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"memory://inspected/train/part-00000.parquet is altered: its sha256"):
        run_inspect("memory://inspected", "--verify")
    with pytest.raises(UserError, match="no dataset folder at memory://nothing"):
        run_inspect("memory://nothing")


def flip_last_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def flip_middle_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["train/part-00000.parquet", "vocabulary/C2.parquet"])
@pytest.mark.parametrize("alter", [flip_middle_byte, flip_last_byte])
def test_verify_names_the_altered_file(folder: Path, name: str, alter: Callable[[Path], None]) -> None:
    assert run_inspect(folder, "--verify") == 0
    alter(folder / name)
    with pytest.raises(UserError, match=f"{name} is altered.*make the dataset again"):
        run_inspect(folder, "--verify")


@pytest.mark.parametrize("options", [(), ("--verify",)])
def test_missing_and_truncated_files_are_named(folder: Path, options: tuple[str, ...]) -> None:
    path = folder / "vocabulary/C2.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"C2.parquet is truncated"):
        run_inspect(folder, *options)
    path.unlink()
    with pytest.raises(UserError, match=r"C2.parquet is missing"):
        run_inspect(folder, *options)


def test_unreadable_vocabulary_is_named_without_verify_too(folder: Path) -> None:
    flip_last_byte(folder / "vocabulary/C2.parquet")
    with pytest.raises(UserError, match=r"C2.parquet is altered"):
        run_inspect(folder)


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a dataset folder"):
        run_inspect(tmp_path)


def test_vocabulary_without_counts_and_rows_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with DatasetWriter(tmp_path / "data", COLUMNS[2:3]) as writer:
        writer.write("test", {"C1": np.zeros(5, np.int32)})
        writer.write_vocabulary("C1", pa.table({"hash": pa.array([1], pa.uint32())}))
        writer.finish(dataset="mine", protocol="own")
    assert pq.read_schema(tmp_path / "data/vocabulary/C1.parquet").names == ["hash"]
    assert run_inspect(tmp_path / "data", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["splits"]["test"]["label_mean"] is None and facts["columns"][0]["most_frequent"] is None
    assert run_inspect(tmp_path / "data") == 0
    assert ["test", "5", "100.0%"] in [line.split() for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """All roles, nulls, and many equal rows; no vocabulary. Rows come from few values, so that equal ones occur."""
    columns = (*COLUMNS[:3], Column(name="M", role="multi_hot", cardinality=4))
    generator = np.random.default_rng(0)
    with DatasetWriter(tmp_path / "uneven", columns) as writer:
        for split, rows in (("train", 3_000), ("validation", 700), ("test", 50)):
            lengths = generator.integers(0, 3, rows)
            writer.write(
                split,
                {
                    "label": generator.integers(0, 2, rows).astype(np.int8),
                    "I1": generator.choice(np.array([np.nan, 0.0, -0.0, 1.5], np.float32), rows),
                    "C1": generator.integers(0, 60, rows).astype(np.int32),
                    "M": (
                        generator.integers(0, 3, lengths.sum()).astype(np.int32),
                        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
                    ),
                },
            )
        writer.finish(dataset="mine", protocol="own")
    return tmp_path / "uneven"


def plain_rows(folder: Path, split: str) -> list[tuple[object, ...]]:
    """Features of each row, comparable and hashable; -0.0 equals 0.0 in Python."""
    table = pq.read_table(folder / split)
    names = [name for name in table.column_names if name != "label"]
    return [
        tuple(tuple(value) if isinstance(value, list) else value for value in row)
        for row in zip(*(table.column(name).to_pylist() for name in names), strict=True)
    ]


@pytest.mark.parametrize("run_rows", [1 << 22, 500])
@pytest.mark.parametrize("range_rows", [1 << 23, 100])
def test_leakage_counts_equal_rows(
    uneven: Path, run_rows: int, range_rows: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leakage, "_RUN_ROWS", run_rows)
    monkeypatch.setattr(leakage, "_RANGE_ROWS", range_rows)
    assert run_inspect(uneven, "--leakage", "--json") == 0
    found = json.loads(capsys.readouterr().out)["leakage"]
    counts = {split: Counter(plain_rows(uneven, split)) for split in ("train", "validation", "test")}
    for split, counter in counts.items():
        rows, distinct = sum(counter.values()), len(counter)
        assert found["within"][split] == {
            "rows": rows,
            "distinct": distinct,
            "repeats": rows - distinct,
            "share": (rows - distinct) / rows,
        }
    pairs = [("train", "validation"), ("train", "test"), ("validation", "test")]
    assert [tuple(pair["splits"]) for pair in found["between"]] == pairs
    for pair in found["between"]:
        first, second = pair["splits"]
        both = set(counts[first]) & set(counts[second])
        assert 0 < len(both) == pair["distinct"]
        for split in (first, second):
            assert pair["rows"][split] == sum(counts[split][row] for row in both)
            assert pair["shares"][split] == pair["rows"][split] / sum(counts[split].values())


def test_a_very_frequent_row_takes_no_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of all rows are equal: no range of hashes may hold them all."""
    monkeypatch.setattr(leakage, "_RUN_ROWS", 10_000)
    monkeypatch.setattr(leakage, "_RANGE_ROWS", 10_000)
    rows = 200_000
    ids = np.arange(rows, dtype=np.int32)
    ids[::2] = 7
    column = Column(name="C1", role="categorical", cardinality=rows)
    with DatasetWriter(tmp_path / "data", [column]) as writer:
        writer.write("train", {"C1": ids})
        schema = writer.finish(dataset="mine", protocol="own")
    sizes = []
    read_range = leakage._SortedRuns.range

    def watched(runs: leakage._SortedRuns, number: int) -> tuple[np.ndarray, np.ndarray]:
        sizes.append(sum(int(cuts[number + 1] - cuts[number]) for cuts in runs._cuts))
        return read_range(runs, number)

    monkeypatch.setattr(leakage._SortedRuns, "range", watched)
    facts = leakage.equal_rows(tmp_path / "data", schema, progress=False)
    distinct = len(np.unique(ids))
    assert facts["within"]["train"] == {
        "rows": rows, "distinct": distinct, "repeats": rows - distinct, "share": (rows - distinct) / rows
    }  # fmt: skip
    assert max(sizes) < 10_000 < rows // 2


def test_a_planted_leak_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = np.arange(1_000, dtype=np.int32)
    with DatasetWriter(tmp_path / "data", COLUMNS[2:3]) as writer:
        writer.write("train", {"C1": ids})
        writer.write("validation", {"C1": np.concatenate([ids[:30], ids[:30], 1_000 + ids[:90]])})
        writer.finish(dataset="mine", protocol="own")
    assert run_inspect(tmp_path / "data", "--leakage") == 0
    out = capsys.readouterr().out
    assert "in both train and validation: 60 rows of validation (40.000%), 30 rows of train (3.000%)" in out
    assert "within validation: 30 repeats of an earlier row (20.000%)" in out
    assert "suggests a leak" in out and "within train:" not in out
    with DatasetWriter(tmp_path / "clean", COLUMNS[2:3]) as writer:
        writer.write("train", {"C1": ids})
        writer.write("validation", {"C1": 1_000 + ids[:90]})
        writer.finish(dataset="mine", protocol="own")
    assert run_inspect(tmp_path / "clean", "--leakage") == 0
    out = capsys.readouterr().out
    assert "(without the label): none, within a split or in two splits\n" in out and "repeat" not in out


def test_hash_tells_apart_rows_that_differ_in_one_value() -> None:
    columns = [Column(name=name, role="categorical", cardinality=2**31) for name in "abc"]
    ids = np.concatenate([np.arange(300_000), np.array([2**31 - 1])]).astype(np.int32)
    zeros = np.zeros_like(ids)
    hashes = np.concatenate(
        [
            leakage.content_hashes(pa.record_batch({**dict.fromkeys("abc", zeros), name: ids}), columns)[name != "a" :]
            for name in "abc"
        ]
    )
    assert len(np.unique(hashes)) == len(hashes)


def test_temporary_folder_without_space(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leakage.shutil, "disk_usage", lambda path: argparse.Namespace(free=100))
    with pytest.raises(
        UserError, match=r"the leakage check needs 1\.29 KiB in .*, which has 100 bytes free; set TMPDIR"
    ):
        run_inspect(folder, "--leakage")


@pytest.mark.parametrize("name", ["folder", "uneven"])
def test_skew_is_that_of_the_counts(name: str, request: pytest.FixtureRequest) -> None:
    """C2 of ``folder`` has a vocabulary; the ids of all other columns are counted."""
    folder = request.getfixturevalue(name)
    schema = DatasetSchema.load(folder)
    for skew in all_skews(folder, schema, progress=False):
        values = [
            v for split in schema.splits for v in pq.read_table(folder / split).column(skew.column.name).to_pylist()
        ]
        ids = [id for value in values for id in (value if isinstance(value, list) else [value])]
        counts = sorted(Counter(ids).values(), reverse=True)
        if skew.column.name == "C2":
            counts = [66, 22, 22]
        total = sum(counts)
        assert skew.lookups == total and skew.most_frequent == counts[0] / total
        for share, least in skew.ids_for.items():
            assert sum(counts[:least]) >= share * total > sum(counts[: least - 1])
        x, y = skew.curve
        assert y.tolist() == [sum(counts[: round(of * skew.column.cardinality)]) / total for of in x]
        assert (x[-1], y[-1]) == (len(counts) / skew.column.cardinality, 1.0)


def test_values_that_share_an_id_are_counted_together(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "data", COLUMNS[2:3]) as writer:
        writer.write("test", {"C1": np.zeros(5, np.int32)})
        columns = {"hash": pa.array([None, 7, 8, 9], pa.uint32()), "count": [0, 5, 3, 4], "id": pa.array([0, 2, 1, 2])}
        writer.write_vocabulary("C1", pa.table(columns))
        schema = writer.finish(dataset="mine", protocol="own")
    (skew,) = all_skews(tmp_path / "data", schema, progress=False)
    assert skew.lookups == 12 and skew.most_frequent == 9 / 12 and skew.ids_for == {0.5: 1, 0.9: 2, 0.99: 2}


@pytest.mark.parametrize(("name", "ending"), [("folder", "png"), ("uneven", "svg"), ("uneven", "pdf")])
def test_plot_writes_a_figure(
    name: str, ending: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"tables.{ending}"
    assert run_inspect(request.getfixturevalue(name), "--plot", str(path)) == 0
    assert str(path) in capsys.readouterr().out
    content = path.read_bytes()
    assert content.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending])
    if ending == "svg":  # each text stands beside its outlines as a comment
        assert b"<!-- C1 -->" in content and b"<!-- 1,234 -->" in content


def test_nothing_is_imported_that_only_a_plot_needs() -> None:
    program = "import sys; import datamodules.preprocess.inspect_command; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("file", "message"),
    [("tables.doc", r"tables.doc does not have the suffix of a figure"), ("no/tables.png", "cannot write")],
)
def test_plot_mistakes(folder: Path, file: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run_inspect(folder, "--plot", str(tmp_path / file))


def test_dataset_without_tables_or_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, columns in (("dense", COLUMNS[:2]), ("label", COLUMNS[:1])):
        with DatasetWriter(tmp_path / name, columns) as writer:
            arrays = {"label": np.zeros(5, np.int8), "I1": np.ones(5, np.float32)}
            writer.write("train", {column.name: arrays[column.name] for column in columns})
            writer.finish(dataset="mine", protocol="own")
        with pytest.raises(UserError, match="no tables to plot"):
            run_inspect(tmp_path / name, "--plot", str(tmp_path / "tables.png"))
    assert run_inspect(tmp_path / "dense", "--leakage") == 0
    assert "within train: 4 repeats of an earlier row (80.000%)" in capsys.readouterr().out
    with pytest.raises(UserError, match="no features"):
        run_inspect(tmp_path / "label", "--leakage")
