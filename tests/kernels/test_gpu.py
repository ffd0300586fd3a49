"""What only a CUDA device can show: fused kernels compiled, steps recorded as graphs, batches copied beside them.

Run with ``pytest -m gpu tests/kernels/test_gpu.py``; speeds are ``bench gpu``'s.
"""

import json
from pathlib import Path

import pytest
import torch

from datamodules.generate.random import RandomSettings, generate_random
from lightning_dlrm.__main__ import main
from lightning_dlrm.bench.contenders import OurStep, Workload, draw_batch
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


@pytest.mark.parametrize("bags", [None, (0, 20)], ids=["one id", "bags"])
def test_recorded_steps_train_as_eager_ones(bags: tuple[int, int] | None) -> None:
    workload = Workload(tables=(4000, 3, 60), dense=13, width=16, bottom=(64, 16), top=(32,), bags=bags)
    network, eager_network = workload.network().to(CUDA), workload.network().to(CUDA)
    recorded = OurStep(network, "32-true", CUDA, graphs=True)
    eager = OurStep(eager_network, "32-true", CUDA)
    for seed, size in enumerate([256] * 12 + [100] + [256] * 3):
        batch = draw_batch(workload, size, seed)
        torch.testing.assert_close(recorded(batch), eager(batch), rtol=1e-6, atol=1e-7)
    for ours, theirs in zip(network.parameters(), eager_network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_losses_stay_near_those_of_eager_float32() -> None:
    workload = Workload(tables=(4000, 3, 60), dense=13, width=16, bottom=(64, 16), top=(32,))
    missed = [target for target in loss_targets(workload, CUDA, 1024, 300) if not target.met]
    assert not missed


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_fit_with_graphs_has_the_losses_of_one_without(precision: str, tmp_path: Path) -> None:
    """Through Lightning, from a dataset folder, with an epoch's short last batch and a change of learning rates."""
    settings = RandomSettings(tables=(300, 40), dense=13, train_rows=1000, validation_rows=64, test_rows=0)
    generate_random(settings, tmp_path / "data", progress=False)
    losses = {}
    for graphs in ("false", "true"):
        options = ["--config", "dlrm.yaml", "--data.path", str(tmp_path / "data"), "--data.batch_size", "128"]
        options += ["--run_dir", str(tmp_path / graphs), "--trainer.accelerator", "gpu", "--wandb.mode", "disabled"]
        options += ["--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "1"]
        options += ["--trainer.precision", precision, "--model.cuda_graphs", graphs]
        assert main(["fit", *options]) == 0
        lines = (tmp_path / graphs / "metrics.jsonl").read_text().splitlines()
        losses[graphs] = [line["train/loss"] for line in map(json.loads, lines) if "train/loss" in line]
    assert len(losses["true"]) == 24
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-5 if precision == "32-true" else 2e-3)
