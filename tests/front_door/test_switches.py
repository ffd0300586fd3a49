"""Contract: Lightning's own switches do, through the command line, what its documentation says of them.

Each test asserts the effect of a switch, as a callback of the user's own sees it or as it stands in files.
"""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
import pytorch_lightning as pl
import torch

from lightning_dlrm.__main__ import main
from lightning_dlrm.cli import trainer_settings
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.models.layers import MLP
from lightning_dlrm.objectives.losses import LogLoss
from tests.caches import new_cache
from tests.front_door.conftest import TINY

CONFIGURATION = TINY + "wandb: {mode: disabled}\n"
BATCHES = 32
"""Of an epoch."""


class Spy(pl.Callback):
    """Sees what a fit does."""

    batches: ClassVar[list[tuple[int, int, float]]] = []
    """Of each training batch its epoch, the optimizer steps before it, and a sum that tells its rows."""
    validations: ClassVar[list[int]] = []
    """The step of each validation."""
    evaluated: ClassVar[int] = 0
    """Batches that were evaluated."""
    modes: ClassVar[set[tuple[bool, bool]]] = set()
    """Whether anomalies are detected, and whether algorithms are deterministic."""
    moved: ClassVar[float] = 0.0
    """The largest change of a parameter."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._before = {name: value.detach().clone() for name, value in pl_module.network.named_parameters()}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        Spy.batches.append((trainer.current_epoch, trainer.global_step, float(batch.dense.double().sum())))
        Spy.modes.add((torch.is_anomaly_enabled(), torch.are_deterministic_algorithms_enabled()))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        Spy.validations.append(trainer.global_step)

    def on_validation_batch_end(self, *args: Any) -> None:
        Spy.evaluated += 1

    def on_test_batch_end(self, *args: Any) -> None:
        Spy.evaluated += 1

    def on_predict_batch_end(self, *args: Any) -> None:
        Spy.evaluated += 1

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        after = dict(pl_module.network.named_parameters())
        Spy.moved = max((after[name] - value).abs().max().item() for name, value in self._before.items())


class StopEarly(pl.Callback):
    """Asks for a stop after the third batch."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if len(Spy.batches) >= 3:
            trainer.should_stop = True


