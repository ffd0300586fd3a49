"""Contract: a resumed run passes over damaged checkpoints and names them, sets aside what it would overwrite, and
starts afresh only where there never was a checkpoint; one process at a time trains in a run folder."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from jsonargparse import Namespace

from lightning_dlrm.__main__ import main
from lightning_dlrm.cli import run
from lightning_dlrm.cli.resuming import choose_checkpoint
from lightning_dlrm.tracking.lock import LOCK, FolderLock
from tests.cli.test_cli import FIT, QUICK, STOP_EARLY, losses, own_folders
from tests.engine.test_finished import checksums
from tests.ranks import start_ranks

__all__ = ["own_folders"]  # a fixture that every test uses

RESUME = [*FIT, *QUICK, "--model.schedule=Constant", "--run_dir", "run", "--resume", "auto"]


def flip(path: Path) -> None:
    """Change one bit; the size stays."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_damaged_checkpoints_are_passed_over_and_nothing_is_wiped(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    last, best = Path("run/checkpoints/last"), Path("run/checkpoints/best")
    assert main([*RESUME, "--trainer.max_steps=3"]) == 0
    shutil.copytree(last, "earlier")
    assert main([*RESUME, "--trainer.max_steps=5"]) == 0
    assert not Path("run", LOCK).exists()
    shutil.rmtree(best)
    shutil.copytree("earlier", best)
    flip(last / "tables/C3.0.safetensors")
    with Path("run/metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "trai')  # killed while writing
    written, damaged = Path("run/metrics.jsonl").read_text().splitlines(), checksums(last)
    with caplog.at_level(logging.INFO, "lightning_dlrm"):
        assert main([*RESUME, "--trainer.max_steps=6", "--trainer.val_check_interval=9"]) == 0
    said = caplog.text
    assert "skipping a damaged or incomplete checkpoint: checkpoint file run/checkpoints/last/tables/C3.0" in said
    assert "resumed at step 3" in said
    (aside,) = Path("run").glob("metrics-*.jsonl")
    assert aside.read_text().splitlines() == written[-3:], "steps 4 and 5, and the broken line"
    (config,) = Path("run").glob("config-*.yaml")
    assert "max_steps: 5" in config.read_text() and "max_steps: 6" in Path("run/config.yaml").read_text()
    (kept,) = Path("run/checkpoints").glob("last-*")
    assert {path.replace(str(kept), str(last)): sums for path, sums in checksums(kept).items()} == damaged
    assert main([*FIT, *QUICK, "--model.schedule=Constant", "--run_dir=whole", "--trainer.max_steps=6"]) == 0
    assert losses("run") == losses("whole")

    flip(last / "rest.pt")
    (best / "manifest.json").write_text("{}")
    before = checksums(Path("run"))
    assert main([*RESUME, "--trainer.max_steps=8"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    (last / "manifest.json").unlink()
    assert main([*RESUME, "--trainer.max_steps=8"]) == 2
    assert "all checkpoints in run/checkpoints are damaged" in capsys.readouterr().err
    shutil.rmtree("run/checkpoints")
    assert main([*RESUME, "--trainer.max_steps=8"]) == 2
    assert "run has results of step 6 but no checkpoint to continue from" in capsys.readouterr().err
    assert {name: sums for name, sums in before.items() if "checkpoints" not in name} == checksums(Path("run"))


def test_a_run_that_never_had_a_checkpoint_starts_afresh(caplog: pytest.LogCaptureFixture) -> None:
    Path("run").mkdir()
    Path("run/metrics.jsonl").write_text('{"step": 1, "train/loss": 0.5}\n')
    with caplog.at_level(logging.INFO, "lightning_dlrm"):
        assert main([*RESUME, "--trainer.max_steps=2"]) == 0
    assert "no checkpoint in run yet: starting a new run" in caplog.text
    (aside,) = Path("run").glob("metrics-*.jsonl")
    assert json.loads(aside.read_text())["train/loss"] == 0.5 and list(losses("run")) == [1, 2]


def test_a_run_that_early_stopping_has_ended_says_what_helps(capsys: pytest.CaptureFixture[str]) -> None:
    stop, patience = f"{STOP_EARLY}validation/log_loss".split(), "--trainer.callbacks.init_args.patience="
    fit = [*RESUME, "--trainer.val_check_interval=2", "--trainer.max_steps=8"]
    assert main([*fit, *stop, patience + "1", "--trainer.callbacks.init_args.min_delta=9"]) == 0
    capsys.readouterr()
    assert main([*fit, *stop, patience + "5"]) == 0
    assert "step 4; nothing to do (EarlyStopping in trainer.callbacks: to continue training, remove it)" in (
        capsys.readouterr().out
    )
    assert main(fit) == 0 and max(losses("run")) == 8


def test_a_second_fit_learns_who_trains_in_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RESUME, "--trainer.max_steps=2"]) == 0
    more, merged = [*RESUME, "--trainer.max_steps=4"], "run/checkpoints/merged"
    with FolderLock(Path("run")):
        kept = checksums(Path("run"))
        capsys.readouterr()
        shutil.copytree("run/checkpoints/last", "earlier")
        for refused in (more, more[:-3], ["checkpoint", "merge", "earlier", "--output", merged]):
            assert main(refused) == 2, refused
            assert "error: run is in use by process " in capsys.readouterr().err.replace(f"{Path.cwd()}/", "")
        assert checksums(Path("run")) == kept
    assert main(more) == 0


def test_a_fit_that_is_refused_the_lock_leaves_the_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    winners: list[FolderLock] = []

    class SlowerLock(FolderLock):
        """The lock of a fit that another one overtakes after both have found no folder."""

        def acquire(self) -> FolderLock:
            winners.append(FolderLock(self.folder).acquire())
            return super().acquire()

    monkeypatch.setattr(run, "FolderLock", SlowerLock)
    assert main([*RESUME[:-2], "--trainer.max_steps=2"]) == 2
    assert "error: run is in use by process " in capsys.readouterr().err
    assert [path.name for path in Path("run").iterdir()] == [LOCK]
    winners[0].release()


def test_a_checkpoint_that_another_fit_saves_before_the_lock_is_not_set_aside(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    last = Path("run/checkpoints/last")
    assert main([*RESUME, "--trainer.max_steps=2"]) == 0
    shutil.copytree(last, "earlier")
    assert main([*RESUME, "--trainer.max_steps=3"]) == 0
    shutil.copytree(last, "later")
    kept = checksums(Path("run"))

    def choose(command: str, settings: Namespace) -> list[Path]:
        chosen = choose_checkpoint(command, settings)
        shutil.rmtree(last, ignore_errors=True)
        shutil.copytree("later", last)
        return chosen

    monkeypatch.setattr(run, "choose_checkpoint", choose)
    for before, options in (
        ("earlier", RESUME),
        ("run/checkpoints/best", [*RESUME[:-2], "--ckpt_path=best"]),
        (None, RESUME),
    ):
        shutil.rmtree(last)
        if before is not None:
            shutil.copytree(before, last)
        assert main([*options, "--trainer.max_steps=4"]) == 2, before
        assert "another process has trained in run meanwhile: start this command again" in capsys.readouterr().err
        assert checksums(Path("run")) == kept


@pytest.mark.dist
def test_all_ranks_learn_that_the_folder_is_in_use() -> None:
    Path("run").mkdir()
    run = Path("run").absolute()
    sharded = ["--trainer.strategy=embedding_sharded_ddp", "--trainer.devices=2", "--trainer.accelerator=cpu"]
    fit = [*FIT, *QUICK, "--trainer.max_steps=2", "--run_dir", str(run), "--resume=auto", *sharded]
    with FolderLock(run):
        ranks = start_ranks([["-m", "lightning_dlrm", *fit]] * 2)
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert sum(f"error: {run} is in use by process " in text for text in said) == 1, said
    assert not list(run.iterdir())
