"""Contract: W&B never prompts, waits or fails a run; what a run tells it, read back by its own reader, is what its
users expect: samples as the x axis, the best of the validations, groups and job types, plots, artifacts, one run
across resumes."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb
import wandb_workspaces.reports.v2 as wr
from jsonargparse import Namespace

from datamodules.criteo import Criteo
from datamodules.generate.demo import DemoSettings
from lightning_dlrm.__main__ import main
from lightning_dlrm.cli.loggers import check_api_key, make_loggers
from lightning_dlrm.cli.parser import WandbSettings
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.engine.metrics_logger import NormLogger
from lightning_dlrm.tracking.dashboard import Dashboard
from lightning_dlrm.tracking.panels import panels_of
from lightning_dlrm.tracking.run_folder import RunFolder
from lightning_dlrm.tracking.wandb_mode import choose_mode
from lightning_dlrm.tracking.wandb_run import RunPlace, WandbExtras, start_wandb
from tests.caches import new_cache
from tests.cli.test_cli import FIT, QUICK
from tests.engine.test_fit import lines, trainer_of
from tests.toy import ToyData, ToyLoader, toy_dlrm, toy_module


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
        with pytest.raises(UserError, match="is online, but there is no API key: run wandb login"):
            check_api_key("fit", None, Namespace(mode="online"))
        check_api_key("fit", False, Namespace(mode="online"))

    def test_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert choose_mode("disabled") == ("disabled", "")
        assert choose_mode("offline")[0] == "offline"
        monkeypatch.setenv("WANDB_MODE", "disabled")
        assert choose_mode("auto") == ("disabled", "")
        assert choose_mode("offline")[0] == "offline", "the option is nearer than the environment"

    def test_a_wrong_mode_in_the_environment_is_refused_and_an_empty_one_is_none(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WANDB_MODE", "nonsense")
        with pytest.raises(UserError, match="WANDB_MODE is nonsense; set it to online, offline or disabled"):
            choose_mode("auto")
        monkeypatch.setenv("WANDB_MODE", "")
        assert choose_mode("auto") == ("offline", "no API key")
        assert "WANDB_MODE" not in os.environ, "W&B would refuse it"

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


def test_a_server_that_refuses_leaves_the_run_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lightning_dlrm.tracking import wandb_run

    real = wandb_run.wandb.init

    def refusing(**options: Any) -> Any:
        if options["mode"] == "online":
            raise wandb_run.wandb.Error("permission\ndenied")
        return real(**options)

    monkeypatch.setattr(wandb_run.wandb, "init", refusing)
    logger, reason = start_wandb(tmp_path, RunPlace(project="p", name="n"), mode="online", config={})
    logger.experiment.finish()
    assert reason == "permission denied"


def test_a_setting_that_wandb_refuses_is_one_line(tmp_path: Path) -> None:
    place = RunPlace(project="test", name="run", tags=["t" * 65])
    with pytest.raises(UserError, match=r"^W&B refuses a setting: [^\n]*65 characters[^\n]*; correct the option"):
        start_wandb(tmp_path, place, mode="offline", config={})


def test_names_of_the_environment_count_unless_options_are_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def place(**options: str) -> RunPlace:
        from lightning_dlrm.tracking import wandb_run

        given: list[RunPlace] = []
        monkeypatch.setattr(wandb_run, "start_wandb", lambda _, place, **__: (given.append(place), ""))
        settings = Namespace(**vars(WandbSettings(mode="offline", **options)))
        make_loggers("fit", RunFolder(tmp_path), None, settings, {})
        return given[0]

    assert (place().project, place().name, place().job_type) == ("lightning_dlrm", tmp_path.name, "train")
    for name in ("PROJECT", "NAME", "JOB_TYPE"):
        monkeypatch.setenv(f"WANDB_{name}", f"of the environment: {name}")
    assert place().project == "of the environment: PROJECT" and place().name == "of the environment: NAME"
    assert place().job_type == "of the environment: JOB_TYPE"
    asked = place(project="p", name="n", job_type="j")
    assert (asked.project, asked.name, asked.job_type) == ("p", "n", "j")


def test_tags_of_the_environment_count_unless_options_are_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # W&B reads WANDB_TAGS, once in a process, if it is given None.
    for tags, expected in (((), None), (("mine",), ["mine"])):
        given: list[object] = []
        monkeypatch.setattr(wandb, "init", lambda given=given, **options: given.append(options["tags"]) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start_wandb(tmp_path, RunPlace(project="test", name="run", tags=tags), mode="offline", config={})
        assert given == [expected]


def read_back(run: Path) -> list[dict[str, Any]]:
    """The records of an offline run, by W&B's own reader."""
    # Not the W&B service that runs of this process may have left in the environment.
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    read = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    assert read.returncode == 0, read.stderr
    return [json.loads(line) for line in read.stdout.splitlines()]


