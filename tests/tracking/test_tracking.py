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


def test_only_the_process_that_makes_a_folder_owns_it(tmp_path: Path) -> None:
    assert [RunFolder.create(tmp_path / "new", "m").is_new for _ in range(2)] == [True, False]


def test_lines_that_are_no_text_are_set_aside(tmp_path: Path) -> None:
    whole, later = b'{"step": 1, "train/loss": 0.5}\n', b'{"step": 2, "train/loss": 0.4}\n'
    (tmp_path / "metrics.jsonl").write_bytes(whole + b'{"step": 1, "tr\xff\n' + later)
    RunFolder(tmp_path).set_lines_aside(1)
    (aside,) = tmp_path.glob("metrics-*.jsonl")
    assert aside.read_bytes() == b'{"step": 1, "tr\xff\n' + later
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    "damaged", [b"trainer: {max_steps: 2020-13-45}\n", b"trainer: \xff\n", b"a: 1\na: 1\n", b"[" * 9999, b"- 1\n"]
)
def test_a_damaged_configuration_is_kept(damaged: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(damaged)
    RunFolder(tmp_path).write_start("trainer: {max_steps: 2}\n", {})
    (kept,) = tmp_path.glob("config-*.yaml")
    assert kept.read_bytes() == damaged
    RunFolder(tmp_path).write_start("trainer: {max_steps: 3}\n", {})
    assert len(list(tmp_path.glob("config-*.yaml"))) == 1


def test_an_existing_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert RunFolder.create(tmp_path / "empty", "m").path == tmp_path / "empty"
    (tmp_path / "empty/summary.json").write_text("{}")
    for path in (tmp_path / "empty", tmp_path / "empty/summary.json"):
        with pytest.raises(UserError, match=r"exists and is not empty|is a file"):
            RunFolder.create(path, "m")
    with pytest.raises(UserError, match=r"summary\.json is a file; choose another --run_dir"):
        RunFolder.create(tmp_path / "empty/summary.json/below", "m")
