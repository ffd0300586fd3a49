"""Contract: ``bench preprocess`` times the real command, the bare parse and the peer on the same rows, counts the
memory of all processes of each, and leaves nothing behind."""

import argparse
import json
import sys
from pathlib import Path

import pytest

from datamodules.generate.tsv import TsvSettings, generate_tsv
from lightning_dlrm.__main__ import main
from lightning_dlrm.bench import preprocess
from lightning_dlrm.bench.measurement import Measurement
from lightning_dlrm.bench.processes import Footprint, run_process
from lightning_dlrm.contracts.errors import UserError


def bench(*options: str) -> list[Measurement]:
    parser = argparse.ArgumentParser()
    preprocess.add_arguments(parser)
    return preprocess.run(parser.parse_args(list(options), argparse.Namespace(work="preprocess")))


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    """Looks like a checkout of facebookresearch/dlrm: counts the lines of its input, and takes its time."""
    folder = tmp_path / "peer"
    folder.mkdir()
    (folder / "data_utils.py").write_text(
        "import pathlib, time\n"
        "def getCriteoAdData(path, name, randomize, criteo_kaggle):\n"
        "    assert len(pathlib.Path(path).read_text().splitlines()) == 150\n"
        "    print('Load 1/150')\n"
        "    time.sleep(2)\n"
    )
    return folder


@pytest.fixture
def numpy_1(tmp_path: Path) -> Path:
    """An interpreter that finds an old NumPy."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old/numpy.py").write_text("__version__ = '1.26.4'\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "old"} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def test_rows_of_all_contenders(tmp_path: Path, peer: Path, numpy_1: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, scratch = tmp_path / "raw.txt", tmp_path / "scratch"
    generate_tsv(TsvSettings(rows=2_000), [raw], progress=False)
    scratch.mkdir()
    options = ["--input", str(raw), "--folder", str(scratch), "--rounds", "1", "--json", str(tmp_path / "rows.json")]
    options += ["--peer", str(peer), "--peer-python", str(numpy_1), "--peer-rows", "150", "--baseline-rows", "500"]
    assert main(["bench", "preprocess", *options]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["implementation"], row["samples"]) for row in rows] == [
        ("ours", 2_000),
        ("baseline", 500),
        ("ours", 150),
        ("peer", 150),
    ]
    ours, baseline, few, other = rows
    assert all(30e6 < row["peak_bytes"] < 2e9 and row["cpu_s"] > 0 for row in rows[:3])
    assert ours["speed_over_baseline"] == pytest.approx((2_000 / ours["median_s"]) / (500 / baseline["median_s"]))
    assert other["median_s"] > 2 and few["speed_over_peer"] == pytest.approx(other["median_s"] / few["median_s"])
    assert ours["speed_over_peer"] == pytest.approx((2_000 / ours["median_s"]) / (150 / other["median_s"]))
    assert 0 < ours["stage_s"] + ours["count_s"] + ours["encode_s"] < ours["median_s"]
    assert 1_000 < ours["largest_table_rows"] <= 2_000 and ours["output_bytes"] > few["output_bytes"] > 0
    assert raw.is_file() and not any(scratch.iterdir())
    assert "prediction" not in capsys.readouterr().out  # of so few rows none is made


def test_generates_rows_by_itself(tmp_path: Path) -> None:
    rows = bench("--rows", "700", "--rounds", "1", "--folder", str(tmp_path), "--dataset", "terabyte")
    assert [(row.implementation, row.samples) for row in rows] == [("ours", 700), ("baseline", 700)]
    assert "terabyte" in rows[0].case and not any(tmp_path.iterdir())


def test_memory_is_that_of_all_processes(tmp_path: Path) -> None:
    child = "import time; held = bytearray(b'1') * 100_000_000; time.sleep(1.5)"
    program = "import subprocess, sys; held = bytearray(b'1') * 60_000_000\n"
    program += f"subprocess.run([sys.executable, '-c', {child!r}])"
    footprint = Footprint(None)
    seconds, _ = run_process("two", [sys.executable, "-c", program], footprint)
    assert 160e6 < footprint.peak_bytes < 230e6
    assert seconds > 1.5
    assert len(footprint.cpu_of) == 2 and footprint.cpu_s > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "--rounds is 0"),
        (["--input", "nowhere"], "--input nowhere is not a file"),
        (["--input", "raw.gz"], "raw.gz is compressed"),
        (["--peer", "."], r"--peer \. is not a checkout"),
        (["--folder", "nowhere"], "--folder nowhere is not a folder"),
        (["--rows", "0"], "--rows is 0"),
        (["--rows", "200", "--protocol", "none"], "preprocess failed: .*unknown protocol 'none'"),
    ],
)
def test_mistakes(options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("raw.gz").touch()
    with pytest.raises(UserError, match=message):
        bench(*options)


def test_peer_on_numpy_2_is_told(peer: Path) -> None:
    message = r"^the peer \S+ \(run by \S+\) failed: NumPy \S+ found, which it fails on; name an interpreter"
    with pytest.raises(UserError, match=message):
        bench("--rows", "200", "--rounds", "1", "--peer", str(peer), "--peer-rows", "150")


def test_prediction_is_arithmetic_on_the_costs() -> None:
    """Kaggle, worked out by hand: 1 and 10 nodes of 16 cores at 70% speed, the largest column 30% of all counting."""
    cost = preprocess.Cost(
        core_s={"stage": 2e-6, "count": 1e-6, "encode": 3e-6}, disk_bytes=100, output_bytes=40, worker_bytes=2e8
    )
    kaggle = preprocess.TARGETS[0]
    one, ten = (preprocess.predict(cost, kaggle, nodes) for nodes in (1, 10))
    rows = 45_840_617
    assert one["stage"] == pytest.approx(rows * 2e-6 / 11.2) and ten["stage"] == pytest.approx(rows * 2e-6 / 112)
    assert one["count"] == ten["count"] == pytest.approx(rows * 1e-6 * 10_131_227 / 33_762_577)
    # The disk bounds one node: 250 bytes of text, and 100 written and read.
    assert one["total"] == pytest.approx(max(one["stage"] + one["count"] + one["encode"], rows * 450 / 1e9))
    assert ten["total"] == pytest.approx(ten["stage"] + ten["count"] + ten["encode"])
    assert one["memory"] == ten["memory"] == 16 * 2e8
    assert (one["disk"], one["output"]) == (rows * 100, rows * 40)
    text = preprocess.render_predictions(cost)
    assert text.startswith("prediction, not measured") and text.count("kaggle") == text.count("terabyte") == 2


def test_a_log_is_read_by_its_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = bench("--dataset", "log", "--rows", "3000", "--rounds", "1", "--folder", str(tmp_path))
    assert [(row.implementation, row.samples) for row in rows] == [("ours", 3000), ("baseline", 3000)]
    assert rows[0].case == "3,000 rows, log, schema" and 0 < rows[0].extra["speed_over_baseline"] < 1
    assert "prediction" not in capsys.readouterr().out and list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="--peer reads Criteo's files only"):
        bench("--dataset", "avazu", "--peer", str(tmp_path))
