"""Contract: ``bench gpu`` keeps each row when it is done, whatever later rows do; every row's code runs, here on a CPU;
and predictions follow from counts and assumptions."""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.generate.random import RandomSettings, generate_random
from datamodules.stream.loader import TrainingLoader
from lightning_dlrm.__main__ import main
from lightning_dlrm.bench import gpu, predict, processes
from lightning_dlrm.bench.contenders import kaggle, mlperf, nvidia
from lightning_dlrm.bench.gpu import ROWS, Row
from lightning_dlrm.bench.measurement import Measurement
from lightning_dlrm.bench.predict import Gpu
from lightning_dlrm.engine import compilation
from tests.forked import ForkedPython
from tests.ranks import ROOT

SMALL = ["bench", "gpu", "--device", "cpu", "--max-rows", "50", "--batch-size", "16", "--steps", "1", "--rounds", "1"]


class WorkerThatParses:
    """In place of a fit in a process of its own, which bench fit's tests start."""

    def __init__(self, name: str, command: list[str], folder: Path) -> None:
        data = Path(command[command.index("--data.path") + 1])
        loader = TrainingLoader(data, gpu.open_dataset(data)[1], ["train"], shuffle="window", seed=1, batch_size=16)
        assert len(loader) == sum(1 for _ in loader) == 6
        assert "--data.threads=3" in command and "--data.batch_size=16" in command

    def __enter__(self) -> Callable[[int], None]:
        return lambda steps: None

    def __exit__(self, *details: Any) -> None:
        pass


def test_the_code_of_every_row_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = RandomSettings(tables=(30, 40), dense=3, train_rows=48, validation_rows=16, test_rows=0)
    generate_random(settings, tmp_path / "data", progress=False)
    monkeypatch.setattr(gpu, "_LOSS_STEPS", 2)
    monkeypatch.setattr(gpu, "_FIT_BATCHES", 6)
    monkeypatch.setattr(processes, "Worker", WorkerThatParses)
    # 26 million parameters of dense layers would take seconds.
    monkeypatch.setattr(gpu, "mlperf", lambda rows: replace(mlperf(rows), bottom=(16, 128), top=(8,), cross_rank=4))
    compiled: list[str] = []
    monkeypatch.setattr(compilation, "compile_score", lambda network, mode: compiled.append(mode))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "fbgemm_gpu" else object())
    options = ["--data", str(tmp_path / "data"), "--threads", "3", "--json", str(tmp_path / "rows.json")]
    assert main([*SMALL, *options]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert not [row["error"] for row in rows if "error" in row]
    assert {row["work"] for row in rows} == {"gpu", "lookup"} and compiled == ["default"] * 4
    steps = [row for row in rows if "host_s" in row]
    sizes = [row for row in ROWS if row.name.startswith("batch sizes")]
    assert len(steps) == len(ROWS) - len(sizes) - len(("losses", "fit", "lookup")), (
        "with --batch-size there is one size"
    )
    assert all(row["host_s"] > 0 and row["peak_bytes"] > 0 and row["samples_per_s"] > 0 for row in steps)


def test_a_row_that_fails_leaves_the_others_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """It is written with its error, and so is one that would not end within the budget; all before the next begins."""
    file = tmp_path / "rows.json"
    seen = []

    def measure(args: argparse.Namespace, error: BaseException | None = None) -> list[Measurement]:
        seen.append(len(json.loads(file.read_text())) if file.exists() else 0)
        if error is not None:
            raise error
        done = gpu._failed(Row(name="done", seconds=0, measure=measure), args, "")
        return [replace(done, median_s=2.0, samples=4, extra={"met": float(len(seen) < 3)})]

    too_large = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 105 GiB\nmore")
    rows = {
        "large": partial(measure, error=too_large), "good": measure, "long": measure, "missed": measure,
    }  # fmt: skip
    made = [Row(name=name, seconds=1000 if name == "long" else 0, measure=run) for name, run in rows.items()]
    monkeypatch.setattr(gpu, "ROWS", tuple(made))
    assert main([*SMALL, "--budget", "500", "--json", str(file)]) == 2
    assert seen == [0, 1, 3]
    large, good, long, missed = json.loads(file.read_text())
    assert (
        large["case"] == "large" and large["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 105 GiB"
    )
    assert good["samples_per_s"] == missed["samples_per_s"] == 2 and "error" not in good
    assert long["error"].startswith("not started: it takes about 1000 s, and ")
    said = capsys.readouterr()
    assert "error: 2 of 4 rows failed or missed their target: large: OutOf" in said.err and "missed: missed" in said.err
    assert said.out.count("Tried to allocate") == 2


def test_steps_need_neither_lightning_nor_what_reads_configurations() -> None:
    code = "import sys; sys.modules.update(dict.fromkeys(['wandb', 'jsonargparse', 'pytorch_lightning'])); "
    code += f"from lightning_dlrm.__main__ import main; sys.exit(main({[*SMALL, '--only', 'step dlrm']}))"
    process = ForkedPython(["-c", code], os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, ROOT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "step dlrm, batch 16" in said, said


def test_predictions_follow_from_counts_and_assumptions(capsys: pytest.CaptureFixture) -> None:
    workload = kaggle(1000)
    found = predict.predict(workload, 4096, Gpu())
    # A multiply-add counts 2, in three passes: DESIGN's figure of DLRM, and the sums of table rows.
    assert found.flops == pytest.approx(4096 * (2_879_904 + 2 * 26 * 16), rel=0.02)
    assert found.products_s == pytest.approx(4096 * 2_879_904 / (989e12 * 0.5), rel=0.001)
    assert found.bound == "host" and found.step_s == found.host_s == found.launches * 12e-6
    faster = predict.predict(workload, 4096, Gpu(launch_s=1e-9, bytes_per_s=9.6e12))
    assert faster.step_s == faster.device_s == pytest.approx(found.products_s + (found.dense_s + found.rows_s) / 2)
    assert main(["bench", "gpu", "--predict", "--only", "step dlrm", "fit"]) == 0
    said = capsys.readouterr().out
    assert "assumed of one H200: 989 TFLOP/s" in said and "15M samples/s" in said and "bound by" in said


def test_shapes_of_published_models() -> None:
    assert sum(nvidia().tables) * 128 * 4 == pytest.approx(15.6 * 2**30, rel=0.002)
    assert sum(mlperf().tables) == 204_184_588 and sum(mlperf().bag_sizes) == 214
    assert max(mlperf(10).tables) == 10
