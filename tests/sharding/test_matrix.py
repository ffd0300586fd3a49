"""Contract: every shipped model, with every kind of setting, trains and validates on 2, 3 and 4 ranks as on one,
through the command line; batches are split over all ranks.

One process group for each number of ranks runs all cases: ``python -m tests.sharding.test_matrix FOLDER``.
"""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.sharded_fits import on_ranks

FIT = "--config small.yaml --data.demo.train_rows=3000 --data.demo.validation_rows=901 --data.demo.test_rows=100"
FIT += " --data.demo.max_table_rows=300 --data.shuffle=full --data.cache=memory --data.batch_size=250"
FIT += " --data.evaluation_batch_size=400 --trainer.max_steps=4 --trainer.precision=64-true --wandb.mode=disabled"
FIT += " --trainer.log_every_n_steps=1 --model.schedule=Constant --checkpoint.every_n_steps=0"
NETWORK, TABLES = "--model.network.init_args", "--model.network.init_args.tables"
MODELS = "autoint dcn deepfm dlrm factorization_machine finalmlp logistic_regression masknet matrix_factorization mlp"
CASES = {name: f"{name}.yaml" for name in [*MODELS.split(), "wide_and_deep", "xdeepfm"]}
CASES |= {
    "dcnv2": f"dcn.yaml {NETWORK}.cross=matrix {NETWORK}.cross_layers=2",
    "dcn low rank, accumulated, clipped": f"dcn.yaml {NETWORK}.cross=low_rank {NETWORK}.cross_rank=8 "
    "--trainer.accumulate_grad_batches=2 --trainer.gradient_clip_val=0.1",
    "dcn batch norm, dropout": f"dcn.yaml {NETWORK}.batch_norm=true {NETWORK}.dropout=0.3 "
    "--trainer.sync_batchnorm=true",
    "dlrm dropout, averages": f"dlrm.yaml {NETWORK}.dropout=0.4 --model.averaging.decay=0.9",
    "dlrm batch norm": f"dlrm.yaml {NETWORK}.batch_norm=true --trainer.sync_batchnorm=true",
    "dlrm Adam": "dlrm.yaml --model.table_optimizer=Adam --model.table_optimizer.learning_rate=0.01",
    "dlrm row-wise": "dlrm.yaml --model.table_optimizer=RowWiseAdagrad --model.table_optimizer.learning_rate=0.1",
    "dlrm wide": f"dlrm.yaml {NETWORK}.wide=true --model.wide_optimizer=Adagrad "
    "--model.wide_optimizer.learning_rate=0.1",
    "dlrm in host memory": f"dlrm.yaml {TABLES}.on_host=[C1,C3]",
    "dlrm hot rows": f'dlrm.yaml {TABLES}.on_host={{"C1":10,"C3":100,"C4":0}}',
    "dlrm widths": f'dlrm.yaml {TABLES}.dims={{"C1":4,"C2":8}} {TABLES}.project=true',
    "dlrm quotients": f"dlrm.yaml {TABLES}.quotient_remainder.collisions=4",
    "dlrm cat, linear loss weights": f"dlrm.yaml {NETWORK}.interaction=cat --model.loss=FocalLoss",
}


def run_cases(folder: Path, ranks: int) -> None:
    """Run all cases in this process, as one of several ranks."""
    from lightning_dlrm.__main__ import main

    sharded = [] if ranks == 1 else ["--trainer.strategy=embedding_sharded_ddp", f"--trainer.devices={ranks}"]
    for number, case in enumerate(CASES.values()):
        config, *options = case.split()
        run = folder / str(ranks) / str(number)
        given = ["--config", config, *FIT.split(), *options, *sharded, "--trainer.accelerator=cpu"]
        assert main(["fit", *given, "--run_dir", str(run)]) == 0, (case, ranks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("matrix")
    run_ranks(["-m", "tests.sharding.test_matrix", str(top)], 1, 600)
    return top


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_a_run_on_several_ranks_is_that_of_one(folder: Path, case: str, ranks: int) -> None:
    alone, found = (folder / str(n) / str(list(CASES).index(case)) for n in (1, ranks))
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (alone, found)]
    # The gradient of a bias before a batch norm is rounding alone, which Adagrad makes steps of.
    tolerance = 1e-8 if "batch norm" in case else 1e-10
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]] == [1, 2, 3, 4]
    for mine, theirs in zip(*lines, strict=True):
        for name in ("train/loss", "validation/log_loss", "validation/auc"):
            assert (name in theirs) == (name in mine), (name, mine["step"])
            assert theirs.get(name, 0.0) == pytest.approx(mine.get(name, 0.0), rel=tolerance), (name, mine["step"])
    assert "validation/auc" in lines[0][-1]
    summary = json.loads((found / "summary.json").read_text())["final"]
    assert summary["parallel/ranks"] == ranks


if __name__ == "__main__":
    os.environ["LIGHTNING_DLRM_CACHE"] = sys.argv[1] + "/cache"
    for world in (1, 2, 3, 4):
        on_ranks(world, lambda rank: run_cases(Path(sys.argv[1]), world))  # noqa: B023 (called at once)
