"""Contract: ``inspect`` tells what a dataset folder holds, and ``--verify`` finds any altered byte."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.parquet import DatasetWriter
from datamodules.preprocess import command
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import Column, DatasetSchema, Optimum

COLUMNS = (
    Column(name="label", role="label"),
    Column(name="I1", role="dense", transform="as it is"),
    Column(name="C1", role="categorical", cardinality=1234),
    Column(name="C2", role="categorical", cardinality=3, reserved={"missing": 0}),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """100 rows for training, a quarter of them positive, and 10 for validation, none positive."""
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
            report={"missing": {"I1": 11, "C1": 0}, "rows_per_file": [["raw.txt", 110]]},
        )
    return tmp_path / "data"


def run_inspect(folder: Path, *options: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_inspect_arguments(parser)
    return command.run_inspect(parser.parse_args([str(folder), *options]))


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
    assert {name: (c["cardinality"], c["missing"], c["most_frequent"]) for name, c in columns.items()} == {
        "label": (0, None, None),
        "I1": (0, 0.1, None),
        "C1": (1234, 0.0, None),
        "C2": (3, None, 0.6),
    }
    assert facts["optimum"] == {"validation": {"auc": 0.8125, "log_loss": 0.4321}}


def test_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_inspect(folder, "--verify") == 0
    out = capsys.readouterr().out
    words = [line.split() for line in out.splitlines()]
    assert ["train", "100", "90.9%", "0.2500", "1"] in words
    assert ["I1", "dense", "10.00%"] in words
    assert ["C1", "categorical", "1,234", "0.00%"] in words
    assert ["C2", "categorical", "3", "60.00%", "0", "missing"] in words
    assert ["all", "tables", "1,237"] in words
    for text in ("max_rows 5000", "raw.txt (110 rows)", "AUC 0.8125", "as it is", "every file has its checksum"):
        assert text in out, text
    assert DatasetSchema.load(folder).encoding_fingerprint[:16] in out


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
    assert ["test", "5", "100.0%", "1"] in [line.split() for line in capsys.readouterr().out.splitlines()]
