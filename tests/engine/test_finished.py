"""Contract: a finished run is finished: resumed, it changes no byte, whatever ended it and wherever validations fall;
with a larger bound it goes on as a run that was never interrupted."""

import hashlib
import itertools
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, Timer, timer

from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.engine import checkpointing
from lightning_dlrm.engine.metrics_logger import MetricsLogger
from lightning_dlrm.engine.plateau import ReduceOnPlateau
from lightning_dlrm.engine.stopping import StopAtAUC
from lightning_dlrm.optim.schedules import WarmupQuadraticDecay
from tests.engine.test_fit import losses, trainer_of
from tests.toy import ToyData, toy_module

SCHEDULE = partial(WarmupQuadraticDecay, warmup_steps=1, decay_start_step=2, decay_steps=15)


class Counted(ToyData):
    """14 batches an epoch, within the trainer's limit."""

    @property
    def training_batches(self) -> int:
        limit = self.trainer.limit_train_batches
        return min(limit, 14) if isinstance(limit, int) else int(14 * limit)


def checksums(folder: Path) -> dict[str, str]:
    """Path -> time of the last change and checksum, of every file."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): f"{path.stat().st_mtime_ns} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files}


def fit(run: Path, data: type[ToyData] = Counted, **options: Any) -> tuple[pl.Trainer, Any]:
    last = run / "checkpoints/last"
    stopped_at = options.get("callbacks") or []
    on_plateau = any(isinstance(callback, ReduceOnPlateau) for callback in stopped_at)
    trainer, module = trainer_of(run, **options), toy_module(schedule=None if on_plateau else SCHEDULE)
    for callback in [c for c in stopped_at if isinstance(c, (EarlyStopping, ReduceOnPlateau, StopAtAUC, Timer))]:
        # As the command line orders them.
        trainer.callbacks.remove(callback)
        trainer.callbacks.insert(0, callback)
        if isinstance(callback, StopAtAUC):
            callback._metrics = next(c for c in trainer.callbacks if isinstance(c, MetricsLogger))
    trainer.fit(module, data(), ckpt_path=last if last.exists() else None)
    return trainer, module


VALIDATIONS: dict[str, dict[str, Any]] = {
    "each epoch": {},
    "5 batches of 14": {"val_check_interval": 5},
    "over epochs": {"val_check_interval": 9, "check_val_every_n_epoch": None},
    "every second epoch": {"check_val_every_n_epoch": 2},
    "none": {"limit_val_batches": 0},
}
BOUNDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "epochs": ({"max_epochs": 1}, {"max_epochs": 2}),
    "three epochs": ({"max_epochs": 3}, {"max_epochs": 4}),
    "steps amid an epoch": ({"max_epochs": -1, "max_steps": 17}, {"max_epochs": -1, "max_steps": 30}),
    "steps at an epoch's end": ({"max_epochs": 3, "max_steps": 14}, {"max_epochs": 3, "max_steps": 31}),
    "a limit of batches": ({"max_epochs": 2, "limit_train_batches": 7}, {"max_epochs": 3, "limit_train_batches": 7}),
    "a longer epoch": ({"max_epochs": 1, "limit_train_batches": 6}, {"max_epochs": 1, "limit_train_batches": 11}),
    "micro-batches": (
        {"max_epochs": 1, "accumulate_grad_batches": 5},
        {"max_epochs": 2, "accumulate_grad_batches": 5},
    ),
}


DEFAULT = {
    ("epochs", "5 batches of 14", 3),
    ("three epochs", "every second epoch", 0),
    ("steps amid an epoch", "none", 0),
    ("steps amid an epoch", "over epochs", 3),
    ("steps at an epoch's end", "5 batches of 14", 0),
    ("a limit of batches", "5 batches of 14", 0),
    ("a longer epoch", "each epoch", 0),
    ("micro-batches", "each epoch", 3),
}
# Validations between the micro-batches of a step are refused.
CASES = [
    case for case in itertools.product(BOUNDS, VALIDATIONS, (0, 3)) if case[:2] != ("micro-batches", "over epochs")
]


@pytest.mark.parametrize(
    ("bound", "validations", "every"),
    [case if case in DEFAULT else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_a_finished_run_changes_no_byte_and_a_larger_bound_goes_on(
    bound: str, validations: str, every: int, tmp_path: Path
) -> None:
    first, larger = BOUNDS[bound]
    between = {"every": every, **VALIDATIONS[validations]}
    if bound == "micro-batches" and "val_check_interval" in between:
        # Validations are refused between the micro-batches of a step.
        between["val_check_interval"] = 5
    steps = fit(tmp_path / "run", **first, **between)[0].global_step
    kept = checksums(tmp_path / "run")
    assert fit(tmp_path / "run", **first, **between)[0].global_step == steps
    assert checksums(tmp_path / "run") == kept
    _, resumed = fit(tmp_path / "run", **larger, **between)
    _, whole = fit(tmp_path / "whole", **larger, **between)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    for a, b in zip(resumed.network.state_dict().values(), whole.network.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_all_ranks_learn_that_files_of_the_run_cannot_be_set_aside(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    next(c for c in trainer.callbacks if isinstance(c, MetricsLogger)).configuration = "trainer: {max_epochs: 1}\n"
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(UserError, match=r"run folder .* cannot be read and written \(.*config\.yaml") as directory:
        trainer.fit(toy_module(), ToyData())
    (tmp_path / "metrics.jsonl").write_text('{"train/loss": 0.5}\n')
    with pytest.raises(UserError, match="a line without a step") as line:
        trainer_of(tmp_path).fit(toy_module(), ToyData())
    assert directory.value.on_all_ranks and line.value.on_all_ranks


def test_all_ranks_learn_that_a_later_checkpoint_cannot_be_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(path: Path) -> Path:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "checkpoints/last").mkdir(parents=True)
    monkeypatch.setattr(checkpointing, "set_aside", refuses)
    with pytest.raises(UserError, match=r"checkpoints/last cannot be renamed \(Permission denied\)") as refused:
        trainer_of(tmp_path).fit(toy_module(), ToyData())
    assert refused.value.on_all_ranks


@pytest.mark.parametrize("data", [Counted, ToyData], ids=["known length", "unknown length"])
@pytest.mark.parametrize("verdict", ["early stopping", "plateau", "target", "time"])
def test_a_fit_that_a_callback_has_ended_stays_ended(
    verdict: str, data: type[ToyData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A second passes between two looks at the clock, however fast the machine is.
    seconds = itertools.count()
    monkeypatch.setattr(timer, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))

    def again(**more: Any) -> int:
        made = {
            "early stopping": lambda: EarlyStopping(
                "validation/log_loss", patience=1, min_delta=0.5, check_on_train_epoch_end=False
            ),
            "plateau": lambda: ReduceOnPlateau(patience=1, min_delta=0.5),
            "target": lambda: StopAtAUC(0.55, MetricsLogger(None, None)),  # type: ignore[arg-type]
            "time": lambda: Timer({"seconds": 20}),
        }[verdict]()
        given = {"callbacks": [made], "max_epochs": 9, "val_check_interval": 5, **more}
        return fit(tmp_path / "run", data, **given)[0].global_step

    steps = again()
    assert 0 < steps < 9 * 14
    kept = checksums(tmp_path / "run")
    assert again() == steps and checksums(tmp_path / "run") == kept
    # As in a fit that goes on from a checkpoint of another run.
    shutil.rmtree(tmp_path / "run/checkpoints/best", ignore_errors=True)
    # A smallest number of steps defers the verdict.
    assert again(min_steps=steps + 2, min_epochs=0) == steps + 2
