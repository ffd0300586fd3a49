"""Contract: SIGINT, SIGTERM and SIGHUP at any moment of a fit, and SIGKILL at random moments, lose nothing: the run
goes on as if it had never been interrupted, and no temporary file and no lock is left."""

import itertools
import json
import logging
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from lightning_dlrm.__main__ import main
from lightning_dlrm.cli import run as run_module
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.sharding import checkpoint
from lightning_dlrm.sharding.checkpoint import CheckpointReader
from tests.caches import new_cache
from tests.cli.test_cli import TINY_DEMO, losses, own_folders
from tests.forked import ForkedPython
from tests.ranks import start_ranks

__all__ = ["own_folders"]  # a fixture that every test uses

FIT = ["fit", "--config", "dlrm.yaml", "--config", "small.yaml", *TINY_DEMO, "--wandb.mode=disabled"]
FIT += ["--data.batch_size=256", "--trainer.log_every_n_steps=1", "--model.schedule=Constant"]
SHORT = [*FIT, "--trainer.max_steps=6", "--trainer.val_check_interval=4", "--checkpoint.every_n_steps=2"]

MOMENTS: dict[str, tuple[Any, str, int]] = {
    "starting": (CTRModule, "configure_optimizers", 1),
    "stepping": (CTRModule, "training_step", 5),
    "saving": (checkpoint, "save_file", 40),
    "renaming": (checkpoint, "_publish", 3),
    "validating": (CTRModule, "validation_step", 1),
    "validating at the end": (CTRModule, "validation_step", 2),
    "closing": (run_module, "finish_loggers", 1),
}
"""Moment -> owner and name of a function, and the call before which the signal comes."""
SIGNALS: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
CASES = list(itertools.product(MOMENTS, SIGNALS))
DEFAULT = {(moment, list(SIGNALS)[i % 3]) for i, moment in enumerate(MOMENTS)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fit that is not interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_DLRM_CACHE", new_cache(tmp_path_factory.getbasetemp() / "cache"))
        assert main([*SHORT, "--run_dir", str(folder)]) == 0
    return folder


@pytest.mark.parametrize(
    ("moment", "sent"), [c if c in DEFAULT else pytest.param(*c, marks=pytest.mark.slow) for c in CASES]
)
def test_a_signal_loses_nothing(
    moment: str, sent: signal.Signals, whole: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, "lightning_dlrm"):
        patch_call(patch, *MOMENTS[moment], lambda: os.kill(os.getpid(), sent))
        with pytest.raises(SystemExit) as ended:
            main([*SHORT, "--run_dir", "run"])
    assert ended.value.code == SIGNALS[sent]
    told = [record.getMessage() for record in caplog.records if "interrupted at step" in record.getMessage()]
    assert len(told) == 1, told
    # The step during which the signal comes is saved.
    assert moment != "stepping" or told[0].startswith("interrupted at step 5;")
    again = re.search(r"continue with: python -m lightning_dlrm (.*)", told[0])
    assert again is not None or "before the first checkpoint" in told[0]
    assert not left_over(Path("run"))
    assert main([*SHORT, "--run_dir", "run", "--resume=auto"] if again is None else again[1].split()) == 0
    assert_same_runs(Path("run"), whole)


def patch_call(patch: pytest.MonkeyPatch, owner: Any, name: str, at: int, action: Callable[[], None]) -> None:
    """Act before a function's call of a number, counted from 1."""
    plain, calls = getattr(owner, name), itertools.count(1)

    def patched(*arguments: Any, **options: Any) -> Any:
        if next(calls) == at:
            action()
        return plain(*arguments, **options)

    patch.setattr(owner, name, patched)


def left_over(run: Path) -> list[str]:
    """Temporary files and locks in a run folder."""
    return [str(path) for path in run.rglob(".*")]


def assert_same_runs(run: Path, whole: Path, exact: bool = True, best: bool = True) -> None:
    """Compare losses and last checkpoints, and the best metrics of runs with the same validations."""
    assert not left_over(run)
    ours, theirs = losses(str(run)), losses(str(whole))
    assert ours.keys() == theirs.keys()
    tensors = [tensors_of(folder / "checkpoints/last") for folder in (run, whole)]
    assert tensors[0].keys() == tensors[1].keys()
    if exact:
        assert ours == theirs
        assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
        bests = [json.loads((folder / "summary.json").read_text())["best"] for folder in (run, whole)]
        assert bests[0] == bests[1] or not best
    else:
        assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-12)
        for name in tensors[0]:
            torch.testing.assert_close(tensors[0][name], tensors[1][name], rtol=1e-10, atol=1e-12)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All parameters and the tables' optimizer state in a checkpoint; tables whole."""
    if main(["checkpoint", "merge", str(folder), "--output", "merged"]):
        raise AssertionError(folder)
    from safetensors.torch import load_file

    reader = CheckpointReader(Path("merged"))
    found = dict(reader.rest()["state_dict"])
    for name, entry in reader.manifest.tables.items():
        (part,) = entry.pieces
        found |= {f"{name}.{slot}": tensor for slot, tensor in load_file(reader.folder / part.file).items()}
    shutil.rmtree("merged")
    return found