class Nothing(LogLoss):
    """A loss that is 0 whatever is predicted."""

    def summed(self, logits_B: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
        return logits_B.sum() * 0


class Intervene(pl.Callback):
    """Replaces the loss and registers a hook in mid-fit."""

    calls: ClassVar[int] = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == 12:
            pl_module.loss = Nothing()
            layer = next(module for module in pl_module.network.modules() if isinstance(module, MLP))
            layer.register_forward_hook(self.count)

    def count(self, *args: Any) -> None:
        Intervene.calls += 1


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_DLRM_CACHE", new_cache(tmp_path_factory.getbasetemp() / "cache"))
    Path("tiny.yaml").write_text(CONFIGURATION)
    Spy.batches, Spy.validations, Spy.evaluated, Spy.modes = [], [], 0, set()


SPY = f"--trainer.callbacks+={__name__}.Spy"
STOP_EARLY = f"--trainer.callbacks+={__name__}.StopEarly"


def run(command: str, *options: str, code: int = 0) -> None:
    # The callbacks of this file are in no folder that every configuration may name.
    assert main([command, "--trust", "tests", *options]) == code


def fit(*options: str, to: str = "run", code: int = 0) -> None:
    # Checkpoints are saved at validations alone: seven of them take as long as the steps of an epoch.
    given = ["--config", "dlrm.yaml", "--config", "tiny.yaml", "--checkpoint.every_n_steps=1000", "--run_dir", to]
    run("fit", *given, SPY, *options, code=code)


def steps_done() -> int:
    return json.loads(Path("run/summary.json").read_text())["final"]["step"]


def metrics(folder: str) -> dict[int, dict[str, float]]:
    """What was logged of training and validations, by step."""
    found: dict[int, dict[str, float]] = {}
    for line in Path(folder, "metrics.jsonl").read_text().splitlines():
        logged = json.loads(line)
        kept = {name: value for name, value in logged.items() if name.startswith(("train/", "validation/"))}
        found.setdefault(logged["step"], {}).update(kept)
    return found


# --- how long a fit is -----------------------------------------------------------------------------


def test_fast_dev_run() -> None:
    fit("--trainer.fast_dev_run", "3")
    assert len(Spy.batches) == 3 and Spy.evaluated == 1
    assert not Path("run/checkpoints").exists()


@pytest.mark.parametrize(("given", "batches"), [("1", 1), ("0.25", 8)])
def test_overfit_batches_takes_the_same_batches_in_every_epoch(given: str, batches: int) -> None:
    fit("--trainer.overfit_batches", given, "--trainer.max_epochs", "3", "--data.evaluation_batch_size", "64")
    epochs = [[rows for epoch, _, rows in Spy.batches if epoch == number] for number in range(3)]
    assert len(epochs[0]) == batches == len(set(epochs[0])) and epochs[0] == epochs[1] == epochs[2]


def test_max_time(caplog: pytest.LogCaptureFixture) -> None:
    fit("--trainer.max_time={seconds: 1}", "--trainer.max_epochs", "10000")
    assert "(trainer.max_time)" in caplog.text
    # The last step is logged and validated wherever it falls.
    last = max(metrics("run"))
    assert steps_done() == last == Spy.validations[-1] and metrics("run")[last].keys() >= {
        "train/loss",
        "validation/auc",
    }


@pytest.mark.parametrize("switch", ["max_epochs", "max_steps", "limit_train_batches"])
def test_a_fit_of_nothing(switch: str, capsys: pytest.CaptureFixture[str]) -> None:
    fit(f"--trainer.{switch}", "0")
    assert not Spy.batches and not Path("run").exists()
    assert f"nothing was trained: trainer.{switch} is 0" in capsys.readouterr().out


@pytest.mark.parametrize("options", ["min_steps 100", "min_epochs 3", "max_steps 100", "min_epochs 1"])
def test_what_lies_beyond_the_end_is_told(options: str, caplog: pytest.LogCaptureFixture) -> None:
    fit("--trainer.max_epochs", "1", *f"--trainer.{options}".split(), "--trainer.check_val_every_n_epoch", "1")
    assert steps_done() == BATCHES == Spy.validations[-1]
    assert "the fit ends at step 32 (trainer.max_epochs 1)" in caplog.text
    assert (f"trainer.{options} is not reached" in caplog.text) == (options != "min_epochs 1")


@pytest.mark.parametrize(
    ("options", "steps"), [("", 3), ("--trainer.min_steps 40", 40), ("--trainer.min_epochs 1", 32)]
)
def test_a_stop_waits_for_the_minimum(options: str, steps: int) -> None:
    fit(STOP_EARLY, "--trainer.max_epochs", "2", *options.split())
    assert steps_done() == steps == Spy.validations[-1]


def test_a_stop_waits_for_the_end_of_a_step() -> None:
    fit(STOP_EARLY, "--trainer.accumulate_grad_batches", "4")
    assert len(Spy.batches) == 4 and steps_done() == 1 == Spy.validations[-1]


# --- which batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "batches"), [("5", 5), ("0.5", 16), ("1.0", 32)])
def test_limit_train_batches(given: str, batches: int) -> None:
    fit("--trainer.limit_train_batches", given)
    assert len(Spy.batches) == batches == steps_done()


@pytest.mark.parametrize(("given", "batches"), [("0", 0), ("1", 1), ("0.5", 2), ("1.0", 4)])
def test_limit_val_batches(given: str, batches: int) -> None:
    fit(
        "--trainer.limit_val_batches", given, "--data.evaluation_batch_size", "128", "--trainer.val_check_interval=null"
    )
    assert Spy.evaluated == batches and ("validation/auc" in metrics("run")[BATCHES]) == (batches > 0)


def test_a_limit_that_may_be_one_batch_or_all_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a notebook that has imported sklearn.metrics before Lightning, the command line reads 1 as 1.0."""
    assert not trainer_settings._is_read_as_share("limit_val_batches")
    monkeypatch.setattr(trainer_settings, "_is_read_as_share", lambda name: name != "limit_train_batches")
    fit("--trainer.limit_val_batches=1.0", "--run_dir=refused", code=2)
    assert "trainer.limit_val_batches is 1.0, which may be meant as 1 batch" in capsys.readouterr().err
    fit("--trainer.limit_train_batches=1.0", "--trainer.max_steps=1")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a fit."""
    folder = tmp_path_factory.mktemp("fitted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LIGHTNING_DLRM_CACHE", new_cache(tmp_path_factory.getbasetemp() / "cache"))
        Path("tiny.yaml").write_text(CONFIGURATION)
        fit()
    return folder / "run"


@pytest.fixture
def trained(fitted: Path) -> list[str]:
    """The options of an evaluation of a copy of this run."""
    shutil.copytree(fitted, "run")
    return ["--config", "run/config.yaml", "--ckpt_path", "run/checkpoints/last", "--data.evaluation_batch_size", "64"]


@pytest.mark.parametrize(("given", "batches"), [("1", 1), ("0.5", 2), ("1.0", 4)])
def test_limit_test_and_predict_batches(given: str, batches: int, trained: list[str]) -> None:
    run("test", *trained, "--trainer.limit_test_batches", given)
    run("predict", *trained, "--trainer.limit_predict_batches", given)
    assert Spy.evaluated == 2 * batches


class Spoil(pl.Callback):
    """Spoils a parameter before predictions."""

    def on_predict_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        next(pl_module.network.parameters()).data[0] = math.nan


class Refuse(pl.Callback):
    """Ends a fit before its first step."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        raise UserError("not now")


def test_runs_that_are_kept_say_how_to_send_them(trained: list[str], caplog: pytest.LogCaptureFixture) -> None:
    fit("--wandb.mode=offline", f"--trainer.callbacks+={__name__}.Refuse", to="failed", code=2)
    assert not Path("failed").exists() and "wandb sync" not in caplog.text
    run("validate", *trained, "--wandb.mode=offline")
    assert "W&B: offline; send it with: wandb sync run/wandb/offline-run-*" in caplog.text


def test_evaluations_say_what_they_found_once_and_keep_earlier_predictions(
    trained: list[str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for command, split in (("validate", "validation"), ("test", "test")):
        capsys.readouterr()
        run(command, *trained)
        out = capsys.readouterr().out
        assert re.search(
            rf"^{split} +score +click rate alone +best reachable\nAUC +0\.\d+ +0\.500000 ", out, re.MULTILINE
        )
        assert out.endswith(f"\nkept in run/{command}.json\n")
    run("predict", *trained)
    predictions = Path("run/predictions.parquet").resolve()
    rows, first = pq.read_metadata(predictions).num_rows, predictions.read_bytes()
    model = "DLRM of run/checkpoints/last, demo data"
    table = pq.read_table(predictions)
    probability, rate = (np.mean(table[name].to_numpy(), dtype=np.float64) for name in ("probability", "label"))
    assert capsys.readouterr().out == (
        f"{model}\n\nsplit  rows  mean probability  click rate\n"
        f"test   {rows:>4}  {probability:>16.6f}  {rate:>10.6f}\n\n"
        "kept in run/predictions.parquet, with the columns split, row, label, probability\n"
    )
    run("predict", *trained, "--data.predict_split=validation")
    assert "\nvalidation  " in capsys.readouterr().out
    (aside,) = (path for path in predictions.parent.glob("predictions-*"))
    assert aside.read_bytes() == first
    assert f"the previous run/predictions.parquet is kept as run/{aside.name}" in caplog.text
    second, before = predictions.read_bytes(), sorted(Path("run").iterdir())
    spoil = f"--trainer.callbacks+={__name__}.Spoil"
    capsys.readouterr()
    run("predict", *trained, spoil, code=2)
    assert re.fullmatch(r"error: the probability of row \d+ is NaN: .*\n", capsys.readouterr().err)
    assert predictions.read_bytes() == second and sorted(Path("run").iterdir()) == before
    run("predict", *trained, "--trainer.limit_predict_batches=0")
    assert capsys.readouterr().out.endswith("no rows were scored\n")
    run("predict", *trained, spoil, "--allow_nonfinite=true")
    assert pq.read_metadata(predictions).num_rows == rows


@pytest.mark.parametrize(
    ("options", "validations"),
    [
        ("val_check_interval=7", [7, 14, 21, 28, 35, 42, 49, 56, 63, 64]),
        ("val_check_interval=40", [40, 64]),
        ("val_check_interval=0.25 check_val_every_n_epoch=1", [8, 16, 24, 32, 40, 48, 56, 64]),
        ("val_check_interval=null check_val_every_n_epoch=1", [32, 64]),
        ("val_check_interval=null check_val_every_n_epoch=2 max_epochs=3", [64, 96]),
    ],
)
def test_when_validations_are_made(options: str, validations: list[int]) -> None:
    fit("--trainer.max_epochs=2", *(f"--trainer.{option}" for option in options.split()))
    assert Spy.validations == validations and steps_done() == validations[-1]
    assert {epoch for epoch, *_ in Spy.batches} == set(range(validations[-1] // BATCHES))


def test_val_check_interval_beyond_an_epoch_is_refused_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    fit("--trainer.val_check_interval=40", "--trainer.check_val_every_n_epoch=1", code=2)
    assert "val_check_interval" in capsys.readouterr().err and not Path("run").exists()


# --- what a step is --------------------------------------------------------------------------------


def test_the_short_name_of_a_precision_draws_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    fit("--trainer.max_steps=2", "--trainer.precision=bf16")
    assert not [str(found.message) for found in recwarn if "historical" in str(found.message)]
    start = Path("run/config.yaml").read_text()
    assert "precision: bf16" in start and steps_done() == 2


def test_accumulate_grad_batches() -> None:
    fit("--trainer.accumulate_grad_batches=4")
    assert steps_done() == BATCHES // 4 and [step for _, step, _ in Spy.batches] == [i // 4 for i in range(BATCHES)]


def test_gradient_accumulation_scheduler_over_a_resumption() -> None:
    schedule = "{class_path: GradientAccumulationScheduler, init_args: {scheduling: {0: 1, 1: 4}}}"
    options = [f"--trainer.callbacks+={schedule}", "--trainer.max_epochs=3", "--trainer.val_check_interval=null"]
    # Other schedules count on the length of the fit, which differs in the first part.
    options.append("--model.schedule=Constant")
    fit(*options)
    assert steps_done() == 32 + 8 + 8
    fit(*options, "--trainer.max_steps=36", to="parts")
    fit(*options, "--resume=auto", to="parts")
    whole, parts = metrics("run"), metrics("parts")
    # The first part ended with a validation of its own.
    assert parts.keys() == whole.keys() and all(
        parts[step]["train/loss"] == whole[step]["train/loss"] for step in whole
    )


def test_gradient_clipping() -> None:
    options = ["--model.dense_optimizer=SGD", "--model.dense_optimizer.learning_rate=1", "--trainer.max_steps=5"]
    fit(*options)
    assert Spy.moved > 1e-3
    for algorithm in ("norm", "value"):
        fit(
            *options, "--trainer.gradient_clip_val=1e-8", f"--trainer.gradient_clip_algorithm={algorithm}", to=algorithm
        )
        # Five steps at rates of 1 and 10.
        assert 0 < Spy.moved < 1e-6


@pytest.mark.parametrize("switch", ["detect_anomaly", "deterministic"])
def test_modes(switch: str) -> None:
    try:
        fit("--trainer.max_steps=3", f"--trainer.{switch}=true")
    finally:
        torch.use_deterministic_algorithms(False)
    assert Spy.modes == {(switch == "detect_anomaly", switch == "deterministic")}


@pytest.mark.parametrize(
    ("profiler", "shown"),
    [
        ("SimpleProfiler", "run_training_batch"),
        ("AdvancedProfiler", "training_step"),
        ("PyTorchProfiler", "Self CPU time total"),
    ],
)
def test_profilers(profiler: str, shown: str) -> None:
    place = ["--trainer.profiler.dirpath=.", "--trainer.profiler.filename=found"]
    fit("--trainer.max_steps=3", f"--trainer.profiler={profiler}", *place)
    assert shown in Path("fit-found.txt").read_text()


# --- loggers and callbacks -------------------------------------------------------------------------


def csv_columns(folder: str) -> str:
    return Path(folder, "metrics.csv").read_text().splitlines()[0]


def test_loggers() -> None:
    Path("loggers.yaml").write_text(
        "trainer:\n  logger:\n"
        "  - {class_path: CSVLogger, init_args: {save_dir: one, name: '', version: ''}}\n"
        "  - {class_path: CSVLogger, init_args: {save_dir: two, name: '', version: ''}}\n"
    )
    fit("--config", "loggers.yaml")
    assert "train/loss" in csv_columns("one") and "validation/auc" in csv_columns("two")
    fit("--trainer.logger=false", to="none")
    assert metrics("none") == metrics("run") and not Path("none/wandb").exists()


def test_tensorboard_logger_logs_or_is_refused_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        fit("--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=board", code=2)
        assert "tensorboard" in capsys.readouterr().err
    else:
        fit("--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=board")
        assert list(Path("board").rglob("events.out.tfevents.*"))


def test_callbacks_by_yaml() -> None:
    Path("callbacks.yaml").write_text(
        """
trainer:
  logger: {class_path: CSVLogger, init_args: {save_dir: csv, name: '', version: ''}}
  callbacks:
  - {class_path: ModelCheckpoint, init_args: {dirpath: kept, monitor: validation/auc, mode: max, filename: top}}
  - {class_path: LearningRateMonitor, init_args: {logging_interval: step}}
  - {class_path: DeviceStatsMonitor, init_args: {cpu_stats: true}}
  - {class_path: EarlyStopping, init_args: {monitor: validation/log_loss, min_delta: 10, patience: 1}}
  - {class_path: Timer, init_args: {duration: {hours: 1}}}
"""
    )
    fit("--config", "callbacks.yaml", "--trainer.max_epochs=50")
    # The second validation is no better by 10.
    assert steps_done() == 40
    assert "lr-" in csv_columns("csv") and "DeviceStatsMonitor" in csv_columns("csv")
    run("validate", "--config", "run/config.yaml", "--ckpt_path", "kept/top.ckpt", "--run_dir", "again")
    best = json.loads(Path("run/summary.json").read_text())["best"]
    assert json.loads(Path("again/validate.json").read_text())["validation/auc"] == best["validation/auc"]


def test_a_callback_of_the_users_own_adds_a_hook_and_replaces_the_loss() -> None:
    fit(f"--trainer.callbacks+={__name__}.Intervene")
    found = metrics("run")
    assert found[12]["train/loss"] > 0 and all(found[step]["train/loss"] == 0 for step in range(16, BATCHES + 1, 4))
    # Also in two validations of one batch.
    assert Intervene.calls == BATCHES - 12 + 2


@pytest.mark.parametrize("bar", ["RichProgressBar", "TQDMProgressBar"])
def test_lightnings_progress_bars_take_the_place_of_ours(bar: str, capfd: pytest.CaptureFixture[str]) -> None:
    fit(f"--trainer.callbacks+={bar}")
    shown = "".join(capfd.readouterr())
    assert "Epoch 0" in shown and "fit:" not in shown


def test_timer_by_yaml(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    timer = "--trainer.callbacks+={class_path: Timer, init_args: {duration: {seconds: 1}}}"
    fit(timer, "--trainer.max_epochs=10000")
    assert "by the time limit (Timer in trainer.callbacks)" in caplog.text
    capsys.readouterr()
    fit(timer, "--trainer.max_epochs=10000", "--resume=auto")
    assert "(Timer in trainer.callbacks: to continue training, raise or remove it)" in capsys.readouterr().out
    fit(timer, "--trainer.max_time={seconds: 1}", to="both", code=2)
    assert "error: trainer.max_time has no effect with a Timer" in capsys.readouterr().err
    assert 0 < steps_done() == Spy.validations[-1]


@pytest.mark.parametrize(
    "switch",
    [
        "precision=16-mixed",
        "reload_dataloaders_every_n_epochs=1",
        "callbacks+={class_path: StochasticWeightAveraging, init_args: {swa_lrs: 0.1}}",
    ],
)
def test_what_is_refused(switch: str, capsys: pytest.CaptureFixture[str]) -> None:
    fit(f"--trainer.{switch}", code=2)
    assert capsys.readouterr().err.count("\n") == 1 and math.isfinite(len(Spy.batches))
