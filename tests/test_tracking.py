"""Contract: W&B never prompts, waits or fails a run; the run folder holds one line a step, whole files
only, and never overwrites a run."""

import json
import math
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.tracking.run_folder import JsonLinesLogger, RunFolder
from lightning_dlrm.tracking.wandb_run import choose_mode, offline_folder, start_wandb


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.mark.usefixtures("no_account")
class TestMode:
    def test_without_a_key_offline(self) -> None:
        assert choose_mode("auto") == ("offline", "no API key")
        assert choose_mode("online") == ("offline", "no API key")

    def test_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert choose_mode("disabled") == ("disabled", "")
        assert choose_mode("offline")[0] == "offline"
        monkeypatch.setenv("WANDB_MODE", "disabled")
        assert choose_mode("auto") == ("disabled", "")
        assert choose_mode("offline")[0] == "offline", "the option is nearer than the environment"

    @pytest.mark.parametrize("where", ["environment", "netrc"])
    def test_with_a_key_online_where_the_server_answers(
        self, where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        if where == "environment":
            monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        else:
            (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password " + "0" * 40 + "\n")
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
            assert choose_mode("auto") == ("online", "")
        start = time.monotonic()
        assert choose_mode("auto") == ("offline", "127.0.0.1 does not answer")
        assert time.monotonic() - start < 5


def test_offline_run_is_read_back(tmp_path: Path) -> None:
    logger, reason = start_wandb(
        tmp_path,
        mode="offline",
        reason="no API key",
        project="p",
        name="n",
        group="g",
        tags=("t",),
        config={"model": {"width": 16}},
    )
    logger.log_metrics({"validation/auc": 0.75}, step=7)
    logger.log_hyperparams({"parameters/total": 540})
    folder = offline_folder(logger)
    logger.experiment.finish()
    assert reason == "no API key"
    assert folder.is_relative_to(tmp_path)
    read = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    records = [json.loads(line) for line in read.stdout.splitlines()]
    text = json.dumps(records)
    assert '"width": 16' in text and '"parameters/total": 540' in text
    history = [r for r in records if r["type"] == "history"]
    assert len(history) == 1 and "0.75" in json.dumps(history) and "validation/auc" in json.dumps(history)


def test_a_server_that_refuses_leaves_the_run_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lightning_dlrm.tracking import wandb_run

    real = wandb_run.wandb.init

    def refusing(**options: Any) -> Any:
        if options["mode"] == "online":
            raise wandb_run.wandb.Error("permission\ndenied")
        return real(**options)

    monkeypatch.setattr(wandb_run.wandb, "init", refusing)
    logger, reason = start_wandb(
        tmp_path, mode="online", reason="", project="p", name="n", group=None, tags=(), config={}
    )
    logger.experiment.finish()
    assert reason == "permission denied"


def test_one_line_a_step(tmp_path: Path) -> None:
    logger = JsonLinesLogger(RunFolder(tmp_path))
    logger.log_metrics({"train/loss": 0.5}, step=1)
    logger.log_metrics({"train/loss": 0.4}, step=2)
    logger.log_metrics({"validation/auc": 0.7, "validation/calibration": math.nan}, step=2)
    logger.log_metrics({"train/loss": 0.3}, step=3)
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
        with pytest.raises(UserError, match="exists and is not empty"):
            RunFolder.create(path, "m")
    with pytest.raises(UserError, match="cannot make the run folder"):
        RunFolder.create(tmp_path / "empty/summary.json/below", "m")