def chaos(arguments: list[str], ranks: int, kills: int, seed: int) -> None:
    """Start a fit again and again, kill one or all of its processes at a random moment, and let the last one end."""
    draw = random.Random(seed)
    for kill in range(kills + 1):
        processes = start([*arguments, "--run_dir", str(Path("run").absolute()), "--resume=auto"], ranks)
        try:
            if kill < kills:
                logged = lines_of("run")
                # Half of them in the start, and half of them after the first new step.
                while kill % 2 and lines_of("run") == logged and processes[0].poll() is None:
                    time.sleep(0.005)
                time.sleep(draw.uniform(0, 1.5 if kill % 2 else 3.0))
                killed = processes if draw.random() < 0.5 else [draw.choice(processes)]
                for process in killed:
                    process.kill()
                end_as_torchrun_does(processes, draw.uniform(0, 2))
            said = [process.communicate(timeout=300)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, said


def end_as_torchrun_does(processes: list[ForkedPython], seconds: float) -> None:
    """Send SIGTERM to processes that are left after so long, and SIGKILL to those that do not end."""
    for number, wait in ((signal.SIGTERM, seconds), (signal.SIGKILL, 15.0)):
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline and any(process.poll() is None for process in processes):
            time.sleep(0.05)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)


def start(arguments: list[str], ranks: int) -> list[ForkedPython]:
    command = ["-m", "lightning_dlrm", *arguments]
    return [ForkedPython(command, os.environ, Path.cwd())] if ranks == 1 else start_ranks([command] * ranks)


def lines_of(run: str) -> int:
    path = Path(run, "metrics.jsonl")
    return len(path.read_bytes().splitlines()) if path.exists() else 0


CHAOS = [*FIT, "--trainer.val_check_interval=5", "--checkpoint.every_n_steps=1"]


@pytest.mark.parametrize(("kills", "steps"), [(2, 40), pytest.param(30, 400, marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_run_ends_in_the_same_bits(kills: int, steps: int) -> None:
    fit = [*CHAOS, "--trainer.max_epochs=-1", f"--trainer.max_steps={steps}"]
    assert main([*fit, "--run_dir", "whole"]) == 0
    chaos(fit, 1, kills, seed=1)
    assert_same_runs(Path("run"), Path("whole"))


@pytest.mark.parametrize(("every", "left"), [(0, "no checkpoint"), (1, "a checkpoint of step 1")])
def test_a_fit_that_fails_says_what_its_folder_has(every: int, left: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lightning_dlrm"):
        assert (
            main([*FIT, "--model.dense_optimizer.lr=1e30", f"--checkpoint.every_n_steps={every}", "--run_dir=run"]) == 2
        )
    assert f"run folder run is kept; it has metrics and {left}" in caplog.messages


def test_a_fit_goes_on_without_the_process_of_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = ["--trainer.max_epochs=-1", "--trainer.max_steps=100000", "--wandb.mode=offline"]
    # Other tests of this process share theirs.
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    (fit,) = start([*CHAOS, *endless, "--run_dir=run"], 1)

    def wait_for(lines: int) -> None:
        while lines_of("run") < lines:
            assert fit.poll() is None, fit.said()
            time.sleep(0.02)

    try:
        wait_for(3)
        (core,) = [one for one in psutil.Process(fit.pid).children(recursive=True) if "wandb-core" in one.name()]
        core.terminate()
        wait_for(lines_of("run") + 8)
        fit.send_signal(signal.SIGTERM)
        assert fit.wait(60) == 143
    finally:
        fit.kill()
    said = fit.said()
    assert said.count("W&B: its process (wandb-core) has ended") == 1 and "Traceback" not in said, said
    assert "; continue with: python -m lightning_dlrm" in said and not left_over(Path("run"))


SHARDED = ["--trainer.strategy=embedding_sharded_ddp", "--trainer.accelerator=cpu", "--trainer.devices=2"]


OF_ONE_RANK = [(1, [signal.SIGINT])]
OF_RANKS = [
    *itertools.product([0, 1], [[signal.SIGTERM], [signal.SIGHUP], [signal.SIGINT]]),
    *((None, [sent]) for sent in SIGNALS),
    (None, [signal.SIGINT, signal.SIGTERM]),
]


@pytest.mark.dist
@pytest.mark.parametrize("cases", [OF_ONE_RANK, pytest.param(OF_RANKS, marks=pytest.mark.slow)])
def test_ranks_end_together_after_signals_to_one_of_them_or_to_all(cases: list[tuple[int | None, list[int]]]) -> None:
    fit = [*CHAOS, *SHARDED, "--trainer.max_epochs=-1", "--trainer.max_steps=1000", "--resume=auto"]
    draw = random.Random(3)
    for rank, sent in cases:
        processes = start([*fit, "--run_dir", str(Path("run").absolute())], 2)
        logged = lines_of("run")
        while lines_of("run") == logged and processes[0].poll() is None:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 1.5))
        # Each rank has its own signals before another rank can tell it of one.
        for number in (signal.SIGSTOP, *sent, signal.SIGCONT):
            for process in processes if rank is None else [processes[rank]]:
                process.send_signal(number)
        said = [process.communicate(timeout=40)[0] for process in processes]
        codes = [SIGNALS[max(sent)]] * 2
        if sent == [signal.SIGHUP] and rank is not None:
            # The others learn of it as of SIGTERM.
            codes[1 - rank] = SIGNALS[signal.SIGTERM]
        assert [process.returncode for process in processes] == codes, said
        assert "continue with: python -m lightning_dlrm" in said[0] and not left_over(Path("run"))
        # A checkpoint of every step: the steps since the last one are one step at most.
        manifest = json.loads(Path("run/checkpoints/last/manifest.json").read_text())
        assert logged < lines_of("run") <= manifest["header"]["step"] + 1


@pytest.mark.slow
@pytest.mark.dist
def test_ranks_killed_at_random_moments_end_the_same_in_float64() -> None:
    fit = [*CHAOS, "--trainer.max_epochs=-1", "--trainer.max_steps=300", "--trainer.precision=64-true"]
    fit += SHARDED
    processes = start([*fit, "--run_dir", str(Path("whole").absolute())], 2)
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    chaos(fit, 2, 30, seed=2)
    assert_same_runs(Path("run"), Path("whole"), exact=False)
