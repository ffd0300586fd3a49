"""Contract: an evaluation finds the same on any number of ranks: every row once, the same scores, predictions in row
order; launched by torchrun or by Lightning itself."""

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pytorch_lightning as pl

from lightning_dlrm.__main__ import main
from lightning_dlrm.cli.predictions import SCHEMA, PredictionWriter, merge_by_row
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.tracking.run_folder import RunFolder
from tests.caches import new_cache
from tests.forked import ForkedPython
from tests.ranks import ROOT, run_ranks, start_ranks
from tests.toy import ToyData, toy_module

pytestmark = pytest.mark.dist

# 17,003 rows: over two row groups, and divisible by neither the ranks nor the batch size.
_FIT = [
    *["fit", "--config", "dlrm.yaml", "--config", "small.yaml", "--wandb.mode=disabled"],
    *["--data.demo.train_rows=16000", "--data.demo.validation_rows=17003", "--data.demo.test_rows=3000"],
    *["--data.demo.max_table_rows=1000", "--trainer.enable_progress_bar=false"],
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint, and one process's scores of it."""
    path = tmp_path_factory.mktemp("ranks") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_DLRM_CACHE", new_cache(path.parent / "cache"))
        assert main([*_FIT, "--run_dir", str(path)]) == 0
        assert main(["validate", *_again(path)]) == 0
        (path / "validate.json").rename(path / "alone.json")
        assert main(["predict", *_again(path), "--data.predict_split=all"]) == 0
        (path / "predictions.parquet").rename(path / "alone.parquet")
    return path


def _again(run: Path) -> list[str]:
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    return ["--config", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints/best"), *quiet]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_scores_are_those_of_one_process(run: Path, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DLRM_CACHE", str(run.parent / "cache"))
    arguments = ["-m", "lightning_dlrm", "validate", *_again(run), f"--trainer.devices={ranks}"]
    run_ranks([*arguments, "--data.evaluation_batch_size=4096"], ranks)
    found, alone = (json.loads((run / name).read_text()) for name in ("validate.json", "alone.json"))
    assert found == pytest.approx(alone, abs=1e-7)


def test_predictions_are_those_of_one_process(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DLRM_CACHE", str(run.parent / "cache"))
    arguments = ["-m", "lightning_dlrm", "predict", *_again(run), "--trainer.devices=3", "--data.predict_split=all"]
    run_ranks(arguments, 3)
    found, alone = (pq.read_table(run / name) for name in ("predictions.parquet", "alone.parquet"))
    assert found["row"].equals(alone["row"]) and len(found) == 16_000 + 17_003 + 3000
    difference = np.abs(found["probability"].to_numpy() - alone["probability"].to_numpy())
    assert difference.max() < 1e-6
    assert not list(run.glob("predictions.parquet.partial*"))


class SpoilSecondRank(pl.Callback):
    """Spoils a parameter of rank 1 before predictions."""

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_rank == 1:
            next(pl_module.parameters()).data[0] = float("nan")


def test_nan_of_one_rank_is_one_line_and_leaves_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DLRM_CACHE", str(run.parent / "cache"))
    before = sorted(run.iterdir())
    spoil = f"--trainer.callbacks+={__name__}.{SpoilSecondRank.__name__}"
    arguments = ["-m", "lightning_dlrm", "predict", *_again(run), "--trainer.devices=2", spoil, "--trust", "tests"]
    processes = start_ranks([arguments] * 2)
    try:
        said = [process.communicate(timeout=90)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [2, 2], said
    lines = [line for text in said for line in text.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and re.match(r"error: the probability of row \d+ is NaN: ", lines[0])
    assert sorted(run.iterdir()) == before


def _damaged(rows: int) -> Iterator[pa.Table]:
    yield pa.table({"split": ["test"] * rows})
    raise UserError("the data are damaged")


@pytest.mark.parametrize("earlier", [False, True])
def test_an_error_while_predictions_are_merged_leaves_nothing(earlier: bool, tmp_path: Path) -> None:
    if earlier:
        (tmp_path / "predictions.parquet").write_bytes(b"earlier")
    writer = PredictionWriter(RunFolder(tmp_path), lambda: _damaged(0))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = pl.Trainer(callbacks=[writer], **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the data are damaged"):
        trainer.predict(toy_module(), ToyData(), return_predictions=False)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"earlier"] * earlier


def test_parts_in_any_interleaving_are_merged_by_row(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    owner = rng.integers(0, 3, 1000)
    owner[200:500] = 1
    parts = [tmp_path / str(rank) for rank in range(4)]
    for rank, part in enumerate(parts):
        with pq.ParquetWriter(part, SCHEMA) as writer:
            for rows in np.array_split(np.flatnonzero(owner == rank), 7):
                writer.write_table(pa.table([rows, rows.astype(np.float32)], schema=SCHEMA))
    with pytest.raises(UserError, match="the data are damaged"):
        merge_by_row(parts, tmp_path / "all.parquet", _damaged(600))
    assert sorted(tmp_path.iterdir()) == parts, "a file with the first rows is removed"
    merge_by_row(parts, tmp_path / "all.parquet")
    found = pq.read_table(tmp_path / "all.parquet")
    assert found["row"].to_pylist() == found["probability"].to_pylist() == list(range(1000))
    assert [path.name for path in tmp_path.iterdir()] == ["all.parquet"]


def test_a_part_out_of_sight_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="of another rank are not visible"):
        merge_by_row([tmp_path / "0"], tmp_path / "all.parquet")


def test_training_in_several_processes_needs_sharding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*_FIT, "--run_dir", str(tmp_path / "run"), "--trainer.devices=2", "--trainer.accelerator=cpu"]
    assert main(arguments) == 2
    assert "needs --trainer.strategy embedding_sharded_ddp" in capsys.readouterr().err


def _local_rank(process: psutil.Process) -> str | None:
    """The LOCAL_RANK that `process` was started with; None if it has none, or has ended meanwhile."""
    try:
        return process.environ().get("LOCAL_RANK")
    except psutil.Error:
        return None


def test_a_rank_that_dies_ends_the_others(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DLRM_CACHE", str(run.parent / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # One row a batch: long enough to be killed in the midst.
    arguments = ["predict", *_again(run), "--trainer.devices=2", "--data.evaluation_batch_size=2"]
    first = ForkedPython(["-m", "lightning_dlrm", *arguments, "--data.predict_split=all"], os.environ, run)
    try:
        second = run / "predictions.parquet.partial-1"
        deadline = time.monotonic() + 60
        while not second.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        # The first rank may have other, short-lived children at that moment.
        (other_rank,) = [child for child in psutil.Process(first.pid).children() if _local_rank(child) == "1"]
        other_rank.kill()
        told, _ = first.communicate(timeout=60)
    finally:
        first.kill()
    # The launcher or the other rank is the first to see it.
    assert first.returncode != 0 and ("terminated with code -9" in told or "another rank has ended" in told)
    for partial in run.glob("predictions.parquet.partial*"):
        partial.unlink()
