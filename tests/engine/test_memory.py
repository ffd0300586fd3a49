"""Contract: the memory of a run is counted before it is taken, and a run that does not fit is refused with what would
fit."""

import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from lightning_dlrm.__main__ import main
from lightning_dlrm.engine import memory
from lightning_dlrm.engine.averaging import Averaging
from lightning_dlrm.engine.checkpointing import FolderCheckpointIO
from lightning_dlrm.engine.memory import count_memory, rows_on_rank, table_loads
from lightning_dlrm.optim.rules import SGD, Adagrad, Adam, RowWiseAdagrad, UpdateRule
from lightning_dlrm.sharding.balance import make_plan
from tests.toy import ToyData, toy_module


class Weigh(pl.Callback):
    """Counts what a fit holds, from the tensors themselves."""

    held: Counter[str]

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        optimizer, network, averages = trainer.optimizers[0], pl_module.network, pl_module.averages
        state = [value for of_one in optimizer.dense.state.values() for value in of_one.values() if value.dim()]
        kept = [value for of_one in averages.slots().values() for value in of_one.values()] if averages else []
        kept += averages.dense_average.values() if averages else []
        self.held = Counter(
            tables=sum(lookup.weight.nbytes for lookup in network.lookups()),
            optimizer_tables=sum(value.nbytes for of_one in optimizer.table_state for value in of_one.values()),
            dense=sum(parameter.nbytes for parameter in network.dense_parameters()),
            optimizer_dense=sum(value.nbytes for value in state),
            averages=sum(value.nbytes for value in kept),
        )


@pytest.mark.parametrize(
    "rule", [SGD(0.1), Adagrad(0.1), RowWiseAdagrad(0.1), Adam(0.1)], ids=lambda r: type(r).__name__
)
@pytest.mark.parametrize("averaging", [None, Averaging()], ids=["plain", "averages"])
def test_what_is_counted_is_what_a_fit_holds(rule: UpdateRule, averaging: Averaging | None, tmp_path: Path) -> None:
    module, weigh = toy_module(table_rule=rule, averaging=averaging), Weigh()
    with torch.device("meta"):
        network = module.make_network(module.schema.features, module.seed)
    counted = count_memory(module, network, samples=50)
    trainer = pl.Trainer(
        default_root_dir=tmp_path, max_epochs=1, logger=False, accelerator="cpu", callbacks=[weigh],
        plugins=[FolderCheckpointIO()], enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, ToyData())
    dense_gradients = counted["dense"]
    vectors = 50 * 4 * len(module.schema.features.tables)
    assert counted.pop("gradients") == dense_gradients + vectors * (2 * 4 + 4)
    assert +counted == +weigh.held
    of_evaluation = count_memory(module, network, samples=50, training=False)
    assert +of_evaluation == {"tables": counted["tables"], "dense": counted["dense"]}


def test_ranks_hold_what_one_process_holds() -> None:
    module = toy_module()
    with torch.device("meta"):
        network = module.make_network(module.schema.features, module.seed)
    plan = make_plan(table_loads(network, module), ranks=3, batch_size=50)
    ranks = [count_memory(module, network, 50 / 3, held=partial(rows_on_rank, plan, rank)) for rank in range(3)]
    whole = count_memory(module, network, 50)
    for part in ("tables", "optimizer_tables"):
        assert sum(rank[part] for rank in ranks) == whole[part]
    assert {rank["dense"] for rank in ranks} == {whole["dense"]}


def fit(monkeypatch: pytest.MonkeyPatch, free: float, *options: str) -> int:
    monkeypatch.setattr(memory, "available_memory", lambda: free)
    return main(["fit", "--config", "dcn.yaml", "--run_dir", "run", *options])


@pytest.mark.parametrize(
    ("free", "fits"),
    [
        (5 * 2**30, "--model.table_optimizer RowWiseAdagrad takes 2.152 GiB; vectors of width 13 or less"),
        (2 * 2**30, "vectors of width 5 or less"),
    ],
)
def test_a_fit_that_does_not_fit_is_refused(
    free: float, fits: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--model.table_optimizer", "Adam", "--trainer.logger", "false"]
    assert fit(monkeypatch, free, *options) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    needs = re.search(
        r"this run needs (\S+) GiB of memory \(optimizer state of tables (\S+) GiB, tables (\S+) GiB\)", line
    )
    assert needs is not None and [round(float(number), 1) for number in needs.groups()] == [6.1, 4.0, 2.0], line
    assert f"this machine has {free / 2**30:.4g} GiB free" in line and fits in line
    assert not Path("run").exists()


def test_too_little_memory_for_the_dense_layers_is_found_without_making_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fit(monkeypatch, 2**30, "--model.network.deep", "[100000000]") == 2
    said = capsys.readouterr().err
    assert "dense 160.6 GiB" in said and said.endswith("1 GiB free; what would fit: narrower layers\n")
