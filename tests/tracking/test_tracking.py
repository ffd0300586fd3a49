"""Contract: the run folder holds one line a step, whole files only, and never overwrites a run."""

import json
import math
from pathlib import Path

import pytest
import torch

from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.tracking.run_folder import JsonLinesLogger, RunFolder


def test_one_line_a_step(tmp_path: Path) -> None:
    logger = JsonLinesLogger(RunFolder(tmp_path))
    logger.log_metrics({"train/loss": 0.5}, step=1)
    logger.log_metrics({"train/loss": 0.4}, step=2)
    logger.log_metrics({"validation/auc": 0.7, "validation/calibration": math.nan}, step=2)
    # As callbacks of Lightning log them.
    logger.log_metrics({"train/loss": torch.tensor(0.3, dtype=torch.float64)}, step=3)
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 1, "train/loss": 0.5},
        {"step": 2, "train/loss": 0.4, "validation/auc": 0.7, "validation/calibration": None},
        {"step": 3, "train/loss": 0.3},
    ]


def test_runs_of_one_day_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [RunFolder.create(None, "dlrm").path.name for _ in range(2)]
    assert names[0].endswith("-dlrm-1") and names[1].endswith("-dlrm-2")


def test_an_existing_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert RunFolder.create(tmp_path / "empty", "m").path == tmp_path / "empty"
    (tmp_path / "empty/summary.json").write_text("{}")
    for path in (tmp_path / "empty", tmp_path / "empty/summary.json"):
        with pytest.raises(UserError, match=r"exists and is not empty|is a file"):
            RunFolder.create(path, "m")
    with pytest.raises(UserError, match="cannot create the run folder"):
        RunFolder.create(tmp_path / "empty/summary.json/below", "m")
