"""Contract: ``compare`` trains what an experiment says, once, or takes finished runs; it refuses what is unlike,
and what it concludes is in report.json, in the report and in its figures."""

import base64
import copy
import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import wandb
import yaml
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from scipy import stats

from datamodules.criteo import Criteo
from datamodules.generate.demo import DemoSettings
from datamodules.writer import DatasetWriter
from lightning_dlrm.__main__ import main
from lightning_dlrm.cli.configs import find_config
from lightning_dlrm.cli.palette import OKABE_ITO
from lightning_dlrm.cli.parser import PublishedScore
from lightning_dlrm.cli.report import published_notes
from lightning_dlrm.compare import anatomy as anatomies
from lightning_dlrm.compare import command as comparing
from lightning_dlrm.compare import processes, report, training_length
from lightning_dlrm.compare.anatomy import StepTimes, anatomy, measure_steps
from lightning_dlrm.compare.cost_figures import CostDrawing
from lightning_dlrm.compare.drawing import PAGE_WIDTH
from lightning_dlrm.compare.experiment import (
    PlannedArm,
    check_configurations,
    keep_configurations,
    plan_arms,
    read_experiment,
)
from lightning_dlrm.compare.figures import ResultDrawing, draw_all
from lightning_dlrm.compare.options import make_parser
from lightning_dlrm.compare.processes import Job, device_environments, run_jobs, scored_share, trained_samples
from lightning_dlrm.compare.ranking import answer, distance, is_figure5, title_of, with_spread
from lightning_dlrm.compare.results import Comparison, compare, ranked
from lightning_dlrm.compare.runs import Arm, arms_of, data_differences, format_value, read_run, settings_of
from lightning_dlrm.compare.scores import note_source, read_scores, shared_samples
from lightning_dlrm.compare.statistics import Interval, Verdict
from lightning_dlrm.compare.training_length import fallen, still_improving
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import Column
from lightning_dlrm.objectives.metrics import exact_auc
from lightning_dlrm.tables import lookup
from lightning_dlrm.tracking import names
from lightning_dlrm.tracking.dashboard import Dashboard
from lightning_dlrm.tracking.lock import FolderLock
from lightning_dlrm.tracking.wandb_run import ComparisonPage, RunPlace, send_comparison
from tests.caches import new_cache
from tests.objectives.test_metrics import plain_group_auc
from tests.tracking.test_wandb import merged, of_type, read_back

REPOSITORY = Path(__file__).parents[2]
DEMO = {"train_rows": 2000, "validation_rows": 500, "test_rows": 400, "max_table_rows": 50}
TINY = {"embedding_dim": 4}
NETWORKS = {
    "dlrm": {"class_path": "DLRM", "init_args": {**TINY, "bottom_mlp": [4], "top_mlp": [4]}},
    "dcn": {"class_path": "DCN", "init_args": {**TINY, "cross": "vector", "cross_layers": 1, "deep": [4]}},
}


@pytest.fixture(autouse=True)
def own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_DLRM_CACHE", new_cache(tmp_path_factory.getbasetemp() / "compare-cache"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    # What is measured is not tested here; one step of each configuration is enough.
    for name, value in {"PAUSE_SECONDS": 0.0, "ROUNDS": 1, "WARM_UP": 1, "STEPS": 1}.items():
        monkeypatch.setattr(anatomies, name, value)


def write_experiment(**changes: Any) -> Path:
    """An experiment of two tiny models in the working folder, and a configuration for each of its arms."""
    for name, network in NETWORKS.items():
        model = {
            "network": network,
            "table_optimizer": {"class_path": "SGD", "init_args": {"learning_rate": 1.0}},
            "dense_optimizer": {"class_path": "Adagrad", "init_args": {"learning_rate": 0.01}},
        }
        data = {"class_path": "Criteo", "init_args": {"path": "demo", "demo": DEMO, "batch_size": 200}}
        trainer = {"max_epochs": 1, "log_every_n_steps": 1, "val_check_interval": 5, "check_val_every_n_epoch": None}
        Path(f"{name}.yaml").write_text(yaml.safe_dump({"model": model, "data": data, "trainer": trainer}))
    document = {
        "arms": {name: f"{name}.yaml" for name in NETWORKS},
        "seeds": [1, 2],
        "compared": ["model.network"],
        "kept": ["model", "data.init_args.batch_size"],
    }
    Path("tiny.yaml").write_text(yaml.safe_dump(document | changes, sort_keys=False))
    return Path("tiny.yaml")


def planned(overlays: tuple[str, ...] = (), options: tuple[str, ...] = (), **changes: Any) -> list[PlannedArm]:
    experiment = read_experiment(write_experiment(**changes))
    return plan_arms(experiment, overlays, options)[0]


@functools.cache
def plain_arms() -> list[PlannedArm]:
    """The two arms without changes, planned once for all tests."""
    return planned()


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["compare", *arguments]) == 2
    return capsys.readouterr().err


# --- what an experiment is -----------------------------------------------------------------------------


def test_overlays_change_what_is_shared_and_leave_what_is_kept() -> None:
    Path("over.yaml").write_text(
        yaml.safe_dump({"model": {"network": NETWORKS["dcn"]}, "data": {"init_args": {"batch_size": 7, "threads": 2}}})
    )
    dlrm, dcn = planned(("over.yaml",), ("--trainer.max_steps", "4"))
    assert dlrm.document["model"]["network"]["class_path"].endswith("DLRM")
    for arm in (dlrm, dcn):
        data = arm.document["data"]["init_args"]
        assert data["batch_size"] == 200 and data["threads"] == 2
        # Each run has its own: it follows the seed that the run is given.
        assert data["seed"] is None
        assert arm.samples == 4 * 200
    assert dlrm.size.tables == dcn.size.tables and dlrm.size.dense != dcn.size.dense


def test_arms_that_differ_in_more_than_what_is_compared_are_refused() -> None:
    with pytest.raises(UserError, match=r"differ in settings that are not compared \(model\.network\.class_path"):
        planned(compared=["model.table_optimizer"])
    with pytest.raises(UserError, match="arms dlrm and again have the same settings"):
        planned(arms={"dlrm": "dlrm.yaml", "again": "dlrm.yaml"})


def test_paper_s_experiment_has_the_paper_s_settings() -> None:
    experiment = read_experiment(find_config("figure5.yaml"))
    assert len(experiment.seeds) == 5
    kaggle = ["--data.path", "demo", "--data.class_path", "Criteo"]
    arms, notes = plan_arms(experiment, ["criteo_kaggle.yaml"], kaggle)
    assert any("model" in note for note in notes)
    found = {arm.name: arm.document for arm in arms}
    assert set(found) == {"dlrm_sgd", "dcn_sgd", "dlrm_adagrad", "dcn_adagrad"}
    for name, document in found.items():
        assert document["data"]["init_args"]["batch_size"] == 128 and document["trainer"]["max_epochs"] == 1
        rule = "SGD" if name.endswith("sgd") else "Adagrad"
        assert document["model"]["table_optimizer"]["class_path"].endswith(f".{rule}")
        assert document["model"]["schedule"] is None
    assert {arm.size.total for arm in arms} == {540_677_217, 540_558_554}
    with pytest.raises(UserError, match="CriteoKaggle reads 'kaggle'"):
        plan_arms(experiment, ["criteo_kaggle.yaml"], [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arm": {"a": "dlrm.yaml"}}, "unknown key arm; did you mean arms"),
        ({"arms": {"dlrm": "dlrm.yaml"}}, "has one arm, dlrm"),
        ({"arms": {"dlrm": "dlrm.yaml", "a/b": "dcn.yaml"}}, "may have letters, digits, . _ - only; found 'a/b'"),
        ({"arms": {"dlrm": "dlrm.yaml", "dcn": "nowhere.yaml"}}, "arm dcn: no configuration nowhere.yaml"),
        ({"seeds": [1, 1]}, "expected different whole numbers"),
        ({"compared": "model"}, "compared is 'model'; expected a list"),
    ],
)
def test_a_wrong_experiment_is_one_line(changes: Any, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_experiment(**changes)
    error = error_of(capsys, "--config", "tiny.yaml", "--output", "out")
    assert message in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "out"], "nothing to compare"),
        (["a", "b"], "give --output DIR"),
        (["a", "--outptu", "out"], "unknown option --outptu"),
        (["a", "b", "--output", "out"], "error: there is no folder a: give a run folder"),
        (["a", "b", "--output", "out", "--seeds", "1,2"], "--seeds without --config: it is for the runs of an experi"),
        (
            ["--config", "figure5.yaml", "--seed", "1", "--output", "out"],
            "unknown option --seed; did you mean --seeds",
        ),
        (
            ["dlrm.yaml", "dcn.yaml", "--output", "out"],
            "dlrm.yaml and dcn.yaml: expected folders of finished fits; w",
        ),
        (
            ["--config", "small.yaml", "--output", "out"],
            "small.yaml: expected an experiment; write a YAML with the l",
        ),
        (
            ["--config", "tiny.yaml", "--output", "out", "--data.pth", "x"],
            "unknown option --data.pth; did you mean --data.path?",
        ),
        (["--config", "tiny.yaml", "--output", "out", "--seeds", "1,x"], "expected whole numbers"),
        (["--config", "tiny.yaml", "--output", "out", "--parallel", "0"], "1 or more"),
    ],
)
def test_a_wrong_command_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_experiment()
    error = error_of(capsys, *arguments)
    assert message in error and len(error.strip().splitlines()) == 1


def test_the_help_fits_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = make_parser().format_help().splitlines()
    assert max(map(len, lines)) <= 80
    groups = [lines.index(f"{group}:") for group in ("examples", "an experiment", "finished runs", "the result")]
    assert groups == sorted(groups)


def test_a_dry_run_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    write_experiment()
    before = sorted(Path().iterdir())
    Path("over.yaml").write_text("{trainer: {max_steps: 3}}")
    assert main(["compare", "--config", "tiny.yaml", "--config", "over.yaml", "--output", "out", "--dry-run"]) == 0
    assert "seeds 1, 2: 4 runs" in capsys.readouterr().out
    assert main(["compare", "--config", "tiny.yaml", "--output", "out", "--seeds", "1", "--dry-run"]) == 0
    assert "seed 1: 2 runs" in capsys.readouterr().out
    paths = [leave_run(arm, 1, Path("kept"), 1.0) for arm in plain_arms()]
    scored = ["--output", "kept", "--dry-run"]
    assert main(["compare", *map(str, paths), *scored]) == 0
    assert capsys.readouterr().out == "configurations and their runs:\n  DLRM: dlrm-1\n  DCN: dcn-1\n"
    # Without --output there are no scores yet.
    assert "no checkpoints/best to score" in error_of(capsys, *map(str, paths), "--dry-run")
    assert sorted(Path().iterdir()) == sorted([*before, *paths, Path("kept"), Path("over.yaml")])


