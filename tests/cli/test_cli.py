"""Contract: the commands a user types, as real processes where that matters: the way from raw rows to
predictions, kills and resumes, and exit codes."""

import json
import logging
import math
import os
import platform
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from sklearn.metrics import roc_auc_score

from lightning_dlrm.__main__ import COMMANDS, main
from lightning_dlrm.cli import version
from lightning_dlrm.cli.short_help import SHORT_HELP
from lightning_dlrm.contracts.schema import DatasetSchema
from tests.caches import new_cache
from tests.engine.test_finished import checksums
from tests.engine.test_guards import wreck
from tests.forked import ForkedPython, interpreter

REPOSITORY = Path(__file__).parents[2]
SAMPLE = REPOSITORY.parent / "shared/criteo_terabyte_sample/day_0"
TINY_DEMO = [
    "--data.demo.train_rows=8192",
    "--data.demo.validation_rows=2048",
    "--data.demo.test_rows=1024",
    "--data.demo.max_table_rows=1000",
]
FIT = ["fit", "--config", "dlrm.yaml", "--config", "small.yaml", *TINY_DEMO]
STOP_EARLY = "--trainer.callbacks=EarlyStopping --trainer.callbacks.monitor="
QUICK = ["--data.batch_size=256", "--trainer.log_every_n_steps=1", "--wandb.mode=disabled"]


