"""Contract: ``bench loader`` compares epochs, alone and one after the other, with bare decoding of the same files."""

import json
from pathlib import Path

import pytest

from datamodules.generate.random import RandomSettings, generate_random
from lightning_dlrm.__main__ import main
from lightning_dlrm.bench import loader


def test_epochs_on_end_are_timed_with_their_seams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = RandomSettings(tables=(30, 40), dense=3, train_rows=3200, validation_rows=0, test_rows=0)
    generate_random(settings, tmp_path / "data", progress=False)
    begun: list[tuple[int, int]] = []
    begin = loader.TrainingLoader._begin
    monkeypatch.setattr(loader.TrainingLoader, "_begin", lambda self, *at: (begun.append(at), begin(self, *at))[1])
    options = ["--data", str(tmp_path / "data"), "--threads", "2", "--rounds", "1", "--json", str(tmp_path / "rows")]
    assert main(["bench", "loader", "--only", "epochs", *options]) == 0
    (row,) = json.loads((tmp_path / "rows").read_text())
    # 32 batches of 100 rows; two epochs before those that count, and one after them.
    assert row["case"] == "epochs of 32, shuffle window, 2 threads, batches of 100" and row["samples"] == 4 * 3200
    assert begun == [(epoch, 0) for epoch in range(7)]
    assert 0 < row["seam_s"] < row["median_s"] and row["of_baseline"] > 0 and row["of_baseline_cpu"] > 0
    assert main(["bench", "loader", *options, "--batch-sizes", "64"]) == 0
    cases = [row["case"] for row in json.loads((tmp_path / "rows").read_text())]
    assert cases[-1].startswith("epochs of 32") and "first batch, 2 threads, batches of 64" in cases