# --- runs that are there -------------------------------------------------------------------------------


AS_IN_TRAINING = dict.fromkeys(anatomies.KINDS, 2000.0 / len(anatomies.KINDS))
"""Measured times of a step that is as long as one in the training of ``leave_run``."""
NO_STEPS = StepTimes(alone={}, in_training={})


def steps_of(arms: list[Arm]) -> StepTimes:
    return measure_steps(arms, {arm.name: anatomy(arm.runs[0]) for arm in arms}, Path("operators.json"))


DOT = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII=")
"""A PNG of one pixel."""


def leave_run(arm: PlannedArm, seed: int, output: Path, skill: float) -> Path:
    """A run folder as a fit leaves it, and predictions as ``predict`` makes them, better with more skill."""
    path = Path(f"{arm.name}-{seed}")
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump({**arm.document, "seed_everything": seed}))
    options = arm.document["data"]["init_args"]
    data = Criteo(options["path"], demo=DemoSettings(**options["demo"]))
    data.prepare_data()
    schema = data.schema
    lines = [
        {"step": k, "samples": 200 * k, "train/accuracy": 0.7, "train/auc": 0.5 + k / 50, "train/log_loss": 0.6,
         "validation/accuracy": 0.7, "validation/auc": min(0.7, 0.6 + k / 50), "validation/log_loss": 0.6,
         "speed/training_s": 0.1 * k}
        for k in range(1, 11)
    ]  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    final = {
        **lines[-1], "speed/samples_per_s": 100.0, "memory/peak_bytes": 1 << 30, "parameters/tables": arm.size.tables,
        "parameters/dense": arm.size.dense, "parameters/total": arm.size.total, "parallel/ranks": 1,
        "parallel/bytes_per_rank": 4 * arm.size.tables, "flops_per_sample/forward": 10, "flops_per_sample/training": 30,
        "dataset": schema.dataset, "protocol": schema.protocol, "encoding_fingerprint": schema.encoding_fingerprint,
        "data_fingerprint": schema.data_fingerprint,
    }  # fmt: skip
    (path / "summary.json").write_text(json.dumps({"final": final, "best": lines[-1]}))
    data.setup("test")
    labels = np.concatenate([batch.label.numpy() for batch in data.test_dataloader()])
    random = np.random.default_rng(seed)
    logits = -1 + skill * labels + random.normal(size=len(labels))
    scores = output / "scores" / path.name
    scores.mkdir(parents=True)
    probabilities = (1 / (1 + np.exp(-logits))).astype(np.float32)
    pq.write_table(
        pa.table({"row": np.arange(len(labels)), "probability": probabilities}), scores / "predictions.parquet"
    )
    note_source(read_run(path), "test", scores)
    return path