@pytest.fixture(autouse=True)
def own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.chdir(tmp_path)
    # One cache for all tests: the demo data are made once.
    monkeypatch.setenv("LIGHTNING_DLRM_CACHE", new_cache(tmp_path_factory.getbasetemp() / "cache"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


def command(*arguments: str) -> list[str]:
    return [interpreter(), "-m", "lightning_dlrm", *arguments]


def losses(run: str) -> dict[int, float]:
    lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def raw_rows(path: Path, rows: int) -> Path:
    """Criteo-shaped TSV with missing values."""
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(rows):
            integers = ["" if draw.random() < 0.2 else str(draw.randint(-1, 50)) for _ in range(13)]
            hashes = ["" if draw.random() < 0.1 else f"{draw.randint(0, 40):08x}" for _ in range(26)]
            file.write("\t".join([str(draw.randint(0, 1)), *integers, *hashes]) + "\n")
    return path


@pytest.mark.parametrize("source", ["generated", "sample"])
def test_from_raw_rows_to_predictions(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if source == "sample" and not SAMPLE.is_file():
        pytest.skip("the sample of real Terabyte rows lies in ../shared, which is not here")
    raw, rows = (SAMPLE, 10_000) if source == "sample" else (raw_rows(tmp_path / "day_0", 3000), 3000)
    assert (
        main(["preprocess", "--dataset", "terabyte", "--protocol", "dlrm", "--input", str(raw), "--output", "data"])
        == 0
    )
    assert main(["inspect", "data", "--verify"]) == 0
    fit = ["fit", "--config", "dlrm.yaml", "--data.path", "data", "--run_dir", "run", "--data.batch_size", "500"]
    assert main([*fit, "--trainer.log_every_n_steps", "1", "--model.table_optimizer.learning_rate", "1.0"]) == 0
    schema = DatasetSchema.load(Path("data"))
    assert sum(split.rows for split in schema.splits.values()) == rows
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["final"]["samples"] == schema.splits["train"].rows
    assert len(losses("run")) == math.ceil(schema.splits["train"].rows / 500)

    again = ["--config", "run/config.yaml", "--ckpt_path", "run/checkpoints/best"]
    assert main(["validate", *again]) == 0
    found = json.loads(Path("run/validate.json").read_text())
    assert found["validation/auc"] == pytest.approx(summary["best"]["validation/auc"], abs=1e-12)

    for split, expected in {"validation": schema.splits["validation"].rows, "all": rows}.items():
        assert main(["predict", *again, "--data.predict_split", split]) == 0
        table = pq.read_table("run/predictions.parquet")
        assert table.schema.names == ["split", "row", "label", "probability"]
        assert [str(t) for t in table.schema.types] == ["string", "int64", "int8", "float"]
        splits = [split] if split != "all" else ["train", "validation", "test"]
        assert table["split"].to_pylist() == [name for name in splits for _ in range(schema.splits[name].rows)]
        assert table["row"].to_pylist() == list(range(expected))
        if split == "validation":
            labels = pq.read_table("data/validation", columns=["label"])["label"].to_numpy()
            assert table["label"].to_numpy().tolist() == labels.tolist()
            auc = roc_auc_score(labels, table["probability"].to_numpy())
            assert auc == pytest.approx(found["validation/auc"], abs=1e-4)
    assert "traceback" not in capsys.readouterr().err.lower()


def test_demo_fit_as_a_process_says_what_it_is() -> None:
    # Not the W&B service that runs of this process may have left in the environment.
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run(
        command(*FIT, "--run_dir", "run"),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    assert "DEMO DATA" in done.stderr and "preprocess" in done.stderr
    assert (
        done.stderr.count("W&B: offline (no API key)") == 1
        and done.stdout.count("wandb sync run/wandb/offline-run-") == 1
    )
    # Four steps are too few: the report says so, as the warning does.
    (words,) = [line for line in done.stdout.splitlines() if line.startswith("did not train: ")]
    assert words.removeprefix("did not train: ") in done.stderr and "% of the way" not in done.stdout
    versions = json.loads(Path("run/versions.json").read_text())
    assert versions["torch"] == torch.__version__ and versions["python"] == platform.python_version()
    final = json.loads(Path("run/summary.json").read_text())["final"]
    told = {line.split("  ")[0]: line.split() for line in done.stdout.splitlines()}
    # The last validation is the best: one column; always predicting the click rate has AUC 0.5.
    assert told["AUC"][1:] == [f"{score:.6f}" for score in (final["validation/auc"], 0.5, final["data/optimum_auc"])]
    entropy = final["validation/log_loss"] / final["validation/normalized_entropy"]
    assert told["log loss"][3] == f"{entropy:.6f}" and told["validation"][1:4] == ["last", "and", "best"]
    assert "\nvalidation at step 4: AUC" in done.stderr and "(highest AUC so far)" not in done.stderr
    assert "\n\n" not in done.stderr and "DLRM on demo data, batch " in done.stderr
    assert told["parameters"][1] == f"{final['parameters/total']:,}" and told["run folder"][-1] == "run"
    assert "training log loss" not in told, "a single point has no course"
    assert "compare run OTHER_RUN" in done.stdout
    next_command = next(line for line in done.stdout.splitlines() if "lightning_dlrm test" in line)
    assert main([*next_command.split()[3:], "--wandb.mode", "disabled"]) == 0
    assert 0 <= final["speed/data_wait_share"] < 1
    parts = [final[f"speed/{part}_share"] for part in ("data_wait", "forward", "backward", "update", "lightning")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(1.0)
    logged = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line["speed/data_wait_share"] < 1 for line in logged if "train/loss" in line)
    for name in ("config.yaml", "metrics.jsonl", "checkpoints/last/manifest.json", "checkpoints/best/manifest.json"):
        assert Path("run", name).is_file()
    records = subprocess.run(
        [
            interpreter(),
            "-m",
            "wandb",
            "leet",
            "inspect",
            "--json",
            str(next(Path("run/wandb").glob("offline-run-*"))),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        env=env,
    )
    assert records.returncode == 0, records.stderr
    for needle in ("data_fingerprint", "git_commit", "parameters/total", "embedding_dim", "validation/auc", "samples"):
        assert needle in records.stdout


def test_repeated_with_the_same_seed_to_the_last_bit() -> None:
    # The orders of the data may be chosen apart from the initial weights.
    for run, seed in {
        "a": (),
        "same": ["--data.seed=1"],
        "weights": ["--seed_everything=2"],
        "orders": ["--data.seed=2"],
    }.items():
        assert main([*FIT, *QUICK, "--run_dir", run, "--trainer.max_steps=10", *seed]) == 0
    assert losses("a") == losses("same")
    assert losses("weights") != losses("a") and losses("orders") not in (losses("a"), losses("weights"))


def test_sigterm_ends_an_evaluation() -> None:
    assert main([*FIT, *QUICK, "--run_dir", "run", "--trainer.max_steps=2"]) == 0
    predict = ["predict", *FIT[1:], "--data.evaluation_batch_size=1", "--data.predict_split=train"]
    evaluation = ["-m", "lightning_dlrm", *predict, "--ckpt_path", "run/checkpoints/last"]
    process = ForkedPython(evaluation, os.environ, Path.cwd())
    deadline = time.monotonic() + 60
    while not Path("run/predictions.parquet.partial-0").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert not list(Path("run").glob("predictions*"))


def test_configuration_of_a_resumed_run_serves_again(capsys: pytest.CaptureFixture[str]) -> None:
    # A schedule over the length of the fit would change with it.
    fit = [*FIT, *QUICK, "--run_dir", "run", "--model.schedule=Constant"]
    for steps in ("2", "4"):
        assert main([*fit, "--resume=auto", f"--trainer.max_steps={steps}"]) == 0
    kept = checksums(Path("run"))
    capsys.readouterr()
    for again in (["--resume=auto"], ["--ckpt_path=last"], ["--ckpt_path=run/checkpoints/last", "--run_dir=new"]):
        # W&B would make a folder.
        assert main([*fit, "--trainer.max_steps=4", "--wandb.mode=offline", *again]) == 0
        said = capsys.readouterr().out
        assert said.startswith("already finished at step 4; nothing to do (trainer.max_steps 4: to continue")
        assert said.count("\n") == 1
    assert checksums(Path("run")) == kept and not Path("new").exists()
    wreck(Path("run/checkpoints/best"), "rest")
    validate = ["validate", "--config", "run/config.yaml", "--ckpt_path", "best", "--run_dir", "run"]
    assert main(validate) == 2
    assert "error: checkpoint run/checkpoints/best has NaN or infinite values: state_dict" in capsys.readouterr().err
    assert main(["checkpoint", "info", "run/checkpoints/best", "--verify"]) == 2
    assert main([*validate, "--allow_nonfinite", "true", "--wandb.mode=disabled"]) == 0
    assert main(["validate", "--config", "run/config.yaml"]) == 2
    assert "validate needs a checkpoint" in capsys.readouterr().err
    assert main(["fit", "--config", "run/config.yaml", "--run_dir", "other"]) == 0
    assert losses("other") == losses("run")


def test_a_refused_resume_leaves_the_run_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FIT, *QUICK, "--run_dir", "run", "--trainer.max_steps=2"]) == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    other_model = ["fit", "--config", "dcn.yaml", *FIT[3:]]
    for refused, said in [
        (other_model, "holds the model DLRM, but this run trains DCN"),
        ([*FIT, "--model.dense_optimizer.learning_rate=0.5"], "asks for dense: Adagrad (lr 0.5)"),
        ([*FIT, "--trainer.accumulate_grad_batches=3"], "validate between steps"),
    ]:
        assert main([*refused, *QUICK, "--run_dir", "run", "--resume=auto", "--trainer.max_steps=4"]) == 2
        assert said in capsys.readouterr().err
        assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("interval", "options", "steps", "said"),
    [
        (2, {"stopping_threshold": 10.0}, 2, "validation/log_loss has reached the threshold 10.0"),
        (1.0, {"patience": 1, "min_delta": 10.0}, 16, "validation/log_loss not better for 1 validation (best 0."),
    ],
    ids=["threshold", "patience"],
)
def test_lightnings_early_stopping_from_the_configuration(
    interval: float, options: dict[str, float], steps: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends the fit before its length, which a resumption does not change."""
    stopping = {"class_path": "EarlyStopping", "init_args": {"monitor": "validation/log_loss", **options}}
    trainer = {
        "val_check_interval": interval, "check_val_every_n_epoch": 1, "max_epochs": 4, "limit_train_batches": 8,
        "callbacks": [stopping],
    }  # fmt: skip
    Path("stop.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    assert main([*FIT, *QUICK, "--config", "stop.yaml", "--run_dir", "run"]) == 0
    assert f"stopped early at step {steps}: {said}" in capsys.readouterr().out
    summary = json.loads(Path("run", "summary.json").read_text())
    assert summary["final"]["step"] == steps == max(losses("run"))
    before = losses("run")
    # At the fit's own end it ends nothing.
    bounded = ["--config", "stop.yaml", "--run_dir", "bounded", f"--trainer.max_steps={steps}"]
    assert main([*FIT, *QUICK, *bounded]) == 0
    assert "stopped early" not in capsys.readouterr().out
    assert main(["fit", "--config", "run/config.yaml", "--run_dir", "run", "--resume", "auto"]) == 0
    assert losses("run") == before and json.loads(Path("run", "summary.json").read_text()) == summary


def test_a_profiler_is_heard_and_kept_in_the_configuration(caplog: pytest.LogCaptureFixture) -> None:
    profilers = logging.getLogger("pytorch_lightning.profilers")
    profilers.addHandler(caplog.handler)
    try:
        for name, command in {
            "run": [*FIT, *QUICK, "--trainer.profiler=simple", "--trainer.max_steps=4"],
            "again": ["fit", "--config", "run/config.yaml"],
        }.items():
            caplog.clear()
            assert main([*command, "--run_dir", name]) == 0
            assert "FIT Profiler Report" in caplog.text and "CTRModule.optimizer_step" in caplog.text
    finally:
        profilers.removeHandler(caplog.handler)
    assert yaml.safe_load(Path("again/config.yaml").read_text())["trainer"]["profiler"] == "simple"


def test_params_of_the_shipped_configurations(capsys: pytest.CaptureFixture[str]) -> None:
    expected = {"dlrm.yaml": (540_677_217, 959_968), "dcn.yaml": (540_558_554, 713_106)}
    for name, (total, flops) in expected.items():
        assert main(["params", "--config", name, "--json"]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert (figures["total"], figures["flops_per_sample_forward"]) == (total, flops)
        assert figures["tables"] == 540_201_232
        assert figures["flops_per_sample_training"] == 3 * flops
        assert figures["bytes_weights"] == 4 * total
    assert main(["params", "--config", "dlrm.yaml", "--model.table_optimizer", "RowWiseAdagrad", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes_optimizer_tables"] == 4 * 33_762_577
    assert list(Path().iterdir()) == [], "params writes nothing"


def test_print_config_overlays_and_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*FIT, "--model.network.embedding_dim=8", "--data.batch_size", "77", "--print_config"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "embedding_dim: 8" in text and "batch_size: 77" in text and "max_table_rows: 1000" in text
    assert "every_n_steps: 50" in text, "from the overlay"
    Path("mine.yaml").write_text(text.replace("embedding_dim: 8", "embedding_dim: 16"))
    with pytest.raises(SystemExit):
        main(["fit", "--config", "mine.yaml", "--print_config"])
    assert "batch_size: 77" in capsys.readouterr().out


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS) and max(map(len, text.splitlines())) <= 80
    for name in COMMANDS:
        option = "--help.all" if name in SHORT_HELP else "--help"
        with pytest.raises(SystemExit) as left:
            main([name, option])
        assert left.value.code == 0
        listed = capsys.readouterr().out
        assert listed.startswith(f"usage: python -m lightning_dlrm {name} ")
        assert max(map(len, listed.splitlines())) < 100, name
        if name in SHORT_HELP:
            assert main([name, "--config", "dlrm.yaml", "-h"]) == 0
            short = capsys.readouterr().out
            assert not re.search(
                r":\w+:`|``|known subclasses|Union\[|\bNone\b| 16-mixed|LossGuard|CTROptimizer",
                listed,
            )
            titles = re.findall(r"(?m)^(options|data|model, loss and optimizers|Lightning's Trainer):$", listed)
            assert titles == ["options", "data", "model, loss and optimizers", "Lightning's Trainer"]
            lines = short.splitlines()
            assert len(lines) <= 40 and max(map(len, lines)) <= 80 and lines[0].startswith("usage: ")
            # Options of the datamodule are listed by the help of its class, --trust beside all others.
            options = set(re.findall(r"(?m)^  (--[\w.-]+)", short)) - {"--data.path", "--data.batch_size"}
            missing = options - {"--data.group", "--data.predict_split"} - set(re.findall(r"--[\w.-]+", listed))
            assert len(options) >= 2 and not missing, missing


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["--model.network.tables.help"], "--model.network.tables.on_host"),
        (["--model.network=DCN", "--model.network.init_args.tables.help"], "--model.network.tables.on_host"),
        (["--config", "dlrm.yaml", "--data.help", "Criteo"], "--data.demo.train_rows"),
        (["--model.network.help", "DCN"], "--model.network.cross_layers"),
        (["--model.network.help"], "  MaskNet\n"),
        (["--data.demo.help"], "--data.demo.train_rows"),
    ],
)
def test_help_of_a_class_and_its_options(arguments: list[str], option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["fit", *arguments])
    text = capsys.readouterr().out
    assert left.value.code == 0 and option in text and not text.startswith(("usage: ", "Help for "))


def test_help_of_one_screen_starts_without_torch() -> None:
    script = (
        "import sys; from lightning_dlrm.__main__ import main; assert main(['fit', '--help']) == 0\n"
        "for name in ('compare', 'checkpoint', 'bench'):\n    try: main([name, '--help'])\n"
        "    except SystemExit: pass\n"
        "assert not {'torch', 'jsonargparse', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_git_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    version._git_commit.cache_clear()
    monkeypatch.setattr(
        version.subprocess, "run", lambda command, **_: asked.append(command) or SimpleNamespace(stdout="c\n")
    )
    assert version.code_version()["git_commit"] == version.versions()["git_commit"] == "c" and len(asked) == 1
    version._git_commit.cache_clear()


def test_data_commands_start_without_torch() -> None:
    script = (
        "import sys; from lightning_dlrm.__main__ import main; assert main(['inspect', 'nowhere']) == 2; "
        "assert main(['--version']) == 0; "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ.copy())
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"lightning-dlrm [\d.]+( [0-9a-f]{40})?\n", done.stdout)
