"""Contract: configurations and options of earlier releases keep working, and the log says what took their place."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_dlrm.__main__ import main
from lightning_dlrm.contracts.shipped import shipped_configs
from lightning_dlrm.engine import retired
from lightning_dlrm.engine.retired import ChangedOption, RemovedOption, update_document, update_options

REMOVED = tuple(RemovedOption(key=f"model.{name}", replacement="model.modern") for name in ("old_switch", "old_mode"))


def to_torch(value: Any) -> Any:
    """The form that a rule of ours has, to that of a class of torch.optim."""
    if not isinstance(value, dict) or "learning_rate" not in value.get("init_args", {}):
        return value
    rate = value["init_args"].pop("learning_rate")
    return {**value, "init_args": {**value["init_args"], "lr": rate}}


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = ChangedOption(
        key="model.rule", rewrite=to_torch, renamed={"learning_rate": "lr"}, note="model.rule has lr now"
    )
    monkeypatch.setattr(retired, "REMOVED", REMOVED)
    monkeypatch.setattr(retired, "CHANGED", (changed,))


def test_documents() -> None:
    rule = {"class_path": "SGD", "init_args": {"learning_rate": 0.1, "nesterov": True}}
    old = {"model": {"old_switch": True, "old_mode": 3, "seed": 1, "rule": rule}, "trainer": None}
    before = copy.deepcopy(old)
    new, notes = update_document(old)
    rule = {"class_path": "SGD", "init_args": {"nesterov": True, "lr": 0.1}}
    assert new == {"model": {"seed": 1, "rule": rule}, "trainer": None} and old == before
    removal = "model.old_switch and model.old_mode of an earlier release are ignored: use model.modern instead"
    assert notes == [removal, "model.rule has lr now"]
    assert update_document(new) == (new, [])


def test_options() -> None:
    old = ["--model.old_switch", "false", "--model.old_mode=3", "--a", "1", "--flag", "--model.rule.learning_rate", "2"]
    new, notes = update_options(old)
    assert new == ["--a", "1", "--flag", "--model.rule.lr=2"] and len(notes) == 2
    new, _ = update_options(["--model.rule", "{class_path: SGD, init_args: {learning_rate: 0.5}}", "positional"])
    assert yaml.safe_load(new[0].removeprefix("--model.rule="))["init_args"] == {"lr": 0.5} and new[1:] == [
        "positional"
    ]
    assert update_options(new) == (new, [])


@pytest.mark.parametrize("written", [["--config", "old.yaml"], ["--config=old.yaml"]])
def test_old_files_open(
    written: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    document = yaml.safe_load((shipped_configs() / "dlrm.yaml").read_text())
    document["model"]["old_switch"] = True
    Path("old.yaml").write_text(yaml.safe_dump(document))
    with caplog.at_level(logging.INFO, logger="lightning_dlrm"):
        assert main(["params", *written, "--model.old_mode", "x"]) == 0
    assert [record.message for record in caplog.records] == [
        "command line: model.old_mode of an earlier release is ignored: use model.modern instead",
        "old.yaml: model.old_switch of an earlier release is ignored: use model.modern instead",
    ]