def test_finished_runs_give_a_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(anatomies, "measure", lambda run: AS_IN_TRAINING)
    dlrm, dcn = plain_arms()
    output = Path("out")
    paths = [leave_run(arm, s, output, skill) for arm, skill in ((dlrm, 2.0), (dcn, 1.0)) for s in (3, 1, 2)]
    assert main(["compare", *map(str, paths), "--output", "out"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^DLRM - DCN .* better$", said, re.MULTILINE) and "report: out/report.html" in said
    assert "verdict none" not in said and "untrained" not in said

    document = json.loads((output / "report.json").read_text())
    assert (
        set(document)
        == {"answer", "still_improving", "best_early", "click_rate_alone", "runs", "arms", "pairs", "adjustment"}
        and document["adjustment"] == "holm"
    )
    assert [(run["arm"], run["seed"]) for run in document["runs"]] == [
        (a, s) for a in ("DLRM", "DCN") for s in (1, 2, 3)
    ]
    auc, log_loss = document["pairs"]
    assert (auc["a"], auc["b"], auc["metric"], auc["verdict"]) == ("DLRM", "DCN", "auc", "a_better")
    assert log_loss["metric"] == "log_loss"
    for pair in (auc, log_loss):
        assert pair["low"] < pair["difference"] < pair["high"]
        assert 0 < pair["p"] <= pair["p_adjusted"] <= min(1, 2 * pair["p"]) and pair["verdict_unadjusted"] == "a_better"
        assert pair["seed_variance"] > 0 <= pair["sample_variance"] and pair["degrees_of_freedom"] == 2
    assert "adjusted for the 2 differences by Holm's method" in said
    of_dlrm = document["arms"][0]["intervals"]["log_loss"]
    assert document["arms"][0]["name"] == "DLRM" and of_dlrm["low"] < of_dlrm["mean"] < of_dlrm["high"]
    means = [
        np.mean([r["metrics"]["test/auc"] for r in document["runs"] if r["arm"] == arm]) for arm in ("DLRM", "DCN")
    ]
    assert auc["difference"] == pytest.approx(means[0] - means[1], abs=1e-9)
    table = pq.read_table(output / "scores/dlrm-1/predictions.parquet")
    data = Criteo("demo", demo=DemoSettings(**DEMO))
    data.setup("test")
    labels = torch.cat([batch.label for batch in data.test_dataloader()])
    scored = exact_auc(torch.from_numpy(table["probability"].to_numpy().copy()), labels)
    assert document["runs"][0]["metrics"]["test/auc"] == pytest.approx(scored, abs=1e-12)

    html = (output / "report.html").read_text()
    figures, narrow = (
        {path.stem for path in folder.glob("*.png")} for folder in (output / "figures", output / "figures/narrow")
    )
    assert {"accuracy", "auc", "log_loss", "calibration", "cost", "parameters", "operators"} <= figures
    # A phone has figures of its own width, and no table that is wider than it.
    assert narrow == figures and html.count("data:image/png;base64,") == 2 * len(figures)
    assert html.count("<source media=") == len(figures)
    assert len(re.findall('class="[a-z ]*cards"', html)) == html.count("<table")
    assert "http" not in html and "WARNING" not in html
    assert auc["reason"].startswith("the 95% interval does not contain 0, with 3 seeds in pairs")
    assert "when adjusted for 2 verdicts" in auc["reason"] and "by Holm&#39;s method" in html
    assert "<th>adjusted p</th>" in html and "<th>without adjustment</th>" in html
    assert "is better than DCN by AUC" in html and "<h1>DLRM and DCN, demo data</h1>" in html
    # The answer comes first, on the terminal too: who, by how much, how sure, on what.
    pattern = r"DLRM wins on demo data: AUC 0\.\d+, (\S+) above DCN \(95% interval (\S+) to (\S+)\), 3 seeds each\."
    for text in (said, html):
        answer = re.search(pattern, text)
        assert answer is not None and "By log loss DLRM is better too, lower by" in text and "split: generated" in text
        value, low, high = map(float, answer.groups())
        assert (value, low, high) == pytest.approx((auc["difference"], auc["low"], auc["high"]), abs=6e-4)
    first, second = (html.index(f'data-name="configuration">{name}</td>') for name in ("DLRM", "DCN"))
    assert "<th>AUC</th><th>best validation AUC</th><th>log loss</th>" in html
    assert html.index("DLRM wins") < first < second < html.index("<h2>Differences</h2>")
    assert "<th>verdict</th>" in html and re.search(
        r'data-name="verdict">worse \(p (0\.\d{4}|&lt;0\.0001)\)</td>', html
    )
    assert "Two means can lie closer" not in html
    best = data.schema.optimum["test"].auc
    assert f"The data are generated clicks, whose best reachable AUC on the test split is {best:.4f}" in (
        " ".join(html.split())
    )


def test_numbers_have_few_decimals_however_equal_the_seeds_are() -> None:
    comparison = after(STAYS, STAYS)
    for spread, shown in (
        (0.0, "0.52881 (below 0.00001)"),
        (2e-6, "0.52881 (below 0.00001)"),
        (3e-4, "0.52881 (0.00030)"),
    ):
        scores = {
            run.name: dataclasses.replace(
                comparison.scores[run.name],
                metrics={**comparison.scores[run.name].metrics, "auc": 0.52881 + spread * (run.seed - 2)},
            )
            for run in comparison.runs
        }
        found = dataclasses.replace(comparison, scores=scores)
        assert with_spread(found, "auc") == [shown, shown, "0.50000"]
    assert with_spread(found, "auc", 3) == ["0.529 (below 0.001)"] * 2 + ["0.500"]


def below_head(comparison: Comparison) -> str:
    """The answer below its first sentence."""
    return " ".join(answer(comparison)[1:])


def test_the_log_loss_agrees_with_the_auc_or_not() -> None:
    comparison = after(STAYS, STAYS)
    auc, log_loss = comparison.pairs

    def said(by_auc: Verdict, by_log_loss: Verdict, sign: float = 1.0) -> str:
        """The sentence on the log loss if the first is the winner by AUC, with or without a verdict."""
        interval = Interval(value=-0.02 * sign, low=-0.03 * sign, high=-0.01 * sign)
        pairs = [
            dataclasses.replace(auc, verdict=by_auc, difference=dataclasses.replace(auc.difference, interval=above)),
            dataclasses.replace(
                log_loss, verdict=by_log_loss, difference=dataclasses.replace(log_loss.difference, interval=interval)
            ),
        ]
        text = below_head(dataclasses.replace(comparison, pairs=pairs))
        (found,) = re.findall(r"By log loss[^.]*", text)
        return found

    above = Interval(value=0.02, low=0.01, high=0.03)
    first, second = (arm.name for arm in ranked(comparison))
    if auc.a != first:
        above = Interval(value=-0.02, low=-0.03, high=-0.01)
    win: Verdict = "a_better" if auc.a == first else "b_better"
    sign = 1.0 if log_loss.a == first else -1.0
    other: Verdict = "b_better" if win == "a_better" else "a_better"
    assert said(win, win, sign).startswith(f"By log loss {first} is better too, lower by ")
    assert said("not_distinguishable", win, sign).startswith(f"By log loss, however, {first} is better, lower by ")
    assert said(win, other, -sign).startswith(f"By log loss, however, {second} is better, lower by ")
    for by_auc, however in ((win, ", however,"), ("not_distinguishable", "")):
        assert (
            said(by_auc, "not_distinguishable") == f"By log loss{however} {first} is not distinguishable from {second}"
        )


def test_one_seed_a_side_decides_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("lightning_dlrm.compare.command.draw_all", lambda *found: [])
    dlrm, dcn = plain_arms()
    paths = [leave_run(dlrm, 1, Path("out"), 5.0), leave_run(dcn, 1, Path("out"), 0.5)]
    assert main(["compare", *map(str, paths), "--output", "out"]) == 0
    pairs = json.loads(Path("out/report.json").read_text())["pairs"]
    assert [(pair["verdict"], pair["p_adjusted"], pair["seed_variance"]) for pair in pairs] == [
        ("none", None, None)
    ] * 2
    reason = "the interval leaves out the variation over the seeds, because each side has one seed"
    assert all(pair["reason"] == reason for pair in pairs)
    said, html = capsys.readouterr().out, " ".join(Path("out/report.html").read_text().split())
    for text in (said, html):
        assert f"no verdict on DLRM and DCN by AUC: {reason} (" in text.replace("<strong>", "").replace("</strong>", "")
        assert "No verdict from one seed on demo data: DLRM has the highest AUC, 0." in text
        # Finished runs have no option --seeds.
        assert "Train DLRM and DCN again with other values of seed_everything, and give those runs too." in text
        assert "--seeds" not in text
        assert "not distinguishable" not in text and "means over the seeds" not in text.lower()
    assert "one seed each, on the test split" in said and "includes the variation" not in html
    assert all(pair["low"] > 0 or pair["high"] < 0 for pair in pairs), "the samples alone would have decided"


@pytest.mark.parametrize("skill", [0.0, -1.0])
def test_a_configuration_that_did_not_train_is_no_side_of_a_comparison(
    skill: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightning_dlrm.compare.command.draw_all", lambda *found: [])
    dlrm, dcn = plain_arms()
    paths = [leave_run(arm, s, Path("out"), of) for arm, of in ((dlrm, 2.0), (dcn, skill)) for s in (1, 2)]
    assert main(["compare", *map(str, paths), "--output", "out"]) == 0
    said, html = capsys.readouterr().out, " ".join(Path("out/report.html").read_text().split())
    document = json.loads(Path("out/report.json").read_text())
    head = r"DCN did not train: its AUC of 0\.\d{4} is no better than random\. This is not a comparison of models\. "
    for text in (" ".join(said.split()), document["answer"], html.replace("</strong></p> <p>", " ")):
        assert re.search(
            head
            + r"Random predictions have an AUC of 0\.5 on average\. Here an AUC up to 0\.5\d{3} counts as random: ",
            text,
        )
        assert "Look at the training log loss of DCN in the report, under" in text and "wins" not in text
    assert "under 'Accuracy and log loss while training':" in document["answer"]
    assert "<summary>Accuracy and log loss while training</summary>" in html
    assert html.count(">click rate alone</td>") == 2 and said.count("\nclick rate alone ") == 1
    assert 'data-name="verdict">did not train</td>' in html
    assert "<strong>DLRM and DCN by AUC: no verdict, because DCN did not train</strong>: DLRM minus DCN +0." in html
    assert "seed_everything" not in said and "distinguishable" not in html.partition("Every difference")[2]
    assert len(re.findall(r"^DLRM - DCN .* -  a side did not train$", said, re.MULTILINE)) == 2
    assert [pair["did_not_train"] for pair in document["pairs"]] == [["DCN"], ["DCN"]]
    assert [arm["seeds_no_better_than_random"] for arm in document["arms"]] == [[], [1, 2]]
    # The click rate is that of the test samples, as in the table of a fit.
    data = Criteo("demo", demo=DemoSettings(**DEMO))
    data.setup("test")
    rate = torch.cat([batch.label for batch in data.test_dataloader()]).double().mean().item()
    entropy = -rate * np.log(rate) - (1 - rate) * np.log(1 - rate)
    alone = document["click_rate_alone"]
    assert alone["test/normalized_entropy"] == pytest.approx(1) and alone["test/calibration"] == pytest.approx(1)
    assert alone["test/auc"] == 0.5 and alone["test/log_loss"] == pytest.approx(entropy, abs=1e-6)
    assert alone["test/accuracy"] == pytest.approx(1 - rate) and f"{entropy:.5f}" in said


def test_a_seed_that_did_not_train_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightning_dlrm.compare.command.draw_all", lambda *found: [])
    dlrm, dcn = plain_arms()
    paths = [leave_run(dlrm, s, Path("out"), 2.0) for s in (1, 2, 3)]
    paths += [leave_run(dcn, s, Path("out"), skill) for s, skill in ((1, 1.0), (2, 0.0), (3, 1.0))]
    assert main(["compare", *map(str, paths), "--output", "out"]) == 0
    said, html = " ".join(capsys.readouterr().out.split()), Path("out/report.html").read_text()
    assert "DCN did not train with seed 2: AUC no better than random; its mean includes it. " in said
    assert "not a comparison" not in said and "1 of 3 seeds did not train</td>" in html
    assert [arm["seeds_no_better_than_random"] for arm in json.loads(Path("out/report.json").read_text())["arms"]] == [
        [],
        [2],
    ]


def test_all_seeds_that_did_not_train_are_named() -> None:
    dlrm, dcn = plain_arms()
    seeds = range(1, 7)
    paths = [leave_run(dlrm, seed, Path("out"), 2.0) for seed in seeds]
    paths += [leave_run(dcn, seed, Path("out"), 2.0 if seed == 6 else 0.0) for seed in seeds]
    runs = [read_run(path) for path in paths]
    samples = shared_samples(runs, "test")
    scores = {run.name: read_scores(Path("out/scores") / run.name, *samples.values()) for run in runs}
    said, *_ = answer(compare(arms_of(runs), scores, title="t", split="test"))
    assert "DCN did not train with seeds 1, 2, 3, 4 and 5: AUC no better than random; its mean includes them." in said


def rising(path: Path, middle: float, last: float) -> Path:
    """A run folder whose validation AUC has these values from the middle of the training on, and at its end."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["validation/auc"] = last if line["step"] == 10 else min(middle, 0.5 + line["step"] / 50)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_configuration_that_was_still_improving_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightning_dlrm.compare.command.draw_all", lambda *found: [])
    dlrm, dcn = plain_arms()
    paths = [leave_run(dlrm, s, Path("out"), 2.0) for s in (1, 2, 3)]
    paths += [rising(leave_run(dcn, s, Path("out"), 1.0), 0.55, 0.7) for s in (1, 2, 3)]
    assert main(["compare", *map(str, paths), "--output", "out"]) == 0
    said, html = " ".join(capsys.readouterr().out.split()), " ".join(Path("out/report.html").read_text().split())
    document = json.loads(Path("out/report.json").read_text())
    for text in (said, html, document["answer"]):
        assert "But DCN was still improving when its training ended." in text and "DLRM wins" in text
    assert re.search(
        r"In the last part of the training the validation AUC rose by 0\.150 for DCN \(0\.\d{3} behind\)\. "
        r"Before you trust this ranking, train all configurations longer, for example with "
        r"--trainer\.max_epochs 3\.",
        document["answer"],
    )
    # An option is not broken at its hyphens.
    assert '<span class="whole">--trainer.max_epochs</span> 3.' in html
    assert [(one["arm"], one["rise"]) for one in document["still_improving"]] == [("DCN", pytest.approx(0.15))]
    assert re.search(r'data-name="verdict">worse \(p [^<;]*\)</td>', html)
    assert 'data-name="training">still improving</td>' in html


@pytest.mark.parametrize(
    ("middle", "last", "lead", "steps"),
    [
        pytest.param(0.58, 0.589, 2.0, 10, id="a rise that is small"),
        pytest.param(0.58, 0.61, 3.0, 10, id="a rise that is small beside the distance"),
        pytest.param(0.58, 0.57, 2.0, 10, id="a fall"),
        pytest.param(0.55, 0.70, 2.0, 2_048, id="one epoch of a larger log"),
    ],
)
def test_a_rise_that_does_not_endanger_the_verdict_is_not_mentioned(
    middle: float, last: float, lead: float, steps: int
) -> None:
    dlrm, dcn = plain_arms()
    paths = [leave_run(dlrm, s, Path("out"), lead) for s in (1, 2, 3)]
    paths += [rising(leave_run(dcn, s, Path("out"), 1.0), middle, last) for s in (1, 2, 3)]
    runs = [read_run(path) for path in paths]
    runs = [dataclasses.replace(run, final={**run.final, "step": steps}) for run in runs]
    samples = shared_samples(runs, "test")
    scores = {run.name: read_scores(Path("out/scores") / run.name, *samples.values()) for run in runs}
    assert not still_improving(compare(arms_of(runs), scores, title="t", split="test"))


def after(dlrm: dict[int, float], dcn: dict[int, float], lead: float = 1.0, steps: int = 10) -> Comparison:
    """A comparison of two configurations with three seeds each, whose validation AUC is that of the last of these steps
    so far, and whose skills differ by a lead."""
    runs = []
    for arm, aucs, skill in zip(plain_arms(), (dlrm, dcn), (lead, 1.0), strict=True):
        for seed in (1, 2, 3):
            run = read_run(leave_run(arm, seed, Path("out"), skill))
            history = [
                {**line, "validation/auc": aucs[max(step for step in aucs if step <= line["step"])]}
                for line in run.history
            ]
            best = max(history, key=lambda line: line["validation/auc"])
            final = {**run.final, "validation/auc": history[-1]["validation/auc"], "step": steps}
            runs.append(dataclasses.replace(run, history=history, best=best, final=final))
    samples = shared_samples(runs, "test")
    scores = {run.name: read_scores(Path("out/scores") / run.name, *samples.values()) for run in runs}
    return compare(arms_of(runs), scores, title="t", split="test")


STAYS, RISES, FALLS = {1: 0.7}, {1: 0.6, 9: 0.65}, {1: 0.6, 3: 0.72, 7: 0.70}


@pytest.mark.parametrize(
    ("dlrm", "dcn", "lead", "named", "words"),
    [
        (STAYS, RISES, 1.0, ["DCN"], "But DCN was still improving when its training ended."),
        (RISES, STAYS, 1.0, ["DLRM"], "But DLRM was still improving when its training ended."),
        (RISES, RISES, 1.0, ["DLRM", "DCN"], "But both configurations were still improving when their training ended."),
        (RISES, {1: 0.5, 9: 0.65}, 2.0, ["DLRM", "DCN"], "But both configurations were still improving when their"),
        # Of a sure winner that was improving, a longer training makes the lead larger.
        (RISES, STAYS, 2.0, [], "wins"),
        (STAYS, STAYS, 1.0, [], "% of the uncertainty comes from"),
        # A rise before the last quarter is over.
        (STAYS, {1: 0.6, 7: 0.65, 10: 0.653}, 1.0, [], "% of the uncertainty comes from"),
        (FALLS, {1: 0.6, 8: 0.72, 10: 0.70}, 1.0, [], "% of the uncertainty comes from"),
    ],
)
def test_a_longer_training_is_advised_before_more_seeds_and_test_samples(
    dlrm: dict[int, float], dcn: dict[int, float], lead: float, named: list[str], words: str
) -> None:
    comparison = after(dlrm, dcn, lead)
    assert sorted(one.arm for one in still_improving(comparison)) == sorted(named)
    head, more = answer(comparison)[0], below_head(comparison)
    assert words in f"{head} {more}"
    assert ("Before you trust this ranking, train all configurations longer" in more) == bool(named)
    if named and lead == 1.0:
        # What to do is last.
        (remedy,) = re.findall(r"A larger test split helps|Train D[^.]* again with other values", more)
        assert more.index("% of the uncertainty comes from") < more.index("longer") < more.index(remedy)
    assert not still_improving(after_steps(comparison, 2_048))


def after_steps(comparison: Comparison, steps: int) -> Comparison:
    """The comparison as if its trainings had this number of steps."""
    arms = [
        dataclasses.replace(
            arm, runs=[dataclasses.replace(run, final={**run.final, "step": steps}) for run in arm.runs]
        )
        for arm in comparison.arms
    ]
    return dataclasses.replace(comparison, arms=arms)


def test_a_configuration_whose_validation_auc_fell_is_named() -> None:
    comparison = after(STAYS, FALLS)
    (found,) = fallen(comparison)
    assert (found.arm, found.fall, found.when) == ("DCN", pytest.approx(0.02), "best at step 3 of 10")
    said = (
        "After its best, the validation AUC fell by 0.020 for DCN (best at step 3 of 10): a sign of overfitting. "
        "The scores are those of checkpoints/best, from before the fall."
    )
    assert f"{said} A shorter training is enough." in below_head(comparison)
    # What another configuration needs counts more.
    for path in (Path("out"), *Path().glob("d*-*")):
        shutil.rmtree(path)
    both = below_head(after(RISES, FALLS))
    assert said in both and "shorter" not in both and "train all configurations longer" in both
    assert dataclasses.replace(found, best_steps=[3, 1_200], steps=2_048).when == "best at steps 3 to 1,200 of 2,048"


@pytest.mark.parametrize("dcn", [STAYS, RISES, {1: 0.6, 3: 0.709, 7: 0.70}])
def test_a_small_fall_is_not_mentioned(dcn: dict[int, float]) -> None:
    comparison = after(STAYS, dcn)
    assert not fallen(comparison) and "overfitting" not in below_head(comparison)


def test_a_late_rise_is_that_of_the_last_quarter_of_the_training() -> None:
    dlrm, _ = plain_arms()
    run = read_run(leave_run(dlrm, 1, Path("out"), 2.0))
    for aucs, rise in (
        ({5: 0.6, 10: 0.7}, 0.1),
        # After the middle and the end of an epoch of odd steps, one more step tells nothing.
        ({4: 0.6, 9: 0.7, 10: 0.7}, 0.1),
        ({3: 0.5, 6: 0.69, 10: 0.7}, 0.01),
        ({2: 0.5, 5: 0.69, 7: 0.68, 10: 0.7}, 0.01),
        ({2: 0.7121, 5: 0.7141, 8: 0.7151, 10: 0.7151}, 0.001),
        ({2: 0.5, 10: 0.7}, None),
        ({5: 0.5, 7: 0.7}, None),
        ({10: 0.7}, None),
        ({}, None),
    ):
        history = [{"samples": 200 * step, "validation/auc": auc} for step, auc in aucs.items()]
        assert dataclasses.replace(run, history=history).late_rise == (rise and pytest.approx(rise))


def test_runs_of_few_steps_say_if_one_validation_cannot_show_whether_they_were_still_improving() -> None:
    comparison = after(STAYS, STAYS)
    one = dataclasses.replace(
        comparison,
        arms=[
            dataclasses.replace(arm, runs=[dataclasses.replace(run, history=run.history[-1:]) for run in arm.runs])
            for arm in comparison.arms
        ],
    )
    said = (
        "Whether a configuration was still improving is not known without a validation in the middle of the training."
    )
    advice = "Train again with such a validation, for example with --trainer.val_check_interval 5"
    assert f"{advice}." in below_head(one)
    assert f"{advice} and another --output." in below_head(dataclasses.replace(one, experiment=True))
    assert said in below_head(one) and said not in below_head(comparison)
    assert "still improving" not in below_head(after_steps(one, 2_048))


def test_flat_curves_under_a_decaying_learning_rate_are_no_sign_of_a_training_that_was_long_enough() -> None:
    said = "Flat curves do not show that the training was long enough, because the learning rate decays: "
    comparison = after(STAYS, STAYS)
    assert said not in below_head(comparison)
    for run in comparison.runs:
        run.settings["model.schedule.class_path"] = "WarmupThenDecay"
    assert below_head(comparison).count(said) == 1
    assert said not in below_head(after_steps(comparison, 2_048))
    for run in comparison.runs:
        run.settings["model.schedule.init_args.decay_share"] = 0.0
    assert said not in below_head(comparison)


def test_a_longer_training_grows_by_all_its_bounds() -> None:
    comparison = after(STAYS, RISES)
    for run in (run for arm in comparison.arms for run in arm.runs):
        run.settings["trainer.max_steps"] = 60
    assert "longer, for example with --trainer.max_steps 180 --trainer.max_epochs 3. " in below_head(comparison)


def test_a_configuration_with_one_seed_takes_no_verdict_from_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightning_dlrm.compare.command.draw_all", lambda *found: [])
    dlrm, dcn = plain_arms()
    wider = copy.deepcopy(dlrm.document)
    wider["model"]["network"]["init_args"]["top_mlp"] = [9]
    third = dataclasses.replace(dlrm, name="wider", document=wider)
    paths = [leave_run(arm, seed, Path("out"), skill) for arm, skill in ((dlrm, 5.0), (dcn, 1.5)) for seed in (1, 2, 3)]
    paths.append(leave_run(third, 1, Path("out"), 0.5))
    assert main(["compare", *map(str, paths), "--output", "out"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "No verdict from one seed" not in said
    assert re.search(
        r"dlrm-1 wins on demo data: AUC 0\.\d+, 0\.\d+ above dcn-1 \(95% interval [^)]*\), 1 to 3 seeds\. ", said
    ), said
    advice = "Train wider-1 again with other values of seed_everything, and give those runs too."
    assert "With one seed there is no verdict against wider-1. By log loss dlrm-1 is better than dcn-1 too" in said
    assert f"so the runs are not taken in pairs; equal seeds can make intervals shorter. {advice}" in said
    # With verdicts for all, the differences are a table that fits a terminal.
    paths += [leave_run(third, seed, Path("out"), 0.5) for seed in (2, 3)]
    assert main(["compare", *map(str, paths), "--output", "out"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(at for at, line in enumerate(lines) if line.startswith("AUC ") and line.endswith("verdict"))
    assert "adjusted" in lines[at - 1] and lines[at].endswith("  p  verdict")
    # In the order of the ranking.
    pairs = [re.match(r"(\S+) - (\S+)  +0\.\d+ \(", line) for line in lines[at + 1 : at + 4]]
    assert [pair and pair.groups() for pair in pairs] == [
        ("dlrm-1", "dcn-1"),
        ("dlrm-1", "wider-1"),
        ("dcn-1", "wider-1"),
    ]
    assert lines[at + 2].endswith("  better") and max(map(len, lines[at : at + 9])) < 80


def test_auc_by_group_is_compared(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("lightning_dlrm.compare.command.draw_all", lambda *found: [])
    users = np.random.default_rng(0).integers(0, 60, 400)
    columns = (
        Column(name="label", role="label"),
        Column(name="user", role="keep", transform="int64"),
        Column(name="I1", role="dense"),
        Column(name="C1", role="categorical", cardinality=4),
    )
    with DatasetWriter(Path("kept"), columns) as writer:
        for split in ("train", "validation", "test"):
            labels, ids = (np.arange(400) % 3 == 0).astype(np.int8), (np.arange(400) % 4).astype(np.int32)
            dense = np.zeros(400, np.float32)
            writer.write(split, {"label": labels, "user": pa.array(users), "I1": dense, "C1": ids})
        writer.finish(dataset="own", protocol="own")
    Path("kept/report.json").write_text('{"generated": true}')
    arms = planned(options=("--data.path", "kept"))
    runs = [
        str(leave_run(arm, s, Path("out"), skill)) for arm, skill in zip(arms, (2.0, 1.0), strict=True) for s in (1, 2)
    ]
    assert main(["compare", *runs, "--output", "out", "--group", "user"]) == 0
    said, html = capsys.readouterr().out, " ".join(Path("out/report.html").read_text().split())
    document = json.loads(Path("out/report.json").read_text())
    for run in document["runs"]:
        rows = pq.read_table(Path("out/scores") / run["name"] / "predictions.parquet")
        expected = plain_group_auc(rows["probability"].to_numpy(), labels, users)
        assert {name: run["metrics"][f"test/{name}"] for name in expected} == pytest.approx(expected, abs=1e-9)
        assert f">{expected['group_auc']:.5f}</td>" in html
    for arm, of_runs in zip(document["arms"], (document["runs"][:2], document["runs"][2:]), strict=True):
        interval = arm["intervals"]["group_auc"]
        mean = np.mean([run["metrics"]["test/group_auc"] for run in of_runs])
        assert interval["low"] < interval["mean"] < interval["high"] and interval["mean"] == pytest.approx(mean)
    for text in (said, html):
        assert f"AUC by group: mean over {expected['groups']} groups with both labels" in text
    of_groups = document["pairs"][-1]
    assert of_groups["metric"] == "group_auc" and re.search(
        r"^AUC by group .*\n.*  not distinguishable$", said, re.MULTILINE
    )
    assert of_groups["low"] < of_groups["difference"] < of_groups["high"]
    assert "Data: own, protocol own, fingerprint" in html
    assert "<h1>DLRM and DCN, generated own data (protocol own)</h1>" in html and "split: generated clicks" in said
    (header,) = (line for line in said.splitlines() if "accuracy  AUC by group" in line)
    assert len(header) < 80

    assert "no kept column 'nope' to group by" in error_of(capsys, *runs, "--output", "out", "--group", "nope")
    config = yaml.safe_load(Path(runs[0], "config.yaml").read_text())
    config["data"]["init_args"]["group"] = "user"
    Path(runs[0], "config.yaml").write_text(yaml.safe_dump(config))
    assert "the runs are grouped by no column, user: give the column" in error_of(capsys, *runs, "--output", "out")
    assert main(["compare", *runs, "--output", "out", "--group", "user"]) == 0, "it makes no other configuration"
    assert "error: arm dlrm: kept has no kept column 'nope'" in error_of(
        capsys, "--config", "tiny.yaml", "--data.path", "kept", "--dry-run", "--group", "nope"
    )


def test_groups_are_counted_for_each_data_set() -> None:
    dlrm, _ = plain_arms()
    _, dcn = planned(options=("--data.demo.test_rows", "300"))
    runs = [read_run(leave_run(arm, 1, Path("out"), 1.0)) for arm in (dlrm, dcn)]
    scores, counts = {}, []
    for run, size in zip(runs, (50, 20), strict=True):
        (samples,) = shared_samples([run], "test").values()
        samples = dataclasses.replace(samples, groups=np.arange(len(samples.labels)) // size)
        scores[run.name] = read_scores(Path("out/scores") / run.name, samples)
        metrics = scores[run.name].metrics
        counts.append(f"{metrics['groups']} counted and {metrics['groups_left_out']} left out of demo (protocol demo, ")
    note = compare(arms_of(runs), scores, title="t", split="test").groups_note
    assert counts[0].startswith("8 ") and counts[1].startswith("15 ")
    assert f"({counts[0]}" in note and f") for DLRM; {counts[1]}" in note and note.endswith(") for DCN)")


def test_one_seed_on_one_side_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    dlrm, dcn = plain_arms()
    runs = [read_run(leave_run(arm, seed, Path("out"), 1.0)) for arm, seed in ((dlrm, 1), (dlrm, 2), (dcn, 1))]
    (samples,) = shared_samples(runs, "test").values()
    scores = {run.name: read_scores(Path("out/scores") / run.name, samples) for run in runs}
    comparison = compare(arms_of(runs), scores, title="t", split="test")
    for pair in comparison.pairs:
        assert pair.verdict == "none" and pair.word == "none: one seed" and pair.unadjusted_word == "-"
        assert pair.reason.endswith("the variation over the seeds of DCN, because it has one seed")
        # What the interval is made of can be read: the seeds of the other side, and the samples.
        metric: Any = pair.metric
        of_dlrm = [scores[f"dlrm-{seed}"].metrics[metric] for seed in (1, 2)]
        assert pair.seed_variance == pytest.approx(np.var(of_dlrm, ddof=1) / 2)
    (document, *_) = comparison.document()["pairs"]
    t, z = stats.t.ppf(0.975, document["degrees_of_freedom"]), stats.norm.ppf(0.975)
    reach = np.hypot(t * document["seed_variance"] ** 0.5, z * document["sample_variance"] ** 0.5)
    assert document["high"] - document["difference"] == pytest.approx(reach)
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: path.write_bytes(DOT))
    caption = ResultDrawing(comparison, Path("f")).differences().caption
    assert "interval over the seeds of each side that has several (DCN: one) and over the samples." in caption
    experiment = dataclasses.replace(comparison, experiment=True)
    for of, advice in ((comparison, "other values of seed_everything"), (experiment, "--seeds 1,2,3,4,5")):
        assert advice in below_head(of)


def test_a_verdict_has_the_same_words_everywhere() -> None:
    dlrm, dcn = plain_arms()
    runs = [read_run(leave_run(arm, seed, Path("out"), 1.0)) for arm in (dlrm, dcn) for seed in (1, 2)]
    (samples,) = shared_samples(runs, "test").values()
    scores = {run.name: read_scores(Path("out/scores") / run.name, samples) for run in runs}
    found = compare(arms_of(runs), scores, title="t", split="test")
    pairs = [
        dataclasses.replace(pair, verdict="not_distinguishable", unadjusted="not_distinguishable", p_adjusted=0.5)
        for pair in found.pairs
    ]
    found = dataclasses.replace(found, pairs=pairs)
    words = report.closing_words(found, Path("out"))
    assert len(re.findall(r"0\.5000  not distinguishable$", words, re.MULTILINE)) == 2 and "none" not in words
    report.write_report(found, [], {arm.name: anatomy(arm.runs[0]) for arm in found.arms}, NO_STEPS, Path("r.html"))
    html = Path("r.html").read_text()
    assert 'data-name="verdict">not distinguishable (p 0.5000)</td>' in html
    assert html.count('>not distinguishable</td><td data-name="without adjustment">not distinguishable, p ') == 2
    assert "no verdict" not in html and "none: one seed" not in html
    # The settings that both share, and the arguments that only one network has.
    for name, value in (
        ("data.batch_size", "200"), ("steps", "10"), ("trainer.precision", "32-true"), ("schedule", "none"),
        ("table_optimizer.learning_rate", "1.0"), ("network.embedding_dim", "4"),
    ):  # fmt: skip
        assert f'data-name="setting">{name}</td><td data-name="value">{value}</td>' in html
    assert re.search(r'"setting">network\.deep</td><td data-name="D\w+"[^>]*>[-4]</td><td data-name="D\w+"', html)
    assert 'network.dropout</td><td data-name="DLRM' not in html


def test_datasets_of_two_protocols_are_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [leave_run(arm, 1, Path("out"), 1.0) for arm in plain_arms()]
    for run, protocol in zip(runs, ("modern", "quantile"), strict=True):
        summary = json.loads((run / "summary.json").read_text())
        summary["final"] |= {"protocol": protocol, "encoding_fingerprint": protocol, "data_fingerprint": protocol}
        (run / "summary.json").write_text(json.dumps(summary))
    error = error_of(capsys, *map(str, runs), "--output", "out")
    assert "used different data" in error and "protocol: modern in dlrm-1; quantile in dcn-1" in error


def test_other_data_are_refused_unless_forced(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dlrm, _ = plain_arms()
    _, dcn = planned(options=("--data.demo.test_rows", "300"))
    runs = [leave_run(arm, seed, Path("out"), 1.0) for arm in (dlrm, dcn) for seed in (1, 2)]
    arguments = [*map(str, runs), "--output", "out"]
    error = error_of(capsys, *arguments)
    assert "used different data (data.init_args.demo.test_rows: 400, 300), so" in error
    assert not Path("out/report.json").exists()

    titles: dict[str, str] = {}

    def save(figure: Figure, path: Path, **options: Any) -> None:
        path.write_bytes(b"")
        titles[path.stem] = figure.get_suptitle()

    monkeypatch.setattr(Figure, "savefig", save)
    assert main(["compare", *arguments, "--force"]) == 0
    said, html = capsys.readouterr().out, " ".join(Path("out/report.html").read_text().split())
    assert "WARNING: data fingerprint" in said and "these runs are of different data" in html
    one, two = (
        f"demo (protocol demo, fingerprint {read_run(run).final['data_fingerprint'][:12]})" for run in runs[::2]
    )
    assert f"<h1>DLRM on {one} and DCN on {two}</h1>" in html and "No ranking: the runs are of different data" in html
    for text in (said, html):
        assert f"400 of {one} for DLRM; 300 of {two} for DCN" in text
        assert "AUC of DLRM and of DCN, each on its own data," in text and "they share no sample" in text
        assert "is better than" not in text
    # Of the split that is scored, each of its own data.
    for title, run in ((one, runs[0]), (two, runs[2])):
        (samples,) = shared_samples([read_run(run)], "test").values()
        best = f"The data of {title} are generated clicks, whose best reachable AUC on the test split is"
        assert f"{best} {samples.best_auc:.4f}." in html
    assert len(titles) >= 8 and all("WARNING: different data" in title for title in titles.values()), titles
    pairs = json.loads(Path("out/report.json").read_text())["pairs"]
    assert all("2 and 2 seeds" in pair["reason"] for pair in pairs), "other samples cannot be taken in pairs"


def test_sizes_of_demo_data_say_nothing_beside_other_data() -> None:
    dlrm, _ = plain_arms()
    _, dcn = planned(options=("--data.demo.test_rows", "300"))
    runs = [leave_run(arm, 1, Path("out"), 1.0) for arm in (dlrm, dcn)]
    config = yaml.safe_load((runs[0] / "config.yaml").read_text())
    config["data"]["init_args"]["path"] = "real"
    (runs[0] / "config.yaml").write_text(yaml.safe_dump(config))
    lines = data_differences([read_run(run) for run in runs])
    assert lines[-1] == "data.init_args.path: real, demo" and not any("test_rows" in line for line in lines)
    before = settings_of(config)
    config["data"]["init_args"]["demo"]["test_rows"] = 1
    assert settings_of(config) == before, "nor do they make another configuration"


def test_runs_from_before_an_option_are_of_the_same_configuration() -> None:
    arms = plain_arms()
    config = keep_configurations(arms, Path("out"))["dlrm"]
    runs = [leave_run(arms[0], seed, Path("scores"), 1.0) for seed in (1, 2)]
    for path in (config, runs[0] / "config.yaml"):
        earlier = yaml.safe_load(path.read_text())
        assert earlier["model"].pop("wide_optimizer", "missing") is None
        path.write_text(yaml.safe_dump(earlier))
    check_configurations(arms, Path("out"))
    (arm,) = arms_of([read_run(run) for run in runs])
    assert arm.seeds == (1, 2)


def test_what_is_missing_in_a_run_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    dlrm, dcn = plain_arms()
    one, two = leave_run(dlrm, 1, Path("out"), 1.0), leave_run(dcn, 1, Path("out"), 1.0)
    arguments = [str(one), str(two), "--output", "out"]
    kept = (one / "summary.json").read_text()

    summary = json.loads(kept)
    del summary["final"]["validation/auc"]
    (one / "summary.json").write_text(json.dumps(summary))
    assert "the run dlrm-1 has no validation/auc in its summary.json" in error_of(capsys, *arguments)

    with (one / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "samples": 2200}\n')
    (one / "summary.json").write_text(kept)
    assert "dlrm-1 is not finished: it has gone on to step 11" in error_of(capsys, *arguments)
    (one / "summary.json").unlink()
    assert "dlrm-1 is not finished; end it with: python -m lightning_dlrm fit" in error_of(capsys, *arguments)

    (one / "summary.json").write_text(kept)
    (one / "metrics.jsonl").write_text("")
    (Path("out/scores") / two.name / "source.json").unlink()
    assert "dcn-1 has no checkpoints/best to score" in error_of(capsys, *arguments)
    assert "only one run is given; give runs of at" in error_of(capsys, str(one), "--output", "out")
    assert f"the run {one} is given twice" in error_of(capsys, str(one), str(one), "--output", "out")


def test_runs_are_grouped_by_configuration_whatever_their_seed() -> None:
    dlrm, dcn = plain_arms()
    runs = [read_run(leave_run(arm, seed, Path("out"), 1.0)) for seed in (2, 1) for arm in (dlrm, dcn)]
    assert [(arm.name, arm.seeds) for arm in arms_of(runs)] == [("DLRM", (1, 2)), ("DCN", (1, 2))]
    with pytest.raises(UserError, match="the same configuration and seed"):
        arms_of([*runs, runs[0]])


def test_a_setting_of_0_is_a_number_in_tables() -> None:
    values = [0, 0.0, None, False, True, [512, 256], "models.DLRM"]
    assert [format_value(value) for value in values] == ["0", "0.0", "-", "-", "True", "512, 256", "DLRM"]


@pytest.mark.parametrize(
    ("interval", "shown"),
    [
        ((0.0215, 0.0167, 0.0262), "0.0215 (0.0167 to 0.0262)"),
        ((0.00046, -0.01524, 0.01614), "0.0005 (-0.0152 to 0.0161)"),
        ((0.0, -0.01524, 0.01524), "0.000 (-0.015 to 0.015)"),
        ((1e-9, -0.01524, 0.01524), "0.00000 (-0.01524 to 0.01524)"),
        ((-0.0205, -0.0406, -0.0004), "-0.0205 (-0.0406 to -0.0004)"),
    ],
)
def test_a_difference_has_a_digit_that_is_not_0(interval: tuple[float, float, float], shown: str) -> None:
    value, low, high = interval
    assert distance(Interval(value=value, low=low, high=high)) == shown


def test_networks_give_the_title_each_with_its_version() -> None:
    runs = [read_run(leave_run(arm, 1, Path("out"), 1.0)) for arm in plain_arms()]
    config = copy.deepcopy(dict(runs[1].config))
    config["model"]["network"]["init_args"]["cross"] = "matrix"
    config["model"]["table_optimizer"]["class_path"] = "lightning_dlrm.Adagrad"
    newer = Arm(name="dcnv2", runs=[dataclasses.replace(runs[1], config=config)])
    assert title_of([*arms_of(runs), newer]) == "DLRM, DCN and DCN v2, demo data"
    four = [
        Arm(name=rule, runs=[dataclasses.replace(run, config=copy.deepcopy(dict(run.config)))])
        for run in (runs[0], runs[1])
        for rule in ("SGD", "Adagrad")
    ]
    for arm in four:
        arm.runs[0].config["model"]["table_optimizer"]["class_path"] = f"lightning_dlrm.{arm.name}"
    assert is_figure5(four)


def test_times_of_a_busy_machine_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    # With half of their samples, runs look as if they were still improving.
    monkeypatch.setattr(training_length, "_FEW_STEPS", 0)
    dlrm, dcn = plain_arms()
    paths = [leave_run(arm, seed, Path("out"), 1.0) for arm in (dlrm, dcn) for seed in (1, 2)]
    summary = json.loads((paths[1] / "summary.json").read_text())
    summary["final"][names.TRAINING_SECONDS] *= 25
    (paths[1] / "summary.json").write_text(json.dumps(summary))
    summary = json.loads((paths[3] / "summary.json").read_text())
    summary["final"] |= {names.SAMPLES_PER_SECOND: 60.0, names.SAMPLES: 1000}
    (paths[3] / "summary.json").write_text(json.dumps(summary))
    runs = [read_run(path) for path in paths]
    samples = shared_samples(runs, "test")
    scores = {run.name: read_scores(Path("out/scores") / run.name, *samples.values()) for run in runs}
    comparison = compare(arms_of(runs), scores, title="t", split="test")
    assert not comparison.steady(names.TRAINING_SECONDS) and not comparison.steady(names.SAMPLES_PER_SECOND)
    # Unequal training is said under the answer.
    unequal = "Trained on different numbers of samples: "
    of_dlrm, of_dcn = "DLRM 2,000", "DCN 1,000 to 2,000"
    _, _, doubts, _ = answer(comparison)
    assert doubts.endswith((f"{unequal}{of_dlrm}; {of_dcn}.", f"{unequal}{of_dcn}; {of_dlrm}."))
    # The first sentence has the lead, its interval and the data; the reason why there is no verdict follows it.
    pairs = [dataclasses.replace(p, verdict="not_distinguishable", unadjusted="a_better") for p in comparison.pairs]
    head, reason, *_ = answer(dataclasses.replace(comparison, pairs=pairs))
    assert re.fullmatch(
        r"No clear winner on demo data: \w+ has the highest AUC, 0\.\d{4}, 0\.\d+ above \w+ "
        r"\(95% interval [^)]*\), 2 seeds each\.",
        head,
    )
    adjusted = "is too uncertain for a verdict after adjustment for 2 comparisons, although its interval excludes 0"
    (winner,) = re.findall(rf"The lead of (\w+) over \w+ {adjusted}\.", reason)
    assert winner == ranked(comparison)[0].name and "By log loss the same lead is too uncertain." in reason
    level = [pairs[0], dataclasses.replace(pairs[1], unadjusted="not_distinguishable")]
    assert "same lead" not in below_head(dataclasses.replace(comparison, pairs=level))
    # What gives a verdict depends on where the uncertainty comes from.
    for seeds, remedy in (
        (1.0, r" With 2 seeds each, \d+% of the uncertainty comes from the seeds\. "),
        (
            0.0,
            r" 100% of the uncertainty comes from the 400 test samples\. ",
        ),
    ):
        differences = [dataclasses.replace(p.difference, seed_variance=seeds, sample_variance=0.5) for p in pairs]
        both = [dataclasses.replace(p, difference=d) for p, d in zip(pairs, differences, strict=True)]
        assert re.search(remedy, below_head(dataclasses.replace(comparison, pairs=both)))
    # If the mean of a configuration is random, none of its runs has trained.
    arm = comparison.arms[1]
    lucky = {
        run.name: dataclasses.replace(scores[run.name], metrics=scores[run.name].metrics | {"auc": auc})
        for run, auc in zip(arm.runs, (0.62, 0.38), strict=True)
    }
    assert dataclasses.replace(comparison, scores=scores | lucky).random_runs(arm) == list(arm.runs)
    found_parts = {arm.name: anatomy(arm.runs[0]) for arm in comparison.arms}
    # A step of 200 samples at 100 samples/s takes 2,000 ms; that of DCN 2,500 ms in the median.
    in_training = {"DLRM": 2000.0, "DCN": 2500.0}
    steps = StepTimes(alone={"DLRM": {"a": 1400.0, "b": 100.0}, "DCN": {"a": 2000.0}}, in_training=in_training)
    assert (steps.slow_in_training, steps.slow_alone, steps.shown) == ([], [], steps.alone)
    titles, *rows = report._costs(comparison, found_parts, steps)
    found = {row[0]: dict(zip(titles, row, strict=True)) for row in rows}
    title = "step in training (milliseconds)"
    assert {name: found[name][title] for name in found} == {"DLRM": "2,000", "DCN": "2,000 to 3,333"}
    title = "seconds of training (lowest to highest)"
    assert found["DLRM"][title] == "1.0 to 25.0" and found["DCN"][title] == "1.0"
    assert found["DLRM"]["samples per second (lowest to highest)"] == "100"
    assert [found[name]["samples"] for name in ("DLRM", "DCN")] == ["2,000", "1,000 to 2,000"]
    # One disturbed configuration is enough to show none.
    for milliseconds, slow in ((4000.0, ([], ["DCN"])), (1000.0, (["DCN"], []))):
        busy = StepTimes(alone=steps.alone | {"DCN": {"a": milliseconds}}, in_training=in_training)
        assert (busy.slow_in_training, busy.slow_alone) == slow and not busy.shown
        assert not any("step" in title for title in report._costs(comparison, found_parts, busy)[0])
    drawn: dict[str, Figure] = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: drawn.update({path.stem: figure}))
    draw_all(comparison, found_parts, NO_STEPS, Path("figures"))
    labels = {name: [axes.get_xlabel() for axes in figure.axes] for name, figure in drawn.items()}
    assert not any("second" in label for name in ("auc", "log_loss", "cost") for label in labels[name])


def test_the_legend_of_differences_names_the_verdicts_that_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = after(STAYS, STAYS)
    drawn: dict[str, Figure] = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: drawn.update({path.stem: figure}))
    auc, log_loss = (dataclasses.replace(pair, verdict="a_better") for pair in comparison.pairs)
    undecided = dataclasses.replace(auc, verdict="not_distinguishable")
    untrained = dataclasses.replace(log_loss, untrained=["DCN"])
    for pairs, labels in (
        ([auc, log_loss], ["filled: they differ (verdict)"]),
        ([untrained], ["open: no verdict, because a side did not train"]),
        ([dataclasses.replace(auc, verdict="none", single=["DCN"])], ["open: no verdict from one seed"]),
        ([auc, untrained], ["filled: they differ (verdict)", "open: no verdict, because a side did not train"]),
        ([undecided, untrained], ["open: not distinguishable; or no verdict, because a side did not train"]),
    ):
        found = dataclasses.replace(comparison, pairs=pairs)
        ResultDrawing(found, Path("figures"), narrow=False).differences()
        (legend,) = drawn["differences"].legends
        assert [text.get_text() for text in legend.get_texts()] == labels


@pytest.mark.parametrize(
    ("milliseconds", "seeds", "greys"),
    # With several seeds, equal speeds show that only the measurement alone was disturbed.
    [(100.0, (1, 2), 2), (2000.0, (1, 2), 0), (9000.0, (1, 2), 0), (9000.0, (1,), 2), (2000.0, (1,), 0)],
)
def test_times_are_grey_if_training_was_disturbed(
    milliseconds: float, seeds: tuple[int, ...], greys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [read_run(leave_run(arm, seed, Path("out"), 1.0)) for arm in plain_arms() for seed in seeds]
    samples = shared_samples(runs, "test")
    scores = {run.name: read_scores(Path("out/scores") / run.name, *samples.values()) for run in runs}
    comparison = compare(arms_of(runs), scores, title="t", split="test")
    parts = {arm.name: anatomy(arm.runs[0]) for arm in comparison.arms}
    # A step in training takes 2,000 ms.
    operators = {name: dict.fromkeys(anatomies.KINDS, 0.0) | {"matrix products": milliseconds} for name in parts}
    steps = StepTimes(alone=operators, in_training=dict.fromkeys(parts, 2000.0))
    drawn: dict[str, Figure] = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: drawn.update({path.stem: figure}))
    # Only the figure of costs: the other figures take six seconds.
    CostDrawing(comparison, Path("figures"), narrow=False).cost(steps)
    assert bool(steps.shown) == (milliseconds == 2000)
    bars = {axes.get_xlabel(): axes.patches for axes in drawn["cost"].axes}
    found = {
        label: sum(bar.get_facecolor()[:3] == (0.7, 0.7, 0.7) for bar in of_panel) for label, of_panel in bars.items()
    }
    assert found == {"seconds of training": greys, "samples/s": greys, "peak memory of the process, GiB": 0}


def test_a_sharded_run_shows_what_each_rank_held() -> None:
    dlrm, _ = plain_arms()
    path = leave_run(dlrm, 1, Path("out"), 1.0)
    alone = anatomy(read_run(path))
    assert alone.sharding is None
    assert sum(alone.tables.values()) == dlrm.size.tables and sum(alone.dense.values()) == dlrm.size.dense
    summary = json.loads((path / "summary.json").read_text())
    summary["final"]["parallel/ranks"] = 2
    (path / "summary.json").write_text(json.dumps(summary))
    sharding = anatomy(read_run(path)).sharding
    assert sharding is not None and [cost.rank for cost in sharding.costs] == [0, 1]
    assert TINY["embedding_dim"] * sum(cost.rows for cost in sharding.costs) == dlrm.size.tables
    assert anatomy(read_run(path)).batch_size == 200
    steps = steps_of(arms_of([read_run(path)]))
    assert (steps.alone, steps.notes) == ({}, ["DLRM: its tables are on 2 ranks"])


def test_steps_are_taken_apart_as_they_were_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    dlrm, _ = plain_arms()
    path = leave_run(dlrm, 1, Path("out"), 1.0)
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["model"]["kernels"] = "plain"
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    asked = []
    monkeypatch.setattr(lookup, "choose", lambda kernels, *_: asked.append(kernels) or "plain")
    steps = steps_of(arms_of([read_run(path)]))
    assert steps.alone["DLRM"]["matrix products"] > 0 and not steps.notes and set(asked) == {"plain"}
    # The kinds are those of the step of median time.
    kind, other, *rest = anatomies.KINDS
    of_steps = [{kind: a, other: b, **dict.fromkeys(rest, 0.0)} for a, b in ((0, 0), (1, 9), (5, 1), (2, 2))]
    with monkeypatch.context() as patch:
        patch.setattr(anatomies, "profile_steps", lambda *given: of_steps)
        patch.setattr(anatomies, "by_kind", lambda step: step)
        times = anatomies.measure(read_run(path))
    assert (times[kind], times[other]) == (5000, 1000)
    config["trainer"]["precision"] = "bf16-true"
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    steps = steps_of(arms_of([read_run(path)]))
    assert not steps.alone and steps.notes[0].endswith("and its precision is bf16-true")


def test_times_are_kept_for_what_they_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    dlrm, _ = plain_arms()
    arms = arms_of([read_run(leave_run(dlrm, 1, Path("out"), 1.0))])
    measured = []
    times = AS_IN_TRAINING
    monkeypatch.setattr(anatomies, "measure", lambda run: measured.append(run.name) or times)
    for _ in range(2):
        assert steps_of(arms).alone == {"DLRM": times}
    assert len(measured) == 1
    monkeypatch.setattr(anatomies, "code_version", lambda: {"version": "9", "git_commit": None})
    steps_of(arms)
    assert len(measured) == 2
    monkeypatch.setattr(torch, "__version__", "9")
    steps_of(arms)
    Path("operators.json").write_text('{"half": {"matrix')
    steps_of(arms)
    assert len(measured) == 4 and json.loads(Path("operators.json").read_text())
    # A step in training takes 2,000 ms: others of more than 1.5 times as long, or as short, are measured again.
    kept = Path("operators.json").read_text()
    for milliseconds in (4000.0, 1.0):
        times = dict.fromkeys(anatomies.KINDS, milliseconds / len(anatomies.KINDS))
        Path("operators.json").write_text(json.dumps(dict.fromkeys(json.loads(kept), times)))
        before = len(measured)
        assert not steps_of(arms).shown and not steps_of(arms).shown and len(measured) == before + 2
    times = AS_IN_TRAINING
    before = len(measured)
    assert steps_of(arms).shown == steps_of(arms).shown == {"DLRM": times} and len(measured) == before + 1
    # Without a steady speed of training there is nothing to compare with.
    slow = dataclasses.replace(arms[0].runs[0], final=dict(arms[0].runs[0].final) | {names.SAMPLES_PER_SECOND: 60.0})
    steps = steps_of([dataclasses.replace(arms[0], runs=[*arms[0].runs, slow])])
    assert not steps.alone and "factor of more than 1.5" in steps.notes[0] and len(measured) == before + 1


def test_marks_do_not_hide_each_other_and_parts_have_colours_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [leave_run(arm, 1, Path("out"), skill) for arm, skill in zip(plain_arms(), (1.0, 2.0), strict=True)]
    for path in paths:
        last = (path / "metrics.jsonl").read_text().splitlines()[-1]
        (path / "metrics.jsonl").write_text(last + "\n")
    runs = [read_run(path) for path in paths]
    samples = shared_samples(runs, "test")
    scores = {run.name: read_scores(Path("out/scores") / run.name, *samples.values()) for run in runs}
    arms = arms_of(runs)
    drawn: dict[str, Figure] = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: drawn.update({path.stem: figure}))
    comparison = compare(arms, scores, title="t", split="test")
    pictures = draw_all(comparison, {arm.name: anatomy(arm.runs[0]) for arm in arms}, NO_STEPS, Path("figures"))
    assert {picture.name: picture.width for picture in pictures}["figure5"] == PAGE_WIDTH
    # A figure says on its own what it is of, and names the paper only for the paper's configurations.
    sources = [drawn[name].texts[-1].get_text() for name in ("results", "accuracy", "parameters")]
    assert sources == ["demo data, test split, 1 seed", "demo data, 1 seed", "demo data"]
    captions = {picture.name: picture.caption for picture in pictures}
    assert "Naumov" not in captions["figure5"] and not is_figure5(arms)
    assert "It is first logged at 2,000 samples." in captions["auc"] and "not shown" not in captions["auc"]
    for axes, pairs in zip(drawn["differences"].axes, (comparison.pairs[:1], comparison.pairs[1:]), strict=True):
        (pair,) = pairs
        # Winner minus loser, with the better side in words: to the right for the AUC, to the left for the log loss.
        assert [label.get_text() for label in axes.get_yticklabels()] == ["DCN\nminus DLRM"]
        # Both halves begin at 0.
        left, right = (text.get_text() for text in axes.texts)
        assert (pair.interval.value > 0) == (right == "DCN better →") == (left == "← DLRM better")
        assert {text.xy[0] for text in axes.texts} == {0}
    assert all(axes.get_xlim()[0] == 0 for axes in drawn["auc"].axes)
    # The log loss has the level that a model should get below.
    rate = next(iter(samples.values())).train_click_rate
    assert rate is not None and "Dotted: the log loss of the click rate alone" in captions["log_loss"]
    entropy = -rate * np.log(rate) - (1 - rate) * np.log(1 - rate)
    for axes in drawn["log_loss"].axes:
        assert entropy in [line.get_ydata()[0] for line in axes.lines if line.get_label() == "click rate alone"]
    # A run of one logged step has points, and so has the legend.
    (legend,) = drawn["auc"].legends
    assert {line.get_linestyle() for line in legend.get_lines()} == {"None"}
    for axes in drawn["auc"].axes:
        # One validation a run: marks of one size beside each other, in the panel of the training samples.
        marks = [line for line in axes.lines if line.get_fillstyle() == "none" and line.get_marker() not in ("", ".")]
        assert len(marks) == 2 and len({line.get_markersize() for line in marks}) == 1
        assert len({float(line.get_transform().transform((0, 0))[0]) for line in marks}) == 2
        # None of them is beyond the end of the axis.
        ends = [float(line.get_transform().transform(line.get_xydata())[0][0]) for line in marks]
        assert axes.bbox.x0 < min(ends) < max(ends) < axes.bbox.x1
    # Equal tables are a sentence.
    (dense,) = ({bar.get_facecolor() for bar in axes.patches} for axes in drawn["parameters"].axes)
    (caption,) = (picture.caption for picture in pictures if picture.name == "parameters")
    assert "The tables are the same in all configurations: 26 with" in caption and len(dense) > 2
    other = dataclasses.replace(anatomy(arms[0].runs[0]), tables={"C1": 7, "own": 10**6})
    of_costs = CostDrawing(comparison, Path("figures"))
    picture = of_costs.parameters({"DLRM": other, "DCN": anatomy(arms[1].runs[0])})
    above, _ = drawn["parameters"].axes
    tables = {bar.get_facecolor() for bar in above.patches}
    assert len(tables) == 2 and not tables & dense
    assert "the 10 largest of 27 tables" in picture.caption
    # Configurations have the colours of the other figures, whatever their rank, and a lone bar is at its name.
    (lone,) = (bar for bar in above.patches if bar.get_width() == 10**6)
    assert lone.get_facecolor() == to_rgba(OKABE_ITO[0]) and lone.get_y() + lone.get_height() / 2 == 0
    # Configurations without a bar are in the caption, not in the legend.
    small = dataclasses.replace(other, tables={"C1": 1})
    whole = dataclasses.replace(other, tables={f"T{k}": 9 for k in range(10)})
    caption = of_costs.parameters({"DLRM": small, "DCN": whole}).caption
    assert (
        "the 10 largest of 11 tables; DLRM: 1 table with 1 parameter in all, all smaller than these; below" in caption
    )
    legend = drawn["parameters"].axes[0].get_legend()
    assert legend is not None and [text.get_text().split(":")[0] for text in legend.get_texts()] == ["DCN"]


def test_what_was_found_is_logged_beside_the_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read back by W&B's own reader: the report's figures, one of two ranks' load among them, and the numbers."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: path.write_bytes(DOT))
    monkeypatch.setattr(anatomies, "measure", lambda run: AS_IN_TRAINING)
    paths = [leave_run(arm, 1, Path("out"), 1.0) for arm in plain_arms()]
    for path in paths:
        config = yaml.safe_load((path / "config.yaml").read_text())
        config["wandb"] |= {"project": "p", "group": "g"}
        (path / "config.yaml").write_text(yaml.safe_dump(config))
    summary = json.loads((paths[1] / "summary.json").read_text())
    summary["final"]["parallel/ranks"] = 2
    (paths[1] / "summary.json").write_text(json.dumps(summary))
    note_source(read_run(paths[1]), "test", Path("out/scores/dcn-1"))
    assert main(["compare", *map(str, paths), "--output", "out"]) == 0
    said = capsys.readouterr().out
    assert "send it with:\n  wandb sync out/wandb/offline-run-*\n" in said and "dashboard --project p --group g" in said

    (run,) = Path("out/wandb").glob("offline-run-*")
    records = read_back(run)
    head = of_type(records, "run")[0]
    assert (head["project"], head["run_group"], head["job_type"], head["display_name"]) == ("p", "g", "compare", "out")
    logged = merged(records, "summary")
    for name in names.COMPARISON_FIGURES:
        assert logged[f"{names.comparison_figure(name)}._type"] == "images/separated", name
    drawn = {}
    for name in names.COMPARISON_TABLES:
        table = json.loads((run / "files" / logged[f"{names.comparison_table(name)}.path"]).read_text())
        drawn[name] = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["metric"] for row in drawn["verdicts"]] == ["auc", "log_loss"]
    counts = [row["parameters"] for row in drawn["parameters"] if row["configuration"] == "DLRM"]
    assert sum(counts) == summary_of(paths[0])["parameters/total"]
    assert {row["configuration"] for row in drawn["operators"]} == {"DLRM"}
    assert [row["rank"] for row in drawn["load"] if row["configuration"] == "DCN"] == [0, 1]
    (report,) = [artifact for artifact in of_type(records, "artifact") if artifact["type"] == "report"]
    assert {entry["path"] for entry in report["manifest"]["contents"]} == {"report.html", "report.json"}


def summary_of(run: Path) -> dict[str, Any]:
    final: dict[str, Any] = json.loads((run / "summary.json").read_text())["final"]
    return final


def test_verdicts_go_to_wandb_where_runs_are_online(monkeypatch: pytest.MonkeyPatch) -> None:
    arms = plain_arms()
    runs = [read_run(leave_run(arm, seed, Path("out"), 1.0)) for arm in arms for seed in (1, 2)]
    samples = shared_samples(runs, "test")
    scores = {run.name: read_scores(Path("out/scores") / run.name, *samples.values()) for run in runs}
    comparison = compare(arms_of(runs), scores, title="t", split="test")
    findings = [pair.sentence for pair in comparison.pairs]
    page = ComparisonPage(figures={}, tables={}, files=[], findings=findings)
    published = []
    monkeypatch.setattr(comparing, "choose_mode", lambda mode: ("online", ""))
    monkeypatch.setattr(comparing, "send_comparison", lambda page, output, place, *_: (f"https://w/{place.group}", ""))
    monkeypatch.setattr(comparing, "publish", lambda board: published.append(board) or {"report": "https://w/r"})
    settings = {"project": "p", "entity": "team", "mode": "auto", "group": "tiny-out"}
    said = comparing._to_wandb(page, settings, Path("out"))
    assert said == "W&B comparison: https://w/tiny-out\nW&B report: https://w/r"
    assert published == [Dashboard(project="p", entity="team", group="tiny-out", findings=findings, comparison=True)]

    def refuse(board: Dashboard) -> None:
        raise UserError("no extra")

    monkeypatch.setattr(comparing, "publish", refuse)
    said = comparing._to_wandb(page, settings, Path("out"))
    assert "no workspace and no report (no extra); later:\n  python -m" in said


def test_a_server_that_refuses_the_page_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def init(**options: Any) -> Any:
        started.append(options["mode"])
        if options["mode"] == "online":
            raise wandb.errors.CommError("permission\n denied")
        return real(**options)

    real = wandb.init
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(comparing, "choose_mode", lambda mode: ("online", ""))
    monkeypatch.setattr(comparing, "publish", lambda board: pytest.fail("there is nothing there to publish"))
    Path("out").mkdir()
    page = ComparisonPage(figures={}, tables={}, files=[])
    settings = {"project": "p", "entity": None, "mode": "auto", "group": "g"}
    said = comparing._to_wandb(page, settings, Path("out"))
    assert said.startswith("W&B: offline (permission denied); send it with:\n  wandb sync out/wandb/offline-run-*\n")
    assert started == ["online", "offline"] and wandb.run is None


def test_a_page_that_cannot_be_logged_leaves_no_run_open(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("out").mkdir()
    page = ComparisonPage(figures={}, tables={}, files=[Path("nosuch.html")])
    with pytest.raises(ValueError, match="nosuch"):
        send_comparison(page, Path("out"), RunPlace(project="p", name="out"), "offline")
    assert wandb.run is None


# --- processes -----------------------------------------------------------------------------------------


def job(name: str, *commands: list[str]) -> Job:
    return Job(name=name, commands=commands, run=Path(name), log=Path("logs") / f"{name}.log")


def test_jobs_go_on_where_one_fails() -> None:
    done = []
    jobs = [job("bad", ["nosuch"]), job("good", ["--help"], ["--help"])]
    with pytest.raises(UserError, match=r"1 of 2 runs failed.*\n  bad ended with code 2: no command nosuch"):
        run_jobs(jobs, device_environments(2, []), lambda finished: done.append(finished.name))
    assert done == ["good"]
    assert Path("logs/good.log").read_text().count("usage:") == 2


def test_jobs_go_on_where_the_results_of_one_cannot_be_used() -> None:
    seen = []

    def look(finished: Job) -> None:
        seen.append(finished.name)
        if finished.name == "bad":
            raise UserError("no validation")

    with pytest.raises(UserError, match=r"1 of 2 runs failed.*\n  bad left no usable results: no validation"):
        run_jobs([job("bad", ["--help"]), job("good", ["--help"])], device_environments(1, []), look)
    assert seen == ["bad", "good"]


def test_a_run_that_another_process_is_at_is_left_alone() -> None:
    Path("logs").mkdir()
    with FolderLock(Path("busy"), Path("logs/busy.lock")), pytest.raises(UserError, match="busy is in use by process"):
        run_jobs([job("busy", ["--help"])], device_environments(1, []), lambda finished: None)


def test_slots_share_out_gpus_or_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert device_environments(None, ["0", "3"]) == [
        {"CUDA_VISIBLE_DEVICES": "0"},
        {"CUDA_VISIBLE_DEVICES": "3"},
    ]
    assert device_environments(None, []) == [{}]
    cores = len(os.sched_getaffinity(0))
    assert device_environments(2, []) == [{"OMP_NUM_THREADS": str(max(1, cores // 2))}] * 2


def test_sigterm_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.setattr(processes.time, "sleep", lambda _: signal.raise_signal(signal.SIGTERM))
    job = Job(name="a", commands=[["--version"]], run=tmp_path / "a", log=tmp_path / "log")
    with pytest.raises(SystemExit) as left:
        run_jobs([job], [{}], lambda job: None)
    assert left.value.code == 143 and capsys.readouterr().err.splitlines()[-1].startswith("interrupted: stopping the")
    assert not list(tmp_path.glob("*.lock"))


def test_samples_so_far_are_read_from_half_written_lines(tmp_path: Path) -> None:
    assert trained_samples(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "samples": 200}\n{"step": 2, "sam')
    assert trained_samples(tmp_path) == 200


def test_the_bar_is_full_when_all_is_scored(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/metrics.jsonl").write_text('{"step": 2, "samples": 50}\n')
    fitted = Job(name="a", commands=[], run=tmp_path / "a", log=tmp_path / "log", samples=100.0, scored=60.0)
    progress = processes._Progress([fitted])
    with (tmp_path / "log").open("wb") as log, FolderLock(tmp_path) as lock:
        running = processes._Running(job=fitted, slot=0, waiting=[["predict"]], log=log, lock=lock)
        progress.show([running])
        assert "a 50%" in str(progress._bar) and " 31%" in str(progress._bar)
        (tmp_path / "a/metrics.jsonl").write_text('{"step": 4, "samples": 100}\n')
        running.waiting.clear()
        progress.show([running])
        assert str(progress._bar).endswith("0/1 runs, a: starting to score") and " 62%" in str(progress._bar)
        log.write(b"predict  50%|# | batches 1/2 00:10<00:10\n")
        log.flush()
        progress.show([running])
        assert "0/1 runs, a: scoring 50%" in str(progress._bar) and " 81%" in str(progress._bar)
    progress.done(fitted)
    progress.show([])
    assert "100%" in str(progress._bar) and "1/1 runs" in str(progress._bar)
    progress.close()


def test_the_scored_share_is_that_of_the_running_command(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert scored_share(log, 0) == 0
    log.write_text("predict  90%|# | batches 9/10 00:10<00:10\n")
    first = log.stat().st_size
    assert scored_share(log, first) == 0
    with log.open("a") as file:
        file.write(
            "fit 50%|# | batches 5/10 0\npredict  10%|# | batches 1/10 00:10<?\npredict  20%|# | batches 2/10 0\n"
        )
    assert scored_share(log, first) == 0.2


@pytest.mark.slow
def test_an_experiment_runs_once_stops_cleanly_and_goes_on() -> None:
    write_experiment(seeds=[5])
    command = [sys.executable, "-m", "lightning_dlrm", "compare", "--config", "tiny.yaml", "--output", "out"]
    command += ["--parallel", "2", "--discard-checkpoints"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not list(Path("out/runs").glob("*/metrics.jsonl")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143

    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    document = json.loads(Path("out/report.json").read_text())
    assert [run["name"] for run in document["runs"]] == ["dlrm-5", "dcn-5"]
    for run in document["runs"]:
        configuration = yaml.safe_load((Path(run["folder"]) / "config.yaml").read_text())
        assert configuration["seed_everything"] == configuration["data"]["init_args"]["seed"] == 5
        assert configuration["wandb"]["group"] == "tiny-out"
        assert not (Path(run["folder"]) / "checkpoints").exists()
    written = {path: path.stat().st_mtime_ns for path in Path("out").glob("runs/*/*")}
    assert main(command[3:]) == 0
    assert written == {path: path.stat().st_mtime_ns for path in Path("out").glob("runs/*/*")}
    for dry_run in ([], ["--dry-run"]):
        with pytest.raises(UserError, match="out holds runs with other settings of dlrm"):
            comparing.run([*command[4:], "--trainer.max_steps", "3", *dry_run])


# --- published scores ----------------------------------------------------------------------------------


def test_published_scores_are_shown_with_the_distance_from_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_parameters", lambda *found: [[""]])
    dlrm, dcn = plain_arms()
    folders = [leave_run(arm, seed, Path("out"), 1.0) for arm in (dlrm, dcn) for seed in (1, 2)]
    for folder in folders[:2]:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["published"] = [{"metric": "accuracy", "value": 0.25, "source": "a paper"}]
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for folder in folders:
        summary = json.loads((folder / "summary.json").read_text())
        summary["final"]["dataset"] = "kaggle"  # distances on demo data would say nothing
        (folder / "summary.json").write_text(json.dumps(summary))
    runs = [read_run(folder) for folder in folders]
    (samples,) = shared_samples(runs, "test").values()
    scores = {run.name: read_scores(Path("out/scores") / run.name, samples) for run in runs}
    comparison = compare(arms_of(runs), scores, title="t", split="test")
    mean = np.mean([scores[run.name].metrics["accuracy"] for run in runs[:2]])
    words = f"{mean - 0.25:.5f} above the published 0.25 (a paper; the source does not name the split)"
    line = f"DLRM: test accuracy {mean:.5f} is {words}"
    assert [comparison.published(arm) for arm in comparison.arms] == [[line], []]
    assert line in report.closing_words(comparison, Path("out")).splitlines()
    report.write_report(comparison, [], {}, NO_STEPS, Path("report.html"))
    assert f"<li>{line}</li>" in Path("report.html").read_text()
    assert comparison.document()["arms"][0]["published"] == [{"metric": "accuracy", "value": 0.25, "source": "a paper"}]
    assert published_notes(comparison.arms[0].published, {"test/accuracy": 0.3}, "test", "demo") == []
    of_test = [PublishedScore(metric="auc", value=0.8149, source="BARS, test split")]
    assert published_notes(of_test, {"test/auc": 0.5}, "test", "x1") == [
        "test AUC 0.50000 is 0.31490 below the published 0.8149 (BARS, test split)"
    ]
    assert published_notes(of_test, {"validation/auc": 0.5}, "validation", "x1") == []


def test_published_scores_of_another_form_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "dlrm.yaml", "--published", '[{"metric": "auk", "value": 1, "source": "x"}]']) == 2
    assert "auk" in capsys.readouterr().err
    run = read_run(leave_run(plain_arms()[0], 1, Path("out"), 1.0))
    arm = Arm(name="a", runs=[dataclasses.replace(run, config={**run.config, "published": [{"metric": "auc"}]})])
    with pytest.raises(UserError, match=r"published in .*config\.yaml is damaged or was changed \(0: value: "):
        _ = arm.published
