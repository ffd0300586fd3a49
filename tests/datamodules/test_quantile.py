"""Contract: protocol ``quantile`` keeps integers of different click rates apart, and no row of a table that training
never touched answers for a value; ``modern``, which it supersedes, does neither. Edges of bins are exact.

``test_preprocess`` compares every value of ``quantile`` with a plain version.
"""

import argparse
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from datamodules.preprocess import inspect_command, transforms
from datamodules.preprocess.pipeline import preprocess
from datamodules.preprocess.progress import Progress
from datamodules.preprocess.protocols import PROTOCOLS
from datamodules.preprocess.transforms import quantile_bins, quantile_edges
from lightning_dlrm.__main__ import main
from lightning_dlrm.cli.report import cells_note
from lightning_dlrm.contracts.schema import DatasetSchema
from tests.raw_criteo import Line, edges_of, written

QUIET = Progress(show=False)
INT32 = st.one_of(st.integers(-3, 3), st.integers(-(2**31), 2**31 - 1))


@given(st.lists(st.lists(INT32), max_size=4), st.integers(2, 40), st.sampled_from([0, 1 << 22]))
@example([[5, 5], [5]], 30, 0)
@example([[], []], 30, 0)
def test_edges_of_pieces_are_those_of_all_values(pieces: list[list[int]], bins: int, few: int) -> None:
    arrays = [np.array(piece, np.int32) for piece in pieces]
    values = [value for piece in pieces for value in piece]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transforms, "_FEW_VALUES", few)
        edges = quantile_edges(lambda: arrays, bins)
    assert edges == edges_of([str(value) for value in values], bins)
    found = quantile_bins(np.array(values, np.int32), edges)
    assert found.tolist() == [sum(edge < value for edge in edges) for value in values]
    assert len({*found.tolist()}) == (len(edges) + 1 if values else 0) <= bins, "every bin holds values"


def test_counts_of_values_are_held_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "_FEW_VALUES", 0)
    values = np.linspace(-(2**31), 2**31 - 1, 5_000).astype(np.int32)
    counts = 64 * 4096 * 8  # of 12 bits, int64, if each of 64 bins ends in a block of its own
    tracemalloc.start()
    try:
        edges = quantile_edges(lambda: [values[:2_500], values[2_500:]], 64)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(edges) == 63 and counts < peak < 5 * counts


def rows_of_last_day(lines: int) -> range:
    return range(lines - lines // 7, lines)


def planted_lines(rates: dict[int, float]) -> list[Line]:
    """Rows whose clicks depend on I11 alone, at an exact rate for each value; C1 has other values on the last day."""
    lines = []
    for value, rate in rates.items():
        lines += [["01"[row < 200 * rate], *[""] * 10, str(value), *[""] * 28] for row in range(200)]
    lines = [line for part in range(200) for line in lines[part::200]]
    for number, line in enumerate(lines):
        line[14] = f"{number:08x}" if number in rows_of_last_day(len(lines)) else "ffffffff"
    return lines


def cross_entropy(clicks: np.ndarray, groups: np.ndarray) -> float:
    """The log loss of each group's own click rate: the best that any model of the group can reach."""
    total = 0.0
    for group in np.unique(groups):
        rate = clicks[groups == group].mean()
        total -= np.sum(clicks[groups == group] * np.log(rate) + (1 - clicks[groups == group]) * np.log(1 - rate))
    return total / len(clicks)


def test_bins_lose_no_clicks_and_every_id_is_trained(tmp_path: Path) -> None:
    raw = written(tmp_path / "train.txt", planted_lines({1: 0.2, 2: 0.45, 3: 0.35, 4: 0.35, 5: 0.15}))
    lost, untrained = {}, {}
    for protocol in ("quantile", "modern"):
        preprocess("kaggle", protocol, [raw], tmp_path / protocol, progress=QUIET)
        train, held_out = (pq.read_table(tmp_path / protocol / split) for split in ("train", "test"))
        clicks = train.column("label").to_numpy()
        by_value = cross_entropy(clicks, train.column("I11").to_numpy())
        lost[protocol] = cross_entropy(clicks, train.column("B11").to_numpy()) - by_value
        untrained[protocol] = {*held_out.column("C1").to_pylist()} - {*train.column("C1").to_pylist()}
    assert lost["quantile"] == 0 and lost["modern"] > 0.01, "1, 3 and 4 are one category of modern, 2 and 5 another"
    assert untrained == {"quantile": set(), "modern": {2}}


def lines_of(i1: str, i2: str, i3: str, rows: int = 140) -> list[Line]:
    return [["01"[row % 2], i1, i2, i3 and str(row % 3), *[""] * 36] for row in range(rows)]


def test_columns_without_values_or_with_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bins of one value, of none, and of fewer values than bins are made and named; new rows find trained ids."""
    raw = written(tmp_path / "train.txt", lines_of("7", "", "some"))
    preprocess("kaggle", "quantile", [raw], tmp_path / "known", progress=QUIET)
    new = written(tmp_path / "new.txt", lines_of("9", "3", "", rows=3))
    preprocess(None, None, [new], tmp_path / "new", progress=QUIET, vocabulary=tmp_path / "known")
    parser = argparse.ArgumentParser()
    inspect_command.add_arguments(parser)
    notes = {}
    for flag in ("--json", "--verify"):
        assert inspect_command.run(parser.parse_args([str(tmp_path / "known"), flag])) == 0
        notes[flag] = capsys.readouterr().out
    columns = {column["name"]: column["note"] for column in json.loads(notes["--json"])["columns"]}
    assert (columns["B1"], columns["B2"], columns["B3"]) == ("one value", "all missing", "3 of at most 30 bins")
    assert "fewer bins than 30, because values repeat: B3 3" in notes["--verify"]
    assert "one value only: B1" in notes["--verify"]
    schema = DatasetSchema.load(tmp_path / "known")
    assert schema.settings["edges"]["I1"] == schema.settings["edges"]["I2"] == [] and schema.settings["bins"] == 30
    train, rows = (pq.read_table(tmp_path / place) for place in ("known/train", "new/test"))
    for name in ("B1", "B2", "B3"):
        assert {*rows.column(name).to_pylist()} <= {*train.column(name).to_pylist()}, name


def test_shares_are_told_by_fit_and_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = written(tmp_path / "train.txt", planted_lines({1: 0.5, 2: 0.5}))
    schema = preprocess("kaggle", "quantile", [raw], tmp_path / "out", progress=QUIET)
    held_out = f"{1 / 39:.2%} unknown, {37 / 39:.2%} missing (unknown most in C1 100%)"
    assert cells_note(schema) == (
        f"ids of unknown, rare and missing values: train {37 / 39:.2%} missing; validation {held_out}; test {held_out}"
    )
    assert main(["inspect", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "unknown, rare: shares of the values of all tables" in shown and f"{1 / 39:.2%}" in shown
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    of_test = json.loads(capsys.readouterr().out)["splits"]["test"]
    assert [of_test[kind] for kind in ("unknown", "rare", "missing")] == pytest.approx([1 / 39, 0, 37 / 39])


def test_modern_names_the_protocol_that_supersedes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = written(tmp_path / "train.txt", lines_of("1", "2", "3"))
    preprocess("kaggle", "modern", [raw], tmp_path / "out")
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "modern" in line)
    assert line == PROTOCOLS["modern"].superseded_by and "superseded by quantile" in line
    preprocess(None, None, [raw], tmp_path / "new", vocabulary=tmp_path / "out")
    assert "superseded by" not in capsys.readouterr().err, "a vocabulary decides the protocol"