def of_type(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in records if record["type"] == kind]


def merged(records: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """What a run's configuration or summary is in the end."""
    whole: dict[str, Any] = {}
    for record in of_type(records, kind):
        whole |= record["update"]
    return whole


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fit of 8 steps that is resumed for 8 more, and a test of it."""
    run = tmp_path_factory.mktemp("w") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
            patch.delenv(name, raising=False)
        patch.setenv("NETRC", str(run.parent / "netrc"))
        patch.setenv("LIGHTNING_DLRM_CACHE", new_cache(run.parent / "cache"))
        patch.chdir(run.parent)
        place = ["--wandb.project", "p", "--wandb.group", "figure 5", "--wandb.tags", "[night, dlrm]"]
        fit = [*FIT, *QUICK[:2], *place, "--wandb.log_model", "true", "--trainer.val_check_interval", "4"]
        fit += ["--log_norms", "true"]
        assert main([*fit, "--run_dir", "run", "--trainer.max_steps", "8"]) == 0
        assert main([*fit, "--run_dir", "run", "--resume", "auto", "--trainer.max_steps", "16"]) == 0
        again = ["--config", "run/config.yaml", "--ckpt_path", "run/checkpoints/best"]
        assert main(["test", *again]) == 0
    return run


@pytest.fixture(scope="module")
def runs(finished_run: Path) -> list[list[dict[str, Any]]]:
    """What W&B's reader finds: the fit, its resumption, the test."""
    return [read_back(path) for path in sorted((finished_run / "wandb").glob("offline-run-*"))]


def test_runs_appear_where_they_belong(runs: list[list[dict[str, Any]]], finished_run: Path) -> None:
    heads = [of_type(records, "run")[0] for records in runs]
    assert [head["job_type"] for head in heads] == ["train", "train", "test"]
    for head in heads:
        assert head["project"] == "p" and head["run_group"] == "figure 5" and head["tags"] == ["night", "dlrm"]
        assert head["display_name"] == "run"
    config = heads[0]["config"]["update"]
    assert config["model"]["network"]["init_args"]["embedding_dim"] == 16
    assert len(config["lightning_dlrm"]["git_commit"]) == 40
    found = merged(runs[0], "config")
    assert found["parameters/total"] > 400_000 and len(found["data_fingerprint"]) == 64


def test_no_panel_of_the_dashboard_is_empty(runs: list[list[dict[str, Any]]]) -> None:
    """Except those whose section says which runs have them."""
    records = [record for of_run in runs[:2] for record in of_run]
    logged = {key for record in of_type(records, "history") for key in record["item"]}
    summary = merged(records, "summary")
    sections = panels_of(Dashboard(project="p"))
    panels = [panel for section in ("quality", "training", "norms", "speed") for panel in sections[section]]
    lines, bars = ([panel for panel in panels if isinstance(panel, kind)] for kind in (wr.LinePlot, wr.BarPlot))
    assert len(lines) == 17 and len(bars) == 3
    for panel in lines:
        assert {str(metric) for metric in panel.y} <= logged, panel.title
        assert panel.y or any(re.fullmatch(panel.metric_regex, key) for key in logged), panel.title
    for panel in bars:
        name, _, best = getattr(panel.metrics[0], "name", panel.metrics[0]).partition(".")
        assert name in summary and (not best or best in summary[name]), panel.title


def test_a_resumed_run_has_the_same_id(runs: list[list[dict[str, Any]]], finished_run: Path) -> None:
    first, second, test = (of_type(records, "run")[0]["run_id"] for records in runs)
    assert first == second == (finished_run / "wandb/id").read_text().strip()
    assert test != first


def test_samples_are_the_x_axis(runs: list[list[dict[str, Any]]], finished_run: Path) -> None:
    metrics = of_type(runs[0], "metric")
    defined = {metric.get("name", metric.get("glob_name")): metric for metric in metrics}
    assert defined["*"]["step_metric"] == "samples" == defined["validation/auc"]["step_metric"]
    told = [{k: v for k, v in line.items() if k != "step"} for line in lines(finished_run)]
    history = [record["item"] for records in runs[:2] for record in of_type(records, "history")]
    trained = [item["samples"] for item in history if "train/loss" in item]
    assert trained == [256 * step for step in range(1, 17)]
    for line in told:
        at = [item for item in history if item.get("samples") == line["samples"]]
        assert line.items() <= {key: value for item in at for key, value in item.items()}.items()


def test_the_summary_is_the_best_of_the_validations(runs: list[list[dict[str, Any]]], finished_run: Path) -> None:
    validations = [line for line in lines(finished_run) if "validation/auc" in line]
    assert [line["samples"] // 256 for line in validations] == [4, 8, 12, 16]
    summary = merged(runs[1], "summary")
    for metric, best in {"auc": max, "accuracy": max, "log_loss": min, "normalized_entropy": min}.items():
        values = [line[f"validation/{metric}"] for line in validations[2:]]
        assert summary[f"validation/{metric}"] == {best.__name__: best(values), "last": values[-1]}
    final = json.loads((finished_run / "summary.json").read_text())["final"]
    for name in ("speed/training_s", "memory/peak_bytes", "parallel/rows_per_rank", "parameters/total"):
        assert summary[name] == final[name]
    test = merged(runs[2], "summary")
    found = json.loads((finished_run / "test.json").read_text())
    assert found.items() <= test.items()


@pytest.mark.parametrize(("run", "stage"), [(1, "validation"), (2, "test")])
def test_plots_are_the_curves_in_the_run_folder(
    run: int, stage: str, runs: list[list[dict[str, Any]]], finished_run: Path
) -> None:
    curves = json.loads((finished_run / f"{stage}_curves.json").read_text())
    summary = merged(runs[run], "summary")
    folder = sorted((finished_run / "wandb").glob("offline-run-*"))[run] / "files"
    table = f"Custom Chart Tables/{stage}/precision_recall_table"
    drawn = json.loads((folder / summary[f"{table}.path"]).read_text())
    assert drawn["columns"] == ["class", "recall", "precision", "threshold"] and len(drawn["data"]) <= 100
    assert [row[1:] for row in drawn["data"]] == [
        list(point) for point in zip(curves["recall"], curves["precision"], curves["threshold"], strict=True)
    ]
    drawn = json.loads((folder / summary[f"Custom Chart Tables/{stage}/calibration_curve_table.path"]).read_text())
    observed = [[x, y] for x, key, y in drawn["data"] if key == "observed"]
    assert observed == [list(point) for point in zip(curves["predicted"], curves["observed"], strict=True)]
    charts = merged(runs[run], "config")
    assert charts[f"_wandb.visualize.{stage}/precision_recall"]["panel_config"]["panelDefId"].startswith("wandb/")


def test_the_dataset_is_referred_to_and_the_weights_are_uploaded(
    runs: list[list[dict[str, Any]]], finished_run: Path
) -> None:
    for records in runs:
        (dataset,) = [artifact for artifact in of_type(records, "artifact") if artifact["type"] == "dataset"]
        contents = {entry["path"]: entry for entry in dataset["manifest"]["contents"]}
        assert "local_path" in contents.pop("dataset.json"), "the checksums are part of it"
        assert contents and all(entry["ref"].startswith("file:///") for entry in contents.values())
        assert all("local_path" not in entry for entry in contents.values()), "no row is copied"
        assert json.loads(dataset["metadata"])["rows"] == {"train": 8192, "validation": 2048, "test": 1024}
    best = finished_run / "checkpoints/best"
    (weights,) = [artifact for artifact in of_type(runs[1], "artifact") if artifact["type"] == "model"]
    assert "best" in weights["aliases"]
    assert "validation/auc" in json.loads(weights["metadata"])
    assert any("_norm/" in key for key in merged(runs[1], "summary")), "norms were logged, more than an artifact takes"
    files = {entry["path"] for entry in weights["manifest"]["contents"]}
    assert files == {str(path.relative_to(best)) for path in best.rglob("*") if path.is_file()}
    assert not [artifact for artifact in of_type(runs[2], "artifact") if artifact["type"] == "model"]


def test_system_metrics_are_kept(runs: list[list[dict[str, Any]]]) -> None:
    assert all("proc.memory.rssMB" in of_type(records, "stats")[0]["item"] for records in runs)


def test_a_server_that_takes_no_dataset_does_not_stop_a_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LIGHTNING_DLRM_CACHE", new_cache(tmp_path / "cache"))

    class Refusing:
        offline = False

        def use_artifact(self, artifact: wandb.Artifact) -> None:
            raise wandb.Error("storage\nis full")

    data = Criteo("demo", demo=DemoSettings(train_rows=2048, validation_rows=512, test_rows=512, max_table_rows=100))
    data.prepare_data()
    logger: Any = SimpleNamespace(experiment=Refusing())
    extras = WandbExtras(RunFolder(tmp_path), logger, dict, log_model=False)
    trainer: Any = SimpleNamespace(datamodule=data)
    extras.on_fit_start(trainer, toy_module())
    assert "does not refer to its dataset: storage is full" in caplog.text


def test_norms_are_those_of_the_step(tmp_path: Path) -> None:
    """Against autograd over plain dense tables."""
    module = toy_module()
    trainer = trainer_of(tmp_path / "run", max_steps=2)
    recorder = next(c for c in trainer.callbacks if type(c).__name__ == "MetricsLogger")
    trainer.callbacks.insert(2, NormLogger(recorder))
    trainer.fit(module, ToyData())
    first = lines(tmp_path / "run")[0]
    assert first["step"] == 1 and first["samples"] == 50

    plain = toy_dlrm(module.schema.features, 3)
    batch = ToyLoader("train", 50).batches[0]
    logits = plain(batch.dense, batch.ids)
    torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.label.float()).backward()
    squares = 0.0
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            assert first[f"gradient_norm/{name}"] == pytest.approx(parameter.grad.norm().item(), rel=1e-5)
            squares += parameter.grad.square().sum().item()
    (lookup,) = plain.lookups()
    gradient, start = lookup.gradient(), 0
    assert gradient is not None
    for column, table in enumerate(lookup.tables):
        touched = sorted(set(batch.ids.values[:, column].tolist()))
        rows = [start + row for row in touched]
        held = [i for i, row in enumerate(gradient.rows.tolist()) if start <= row < start + table.rows]
        norms = lookup.weight[rows].norm(dim=1), gradient.values[held].norm(dim=1)
        assert len(held) == len(touched)
        assert first[f"row_norm/{table.name}"] == pytest.approx(norms[0].mean().item(), rel=1e-5)
        assert first[f"row_gradient_norm/{table.name}"] == pytest.approx(norms[1].mean().item(), rel=1e-5)
        squares += gradient.values[held].square().sum().item()
        start += table.rows
    assert first["gradient_norm/total"] == pytest.approx(squares**0.5, rel=1e-5)
