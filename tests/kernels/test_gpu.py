"""Tests that need a CUDA device: fused kernels, compiled steps with CUDA graphs, batches copied in a side stream.

Run with ``pytest -m gpu tests/kernels/test_gpu.py``; speeds are ``bench gpu``'s.
"""

import json
from pathlib import Path

import pytest
import torch

from datamodules.generate.random import RandomSettings, generate_random
from lightning_dlrm.__main__ import main
from lightning_dlrm.bench.contenders import Workload
from lightning_dlrm.bench.gpu import loss_targets
from tests.kernels.test_kernels import RULES, assert_alike, one_hot, ragged

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("width", [5, 16, 64, 128])
def test_fused_kernels_are_plain_torchs(rule: str, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [one_hot(5000, generator), ragged(700, generator), ragged(700, generator, weighted=True)]
    assert_alike(batches, RULES[rule], width, "cuda")


def test_losses_stay_near_those_of_eager_float32() -> None:
    workload = Workload(tables=(4000, 3, 60), dense=13, width=16, bottom=(64, 16), top=(32,))
    missed = [target for target in loss_targets(workload, CUDA, 1024, 300) if not target.met]
    assert not missed


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_compiled_fit_has_the_losses_of_an_eager_fit(precision: str, tmp_path: Path) -> None:
    """Through Lightning, from a dataset folder, with an epoch's short last batch and a change of learning rates."""
    settings = RandomSettings(tables=(300, 40), dense=13, train_rows=1000, validation_rows=64, test_rows=0)
    generate_random(settings, tmp_path / "data", progress=False)
    losses = {}
    for mode in ("false", "reduce-overhead"):
        options = ["--config", "dlrm.yaml", "--data.path", str(tmp_path / "data"), "--data.batch_size", "128"]
        options += ["--run_dir", str(tmp_path / mode), "--trainer.accelerator", "gpu", "--wandb.mode", "disabled"]
        options += ["--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "1"]
        options += ["--trainer.precision", precision, "--model.compile", mode]
        assert main(["fit", *options]) == 0
        lines = (tmp_path / mode / "metrics.jsonl").read_text().splitlines()
        losses[mode] = [line["train/loss"] for line in map(json.loads, lines) if "train/loss" in line]
    compiled, eager = losses["reduce-overhead"], losses["false"]
    assert len(eager) == 24
    assert compiled == pytest.approx(eager, rel=1e-5 if precision == "32-true" else 2e-3)
