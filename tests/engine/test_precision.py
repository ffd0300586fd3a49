"""Contract: bf16 and compiled fits score as float32 fits do, within the intervals that docs/configure.md states.

Five seeds of data and parameters; each fit is compared with the float32 fit of its seed.
"""

from functools import partial
from pathlib import Path
from statistics import mean

import pytest
import pytorch_lightning as pl
import torch

from lightning_dlrm import DLRM, SGD, Criteo, CTRModule, DemoSettings, FolderCheckpointIO

SEEDS = range(1, 6)
ROWS = DemoSettings(train_rows=204_800, validation_rows=65_536, max_table_rows=10_000)
NETWORK = partial(DLRM, bottom_mlp=(32, 16), top_mlp=(32,))


def auc(seed: int, folder: Path, precision: str = "32-true", compiled: bool = False) -> float:
    """Train for an epoch, and return the AUC on the validation split."""
    data = Criteo("demo", demo=ROWS, batch_size=512, seed=seed)
    dense = partial(torch.optim.Adagrad, lr=0.01)
    module = CTRModule(NETWORK, SGD(10.0), dense, schema=data.schema, seed=seed, compile=compiled)
    trainer = pl.Trainer(
        max_epochs=1, precision=precision, accelerator="cpu", plugins=[FolderCheckpointIO()], logger=False,
        use_distributed_sampler=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, num_sanity_val_steps=0, default_root_dir=folder,
    )  # type: ignore[arg-type]  # fmt: skip
    trainer.fit(module, data)
    return module.results["validation/auc"]


@pytest.mark.slow
def test_auc_of_each_precision(tmp_path: Path) -> None:
    exact = [auc(seed, tmp_path) for seed in SEEDS]
    assert min(exact) > 0.65
    changed = {
        "bf16-mixed": [auc(seed, tmp_path, "bf16-mixed") for seed in SEEDS],
        "bf16-true": [auc(seed, tmp_path, "bf16-true") for seed in SEEDS],
        "compiled": [auc(seed, tmp_path, compiled=True) for seed in SEEDS],
    }
    differences = {name: [a - b for a, b in zip(found, exact, strict=True)] for name, found in changed.items()}
    print(differences)
    for name, least, most in (("bf16-mixed", -0.004, 0.004), ("bf16-true", -0.006, 0.002), ("compiled", -0.001, 0.001)):
        assert least < mean(differences[name]) < most, differences
